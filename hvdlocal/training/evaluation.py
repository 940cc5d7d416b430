"""How good a model is, exactly, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hvdlocal.communicator import Communicator


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
    """Evaluates the same model on all ranks' batches; a collective. Every image counts once: ranks may hold unequal numbers.

    Args:
        model: put into evaluation mode, and back.
        batches: this rank's (inputs, integer labels) on `device`.
        communicator: sums over the ranks.
        device: of the model.
        num_classes: with five or fewer there is no top-5 accuracy.
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
