"""One flat buffer for everything that the ranks average, so that an averaging is one collective and no copy.

Layout of `FlatBuffer.flat`, float32, every part beginning at a multiple of 64 bytes:

    [ parameters | averaged moments | averaged buffers | scalars, digest | statistics vector | statistics scalars ]
      `weights`, equal on the ranks   └ `own`: every rank's, also inside of an island
      of an island

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
    """

    def __init__(self, like: Sequence[torch.Tensor]) -> None:
        self._shapes = [(t.shape, torch.empty_like(t, device="meta").stride()) for t in like]
        self.starts = [0]
        for tensor in like:
            self.starts.append(self.starts[-1] + aligned(tensor.numel()))
        self.numel = self.starts[-1]

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
        moments: number of optimizer moments per parameter.
        statistics: length of the gradient statistics' vector; 0 for none, in which case its scalars are left out too.
        device: where the buffer lies.
        slices: the number of equal parts into which the buffer can be cut, with and without the statistics.
    """

    def __init__(
        self,
        layout: FlatViews,
        buffer_layout: FlatViews,
        moments: int,
        statistics: int,
        device: torch.device,
        slices: int = 1,
    ) -> None:
        weights = (1 + moments) * layout.numel
        buffers, scalars = weights, weights + aligned(buffer_layout.numel)
        vector = aligned(scalars + len(Scalar) + DIGEST_SIZE, slices)
        counts = vector + aligned(statistics)
        end = aligned(counts + len(StatisticsScalar), slices) if statistics else vector
        self.flat = torch.zeros(end, dtype=torch.float32, device=device)

        self.layout = layout
        self.parameters = self.flat[: layout.numel]
        self.weights = self.flat[:weights]
        self.moments = [layout.of(part) for part in self.weights.split(layout.numel)[1:]]
        self.buffer_layout = buffer_layout
        self.buffers = self.flat[buffers : buffers + buffer_layout.numel]
        self.replica = self.flat[:scalars]
        self.scalars = self.flat[scalars : scalars + len(Scalar) + DIGEST_SIZE]
        self.digest = self.scalars[len(Scalar) :]
        self.without_statistics = self.flat[:vector]
        self.statistics = self.flat[vector : vector + statistics]
        self.statistics_scalars = self.flat[counts : counts + len(StatisticsScalar)] if statistics else None
        self.with_statistics_scalars = self.flat[vector:]
        self.own_start = weights


class FlatReplica(FlatBuffer):
    """The flat buffer in which a replica lies: its parts are the replica's parameters and averaged buffers.

    Args:
        parameters: the tensors to average; they become views of the flat buffer.
        buffers: module buffers to average; they become views too.
        moments: see `FlatBuffer`.
        statistics: see `FlatBuffer`.
        slices: see `FlatBuffer`.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
        moments: int,
        statistics: int,
        slices: int = 1,
    ) -> None:
        super().__init__(FlatViews(parameters), FlatViews(buffers), moments, statistics, parameters[0].device, slices)
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

    def move_origin(self) -> None:
        """Makes where the vector is now the point that distances are measured from."""
        torch.index_select(self._flat, 0, self._where, out=self._origin)
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
