"""`hvdlocal`, or another program, with faults: `python faulty.py WHAT:WHERE:RANK:WHEN … train CONFIG …` or `… script.py …`.

On rank RANK, WHAT happens when the program passes the point WHERE for the WHEN-th time; see `FAULTS` and `POINTS`. So a test
needs no guess about how long things take.
"""

from __future__ import annotations

import itertools
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdlocal.cli import main
from hvdlocal.training import interruption

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
LARGEST_DISK = 64 * 2**20


def say(text: str) -> None:
    sys.stderr.write(f"faulty: rank {RANK} {text}\n")
    sys.stderr.flush()


# -- what -------------------------------------------------------------------------------------------------------------


def send(number: signal.Signals) -> Callable[[str], None]:
    return lambda _: os.kill(os.getpid(), number)


def fail(_: str) -> None:
    raise RuntimeError("an exception that a test injects")


def leave(_: str) -> None:
    sys.exit(0)


def fail_on_bad_data(_: str) -> None:
    raise ValueError("an image that cannot be decoded, as a test has it")


def run_out_of_memory(_: str) -> None:
    raise MemoryError


def run_out_of_device_memory(_: str) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory, as a test has it")


def lose_numbers(_: str) -> None:
    """Every loss from here on is NaN."""
    from torch.nn import CrossEntropyLoss

    forward = CrossEntropyLoss.forward
    CrossEntropyLoss.forward = lambda self, x, y: forward(self, x, y) * math.nan


def fill_disk(directory: str) -> None:
    """Takes all room in a directory's file system, as another program might."""
    disk = os.statvfs(directory)
    assert disk.f_blocks * disk.f_frsize <= LARGEST_DISK, f"{directory} is no small disk made for a test"
    with open(Path(directory) / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def wait(path: str) -> None:
    """Until the test has made a file, or sent a signal."""
    while not Path(path).exists() and interruption.received() is None:
        time.sleep(0.02)


def block(_: str) -> None:
    """Signals are handled, but the main thread does not go on."""
    time.sleep(600)


def bombard(_: str) -> None:
    """Every signal that asks a run to stop, again and again until this process has gone, Python's own end included."""
    numbers = [int(number) for number in interruption.SIGNALS]
    sending = f"import os\nwhile True:\n for number in {numbers}: os.kill({os.getpid()}, number)"
    subprocess.Popen([sys.executable, "-c", sending], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.5)


FAULTS: dict[str, Callable[[str], None]] = {
    "kill": send(signal.SIGKILL),
    "stop": send(signal.SIGSTOP),
    "usr1": send(signal.SIGUSR1),
    "usr2": send(signal.SIGUSR2),
    "term": send(signal.SIGTERM),
    "int": send(signal.SIGINT),
    "raise": fail,
    "leave": leave,
    "bad_data": fail_on_bad_data,
    "memory": run_out_of_memory,
    "device_memory": run_out_of_device_memory,
    "nan": lose_numbers,
    "fill": fill_disk,  # fill=DIRECTORY
    "wait": wait,  # wait=FILE
    "block": block,
    "bombard": bombard,
}


# -- where ------------------------------------------------------------------------------------------------------------


def before(owner: Any, name: str, point: str, counts: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Has every call of a function pass a point first."""
    function = getattr(owner, name)

    def passing(*arguments: Any, **named: Any) -> Any:
        if counts(*arguments, **named):
            passes(point)
        return function(*arguments, **named)

    setattr(owner, name, passing)


def starting() -> None:
    """The handlers are installed, and torch is not imported yet."""
    install = interruption.install_handlers

    def installing() -> None:
        install()
        assert "torch" not in sys.modules
        passes("starting")

    interruption.install_handlers = installing


def opening() -> None:
    """A data set is about to be opened."""
    from hvdlocal.training import session

    before(session, "open_samples", "opening")


def computing() -> None:
    """A micro-batch."""
    from hvdlocal.training.step import TrainingStep

    before(TrainingStep, "compute", "computing")


def stepping() -> None:
    """A local step, in any loop."""
    from hvdlocal import LocalOptimizer

    before(LocalOptimizer, "_take_gradient", "stepping")


def averaging() -> None:
    """The collective."""
    from hvdlocal.communicator import Communicator

    before(Communicator, "start_sum_", "averaging", lambda self, tensor, name: name.startswith("hvdlocal.average"))


def checkpointing() -> None:
    """In the background thread: the last bytes of a rank's file are not handed to the system yet."""
    from hvdlocal.training.checkpoint import files

    before(files._HashingFile, "flush", "checkpointing")


def completing() -> None:
    """In rank 0's background thread: the manifest is written, and the directory has not got its name yet."""
    from hvdlocal.directory import Directory

    before(Directory, "rename", "completing", lambda self, name, new: name.startswith("step-") and name == f"{new}.tmp")


def evaluating() -> None:
    """The average is there; the test images are next."""
    from hvdlocal.training import evaluation

    before(evaluation, "evaluate", "evaluating")


def ending() -> None:
    """The model is saved; the summary, which says that the run has ended, is not."""
    from hvdlocal.directory import Directory
    from hvdlocal.training.run_files import SUMMARY

    before(Directory, "write_text", "ending", lambda self, name, text: name == SUMMARY)


def settled() -> None:
    """How the run ends is known, and it is about to be said."""
    ignore = interruption.ignore

    def ignoring() -> None:
        ignore()
        passes("settled")

    interruption.ignore = ignoring


POINTS = {
    point.__name__: point
    for point in (
        starting,
        opening,
        computing,
        stepping,
        averaging,
        checkpointing,
        completing,
        evaluating,
        ending,
        settled,
    )
}

due: dict[tuple[str, int], list[tuple[str, str]]] = {}
passed: Counter[str] = Counter()


def passes(point: str) -> None:
    """This rank is at a point."""
    passed[point] += 1
    for what, argument in due.get((point, passed[point]), []):
        say(f"{what} at {point} {passed[point]}, time {time.time():.3f}")
        FAULTS[what](argument)


def prepare(faults: list[str]) -> None:
    for fault in faults:
        what, where, rank, when = fault.rsplit(":", 3)
        name, _, argument = what.partition("=")
        assert name in FAULTS, name
        assert where in POINTS, where
        if int(rank) == RANK:
            due.setdefault((where, int(when)), []).append((name, argument))
    for point in {where for where, _ in due}:
        POINTS[point]()


if __name__ == "__main__":
    faults = list(itertools.takewhile(lambda word: ":" in word, sys.argv[1:]))
    program, *arguments = sys.argv[1 + len(faults) :]
    say(f"is process {os.getpid()}")
    prepare(faults)
    if program == "train":
        sys.exit(main([program, *arguments]))
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
