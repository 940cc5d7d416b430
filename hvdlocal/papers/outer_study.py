"""The study of what becomes of the mean and when: outer optimizers, overlap and moment periods on a language model.

Every method is run at its own best learning rate: with the first seed at several rates, until the best is not at an edge of
them, and then with the other seeds at the best one. A table of outer learning rates and momenta follows, with the first seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hvdlocal.papers.studies import GridPoint, Method, Setup

NAME = "outer"
TITLE = "What becomes of the mean, and when: outer optimizers, overlap, moment periods"

SHAKESPEARE = Setup(
    file="shakespeare_small",
    title="a GPT with 0.12 M parameters on the bytes of tiny Shakespeare",
    table="",
    published_epochs=0,
    is_published=False,
    measure="bits_per_byte",
    chance_percent=0.0,
    prepare="python -m data_prep text --source …/tinyshakespeare.txt --block 64",
)

WORKERS = 4
RATES = (2e-3, 4e-3, 8e-3)
"""The learning rates that a method is tried at first."""
NESTEROV_RATES = (1e-3, 2e-3, 4e-3)
"""Those of a method with Nesterov's outer step. At γ = 0.7 and β = 0.9 it moves up to γ / (1 − β) = 7 times as far as the mean of
the workers, so that its best rate is lower; where all three rates are too large, the search would go to still larger ones."""


@dataclass(frozen=True)
class Value:
    """The outcome of a finished run.

    Attributes:
        bits_per_byte: of the final average on the test text; infinite for a run that diverged.
        communication: bytes sent, relative to data parallelism; None where that is not known.
    """

    bits_per_byte: float
    communication: float | None = None


Found = Callable[[GridPoint], Value | None]
"""Gives the outcome of a run; None while it is not finished."""


@dataclass(frozen=True)
class TunedMethod:
    """A method whose learning rate is tuned.

    Attributes:
        name: the name on the command line and in the names of the runs' directories.
        title: the name in tables.
        settings: arguments of `hvdlocal train` beside the learning rate.
        workers: K.
        alpha: α of QSR in units of the learning rate, so that its rounds are the same at every rate; None for other rules.
        rates: the learning rates that are tried first, in ascending order.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    workers: int = WORKERS
    alpha: float | None = None
    rates: tuple[float, ...] = RATES

    def run(self, lr: float, seed: int) -> GridPoint:
        """Returns the run with a learning rate and a seed."""
        alpha = [] if self.alpha is None else [f"--method.period.alpha={self.alpha * lr:g}"]
        settings = (*self.settings, *alpha, f"--optimizer.lr={lr:g}")
        return GridPoint(Method(self.name, settings, f"{self.name}-lr{lr:g}"), self.workers, None, seed)


def _sync(name: str, title: str, workers: int) -> TunedMethod:
    return TunedMethod(name, title, ("--method.preset=sync",), workers)


def _local(
    name: str,
    title: str,
    period: int,
    *settings: str,
    preset: str = "local",
    workers: int = WORKERS,
    rates: tuple[float, ...] = RATES,
) -> TunedMethod:
    words = (f"--method.preset={preset}", f"--method.period.period={period}", *settings)
    return TunedMethod(name, title, words, workers, rates=rates)


def _diloco(name: str, title: str, period: int, *settings: str, workers: int = WORKERS) -> TunedMethod:
    outer = _outer(0.7, 0.9)
    return _local(name, title, period, *outer, *settings, preset="diloco", workers=workers, rates=NESTEROV_RATES)


def _outer(gamma: float, beta: float) -> tuple[str, str]:
    return f"--method.outer.lr={gamma:g}", f"--method.outer.momentum={beta:g}"


def _qsr(name: str, title: str, *settings: str, rates: tuple[float, ...] = RATES) -> TunedMethod:
    """H = 16 until the rate has fallen to half of its peak, 64 at a quarter, 256 at an eighth."""
    rule = ("--method.preset=local", "--method.period.rule=qsr", "--method.period.h_base=16")
    return TunedMethod(name, title, (*rule, *settings), alpha=2.0, rates=rates)


_NESTEROV = ("--method.outer.name=nesterov", *_outer(0.7, 0.9))

METHODS = (
    _sync("sync", "data parallelism", WORKERS),
    _local("local-16", "local steps, H = 16", 16),
    _local("local-64", "local steps, H = 64", 64),
    _diloco("diloco-16", "DiLoCo, H = 16", 16),
    _diloco("diloco-64", "DiLoCo, H = 64", 64),
    _local("nesterov-0.7-0.5-H16", "Nesterov, β = 0.5, H = 16", 16, *_outer(0.7, 0.5), preset="diloco"),
    _local("nesterov-0.7-0.5-H64", "Nesterov, β = 0.5, H = 64", 64, *_outer(0.7, 0.5), preset="diloco"),
    _local("slowmo-16", "SlowMo, H = 16", 16, "--method.outer.lr=1", "--method.outer.momentum=0.2", preset="slowmo"),
    _qsr("qsr", "QSR, H ≥ 16"),
    _qsr("qsr-outer", "QSR, Nesterov", *_NESTEROV, "--method.outer.normalize=false", rates=NESTEROV_RATES),
    _qsr(
        "qsr-outer-normalized",
        "QSR, Nesterov, normalised",
        *_NESTEROV,
        "--method.outer.normalize=true",
        rates=NESTEROV_RATES,
    ),
    _local("overlap-1", "H = 16, τ = 1", 16, "--method.overlap=1"),
    _local("overlap-5", "H = 16, τ = 5", 16, "--method.overlap=5"),
    _local("overlap-16", "H = 16, τ = 16", 16, "--method.overlap=16"),
    _local("mixed-5", "H = 16, τ = 5, mixed α = 0.5", 16, "--method.overlap=5", "--method.mixing=0.5"),
    _diloco("diloco-overlap-16", "DiLoCo, H = 16, τ = 16", 16, "--method.overlap=16"),
    _local("averaged", "H = 16, moments averaged", 16, "--method.momentum=average"),
    _local("des-loc", "H = 16, moments every 3rd and 6th round", 16, "--method.momentum={exp_avg: 3, exp_avg_sq: 6}"),
    _sync("sync-2", "data parallelism", 2),
    _diloco("diloco-16-2", "DiLoCo, H = 16", 16, workers=2),
    _sync("one", "one worker", 1),
    _diloco("one-outer", "one worker, Nesterov every 16 steps", 16, workers=1),
)
"""Everything that is compared. Moments are local and averages are waited for where the title names nothing else."""

BY_NAME = {method.name: method for method in METHODS}


@dataclass(frozen=True)
class Tuning:
    """The learning rates of a method so far.

    Attributes:
        rates: in ascending order, tried or to be tried.
        best: the best of them; None while that is not known.
    """

    rates: list[float]
    best: float | None


def tune(method: TunedMethod, seed: int, found: Found) -> Tuning:
    """Returns the rates that a method needs: at first `RATES`, then beyond the edge at which the best one lies."""
    rates = list(method.rates)
    while True:
        values = [found(method.run(rate, seed)) for rate in rates]
        known = [value.bits_per_byte for value in values if value is not None]
        if len(known) < len(rates):
            return Tuning(rates, None)
        best = rates[known.index(min(known))]
        if rates[0] < best < rates[-1]:
            return Tuning(rates, best)
        rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]


# -- the sweep over outer optimizers -----------------------------------------------------------------------------------

GAMMAS, BETAS = (0.4, 0.7, 1.0), (0.0, 0.5, 0.9)
SWEEP = tuple((workers, period) for workers in (2, WORKERS) for period in (16, 64))
"""K and H of the sweep."""


def swept(workers: int, period: int, gamma: float, beta: float) -> TunedMethod:
    """Returns local steps with Nesterov's momentum: γ = `gamma`, β = `beta`; γ = 1 with β = 0 is plain averaging."""
    for method in METHODS:  # whose runs are shared
        if (method.name, workers, gamma, beta) in (
            (f"local-{period}", WORKERS, 1.0, 0.0),
            (f"diloco-{period}", WORKERS, 0.7, 0.9),
            (f"diloco-{period}-2", 2, 0.7, 0.9),
            (f"nesterov-0.7-0.5-H{period}", WORKERS, 0.7, 0.5),
        ):
            return method
    name = f"nesterov-{gamma:g}-{beta:g}-H{period}"
    return _local(name, f"γ = {gamma:g}, β = {beta:g}", period, *_outer(gamma, beta), preset="diloco", workers=workers)


def swept_rate(period: int, beta: float, seed: int, found: Found) -> float | None:
    """Returns the learning rate of the sweep; None if it is not known yet.

    It is the best one, with four workers and this H, of DiLoCo for its β and of plain averaging for a smaller one.
    """
    method = "diloco" if beta == max(BETAS) else "local"
    return tune(BY_NAME[f"{method}-{period}"], seed, found).best


# -- all runs ----------------------------------------------------------------------------------------------------------


def planned(methods: Sequence[TunedMethod], seeds: Sequence[int], found: Found) -> list[GridPoint]:
    """Returns the runs that are needed as far as that is known, in the order in which they are made.

    Args:
        methods: that are compared; the sweep is made if all are.
        seeds: the learning rate is tuned with the first.
        found: the outcomes so far, from which the further runs follow.
    """
    return list(dict.fromkeys(_planned(methods, seeds, found)))  # the sweep shares some with the methods


def _planned(methods: Sequence[TunedMethod], seeds: Sequence[int], found: Found) -> Iterator[GridPoint]:
    tunings = [tune(method, seeds[0], found) for method in methods]
    for method, tuning in zip(methods, tunings, strict=True):
        for rate in tuning.rates:
            yield method.run(rate, seeds[0])
    for seed in seeds[1:]:
        for method, tuning in zip(methods, tunings, strict=True):
            if tuning.best is not None:
                yield method.run(tuning.best, seed)
    if set(METHODS) <= set(methods):
        for workers, period in SWEEP:
            for beta in BETAS:
                best = swept_rate(period, beta, seeds[0], found)
                if best is not None:
                    for gamma in GAMMAS:
                        yield swept(workers, period, gamma, beta).run(best, seeds[0])
