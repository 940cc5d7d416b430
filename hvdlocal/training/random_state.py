"""The random state of a process, as plain values for a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of torch on the CPU and on `device`, of NumPy's global generator and of Python's `random`.

    Generators that a program has made itself are not among them.
    """
    return {
        "random": torch.get_rng_state(),
        "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy_random": _plain(np.random.get_state(legacy=False)),
        "python_random": random.getstate(),
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Continues from a `random_state`; older ones have only torch's."""
    torch.set_rng_state(state["random"])
    if device.type == "cuda" and state["device_random"] is not None:
        torch.cuda.set_rng_state(state["device_random"], device)
    if "numpy_random" in state:
        np.random.set_state(state["numpy_random"])
    if "python_random" in state:
        random.setstate(state["python_random"])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
