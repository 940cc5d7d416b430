"""Gathering random batches of CIFAR-10 from hvdlocal's shards, against a bare memory map and the usual h5py Dataset.

python benchmarks/data_gather.py --data cifar-10-batches-bin      (the unpacked archive, binary or Python version)
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from harness import Candidate, compare

from data_prep.__main__ import main as data_prep
from hvdlocal.data import Loader, ShardedDataset

BATCH = 256


def batches(num_samples: int) -> Iterator[np.ndarray]:
    """Yields index arrays (BATCH,) from consecutive random permutations."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(num_samples)
        yield from (order[i : i + BATCH] for i in range(0, num_samples - BATCH + 1, BATCH))


def hvdlocal_take(directory: str, storage: str) -> Iterator[int]:
    dataset = ShardedDataset(directory, storage=storage)
    out = np.empty((BATCH, *dataset.shape), np.uint8)
    for indices in batches(len(dataset)):
        yield len(dataset.take(indices, out))


def hvdlocal_stream(directory: str) -> Iterator[int]:
    for _, labels in Loader(ShardedDataset(directory, storage="stream"), BATCH, order="block").endless():
        yield len(labels)


def numpy_take(directory: str) -> Iterator[int]:
    (path,) = (Path(directory) / "train").glob("*.h5")
    with h5py.File(path, "r") as file:
        offset, shape = file["images"].id.get_offset(), file["images"].shape
    images = np.memmap(path, np.uint8, "r", offset, shape)
    out = np.empty((BATCH, *shape[1:]), np.uint8)
    for indices in batches(len(images)):
        yield len(np.take(images, indices, axis=0, out=out, mode="clip"))


def h5py_items(directory: str) -> Iterator[int]:
    (path,) = (Path(directory) / "train").glob("*.h5")
    images = h5py.File(path, "r")["images"]
    for indices in batches(len(images)):
        yield len(np.stack([images[i] for i in indices]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="directory with data_batch_1.bin (or data_batch_1) …")
    parser.add_argument("--trials", type=int, default=11)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/data_gather.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one, eight = f"{folder}/one", f"{folder}/eight"
        for output, shards in ((one, "1"), (eight, "8")):
            if data_prep(["cifar10", "--source", arguments.data, "--output", output, "--shards", shards]):
                return
        compare(
            f"Batches of {BATCH} random images of CIFAR-10, one thread",
            [
                Candidate("hvdlocal take, ram", hvdlocal_take, (one, "ram")),
                Candidate("hvdlocal take, mmap", hvdlocal_take, (one, "mmap")),
                Candidate("hvdlocal take, ram, 8 shards", hvdlocal_take, (eight, "ram")),
                Candidate("hvdlocal take, mmap, 8 shards", hvdlocal_take, (eight, "mmap")),
                Candidate("hvdlocal Loader, stream, 8 shards", hvdlocal_stream, (eight,)),
                Candidate("numpy take from a memory map", numpy_take, (one,)),
                Candidate("h5py, item by item", h5py_items, (one,)),
            ],
            trials=arguments.trials,
            seconds=0.3,
            json_path=arguments.json,
        )


if __name__ == "__main__":
    main()
