"""Compares the time of a round that `hvdlocal advise` predicts with the time in training, on the same ranks and link.

[RANKS=4] benchmarks/slow_link.sh 1gbit python benchmarks/advise_check.py experiments/cifar10_small.yaml [--section.key value …]

There are several passes, since load and network vary: each makes the measurements of `advise`, and then some rounds of training
with every method and period, each with its own replica. The ratio is the median of those of single passes. Neither side includes
evaluations, checkpoints and the log.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")

from harness import machine

import hvdlocal
from hvdlocal.advise.advice import Advice, advise
from hvdlocal.advise.benchmark import Benchmark, StepTimer
from hvdlocal.advise.candidates import island_sizes
from hvdlocal.advise.cost_model import CostModel, predicted_overlap
from hvdlocal.advise.facts import as_dict
from hvdlocal.advise.measure import measure
from hvdlocal.advise.measurements import Measurements
from hvdlocal.advise.predictions import predict
from hvdlocal.advise.text import advice_text
from hvdlocal.cli.configuration import parse
from hvdlocal.training import TrainConfig
from hvdlocal.training.config import Preset


@dataclass(frozen=True)
class Run:
    """A method that is trained.

    Attributes:
        preset, period: the method, and H.
        overlapped: whether data parallelism sums gradients during the backward pass.
        island: n, the ranks of an island.
        overlap: τ, the steps behind which an average goes on.
    """

    preset: Preset
    period: int
    overlapped: bool = False
    island: int = 1
    overlap: int = 0

    def __str__(self) -> str:
        island = f", islands of {self.island}" if self.island > 1 else ""
        overlap = f", overlap {self.overlap}" if self.overlap else ""
        return f"{self.method}{island}{overlap}"

    @property
    def method(self) -> str:
        """Its name in a prediction."""
        return f"{self.preset} overlapped" if self.overlapped else self.preset

    def predicted(self, cost_model: CostModel) -> float:
        """Returns the predicted seconds of a round."""
        return predict(cost_model, self.method, self.period, self.island, self.overlap).round


def runs(nodes: Sequence[str]) -> list[Run]:
    """Returns what is trained: data parallelism and local steps, each with and without overlap, and the possible islands."""
    local = [Run("local-lin", 4), *(Run("local-ada", period) for period in (1, 4, 16))]
    several = island_sizes(nodes)[1:-1]
    islands = [Run("local-ada", period, island=n) for n in several for period in (4, 16)]
    late = [*(Run("local-lin", 4, overlap=overlap) for overlap in (1, 2, 4)), Run("local-lin", 16, overlap=4)]
    parallel = [run for hidden in (False, True) for run in (Run("sync", 1, hidden), Run("acc-ada", 4, hidden))]
    return [*parallel, *local, *late, *islands]


class Training:
    """All methods and periods, each with its own replica; building it and running a trial are collectives."""

    def __init__(self, config: TrainConfig, communicator: hvdlocal.Communicator) -> None:
        self._communicator = communicator
        bench = Benchmark(config, communicator)
        self.runs = {
            run: StepTimer(
                bench, run.preset, run.period, overlapped=run.overlapped, island=run.island, overlap=run.overlap
            )
            for run in runs(bench.nodes)
        }
        for training in self.runs.values():
            training.round()
            training.optimizer.finish_average()  # before another replica averages

    def trial(self, advice: Advice, seconds: float) -> dict[Run, float]:
        """Trains with each method and period for about this time; returns the seconds of a round on the slowest rank."""
        taken = {}
        for run, training in self.runs.items():
            rounds = max(1, round(seconds / run.predicted(advice.estimate.cost_model)))
            rounds = self._communicator.gather(rounds, "bench.rounds")[0]
            if run.overlap:
                training.round()  # its average is under way when the clock starts, as another is when it stops
            self._communicator.barrier("bench.start")
            start = time.perf_counter()
            for _ in range(rounds):
                training.round()
            taken[run] = (time.perf_counter() - start) / rounds
            training.optimizer.finish_average()
        everyone = self._communicator.gather(taken, "bench.taken")
        return {run: max(one[run] for one in everyone) for run in self.runs}


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
    print(f"\n{'':24}{'H':>4}{'m':>8}{'predicted ms':>14}{'trained ms':>12}{'predicted/trained':>19}   of each pass")
    ratios = {}
    for run in training.runs:
        predicted = run.predicted(advice.estimate.cost_model)
        taken = statistics.median(trial[run] for trial in trials)
        every = [
            run.predicted(advice_from([measured], config).estimate.cost_model) / trial[run]
            for measured, trial in zip(measurements, trials, strict=True)
        ]
        ratio = statistics.median(every)
        ratios[f"{run} {run.period}"] = {"ratio": ratio, "passes": every}
        print(
            f"{run!s:24}{run.period:4}{advice.m[run.method]:8.2f}{1000 * predicted:14.1f}{1000 * taken:12.1f}"
            f"{ratio:19.2f}   {', '.join(f'{one:.2f}' for one in every)}"
        )
    now = advice.estimate.cost_model
    for method in ("sync", "acc-ada"):
        beyond, predicted = now.costs[f"{method} overlapped"].closing, predicted_overlap(now, method)
        print(
            f"overlap of {method}: {1000 * predicted:.1f} ms beyond a backward pass by the model, {1000 * beyond:.1f} measured"
        )
    print("load before, between and after the passes: " + ", ".join(f"{one:.1f}" for one in loads))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": machine(), "loads": loads, "ratios": ratios, "advice": as_dict(advice)}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
