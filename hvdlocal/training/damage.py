"""Damaged images that are found while training: one rank reads them, and all ranks say so before the job ends.

The rank that reads them can join no collective any more, nor tell the others through one. It leaves a note in the output
directory, which all ranks share; the others read it when a collective fails because that rank has left the job.
"""

from __future__ import annotations

from contextlib import suppress

from hvdlocal.communicator import Communicator
from hvdlocal.data.errors import DamagedDataError
from hvdlocal.directory import Directory

DAMAGE = "damage.txt"


class DamageError(RuntimeError):
    """Damaged images were found while training. Raised on all ranks, which can communicate no more."""


def damage_found(directory: Directory, communicator: Communicator, error: DamagedDataError, steps: int) -> DamageError:
    """What a rank that found some raises; the note for the others is written, and of several notes the first stands."""
    message = (
        f"{error} ({communicator.describe()} found it after step {steps}; once it is mended, the same command continues from the "
        "last checkpoint)"
    )
    mine = f"{DAMAGE}.{communicator.rank}"
    with suppress(OSError):  # without a note the others only hear that a rank has left
        directory.write_text(mine, message)
        directory.rename_if_first(mine, DAMAGE)
    return damage_elsewhere(directory) or DamageError(message)


def damage_elsewhere(directory: Directory) -> DamageError | None:
    """What another rank raises when a collective has failed, if the reason is that one found damage."""
    with suppress(OSError, UnicodeError):
        return DamageError(directory.read_text(DAMAGE))
    return None


def forget_damage(directory: Directory) -> None:
    """Takes away the note of an earlier start; rank 0 only, before training begins."""
    directory.remove(DAMAGE)
