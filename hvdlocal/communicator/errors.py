"""What can go wrong between ranks. Importing these needs no torch."""

from __future__ import annotations


class LaunchError(RuntimeError):
    """The launcher and the MPI library do not belong together."""


class SetupError(ValueError):
    """A rank cannot start; raised on all ranks."""


class DisagreementError(ValueError, RuntimeError):
    """The ranks differ where they must be equal: in settings at the start (ValueError), or in what they did since."""


class CommunicationError(RuntimeError):
    """A collective failed: another rank ended, or the ranks did not ask for the same thing."""


class CollectiveTimeoutError(CommunicationError):
    """A collective was not joined by every rank before the deadline."""
