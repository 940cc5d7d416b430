"""Checkpoints of a job that goes on without ranks that die: complete, of the ranks that are left, or not there at all."""

import time
from contextlib import closing, nullcontext

import pytest
import torch
from support.mortal import Death, run_mortal

from hvdlocal.directory import Directory
from hvdlocal.training import interruption, output_directory
from hvdlocal.training.checkpoint import files
from hvdlocal.training.checkpoint.coordinator import CheckpointCoordinator
from hvdlocal.training.checkpoint.resume import averaged_model, resume
from hvdlocal.training.checkpoint.writer import CheckpointWriter
from hvdlocal.training.config import CheckpointConfig
from hvdlocal.training.interruption import Interrupted
from hvdlocal.training.output_directory import OutputDirectory, lock
from hvdlocal.training.run_files import CHECKPOINTS, RunStatus
from hvdlocal.training.status_exchange import Status, StatusExchange

RANKS = 4


class Clock:
    """In place of a run's totals: a step takes a second."""

    elapsed = 0.0

    def beside_training(self):
        return nullcontext()

    def waited(self, seconds):
        pass


class Run:
    """One rank of a run of so many steps, as a trainer makes it. Its model is the number of the rank in the job."""

    def __init__(self, communicator, path, **config):
        self.communicator = communicator
        self.own = communicator.rank
        self.totals = Clock()
        self.losses = 0
        self.completed = []
        self.output = OutputDirectory(path, communicator, lambda: RunStatus.NEW, "")
        self.coordinator = CheckpointCoordinator(
            communicator,
            CheckpointConfig(**config),
            self.output.directory,
            interruption.Deadline(None),
            self.totals,
            self.state,
            self.contents,
            self.completed.append,
        )

    def state(self):
        assert len(self.communicator.losses) == self.losses  # a run that has not gone on is not that of its ranks
        self.communicator.barrier("test.state")  # as a loop of the user's own has one
        return {"model": {"weight": torch.full((3,), float(self.own))}}

    def contents(self):
        assert len(self.communicator.losses) == self.losses
        return {"num_workers": self.communicator.size, "in_sync": False}

    def go_on(self):
        if len(self.communicator.losses) > self.losses:
            self.losses = len(self.communicator.losses)
            if self.communicator.rank == 0:
                self.output.take_over()
            self.coordinator.after_loss()

    def train(self, steps, stop_at=None):
        self.coordinator.start()
        for step in range(1, steps + 1):
            self.communicator.sum_(torch.zeros(1), "test.step")
            self.totals.elapsed += 1
            self.go_on()
            while step == stop_at:
                self.coordinator.stop(step, "the test")
                self.go_on()
            self.coordinator.after_step(step)
            self.go_on()
            while self.coordinator.writer.is_writing:  # so that each run has the same checkpoints
                time.sleep(0.001)
        self.coordinator.finish()


def checkpoints(path):
    """The manifests of all checkpoints, the newest first; that each is complete and the average of its ranks is checked."""
    root = path / CHECKPOINTS
    found = []
    for step in files.newest_first(root):
        one = files.directory(root, step)
        manifest = files.read_manifest(one)
        ranks = manifest["num_workers"]
        assert sorted(file.name for file in one.iterdir()) == ["manifest.json", *map(files.rank_file, range(ranks))]
        owners = [files.read_state(one, manifest, rank)["model"]["weight"][0].item() for rank in range(ranks)]
        assert owners == sorted(set(owners))
        mean = torch.full((3,), sum(owners) / ranks)
        assert torch.equal(averaged_model(one)["weight"], mean)
        found.append({**manifest, "owners": owners})
    assert not list(root.glob("*.tmp"))
    return found


def run(path, *deaths, steps=60, stop_at=None, **config):
    config.setdefault("every_minutes", 5 / 60)

    def body(communicator):
        one = Run(communicator, path, **config)
        with closing(one.output), closing(one.coordinator.writer):  # a process that dies leaves no lock
            one.train(steps, stop_at)
            return one.completed, len(communicator.losses)

    return [result for result in run_mortal(RANKS, body, *deaths) if result is not None]


DEATHS = {
    "of the first, at a step": [Death(0, "test.step", 13)],
    "of the first, at a checkpoint": [Death(0, "hvdlocal.checkpoint", 1)],
    "of another, at a checkpoint": [Death(3, "hvdlocal.checkpoint", 2)],
    "of two at once": [Death(0, "hvdlocal.checkpoint", 2), Death(1, "hvdlocal.checkpoint", 2)],
    **{f"of rank {rank}, at exchange {i}": [Death(rank, "hvdlocal.poll", i)] for i in range(4, 9) for rank in (0, 2)},
    "of another, at the beginning of a checkpoint": [Death(1, "test.state", 2)],
    "of one after another": [Death(0, "hvdlocal.poll", 5), Death(1, "hvdlocal.poll", 6), Death(3, "hvdlocal.poll", 9)],
}


@pytest.mark.parametrize("deaths", DEATHS.values(), ids=DEATHS)
def test_checkpoints_go_on_with_the_ranks_that_are_left(tmp_path, deaths):
    survivors = run(tmp_path, *deaths)
    lost = {death.rank for death in deaths}
    assert len(survivors) == RANKS - len(lost)
    assert all(one == survivors[0] for one in survivors)  # the same checkpoints on all of them
    found = checkpoints(tmp_path)
    assert len(found) == 2  # keep
    left = [rank for rank in range(RANKS) if rank not in lost]
    assert [one["owners"] for one in found] == [left, left]
    assert found[0]["step"] > 50


def test_an_open_checkpoint_is_not_completed_and_another_is_begun_soon(tmp_path):
    completed, _ = run(tmp_path, Death(3, "test.step", 24), every_minutes=20 / 60, steps=40)[0]
    # Begun at about step 21, when 20 seconds had passed; with the loss at step 24 another one is due at once.
    assert len(completed) == 1
    assert 24 < completed[0] < 34
    assert checkpoints(tmp_path)[0]["num_workers"] == 3


def test_a_checkpoint_from_before_the_loss_stays(tmp_path):
    run(tmp_path, Death(1, "test.step", 22), every_minutes=None, every_steps=12, steps=23)
    assert {one["step"]: one["owners"] for one in checkpoints(tmp_path)}[12] == [0, 1, 2, 3]


def test_what_a_dead_first_rank_has_left_is_removed(tmp_path):
    """It died while it completed a checkpoint, or removed an old one."""

    def body(communicator):
        writer = CheckpointWriter(communicator, Directory(tmp_path), keep=2)
        with closing(writer):
            for step in (10, 20):
                writer.begin(step, {"model": {}}, {"num_workers": communicator.size})
                assert writer.finish(wait=True) is None
            root = tmp_path / CHECKPOINTS
            communicator.barrier("test.complete")
            if communicator.rank == 0:
                files.directory(root, 10).rename(root / "step-0000000010.old.tmp")
                files.directory(root, 20).rename(root / "step-0000000020.tmp")
            writer.begin(30, {"model": {}}, {"num_workers": communicator.size})
            communicator.barrier("test.step")
            writer.after_loss(35)
            while writer.is_writing:
                time.sleep(0.001)
            communicator.barrier("test.removed")
            assert [path.name for path in root.glob("*.tmp")] == [
                "step-0000000030.tmp"
            ]  # which others may still write to
            communicator.barrier("test.seen")
            assert "rank 0 on node0 is lost" in writer.finish(wait=True)
        return True

    assert run_mortal(3, body, Death(0, "test.step"))[1:] == [True, True]
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["latest"]


def test_the_first_rank_dies_before_it_has_removed_what_a_dead_rank_has_left(tmp_path, monkeypatch):
    discard = CheckpointWriter._discard
    monkeypatch.setattr(
        CheckpointWriter, "_discard", lambda self, step: len(self._communicator.losses) > 1 and discard(self, step)
    )

    def body(communicator):
        with closing(CheckpointWriter(communicator, Directory(tmp_path), keep=2)) as writer:
            writer.begin(10, {"model": {}}, {})
            assert "rank 2 on node2 is lost" in writer.finish()
            return sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir())

    survivors = run_mortal(RANKS, body, Death(2, "hvdlocal.checkpoint"), Death(0, "hvdlocal.checkpoint.discarded"))
    assert survivors == [None, [], None, []]


@pytest.mark.parametrize("does_it", [True, False])
def test_the_first_rank_dies_while_it_completes_the_last_checkpoint(tmp_path, monkeypatch, does_it):
    if not does_it:
        complete = CheckpointWriter._complete
        monkeypatch.setattr(
            CheckpointWriter,
            "_complete",
            lambda self, *rest: complete(self, *rest) if self._communicator.losses else None,
        )

    def body(communicator):
        one = Run(communicator, tmp_path, every_minutes=60)
        with (
            closing(one.output),
            closing(one.coordinator.writer),
            pytest.raises(Interrupted, match=r"step 7: the test\."),
        ):
            one.train(20, stop_at=7)
        return True

    assert run_mortal(RANKS, body, Death(0, "hvdlocal.checkpoint.complete"))[1:] == [True] * 3
    (found,) = checkpoints(tmp_path)
    assert (found["step"], found["owners"]) == (7, [0, 1, 2, 3] if does_it else [1, 2, 3])


@pytest.mark.parametrize("at", ["hvdlocal.checkpoint", "hvdlocal.checkpoint.discarded", "hvdlocal.interruption"])
def test_ranks_die_while_the_run_stops(tmp_path, at):
    def body(communicator):
        one = Run(communicator, tmp_path, every_minutes=60)
        with closing(one.output), closing(one.coordinator.writer), pytest.raises(Interrupted, match="after step 7"):
            one.train(20, stop_at=7)
        return True

    deaths = (
        [Death(0, at)] if at != "hvdlocal.checkpoint.discarded" else [Death(2, "hvdlocal.checkpoint"), Death(0, at)]
    )
    survivors = run_mortal(RANKS, body, *deaths)
    left = [rank for rank in range(RANKS) if rank not in {death.rank for death in deaths}]
    assert [rank for rank, one in enumerate(survivors) if one] == left
    (found,) = checkpoints(tmp_path)
    assert found["owners"] == ([0, 1, 2, 3] if at == "hvdlocal.interruption" else left)


def test_a_later_start_with_all_ranks_continues_from_the_average_of_those_that_were_left(tmp_path):
    run(tmp_path, Death(0, "test.step", 20))

    def body(communicator):
        found = resume(communicator, tmp_path / CHECKPOINTS, lambda manifest: None)
        return found.state, found.averaged["model"]["weight"].tolist()

    assert run_mortal(RANKS, body) == [(None, [2.0] * 3)] * RANKS  # (1 + 2 + 3) / 3


def test_the_first_rank_that_is_left_decides_when_to_exchange():
    """Each rank has a clock of its own; after a loss all exchange at the same steps, about every two seconds."""

    def body(communicator):
        seconds_per_step = 0.1 + 0.1 * communicator.rank
        exchange = StatusExchange(communicator)
        at = []
        for step in range(1, 200):
            if exchange.is_at(step):
                at.append(step)
                answer = exchange.exchange(step, step * seconds_per_step, Status(writing=1))
                assert answer is None or answer.writing in (RANKS, communicator.size)
        exchange.close()
        return at

    _, *survivors = run_mortal(RANKS, body, Death(0, "hvdlocal.poll", 4))
    assert survivors == [survivors[0]] * 3
    assert survivors[0][-1] - survivors[0][-2] == 10  # two seconds of rank 1


def test_the_next_rank_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(output_directory, "PATIENCE_SECONDS", 0.0)

    def body(communicator):
        with closing(OutputDirectory(tmp_path, communicator, lambda: RunStatus.NEW, "")) as output:
            communicator.barrier("test.step")
            if communicator.rank == 0:
                output.take_over()
                output.take_over()  # does nothing
                with pytest.raises(ValueError, match="in use by another run"):
                    lock(tmp_path)
        with lock(tmp_path):  # it ends with the run
            return True

    assert run_mortal(2, body, Death(0, "test.step")) == [None, True]


def test_a_rank_does_not_take_over_while_another_process_holds_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(output_directory, "DEAD_LOCK_SECONDS", 0.1)
    other = []

    def body(communicator):
        with closing(OutputDirectory(tmp_path, communicator, lambda: RunStatus.NEW, "")) as output:
            communicator.barrier("test.step")
            other.append(lock(tmp_path))  # as of a run that was started when the first rank had died
            with pytest.raises(OSError, match="is locked by another process"):
                output.take_over()
            return True

    assert run_mortal(2, body, Death(0, "test.step")) == [None, True]
    other[0].close()
