"""Ctrl-C on a terminal, and signals that come when the run is over: what is saved is said, and a finished run stays one."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.launch import MPIRUN, ROOT, environment, launch

pytestmark = pytest.mark.timeout(600)

DEADLINE = 120.0
FAULTY = [sys.executable, str(ROOT / "tests/launch/faulty.py")]


class Terminal:
    """A command in the foreground of a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.text = ""
        self._deadline = time.monotonic() + DEADLINE
        self._pid, self._descriptor = pty.fork()
        if self._pid == 0:
            os.chdir(ROOT)
            os.execvpe(command[0], command, environment())

    def wait_for(self, pattern: str) -> None:
        while not re.search(pattern, self.text):
            assert time.monotonic() < self._deadline, f"no {pattern!r} in\n{self.text}"
            assert self._read(), f"ended without {pattern!r}:\n{self.text}"

    def press_ctrl_c(self) -> None:
        os.write(self._descriptor, b"\x03")

    def end(self) -> int:
        """Waits for the command and returns its exit code."""
        while self._read():
            assert time.monotonic() < self._deadline, f"no end\n{self.text}"
        pid, self._pid = self._pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        if self._pid:
            os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._descriptor)

    def _read(self) -> bool:
        """Takes what was printed within a moment; False when nobody can print any more."""
        if select.select([self._descriptor], [], [], 0.1)[0]:
            try:
                self.text += os.read(self._descriptor, 65536).decode(errors="replace")
            except OSError:  # Linux's way to say that the last process has closed the terminal
                return False
        return True


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened = []

    def start(*command: str) -> Terminal:
        opened.append(Terminal(*command))
        return opened[-1]

    yield start
    for one in opened:
        with suppress(ProcessLookupError):
            one.close()


@pytest.mark.parametrize("when", ["starting:0:1", "computing:0:7"])
def test_ctrl_c_writes_a_checkpoint(terminal, config, tmp_path, when):
    """Long before the first one would have come by itself, and even when it was pressed before the first step."""
    go = tmp_path / "go"
    run = ["train", str(config)]
    screen = terminal(*FAULTY, f"wait={go}:{when}", *run)
    screen.wait_for("wait at")
    screen.press_ctrl_c()
    assert screen.end() == 85, screen.text
    assert "hvdlocal: Ctrl-C: the run writes a checkpoint and stops. Ctrl-C again stops it at once." in screen.text
    (step,) = re.findall("interrupted after step ([0-9]+): SIGINT on rank 0. The checkpoint is in ", screen.text)
    assert "the same command continues from it" in screen.text
    assert [path.name for path in (tmp_path / "out/checkpoints").glob("step-*")] == [f"step-{int(step):010}"]
    again = launch(*FAULTY, *run)
    assert again.code == 0, again.err
    assert f"continuing from the checkpoint of step {step}" in again.out


EVERY_STEPS = ("--checkpoint.every_steps", "2")


def assert_said_what_is_saved(text: str, out: Path) -> None:
    """As one sentence, and true."""
    checkpoints = sorted((out / "checkpoints").glob("step-*[0-9]"))
    if not checkpoints:
        said = f"{out} holds no checkpoint to continue from yet, so the same command begins anew."
        assert text.count(said) == 1, text
    else:
        (step,) = re.findall(
            f"the same command continues from the checkpoint of step ([0-9]+) in {out}/checkpoints", text
        )
        assert out / f"checkpoints/step-{int(step):010}" in checkpoints


@pytest.mark.parametrize("arguments", [(), EVERY_STEPS])
def test_a_second_ctrl_c_stops_at_once(terminal, config, tmp_path, arguments):
    """Whatever the main thread waits for; and it says what there is."""
    screen = terminal(*FAULTY, "block:computing:0:9", "train", str(config), *arguments)
    screen.wait_for("block at")
    screen.press_ctrl_c()
    screen.wait_for("Ctrl-C again stops it at once")
    screen.press_ctrl_c()
    assert screen.end() == 130, screen.text
    assert "hvdlocal: stopped: " in screen.text
    assert_said_what_is_saved(screen.text, tmp_path / "out")
    assert "Traceback" not in screen.text


@pytest.mark.parametrize(("arguments", "backend"), [((), "horovod"), (EVERY_STEPS, "horovod"), (EVERY_STEPS, "torch")])
def test_ctrl_c_under_mpirun_says_what_is_saved(terminal, config, tmp_path, arguments, backend):
    """Mpirun kills its ranks, and Open MPI 5 prints nothing of theirs any more."""
    ranks = ["env", f"HVDLOCAL_BACKEND={backend}", *MPIRUN, "-np", "2", *FAULTY]
    screen = terminal(*ranks, "block:computing:0:9", "block:computing:1:9", "train", str(config), *arguments)
    screen.wait_for("(?s)block at.*block at")
    screen.press_ctrl_c()
    assert screen.end() not in (0, 2, 3, 85), screen.text
    assert screen.text.count("hvdlocal: SIGTERM: ") == 1, screen.text
    assert_said_what_is_saved(screen.text, tmp_path / "out")
    again = launch(*ranks, "train", str(config), *arguments)
    assert again.code == 0, again.err
    assert ("continuing from the checkpoint of step " in again.out) == bool(arguments)


@pytest.mark.parametrize(("ranks", "backend"), [(0, "horovod"), (2, "horovod"), (2, "torch")])
def test_signals_in_the_last_moments_change_nothing(config, tmp_path, ranks, backend):
    """Not those that come while Python ends, either."""
    start = ["env", f"HVDLOCAL_BACKEND={backend}", *([*MPIRUN, "-np", str(ranks)] if ranks else [])]
    train = ["train", str(config)]
    stopped = launch(*start, *FAULTY, "usr2:computing:0:3", "bombard:settled:0:1", *train)
    assert stopped.code == 85, stopped.err
    finished = launch(*start, *FAULTY, "bombard:settled:0:1", *train)
    assert finished.code == 0, finished.err
    assert "test accuracy" in finished.out
    assert (tmp_path / "out/summary.json").exists()
    nothing_to_do = launch(*start, *FAULTY, "bombard:settled:0:1", *train)
    assert nothing_to_do.code == 0, nothing_to_do.err


def test_a_run_in_the_background_does_not_hear_ctrl_c(config):
    """A shell ignores INT for it, so that Ctrl-C ends what is in the foreground alone."""
    ignoring = f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv({FAULTY[0]!r}, {FAULTY!r} + "
    command = [*["int:computing:0:3"], "train", str(config)]
    result = launch(sys.executable, "-c", f"{ignoring}{command!r})")
    assert result.code == 0, result.err
