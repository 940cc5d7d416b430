"""What a training loop of the user's own restores beside model and optimizer: schedulers, loaders, counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch


@runtime_checkable
class Restorable(Protocol):
    """An object that gives its state and takes it back."""

    def state_dict(self) -> dict[str, Any]:
        """Returns its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Continues from a `state_dict`."""


class UserState:
    """Named parts of a loop, each with a state.

    Args:
        parts: objects with `state_dict` and `load_state_dict`, or dicts of plain values, which are restored in place.

    Attributes:
        names: of the parts.

    Raises:
        ValueError: a part is neither.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._parts = {name: _restorable(name, part) for name, part in parts.items()}
        self.names = list(self._parts)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all parts, as plain values and tensors.

        Raises:
            ValueError: a state holds something else; the message says where.
        """
        return {name: _plain(part.state_dict(), name) for name, part in self._parts.items()}

    def load_state_dict(self, states: Mapping[str, Any], differing: frozenset[str]) -> None:
        """Continues from a `state_dict`.

        Args:
            states: the states of all parts.
            differing: the parts whose states differed between the ranks, if those are now to continue from one of them.

        Raises:
            ValueError: a part cannot be continued from its state.
        """
        for name, part in self._parts.items():
            if name in differing and not isinstance(part, torch.amp.GradScaler):  # any rank's scale is a good one
                raise ValueError(
                    f"the state of {name!r} differs between the ranks of the checkpoint, so another number of ranks cannot "
                    "continue from it: start as many ranks as before"
                )
            try:
                part.load_state_dict(states[name])
            except Exception as error:
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise ValueError(
                    f"{name!r} cannot be continued from its state in the checkpoint ({what}): build it as it was then"
                ) from error


class _Values:
    """A dict of plain values, which keeps its identity when it is restored."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def state_dict(self) -> dict[str, Any]:
        return self._values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._values.clear()
        self._values.update(state_dict)


def _restorable(name: str, part: Any) -> Restorable:
    if isinstance(part, dict):
        return _Values(part)
    if isinstance(part, Restorable) and not isinstance(part, type):
        return part
    remedy = "give an object that has both, or a dict of plain values"
    if isinstance(part, torch.utils.data.DataLoader):
        remedy = "give a hvdlocal.Loader or torchdata's StatefulDataLoader, or leave it out and keep the position in state={…}"
    what = f"the class {part.__name__}" if isinstance(part, type) else f"a {type(part).__name__}"
    raise ValueError(f"{name!r} is {what} and cannot be restored, for want of state_dict and load_state_dict: {remedy}")


def _plain(value: Any, where: str) -> Any:
    """Returns the value in the types that a checkpoint can hold."""
    if value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(inner, f"{where}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value))
    raise ValueError(
        f"the state of {where} is a {type(value).__name__}, which a checkpoint does not hold: keep numbers, strings, tensors, "
        "and lists, tuples and dicts of them"
    )
