"""Formats what an overlap of averages with steps gains, and what an outer optimizer costs."""

from __future__ import annotations

from collections.abc import Iterator

from hvdlocal.advise.advice import Advice
from hvdlocal.advise.cost_model import averaging_seconds
from hvdlocal.advise.formats import brief, ms


def overlap_text(advice: Advice) -> Iterator[str]:
    """Describes local steps with overlap for every H, and says whether overlap pays."""
    cost_model, found = advice.estimate.cost_model, advice.overlap
    assert cost_model.overlap is not None
    yield ""
    yield "With method.overlap an average goes on behind the next τ steps: here enough to hide it, with a margin of 20 %, or H"
    yield f"(local-lin). Such steps may be slower: of the hidden time, {100 * cost_model.overlap.gained:.0f} % is gained"
    yield f"     H     τ{'averaging/H':>14}{'with overlap':>14}{'step':>10}{'epoch, s':>18}{'with/without':>18}"
    for one in found.predictions.values():
        without = found.without[one.period]
        average = averaging_seconds(cost_model, one.method) / one.period
        left = average - (without.round - one.round) / one.period
        ratio = f"{one.epoch / without.epoch:.2f} ± {advice.estimate.ratio_error(one, without):.2f}"
        epoch = f"{brief(one.epoch)} ± {brief(advice.error(one))}"
        step = ms(one.round / one.period)
        yield f"{one.period:6}{one.overlap:6}{ms(average):>14}{ms(left):>14}{step:>10}{epoch:>18}{ratio:>18}"
    yield from (f"  {line}" for line in _verdict(advice))
    if (outer := cost_model.outer) is None:
        return
    error = advice.estimate.error(lambda given: given.outer or 0.0)
    share = 100 * outer / found.best_without.round
    added = (
        f"{ms(outer)} ± {1000 * error:.2g} to an average, {share:.1f} % of a round with H = {found.best_without.period}"
    )
    if outer <= error:
        added = f"less to an average than the noise of ± {ms(error)} shows"
    yield (
        "  An outer optimizer (method.outer) changes what is learned, so none is chosen by time; Nesterov's adds "
        f"{added}."
    )


def _verdict(advice: Advice) -> Iterator[str]:
    found, best = advice.overlap, advice.overlap.best
    took = f"H = {best.period} with τ = {best.overlap} takes {found.ratio:.2f} ± {found.error:.2f} of the time of "
    took += f"H = {found.best_without.period} without overlap to equal progress"
    if found.verdict == "undecided":
        yield f"{took}, which decides nothing:"
        yield "leave method.overlap at 0, or measure for longer (--seconds)."
    elif found.verdict == "little":
        yield f"{took}:"
        yield "too little for two more copies of what is averaged. Leave method.overlap at 0."
    else:
        yield f"{took}, and {best.epoch / advice.now.data_parallel.epoch:.2f} of data parallelism's."
        yield f"Overlap pays: set method.overlap: {best.overlap} and method.period.period: {best.period}, with another preset"
        yield "than local-ada, whose gain comes out too large then."
