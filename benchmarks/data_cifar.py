"""CIFAR-10 to normalised float batches with random crop and flip: hvdlocal against torchvision's data set and DataLoader.

python benchmarks/data_cifar.py --data cifar-10-batches-bin      (the unpacked archive, binary or Python version)
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Candidate, compare

from data_prep.__main__ import main as data_prep
from hvdlocal.data import CropFlip, Loader, ShardedDataset
from hvdlocal.models.torchvision_import import import_torchvision

BATCH = 256


def hvdlocal_loader(directory: str, mean: Any, std: Any, threads: int | None) -> Iterator[int]:
    transform = CropFlip(mean, std, padding=4)
    yield from sizes(Loader(ShardedDataset(directory), BATCH, transform=transform, threads=threads).endless())


def torchvision_loader(directory: str, mean: Any, std: Any, workers: int) -> Iterator[int]:
    torchvision = import_torchvision()
    transforms = torchvision.transforms

    class Cifar10(torchvision.datasets.CIFAR10):  # type: ignore[name-defined, misc]
        # Files in the official layout, but not the official ones: no checksums.
        train_list = [(f"data_batch_{i}", None) for i in range(1, 6)]  # noqa: RUF012
        meta = {"filename": "batches.meta", "key": "label_names", "md5": None}  # noqa: RUF012

        def _check_integrity(self) -> bool:
            return True

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    loader = torch.utils.data.DataLoader(
        Cifar10(directory, train=True, transform=transform),
        BATCH,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    while True:
        yield from sizes(loader)


def sizes(batches: Iterable[Any]) -> Iterator[int]:
    for images, labels in batches:
        assert images.dtype == torch.float32
        yield len(labels)


def write_python_version(dataset: ShardedDataset, directory: Path) -> None:
    """Writes the training images in the layout that torchvision expects."""
    folder = directory / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, samples in enumerate(np.arange(len(dataset)).reshape(5, -1), start=1):
        planes = dataset.take(samples).transpose(0, 3, 1, 2).reshape(len(samples), -1)
        content = {"data": planes, "labels": dataset.labels[samples].tolist()}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(dataset.classes)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="directory with data_batch_1.bin (or data_batch_1) …")
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/data_cifar.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards, pickles = f"{folder}/shards", f"{folder}/pickles"
        if data_prep(["cifar10", "--source", arguments.data, "--output", shards]):
            return
        dataset = ShardedDataset(shards)
        write_python_version(dataset, Path(pickles))
        statistics = dataset.mean, dataset.std
        compare(
            f"CIFAR-10, batches of {BATCH}: random crop, flip, normalised to float32",
            [
                Candidate("hvdlocal Loader", hvdlocal_loader, (shards, *statistics, 1)),
                Candidate("hvdlocal Loader, 2 threads", hvdlocal_loader, (shards, *statistics, 2)),
                Candidate("torchvision, DataLoader, 2 workers", torchvision_loader, (pickles, *statistics, 2)),
                Candidate("torchvision, DataLoader, no workers", torchvision_loader, (pickles, *statistics, 0)),
            ],
            trials=arguments.trials,
            seconds=1.5,
            json_path=arguments.json,
        )


if __name__ == "__main__":
    main()
