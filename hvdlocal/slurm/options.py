"""Options of sbatch, checked before a job waits in a queue because of one."""

from __future__ import annotations

import re

NOTICE_SECONDS = 180
"""How long before the end of the job the templates ask for a checkpoint (`#SBATCH --signal`)."""

SHORTEST_MINUTES = 6
"""Slurm may signal up to a minute earlier than asked; a shorter job would be told to stop as soon as it starts."""

_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?|(?P<parts>\d+(?::\d+){0,2}))"
)
_WORD = re.compile(r"[\w.,:;@%+=/*()\[\]&|~-]+", re.ASCII)


def time_limit(text: str) -> str:
    """A time in one of sbatch's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on; 0 for no limit.

    Raises:
        ValueError: another form, or too short for a checkpoint before the end.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"--time {text}: write minutes, HH:MM:SS, or D-HH:MM:SS")
    if match["parts"]:
        parts = [int(part) for part in match["parts"].split(":")]
        days, (hours, minutes, seconds) = 0, {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    else:
        days, hours, minutes, seconds = (int(match[unit] or 0) for unit in ("days", "hours", "minutes", "seconds"))
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if 0 < total < 60 * SHORTEST_MINUTES:
        raise ValueError(
            f"--time {text}: at least {SHORTEST_MINUTES} minutes, since the job is asked for a checkpoint "
            f"{NOTICE_SECONDS} s before its end"
        )
    return text


def count(name: str, text: str) -> str:
    """A whole number of at least one.

    Raises:
        ValueError: anything else.
    """
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
        raise ValueError(f"--{name} {text}: a whole number of at least 1")
    return str(int(text))


def word(name: str, text: str) -> str:
    """A value without spaces, quotes, # or control characters: #SBATCH lines have quoting rules of their own.

    Raises:
        ValueError: a value that has one.
    """
    if not _WORD.fullmatch(text):
        raise ValueError(f"--{name} {text!r}: letters, digits and .,:;@%+=/*()[]&|~_- only")
    return text


def more(text: str) -> tuple[str, str | None]:
    """An option of sbatch that has no option here: `qos=long`, or `exclusive`.

    Raises:
        ValueError: not of this form.
    """
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z-]+", name):
        raise ValueError(
            f"--sbatch {text!r}: write an option of sbatch without its dashes, as in qos=long or exclusive"
        )
    return name, word(name, value) if equals else None
