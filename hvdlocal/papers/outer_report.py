"""The report on outer optimizers, overlap and moment periods: bits per byte of every method, and the published signs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdlocal.papers.outer_study import (
    BETAS,
    BY_NAME,
    GAMMAS,
    SHAKESPEARE,
    SWEEP,
    TITLE,
    WORKERS,
    Found,
    TunedMethod,
    Value,
    planned,
    swept,
    swept_rate,
    tune,
)
from hvdlocal.papers.report_files import write_report
from hvdlocal.papers.rule_report import CONFIDENCE, resolved

if TYPE_CHECKING:
    from hvdlocal.figures.style import Figure

REFERENCES = {1: "one", 2: "sync-2", WORKERS: "sync"}
"""The method of each K with which the others are compared: data parallelism."""


@dataclass(frozen=True)
class Sign:
    """A published difference between two methods.

    Attributes:
        text: the statement, as a sentence.
        method, other: names of the methods.
        sign: 1 if the first is published to have the larger loss, -1 the smaller, 0 the same.
        published: what was published, in nats per token.
    """

    text: str
    method: str
    other: str
    sign: int
    published: str


SIGNS = (
    Sign("(a) DiLoCo loses to data parallelism, K = 2", "diloco-16-2", "sync-2", 1, "+0.03 (35M, H = 30)"),
    Sign("(a) DiLoCo loses to data parallelism, K = 4", "diloco-16", "sync", 1, "+0.09 (35M, H = 30)"),
    Sign("(b) DiLoCo loses as K grows from 2 to 4", "diloco-16", "diloco-16-2", 1, "+0.07 (35M, H = 30)"),
    Sign("(b) DiLoCo loses as H grows", "diloco-64", "diloco-16", 1, "+0.04 (35M, H = 30 to 100)"),
    Sign("(c) one worker gains from an outer optimizer", "one-outer", "one", -1, "gains, or loses nothing"),
    Sign("(d) τ = 1 costs nothing", "overlap-1", "local-16", 0, "0.00 (500M)"),
    Sign("(d) τ = 5 costs nothing", "overlap-5", "local-16", 0, "0.00 (500M)"),
    Sign("(d) DiLoCo with τ = H, steps carried, loses little", "diloco-overlap-16", "diloco-16", 1, "+0.02 (500M)"),
)
"""Douillard et al. 2025 (Streaming DiLoCo), Tables 5 and 6 and their study of τ; one worker: Charles et al. 2025; τ = H: Kale et
al. 2025 (eager updates)."""


@dataclass(frozen=True)
class Difference:
    """The difference between two methods in bits per byte, seed by seed.

    Attributes:
        seeds: that both have.
        mean: over them.
        error: standard error of the mean; None for one seed.
        resolved: the sign that Student's t resolves, 0 for none, None for one seed.
    """

    seeds: int
    mean: float
    error: float | None
    resolved: int | None


class OuterReport:
    """The results of the study so far.

    Args:
        methods: that are compared.
        seeds: of which the first tunes the learning rate.
        found: the outcomes of the runs.
        epochs: passes over the text of every run.
    """

    def __init__(self, methods: Sequence[TunedMethod], seeds: Sequence[int], found: Found, epochs: float) -> None:
        self.methods, self.seeds, self.found, self.epochs = methods, seeds, found, epochs
        points = planned(methods, seeds, found)
        self.done, self.expected = sum(found(point) is not None for point in points), len(points)
        self.tunings = {method.name: tune(method, seeds[0], found) for method in methods}

    def values(self, name: str) -> dict[int, Value]:
        """Returns the outcomes of a method at its best learning rate, by seed; none while that is not known."""
        best = self.tunings[name].best if name in self.tunings else None
        if best is None:
            return {}
        points = {seed: BY_NAME[name].run(best, seed) for seed in self.seeds}
        return {seed: value for seed, point in points.items() if (value := self.found(point)) is not None}

    def difference(self, name: str, other: str) -> Difference | None:
        """Compares two methods; None without a seed that both have, and where one diverged."""
        ours, theirs = self.values(name), self.values(other)
        found = [ours[seed].bits_per_byte - theirs[seed].bits_per_byte for seed in ours if seed in theirs]
        if not found or not all(map(math.isfinite, found)):
            return None
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
        return Difference(len(found), statistics.fmean(found), error, resolved(found))

    def verdicts(self) -> Iterator[tuple[Sign, Difference | None, str]]:
        """Yields the published signs, each with the difference here and whether it is the same."""
        for sign in SIGNS:
            here = self.difference(sign.method, sign.other)
            if here is None or here.resolved is None:
                yield sign, here, "not known"
            elif here.resolved == sign.sign:
                yield sign, here, "yes" if sign.sign else "yes (not resolved)"
            else:
                yield sign, here, "**no**" if here.resolved else "not resolved"

    # -- as text -----------------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        """Returns the report as text."""
        first = self.seeds[0]
        lines = [
            f"# {TITLE}",
            "",
            f"{SHAKESPEARE.title}, {self.epochs:g} passes over the text for every method. {self.done} of {self.expected} runs "
            "are done. Bits per byte of the test text, for the final average; ± is the standard deviation over the seeds "
            f"{', '.join(map(str, self.seeds))}. Each method runs at its best learning rate, tuned with seed {first} until the "
            "best is not at an edge. Moments are local and averages are waited for where nothing else is named; Nesterov and "
            "DiLoCo have γ = 0.7 and, where nothing else is named, β = 0.9, SlowMo β = 0.2; QSR starts with H = 16 and has 64 "
            "at a quarter of the peak rate. "
            "Communication: bytes, as a share of data parallelism's.",
            "",
            *self._value_lines(),
            "",
            "A difference is taken seed by seed; ± is its standard error. It is resolved if Student's t, two-sided with "
            f"{CONFIDENCE:.0%}, resolves it, as one in {round(1 / (1 - CONFIDENCE))} is by chance alone. Published differences "
            "are in nats per token.",
            "",
            *self._sign_lines(),
            "",
            "## The learning rates",
            "",
            f"Bits per byte with seed {first}; the best in bold.",
            "",
            *self._tuning_lines(),
            "",
            *self._sweep_lines(),
        ]
        return "\n".join(lines).rstrip() + "\n"

    def _value_lines(self) -> Iterator[str]:
        yield "| K | method | learning rate | bits per byte | against data parallelism | communication |"
        yield "|---|---|---|---|---|---|"
        for method in self.methods:
            values = self.values(method.name)
            if not values:
                continue
            reference = REFERENCES[method.workers]
            against = self.difference(method.name, reference) if method.name != reference else None
            share = next((value.communication for value in values.values()), None)
            yield (
                f"| {method.workers} | {method.title} | {self.tunings[method.name].best:g} | {_with_spread(values.values())} | "
                f"{_difference(against)} | {'' if share is None or method.workers == 1 else f'{share:.1%}'} |"
            )

    def _sign_lines(self) -> Iterator[str]:
        yield "| published | there | here, bits per byte | nats | seeds | the same |"
        yield "|---|---|---|---|---|---|"
        for sign, here, verdict in self.verdicts():
            nats = "" if here is None else f"{here.mean * math.log(2):+.3f}"
            seeds = "" if here is None else here.seeds
            yield f"| {sign.text} | {sign.published} | {_difference(here)} | {nats} | {seeds} | {verdict} |"

    def _tuning_lines(self) -> Iterator[str]:
        rates = sorted({rate for tuning in self.tunings.values() for rate in tuning.rates})
        yield f"| K | method | {' | '.join(f'{rate:g}' for rate in rates)} |"
        yield "|---" * (len(rates) + 2) + "|"
        for method in self.methods:
            tuning = self.tunings[method.name]
            cells = []
            for rate in rates:
                value = self.found(method.run(rate, self.seeds[0])) if rate in tuning.rates else None
                text = "" if value is None else _number(value)
                cells.append(f"**{text}**" if rate == tuning.best else text)
            yield f"| {method.workers} | {method.title} | {' | '.join(cells)} |"

    def _sweep_lines(self) -> Iterator[str]:
        rows = list(self.sweep())
        if not rows:
            return
        yield "## The outer learning rate and momentum"
        yield ""
        yield (
            f"Bits per byte with seed {self.seeds[0]}; Nesterov, not normalised. γ = 1 with β = 0 is plain averaging. The "
            f"learning rate is the best one, for four workers and the same H, of DiLoCo for β = {max(BETAS):g} and of plain "
            "averaging for the smaller β. The best of a row in bold."
        )
        yield ""
        columns = [f"γ = {gamma:g}, β = {beta:g}" for gamma in GAMMAS for beta in BETAS]
        yield f"| K | H | {' | '.join(columns)} |"
        yield "|---" * (len(columns) + 2) + "|"
        for workers, period, values in rows:
            best = min(value.bits_per_byte for value in values if value is not None)
            cells = [
                "" if v is None else f"**{_number(v)}**" if v.bits_per_byte == best else _number(v) for v in values
            ]
            yield f"| {workers} | {period} | {' | '.join(cells)} |"

    def sweep(self) -> Iterator[tuple[int, int, list[Value | None]]]:
        """Yields K, H and the outcomes over γ and, within, β; only where there are some."""
        for workers, period in SWEEP:
            rates = {beta: swept_rate(period, beta, self.seeds[0], self.found) for beta in BETAS}
            values = [
                None
                if (rate := rates[beta]) is None
                else self.found(swept(workers, period, gamma, beta).run(rate, self.seeds[0]))
                for gamma in GAMMAS
                for beta in BETAS
            ]
            if any(value is not None for value in values):
                yield workers, period, values

    def record(self) -> dict[str, Any]:
        """Returns the report for programs; a run that diverged has no bits per byte."""
        return {
            "study": "outer",
            "title": TITLE,
            "setting": asdict(SHAKESPEARE),
            "epochs": self.epochs,
            "runs_done": self.done,
            "runs_expected": self.expected,
            "rows": [
                {
                    "method": method.name,
                    "title": method.title,
                    "workers": method.workers,
                    "learning_rate": self.tunings[method.name].best,
                    "runs": [{"seed": seed, **_plain(value)} for seed, value in self.values(method.name).items()],
                    "tuning": {
                        f"{rate:g}": _plain(value)["bits_per_byte"]
                        for rate in self.tunings[method.name].rates
                        if (value := self.found(method.run(rate, self.seeds[0]))) is not None
                    },
                }
                for method in self.methods
            ],
            "signs": [
                asdict(sign) | {"here": None if here is None else asdict(here), "verdict": verdict.replace("**", "")}
                for sign, here, verdict in self.verdicts()
            ],
            "sweep": [
                {
                    "workers": workers,
                    "period": period,
                    "gammas": GAMMAS,
                    "betas": BETAS,
                    "bits_per_byte": [None if value is None else _plain(value)["bits_per_byte"] for value in values],
                }
                for workers, period, values in self.sweep()
            ],
        }

    def write(self, stem: Path) -> list[Path]:
        """Writes `stem`.md, .json and, with Matplotlib, .svg; returns their names."""
        known = any(_finite(self.values(method.name).values()) for method in self.methods)
        return write_report(stem, self.markdown(), self.record(), partial(_draw, self) if known else None)


def _finite(values: Iterable[Value]) -> list[float]:
    """Returns the bits per byte of the runs that did not diverge."""
    return [value.bits_per_byte for value in values if math.isfinite(value.bits_per_byte)]


def _plain(value: Value) -> dict[str, float | None]:
    found = asdict(value)
    return found if math.isfinite(value.bits_per_byte) else found | {"bits_per_byte": None}


def _number(value: Value) -> str:
    return f"{value.bits_per_byte:.3f}" if math.isfinite(value.bits_per_byte) else "diverged"


def _with_spread(values: Collection[Value]) -> str:
    """Formats the mean and, for several seeds, the standard deviation of the runs that did not diverge."""
    finite = _finite(values)
    diverged = len(values) - len(finite)
    words = f" ({diverged} diverged)" if diverged else ""
    if not finite:
        return words.strip()
    spread = f" ± {statistics.stdev(finite):.3f}" if len(finite) > 1 else ""
    return f"{statistics.fmean(finite):.3f}{spread}{words}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:+.3f}" + ("" if found.error is None else f" ± {found.error:.3f}")


def _draw(report: OuterReport) -> Figure:
    """Draws the bits per byte of every method, with a point for each seed."""
    from hvdlocal.figures.style import COLORS, new_figure, style

    known = [method for method in report.methods if _finite(report.values(method.name).values())]
    with style():
        figure, axes = new_figure(1, 1, width=7.5, height=0.6 + 0.24 * len(known))
        panel = axes[0][0]
        for row, method in enumerate(known):
            values = _finite(report.values(method.name).values())
            color = COLORS[list(REFERENCES).index(method.workers)]
            panel.plot(values, [row] * len(values), ".", color=color, alpha=0.6)
            panel.plot(statistics.fmean(values), row, "o", color=color, ms=6)
        panel.set_yticks(range(len(known)), [f"K = {method.workers}: {method.title}" for method in known])
        panel.invert_yaxis()
        panel.set_xlabel("Bits per byte of the test text")
    return figure
