"""The exact loss and accuracy of a model, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.communicator import Communicator
from hvdlocal.data import evaluation_batches
from hvdlocal.training.session import Session


@dataclass(frozen=True)
class Evaluation:
    """Means over `samples` images; accuracies between 0 and 1. `top5` is None with five classes or fewer."""

    samples: int
    loss: float
    accuracy: float
    top5: float | None


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    communicator: Communicator,
    device: torch.device,
    num_classes: int,
) -> Evaluation:
    """Evaluates the same model on all ranks' batches; a collective. Every image counts once, even if ranks hold unequal numbers.

    Args:
        model: is put into evaluation mode, and back afterwards.
        batches: this rank's (inputs, integer labels), on `device`.
        communicator: the ranks.
        device: of the model.
        num_classes: of the labels; with five or fewer there is no top-5 accuracy.
    """
    training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # samples, loss, correct, correct among five
    for x, y in batches:
        logits = model(x).float()
        best = logits.topk(min(5, num_classes), dim=1).indices == y[:, None]
        totals += torch.stack(
            [
                torch.full((), float(len(y)), dtype=torch.float64, device=device),
                F.cross_entropy(logits, y, reduction="sum").double(),
                best[:, 0].sum().double(),
                best.any(1).sum().double(),
            ]
        )
    model.train(training)
    communicator.sum_(totals, "hvdlocal.evaluation")
    samples, loss, top1, top5 = totals.tolist()
    return Evaluation(
        samples=round(samples),
        loss=loss / samples,
        accuracy=top1 / samples,
        top5=top5 / samples if num_classes > 5 else None,
    )


class Evaluator:
    """Evaluates the average of the replicas on the session's test data.

    Args:
        session: data and settings.
        optimizer: holds the replica.
        forward: the replica's model as training calls it, perhaps compiled.
    """

    def __init__(
        self, session: Session, optimizer: LocalOptimizer | SynchronousOptimizer, forward: torch.nn.Module
    ) -> None:
        self._session = session
        self._optimizer = optimizer
        self._forward = forward

    def __call__(self) -> Evaluation:
        """Averages the replicas and evaluates; a collective. Afterwards the model is the average."""
        session, optimizer = self._session, self._optimizer
        data, config = session.test_data, session.config
        assert data is not None
        optimizer.synchronize()
        if "reestimate" in optimizer.buffer_policies.values():
            optimizer.reestimate_buffers(self._reestimation_batches())
        batches = evaluation_batches(
            data,
            config.evaluation_batch_size,
            rank=session.communicator.rank,
            num_workers=session.communicator.size,
            crop=session.preprocessing.test_crop,
            transform=session.preprocessing.test_transform,
            device=session.device,
            threads=config.data.threads,
        )
        formatted = ((x.contiguous(memory_format=session.memory_format), y) for x, y in batches)
        with session.autocast(), optimizer.published():
            return evaluate(self._forward, formatted, session.communicator, session.device, data.num_classes)

    def _reestimation_batches(self) -> Iterator[torch.Tensor]:
        """Yields the first batches of an order of their own: the same images, however many steps came before."""
        session = self._session
        batches = session.new_loader(seed=session.config.seed + 1).endless()
        for _ in range(session.config.method.reestimate_batches):
            yield next(batches)[0].contiguous(memory_format=session.memory_format)
        batches.close()
