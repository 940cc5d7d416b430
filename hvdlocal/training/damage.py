"""Damaged images that are found while training: one rank reads them, and all ranks report them before the job ends.

The rank that reads them can take part in no further collective. It leaves a note in the output directory, which all ranks
share; the others read it when a collective fails because that rank has left the job.
"""

from __future__ import annotations

from contextlib import suppress

from hvdlocal.communicator import Communicator
from hvdlocal.data.errors import DamagedDataError
from hvdlocal.directory import Directory
from hvdlocal.training.errors import DamageError

DAMAGE = "damage.txt"


def damage_found(directory: Directory, communicator: Communicator, error: DamagedDataError, steps: int) -> DamageError:
    """Writes the note for the other ranks, unless there is one already, and returns the error to raise."""
    message = (
        f"{error} ({communicator.describe()} found it after step {steps}; once it is mended, the same command continues from the "
        "last checkpoint)"
    )
    mine = f"{DAMAGE}.{communicator.rank}"
    with suppress(OSError):  # without a note the other ranks only report that a rank has left
        directory.write_text(mine, message)
        directory.rename_if_first(mine, DAMAGE)
    return damage_elsewhere(directory) or DamageError(message)


def damage_elsewhere(directory: Directory) -> DamageError | None:
    """Returns the error to raise when a collective has failed because another rank found damage; None for other reasons."""
    with suppress(OSError, UnicodeError):
        return DamageError(directory.read_text(DAMAGE))
    return None


def forget_damage(directory: Directory) -> None:
    """Removes the note of an earlier start; rank 0 only, before training begins."""
    directory.remove(DAMAGE)
