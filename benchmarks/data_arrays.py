"""Random batches of named arrays: hvdlocal's Loader against a bare memory map of the same numbers, and h5py item by item.

python benchmarks/data_arrays.py      (writes some 400 MB to a temporary directory)
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import h5py
import numpy as np
import torch
from harness import Candidate, compare

from hvdlocal.data import ArrayWriter, Loader, ShardedDataset

BATCH, SAMPLES, SHAPE, TARGETS = 256, 16_000, (4, 32, 32), 4


def batches() -> Iterator[np.ndarray]:
    """Yields index arrays (BATCH,) from consecutive random permutations."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(SAMPLES)
        yield from (order[i : i + BATCH] for i in range(0, SAMPLES - BATCH + 1, BATCH))


def hvdlocal_loader(directory: str, storage: str) -> Iterator[int]:
    for _, targets in Loader(ShardedDataset(directory, storage=storage), BATCH, threads=1).endless():
        yield len(targets)


def hvdlocal_take(directory: str, storage: str) -> Iterator[int]:
    dataset = ShardedDataset(directory, storage=storage)
    out = {"fields": np.empty((BATCH, *SHAPE), np.float32), "parameters": np.empty((BATCH, TARGETS), np.float32)}
    for indices in batches():
        yield len(dataset.take(indices, out)["fields"])


def numpy_take(source: str, buffers: int) -> Iterator[int]:
    """Takes batches into so many buffers in turn: a loop that trains on a batch while others are prepared needs several."""
    maps = []
    with h5py.File(source, "r") as file:
        for name in ("fields", "parameters"):
            dataset = file[name]
            maps.append(np.memmap(source, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape))
    turns = cycle([[np.empty((BATCH, *array.shape[1:]), array.dtype) for array in maps] for _ in range(buffers)])
    for indices, out in zip(batches(), turns, strict=False):
        for array, batch in zip(maps, out, strict=True):
            np.take(array, indices, axis=0, out=batch, mode="clip")
        yield BATCH


class H5pyItems(torch.utils.data.Dataset):
    """The usual data set around an HDF5 file, which each process opens for itself."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._file: h5py.File | None = None

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self._file is None:
            self._file = h5py.File(self._source, "r")
        return self._file["fields"][index], self._file["parameters"][index]


def h5py_items(source: str, workers: int) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        H5pyItems(source),
        BATCH,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    while True:
        for _, targets in loader:
            yield len(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/data_arrays.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, one, eight = f"{folder}/source.h5", f"{folder}/one", f"{folder}/eight"
        generator = np.random.default_rng(0)
        with h5py.File(source, "w") as file:
            file["fields"] = generator.standard_normal((SAMPLES, *SHAPE), np.float32)
            file["parameters"] = generator.standard_normal((SAMPLES, TARGETS), np.float32)
            for directory, shards in ((one, 1), (eight, 8)):
                writer = ArrayWriter(directory, "train", inputs=["fields"], targets=["parameters"], num_shards=shards)
                writer.write(file)
        compare(
            f"Batches of {BATCH} random samples: float32 {SHAPE} and ({TARGETS},), one thread",
            [
                Candidate("hvdlocal Loader, ram", hvdlocal_loader, (one, "ram")),
                Candidate("hvdlocal Loader, mmap", hvdlocal_loader, (one, "mmap")),
                Candidate("hvdlocal Loader, mmap, 8 shards", hvdlocal_loader, (eight, "mmap")),
                Candidate("hvdlocal Loader, stream, 8 shards", hvdlocal_loader, (eight, "stream")),
                Candidate("hvdlocal take, mmap", hvdlocal_take, (one, "mmap")),
                Candidate("numpy take from a memory map", numpy_take, (source, 4)),
                Candidate("the same, into one buffer", numpy_take, (source, 1)),
                Candidate("h5py, item by item, DataLoader", h5py_items, (source, 0)),
                Candidate("the same, 2 workers", h5py_items, (source, 2)),
            ],
            trials=arguments.trials,
            seconds=0.5,
            json_path=arguments.json,
        )


if __name__ == "__main__":
    main()
