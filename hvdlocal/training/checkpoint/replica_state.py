"""One rank's replica of the model in a checkpoint, with its optimizer and its random state."""

from __future__ import annotations

from typing import Any

import torch

from hvdlocal.averaging import ReplicaOptimizer
from hvdlocal.training.checkpoint.resume import Resumed
from hvdlocal.training.random_state import random_state, restore_random_state


class ReplicaState:
    """What every training loop must not lose: model, optimizer and random state.

    Args:
        optimizer: has the model.
        device: of the model.
    """

    def __init__(self, optimizer: ReplicaOptimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._model = optimizer.model
        self._communicator = optimizer.communicator
        self._device = device

    def of_rank(self) -> dict[str, Any]:
        """Returns what this rank needs to continue. What is the same on all ranks is left to rank 0."""
        replica = self._model.state_dict()
        if self._optimizer.in_sync and self._communicator.rank:
            same = {p.data_ptr() for p in self._model.parameters()}
            replica = {name: value for name, value in replica.items() if value.data_ptr() not in same}
        optimizer = self._optimizer.state_dict()
        shared = optimizer["hvdlocal"].pop("shared", {})
        if not self._saves_what_is_shared:
            shared = {}
        return {
            "model": replica,
            "optimizer": optimizer,
            **random_state(self._device),
            **({"shared": shared} if shared else {}),
        }

    def of_all_ranks(self) -> dict[str, Any]:
        """Returns the numbers that are the same on all ranks, for the manifest."""
        return {
            "num_workers": self._communicator.size,  # of ranks, under the name that it had before there were islands
            "islands": [list(ranks) for ranks in self._communicator.islands],
            "in_sync": self._optimizer.in_sync,
            "progress": self._optimizer.progress,
            **({"shared": True} if self._optimizer.shared_state() else {}),
        }

    @property
    def _saves_what_is_shared(self) -> bool:
        """Whether this rank is one of the first island, or rank 0 where there are none."""
        return (self._communicator.peers or self._communicator).rank == 0

    def restore(self, resumed: Resumed, scale: float) -> None:
        """Continues from a checkpoint: from this rank's own replica, or from the average of all.

        Args:
            resumed: the checkpoint.
            scale: what a unit of its progress is in units of this run, whose ranks and islands may be others.
        """
        state = resumed.common
        self._optimizer.load_shared_state(resumed.shared)
        self._model.load_state_dict(state["model"])
        if resumed.state is not None:
            self._optimizer.load_state_dict(state["optimizer"])
            restore_random_state(state, self._device)
        else:
            self._optimizer.load_averaged_state_dict(state["optimizer"], resumed.contents["progress"] * scale)
            torch.manual_seed((torch.initial_seed() + resumed.step * 0x9E3779B97F4A7C15) % 2**63)
