"""The mean gradient of an island's ranks, with which all of them take the same step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch

from hvdlocal.averaging.buckets import BUCKET_BYTES
from hvdlocal.averaging.digest import DIGEST_SIZE, Digest, Fact, TensorSample
from hvdlocal.averaging.islands import INSIDE
from hvdlocal.averaging.mean_gradient import MeanGradient
from hvdlocal.communicator import Communicator


class _Scalar(IntEnum):
    """Numbers that travel with the gradients of a step; the digest follows them."""

    PRESENT = 0  # 1 on every rank
    OVERFLOW = 1  # ranks on which a GradScaler found an overflow


NUM_SCALARS = len(_Scalar) + DIGEST_SIZE
"""Numbers that travel with the gradients of a step."""


class IslandGradient:
    """Sums the gradients of an island's ranks while the backward pass goes on, and compares what must be equal on them.

    Attributes:
        sums: collects the gradients of a step's micro-batches.

    Args:
        inside: the ranks of the island.
        model: the replica.
        named: its parameters to train, by name.
        accumulate: a, micro-batches of a step.
    """

    def __init__(
        self, inside: Communicator, model: torch.nn.Module, named: Mapping[str, torch.nn.Parameter], accumulate: int
    ) -> None:
        self._inside = inside
        self._accumulate = accumulate
        parameters = list(named.values())
        self.sums = MeanGradient(
            inside,
            parameters,
            accumulate=accumulate,
            scalars=NUM_SCALARS,
            bucket_bytes=BUCKET_BYTES,
            name=INSIDE,
        )
        self._sample = TensorSample(named)
        self._digest = Digest(inside, model, {}, parameters[0].device, lasting=False)

    def own_means(self) -> Sequence[torch.Tensor | None]:
        """This rank's mean gradients of the step's micro-batches, before the island's mean; None where there is none."""
        sums = self.sums.own_sums()
        return sums if self._accumulate == 1 else [None if one is None else one / self._accumulate for one in sums]

    def give_mean(self, facts: Mapping[Fact, Any], overflowed: bool) -> bool:
        """Makes the island's mean the parameters' gradients; a collective of the island.

        Args:
            facts: what must be equal on its ranks, besides the parameters.
            overflowed: whether a GradScaler found an overflow on this rank.

        Returns:
            Whether it found one on any rank.

        Raises:
            DisagreementError: on every rank of the island: they differ in what must be equal.
        """
        scalars = self.sums.scalars
        digest = scalars[len(_Scalar) :]
        self._digest.write(digest, facts, self._sample.parts())
        scalars[_Scalar.PRESENT].fill_(1)
        scalars[_Scalar.OVERFLOW].fill_(overflowed)
        self.sums.sum()
        totals = scalars.tolist()
        self._digest.check_all(totals[_Scalar.PRESENT], totals[len(_Scalar) :])
        self.sums.flat.div_(self._inside.size * self._accumulate)
        self.sums.give_back()
        return totals[_Scalar.OVERFLOW] > 0.5
