"""Nobody may be reading: training goes on, and a command that prints ends as other programs do."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.records import records

import hvdlocal
from data_prep.__main__ import main as data_prep
from hvdlocal import terminal
from hvdlocal.cli import main
from hvdlocal.communicator import SingleProcess
from hvdlocal.training.console import Console
from hvdlocal.training.status_line import Status


class Failing(io.StringIO):
    """A stream whose every write fails."""

    def __init__(self, error, is_terminal=False):
        super().__init__()
        self.error, self.is_terminal = error, is_terminal

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return self.is_terminal

    def fileno(self):
        raise self.error


ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EBADF, "Bad file descriptor"),
    ValueError("I/O operation on closed file"),
]
NAMES = [type(error).__name__ + str(getattr(error, "errno", "")) for error in ERRORS]


@pytest.fixture
def config(tmp_path):
    for split, count in (("train", 24), ("test", 9)):
        images = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 1), dtype=np.uint8)
        hvdlocal.ShardWriter(tmp_path / "data", split, classes=["a", "b"]).write(images, np.arange(count) % 2)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {{path: {tmp_path}/data, batch_size: 8}}\nmodel: {{name: digits_cnn}}\noutput: {tmp_path}/out\nepochs: 2\n"
        "log_every_seconds: 0\n"
    )
    return path


@pytest.mark.parametrize(
    ("error", "is_terminal"), [(ERRORS[0], False), (ERRORS[1], False), (ERRORS[2], True), (ERRORS[4], True)]
)
def test_training_goes_on(config, monkeypatch, error, is_terminal):
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    monkeypatch.setattr("hvdlocal.training.console.launched_rank", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Failing(error, is_terminal))
        patch.setattr(sys, "stderr", Failing(error, is_terminal))
        code = main(["train", str(config), "--method.c", "0.5", "--method.preset", "sync"])  # and a note is said
    assert code == 0
    assert records(config.parent / "out")[-1]["kind"] == "end"
    assert (config.parent / "out" / "model.pt").exists()


@pytest.mark.parametrize("error", [*ERRORS, None], ids=[*NAMES, "no stream"])
def test_a_library_s_console_and_warnings_go_on(monkeypatch, error):
    """Without the command around them."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", error and Failing(error))
        patch.setattr(sys, "stderr", error and Failing(error))
        console = Console(SingleProcess(), 10.0)
        console.say("one")
        console.progress(lambda: Status(3.0, 10.0, None, 0.1, 1.0, 4), due=True)
        console.close()
        terminal.warn("three")
        terminal.say("four")


def test_signs_that_an_encoding_lacks():
    raw = io.BytesIO()
    stream = terminal.Guarded(io.TextIOWrapper(raw, "ascii"))
    stream.write("2 × γ\udcff")
    stream.flush()
    assert raw.getvalue() == rb"2 \xd7 \u03b3\udcff"


@pytest.mark.parametrize("error", ERRORS, ids=NAMES)
def test_a_command_that_prints_says_that_it_cannot(config, monkeypatch, capsys, error):
    stdout = Failing(error)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        code = main(["plan", str(config), "--workers", "4", "--no-bytes"])
        assert sys.stdout is stdout, "what was there before is there again"
    reason = str(error) if isinstance(error, ValueError) else error.strerror
    if isinstance(error, BrokenPipeError):
        assert (code, capsys.readouterr().err) == (141, "")
    else:
        assert (code, capsys.readouterr().err) == (1, f"hvdlocal: standard output cannot be written: {reason}\n")


def shell(command: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of shell in which `hvdlocal` is the command."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; hvdlocal() {{ "{sys.executable}" -m hvdlocal "$@"; }}; {command}'],
        cwd=directory,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


PLAN = "hvdlocal plan run.yaml --workers 4 --no-bytes"


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (f"{PLAN} | true", 141, ""),
        (f"{PLAN} > /dev/full", 1, "hvdlocal: standard output cannot be written: No space left on device\n"),
        (f"{PLAN} >&-", 1, "hvdlocal: standard output cannot be written: Bad file descriptor\n"),
        (f"{PLAN} > /dev/full 2>&1", 1, ""),
        (f"{PLAN} --workers x 2> /dev/full", 2, ""),
        (f"{PLAN} --optimizer.lr x 2>&-", 2, ""),
        ("hvdlocal --help > /dev/full", 1, "hvdlocal: standard output cannot be written: No space left on device\n"),
        ("hvdlocal trian 2> /dev/full", 2, ""),
        (
            "hvdlocal train run.yaml --print_config > /dev/full",
            1,
            "hvdlocal: standard output cannot be written: No space left on device\n",
        ),
    ],
)
def test_real_descriptors(config, command, code, said):
    result = shell(command, config.parent)
    assert (result.returncode, result.stderr) == (code, said)


def test_ascii_alone(config):
    result = shell(PLAN, config.parent, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(r"4 ranks \xd7 8 of 24 samples")


def test_a_closed_descriptor_is_given_to_no_file(tmp_path):
    """Whatever a library prints on descriptor 1 must not go into a file that was opened later."""
    program = (
        "import os; from hvdlocal import terminal\n"
        "with terminal.guarded(lasting=True):\n"
        "    file = open('record', 'wb'); os.write(1, b'a library'); os.write(2, b'a library')\n"
    )
    (tmp_path / "program.py").write_text(program)
    result = shell(f'"{sys.executable}" program.py <&- >&- 2>&-', tmp_path)
    assert result.returncode == 0
    assert (tmp_path / "record").read_bytes() == b""


def test_losing_the_terminal(config, monkeypatch):
    """SIGHUP does not end a run."""
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    before = signal.getsignal(signal.SIGHUP)
    try:
        assert main(["train", str(config), "--epochs", "0"]) == 2
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_preparing_data_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Failing(ERRORS[0]))
        patch.setattr(sys, "stderr", Failing(ERRORS[0]))
        code = data_prep(["synthetic", "--output", str(tmp_path / "data"), "--samples", "30", "--size", "8"])
    assert code == 0
    assert (tmp_path / "data" / "test" / "manifest.json").exists()
