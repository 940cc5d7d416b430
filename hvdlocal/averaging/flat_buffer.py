"""One flat buffer for everything that the ranks average, so that an averaging is one collective and no copy.

Layout of `FlatBuffer.flat`, float32, every part beginning at a multiple of 64 bytes:

    [ parameters | moments of every round | averaged buffers | scalars, digest | statistics vector, scalars | later moments ]
      `weights`, equal on the ranks         └ `own`: every rank's, also inside of an island
      of an island

Moments with a longer period lie behind, in ascending order of it. As the periods divide one another, what is sent in any round is
a prefix. Statistics that are summed on their own lie behind everything.

Parameters and buffers become views of it; `Tensor.data` is re-pointed, so module and optimizer keep their tensor objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from hvdlocal.averaging.digest import DIGEST_SIZE

ALIGNMENT = 16
"""In elements: 64 bytes, a cache line, and more than any vectorised kernel asks for."""


class Scalar(IntEnum):
    """Numbers that ride in every averaging; each is summed over the ranks."""

    DISPLACEMENT = 0  # ‖w_k − w‖² since the last averaging, at the sampled coordinates
    LOSS_SUM = 1
    LOSS_COUNT = 2
    PRESENT = 3  # 1 on every rank: a rank that has called hvd.join() sends 0
    NONFINITE = 4  # ranks whose replica is not finite
    STOP = 5  # ranks that ask to stop
    NONFINITE_BUFFERS = 6  # ranks whose averaged buffers, or whose replica, are not finite


class StatisticsScalar(IntEnum):
    """Numbers that travel with the gradient statistics."""

    SQR_NORM = 0  # Σ ‖g‖² of the rank's micro-batches
    VALID = 1  # ranks that have a gradient, a finite one


class FlatViews:
    """Places for a list of tensors in one flat float32 buffer, each with the strides of its tensor.

    Attributes:
        starts: where each place begins, and the last one ends.
        numel: elements of the buffer.

    Args:
        like: float32 tensors; their shapes and (as far as they are dense) their memory formats are kept.
        slices: the number of equal parts into which the buffer can be cut.
    """

    def __init__(self, like: Sequence[torch.Tensor], slices: int = 1) -> None:
        self._shapes = [(t.shape, torch.empty_like(t, device="meta").stride()) for t in like]
        self.starts = [0]
        for tensor in like:
            self.starts.append(self.starts[-1] + aligned(tensor.numel()))
        self.numel = aligned(self.starts[-1], slices)

    def of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of `flat`, a contiguous tensor of `numel` elements."""
        first = flat.storage_offset()
        return [
            flat.as_strided(shape, stride, first + start)
            for (shape, stride), start in zip(self._shapes, self.starts[:-1], strict=True)
        ]


class FlatBuffer:
    """A flat buffer with a place for everything that the ranks average, and its parts.

    Args:
        layout: places of the parameters, and of each of their moments.
        buffer_layout: places of the averaged module buffers.
        moments: the period of each moment of the parameters, in rounds and in ascending order; each divides the next one.
        statistics: length of the gradient statistics' vector; 0 for none, in which case its scalars are left out too.
        device: where the buffer lies.
        slices: the number of equal parts into which what is sent in a round can be cut.
        with_statistics: whether the statistics are sent with the average.
    """

    def __init__(
        self,
        layout: FlatViews,
        buffer_layout: FlatViews,
        moments: Sequence[int],
        statistics: int,
        device: torch.device,
        slices: int = 1,
        *,
        with_statistics: bool = True,
    ) -> None:
        self._moment_periods = tuple(moments)
        self._slices = slices
        weights = (1 + self._moment_periods.count(1)) * layout.numel
        buffers, scalars = weights, weights + aligned(buffer_layout.numel)
        own_end = aligned(scalars + len(Scalar) + DIGEST_SIZE, slices)
        statistics_numel = aligned(aligned(statistics) + len(StatisticsScalar), slices) if statistics else 0
        self.with_statistics = with_statistics and statistics > 0
        vector = own_end
        if self.with_statistics:
            own_end += statistics_numel
        self._ends = {1: own_end}  # of what is sent when moments with this period are due
        later, end = [], own_end
        for period in sorted({*self._moment_periods} - {1}):
            part = slice(end, end + self._moment_periods.count(period) * layout.numel)
            later.append((period, part))
            self._ends[period] = end = aligned(part.stop, slices)
        if not self.with_statistics:
            vector, end = end, end + statistics_numel
        self.flat = torch.zeros(end, dtype=torch.float32, device=device)

        self.layout = layout
        self.parameters = self.flat[: layout.numel]
        self.weights = self.flat[:weights]
        self._later = [(period, self.flat[part]) for period, part in later]
        moment_parts = [self.flat[layout.numel : weights], *(part for _, part in self._later)]
        self.moments = [layout.of(one) for part in moment_parts if part.numel() for one in part.split(layout.numel)]
        self.buffer_layout = buffer_layout
        self.buffers = self.flat[buffers : buffers + buffer_layout.numel]
        self.replica = self.flat[:scalars]
        self.scalars = self.flat[scalars : scalars + len(Scalar) + DIGEST_SIZE]
        self.digest = self.scalars[len(Scalar) :]
        self.own = self.flat[weights:own_end]
        self.with_statistics_scalars = self.flat[vector : vector + statistics_numel]
        self.statistics = self.with_statistics_scalars[:statistics]
        counts = aligned(statistics)
        self.statistics_scalars = (
            self.with_statistics_scalars[counts : counts + len(StatisticsScalar)] if statistics else None
        )

    def sent(self, round_number: int) -> torch.Tensor:
        """What is sent in a round, a prefix of the buffer.

        Args:
            round_number: 1 for the first round. A moment is due in every round that its period divides.
        """
        return self.flat[: max(end for period, end in self._ends.items() if round_number % period == 0)]

    def scaled(self, round_number: int) -> list[torch.Tensor]:
        """The parts of what is sent in a round whose mean over the workers is wanted: the parameters and the moments due."""
        return [self.weights, *(part for period, part in self._later if round_number % period == 0)]

    def moments_due(self, round_number: int) -> int:
        """How many of the moments are due in a round: so many at the beginning of `moments`."""
        return sum(round_number % period == 0 for period in self._moment_periods)

    @property
    def periods(self) -> list[int]:
        """1 and the periods of the moments, ascending."""
        return list(self._ends)

    def zeros_like(self) -> FlatBuffer:
        """Another buffer of the same layout."""
        return FlatBuffer(
            self.layout,
            self.buffer_layout,
            self._moment_periods,
            self.statistics.numel(),
            self.flat.device,
            self._slices,
            with_statistics=self.with_statistics,
        )


class FlatReplica(FlatBuffer):
    """The flat buffer in which a replica lies: its parts are the replica's parameters and averaged buffers.

    Args:
        parameters: the tensors to average; they become views of the flat buffer.
        buffers: module buffers to average; they become views too.
        moments: see `FlatBuffer`.
        statistics: see `FlatBuffer`.
        slices: see `FlatBuffer`.
        with_statistics: see `FlatBuffer`.
        sliced_parameters: whether the parameters alone can be cut into as many equal parts, too.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
        moments: Sequence[int],
        statistics: int,
        slices: int = 1,
        *,
        with_statistics: bool = True,
        sliced_parameters: bool = False,
    ) -> None:
        super().__init__(
            FlatViews(parameters, slices if sliced_parameters else 1),
            FlatViews(buffers),
            moments,
            statistics,
            parameters[0].device,
            slices,
            with_statistics=with_statistics,
        )
        self.views = [*self.layout.of(self.parameters), *self.buffer_layout.of(self.buffers)]
        with torch.no_grad():
            for tensor, view in zip([*parameters, *buffers], self.views, strict=True):
                view.copy_(tensor)
                tensor.data = view


class CoordinateSample:
    """A fixed random sample of a flat vector's coordinates: squared distances at the price of reading 16,384 numbers.

    One coordinate is drawn from each of `size` equal stretches, so that every layer is met in its proportion. A vector that is
    no longer than `size` is taken whole. Squared distances are scaled up to the whole vector: unbiased.
    """

    SIZE = 16384

    def __init__(self, flat: torch.Tensor) -> None:
        size = min(self.SIZE, flat.numel())
        generator = torch.Generator().manual_seed(0x5EED)
        inside = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
        stretch = flat.numel() / size
        begin = torch.arange(size, dtype=torch.float64, device="cpu")
        where = ((begin + (inside if stretch > 1 else 0)) * stretch).long().clamp_(max=flat.numel() - 1)
        self._flat = flat
        self._where = where.to(flat.device)
        self._scale = stretch
        self._origin = torch.empty(size, dtype=flat.dtype, device=flat.device)
        self._difference = torch.empty_like(self._origin)
        self.move_origin()

    def distance(self, flat: torch.Tensor | None = None) -> torch.Tensor:
        """‖vector − origin‖² as a 0-dimensional tensor, estimated from the sample.

        Args:
            flat: another vector of the same length; None for the sample's own.
        """
        torch.index_select(self._flat if flat is None else flat, 0, self._where, out=self._difference).sub_(
            self._origin
        )
        return torch.dot(self._difference, self._difference) * self._scale

    def move_origin(self, flat: torch.Tensor | None = None) -> None:
        """Makes where the vector is now the point that distances are measured from.

        Args:
            flat: another vector of the same length; None for the sample's own.
        """
        torch.index_select(self._flat if flat is None else flat, 0, self._where, out=self._origin)
        self._origin.nan_to_num_(0.0, 0.0, 0.0)  # any point will do, but after a model that was lost it must be a point

    @property
    def origin(self) -> torch.Tensor:
        """The point that distances are measured from, at the sampled coordinates."""
        return self._origin

    def state(self) -> torch.Tensor:
        """The origin at the sampled coordinates."""
        return self._origin.clone()

    def load_state(self, origin: torch.Tensor) -> None:
        """The reverse of `state`."""
        self._origin.copy_(origin)


def aligned(numel: int, slices: int = 1) -> int:
    """The next number of elements of which each of `slices` equal parts begins at a multiple of the alignment."""
    step = ALIGNMENT * slices
    return -(-numel // step) * step
