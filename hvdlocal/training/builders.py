"""Builds the parts that a configuration describes: model, loader, and the facts that all ranks must share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from hvdlocal.data import Loader, ShardedDataset
from hvdlocal.data.load.order import OrderMode
from hvdlocal.models import build_model, check_images
from hvdlocal.training.config import DataConfig, ModelConfig, TrainConfig
from hvdlocal.training.config_checks import flatten
from hvdlocal.training.environment import versions
from hvdlocal.training.memory import out_of_memory
from hvdlocal.training.preprocessing import Preprocessing

CPU = torch.device("cpu")


def memory_format(config: ModelConfig) -> torch.memory_format:
    """Returns the memory format of the model and its inputs."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def model_from_config(
    config: TrainConfig, num_classes: int, images: Preprocessing, device: torch.device = CPU
) -> nn.Module:
    """Builds the model as it is before training; the same seed gives the same model.

    Args:
        config: model and seed.
        num_classes: length of its output.
        images: how its inputs are preprocessed.
        device: the device of the model.

    Raises:
        ValueError: there is no such model, it cannot take these images, or there is no memory for it.
    """
    torch.manual_seed(config.seed)
    try:
        model = build_model(config.model.name, num_classes, images.shape).to(device)
        return model.to(memory_format=memory_format(config.model))  # type: ignore[call-overload]
    except (RuntimeError, MemoryError) as error:
        if (shortage := out_of_memory(error)) is None:
            raise
        raise ValueError(
            f"model.name={config.model.name} on {images.shape[0]}×{images.shape[1]} pixels: {shortage}"
        ) from error


def check_model(config: TrainConfig, data: ShardedDataset, images: Preprocessing, num_workers: int = 1) -> None:
    """Checks that a model can be trained on these images in batches of the configured size.

    Raises:
        ValueError: there is no such model, or it cannot take these images or batches.
    """
    smallest = smallest_batch(config.data, len(data), num_workers)
    check_images(config.model.name, data.num_classes, images.shape, smallest)


def smallest_batch(config: DataConfig, samples: int, num_workers: int) -> int:
    """Returns the number of images in a rank's smallest batch: with `tail: partial`, the last batch of an epoch is smaller."""
    rest = samples % (config.batch_size * num_workers)
    if config.tail != "partial" or rest < num_workers:  # so few images join the batch before
        return config.batch_size
    return rest // num_workers


def configured_loader(
    config: TrainConfig,
    data: ShardedDataset,
    images: Preprocessing,
    device: torch.device = CPU,
    *,
    rank: int = 0,
    num_workers: int = 1,
    seed: int | None = None,
    order: OrderMode | Literal["auto"] | None = None,
) -> Loader:
    """Builds the loader of the training images; `seed` and `order` are those of the configuration unless given."""
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


def preflight_facts(config: TrainConfig, device: torch.device, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Returns the facts that must be equal on all ranks, with human-readable names.

    Args:
        config: on this rank.
        device: of this rank; only its kind must be equal.
        fingerprints: of the data, by "training" and "test".
    """
    found: dict[str, Any] = {f"config {key}": value for key, value in flatten(config).items()}
    found |= {f"version of {package}": version for package, version in versions().items()}
    found |= {f"{split} data (fingerprint)": print for split, print in fingerprints.items()}
    found["kind of device"] = device.type
    return found
