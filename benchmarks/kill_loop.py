"""Checks that runs which are disturbed at random moments end with the same bits, for random settings and random faults.

    python benchmarks/kill_loop.py --kills 200 --seed 1

Every combination is first run undisturbed. Then it is run again with up to five faults, at any moment between the start of
mpirun and the end: a rank or everything is killed, mpirun gets TERM or INT, or the run is asked to stop (USR2 to mpirun). Finally
it runs to its end, and its model, its best model, its records and its summary must equal those of the undisturbed run. Each
combination has its own seed, with which it can be repeated: `--seed SEED --kills 1`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hvdlocal import ShardWriter
from hvdlocal.exit_codes import ExitCode

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 300.0
"""Deadline of one start."""

FINAL = (ExitCode.MISTAKE, ExitCode.DIVERGED)
"""Exit codes that no fault may cause."""

PERIODS = (
    ["--method.period.period", "3"],
    ["--method.period.period", "40"],
    ["--method.period.rule", "qsr", "--method.period.alpha", "0.1", "--method.period.h_base", "2"],
    ["--method.period.rule", "post-local", "--method.period.period", "6", "--method.period.switch_epochs", "9"],
    ["--method.period.rule", "adacomm", "--method.period.period", "7"],
)
METHODS = {  # preset: whether the rule for H may be other than constant
    "sync": False,
    "local": True,
    "acc-lin": False,
    "acc-ada": False,
    "local-lin": True,
    "local-ada": True,
    "local-ada-nostale": True,
}


class Broken(Exception):  # noqa: N818
    """A promise of docs/checkpoints.md does not hold."""


@dataclass(frozen=True)
class Combination:
    """The settings of a run.

    Attributes:
        ranks: number of ranks.
        backend: HVDLOCAL_BACKEND.
        settings: arguments of the command line.
    """

    ranks: int
    backend: str
    settings: list[str]

    @classmethod
    def draw(cls, dice: random.Random) -> Combination:
        """Draws a combination at random."""
        preset, any_period = dice.choice(list(METHODS.items()))
        settings = ["--method.preset", preset, *dice.choice(PERIODS if any_period else PERIODS[:1])]
        settings += dice.choice([["--optimizer.lr", "0.02"], ["--optimizer.name", "adamw", "--optimizer.lr", "0.003"]])
        if preset.startswith("local"):
            settings += ["--method.momentum", dice.choice(["local", "average", "reset"])]
            settings += ["--method.buffers", dice.choice(["average", "local", "reestimate"])]
        if preset.startswith("local-ada"):
            settings += ["--method.statistics", dice.choice(["sketch", "exact"])]
        settings += ["--checkpoint.every_steps", str(dice.choice([3, 10, 41]))]
        settings += ["--checkpoint.keep", str(dice.choice([1, 3]))]
        settings += ["--data.tail", dice.choice(["carry", "partial", "drop"]), "--seed", str(dice.randrange(1000))]
        return cls(dice.choice([1, 2, 2, 3]), dice.choice(["horovod", "mpi4py"]), settings)

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.backend}, {' '.join(self.settings)}"


@dataclass(frozen=True)
class Run:
    """A combination with a directory for all its files.

    Attributes:
        combination: the settings.
        config: the configuration that all combinations share.
        directory: the run's directory.
        environment: environment variables of its processes.
        options: of mpirun.
    """

    combination: Combination
    config: Path
    directory: Path
    environment: dict[str, str]
    options: tuple[str, ...] = ()

    @property
    def output(self) -> Path:
        """The output directory of the run."""
        return self.directory / "out"

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """Starts the ranks in their own session, which is killed afterwards; the output is appended to `log`."""
        self.directory.mkdir(exist_ok=True)
        command = [str(ROOT / "install/mpirun"), "-np", str(self.combination.ranks), *self.options]
        command += [
            sys.executable,
            "-m",
            "hvdlocal",
            "train",
            str(self.config),
            "--output",
            str(self.output),
            *self.combination.settings,
        ]
        with (self.directory / "log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, "HVDLOCAL_BACKEND": self.combination.backend},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            kill_session(process)
            process.wait()

    def outcome(self) -> dict[str, Any]:
        """Returns everything that the run wrote, without durations."""
        records = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        models = {name: torch.load(self.output / name, weights_only=True) for name in ("model.pt", "best.pt")}
        tensors = {f"{file}: {name}": value.tolist() for file, state in models.items() for name, value in state.items()}
        summary = json.loads((self.output / "summary.json").read_text())
        return {"summary.json": timeless(summary), "metrics.jsonl": [timeless(record) for record in records], **tensors}


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record without durations, memory (`storage` names the node's) and dates."""
    return {
        name: timeless(value) if isinstance(value, dict) else value
        for name, value in record.items()
        if not re.search("second|^loader_|memory|^date$|^output$|^storage$", name)
    }


# -- faults ---------------------------------------------------------------------------------------------------------------


def session(leader: int) -> dict[int, str]:
    """Returns the running processes of a session, with their command lines."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, member = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(member) == leader and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process, which may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kills all processes at once, like a node that loses power."""
    while left := session(process.pid):
        for pid in left:
            send(pid, signal.SIGKILL)
        process.poll()


def kill_a_rank(process: subprocess.Popen[bytes], dice: random.Random) -> None:
    """Kills one rank, if any has been started."""
    ranks = [
        pid for pid, command in session(process.pid).items() if " -m hvdlocal train" in command and pid != process.pid
    ]
    if ranks:
        send(dice.choice(sorted(ranks)), signal.SIGKILL)
    else:
        kill_session(process)


def to_mpirun(number: signal.Signals) -> Callable[[subprocess.Popen[bytes], random.Random], None]:
    """Returns a fault that sends a signal to mpirun."""
    return lambda process, _: send(process.pid, number)


FAULTS: dict[str, Callable[[subprocess.Popen[bytes], random.Random], None]] = {
    "a rank killed": kill_a_rank,
    "all killed": lambda process, _: kill_session(process),
    "TERM": to_mpirun(signal.SIGTERM),
    "INT": to_mpirun(signal.SIGINT),
    "USR2": to_mpirun(signal.SIGUSR2),
}


# -- the loop ------------------------------------------------------------------------------------------------------------


def end_of(process: subprocess.Popen[bytes]) -> int:
    """Waits for a process and returns its exit code."""
    try:
        return process.wait(DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        raise Broken(f"no end within {DEADLINE_SECONDS:.0f} s") from None


def finish(run: Run) -> float:
    """Runs a run to its end and returns the seconds that this took."""
    start = time.monotonic()
    with run.started() as process:
        if code := end_of(process):
            raise Broken(f"code {code} without a fault")
    return time.monotonic() - start


def disturb(run: Run, kills: int, duration: float, dice: random.Random) -> Iterator[str]:
    """Restarts a run until it had this number of faults or is finished; yields the name of each fault."""
    for _ in range(kills):
        name, seconds = dice.choice(list(FAULTS)), dice.uniform(0, duration)
        with run.started() as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            too_late = process.poll() is not None
            if not too_late:
                FAULTS[name](process, dice)
            code = end_of(process)
        if code in FINAL or (too_late and code):
            raise Broken(f"code {code} after {'nothing' if too_late else name} at {seconds:.1f} s")
        if not too_late:
            yield name
        if code == ExitCode.FINISHED:
            return


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Returns the first name under which two outcomes differ."""
    return next((name for name in {**one, **other} if one.get(name) != other.get(name)), None)


def write_data(directory: Path) -> Path:
    """Writes three classes of 8×8 images that are bright at different places, and a configuration; returns its path."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 97), ("test", 31)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3] += 150
        ShardWriter(directory / "data", split, classes=["a", "b", "c"]).write(images, labels)
    path = directory / "run.yaml"
    path.write_text(
        f"data: {{path: {directory}/data, batch_size: 5, flip: true, crop_padding: 1}}\nmodel: {{name: digits_cnn}}\n"
        "epochs: 30\nevaluate_every_epochs: 7\nlog_every_seconds: 0\ndevice: cpu\noutput: given\n"
    )
    return path


def main() -> int:
    """Runs the loop; returns 1 if a promise does not hold, in which case the directory is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="number of faults in all")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first combination; the next one has the next number"
    )
    options = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left
    directory = Path(tempfile.mkdtemp(prefix="hvdlocal-kills-"))
    memory = Path(tempfile.mkdtemp(prefix="hvdlocal-kills-", dir="/dev/shm"))
    config = write_data(directory)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": str(directory)}
    for name in ("OMPI_MCA_btl_vader_backing_directory", "OMPI_MCA_btl_sm_backing_directory"):
        environment[name] = str(memory)
    faults: Counter[str] = Counter()
    seed = options.seed
    try:
        while faults.total() < options.kills:
            dice = random.Random(seed)
            combination = Combination.draw(dice)
            print(f"seed {seed}: {combination}", flush=True)
            whole, broken = (
                Run(combination, config, directory / f"{seed}-{name}", environment)
                for name in ("undisturbed", "disturbed")
            )
            duration = finish(whole)
            for fault in disturb(broken, min(5, options.kills - faults.total()), duration, dice):
                faults[fault] += 1
            finish(broken)
            if difference := first_difference(whole.outcome(), broken.outcome()):
                raise Broken(f"not the same as undisturbed: {difference}")
            for run in (whole, broken):
                shutil.rmtree(run.directory)
            seed += 1
    except Broken as error:
        kept = Path(tempfile.mkdtemp(prefix="hvdlocal-kills-")) / "broken"
        shutil.move(directory, kept)
        print(f"seed {seed}: {error}\nwhat it wrote is left in {kept}", flush=True)
        return 1
    finally:
        shutil.rmtree(memory)
        shutil.rmtree(directory, ignore_errors=True)
        print(f"{faults.total()} faults in {seed - options.seed} combinations: {dict(faults)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
