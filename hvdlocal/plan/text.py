"""Formats plans as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hvdlocal.figures.units import bytes_text, seconds_text, short_seconds_text
from hvdlocal.plan.forecast import Forecast
from hvdlocal.plan.run_plan import RunPlan
from hvdlocal.plan.sparkline import sparkline

COLUMNS = 72
"""Width of a sketch of H."""


def describe(forecast: Forecast) -> str:
    """Describes one plan, line by line."""
    lines = [f"  {name:14}{line}" for name, line in _facts(forecast)]
    return "\n".join([forecast.label, "", *lines, *_period_sketch(forecast.plan), *_notes([forecast])])


def compare(forecasts: Sequence[Forecast]) -> str:
    """Puts plans side by side, with a sketch of each below."""
    timed = any(forecast.step_seconds for forecast in forecasts)
    counted = any(forecast.payload for forecast in forecasts)
    islands = counted and any(forecast.plan.island_size > 1 for forecast in forecasts)
    head = ["", "rounds", "steps", "epochs of data", "mean gain", "mean H", "longest H"]
    exposed = any(forecast.averaging for forecast in forecasts)
    head += (
        ["= time"] * timed + ["exposed"] * exposed + ["collectives"] + ["bytes per rank", "of data parallel"] * counted
    )
    head += ["in islands"] * islands
    table = [head]
    for forecast in forecasts:
        plan = forecast.plan
        row = [forecast.label, f"{plan.rounds:,}", f"{plan.steps:,}", f"{plan.data_epochs:.1f}"]
        row += [f"{plan.mean_gain:.3g}", f"{plan.mean_period:.1f}", f"{plan.longest.period:,}"]
        row += [_or_dash(forecast.seconds(plan.longest.period), seconds_text)] * timed
        row += [_or_dash(forecast.averaging.exposed if forecast.averaging else None, seconds_text)] * exposed
        row += [_percent(plan.collective_share)]
        row += [_or_dash(forecast.bytes, bytes_text), _or_dash(forecast.byte_share, _percent)] * counted
        row += [_or_dash(forecast.island_bytes, bytes_text)] * islands
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = []
    for label, *cells in table:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([label.ljust(widths[0]), *right]))
    for forecast in forecasts:
        drawn = _period_sketch(forecast.plan, rows=4)
        text += ["", forecast.label, *drawn[1:]] if drawn else []
    return "\n".join([*text, *_notes(forecasts)])


def _facts(forecast: Forecast) -> Iterator[tuple[str, str]]:
    plan, longest = forecast.plan, forecast.plan.longest
    synchronous = plan.rounds == plan.steps
    rounds = "with an averaging after each" if synchronous else f"in {plan.rounds:,} rounds"
    if plan.island_size > 1:
        yield "workers", f"{plan.num_workers:,} island{'s' * (plan.num_workers > 1)} of {plan.island_size} ranks"
    yield "run", f"{plan.steps:,} steps{_timed(forecast, plan.steps)} {rounds}"
    epochs = f"{plan.data_epochs:.1f} of data"
    if round(plan.epochs, 1) != round(plan.data_epochs, 1):
        epochs += f" for {plan.epochs:.1f} scale-invariant ones: mean gain {plan.mean_gain:.3g}"
    yield "epochs", epochs
    if not synchronous:
        if _varies(plan):
            ends = f"{plan.phases[0].period:,} in the first round, {plan.phases[-1].period:,} in the last"
            yield "H", f"{ends}; mean {plan.mean_period:.1f}"
        else:
            yield "H", f"{longest.period:,}"
        length = longest.period * plan.data_epochs_per_step
        since = f", from epoch {longest.epoch:.1f} on" if _varies(plan) else ""
        yield (
            "no averaging",
            f"for up to {longest.period:,} steps{_timed(forecast, longest.period)}: {length:.3g} epochs of data{since}",
        )
    if plan.num_workers > 1:
        yield "collectives", f"{plan.collectives:,}: {_percent(plan.collective_share)} of data parallelism's"
    if forecast.payload and forecast.bytes and forecast.byte_share and forecast.data_parallel_bytes:
        yield (
            "bytes",
            f"{bytes_text(forecast.bytes)} per rank, {bytes_text(forecast.bytes_per_round or 0)} per "
            f"{'step' if synchronous else 'round'}: {_percent(forecast.byte_share)} of data parallelism's "
            f"{bytes_text(forecast.data_parallel_bytes)}",
        )
    if forecast.payload and plan.island_size > 1:
        yield "in islands", f"{bytes_text(forecast.island_bytes or 0)} per rank"
    if forecast.payload and forecast.payload.memory:
        memory = forecast.payload.memory
        parts = [f"flat buffer {bytes_text(memory.buffer)}"]
        parts += [f"overlap {bytes_text(memory.overlap)}"] if memory.overlap else []
        parts += [f"outer optimizer {bytes_text(memory.outer)}"] if memory.outer else []
        yield "memory", f"{', '.join(parts)}: {memory.copies:.1f} times the parameters"
    if forecast.averaging and plan.num_workers > 1:
        time, unit = forecast.averaging, "step" if synchronous else "round"
        hidden = f", and {seconds_text(time.hidden)} goes on behind steps" if time.hidden else ""
        exposed = f"{short_seconds_text(time.exposed / plan.rounds)} is exposed: {seconds_text(time.exposed)} in the run{hidden}"
        yield "averaging", f"{short_seconds_text(time.each)} a {unit}, of which {exposed}"
        if time.free_from is not None and not synchronous:
            yield "", _free(plan, time.free_from)
    if forecast.checkpoints:
        every, lost = forecast.checkpoints.seconds, forecast.checkpoints.lost_share
        steps = f" ({every / forecast.step_seconds:,.0f} steps)" if forecast.step_seconds else ""
        yield (
            "checkpoints",
            f"every {seconds_text(every)}{steps}; they and failures then take {_percent(lost)} of the time",
        )


def _free(plan: RunPlan, overlap: int) -> str:
    """Says with which τ nothing of an averaging is exposed; a last round that is cut short does not count."""
    periods = [phase.period for phase in plan.phases]
    if len(periods) > 1 and plan.phases[-1].rounds == 1:
        periods.pop()
    if overlap > max(periods):
        return f"no τ makes averaging free: it takes {overlap:,} steps, and a round has at most {max(periods):,}"
    rounds = "" if overlap <= min(periods) else f" in rounds of {overlap:,} steps or more"
    return f"averaging is free from τ = {overlap:,} on{rounds} (method.overlap)"


def _varies(plan: RunPlan) -> bool:
    """Returns whether H changes, except in a last round that is cut short."""
    return len(plan.phases) > 2 or plan.phases[-1].period > plan.phases[0].period


def _period_sketch(plan: RunPlan, rows: int = 5) -> list[str]:
    """Draws H over the run; returns no lines if H is constant."""
    if not _varies(plan):
        return []
    width = plan.epochs / COLUMNS
    lines = sparkline([plan.phase_at((column + 0.5) * width).period for column in range(COLUMNS)], rows)
    margin = lines[-1].index("┤") + 1
    axis = f"epoch 0{f'{plan.epochs:.0f}':>{COLUMNS - 7}}"
    return ["", *(f"  {line}" for line in lines), " " * (margin + 2) + axis]


def _notes(forecasts: Sequence[Forecast]) -> list[str]:
    notes = dict.fromkeys(note for forecast in forecasts for note in forecast.notes)
    return ["", *(f"note: {note}" for note in notes)] if notes else []


def _timed(forecast: Forecast, steps: int) -> str:
    seconds = forecast.seconds(steps)
    return "" if seconds is None else f" ({seconds_text(seconds)} of computing)"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)
