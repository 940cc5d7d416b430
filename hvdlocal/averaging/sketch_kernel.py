"""The gradient sketch as one kernel for CUDA: all rows of all tensors in one launch, which reads the gradient once.

The matrix products of `GradientSketch.project` are several launches for every tensor. On a GPU that is many times the time
of reading the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 16, 256
"""Of a tile, the work of one program: enough loads under way, and partial sums that are a sixteenth of the gradient."""


class RowSum:
    """Σ sign · column signs ⊙ row over rows of `size` elements that lie in several tensors.

    Args:
        tensors: of each row, which tensor it lies in: int64 (rows,).
        offsets: of each row, the element of the tensor's memory at which it begins: int64 (rows,).
        signs: of each row: float32 (rows,).
        windows: of each row, where in `column_signs` its own begin: int64 (rows,).
        column_signs: float32.
        size: elements of a row.
    """

    def __init__(
        self,
        tensors: torch.Tensor,
        offsets: torch.Tensor,
        signs: torch.Tensor,
        windows: torch.Tensor,
        column_signs: torch.Tensor,
        size: int,
    ) -> None:
        device = column_signs.device
        self._size = size
        self._rows = len(tensors)
        self._tensors, self._offsets, self._signs, self._windows = (
            values.to(device) for values in (tensors, offsets, signs, windows)
        )
        self._column_signs = column_signs.to(torch.int8)
        self._partial = torch.empty((-(-self._rows // ROWS), size), dtype=torch.float32, device=device)
        self._known: list[int] = []
        self._aligned = False
        self._addresses = torch.empty(0, dtype=torch.int64, device=device)

    def __call__(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Writes the sum to `out`, float32 (size,)."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self._known:  # often they are those of the last call
            copied = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            if out.is_cuda:
                copied = copied.pin_memory().to(out.device, non_blocking=True)  # without waiting for the device
            self._known, self._addresses = addresses, copied
            self._aligned = self._size % 4 == 0 and all(address % 16 == 0 for address in addresses)
        grid = (triton.cdiv(self._size, COLUMNS), len(self._partial))
        _sum_rows[grid](
            self._addresses,
            self._tensors,
            self._offsets,
            self._signs,
            self._windows,
            self._column_signs,
            self._partial,
            self._rows,
            self._size,
            aligned=self._aligned,
            height=ROWS,
            width=COLUMNS,
        )
        torch.sum(self._partial, 0, out=out)  # rather than atomic additions, whose order would change the last bits


def try_out(device: torch.device) -> None:
    """Compiles and runs the kernel once; raises whatever Triton raises where that cannot be done."""
    two = torch.arange(2, dtype=torch.int64, device="cpu")
    signs = torch.ones(2, dtype=torch.float32, device=device)
    row_sum = RowSum(0 * two, two, signs, 0 * two, signs, size=1)
    row_sum([signs], torch.empty(1, dtype=torch.float32, device=device))


@triton.jit
def _sum_rows(  # type: ignore[no-untyped-def]
    addresses,
    tensors,
    offsets,
    signs,
    windows,
    column_signs,
    partial,
    num_rows,
    size,
    aligned: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
):
    rows = tl.program_id(1) * height + tl.arange(0, height)
    columns = tl.program_id(0) * width + tl.arange(0, width)
    there = rows < num_rows
    inside = there[:, None] & (columns < size)[None, :]
    address = tl.load(addresses + tl.load(tensors + rows, mask=there, other=0))
    begin = address.to(tl.pointer_type(tl.float32)) + tl.load(offsets + rows, mask=there, other=0)
    if aligned:  # every row begins at a multiple of 16 bytes, so that a thread may read four elements at once
        begin = tl.multiple_of(begin, 16)
    sign = tl.load(signs + rows, mask=there, other=0.0)
    window = column_signs + tl.load(windows + rows, mask=there, other=0)
    values = tl.load(begin[:, None] + columns[None, :], mask=inside, other=0.0)
    by_column = tl.load(window[:, None] + columns[None, :], mask=inside, other=0).to(tl.float32)
    total = tl.sum(values * by_column * sign[:, None], axis=0)
    tl.store(partial + tl.program_id(1) * size + columns, total, mask=columns < size)
