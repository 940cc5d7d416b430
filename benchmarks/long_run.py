"""Checks that a long run does not grow: memory, file descriptors and threads of every rank over thousands of rounds.

    make data/digits/test/manifest.json
    mpirun -np 2 python benchmarks/long_run.py --rounds 20000

It trains the digits with an averaging every second step, a checkpoint every 500 steps and an evaluation every 50 epochs, and
samples /proc once a second. "Growth" is the difference between the means of the second and of the last fifth of the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import hvdlocal
from hvdlocal.training import Trainer
from hvdlocal.training.config import (
    CheckpointConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    PeriodConfig,
    TrainConfig,
)


class Sample(NamedTuple):
    """The resources of a process at one moment."""

    step: int
    resident_mib: float
    descriptors: int
    threads: int


def sample(trainer: Trainer) -> Sample:
    """Reads /proc/self."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        trainer.state.position.steps,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def main() -> None:
    """Runs the benchmark on every rank; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/digits")
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    communicator = hvdlocal.init()
    place = communicator.gather(tempfile.mkdtemp() if communicator.rank == 0 else "", "long_run.place")[0]
    steps = 2 * options.rounds
    config = TrainConfig(
        data=DataConfig(options.data, batch_size=8),
        model=ModelConfig("digits_cnn"),
        output=f"{place}/run",
        epochs=steps * 8 * communicator.size / 1501,
        optimizer=OptimizerConfig(lr=0.01),
        method=MethodConfig("local", period=PeriodConfig(period=2)),
        evaluate_every_epochs=50,
        checkpoint=CheckpointConfig(every_steps=500),
        device="cpu",
    )
    trainer = Trainer(config, communicator)
    samples: list[Sample] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            samples.append(sample(trainer))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    summary = trainer.run()
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()

    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    mine = {
        name: (statistics.mean(getattr(s, name) for s in early), statistics.mean(getattr(s, name) for s in late))
        for name in ("resident_mib", "descriptors", "threads")
    }
    everyone = communicator.gather(mine, "long_run.result")
    if communicator.rank == 0:
        shutil.rmtree(place)
        print(
            f"{summary.rounds} rounds, {summary.steps} steps in {seconds:.0f} s; samples of the second and last fifth"
        )
        for rank, result in enumerate(everyone):
            shown = ", ".join(f"{name} {before:.1f} → {after:.1f}" for name, (before, after) in result.items())
            print(f"rank {rank}: {shown}; growth {result['resident_mib'][1] - result['resident_mib'][0]:+.2f} MiB")
        if options.json:
            options.json.write_text(json.dumps({"rounds": summary.rounds, "ranks": everyone}, indent=1) + "\n")
    communicator.barrier("long_run.end")


if __name__ == "__main__":
    main()
