"""The exact metrics of a model, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hvdlocal.averaging import LocalOptimizer, SynchronousOptimizer
from hvdlocal.communicator import Communicator
from hvdlocal.figures.units import metric_text
from hvdlocal.training.session import Session
from hvdlocal.training.tasks import Batch, Task
from hvdlocal.training.tasks.base import batch_length


@dataclass(frozen=True)
class Evaluation:
    """Means over all test samples. Each metric is an attribute, too: `evaluation.loss`.

    Attributes:
        samples: the number of test samples.
        metrics: the means by name; None for one that counted nothing, such as top-5 among five classes.
    """

    samples: int
    metrics: Mapping[str, float | None] = field(default_factory=dict)

    def __getattr__(self, name: str) -> float | None:
        if not name.startswith("__") and name in self.metrics:
            return self.metrics[name]
        raise AttributeError(f"this evaluation has no metric {name!r}")

    def record(self) -> dict[str, Any]:
        """Returns samples and metrics side by side, as in records and checkpoints."""
        return {"samples": self.samples, **self.metrics}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Evaluation:
        """Returns what `record` described."""
        return cls(record["samples"], {name: value for name, value in record.items() if name != "samples"})


def described(evaluation: Evaluation, task: Task) -> str:
    """Returns the metrics in words, the one by which the best model is chosen first."""
    first = task.best[0]
    names = [name for name in evaluation.metrics if name != first]
    words = []
    for name in [first, *names]:
        value = evaluation.metrics.get(name)
        if value is not None:
            words.append(f"{name} {metric_text(value, name in task.percent)}")
    return "  ".join(words)


@torch.no_grad()
def evaluate(
    task: Task,
    model: torch.nn.Module,
    batches: Iterable[Batch],
    communicator: Communicator,
    device: torch.device,
) -> Evaluation:
    """Evaluates the same model on all ranks' batches; a collective. Every sample counts once, even if ranks hold unequal numbers.

    Args:
        task: computes the sums of a batch.
        model: is put into evaluation mode, and back afterwards.
        batches: this rank's batches, on `device`.
        communicator: the ranks.
        device: of the model.
    """
    training = model.training
    model.eval()
    samples = 0
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        samples += batch_length(batch)
        for name, pair in task.evaluate(model, batch).items():
            total = torch.stack([_float64(value, device) for value in pair])
            sums[name] = sums[name] + total if name in sums else total
    model.train(training)
    # A rank without test samples learns the names from the others.
    names = list(dict.fromkeys(name for rank in communicator.gather(list(sums), "hvdlocal.metrics") for name in rank))
    nothing = torch.zeros(2, dtype=torch.float64, device=device)
    counted = torch.tensor([samples, 0], dtype=torch.float64, device=device)
    totals = torch.stack([counted, *(sums.get(name, nothing) for name in names)]).flatten()
    communicator.sum_(totals, "hvdlocal.evaluation")
    (all_samples, _), *pairs = totals.view(-1, 2).tolist()
    means = {name: total / count if count else None for name, (total, count) in zip(names, pairs, strict=True)}
    return Evaluation(round(all_samples), means)


def _float64(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """Returns a number as a tensor on the device, without waiting for it."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(()).to(device, torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)


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
        """Averages the replicas and evaluates; a collective. Afterwards the model is the average.

        Where ranks are lost meanwhile, the others evaluate again, with the test samples of those.
        """
        session, optimizer, communicator = self._session, self._optimizer, self._session.communicator
        optimizer.synchronize()
        if "reestimate" in optimizer.buffer_policies.values():
            optimizer.reestimate_buffers(self._reestimation_batches())
        while True:
            losses = len(communicator.losses)
            batches = map(session.formatted, session.test_batches())
            with session.autocast(), optimizer.published():
                evaluation = evaluate(session.task, self._forward, batches, communicator, session.device)
            if len(communicator.losses) == losses:
                return evaluation

    def _reestimation_batches(self) -> Iterator[torch.Tensor]:
        """Yields the first batches of an order of their own: the same samples, however many steps came before."""
        session = self._session
        batches = session.new_loader(seed=session.config.seed + 1).endless()
        for _ in range(session.config.method.reestimate_batches):
            yield session.formatted(next(batches))[0]
        batches.close()
