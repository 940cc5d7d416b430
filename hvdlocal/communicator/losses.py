"""Ranks that a job loses and goes on without. Importing these needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hvdlocal.communicator.errors import CommunicationError


@dataclass(frozen=True)
class Loss:
    """Ranks that have left a job which goes on without them.

    Attributes:
        ranks: the lost ranks as they are numbered in the job, ascending.
        hosts: the host of each of them.
        remaining: the number of ranks that go on.
        collective: the name of the collective in which the others noticed it.
    """

    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    remaining: int
    collective: str

    def __str__(self) -> str:
        """Returns a sentence about it: 'rank 3 on node17 is lost; the other 7 ranks go on'."""
        lost = ", ".join(f"{rank} on {host}" for rank, host in zip(self.ranks, self.hosts, strict=True))
        ranks = f"rank {lost} is lost" if len(self.ranks) == 1 else f"ranks {lost} are lost"
        return f"{ranks}; " + ("one rank goes on" if self.remaining == 1 else f"the other {self.remaining} ranks go on")


class MissingRanksError(CommunicationError):
    """Ranks are lost where the others cannot go on without them; raised on all others, at the same collective."""


class TooFewRanksError(CommunicationError):
    """Ranks do not answer, and the others could not agree within the deadline to go on without them."""
