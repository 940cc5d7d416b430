"""Models on disk, and the last average that is known to be good."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

SNAPSHOT_SHARE = 0.01
"""Share of the run's time that copies of the model may take."""


def save_model(model: torch.nn.Module, path: Path) -> None:
    """Writes the plain `state_dict` that the same model loads without hvdlocal; whole or not at all."""
    save_state(copy_of(model), path)


def copy_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's `state_dict` on the CPU, in memory of its own: parameters are views of one large buffer, which would
    otherwise be written with each of them.
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


class LastGood:
    """A copy of a recent average, for when the present model is lost to NaN; renewed as often as a hundredth of the time pays."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._next = 0.0
        self._copy: dict[str, torch.Tensor] = {}

    def offer(self) -> None:
        """Copies the model, which is an average now, unless the last copy is recent or the model is not finite."""
        start = time.perf_counter()
        if start < self._next:
            return
        state = self._model.state_dict()
        if all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point()):
            for name, tensor in state.items():
                if name in self._copy:
                    self._copy[name].copy_(tensor)
                else:
                    self._copy[name] = tensor.detach().to("cpu", copy=True)
        end = time.perf_counter()
        self._next = end + (end - start) / SNAPSHOT_SHARE

    def save(self, path: Path) -> bool:
        """Writes the copy like `save_model`; returns whether there is one."""
        if self._copy:
            save_state(self._copy, path)
        return bool(self._copy)


def save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a state_dict, down to the disk, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # where there is no room it would take what is left
        raise
