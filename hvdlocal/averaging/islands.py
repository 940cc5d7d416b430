"""The two levels of a job whose ranks form islands: the mean inside of an island, and the sum across the islands by slices."""

from __future__ import annotations

import warnings

import torch

from hvdlocal.averaging.flat_buffer import FlatBuffer, Scalar
from hvdlocal.communicator import Communicator, StartedSum

INSIDE = "hvdlocal.island"
"""The name of the collectives inside of an island. A rank that averages meets one that steps there, and both get an error."""


class Islands:
    """Sums a message over islands whose ranks hold the same weights.

    Rank j of every island sums slice j of the message with the ranks at its place in the other islands; then the island gathers
    its slices. Across the islands a rank sends 1/n of the message, and n network cards work at once.

    Args:
        inside: the n ranks of this rank's island.
        across: the M ranks at this rank's place in all islands.
        diverge: whether the weights of an island's ranks differ, because they average parameters in place of gradients.
    """

    def __init__(self, inside: Communicator, across: Communicator, *, diverge: bool) -> None:
        self.inside = inside
        self.across = across
        self._diverge = diverge

    def merge(self, message: FlatBuffer, round_number: int) -> torch.Tensor:
        """Makes one contribution of those of the island's ranks: the mean of their weights and the sums of what is their own.

        An island with a rank whose replica is not finite contributes no weights.

        Args:
            message: with its scalars and its digest; `Scalar.NONFINITE` becomes n or 0.
            round_number: of the round, 1 for the first.

        Returns:
            Whether the island contributes no weights: 0 or 1, float32 of shape (), on the device.
        """
        scaled = message.scaled(round_number)
        if self._diverge:
            self.inside.sum_(message.sent(round_number), INSIDE)
            for part in scaled:
                part.div_(self.inside.size)
        else:
            self.inside.sum_(message.own, INSIDE)
        scalars = message.scalars
        left_out = scalars[Scalar.NONFINITE] > 0
        scalars[Scalar.NONFINITE].copy_(left_out).mul_(self.inside.size)
        scalars[Scalar.DISPLACEMENT].masked_fill_(left_out, 0.0)
        if left_out.device.type != "cpu":
            for part in scaled:
                part.masked_fill_(left_out, 0.0)  # reads all of it, which costs a GPU less than to be waited for
        elif left_out:
            torch._foreach_zero_(scaled)
        return left_out.to(torch.float32)

    def start_sum_(self, sent: torch.Tensor, name: str) -> StartedSum:
        """Begins the sum of what the islands have merged.

        Args:
            sent: its elements are a multiple of the island's ranks.
            name: of the collective across the islands.

        Returns:
            A function that waits until `sent` holds the sum over the islands.
        """
        slices = sent.split(sent.numel() // self.inside.size)
        across = self.across.start_sum_(slices[self.inside.rank], name)

        def finish() -> None:
            across.wait()
            if self.across.size > 1:
                self.inside.share_slices_(sent, INSIDE)

        return StartedSum(finish, across.done)

    def mean_weights_(self, buffer: FlatBuffer) -> None:
        """Makes the weights of the island's ranks their mean."""
        self.inside.sum_(buffer.weights, INSIDE)
        buffer.weights.div_(self.inside.size)

    def sum_(self, tensor: torch.Tensor, name: str) -> None:
        """Sums a small tensor over all ranks.

        Args:
            tensor: as for `Communicator.sum_`.
            name: of the collective across the islands.
        """
        self.inside.sum_(tensor, INSIDE)
        self.across.sum_(tensor, name)


def islands_of(communicator: Communicator, period: int) -> Islands | None:
    """The islands of the ranks; None where every rank is a worker.

    Args:
        communicator: of all ranks.
        period: steps between two averages of the parameters inside of an island; 1 for mean gradients.

    Raises:
        ValueError: there are none, and `period` asks for some.
    """
    inside, across = communicator.island, communicator.peers
    if inside is None or across is None:
        if period > 1:
            raise ValueError(
                f"island_period={period} without islands: give hvdlocal.init(island=…) the ranks of an island, or leave "
                "island_period out"
            )
        return None
    if across.size == period == 1 and communicator.rank == 0:
        warnings.warn(
            f"all {inside.size} ranks form one island, so that every step is data-parallel and nothing is averaged: give a "
            "smaller island, or start the job on more nodes",
            stacklevel=4,  # who builds the optimizer
        )
    return Islands(inside, across, diverge=period > 1)
