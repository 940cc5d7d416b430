"""How a replica goes on from a mean that was begun some steps ago, while it took further steps."""

from __future__ import annotations

import torch

from hvdlocal.averaging.flat_buffer import FlatBuffer, StatisticsScalar
from hvdlocal.averaging.moments import carry_moments
from hvdlocal.averaging.replica_memory import ReplicaMemory


class OverlappedMean:
    """The memory of an average that is under way while training goes on, and the rule by which it is applied.

    With s the replica that was sent, θ what it is now, and φ what all replicas are to go on from, the replica becomes
    φ + (θ − s), so that the steps taken meanwhile are carried over (CoCoD-SGD, Shen et al. 2019, Alg. 1), or the mixture
    α θ + (1 − α) φ (Streaming DiLoCo, Douillard et al. 2025, Sec. 2.2).

    Args:
        memory: of this rank's replica.
        mixing: α; None to carry the steps over.

    Attributes:
        message: what is summed.
        sent: what this rank has sent, with the same places.
    """

    def __init__(self, memory: ReplicaMemory, mixing: float | None) -> None:
        self._memory = memory
        self._mixing = mixing
        if mixing is None:
            memory.decays()  # refuses moments that cannot be carried over, before training
        self._replica = memory.flat
        self.message = self._replica.zeros_like()
        self.sent = self._replica.zeros_like()

    def take(self, round_number: int) -> FlatBuffer:
        """Copies what is sent in a round into the message; the gradient statistics move there.

        Args:
            round_number: 1 for the first round.
        """
        self.message.sent(round_number).copy_(self._replica.sent(round_number))
        if self._replica.statistics_scalars is not None:
            self._replica.statistics_scalars[StatisticsScalar.VALID].zero_()
        return self.message

    def apply(self, *, round_number: int, steps: int, contributed: bool) -> None:
        """Makes the replica what follows from the mean, which lies in the message, and from the steps since it was sent.

        Averaged buffers are replaced. A moment that is an exponential average with the decay β has forgotten all but β^steps of
        what it was, so that as much of the difference between the mean and what was sent is added to it.

        Args:
            round_number: of the round that was sent; only the moments that were due in it are changed.
            steps: the number of steps since it was sent; without any, the mean is taken as it is.
            contributed: whether this rank's replica is part of the mean. One that is not finite is not, and its steps are
                dropped.
        """
        now, mean, sent = self._replica, self.message, self.sent
        kept = self._mixing if steps and contributed else 0.0
        if kept is not None:
            places = zip(now.scaled(round_number), mean.scaled(round_number), strict=True)
            for own, other in [*places, (now.buffers, mean.buffers)]:
                own.sub_(other).mul_(kept).add_(other) if kept else own.copy_(other)
            return
        now.buffers.copy_(mean.buffers)
        torch.sub(now.parameters, sent.parameters, out=sent.parameters)
        torch.add(mean.parameters, sent.parameters, out=now.parameters)
        due = list(self._memory.decays().items())[: now.moments_due(round_number)]
        for (name, betas), *moments in zip(due, now.moments, mean.moments, sent.moments, strict=False):
            left = [beta**steps for beta in betas]
            carry_moments(moments[0], moments[1], moments[2], left, positive=name == "exp_avg_sq")
