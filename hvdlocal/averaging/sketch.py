"""A random projection of the gradient that keeps its norm: what LocalAdaScale sends instead of the gradient itself.

Only ‖ḡ‖² is needed of the mean gradient ḡ, and a projection is linear: the projection of the mean is the mean of the
projections. With random signs, E‖projection‖² = ‖g‖² with a relative standard deviation of about sqrt(2/size).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

ROWS_PER_PATTERN = 8
"""Rows that share one pattern of column signs. With one pattern per row, the error is that of independent signs, but the
work is no longer that of reading the gradient once; eight rows are a matrix-vector product at memory speed."""

PATTERNS_PER_TENSOR = 8
"""At least so many patterns for a tensor of that many rows. The rows of one tensor are correlated, neighbours most of all:
a pattern's rows are spread over the tensor, which keeps the error at the theory's."""


class _Piece(NamedTuple):
    """Rows `first`, `first + step` … of a tensor, with their signs and the column signs that they share."""

    tensor: int
    first: int
    step: int
    row_signs: torch.Tensor
    column_signs: torch.Tensor


class GradientSketch:
    """Projects a list of gradient tensors, each cut into rows of `size`, onto `size` floats.

    A row is multiplied by its own random sign and by one of many patterns of column signs; the rows are summed. Tensors are
    read in place. Signs depend on nothing but the shapes, so all ranks have the same.

    Args:
        numels: number of elements of each tensor, in the order of the calls.
        size: length of the projection. A vector no longer than this is not compressed: its norm is exact.
        device: of the gradients.
        seed: of the signs.
    """

    def __init__(self, numels: Sequence[int], size: int, device: torch.device, seed: int = 0x5EED) -> None:
        self.size = min(size, sum(numels))
        rows = [numel // self.size for numel in numels]
        # What does not fill a row of its own tensor is collected in one more matrix, zero at its end.
        self._tails = [(i, rows[i] * self.size) for i, numel in enumerate(numels) if numel % self.size]
        self._tail_numel = sum(numels[i] - start for i, start in self._tails)
        rows.append(-(-self._tail_numel // self.size))
        self._tail = torch.zeros(rows[-1] * self.size, device=device)
        self._rows = rows

        patterns = [min(count, max(PATTERNS_PER_TENSOR, -(-count // ROWS_PER_PATTERN))) for count in rows]
        generator = torch.Generator().manual_seed(seed)
        row_signs = _random_signs(sum(rows), generator).to(device)
        # Pattern p is a window of one long random vector, from its p-th element on: different windows are uncorrelated.
        column_signs = _random_signs(self.size + sum(patterns), generator).to(device)
        self._pieces: list[_Piece] = []
        signs_used = 0
        for tensor, (count, step) in enumerate(zip(rows, patterns, strict=True)):
            for first in range(step):
                share = len(range(first, count, step))
                window = column_signs[len(self._pieces) : len(self._pieces) + self.size]
                self._pieces.append(_Piece(tensor, first, step, row_signs[signs_used : signs_used + share], window))
                signs_used += share
        self._sum = torch.empty(self.size, device=device)

    def project(self, gradients: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Writes the projection of `gradients` (flat float32 tensors of the given numels) to `out`, float32 of `size`."""
        if self._tails:
            torch.cat([gradients[i][start:] for i, start in self._tails], out=self._tail[: self._tail_numel])
        matrices = [
            flat[: count * self.size].view(count, self.size)
            for flat, count in zip([*gradients, self._tail], self._rows, strict=True)
        ]
        out.zero_()
        for piece in self._pieces:
            rows = matrices[piece.tensor][piece.first :: piece.step]
            torch.mv(rows.t(), piece.row_signs, out=self._sum)
            out.addcmul_(self._sum, piece.column_signs)


def default_size(numel: int) -> int:
    """A length that costs little beside `numel` parameters and is accurate enough for a gain: 4 % error or less."""
    return min(max(numel // 64, 1024), 16384)


def _random_signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=generator).mul_(2).sub_(1).float()
