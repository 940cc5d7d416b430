"""The state of a run in a line of a log and on a terminal of any width."""

import io

import pytest

from hvdlocal.communicator import SingleProcess
from hvdlocal.figures.units import metric_text, remaining_text
from hvdlocal.training import console as console_module
from hvdlocal.training.console import BAR_COLUMNS, Console
from hvdlocal.training.status_line import Status

STATUS = Status(
    epoch=12.1,
    epochs=24.0,
    loss=0.00713,
    base_lr=0.02474,
    gain=0.883,
    period=4,
    ranks=2,
    samples_per_second=1234.4,
    remaining_seconds=700.0,
    peak_memory_bytes=412_300_000,
)


def test_a_log_has_everything():
    assert STATUS.log_line() == (
        "epoch 12.10 of 24  loss 0.0071  lr 0.02185 = 0.02474×0.88  H 4  2,469 samples/s (1,234 per rank)  memory 412.3 MB  "
        "12 min left"
    )


def test_what_is_not_known_yet_is_left_out():
    status = Status(epoch=0.0, epochs=0.5, loss=None, base_lr=0.1, gain=1.0, period=1)
    assert status.log_line() == "epoch 0.00 of 0.5  lr 0.1 = 0.1×1.00  H 1"
    assert status.fitted(80) == "0.0/0.5 epochs  gain 1.00  lr 0.1  H 1"


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (120, "12.1/24 epochs  loss 0.0071  gain 0.88  lr 0.0218  H 4  2,469/s  memory 412.3 MB  12 min left"),
        (100, "12.1/24 epochs  loss 0.0071  gain 0.88  lr 0.0218  H 4  2,469/s  12 min left"),
        (80, "12.1/24 epochs  loss 0.0071  gain 0.88  H 4  12 min left"),
        (60, "12.1/24 epochs  gain 0.88  H 4"),
        (20, "12.1/24 epochs  gain 0.88  H 4"),
    ],
)
def test_a_terminal_has_what_fits(columns, text):
    assert STATUS.fitted(columns - BAR_COLUMNS) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_gain_and_period_are_on_a_terminal_of_80_columns(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(console_module, "launched_rank", lambda: None)
    monkeypatch.setattr(console_module, "_size", lambda output: (80, 24))
    console = Console(SingleProcess(), 24.0)
    console.progress(lambda: STATUS, due=True)
    shown = terminal.getvalue().split("\r")[-1]
    console.close()
    assert shown == " 50%|█████     | 12.1/24 epochs  loss 0.0071  gain 0.88  H 4  12 min left"
    assert len(shown) < 80


def test_a_log_line_is_printed_when_it_is_due(capsys):
    console = Console(SingleProcess(), 24.0)
    console.progress(lambda: STATUS, due=False)
    assert capsys.readouterr().out == ""
    console.progress(lambda: STATUS, due=True)
    assert capsys.readouterr().out == f"{STATUS.log_line()}\n"


def test_remaining_times_and_metrics():
    seconds = (0, 59.4, 60, 5_960, 6_000, 172_700, 180_000)
    texts = ["0 s", "59 s", "1 min", "99 min", "1 h 40 min", "47 h 58 min", "2 d 2 h"]
    assert [remaining_text(one) for one in seconds] == texts
    assert [metric_text(one) for one in (0.03125, 0.0, 1.88, 24.5, 12345.6, 3.1e-7)] == [
        *("0.0312", "0.0000", "1.8800", "24.5", "1.235e+04", "3.1e-07")
    ]
    assert metric_text(0.98664, percent=True) == "98.66 %"
