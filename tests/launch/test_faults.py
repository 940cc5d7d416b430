"""Faults, one by one: the job ends in time and says why; started again, it ends with the numbers of a run that met none."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.configs import write_config
from support.launch import MPIRUN, ROOT, Result, environment, launch

from hvdlocal.data import ShardWriter

pytestmark = pytest.mark.timeout(900)  # a test starts several jobs, each with a deadline of its own

HOST = re.escape(socket.gethostname())
DEADLINE = 150.0
"""Of one job. A few seconds are enough on a quiet machine."""

ENDED_SECONDS = 15.0
"""After a rank died, within these all others are out; after one was stopped, they come on top of the timeout."""

LEFT_SECONDS = 5.0

TIMEOUT_SECONDS = 8


@dataclass
class Run:
    """A configuration and what it writes to.

    Attributes:
        ranks: to start; 0 for a plain process.
        arguments: settings beside the configuration's.
    """

    config: Path
    output: Path
    ranks: int = 2
    arguments: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the complete ones, in order."""
        return sorted(int(path.name[5:]) for path in self.output.glob("checkpoints/step-??????????"))

    def command(self, *faults: str) -> list[str]:
        start = [*MPIRUN, "-np", str(self.ranks)] if self.ranks else []
        settings = [*self.arguments, "--output", str(self.output)]
        return [
            *start,
            sys.executable,
            str(ROOT / "tests/launch/faulty.py"),
            *faults,
            "train",
            str(self.config),
            *settings,
        ]

    def start(self, *faults: str, step: int | None = None, **env: str) -> Result:
        """To its end; then none of its processes is left, and it has gone on from `step`, else the newest checkpoint."""
        expected = self.checkpoints[-1:] if step is None else [step]
        result = launch(*self.command(*faults), timeout=DEADLINE, **env)
        assert len(re.findall("^faulty: rank . .* at ", result.err, re.M)) == len(faults), result.err
        pids = [int(pid) for pid in re.findall("^faulty: rank .* is process ([0-9]+)", result.err, re.M)]
        assert len(pids) == max(self.ranks, 1)
        assert none_left(pids)
        said = re.findall("continuing from the checkpoint of step ([0-9]+)", result.out)
        if result.code in (0, 85):
            assert [int(step) for step in said] == expected
        return result

    @contextmanager
    def started(self, *faults: str) -> Iterator[subprocess.Popen[str]]:
        """Waits for the first fault; the whole has the deadline of one job."""
        process = subprocess.Popen(
            self.command(*faults),
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        late = threading.Timer(DEADLINE, os.killpg, [process.pid, signal.SIGKILL])
        late.start()
        try:
            assert process.stderr is not None
            assert any(" at " in line for line in process.stderr if line.startswith("faulty: ")), "no fault happened"
            yield process
        finally:
            late.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def none_left(pids: list[int]) -> bool:
    """Soon: mpirun does not wait for those that it has just killed."""
    soon = time.monotonic() + LEFT_SECONDS
    while any(runs(pid) for pid in pids):
        if time.monotonic() > soon:
            return False
        time.sleep(0.05)
    return True


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def seconds_after(result: Result, ended: float) -> float:
    """From the fault to the end of the job."""
    (when,) = re.findall("^faulty: .* at .*, time ([0-9.]+)", result.err, re.M)
    return ended - float(when)


def numbers(record: Any) -> Any:
    """A record without what tells how long something took."""
    if not isinstance(record, dict):
        return record
    return {
        name: numbers(value)
        for name, value in record.items()
        if name != "seconds" and not name.endswith("_seconds") and not name.startswith("loader_")
    }


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]


def assert_the_same_models(one: Run, other: Run) -> None:
    for name in ("model.pt", "best.pt"):
        first, second = (torch.load(run.output / name, weights_only=True) for run in (one, other))
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name


def assert_the_same(one: Run, other: Run) -> None:
    """Bit for bit, and every record of every step."""
    assert_the_same_models(one, other)
    records = [[numbers(record) for record in metrics(run)] for run in (one, other)]
    assert len(records[0]) == len(records[1])
    for a, b in zip(*records, strict=True):
        assert a == b
    summaries = [numbers(json.loads((run.output / "summary.json").read_text())) for run in (one, other)]
    assert summaries[0] == summaries[1]


@pytest.fixture(scope="module")
def make(data, tmp_path_factory) -> Callable[..., Run]:
    """Runs of their own; 110 local steps on two ranks."""

    def run(*arguments: str, ranks: int = 2) -> Run:
        directory = tmp_path_factory.mktemp("run")
        output = directory / "out"
        every_step = {"log_every_seconds": 0, "checkpoint": {"every_steps": 5, "keep": 5}, "device": "cpu"}
        return Run(write_config(directory / "run.yaml", data, output, **every_step), output, ranks, arguments)

    return run


@pytest.fixture(scope="module")
def undisturbed(make) -> Callable[..., Run]:
    """Runs that nothing happens to; each is made once."""
    made: dict[Any, Run] = {}

    def run(*arguments: str, ranks: int = 2) -> Run:
        if (arguments, ranks) not in made:
            one = make(*arguments, ranks=ranks)
            assert one.start().code == 0
            made[arguments, ranks] = one
        return made[arguments, ranks]

    return run


# -- a rank that dies, fails or stops ---------------------------------------------------------------------------------

ERRORS = {
    "kill": "",
    "raise": r"RuntimeError: an exception that a test injects\n(?s:.*)hvdlocal \(rank {rank}\): ended by RuntimeError",
    "memory": rf"hvdlocal \(rank {{rank}}\): rank {{rank}} of 2 on {HOST} cannot go on after step [0-9]+: out of memory",
    "bad_data": rf"hvdlocal \(rank {{rank}}\): rank {{rank}} of 2 on {HOST} cannot go on after .*: an image that cannot",
    "device_memory": rf"hvdlocal \(rank {{rank}}\): rank {{rank}} of 2 on {HOST} cannot go on .*: the GPU is out of memory",
}

DEATHS = {
    "horovod": [
        "kill:computing:1:23",
        "kill:averaging:0:3",
        "kill:checkpointing:1:3",
        "kill:completing:0:2",
        "kill:evaluating:1:2",
        "raise:computing:1:12",
        "bad_data:computing:0:12",
        "memory:averaging:0:2",
        "device_memory:evaluating:1:1",
        "kill:ending:0:1",
    ],
    "mpi4py": ["kill:averaging:1:3", "kill:checkpointing:0:3", "memory:computing:1:12", "raise:evaluating:0:2"],
}


@pytest.mark.parametrize("backend", DEATHS)
def test_a_run_of_which_ranks_die(make, undisturbed, backend):
    run = make()
    for fault in DEATHS[backend]:
        what, _, rank, _ = fault.split(":")
        result = run.start(fault, HVDLOCAL_BACKEND=backend)
        assert result.code not in (0, 2, 85), fault
        assert seconds_after(result, time.time()) < ENDED_SECONDS, fault
        assert re.search(ERRORS[what].format(rank=rank), result.err), f"{fault}\n{result.err}"
        assert run.checkpoints, "of the steps before"
    assert run.start(HVDLOCAL_BACKEND=backend).code == 0
    assert_the_same(run, undisturbed())


@pytest.mark.parametrize("backend", ["mpi4py", "horovod"])
def test_a_run_of_which_a_rank_leaves(make, backend):
    """In order, without an error: the others do not call it one, and end with their own code instead of crashing in MPI."""
    run = make()
    for rank in (1, 0, 1):
        result = run.start(f"leave:averaging:{rank}:2", HVDLOCAL_BACKEND=backend)
        assert result.code == 4, result.err
        said = (
            rf"rank {1 - rank} of 2 on {HOST}: the collective '[a-z.]+' cannot complete, because another rank has left"
        )
        assert re.search(said, result.err), result.err
        assert "if it has merely finished, it had fewer steps to do" in result.err
        assert "Segmentation" not in result.err


SHUT_DOWN = """
import sys, torch, hvdlocal
if sys.argv[1] == "first":
    import mpi4py.MPI
communicators = []
for _ in range(3):
    communicators.append(hvdlocal.init())
    ones = torch.ones(2)
    communicators[-1].sum_(ones, "test.sum")
    sys.stderr.write(f"sum {ones.tolist()}, {len(set(map(id, communicators)))} communicators\\n")
    communicators[-1].shutdown()
    for dead in (lambda: communicators[-1].sum_(ones, "test.dead"), hvdlocal.communicator.current):
        try:
            dead()
        except RuntimeError as error:
            sys.stderr.write(f"refused: {error}\\n")
"""


@pytest.mark.parametrize(
    ("backend", "mpi4py", "works"), [("mpi4py", "later", True), ("horovod", "first", True), ("horovod", "later", False)]
)
def test_init_after_shutdown(backend, mpi4py, works):
    """A new communicator, or a refusal on every rank: never the dead one."""
    result = launch(
        *MPIRUN, "-np", "2", sys.executable, "-c", SHUT_DOWN, mpi4py, timeout=DEADLINE, HVDLOCAL_BACKEND=backend
    )
    assert result.err.count("sum [2.0, 2.0], 1 communicators") == 2
    assert "refused: rank 0 of 2" in result.err
    assert "the collective 'test.dead' was called after shutdown()" in result.err
    if works:
        assert result.code == 0, result.err
        assert result.err.count("sum [2.0, 2.0], 3 communicators") == 2
        assert result.err.count("refused: hvdlocal is not initialised") == 6
    else:
        assert result.code == 1, result.err
        assert "hvdlocal.init() after shutdown(): with Horovod's shutdown MPI has ended" in result.err
        assert "2 communicators" not in result.err


STOPS = {
    "horovod": ["stop:computing:1:23", "stop:averaging:0:3", "stop:checkpointing:1:3", "stop:evaluating:0:2"],
    "mpi4py": ["stop:averaging:1:3"],
}


@pytest.mark.parametrize("backend", STOPS)
def test_a_run_of_which_ranks_hang(make, undisturbed, backend):
    run = make()
    for fault in STOPS[backend]:
        result = run.start(fault, HVDLOCAL_BACKEND=backend, HVDLOCAL_TIMEOUT_SECONDS=str(TIMEOUT_SECONDS))
        assert result.code == 4, f"{fault}\n{result.err}"
        assert seconds_after(result, time.time()) < TIMEOUT_SECONDS + ENDED_SECONDS
        other = 1 - int(fault.split(":")[2])
        said = rf"rank {other} of 2 on {HOST} waited {TIMEOUT_SECONDS} s in the collective 'hvdlocal\.[a-z.]+'"
        assert re.search(said, result.err), f"{fault}\n{result.err}"
    assert run.start(HVDLOCAL_BACKEND=backend).code == 0
    assert_the_same(run, undisturbed())


def test_numbers_lost_on_one_rank(make):
    run = make()
    result = run.start("nan:computing:1:30")
    assert result.code == 3, result.err
    assert result.err.count("NaN or infinity on rank 1") == 2, "on every rank"
    state = torch.load(run.output / "last_good.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


# -- asked to leave ---------------------------------------------------------------------------------------------------

LONG_ROUNDS = ("--method.period.period", "50")

# A start polls at its steps 1, 2, 3, 5 and 9 whatever their speed, so it hears of these before the ninth.
REQUESTS = {
    "usr2:computing:1:3": "SIGUSR2 on rank 1",
    "usr1:computing:0:3": "SIGUSR1 on rank 0",
    "term:computing:1:3": "SIGTERM on rank 1",
    "usr2:starting:1:1": "SIGUSR2 on rank 1",
    "term:opening:0:1": "SIGTERM on rank 0",
}


def assert_interrupted(run: Run, result: Result, reason: str) -> None:
    """By a checkpoint of this very step, inside a round."""
    assert result.code == 85, result.err
    assert "Traceback" not in result.err
    step = run.checkpoints[-1]
    assert f"interrupted after step {step}: {reason}. The checkpoint is in " in result.out
    manifest = json.loads((run.output / f"checkpoints/step-{step:010}/manifest.json").read_text())
    assert manifest["in_sync"] is False


def test_a_run_that_is_asked_to_leave(make, undisturbed, tmp_path):
    run = make(*LONG_ROUNDS)
    for fault, reason in REQUESTS.items():
        assert_interrupted(run, run.start(fault), reason)

    with run.started(f"wait={tmp_path}/never:computing:0:3") as process:
        process.send_signal(signal.SIGUSR2)  # mpirun passes it on
        assert process.wait() == 85

    before = run.arguments
    run.arguments += ("--time_limit_minutes", "0.01")
    assert_interrupted(run, run.start(), "the time is over")
    run.arguments = before
    assert_interrupted(run, run.start(SLURM_JOB_END_TIME=str(int(time.time()) + 5)), "the time is over")

    run.arguments += ("--time_limit_minutes", "1000")
    assert run.start(SLURM_JOB_END_TIME=str(int(time.time()) + 10_000)).code == 0
    assert_the_same(run, undisturbed(*LONG_ROUNDS))


def test_another_number_of_ranks(make):
    """Each goes on with the average of the last, and with the images that are next."""
    run = make(*LONG_ROUNDS)
    samples = [0]
    for before, ranks in pairwise([None, 3, 2, 1, 2]):
        run.ranks = ranks
        last = ranks == 2 and before == 1
        result = run.start(*([] if last else ["usr2:computing:0:3"]))
        if last:
            assert result.code == 0, result.err
        else:
            assert_interrupted(run, result, "SIGUSR2 on rank 0")
        assert before is None or f", averaged over the {before} rank" in result.out
        steps = [record for record in metrics(run) if record["kind"] == "steps"]
        assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
        samples += [samples[-1] + ranks * 8 * i for i in range(1, len(steps) + 2 - len(samples))]
        assert [record["data_epoch"] * 96 for record in steps] == pytest.approx(samples[1:])
    assert metrics(run)[-1]["evaluation"]["accuracy"] > 0.9


# -- disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(directory: Path, size: str, *options: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    directory.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(directory)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_no_room_for_checkpoints(make, undisturbed):
    """Of no consequence, until the run is asked to leave."""
    runs = [make(), make()]
    for run in runs:  # an attempt without checkpoints, so that a disk can be where they belong
        run.output.mkdir()
        shutil.copy(undisturbed().output / "config.yaml", run.output)

    with small_disk(runs[0].output / "checkpoints", "64k"):
        result = runs[0].start()
        assert result.code == 0, result.err
        assert re.search("WARNING: no checkpoint of step 5: .*No space left on device.*Training goes on", result.err)
        assert runs[0].checkpoints == []
        assert_the_same(runs[0], undisturbed())

    with small_disk(runs[1].output / "checkpoints", "64k"):
        result = runs[1].start("usr2:computing:1:3")
        assert result.code == 1, result.err
        assert re.search("SIGUSR2 on rank 1, but no checkpoint of step [0-9]+: .*No space left on device", result.err)
        assert "Traceback" not in result.err


def test_a_small_disk(make, undisturbed):
    """Checkpoints give back the room that they could not use: training ends as if there were none, with all of its files."""
    plain = undisturbed()
    # From just enough for what is written without checkpoints to enough for two of them beside it.
    for kilobytes in (308, 640, 1200):
        run = make()
        with small_disk(run.output, f"{kilobytes}k"):
            result = run.start()
            assert result.code == 0, f"{kilobytes} KB\n{result.err}"
            assert "no checkpoint of step 5: " in result.err or kilobytes > 640
            assert "No space left on device" in result.err
            assert "Training goes on" in result.err
            assert "Traceback" not in result.err
            assert_the_same(run, plain)
            left = [path.name for path in run.output.rglob("*") if path.name.endswith(".tmp") or path.name == "reserve"]
            assert left == []


def test_a_disk_that_others_fill(make, undisturbed):
    run = make("--checkpoint.every_steps", "1000", ranks=0)  # with no checkpoint that would give its room back
    with small_disk(run.output, "4m"):
        result = run.start(f"fill={run.output}:computing:0:23")
        assert result.code == 1, result.err
        assert "Traceback" not in result.err
        assert re.search(r"cannot go on after step [0-9]+: .*No space left on device: '.*/metrics\.jsonl'", result.err)
        (run.output / "ballast").unlink()
        result = run.start()
        assert result.code == 0, result.err
        assert_the_same(run, undisturbed(ranks=0))


def test_a_disk_that_cannot_be_written(make):
    run = make()
    with small_disk(run.output, "64k", "ro"):
        result = run.start()
    assert result.code == 2, result.err
    said = [line for line in result.err.splitlines() if line.startswith("hvdlocal (rank")]
    assert {line[:17] for line in said} == {"hvdlocal (rank 0)", "hvdlocal (rank 1)"}
    assert all(re.search(r"/out/\.lock: Read-only file system", line) for line in said), said
    assert "Traceback" not in result.err


# -- what is in the directory -----------------------------------------------------------------------------------------


def test_two_runs_in_one_directory(make, undisturbed, tmp_path):
    first, go = make(ranks=0), tmp_path / "go"
    with first.started(f"wait={go}:computing:0:7") as process:
        second = replace(first, ranks=2).start()
        assert second.code == 2, second.err
        assert second.err.count(f"is in use by another run (process {process.pid} on ") == 2, "on every rank"
        go.touch()
        assert process.wait() == 0
    assert_the_same(first, undisturbed(ranks=0))


FATES = ("moved", "removed", "replaced by another run")


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_directory_that_is_not_there_any_more(make, undisturbed, tmp_path, ranks):
    """The run ends with an error, and writes nothing into what has taken its place."""
    for fate in FATES:
        run, go = make(ranks=ranks), tmp_path / fate
        with run.started(f"wait={go}:computing:0:7") as process:
            if fate == "moved":
                run.output.rename(run.output.with_name("elsewhere"))
            else:
                while run.output.exists():  # a checkpoint may be under way
                    shutil.rmtree(run.output, ignore_errors=True)
            other = replace(run, ranks=0)
            if fate == "replaced by another run":
                assert other.start("kill:computing:0:30").code == -signal.SIGKILL
                before = {path: path.read_bytes() for path in run.output.rglob("*") if path.is_file()}
            go.touch()
            said = process.stderr.read()
            assert process.wait() == 1, said
            assert f"the directory {run.output} was moved or removed, or replaced by another one. Move it back" in said
            assert "Traceback" not in said
        if fate == "replaced by another run":
            assert {path: path.read_bytes() for path in run.output.rglob("*") if path.is_file()} == before
            assert other.start().code == 0
            assert_the_same(other, undisturbed(ranks=0))
        else:
            assert not run.output.exists()
            if fate == "moved":
                run.output.with_name("elsewhere").rename(run.output)
                assert run.start().code == 0
                assert_the_same(run, undisturbed(ranks=ranks))


def test_a_directory_that_is_moved_at_the_end(make, undisturbed, tmp_path):
    """What was trained is kept, where the directory is now; but the run does not say that it is where it was."""
    run, go = make(ranks=0), tmp_path / "go"
    with run.started(f"wait={go}:ending:0:1") as process:
        elsewhere = run.output.rename(run.output.with_name("elsewhere"))
        go.touch()
        said = process.stderr.read()
        assert process.wait() == 1, said
        assert f"the directory {run.output} was moved or removed" in said
    assert not run.output.exists()
    assert_the_same(replace(run, output=elsewhere), undisturbed(ranks=0))


def test_an_overwriting_run_does_not_follow_links(make, tmp_path):
    precious = tmp_path / "precious"
    (precious / "step-0000000001").mkdir(parents=True)
    (precious / "file").write_text("precious")
    for name in ("checkpoints", ".lock"):
        run = make("--overwrite", "true", ranks=0)
        run.output.mkdir()
        (run.output / name).symlink_to(precious if name == "checkpoints" else precious / "file")
        result = run.start()
        assert result.code == 2, result.err
        assert f"{run.output}/{name}: a symbolic link, which hvdlocal does not follow here: remove it" in result.err
        assert (precious / "file").read_text() == "precious"
        assert (precious / "step-0000000001").is_dir()


def test_checkpoints_that_are_not_what_they_are_called(copied, undisturbed):
    """One bears the name of another step, one was left by another run."""
    *_, good, newest = copied.checkpoints
    place, foreign = copied.output / "checkpoints", undisturbed().checkpoints[-1]
    shutil.rmtree(place / f"step-{newest:010}")
    shutil.copytree(place / f"step-{good:010}", place / f"step-{newest:010}")
    shutil.copytree(undisturbed().output / f"checkpoints/step-{foreign:010}", place / f"step-{foreign:010}")
    result = copied.start(step=good)
    assert result.code == 0, result.err
    assert f"manifest.json is that of step {good}, so the directory has a wrong name: going back to" in result.err
    assert f"step-{foreign:010} was written by another run: going back to step {good}" in result.err
    assert_the_same(copied, undisturbed())


@pytest.fixture(scope="module")
def attempt(make) -> Run:
    """A run that died after 42 steps."""
    run = make()
    run.start("kill:computing:1:43")
    assert len(run.checkpoints) >= 5
    return run


@pytest.fixture
def copied(attempt, tmp_path) -> Run:
    return replace(attempt, output=Path(shutil.copytree(attempt.output, tmp_path / "out", symlinks=True)))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damaged_checkpoints(copied, undisturbed):
    good, *damaged = copied.checkpoints[-5:]
    files = [
        copied.output / f"checkpoints/step-{step:010}" / name
        for step, name in zip(damaged, ["manifest.json", "rank-00001.pt"] * 2, strict=True)
    ]
    for file, damage in zip(files, [truncate, truncate, flip_a_bit, flip_a_bit], strict=True):
        damage(file)
    result = copied.start(step=good)
    assert result.code == 0, result.err
    for file in files:
        assert re.search(f"WARNING: {re.escape(str(file))} .*: going back to step {good}", result.err), result.err
    assert_the_same(copied, undisturbed())


def test_no_checkpoint_that_is_not_damaged(copied):
    for step in copied.checkpoints:
        flip_a_bit(copied.output / f"checkpoints/step-{step:010}/rank-00000.pt")
    result = replace(copied, ranks=0).start()
    assert result.code == 2, result.err
    assert f"none of the {len(copied.checkpoints)} checkpoints in " in result.err
    assert "rank-00000.pt is damaged: its checksum is wrong" in result.err
    assert "--overwrite true" in result.err
    assert "Traceback" not in result.err


def test_a_run_that_is_continued_with_other_settings(copied, undisturbed, data, tmp_path):
    before = (copied.output / "metrics.jsonl").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(data / "test", other / "test")
    images = np.random.default_rng(1).integers(0, 200, (96, 8, 8, 1), dtype=np.uint8)
    ShardWriter(other, "train", classes=["a", "b", "c"]).write(images, np.arange(96) % 3)
    for arguments, message in [
        (["--optimizer.lr", "0.03"], "an earlier run with optimizer.lr=0.02, not 0.03"),
        (["--data.path", str(other)], "other training data"),
    ]:
        result = replace(copied, ranks=0, arguments=tuple(arguments)).start()
        assert result.code == 2, result.err
        assert message in result.err
        assert (copied.output / "metrics.jsonl").read_bytes() == before
    result = replace(copied, arguments=("--log_every_seconds", "1", "--data.threads", "2")).start()
    assert result.code == 0, result.err
    assert_the_same_models(copied, undisturbed())


def test_a_run_that_never_comes_anywhere(make):
    """A batch system would start it again for ever."""
    run = make(ranks=0)
    for _ in range(3):
        assert run.start("kill:computing:0:2", SLURM_RESTART_COUNT="1").code == -signal.SIGKILL
    result = run.start(SLURM_RESTART_COUNT="1")
    assert result.code == 2, result.err
    assert "has been started 3 times from step 0 and never came to its next checkpoint" in result.err
