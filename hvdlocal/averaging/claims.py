"""Which optimizer averages a module buffer: its memory can be part of one flat buffer only."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch


class BufferClaims:
    """The averaged buffers of one optimizer, which no optimizer with other parameters may average as well.

    Args:
        buffers: that the optimizer averages, by name.
        parameters: that it trains.

    Raises:
        ValueError: naming a buffer that another optimizer averages already.
    """

    _owners: ClassVar[weakref.WeakValueDictionary[int, BufferClaims]] = weakref.WeakValueDictionary()

    def __init__(self, buffers: Mapping[str, torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
        self._buffers = list(buffers.values())
        self._parameters = {id(p) for p in parameters}
        for name, buffer in buffers.items():
            owner = self._owners.get(id(buffer))
            if owner is not None and owner.hold(buffer) and self._parameters.isdisjoint(owner._parameters):
                raise ValueError(
                    f"buffer {name!r} is averaged by another LocalOptimizer already: give each optimizer the part of the model "
                    "that it trains (LocalOptimizer(optimizer, model.part)), or one of the two buffers='local'"
                )
        for buffer in self._buffers:
            self._owners[id(buffer)] = self

    def hold(self, buffer: torch.Tensor) -> bool:
        """Whether they hold this very buffer, and not one that lay at the same address before."""
        return any(one is buffer for one in self._buffers)
