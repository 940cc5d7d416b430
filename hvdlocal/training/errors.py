"""Why a run ends early."""

from __future__ import annotations


class DivergedError(ArithmeticError):
    """The run ended in NaN or infinity; the message says which model was saved. Raised on all ranks."""


class DamageError(RuntimeError):
    """Damaged images were found while training. Raised on all ranks, which can no longer communicate."""


class LostRankError(RuntimeError):
    """This rank cannot go on, and the other ranks have not noticed yet."""


class CallbackError(Exception):
    """A callback failed on a rank; the message says which, where, and how the run continues. Raised on all ranks."""
