"""Models on disk, and the last average that is known to be finite."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from hvdlocal.averaging.buffers import BufferPolicy, averaged_buffers, running_statistics
from hvdlocal.directory import Directory

SNAPSHOT_SHARE = 0.01
"""Share of the run's time that copies of the model may take."""


def save_state(state: dict[str, torch.Tensor], directory: Directory, name: str) -> None:
    """Writes a plain `state_dict`, which the same model loads without hvdlocal; whole or not at all."""
    with directory.replacing(name) as file:
        write_state(state, file)


def copy_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the model's `state_dict` on the CPU, in memory of its own: parameters are views of one large buffer, which
    torch.save would otherwise write with each of them.
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


class BestModel:
    """The model of the best evaluation so far, kept in memory until it is on disk.

    In a job that goes on without ranks that die, every rank keeps it, until there is a better one: the rank that is the first
    one then writes it, since the one before it may have died first.

    Args:
        directory, name: where its file is written.
    """

    def __init__(self, directory: Directory, name: str) -> None:
        self._directory = directory
        self._name = name
        self._unwritten: dict[str, torch.Tensor] | None = None

    def take(self, state: dict[str, torch.Tensor]) -> None:
        """Replaces the best model, without writing it yet."""
        self._unwritten = state

    def write(self) -> None:
        """Writes the model if it is not on disk yet. After a failure for lack of room it can be called again later."""
        state = self._unwritten
        if state is not None:
            save_state(state, self._directory, self._name)
            if self._unwritten is state:
                self._unwritten = None


class LastGood:
    """A copy of a recent average, for a run that diverges; refreshed as often as 1 % of the run time allows.

    Args:
        model: to copy.
        policies: for its buffers; averaged buffers must be finite, as parameters must.
    """

    def __init__(self, model: torch.nn.Module, policies: Mapping[str, BufferPolicy]) -> None:
        self._model = model
        # Any other buffer, such as a mask, may be infinite for good reasons.
        self._judged = [
            *model.parameters(),
            *running_statistics(model).values(),
            *averaged_buffers(model, policies).values(),
        ]
        self._next = 0.0
        self._copy: dict[str, torch.Tensor] = {}

    def offer(self) -> None:
        """Copies the model, which is an average now, unless the last copy is recent or the model is not finite."""
        start = time.perf_counter()
        if start < self._next:
            return
        state = self._model.state_dict()
        if all(bool(tensor.isfinite().all()) for tensor in self._judged):
            for name, tensor in state.items():
                if name in self._copy:
                    self._copy[name].copy_(tensor)
                else:
                    self._copy[name] = tensor.detach().to("cpu", copy=True)
        end = time.perf_counter()
        self._next = end + (end - start) / SNAPSHOT_SHARE

    def save(self, directory: Directory, name: str) -> bool:
        """Writes the copy like `save_state`, and returns whether there is one."""
        if self._copy:
            save_state(self._copy, directory, name)
        return bool(self._copy)


def write_state(state: dict[str, Any], file: Any) -> None:
    """Writes a state by torch.save, but a failure to write raises the file's own OSError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
