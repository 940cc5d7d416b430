"""A loop of the user's own that ends anywhere and is started again comes to the same bits."""

import random

import numpy as np
import pytest
import torch
from support.killed import Killed
from support.models import everywhere_equal, flat, sgd

import hvdlocal
from hvdlocal.communicator import SetupError
from hvdlocal.training import interruption
from hvdlocal.training.checkpoint import files
from hvdlocal.training.checkpoint.files import CheckpointError

STEPS = 23


@pytest.fixture
def place(place):
    """A directory in `place`: the trainer's runs in other files bear the same names."""
    directory = place / "own_loop"
    directory.mkdir(exist_ok=True)
    return directory


class Loop:
    """A network with dropout, noise from NumPy and from `random`, a schedule and a counter."""

    def __init__(self, place, name, *, synchronous=False, accumulate=1, lr=0.05, outer=None, overlap=0, **settings):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        inner = sgd(self.model, lr=lr, momentum=0.9)
        if synchronous:
            self.optimizer = hvdlocal.SynchronousOptimizer(inner, self.model, accumulate=accumulate)
        else:
            period = hvdlocal.ConstantPeriod(5)
            self.optimizer = hvdlocal.LocalOptimizer(
                inner, self.model, period=period, accumulate=accumulate, outer=outer, overlap=overlap
            )
        self.comm = self.optimizer.communicator
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(1 + self.comm.rank)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, gamma=0.7)
        self.seen = {"batches": 0, "losses": []}
        self.checkpoints = hvdlocal.Checkpoints(
            place / name,
            optimizer=self.optimizer,
            model=self.model,
            state={"schedule": self.schedule, "seen": self.seen},
            **{"every_steps": 4, "keep": 3, **settings},
        )

    def run(self, die_after=None):
        with self.checkpoints as checkpoints:
            self.restored = checkpoints.resume()
            try:
                while checkpoints.steps < STEPS:
                    self.step()
                    checkpoints.after_step()
                    if checkpoints.steps == die_after and not self.optimizer.micro_batches:
                        raise Killed
                checkpoints.finish()
            except Killed:
                checkpoints._coordinator.status.close()
                self.optimizer.finish_average()
        self.comm.barrier("test.looped")
        return self

    def step(self):
        x = torch.randn(4, 6) + np.random.rand() + random.random()
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.seen["batches"] += 1
        self.seen["losses"].append(loss.detach())


KINDS = [
    {},
    {"accumulate": 2},
    {"synchronous": True, "accumulate": 2},
    {"outer": hvdlocal.nesterov(0.7, 0.9)},
    {"outer": hvdlocal.slowmo(0.5), "overlap": 3},
    {"overlap": 7},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_loop_killed_anywhere_comes_to_the_same_end(comm, place, kind):
    whole = Loop(place, f"whole-{kind}", **kind).run()
    assert whole.restored is None
    for death in (7, 18):
        Loop(place, f"killed-{kind}", **kind).run(death)
    final = Loop(place, f"killed-{kind}", **kind).run()
    assert final.restored.steps >= 12
    assert final.restored.ranks == comm.size
    assert not final.restored.averaged
    assert torch.equal(flat(final.model), flat(whole.model))
    assert torch.equal(torch.stack(final.seen["losses"]), torch.stack(whole.seen["losses"]))
    assert final.schedule.state_dict() == whole.schedule.state_dict()
    with (
        pytest.raises(hvdlocal.AlreadyFinished, match="finished: nothing to do") as end,
        Loop(place, f"killed-{kind}", **kind).checkpoints as checkpoints,
    ):
        checkpoints.resume()
    assert end.value.code == 0


def test_a_request_to_stop_inside_a_round(comm, place, monkeypatch):
    loop = Loop(place, "asked", every_steps=None)
    asked = interruption.SIGNALS[0] if comm.rank == comm.size - 1 else None
    monkeypatch.setattr(interruption, "received", lambda: asked)
    with pytest.raises(hvdlocal.Interrupted, match=f"SIGUSR2 on rank {comm.size - 1}") as end:
        loop.run()
    assert end.value.code == 85
    monkeypatch.setattr(interruption, "received", lambda: None)
    step = files.newest_first(place / "asked" / "checkpoints")[0]
    assert step == loop.checkpoints.steps
    final = Loop(place, "asked", every_steps=None).run()
    assert final.restored.steps == step
    whole = Loop(place, "asked-whole").run()
    assert torch.equal(flat(final.model), flat(whole.model))


def test_what_is_refused(comm, place):
    Loop(place, "refused").run(18)
    with pytest.raises(CheckpointError, match=r"param group 0 lr: 0\.05, not 0\.5"):
        Loop(place, "refused", lr=0.5).run()
    with pytest.raises(CheckpointError, match="with overlap: None, not 3"):
        Loop(place, "refused", overlap=3).run()
    with pytest.raises(CheckpointError, match="with outer: None, not"):
        Loop(place, "refused", outer=hvdlocal.nesterov()).run()
    with pytest.raises(CheckpointError, match="optimizer: LocalOptimizer around SGD, not SynchronousOptimizer"):
        Loop(place, "refused", synchronous=True).run()
    if comm.rank == 0:
        (place / "trainer").mkdir()
        (place / "trainer" / "environment.json").write_text('{"run": "0123"}')
    comm.barrier("test.refused")
    with pytest.raises((SetupError, ValueError), match="holds a run of `hvdlocal train`"):
        Loop(place, "trainer").run()


def test_ranks_at_different_steps(comm, place):
    """Such a checkpoint would be of no use; it is noticed before anything is written."""
    loop = Loop(place, "apart", every_steps=2)
    with loop.checkpoints as checkpoints:
        checkpoints.resume()
        loop.step()
        checkpoints.after_step()
        loop.step()
        checkpoints._steps += 2 * comm.rank
        if comm.size > 1:
            with pytest.raises(hvdlocal.DisagreementError, match="optimizer steps: rank 1 has 4, rank 0 has 2"):
                checkpoints.after_step()
        checkpoints._coordinator.status.close()
    assert not (place / "apart" / "checkpoints").exists()
    assert everywhere_equal(comm, torch.zeros(1))
