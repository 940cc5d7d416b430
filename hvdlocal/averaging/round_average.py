"""The average of a round: one collective, which is begun, and finished at once or some steps later."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hvdlocal.averaging.digest import Digest, Fact
from hvdlocal.averaging.flat_buffer import CoordinateSample, FlatBuffer, Scalar
from hvdlocal.averaging.islands import Islands
from hvdlocal.averaging.nonfinite import CheckedScale
from hvdlocal.averaging.round_statistics import summed_statistics
from hvdlocal.communicator import Communicator, StartedSum

AVERAGE = "hvdlocal.average"
"""The name of the averaging's collective."""

_numbers: weakref.WeakKeyDictionary[Communicator, int] = weakref.WeakKeyDictionary()
"""How many names there are over each communicator."""


def name_of_its_own(communicator: Communicator) -> str:
    """Returns a name for the averages of one optimizer, which are under way while another optimizer averages.

    Horovod refuses two collectives of one name at a time.
    """
    _numbers[communicator] = _numbers.get(communicator, 0) + 1
    return f"{AVERAGE}.{_numbers[communicator]}"


@dataclass(frozen=True)
class Averaged:
    """What came of an average; the same on all ranks but for `mine_is_finite`, `finite_buffers` and `seconds`.

    Attributes:
        round_number: of the round that ended with it, 1 for the first.
        ranks: number of ranks that have contributed; fewer than have begun it when some were lost.
        mean: the message, which now holds the mean.
        replicas: number of workers' replicas in the mean; those that are not finite are left out.
        lost: whether no rank holds a finite mean.
        buffer_replicas: number of ranks whose averaged buffers are in their mean; 0 when that mean is not finite.
        mine_is_finite: whether this rank's replica was, and those of its island.
        finite_buffers: which elements of this rank's averaged buffers were, a mask.
        divergence: (1/K) Σ_k ‖w_k − w̄‖² (Eq. 22); None without a finite replica.
        loss: mean of the losses that the ranks recorded; None without any.
        statistics: Σ ‖g‖², the number of finite gradients, ‖Σ g‖², of the round's first gradients, and `ranks`; None if not sent.
        stop: whether a rank asks all to stop.
        seconds: that this rank spent on beginning the collective and on waiting for it.
        hidden_seconds: during which the collective was under way and this rank did something else, to within the time between
            two calls of `RoundAverage.look`.
    """

    round_number: int
    ranks: int
    mean: FlatBuffer
    replicas: int
    lost: bool
    buffer_replicas: int
    mine_is_finite: bool
    finite_buffers: torch.Tensor
    divergence: float | None
    loss: float | None
    statistics: tuple[float, float, float, int] | None
    stop: bool
    seconds: float
    hidden_seconds: float


@dataclass
class _Pending:
    """An average that was begun.

    Attributes:
        round_number: of the round that ends with it.
        message: what is summed.
        nonfinite: whether a replica of this worker's ranks is not finite: 0 or 1, on the device and of shape ().
        finite_buffers: which elements of its averaged buffers are finite, a mask.
        sum: the collective; None before it is begun.
        seconds: that it took to begin.
        begun, complete: when the collective was begun, and when it was found complete; None while it was not.
    """

    round_number: int
    message: FlatBuffer
    nonfinite: torch.Tensor
    finite_buffers: torch.Tensor
    sum: StartedSum | None = None
    seconds: float = 0.0
    begun: float = 0.0
    complete: float | None = None


class RoundAverage:
    """Averages a flat buffer over the ranks in place, with the scalars, the digest and the statistics that travel with it.

    Args:
        communicator: the ranks.
        digest: what must be equal on all ranks.
        islands: the islands of the ranks; None where every rank is a worker.
        sample: of the replica's parameters; its origin is where the round began.
        compares_origin: whether that origin must be equal on all ranks.
        name: of the collective.
    """

    def __init__(
        self,
        communicator: Communicator,
        islands: Islands | None,
        digest: Digest,
        sample: CoordinateSample,
        *,
        compares_origin: bool,
        name: str = AVERAGE,
    ) -> None:
        self.communicator = communicator
        self._islands = islands
        self._ranks_per_worker = islands.inside.size if islands else 1
        self._digest = digest
        self._sample = sample
        self._compares_origin = compares_origin
        self._name = name
        self._scale = CheckedScale(sample.origin.device)
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether an average was begun and is not finished."""
        return self._pending is not None

    def begin(
        self,
        round_number: int,
        message: FlatBuffer,
        facts: Mapping[Fact, Any],
        loss_sum: torch.Tensor,
        loss_count: int,
        stop: bool,
        keep: FlatBuffer | None = None,
    ) -> None:
        """Begins the average and does not wait for the other ranks. Until `finish`, `message` must be left alone.

        Args:
            round_number: of the round that ends, 1 for the first; it says which moments are sent.
            message: what is summed in place. If this rank's replica is not finite, its contribution becomes zero.
            facts: what must be equal on all ranks.
            loss_sum: sum of the losses that this rank recorded, of shape ().
            loss_count: their number.
            stop: whether this rank asks all to stop.
            keep: receives what this rank sends; a buffer as long as the message's. None where nothing comes between `begin` and
                `finish`.
        """
        assert self._pending is None
        sent = message.sent(round_number)
        nonfinite, finite_buffers = self._write_scalars(message, sent, loss_sum, loss_count, stop)
        self._write_digest(message, facts)
        if keep is not None:
            keep.sent(round_number).copy_(sent)
        self._pending = _Pending(round_number, message, nonfinite, finite_buffers)
        self._start(self._pending)
        if keep is None:
            self._pending.complete = self._pending.begun  # what is waited for at once is not hidden

    def _start(self, pending: _Pending) -> StartedSum:
        """Begins the collective, unless that was done."""
        if pending.sum is None:
            start, sent = time.perf_counter(), pending.message.sent(pending.round_number)
            if self._islands:
                pending.nonfinite = self._islands.merge(pending.message, pending.round_number)
                pending.sum = self._islands.start_sum_(sent, self._name)
            else:
                pending.sum = self.communicator.start_sum_(sent, self._name)
            pending.begun = time.perf_counter()
            pending.seconds = pending.begun - start
        return pending.sum

    def look(self) -> None:
        """Notes whether the average that is under way is complete, so that the time it has taken is known."""
        if self._pending and self._pending.complete is None and self._start(self._pending).done():
            self._pending.complete = time.perf_counter()

    def state(self, keep: FlatBuffer) -> dict[str, Any] | None:
        """What is needed to repeat the average that is under way; None if there is none.

        Args:
            keep: as it was given to `begin`.
        """
        if self._pending is None:
            return None
        number = self._pending.round_number
        finite = self._pending.finite_buffers
        return {"round": number, "sent": keep.sent(number).clone(), "finite_buffers": finite.clone()}

    def load_state(self, state: Mapping[str, Any] | None, message: FlatBuffer, keep: FlatBuffer) -> None:
        """Makes the average of a `state` the one that is under way. Its collective begins with the next `look` or `finish`.

        One that is under way now is waited for, and dropped.

        Args:
            state: None if there was none.
            message, keep: as for `begin`.
        """
        if self._pending and self._pending.sum:
            self._pending.sum.wait()  # it would write into the message still
        self._pending = None
        if state is None:
            return
        number = state["round"]
        for place in (message, keep):
            place.sent(number).copy_(state["sent"])
        nonfinite = message.scalars[Scalar.NONFINITE].clone()
        self._pending = _Pending(number, message, nonfinite, state["finite_buffers"].to(nonfinite.device))

    def finish(self) -> Averaged:
        """Waits for the sum, and divides it by the number of replicas in it.

        Raises:
            CommunicationError: a rank ended, or took no part.
            DisagreementError: on every rank: the ranks differ in what must be equal.
        """
        assert self._pending is not None
        pending, self._pending = self._pending, None
        start = time.perf_counter()
        self._start(pending).wait()
        seconds, hidden = 0.0, 0.0
        if self.communicator.size > 1:
            seconds = pending.seconds + time.perf_counter() - start
            hidden = max((pending.complete or start) - pending.begun, 0.0)
        message, per_worker = pending.message, self._ranks_per_worker
        on_device = message.scalars
        # Not the communicator's size: ranks that have contributed may be lost by now.
        present = on_device[Scalar.PRESENT]
        healthy_workers = (present - on_device[Scalar.NONFINITE]).div_(per_worker).clamp_(min=1)
        nonfinite = self._scale(message.scaled(pending.round_number), healthy_workers.reciprocal_())
        buffers = message.buffers.div_((present - on_device[Scalar.NONFINITE_BUFFERS]).clamp_(min=1))
        # Everything that is wanted of a GPU is asked for first, and then read at once: an averaging waits for it once.
        moved = self._sample.distance(message.parameters).view(1)
        wanted = [on_device, nonfinite, pending.nonfinite.view(1), moved, buffers.isfinite().all().view(1)]
        if message.with_statistics:
            wanted.append(summed_statistics(message))
        numbers = torch.cat(wanted).tolist()
        scalars, (found, bad, moved, finite_sum, *statistics) = (
            numbers[: on_device.numel()],
            numbers[on_device.numel() :],
        )
        self._digest.check_all(scalars[Scalar.PRESENT], scalars[len(Scalar) :])
        ranks = round(scalars[Scalar.PRESENT])
        healthy_ranks = ranks - round(scalars[Scalar.NONFINITE])
        # (1/K) Σ ‖w_k − w̄‖² = (1/K) Σ ‖w_k − w‖² − ‖w̄ − w‖², w being where the round began.
        divergence = max(scalars[Scalar.DISPLACEMENT] / healthy_ranks - moved, 0.0) if healthy_ranks else None
        count = scalars[Scalar.LOSS_COUNT]
        return Averaged(
            round_number=pending.round_number,
            ranks=ranks,
            mean=message,
            replicas=healthy_ranks // per_worker,
            lost=not healthy_ranks or found > 0,
            buffer_replicas=ranks - round(scalars[Scalar.NONFINITE_BUFFERS]) if finite_sum else 0,
            mine_is_finite=not bad,
            finite_buffers=pending.finite_buffers,
            divergence=divergence,
            loss=scalars[Scalar.LOSS_SUM] / count if count else None,
            statistics=(statistics[0], statistics[1], statistics[2], ranks) if statistics else None,
            stop=scalars[Scalar.STOP] > 0.5,
            seconds=seconds,
            hidden_seconds=hidden,
        )

    def compare(self, message: FlatBuffer, facts: Mapping[Fact, Any]) -> None:
        """Compares all that must be equal on the ranks between two rounds; a very small collective.

        Args:
            message: a buffer whose digest may be overwritten.
            facts: as for `begin`.

        Raises:
            DisagreementError: on every rank.
        """
        self._write_digest(message, facts, everything=True)
        # Under the averaging's name: a rank that is in the middle of a round meets this one there, and both get an error.
        (self._islands or self.communicator).sum_(message.digest, self._name)
        self._digest.check(message.digest.tolist(), self.communicator.size)

    def _write_scalars(
        self, message: FlatBuffer, sent: torch.Tensor, loss_sum: torch.Tensor, loss_count: int, stop: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the numbers that travel along; takes the contribution of a replica back that is found not to be finite.

        It is looked for in the losses and at the sampled coordinates: NaN spreads through a network fast, and to look at every
        parameter would cost a tenth of an averaging. What escapes is found in the sum.

        Returns:
            `nonfinite` and `finite_buffers` of `_Pending`. The buffers are few, so all elements are looked at, and the buffers
            of a rank are taken back alone.
        """
        scalars = message.scalars
        displacement = self._sample.distance(message.parameters)
        scalars[Scalar.DISPLACEMENT].copy_(displacement)
        scalars[Scalar.LOSS_SUM].copy_(loss_sum)
        scalars[Scalar.LOSS_COUNT].fill_(loss_count)
        bad = displacement.isfinite().logical_and_(loss_sum.isfinite()).logical_not_()
        if bad.device.type != "cpu":
            sent.masked_fill_(bad, 0.0)  # reads all of it, which costs a GPU less than to be waited for
        elif bad:
            sent.zero_()
        finite = message.buffers.isfinite()
        bad_buffers = finite.all().logical_not_()
        message.buffers.masked_fill_(bad_buffers, 0.0)
        scalars[Scalar.NONFINITE_BUFFERS].copy_(bad_buffers.logical_or_(bad))
        scalars[Scalar.PRESENT].fill_(1)
        scalars[Scalar.NONFINITE].copy_(bad)
        scalars[Scalar.STOP].fill_(stop)
        return bad.to(torch.float32), finite

    def _write_digest(self, message: FlatBuffer, facts: Mapping[Fact, Any], *, everything: bool = False) -> None:
        if self.communicator.size > 1:
            origin = {"trained parameters": self._sample.origin} if self._compares_origin else {}
            self._digest.write(message.digest, facts, origin, everything=everything)
