"""Builds the parts that a configuration describes: model, loader, and the facts that all ranks must share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hvdlocal.communicator import Communicator
from hvdlocal.data import Loader
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.load.order import OrderMode
from hvdlocal.data.read.dataset import StoredSamples
from hvdlocal.import_path import code_digests, is_import_path
from hvdlocal.models import check_images
from hvdlocal.training.config import DataConfig, ModelConfig, TrainConfig, flatten
from hvdlocal.training.environment import versions
from hvdlocal.training.memory import out_of_memory
from hvdlocal.training.preprocessing import Preprocessing
from hvdlocal.training.tasks import DataDescription, ImageClassification, Task
from hvdlocal.training.tasks.base import checked_model

CPU = torch.device("cpu")


def memory_format(config: ModelConfig) -> torch.memory_format:
    """Returns the memory format of the model and its inputs."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def model_from_config(config: TrainConfig, task: Task, data: DataDescription, device: torch.device = CPU) -> nn.Module:
    """Builds the model as it is before training; the same seed gives the same model.

    Args:
        config: model and seed.
        task: builds the model.
        data: the training data.
        device: the device of the model.

    Raises:
        ValueError: there is no such model, it cannot take these data, or there is no memory for it.
    """
    torch.manual_seed(config.seed)
    try:
        model = checked_model(task.build_model(config.model, data), config.model)
        return placed(model, config, device)
    except (RuntimeError, MemoryError) as error:
        if (shortage := out_of_memory(error)) is None:
            raise
        raise ValueError(f"model.name={config.model.name}{_input_size(task, data)}: {shortage}") from error


def placed(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Moves a model to its device and into its memory format."""
    return model.to(device).to(memory_format=memory_format(config.model))  # type: ignore[call-overload]


def check_model(config: TrainConfig, task: Task, data: StoredSamples, num_workers: int = 1) -> None:
    """Checks that one of hvdlocal's models of images can be trained on these data in batches of the configured size.

    Raises:
        ValueError: there is no such model, or it cannot take these images or batches.
    """
    if type(task) is ImageClassification and not is_import_path(config.model.name):
        smallest = smallest_batch(config.data, len(data), num_workers)
        check_images(config.model.name, len(data.classes), task.input_shape(data), smallest, config.model.arguments)


def _input_size(task: Task, data: DataDescription) -> str:
    if not isinstance(task, ImageClassification):
        return ""
    height, width, _ = task.input_shape(data)
    return f" on {height}×{width} pixels"


def import_paths(config: TrainConfig) -> dict[str, str]:
    """Returns the import paths of a configuration by the settings that hold them."""
    named = {
        "task": config.task,
        "model.name": config.model.name,
        "optimizer.name": config.optimizer.name,
        "schedule.name": config.schedule.name,
        "data.transform": config.data.transform or "",
    }
    return {setting: path for setting, path in named.items() if is_import_path(path)}


def code_paths(config: TrainConfig) -> dict[str, str]:
    """Returns the import paths of all code of the user that a run calls, by the settings that hold them: callbacks too."""
    names = [entry["name"] if isinstance(entry, Mapping) else entry for entry in config.callbacks]
    callbacks = {f"callbacks[{i}]": name for i, name in enumerate(names) if is_import_path(name)}
    return import_paths(config) | callbacks


def require_alike(train: StoredSamples, test: StoredSamples, path: str) -> None:
    """Checks that two splits hold the same kind of samples. Raises ValueError if they do not."""
    if (train.kind, train.shape, train.classes) != (test.kind, test.shape, test.classes):
        raise ValueError(f"{path}: the training and the test data differ in kind, shape or classes")
    for name in KINDS[train.kind].shared:
        if not np.array_equal(train.tables[name], test.tables[name]):
            raise ValueError(
                f"{path}: the training and the test data differ in {name}: prepare both with one tokenizer"
            )


def smallest_batch(config: DataConfig, samples: int, num_workers: int) -> int:
    """Returns the number of images in a rank's smallest batch: with `tail: partial`, the last batch of an epoch is smaller."""
    rest = samples % (config.batch_size * num_workers)
    if config.tail != "partial" or rest < num_workers:  # so few images join the batch before
        return config.batch_size
    return rest // num_workers


def configured_loader(
    config: TrainConfig,
    data: StoredSamples,
    images: Preprocessing,
    device: torch.device = CPU,
    *,
    rank: int = 0,
    num_workers: int = 1,
    seed: int | None = None,
    order: OrderMode | Literal["auto"] | None = None,
) -> Loader:
    """Builds the loader of the training samples; `seed` and `order` are those of the configuration unless given."""
    settings = config.data
    return Loader(
        data,
        settings.batch_size,
        rank=rank,
        num_workers=num_workers,
        seed=config.seed if seed is None else seed,
        order=settings.order if order is None else order,
        tail=settings.tail,
        crop=images.crop,
        transform=images.transform,
        mix=images.mix,
        device=device,
        prefetch=settings.prefetch,
        threads=settings.threads,
    )


def shared_digests(communicator: Communicator, paths: Mapping[str, str]) -> dict[str, str]:
    """Returns digests of the user's own modules that all ranks have loaded; a collective.

    A rank may have more, such as what only rank 0 draws with.
    """
    mine = code_digests(paths)
    everyone = communicator.gather(list(mine), "hvdlocal.code")
    return {module: digest for module, digest in mine.items() if all(module in one for one in everyone)}


def preflight_facts(
    config: TrainConfig, device: torch.device, fingerprints: Mapping[str, str], code: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the facts that must be equal on all ranks, with human-readable names.

    Args:
        config: on this rank.
        device: of this rank; only its kind must be equal.
        fingerprints: of the data, by "training" and "test".
        code: digests of the user's own modules.
    """
    found: dict[str, Any] = {f"config {key}": value for key, value in flatten(config).items()}
    found |= {f"version of {package}": version for package, version in versions().items()}
    found |= {f"{split} data (fingerprint)": print for split, print in fingerprints.items()}
    found |= {f"code of {module}": digest for module, digest in code.items()}
    found["kind of device"] = device.type
    return found
