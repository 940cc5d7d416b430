"""A random projection of the gradient that keeps its norm: what LocalAdaScale sends instead of the gradient itself.

Only ‖ḡ‖² is needed of the mean gradient ḡ, and a projection is linear: the projection of the mean is the mean of the
projections. With random signs, E‖projection‖² = ‖g‖² with a relative standard deviation of about sqrt(2/size).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

ROWS_PER_PATTERN = 8
"""Rows that share one pattern of column signs. With one pattern per row, the error is that of independent signs, but the
work is no longer that of reading the gradient once; eight rows are a small matrix product at memory speed."""

PATTERNS_PER_TENSOR = 8
"""At least so many patterns for a tensor of that many rows. The rows of one tensor are correlated, neighbours most of all:
a pattern's rows are spread over the tensor, which keeps the error at the theory's."""


class _Matrix(NamedTuple):
    """The rows of one tensor: with P patterns, pattern p has the rows p, P + p, 2P + p …, D of them."""

    row_signs: torch.Tensor  # (P, 1, D)
    column_signs: torch.Tensor  # (P, size)
    work: torch.Tensor  # (P, 1, size)


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
        shapes = [_shape(numel // self.size) for numel in numels]
        # What does not fill the patterns of its own tensor is collected in one more matrix, zero at its end.
        ends = [patterns * depth * self.size for patterns, depth in shapes]
        self._tails = [(i, end) for i, (numel, end) in enumerate(zip(numels, ends, strict=True)) if end < numel]
        self._tail_numel = sum(numels[i] - end for i, end in self._tails)
        rows = -(-self._tail_numel // self.size)
        patterns, _ = _shape(rows)
        shapes.append((patterns, -(-rows // patterns) if rows else 0))
        self._tail = torch.zeros(shapes[-1][0] * shapes[-1][1] * self.size, dtype=torch.float32, device=device)

        generator = torch.Generator().manual_seed(seed)
        row_signs = _random_signs(sum(p * d for p, d in shapes), generator).to(device).split([p * d for p, d in shapes])
        # Pattern p is a window of one long random vector, from its p-th element on: different windows are uncorrelated.
        column_signs = _random_signs(self.size + sum(p for p, _ in shapes), generator).to(device)
        work = torch.empty((max(p for p, _ in shapes), 1, self.size), dtype=torch.float32, device=device)
        self._matrices: list[_Matrix | None] = []
        used = 0
        for (patterns, depth), signs in zip(shapes, row_signs, strict=True):
            windows = column_signs.as_strided((patterns, self.size), (1, 1), used)
            by_pattern = signs.view(depth, patterns).t().contiguous()[:, None]
            self._matrices.append(_Matrix(by_pattern, windows, work[:patterns]) if patterns else None)
            used += patterns
        self._sum = torch.empty(self.size, dtype=torch.float32, device=device)
        self._kernel = self._one_kernel(shapes, row_signs, column_signs) if device.type == "cuda" else None

    def _one_kernel(
        self, shapes: list[tuple[int, int]], row_signs: Sequence[torch.Tensor], column_signs: torch.Tensor
    ) -> Callable[[Sequence[torch.Tensor], torch.Tensor], None] | None:
        """All matrices in one launch, for a GPU; None where it cannot be compiled."""
        try:
            from hvdlocal.averaging.sketch_kernel import RowSum, try_out

            with torch.cuda.device(column_signs.device):
                try_out(column_signs.device)
        except Exception as error:  # no Triton, or no C compiler for it: it has no error of its own
            warnings.warn(f"gradients are projected without a kernel of its own: {error}", stacklevel=4)
            return None
        parts = []
        used = 0
        for tensor, (patterns, depth) in enumerate(shapes):
            rows = torch.arange(patterns * depth, dtype=torch.int64, device="cpu")
            pattern = rows % max(patterns, 1)
            parts.append(torch.stack([torch.full_like(rows, tensor), rows * self.size, used + pattern]))
            used += patterns
        tensors, offsets, windows = torch.cat(parts, dim=1)
        return RowSum(tensors, offsets, torch.cat(list(row_signs)), windows, column_signs, self.size)

    def project(self, gradients: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Writes the projection of `gradients` to `out`.

        Args:
            gradients: float32 tensors of the given numels, of any shape but dense; read in the order of their memory.
            out: float32 (size,).
        """
        if self._tails:
            tails = [gradients[i] for i, _ in self._tails]
            flat_tails = [
                tail.as_strided((tail.numel() - end,), (1,), tail.storage_offset() + end)
                for tail, (_, end) in zip(tails, self._tails, strict=True)
            ]
            torch.cat(flat_tails, out=self._tail[: self._tail_numel])
        if self._kernel is not None:
            with torch.cuda.device(out.device):
                self._kernel([*gradients, self._tail], out)
            return
        out.zero_()
        for gradient, matrix in zip([*gradients, self._tail], self._matrices, strict=True):
            if matrix is None:
                continue
            row_signs, column_signs, work = matrix
            patterns, _, depth = row_signs.shape
            rows = gradient.as_strided((patterns, depth, self.size), (self.size, patterns * self.size, 1))
            torch.bmm(row_signs, rows, out=work)
            out.add_(torch.sum(work[:, 0].mul_(column_signs), 0, out=self._sum))


def _shape(rows: int) -> tuple[int, int]:
    """(patterns, rows of each) for a tensor of so many rows; a few rows may be left over."""
    if not rows:
        return 0, 0
    patterns = min(rows, max(PATTERNS_PER_TENSOR, -(-rows // ROWS_PER_PATTERN)))
    return patterns, rows // patterns


def default_size(numel: int) -> int:
    """A length that costs little beside `numel` parameters and is accurate enough for a gain: 4 % error or less."""
    return min(max(numel // 64, 1024), 16384)


def _random_signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=generator, dtype=torch.int64, device="cpu").mul_(2).sub_(1).float()
