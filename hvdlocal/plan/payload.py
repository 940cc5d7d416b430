"""The bytes that a rank contributes to collectives, from the buffers of training, on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch

from hvdlocal.averaging import island_gradient
from hvdlocal.averaging.buckets import BUCKET_BYTES, BucketLayout
from hvdlocal.averaging.buffers import Buffers, averaged_buffers, choose_policies
from hvdlocal.averaging.flat_buffer import FlatBuffer, FlatViews
from hvdlocal.averaging.moments import moment_periods
from hvdlocal.averaging.sketch import default_size
from hvdlocal.averaging.synchronous import NUM_SCALARS
from hvdlocal.import_path import is_import_path
from hvdlocal.models import check_images
from hvdlocal.plan.memory import AveragingMemory
from hvdlocal.training.config import MethodConfig, TrainConfig
from hvdlocal.training.optimizers import build_inner, build_outer
from hvdlocal.training.rules import build_scaling
from hvdlocal.training.tasks import DataDescription, ImageClassification, build_task


class LaterMoments(NamedTuple):
    """Bytes by which a round is larger when moments that are not averaged in every round are due.

    Attributes:
        period: of these moments, in rounds.
        round: bytes between the workers.
        island_round: bytes inside an island.
    """

    period: int
    round: int
    island_round: int


@dataclass(frozen=True)
class Payload:
    """Bytes of one rank.

    Attributes:
        parameters: number of trainable parameters of the model.
        gradient: bytes of one averaging of the gradient, as in data parallelism.
        round: bytes of all collectives of one round between the workers, without later moments; for the synchronous presets, of
            one step.
        island_step: bytes inside an island of one step, or of one average inside; 0 without islands.
        island_round: bytes inside an island at the end of a round, without later moments.
        later: moments with a period above 1, one entry for each period.
        memory: of averaging; None for the synchronous presets.
    """

    parameters: int
    gradient: int
    round: int
    island_step: int = 0
    island_round: int = 0
    later: tuple[LaterMoments, ...] = ()
    memory: AveragingMemory | None = None

    def between(self, rounds: int) -> int:
        """Bytes between the workers in the first rounds of a run."""
        return rounds * self.round + sum(rounds // moments.period * moments.round for moments in self.later)

    def at_round_ends(self, rounds: int) -> int:
        """Bytes inside an island at the ends of the first rounds of a run."""
        return rounds * self.island_round + sum(
            rounds // moments.period * moments.island_round for moments in self.later
        )


def measure_payload(config: TrainConfig, data: DataDescription, *, island_size: int = 1, islands: int = 2) -> Payload:
    """Returns the payload of a configured run of more than one rank.

    Args:
        config: task, model, optimizer and method.
        data: the training data, or a description of them.
        island_size: n, ranks of an island; 1 without islands.
        islands: their number.

    Raises:
        ValueError: the model cannot be built for such data.
    """
    task = build_task(config)
    if type(task) is ImageClassification and not is_import_path(config.model.name):
        shape = task.input_shape(data)
        check_images(config.model.name, len(data.classes), shape, config.data.batch_size, config.model.arguments)
    with torch.device("meta"):
        model = task.build_model(config.model, data)
    parameters = [p for p in model.parameters() if p.requires_grad]
    numel = sum(p.numel() for p in parameters)
    method = config.method
    if not method.is_local:
        return Payload(numel, 4 * numel, 4 * BucketLayout(parameters, NUM_SCALARS, BUCKET_BYTES).numel)
    buffer = _flat_buffer(config, model, parameters, numel, island_size)
    # The statistics travel with the average or, when they are not stale, before it.
    before = 0 if buffer.with_statistics else buffer.with_statistics_scalars.numel()
    sent = buffer.sent(1).numel()
    diverge = island_size > 1 and method.island_period > 1

    def across(elements: int) -> int:
        """Bytes of a part of the average: each rank of an island sends a slice."""
        return 4 * (elements // island_size) if islands > 1 else 0

    def inside(elements: int) -> int:
        """Bytes of the same part: the island gathers its slices, after it has averaged what differs between its ranks."""
        return 4 * elements * ((islands > 1) + diverge) if island_size > 1 else 0

    later = tuple(LaterMoments(period, across(more), inside(more)) for period, more in _later_moments(buffer))
    between = across(sent) + 4 * before
    outer = _outer_moments(method, islands)
    memory = AveragingMemory(
        parameters=4 * numel,
        buffer=4 * buffer.flat.numel(),
        overlap=2 * 4 * buffer.flat.numel() if method.overlap else 0,
        outer=0 if outer is None else (1 + outer) * 4 * buffer.layout.numel // island_size,
    )
    if island_size == 1:
        return Payload(numel, 4 * numel, between, later=later, memory=memory)
    phi = 0 if outer is None else 4 * buffer.layout.numel  # of which each rank has a slice, to be gathered
    if diverge:
        return Payload(numel, 4 * numel, between, 4 * buffer.weights.numel(), inside(sent) + phi, later, memory)
    step = BucketLayout(parameters, island_gradient.NUM_SCALARS, BUCKET_BYTES).numel
    at_end = 4 * buffer.own.numel() + inside(sent) + phi
    return Payload(numel, 4 * numel, between, 4 * step, at_end, later, memory)


def _outer_moments(method: MethodConfig, num_workers: int) -> int | None:
    """The moments that the outer optimizer has of φ; None where the mean is taken as it is, without φ."""
    outer = build_outer(method, num_workers)
    if outer is None or (outer.lr, outer.momentum) == (1, 0):
        return None
    return int(outer.momentum > 0)


def _later_moments(buffer: FlatBuffer) -> list[tuple[int, int]]:
    """The periods above 1, ascending, and the number of elements that are sent when they are due beside the shorter ones."""
    ends = {period: buffer.sent(period).numel() for period in buffer.periods}
    return [(period, ends[period] - ends[before]) for before, period in pairwise(ends)]


def _flat_buffer(
    config: TrainConfig, model: torch.nn.Module, parameters: list[torch.nn.Parameter], numel: int, slices: int
) -> FlatBuffer:
    method, scaling = config.method, build_scaling(config.method)
    moments = moment_periods(build_inner(config.optimizer, model), method.momentum).values()
    buffers = list(averaged_buffers(model, choose_policies(model, cast(Buffers, method.buffers))).values())
    vector = 0
    if scaling.uses_statistics:
        sketch = min(method.sketch_size or default_size(numel), numel)
        vector = sketch if method.statistics == "sketch" else numel
    sliced = slices if method.outer_optimizer != "none" else 1
    layouts = FlatViews(parameters, sliced), FlatViews(buffers)
    stale = method.preset != "local-ada-nostale"
    return FlatBuffer(*layouts, list(moments), vector, torch.device("meta"), slices, with_statistics=stale)
