"""The bytes that a rank contributes to one collective, from the buffers of training, on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from hvdlocal.averaging.buffers import Buffers, averaged_buffers, choose_policies
from hvdlocal.averaging.flat_buffer import FlatBuffer, FlatViews
from hvdlocal.averaging.moments import averaged_moments
from hvdlocal.averaging.sketch import default_size
from hvdlocal.averaging.synchronous import NUM_SCALARS
from hvdlocal.import_path import is_import_path
from hvdlocal.models import check_images
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.optimizers import build_inner
from hvdlocal.training.rules import build_scaling
from hvdlocal.training.tasks import DataDescription, ImageClassification, build_task


@dataclass(frozen=True)
class Payload:
    """Bytes of one rank.

    Attributes:
        parameters: number of trainable parameters of the model.
        gradient: bytes of one averaging of the gradient, as in data parallelism.
        round: bytes of all collectives of one round; for the synchronous presets, of one step.
    """

    parameters: int
    gradient: int
    round: int


def measure_payload(config: TrainConfig, data: DataDescription) -> Payload:
    """Returns the payload of a configured run of more than one rank.

    Args:
        config: task, model, optimizer and method.
        data: the training data, or a description of them.

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
    is_local = config.method.is_local
    elements = _local(config, model, parameters, numel) if is_local else FlatViews(parameters).numel + NUM_SCALARS
    return Payload(numel, 4 * numel, 4 * elements)


def _local(config: TrainConfig, model: torch.nn.Module, parameters: list[torch.nn.Parameter], numel: int) -> int:
    method, scaling = config.method, build_scaling(config.method)
    moments = averaged_moments(build_inner(config.optimizer, model)) if method.momentum == "average" else ()
    buffers = list(averaged_buffers(model, choose_policies(model, cast(Buffers, method.buffers))).values())
    vector = 0
    if scaling.uses_statistics:
        sketch = min(method.sketch_size or default_size(numel), numel)
        vector = sketch if method.statistics == "sketch" else numel
    # The statistics travel with the average or, when they are not stale, before it.
    layouts = FlatViews(parameters), FlatViews(buffers)
    return FlatBuffer(*layouts, len(moments), vector, torch.device("meta")).flat.numel()
