"""Checks options of sbatch, so that mistakes are found before a job waits in a queue."""

from __future__ import annotations

import re
from collections.abc import Collection

NOTICE_SECONDS = 180
"""How long before the end of the job the templates ask for a checkpoint (`#SBATCH --signal`)."""

WORKING_SECONDS = 180
"""Shortest time of a job before it is asked to stop. Slurm may ask up to a minute early."""

LARGEST_NOTICE_SECONDS = 65535
"""The longest notice that Slurm supports."""

_TIME = re.compile(
    r"(?:(?P<days>[0-9]{1,6})-(?P<hours>[0-9]+)(?::(?P<minutes>[0-9]+)(?::(?P<seconds>[0-9]+))?)?"
    r"|(?P<parts>[0-9]{1,6}(?::[0-9]+){0,2}))"
)
_SIGNAL = re.compile(r"B:(?:SIG)?USR[12]@([0-9]{1,6})")

_DECIDED = {
    "no-requeue": "the template starts the job again after its time limit",
    "no-kill": "a job that has lost a node has to end, so that it is started again; --survive sets it",
    "wrap": "the template is the script",
    "ntasks": "write --nodes and --ntasks-per-node",
    "gpus": "write --gpus-per-node",
    "gpus-per-task": "a rank that sees only its own GPU cannot use NCCL's direct paths; write --gpus-per-node",
    "ntasks-per-gpu": "write --ntasks-per-node",
    "cpus-per-gpu": "write --cpus-per-task",
}
"""Options that would undo a template, and why."""

_CHECKED = ("signal", "requeue", "open-mode", "time-min", "array")
"""Options that are allowed with some values. sbatch accepts abbreviations of their names, which are therefore refused."""

_WORD = re.compile(r"[\w.,:;@%+=/*()\[\]&|~-]+", re.ASCII)


def time_limit(text: str, notice_seconds: int = NOTICE_SECONDS, name: str = "time") -> str:
    """Checks a time in one of sbatch's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on.

    Args:
        text: the time; 0 stands for no limit.
        notice_seconds: how long before its end the job is asked for a checkpoint.
        name: name of the option.

    Returns:
        The text.

    Raises:
        ValueError: the text has another form, or the time is too short for a checkpoint before the end.
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
    """Checks a whole number of at least one, and returns it without leading zeros.

    Raises:
        ValueError: the text is something else.
    """
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
        raise ValueError(f"--{name} {text}: a whole number of at least 1")
    return str(int(text))


def word(name: str, text: str) -> str:
    """Checks that a value has no spaces, quotes, # or control characters: #SBATCH lines have their own quoting rules.

    Raises:
        ValueError: it has one of them.
    """
    if not _WORD.fullmatch(text):
        raise ValueError(f"--{name} {text!r}: letters, digits and .,:;@%+=/*()[]&|~_- only")
    return text


def more(text: str, own: Collection[str] = ()) -> tuple[str, str | None]:
    """Checks an option of sbatch that `hvdlocal slurm` does not have itself, such as `qos=long` or `exclusive`.

    Args:
        text: the option.
        own: the names of the options of `hvdlocal slurm`.

    Returns:
        The name and the value of the option.

    Raises:
        ValueError: the text has another form, or the option would undo what the templates do.
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
    """Returns the seconds before the end of the job at which a value of sbatch's `--signal` asks for a checkpoint."""
    return int(signal.rpartition("@")[2])


def largest_task(array: str) -> int:
    """Returns the largest number in a value of sbatch's `--array`, such as `0-11%4` or `1,3,5-9:2`.

    Raises:
        ValueError: the text has another form.
    """
    tasks, _, at_a_time = array.partition("%")
    match = re.fullmatch(r"[0-9]{1,6}(-[0-9]{1,6}(:[0-9]{1,6})?)?(,[0-9]{1,6}(-[0-9]{1,6}(:[0-9]{1,6})?)?)*", tasks)
    if match is None or ("%" in array and not re.fullmatch(r"[0-9]{1,6}", at_a_time)):
        raise ValueError(f"--sbatch array={array}: write numbers and ranges of tasks, as in 0-11%4")
    return max(int(number) for number in re.findall(r"[0-9]+", re.sub(r":[0-9]+", "", tasks)))


def overriding_variables(names: Collection[str]) -> set[str]:
    """Returns the environment variables with which sbatch would override these options of a script, or undo its template."""
    unlike = {"time": "TIMELIMIT", "array": "ARRAY_INX"}
    options = {*names, *_DECIDED, "array"}
    return {f"SBATCH_{unlike.get(name, name.upper().replace('-', '_'))}" for name in options}
