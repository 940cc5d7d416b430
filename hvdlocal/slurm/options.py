"""Options of sbatch, checked before a job waits in a queue because of one."""

from __future__ import annotations

import re
from collections.abc import Collection

NOTICE_SECONDS = 180
"""How long before the end of the job the templates ask for a checkpoint (`#SBATCH --signal`)."""

WORKING_SECONDS = 180
"""A job that has less before it is asked to stop is refused. Slurm may ask up to a minute early."""

LARGEST_NOTICE_SECONDS = 65535
"""Slurm's limit."""

_TIME = re.compile(
    r"(?:(?P<days>[0-9]{1,6})-(?P<hours>[0-9]+)(?::(?P<minutes>[0-9]+)(?::(?P<seconds>[0-9]+))?)?"
    r"|(?P<parts>[0-9]{1,6}(?::[0-9]+){0,2}))"
)
_SIGNAL = re.compile(r"B:(?:SIG)?USR[12]@([0-9]{1,6})")

_DECIDED = {
    "no-requeue": "the template starts the job again after its time limit",
    "no-kill": "a job that has lost a node has to end, so that it is started again",
    "wrap": "the template is the script",
    "ntasks": "write --nodes and --ntasks-per-node",
    "gpus": "write --gpus-per-node",
    "gpus-per-task": "a rank that sees only its own GPU cannot use NCCL's direct paths; write --gpus-per-node",
    "ntasks-per-gpu": "write --ntasks-per-node",
    "cpus-per-gpu": "write --cpus-per-task",
}
"""Options that would undo a template, and why."""

_CHECKED = ("signal", "requeue", "open-mode", "time-min", "array")
"""Options that may be given with some values; sbatch takes beginnings of their names, which are refused for that reason."""

_WORD = re.compile(r"[\w.,:;@%+=/*()\[\]&|~-]+", re.ASCII)


def time_limit(text: str, notice_seconds: int = NOTICE_SECONDS, name: str = "time") -> str:
    """A time in one of sbatch's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on; 0 for no limit.

    Args:
        text: to be checked.
        notice_seconds: how long before its end the job is asked for a checkpoint.
        name: of the option.

    Raises:
        ValueError: another form, or too short for a checkpoint before the end.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"--{name} {text}: write minutes, HH:MM:SS, or D-HH:MM:SS")
    if match["parts"]:
        parts = [int(part) for part in match["parts"].split(":")]
        days, (hours, minutes, seconds) = 0, {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        smaller = parts[1:]
    else:
        days, hours, minutes, seconds = (int(match[unit] or 0) for unit in ("days", "hours", "minutes", "seconds"))
        smaller = [minutes, seconds]
        if hours > 23:
            raise ValueError(f"--{name} {text}: {hours} hours after the days; there are 24 in one")
    if any(part > 59 for part in smaller):
        raise ValueError(f"--{name} {text}: {max(smaller)} after a colon; minutes and seconds go to 59")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    shortest = notice_seconds + WORKING_SECONDS
    if 0 < total < shortest:
        raise ValueError(
            f"--{name} {text}: at least {-(-shortest // 60)} minutes, since the job is asked for a checkpoint "
            f"{notice_seconds} s before its end"
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


def more(text: str, own: Collection[str] = ()) -> tuple[str, str | None]:
    """An option of sbatch that has no option here: `qos=long`, or `exclusive`.

    Args:
        text: to be checked.
        own: the names of those that have one.

    Raises:
        ValueError: not of this form, or it would undo what the templates do.
    """
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z-]+", name):
        raise ValueError(
            f"--sbatch {text!r}: write an option of sbatch without its dashes, as in qos=long or exclusive"
        )
    if name in own:
        raise ValueError(f"--sbatch {text}: write --{name} for it, and once")
    if name in _DECIDED:
        raise ValueError(f"--sbatch {text}: {_DECIDED[name]}")
    if meant := [full for full in (*_CHECKED, *_DECIDED, *own) if full.startswith(name) and name not in _CHECKED]:
        raise ValueError(f"--sbatch {text}: write the whole name of the option; sbatch would take it for --{meant[0]}")
    if name == "signal" and not (_SIGNAL.fullmatch(value) and 60 <= notice(value) <= LARGEST_NOTICE_SECONDS):
        raise ValueError(
            f"--sbatch {text}: the template asks for a checkpoint with B:USR2@{NOTICE_SECONDS}; only the seconds can be changed, "
            f"from 60 to {LARGEST_NOTICE_SECONDS}"
        )
    if name == "requeue" and equals:
        raise ValueError(f"--sbatch {text}: requeue has no value")
    if name == "open-mode" and value != "append":
        raise ValueError(f"--sbatch {text}: the template appends, so that the log of a job that starts again is whole")
    return name, word(name, value) if equals else None


def notice(signal: str) -> int:
    """How many seconds before the end of the job a value of sbatch's `--signal` asks for a checkpoint."""
    return int(signal.rpartition("@")[2])


def largest_task(array: str) -> int:
    """The largest number in a value of sbatch's `--array`, such as `0-11%4` or `1,3,5-9:2`.

    Raises:
        ValueError: another form.
    """
    tasks, _, at_a_time = array.partition("%")
    match = re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6}(:[0-9]{1,6})?)?(,[0-9]{1,6}(-[0-9]{1,6}(:[0-9]{1,6})?)?)*", tasks)
    if match is None or ("%" in array and not re.fullmatch(r"[0-9]{1,6}", at_a_time)):
        raise ValueError(f"--sbatch array={array}: write numbers and ranges of tasks, as in 0-11%4")
    return max(int(number) for number in re.findall(r"[0-9]+", re.sub(r":[0-9]+", "", tasks)))


def overriding_variables(names: Collection[str]) -> set[str]:
    """The environment variables by which sbatch would override a script that sets these options, or undo its template."""
    unlike = {"time": "TIMELIMIT", "array": "ARRAY_INX"}
    options = {*names, *_DECIDED, "array"}
    return {f"SBATCH_{unlike.get(name, name.upper().replace('-', '_'))}" for name in options}
