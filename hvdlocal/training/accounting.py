"""What a run has taken and sent so far, carried through interruptions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hvdlocal.averaging import ReplicaOptimizer


class RunTotals:
    """Seconds of this rank by what they were spent on, and what training handed to collectives.

    Args:
        optimizer: that trains, and times its averagings; what its communicator carries is counted.
    """

    def __init__(self, optimizer: ReplicaOptimizer) -> None:
        self._optimizer = optimizer
        self._traffic = optimizer.communicator.traffic
        self._elapsed_before, self._bytes_before, self._collectives_before = 0.0, 0, 0
        self.waiting_for_data = 0.0
        self.evaluating = 0.0
        self.start()

    def start(self) -> None:
        """Training begins now, or goes on; what was sent to set it up does not count."""
        self._start = time.perf_counter()
        self._bytes_not_counted, self._collectives_not_counted = self._traffic.bytes, self._traffic.collectives

    @property
    def elapsed(self) -> float:
        """Seconds since training began, those between an interruption and the resumption left out."""
        return self._elapsed_before + time.perf_counter() - self._start

    @property
    def bytes_sent(self) -> int:
        """By training, evaluations and everything else beside it left out."""
        return self._bytes_before + self._traffic.bytes - self._bytes_not_counted

    @property
    def collectives(self) -> int:
        """As `bytes_sent`."""
        return self._collectives_before + self._traffic.collectives - self._collectives_not_counted

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """What is sent inside does not count."""
        bytes_before, collectives_before = self._traffic.bytes, self._traffic.collectives
        try:
            yield
        finally:
            self._bytes_not_counted += self._traffic.bytes - bytes_before
            self._collectives_not_counted += self._traffic.collectives - collectives_before

    def waited(self, seconds: float) -> None:
        """Counts a wait for other ranks as averaging, of which waiting for the slowest is a part anyway."""
        self._optimizer.seconds_averaging += seconds

    def seconds(self) -> dict[str, float]:
        """All, by name; what is not accounted for is computing."""
        spent = {
            "averaging": self._optimizer.seconds_averaging,
            "waiting_for_data": self.waiting_for_data,
            "evaluating": self.evaluating,
        }
        elapsed = self.elapsed
        return {"elapsed": elapsed, "computing": elapsed - sum(spent.values()), **spent}

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {**self.seconds(), "bytes_sent": self.bytes_sent, "collectives": self.collectives}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counts on from a `state_dict`, once `start` is called."""
        self._elapsed_before = state["elapsed"]
        self._optimizer.seconds_averaging = state["averaging"]
        self.waiting_for_data, self.evaluating = state["waiting_for_data"], state["evaluating"]
        self._bytes_before, self._collectives_before = state["bytes_sent"], state["collectives"]


class TrainingMeter:
    """Means of this rank's training losses and accuracies since the last line of the log.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self._totals = torch.zeros(2, dtype=torch.float32, device=device)
        self._images = 0
        self.micro_batches = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes in one micro-batch, without waiting for its device."""
        if labels.is_floating_point():  # MixUp's; the greater part counts
            labels = labels.argmax(1)
        correct = (logits.detach().argmax(1) == labels).sum()
        self._totals += torch.stack([loss.detach().float(), correct.float()])
        self._images += len(labels)
        self.micro_batches += 1

    def take(self) -> tuple[float, float]:
        """(mean loss, accuracy), and starts anew."""
        loss, correct = self._totals.tolist()
        result = loss / self.micro_batches, correct / self._images
        self._totals.zero_()
        self._images = self.micro_batches = 0
        return result

    def state_dict(self) -> dict[str, Any]:
        """What was taken in since the last line."""
        return {"totals": self._totals.clone(), "images": self._images, "micro_batches": self.micro_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self._totals.copy_(state["totals"])
        self._images, self.micro_batches = state["images"], state["micro_batches"]
