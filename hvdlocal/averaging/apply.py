"""What becomes of the mean of a round's replicas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from hvdlocal.averaging.flat_buffer import FlatBuffer, FlatReplica


class ApplyMean(ABC):
    """Makes of the mean of all replicas what this rank goes on from.

    `LocalOptimizer` calls `begin_round` before a round's first step, `message` when the round is over, and `apply` when the mean
    is there. Between `message` and `apply` the message belongs to the collective; a rule whose message is memory of its own lets
    training go on meanwhile.
    """

    def begin_round(self) -> None:  # noqa: B027  (not every rule needs it)
        """Notes where the round begins. All replicas are equal there, unless a mean is still to be applied."""

    @abstractmethod
    def message(self) -> FlatBuffer:
        """The buffer that is summed over the ranks in place, holding what this rank contributes."""

    @abstractmethod
    def apply(self, mean: FlatBuffer, *, contributed: bool) -> None:
        """Makes the replica what follows from the mean.

        Args:
            mean: the message; or the replica itself, when a run goes on from the averaged replicas of a checkpoint.
            contributed: whether this rank's replica is part of the mean. One that is not finite is not.
        """

    def shared_state(self) -> dict[str, Any]:
        """This rank's part of what all islands hold alike and a run needs to go on, plain values and tensors: a checkpoint
        holds the parts of one island's ranks, which are slices. Without islands every rank has the whole.
        """
        return {}

    def load_shared_state(self, parts: Sequence[dict[str, Any]]) -> None:
        """Continues from the parts of the ranks of one island, in order, of a run with any number of ranks.

        Raises:
            ValueError: the state is not one of this rule.
        """
        if names := {name for part in parts for name in part}:
            raise ValueError(
                f"the state holds {', '.join(sorted(names))} of an outer optimizer, and this run averages without one: give "
                "LocalOptimizer the outer optimizer of the run that saved it"
            )


class ReplaceByMean(ApplyMean):
    """The mean takes the replica's place: plain averaging, in place and without a copy.

    Args:
        replica: the flat buffer of this rank's replica.
    """

    def __init__(self, replica: FlatReplica) -> None:
        self._replica = replica

    def message(self) -> FlatBuffer:
        """The replica itself."""
        return self._replica

    def apply(self, mean: FlatBuffer, *, contributed: bool) -> None:
        """Does nothing: the mean lies where the replica lies."""
