"""One micro-batch of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.training.schedules import Schedule
from hvdlocal.training.session import Session
from hvdlocal.training.tasks import Batch


class TrainingStep:
    """Forward pass, backward pass and update, in the configured precision and at the scheduled learning rate.

    A micro-batch is one call of `compute` (or of `loss` and `backward`) and one of `update`, so that a caller can record or time
    what lies between.

    Args:
        session: settings and device.
        optimizer: trains its model.
        schedule: γ as a function of progress; by default the session's.

    Attributes:
        forward: the model, compiled if the configuration says so.
        scaler: keeps float16 gradients in range; does nothing in other precisions.
    """

    def __init__(
        self, session: Session, optimizer: LocalOptimizer | SynchronousOptimizer, schedule: Schedule | None = None
    ) -> None:
        config, model = session.config, optimizer.model
        self._session = session
        self._optimizer = optimizer
        self._schedule = schedule
        # An optimizer of the user's own may have groups with rates of their own, which keep their proportions.
        self._shares = [float(group["lr"]) / config.optimizer.lr for group in optimizer.param_groups]
        self.forward: nn.Module = torch.compile(model) if config.model.compile else model  # type: ignore[assignment]
        self.scaler = torch.amp.GradScaler(session.device.type, enabled=config.precision == "float16")

    def compute(self, batch: Batch) -> tuple[Tensor, Any]:
        """Computes the gradient of a micro-batch.

        Args:
            batch: inputs and targets, on the session's device.

        Returns:
            The loss, and what the task's metrics need.
        """
        loss, output = self.loss(batch)
        self.backward(loss)
        return loss, output

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Sets the scheduled learning rate and makes the forward pass; arguments and results are those of `compute`."""
        optimizer = self._optimizer
        if not optimizer.micro_batches:
            schedule = self._schedule or self._session.length.schedule  # which follows the number of ranks
            lr = schedule(optimizer.progress)
            for group, share in zip(optimizer.param_groups, self._shares, strict=True):
                group["lr"] = lr * share
        with self._session.autocast():
            return self._session.task.loss(self.forward, self._session.formatted(batch))

    def backward(self, loss: Tensor) -> None:
        """Makes the backward pass."""
        self._optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self._optimizer.record_loss(loss)

    def update(self) -> None:
        """Hands the gradient to the optimizer, which steps after its last micro-batch; may be a collective."""
        self.scaler.step(self._optimizer)
        self.scaler.update()
