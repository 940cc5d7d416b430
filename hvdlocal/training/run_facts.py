"""What a run is: the lines at its start, and the columns by which a table of many runs is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hvdlocal.communicator.launched import launched_rank
from hvdlocal.training.config import MethodConfig
from hvdlocal.training.optimizers import build_outer
from hvdlocal.training.rules import describe_method
from hvdlocal.training.session import Session
from hvdlocal.version import __version__

if TYPE_CHECKING:
    from hvdlocal.averaging.outer import OuterRule


@dataclass(frozen=True)
class RunFacts:
    """A run in plain values, as summary.json holds them.

    Attributes:
        task, model: their names.
        parameters: number of trainable parameters.
        data: path of the data set.
        data_kind: what its samples are.
        training_samples, test_samples: their numbers.
        storage: where the bytes lie while training, and why.
        preset: name of the method.
        method: the method with its rule for H, in words.
        rule: name of the rule for H; None for data parallelism.
        period: H, for the rules that take it, or the micro-batches of acc-*; None for other rules.
        accumulate: micro-batches of an optimizer step.
        batch_size: samples of a micro-batch on one rank.
        optimizer, learning_rate, schedule: γ is the learning rate at its peak.
        epochs: the budget in scale-invariant epochs.
        steps_at_gain_1: optimizer steps of the budget at gain 1.
        seed, precision, device, engine: as they are configured and found.
        threads: CPU threads of a rank.
        ranks, hosts: their numbers.
        island_size: n, the ranks that are one worker.
        num_workers: K, the workers that are averaged: islands, or ranks where an island is one rank.
        averages: what becomes of an average, in words; None where every replica becomes it at once, and keeps its moments.
        version: of hvdlocal.
        output: directory of the run.
    """

    task: str
    model: str
    parameters: int
    data: str
    data_kind: str
    training_samples: int
    test_samples: int
    storage: str
    preset: str
    method: str
    rule: str | None
    period: int | None
    accumulate: int
    batch_size: int
    optimizer: str
    learning_rate: float
    schedule: str
    epochs: float
    steps_at_gain_1: int
    seed: int
    precision: str
    device: str
    engine: str
    threads: int
    ranks: int
    hosts: int
    island_size: int
    num_workers: int
    averages: str | None
    version: str
    output: str

    def header(self) -> list[str]:
        """Returns the lines that are printed before training, each with a word and what stands for it."""
        samples = f"{self.training_samples:,} training and {self.test_samples:,} test samples ({self.data_kind})"
        accumulated = f" × {self.accumulate}" if self.accumulate > 1 else ""
        return [
            f"hvdlocal {self.version}: {self.task}",
            f"  model      {self.model}, {self.parameters:,} parameters",
            f"  data       {self.data}: {samples}",
            f"  storage    {self.storage}",
            f"  method     {self.method}; {self.optimizer}, γ = {self.learning_rate:g}, {self.schedule}",
            *([f"  averages   {self.averages}"] if self.averages else []),
            f"  ranks      {self._placement()}",
            f"  computing  {self.device}, {self.precision}, {_counted(self.threads, 'CPU thread')} per rank",
            f"  length     {_counted(self.epochs, 'epoch')}, {_counted(self.steps_at_gain_1, 'step')} at gain 1; batches of "
            f"{self.batch_size:,}{accumulated} per rank",
            f"  output     {self.output}",
        ]

    def record(self) -> dict[str, Any]:
        """Returns the values by name."""
        return asdict(self)

    def _placement(self) -> str:
        if self.ranks > 1:
            islands = ""
            if self.island_size > 1:
                what = f"K = {self.num_workers:,}" if self.num_workers > 1 else "nothing is averaged between workers"
                islands = f": {_counted(self.num_workers, 'island')} of {self.island_size}, so {what}"
            return f"{self.ranks:,} on {_counted(self.hosts, 'host')}, {self.engine}{islands}"
        how = "" if launched_rank() is not None else "; `mpirun -np N hvdlocal train …` starts more"
        return f"1, so nothing is averaged between ranks{how}"


def run_facts(session: Session, environment: Mapping[str, Any], output: str) -> RunFacts:
    """Collects the facts of a run that is about to start.

    Args:
        session: everything that was built.
        environment: the contents of environment.json.
        output: directory of the run.
    """
    config, method = session.config, session.config.method
    accumulate = method.period.period if method.accumulates else method.accumulate
    takes_period = method.accumulates or (
        method.is_local and method.period.rule in ("constant", "post-local", "adacomm")
    )
    num_workers = environment["ranks"] // environment["island_size"]
    assert session.test_data is not None
    return RunFacts(
        task=config.task,
        model=config.model.name,
        parameters=session.parameters,
        data=config.data.path,
        data_kind=session.train_data.kind,
        training_samples=len(session.train_data),
        test_samples=len(session.test_data),
        storage=session.train_data.describe(),
        preset=method.preset,
        method=describe_method(method),
        rule=method.period.rule if method.is_local else None,
        period=method.period.period if takes_period else None,
        accumulate=accumulate,
        batch_size=config.data.batch_size,
        optimizer=config.optimizer.name,
        learning_rate=config.optimizer.lr,
        schedule=config.schedule.name,
        epochs=config.epochs,
        steps_at_gain_1=round(session.length.budget),
        seed=config.seed,
        precision=config.precision,
        device=environment["device"],
        engine=environment["backend"],
        threads=environment["threads"],
        ranks=environment["ranks"],
        hosts=len(set(environment["hosts"])),
        island_size=environment["island_size"],
        num_workers=num_workers,
        averages=describe_averages(method, build_outer(method, num_workers)) if method.is_local else None,
        version=__version__,
        output=output,
    )


def describe_averages(method: MethodConfig, outer: OuterRule | None) -> str | None:
    """Returns what becomes of an average in words; None where every replica becomes it at once, and keeps its moments.

    Args:
        method: of a local preset.
        outer: its outer optimizer.
    """
    words = []
    if outer is not None:
        divided = ", normalised by the round's rates" if outer.normalize else ""
        plain = ", which is plain averaging" if (outer.lr, outer.momentum) == (1, 0) else ""
        words.append(
            f"the outer optimizer {outer.name} (lr {outer.lr:g}, momentum {outer.momentum:g}{divided}) steps on each{plain}"
        )
    if method.overlap:
        how = "carried over" if method.mixing is None else f"mixed in with α = {method.mixing:g}"
        words.append(f"applied {_counted(method.overlap, 'step')} later, steps {how}")
    if method.momentum in ("average", "reset"):
        words.append({"average": "moments averaged", "reset": "moments set to 0"}[method.momentum])
    if method.moment_periods:
        periods = [f"{name} {_every(period)}" for name, period in method.moment_periods.items()]
        words.append(f"moments: {', '.join(periods)}")
    return "; ".join(words) or None


def _every(period: int) -> str:
    return "in every round" if period == 1 else f"in 1 of {period} rounds"


def _counted(number: float, noun: str) -> str:
    """Returns a number with its noun: 1 step, 1,128 steps, 0.5 epochs."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:,.10g}"
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"
