"""Memory for batches, used again as soon as nobody holds the batch that lay in it."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

_SMALLEST = (
    1 << 17
)  # malloc maps larger blocks from the kernel and unmaps them afterwards; smaller ones it keeps itself
_PAGE = 1 << 12


def torch_dtype(dtype: DTypeLike) -> torch.dtype:
    """The torch type that corresponds to a NumPy type."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


class BufferPool:
    """Makes uninitialised tensors, in memory that was already touched where it can.

    The kernel zeroes every page of fresh memory at its first touch. malloc avoids that for batches of a few megabytes,
    but never above 32 MB: normalising 64 images of 224x224 pixels takes 3.3 times as long in fresh memory. A tensor made
    here may be used like any other: its memory is used again only when the tensor, all its views, the NumPy arrays that
    share it, and whatever autograd saved of them are gone.

    May be called from any thread. Copies and pickles of a recycler are recyclers without memory.

    Args:
        idle: blocks of memory that are kept while nobody uses them; beyond that the longest unused are freed.
    """

    # How it knows: torch.from_numpy makes a storage that keeps the array alive and lets go of it with its last user.
    # So a weak reference to an array that nothing but the storage holds tells when the memory is free. The deque needs
    # no lock, which matters since the last reference may go in any thread, and during garbage collection even in the
    # middle of `empty`.

    def __init__(self, idle: int = 4) -> None:
        if idle < 0:
            raise ValueError(f"idle is {idle}; it is the number of unused blocks to keep and must not be negative")
        self._idle: deque[Tensor] = deque(maxlen=idle)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """An uninitialised contiguous tensor on the CPU.

        Args:
            shape: its shape.
            dtype: its type.
            pinned: page-locked, for asynchronous copies to a GPU. torch recycles such memory itself, and knows about
                copies under way, so it is left to that.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if pinned or num_bytes < _SMALLEST:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=pinned)
        block = self._block(-(-num_bytes // _PAGE) * _PAGE)
        lease = block.numpy()[:num_bytes]
        weakref.finalize(lease, self._idle.append, block).atexit = False
        storage = torch.from_numpy(lease).untyped_storage()
        strides = torch.empty(tuple(shape), dtype=dtype, device="meta").stride()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, tuple(shape), strides)

    def _block(self, num_bytes: int) -> Tensor:
        for _ in range(len(self._idle)):
            try:
                block = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if block.numel() == num_bytes:
                return block
            self._idle.appendleft(block)
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def __reduce__(self) -> tuple[type[BufferPool], tuple[int | None]]:
        return BufferPool, (self._idle.maxlen,)
