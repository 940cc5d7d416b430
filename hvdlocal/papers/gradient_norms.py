"""Fig. 7 of Balles et al. (TMLR 2024): the variation of the full gradient's norm within H steps.

LocalAdaScale assumes that ‖∇f‖ is constant over a round (Eq. 40). Here one worker trains with SGD, as in the paper. At some
points of the run, the full gradient is computed before each of the next steps; the standard deviation of its norm is divided by
the mean.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdlocal.averaging import NonFiniteError
from hvdlocal.communicator import SingleProcess
from hvdlocal.papers.experiment_report import ExperimentReport
from hvdlocal.papers.fixed_subset import first_images
from hvdlocal.training import TrainConfig
from hvdlocal.training.optimizers import build_optimizer
from hvdlocal.training.schedules import build_schedule
from hvdlocal.training.session import Session
from hvdlocal.training.step import TrainingStep

if TYPE_CHECKING:
    from hvdlocal.figures.style import Figure

PERIODS = (2, 8, 32)
MOMENTS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95)
"""The points at which full gradients are computed, as shares of the run."""
WELL_BELOW_1 = 0.5
IMAGES = 5_000
"""Number of training images over which f is taken, without augmentation."""


def coefficient_of_variation(norms: Sequence[float]) -> float:
    """Returns the sample standard deviation divided by the mean."""
    return statistics.stdev(norms) / statistics.fmean(norms)


def full_gradient_norm(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Returns ‖∇f‖ of the mean cross-entropy; the model and its batch-norm statistics do not change."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    total = sum(len(y) for _, y in batches)
    for x, y in batches:
        (F.cross_entropy(model(x).float(), y, reduction="sum") / total).backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return torch.stack(norms).norm().item()


def moments(budget: int) -> list[int]:
    """Returns the first steps of the windows, which do not overlap, in a run of `budget` steps.

    Raises:
        ValueError: the run is too short for two windows.
    """
    length = max(PERIODS)
    if budget < 2 * length:
        raise ValueError(f"the run has {budget} steps: at least {2 * length} are needed, see --epochs")
    starts: list[int] = []
    for share in MOMENTS:
        start = min(int(share * budget), budget - length)
        if not starts or start >= starts[-1] + length:
            starts.append(start)
    return starts


def train(config: TrainConfig, say: Callable[[str], None]) -> Iterator[tuple[float, list[float]]]:
    """Trains on one worker; yields (epoch, the norms before the next steps) at each of the points.

    Args:
        config: data, model, optimizer, schedule, epochs and seed; the method is sync.
        say: prints a line.

    Raises:
        ValueError: a norm is not finite, or the run is too short.
    """
    session = Session(config, SingleProcess(), with_test_data=False)
    with closing(session), closing(session.loader.endless()) as batches:
        steps_per_epoch = session.loader.steps_per_epoch
        budget = round(config.epochs * steps_per_epoch)
        starts = moments(budget)
        schedule = build_schedule(config.schedule, config.optimizer.lr, budget, steps_per_epoch)
        optimizer = build_optimizer(config, session.model, session.length, session.communicator)
        step = TrainingStep(session, optimizer, schedule)
        probe = first_images(session.train_data, session.preprocessing, IMAGES, session.device)
        norms: list[float] = []
        for number in range(budget):
            if number >= starts[0]:
                norms.append(full_gradient_norm(session.model, probe))
                if not math.isfinite(norms[-1]):
                    raise ValueError(f"the gradient is {norms[-1]} after {number} steps: lower the learning rate")
                if len(norms) == max(PERIODS):
                    epoch = starts.pop(0) / steps_per_epoch
                    say(f"epoch {epoch:6.2f}  ‖∇f‖ {norms[0]:.4f}")
                    yield epoch, norms
                    norms = []
                    if not starts:
                        return
            step.compute(next(batches))
            try:
                step.update()
            except NonFiniteError as error:
                raise ValueError(f"{error} Lower the learning rate") from error


def run(config: TrainConfig, say: Callable[[str], None]) -> ExperimentReport:
    """Runs the experiment, which takes minutes; see `train`."""
    windows = list(train(config, say))
    rows = [
        (epoch, norms[0], [coefficient_of_variation(norms[:period]) for period in PERIODS]) for epoch, norms in windows
    ]
    later = [max(variations) for _, _, variations in rows[1:]]
    claims = [
        (
            f"after the start, the coefficient of variation is below {WELL_BELOW_1:g} for every H (the paper: “well below 1”)",
            all(one < WELL_BELOW_1 for one in later),
        ),
    ]
    table = [[f"{epoch:.2f}", f"{norm:.4f}", *(f"{one:.3f}" for one in variations)] for epoch, norm, variations in rows]
    record = {"periods": PERIODS, "windows": [{"epoch": epoch, "norms": norms} for epoch, norms in windows]}
    return ExperimentReport(
        "Fig. 7: the norm of the full gradient within H steps",
        f"{config.model.name} on {config.data.path}, SGD with one worker, B = {config.data.batch_size}, {config.epochs:g} "
        "epochs; "
        f"‖∇f‖ of the cross-entropy of the first {IMAGES:,} training images (or all, if there are fewer) without augmentation, "
        "before each of the next steps; its standard deviation over H steps divided by its mean. The paper: ResNet-9, CIFAR-10.",
        claims,
        ("epoch", "‖∇f‖", *(f"H = {period}" for period in PERIODS)),
        table,
        [],
        record,
        lambda: _figure(rows),
    )


def _figure(rows: Sequence[tuple[float, float, list[float]]]) -> Figure:
    from hvdlocal.figures.style import COLORS, new_figure, style

    with style():
        figure, axes = new_figure(1, 1, width=5.5, height=3.2)
        panel = axes[0][0]
        for i, period in enumerate(PERIODS):
            panel.plot(
                [row[0] for row in rows], [row[2][i] for row in rows], "o-", color=COLORS[i], label=f"H = {period}"
            )
        panel.axhline(1, color="#808080", lw=0.8)
        panel.set(xlabel="Epoch", ylabel="Standard deviation of ‖∇f‖ / mean", ylim=(0, None))
        panel.legend()
    return figure
