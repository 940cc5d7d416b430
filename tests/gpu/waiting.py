"""Noticing where a program waits for its device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

READS = {
    getattr(torch.Tensor, name) for name in ("item", "tolist", "__float__", "__int__", "__bool__", "nonzero", "cpu")
}
"""What has to wait for a GPU when the tensor is on one. On the CPU these calls stand for a wait."""


class WaitError(RuntimeError):
    """The program read from a tensor on the CPU where it would have waited for a GPU."""


class _Watch(TorchFunctionMode):
    def __init__(self, forgive: bool) -> None:
        super().__init__()
        self.forgive = forgive
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.seen.append(func.__name__)
            if not self.forgive:
                raise WaitError(f"Tensor.{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """What waits for the device inside raises an error."""
    if device.type != "cuda":
        with _Watch(forgive=False):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Gives a list of what waited for the device inside, complete at the end."""
    found: list[str] = []
    if device.type != "cuda":
        with _Watch(forgive=True) as watch:
            yield found
        found += watch.seen
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found += [str(one.message) for one in caught if "synchronizing CUDA operation" in str(one.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
