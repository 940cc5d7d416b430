"""The options of benchmarks/playbook.py that no cluster has."""

import sys

import playbook
import pytest

JOB = {"--workers": "8", "--parameters": "124e6", "--step-milliseconds": "500"}


def run(monkeypatch, **options):
    given = JOB | {f"--{name}": value for name, value in options.items()}
    monkeypatch.setattr(sys, "argv", ["playbook.py", *(word for option in given.items() for word in option)])
    playbook.main()


def test_a_row_for_each_link(monkeypatch, capsys):
    """An average over 4 Gbit/s: 2 · 7/8 · 496 MB at 0.9 · 500 MB/s take 1.9289 s, and 42 messages of 50 µs hardly more."""
    run(monkeypatch, megabits="4000", **{"latency-microseconds": "0"})
    assert capsys.readouterr().out.splitlines()[3].split()[:5] == ["4", "Gbit/s", "1.9", "s", "3.86"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("workers", "0", "must be positive"),
        ("step-milliseconds", "0", "must be positive"),
        ("backward", "1.5", "a part of the step"),
        ("wanted", "90", "must be above 0 and below 1"),
        ("megabits", "0", "bandwidth must be positive"),
    ],
)
def test_a_mistake_is_one_sentence(monkeypatch, capsys, option, value, said):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, **{option: value})
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
