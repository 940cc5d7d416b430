"""Batches of tokens from hvdlocal's Loader, against slicing a numpy memory map of the same stream at random, as nanoGPT does.

python benchmarks/data_tokens.py       (a stream of 20 million random tokens that it makes; --data: any text, as its bytes)
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import Candidate, compare

from hvdlocal.data import Loader, ShardedDataset, TokenWriter

TOKENS = 20_000_000
SIZES = ((12, 64), (32, 256), (64, 1024))
"""Sequences and tokens of a batch: nanoGPT's run on a CPU, a small one on a GPU, and GPT-2's."""


def loader(directory: str, storage: str, batch: int, block: int) -> Iterator[int]:
    for inputs, _ in Loader(ShardedDataset(directory, storage=storage, block=block), batch, threads=1).endless():
        yield inputs.numel()


def take(directory: str, storage: str, batch: int, block: int) -> Iterator[int]:
    dataset = ShardedDataset(directory, storage=storage, block=block)
    generator = np.random.default_rng(0)
    while True:
        windows = dataset.take(generator.integers(len(dataset), size=batch)).astype(np.int64)
        yield torch.from_numpy(windows[:, :-1]).numel()


def slices(path: str, dtype: str, batch: int, block: int) -> Iterator[int]:
    data = np.memmap(path, dtype, "r")
    while True:
        starts = torch.randint(len(data) - block, (batch,)).tolist()
        inputs = torch.stack([torch.from_numpy(data[i : i + block].astype(np.int64)) for i in starts])
        torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block].astype(np.int64)) for i in starts])
        yield inputs.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a text file; its bytes are the tokens")
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/data_tokens.json"))
    arguments = parser.parse_args()
    if arguments.data is None:
        tokens = np.random.default_rng(0).integers(50_257, size=TOKENS).astype(np.uint16)
    else:
        tokens = np.fromfile(arguments.data, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path, shards = f"{folder}/train.bin", f"{folder}/shards"
        tokens.tofile(path)
        TokenWriter(shards, "train").write(tokens, np.ones(int(tokens.max()) + 1, int), block=64)
        for batch, block in SIZES:
            compare(
                f"Tokens of {tokens.dtype}, batches of {batch} sequences of {block}",
                [
                    Candidate("hvdlocal Loader, ram", loader, (shards, "ram", batch, block)),
                    Candidate("hvdlocal Loader, mmap", loader, (shards, "mmap", batch, block)),
                    Candidate("slices of a numpy memory map", slices, (path, tokens.dtype.name, batch, block)),
                ],
                trials=arguments.trials,
                seconds=0.5,
                json_path=arguments.json.with_stem(f"{arguments.json.stem}_{batch}x{block}"),
            )


if __name__ == "__main__":
    main()
