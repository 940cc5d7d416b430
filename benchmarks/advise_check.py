"""Compares the time of a round that `hvdlocal advise` predicts with the time in training, on the same ranks and link.

benchmarks/slow_link.sh 1gbit python benchmarks/advise_check.py experiments/cifar10_small.yaml [--section.key value …]

There are several passes, since load and network vary: each makes the measurements of `advise`, and then some rounds of training
with every method and period, each with its own replica. Predictions use the measurements of all passes together. Neither side
includes evaluations, checkpoints and the log.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HOROVOD_CYCLE_TIME", "1")

from harness import machine

import hvdlocal
from hvdlocal.advise.advice import Advice, advise
from hvdlocal.advise.benchmark import Benchmark, StepTimer
from hvdlocal.advise.measure import measure
from hvdlocal.advise.measurements import Measurements
from hvdlocal.advise.text import advice_text, as_dict
from hvdlocal.cli.configuration import parse
from hvdlocal.training import TrainConfig
from hvdlocal.training.config import Preset

RUNS: list[tuple[Preset, int]] = [
    ("sync", 1),
    ("acc-ada", 4),
    ("local-lin", 4),
    ("local-ada", 1),
    ("local-ada", 4),
    ("local-ada", 16),
]


class Training:
    """All methods and periods, each with its own replica; building it and running a trial are collectives."""

    def __init__(self, config: TrainConfig, communicator: hvdlocal.Communicator) -> None:
        self._communicator = communicator
        bench = Benchmark(config, communicator)
        self._runs = {run: StepTimer(bench, *run) for run in RUNS}
        for training in self._runs.values():
            training.round()

    def trial(self, advice: Advice, seconds: float) -> dict[tuple[str, int], float]:
        """Trains with each method and period for about this time; returns the seconds of a round on the slowest rank."""
        taken = {}
        for run, training in self._runs.items():
            rounds = max(1, round(seconds / advice.table[run].round))
            self._communicator.barrier("bench.start")
            start = time.perf_counter()
            for _ in range(rounds):
                training.round()
            taken[run] = (time.perf_counter() - start) / rounds
        everyone = self._communicator.gather(taken, "bench.taken")
        return {run: max(one[run] for one in everyone) for run in RUNS}


def load() -> float:
    return os.getloadavg()[0]


def advice_from(measurements: list[Measurements], config: TrainConfig) -> Advice:
    """Returns the advice from several measurements, as if they were one."""
    blocks = tuple(block for one in measurements for block in one.blocks)
    together = replace(measurements[0], blocks=blocks, seconds=sum(one.seconds for one in measurements))
    return advise(together, config.method.c, config.method.statistics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=15, help="for the measurements of a pass (default: %(default)s)"
    )
    parser.add_argument(
        "--run-seconds",
        type=float,
        default=3,
        help="of training with each method and period in a pass (default: %(default)s)",
    )
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments, rest = parser.parse_known_args()
    config = parse(rest)
    communicator = hvdlocal.init()
    first = communicator.rank == 0
    training = Training(config, communicator)
    measurements, trials, loads = [], [], [load()]
    for _ in range(arguments.passes):
        measurements.append(measure(config, communicator, arguments.seconds))
        trials.append(training.trial(advice_from(measurements[-1:], config), arguments.run_seconds))
        loads.append(load())
    if not first:
        return
    advice = advice_from(measurements, config)
    print(advice_text(advice))
    print(f"\n{'':12}{'H':>4}{'m':>8}{'predicted ms':>14}{'trained ms':>12}{'predicted/trained':>19}   of each pass")
    ratios = {}
    for run in RUNS:
        method, period = run
        predicted, taken = advice.table[run].round, statistics.fmean(trial[run] for trial in trials)
        every = [
            advice_from([measured], config).table[run].round / trial[run]
            for measured, trial in zip(measurements, trials, strict=True)
        ]
        ratios[f"{method} {period}"] = {"ratio": predicted / taken, "passes": every}
        print(
            f"{method:12}{period:4}{advice.m[method]:8.2f}{1000 * predicted:14.1f}{1000 * taken:12.1f}"
            f"{predicted / taken:19.2f}   {', '.join(f'{ratio:.2f}' for ratio in every)}"
        )
    print("load before, between and after the passes: " + ", ".join(f"{one:.1f}" for one in loads))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": machine(), "loads": loads, "ratios": ratios, "advice": as_dict(advice)}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
