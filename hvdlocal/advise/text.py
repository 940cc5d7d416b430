"""Formats advice as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from hvdlocal.advise.advice import Advice, pooled_paces
from hvdlocal.advise.comparison import CERTAIN
from hvdlocal.advise.cost_model import averaging_seconds, noise, predicted_overlap
from hvdlocal.advise.formats import brief, more, ms, number, sampled
from hvdlocal.advise.measurements import Measurements, SampleSummary
from hvdlocal.advise.overlap_text import overlap_text
from hvdlocal.advise.predictions import PERIODS, Prediction, slowest
from hvdlocal.figures.units import bytes_text, seconds_text

KEEPS_UP = 0.05
"""Share of the time that a rank may wait for samples before its loader is called too slow."""

TRUSTED = 0.9
"""Share of a fixed rule's gain that the statistics must justify; otherwise the excess is shown."""

SHAKY = 0.1
"""Standard error of the ratio of two methods, above which the reader is warned."""

ALONE = "one rank has nothing to average: train with any method, H does not matter. Start more ranks for advice."

PAYLOADS = {
    "acc-lin": "the gradient (sync, acc-lin)",
    "acc-ada": "the gradient, and its norm (acc-ada)",
    "local-lin": "the model (local, local-lin)",
    "local-ada sketch": "the model and a sketch (local-ada)",
    "local-ada exact": "the model and a gradient (local-ada)",
    "local-ada-nostale": "the same in two collectives",
}


def measured_text(measured: Measurements) -> str:
    """Describes the measurements between collectives."""
    paces, batch = pooled_paces(measured.blocks), measured.batch_size
    slow = max((pace.micro_batch for pace in paces), key=lambda one: one.mean)
    quick = min(pace.micro_batch.mean for pace in paces)
    spread = max(pace.micro_batch.deviation / pace.micro_batch.mean for pace in paces)
    waiting = max(pace.waiting.mean / pace.micro_batch.mean for pace in paces)
    keeps_up = (
        "the loader keeps up"
        if waiting <= KEEPS_UP
        else "THE LOADER HOLDS UP TRAINING: give it more threads (data.threads), or prepare smaller samples"
    )
    ranks = f"; the fastest rank {ms(quick)}" if len(paces) > 1 else ""
    lines = [
        f"{len(paces)} rank{'s' * (len(paces) > 1)} × {batch} of {measured.samples:,} samples; "
        f"{measured.parameters:,} parameters; measured for {seconds_text(measured.seconds)}",
        "",
        f"  micro-batch  {ms(slow.mean)} on the slowest rank, ± {100 * spread:.0f} % from one to the next{ranks}",
        f"  update       {ms(max(pace.update.mean for pace in paces))}",
        f"  samples      {batch / slow.mean:,.0f}/s per rank; {100 * waiting:.1f} % of the time is waiting for them: {keeps_up}",
    ]
    return "\n".join(lines)


def advice_text(advice: Advice) -> str:
    """Describes everything: the verdict, the measurements and predictions behind it, and what else follows from them."""
    parts = [_verdict(advice), "", measured_text(advice.measured)]
    parts += [*_averagings(advice), *_overlap(advice), *_statistics(advice), *_table(advice), *_islands(advice)]
    parts += overlap_text(advice)
    return "\n".join([*parts, "", *_scenarios(advice), "", *_remarks(advice)])


def _averagings(advice: Advice) -> Iterator[str]:
    cost_model, blocks = advice.estimate.cost_model, advice.measured.blocks
    yield ""
    yield f"  {'a step that ends with the sum of':38}{'per rank':>10}{'collective':>18}{'whole step':>18}{'m':>8}"
    update = cost_model.costs["local-lin"].update
    step = cost_model.accumulate * max(cost_model.micro_batch) + update
    for name in (name for name in PAYLOADS if name in blocks[0].closings):
        closings = [block.closings[name] for block in blocks]
        m = max(SampleSummary.pooled(closing.step for closing in closings).mean - update, 0.0) / step
        yield (
            f"  {PAYLOADS[name]:38}{bytes_text(closings[0].bytes):>10}"
            f"{sampled([closing.collective for closing in closings]):>18}"
            f"{sampled([closing.step for closing in closings]):>18}{m:8.2f}"
        )
    waits = [(count, slowest(cost_model.micro_batch, cost_model.variation, count)) for count in (1, 8, 64)]
    mean = fmean(cost_model.micro_batch)
    added = ", ".join(f"{100 * (wait / (count * mean) - 1):.1f} % with H = {count}" for count, wait in waits)
    yield f"  waiting for the slowest rank adds {added}"


def _overlap(advice: Advice) -> Iterator[str]:
    cost_model, blocks = advice.estimate.cost_model, advice.measured.blocks
    shares = [f"{100 * bucket.ready:.0f}" for bucket in cost_model.buckets]
    shown = ", ".join(shares if len(shares) < 8 else [*shares[:3], "…", *shares[-2:]])
    pieces = f"{len(shares)} buckets, complete" if len(shares) > 1 else "one bucket, complete"
    yield ""
    yield f"  the gradient's sum can overlap with the backward pass of {ms(cost_model.backward)}: {pieces} after {shown} % of it"
    yield f"  {'a step beyond its backward pass':38}{'without overlap':>18}{'overlapped':>18}{'predicted':>12}"
    for method, name in (("sync", "sync, acc-lin"), ("acc-ada", "acc-ada")):
        measured = "acc-lin" if method == "sync" else method
        apart, beside = (
            sampled([block.closings[one].step for block in blocks]) for one in (measured, f"{measured} overlapped")
        )
        yield f"  {name:38}{apart:>18}{beside:>18}{ms(predicted_overlap(cost_model, method)):>12}"


def _islands(advice: Advice) -> Iterator[str]:
    cost_model, blocks = advice.estimate.cost_model, advice.measured.blocks
    if len(advice.islands) < 2:
        return
    yield ""
    yield "Islands of n ranks are one worker each: mean gradients inside at every step, averages across after H (local-ada)"
    heads = f"{'H':>6}{'island step':>14}{'average/H':>12}{'step':>10}{'epoch, s':>18}"
    yield f"     n{'gradient inside':>18}{'average across':>18}{heads}"
    for n, one in advice.islands.items():
        inside = sampled([block.islands[n].gradient for block in blocks]) if n > 1 else ""
        across = sampled([block.islands[n].average for block in blocks])
        average, step = averaging_seconds(cost_model, one.method, n) / one.period, one.round / one.period
        epoch = f"{brief(one.epoch)} ± {brief(advice.error(one))}"
        yield (
            f"{n:6}{inside:>18}{across:>18}{one.period:6}{ms(step - average):>14}{ms(average):>12}{ms(step):>10}{epoch:>18}"
        )
    best = min((one for n, one in advice.islands.items() if n > 1), key=lambda one: one.epoch)
    alone = advice.islands[1]
    error = advice.estimate.ratio_error(best, alone)
    verdict, ratio = f"Islands of {best.island} ranks", best.epoch / alone.epoch
    if abs(ratio - 1) <= CERTAIN * error:
        yield f"  {verdict} take the same time within the noise as none ({ratio:.2f} ± {error:.2f}): leave method.island at 1."
    elif ratio > 1:
        yield f"  Islands do not pay here: with {best.island} ranks in each, local-ada takes {more(ratio)} to equal progress."
    elif advice.now.verdict == "data-parallel":
        yield f"  {verdict} take {ratio:.2f} of the time that local-ada takes without them, but data parallelism is faster still."
    else:
        yield f"  {verdict} pay: without them local-ada takes {more(1 / ratio)}. Set method.island: {best.island}."


def _statistics(advice: Advice) -> Iterator[str]:
    measured, cost_model = advice.measured, advice.estimate.cost_model
    ranges = ", ".join(f"{one.label} {number(one.noise)}" for one in advice.scenarios if one.label.startswith("at its"))
    count = sum(block.grad_sqr.count for block in measured.blocks)
    yield ""
    yield (
        f"  statistics   G = {cost_model.grad_sqr:.3g}, σ² = {cost_model.grad_var:.3g}, σ²/G = {number(noise(cost_model))} "
        f"in a short run{f' ({ranges})' if ranges else ''}: {count} estimates in {measured.epochs:.2g} epochs"
    )


def _table(advice: Advice) -> Iterator[str]:
    sync, acc_ada, acc_lin = (_faster(advice, method) for method in ("sync", "acc-ada", "acc-lin"))
    adaptive = [name for name in (acc_ada.method, "local-ada", "local-ada-nostale") if name in advice.m]
    fixed = (acc_lin.method, "local-lin")
    yield ""
    yield "Seconds for a scale-invariant epoch (± one standard error), and the gain; with fixed rules seconds for an epoch"
    yield "of data, and how many times larger their rate is than the statistics justify"
    heads = "".join(f"{name:>20}   gain" for name in adaptive) + "".join(f"{name:>20}{'':10}" for name in fixed)
    yield f"     H{heads}".rstrip()
    for period in PERIODS:
        line = f"{period:6}"
        for one in (advice.table[name, period] for name in adaptive):
            line += f"{f'{brief(one.epoch)} ± {brief(advice.error(one))}':>20}{one.gain:7.3g}"
        for one in (advice.table[name, period] for name in fixed):
            line += f"{brief(one.own_epoch):>20}{_excess(one):>10}"
        yield line.rstrip()
    yield (
        f"  {sync.method} takes {brief(sync.own_epoch)} s for an epoch of data, and {brief(sync.epoch)} s for the progress "
        "of a scale-invariant one"
    )


def _scenarios(advice: Advice) -> Iterator[str]:
    yield "Best of local-ada (H > 1) and of data parallelism at equal progress, by the noise of the gradients"
    rows = [("as measured", noise(advice.estimate.cost_model), advice.now)]
    rows += [(one.label, one.noise, one.comparison) for one in advice.scenarios]
    for label, ratio, found in rows:
        local, parallel = found.local, found.data_parallel
        yield (
            f"  {label:30}σ²/G {number(ratio):>8}   {_island(local):9}H = {local.period:<4}{brief(local.epoch):>9} s   "
            f"{_named(parallel):24}{brief(parallel.epoch):>9} s   local/parallel {found.ratio:.2f} ± {found.error:.2f}"
        )


def _verdict(advice: Advice) -> str:
    now = advice.now
    island = f", islands of {now.local.island} ranks" if now.local.island > 1 else ""
    ours, theirs = f"{now.local.method}, H = {now.local.period}{island}", _named(now.data_parallel)
    if now.verdict == "local":
        longer = more(1 / now.ratio)
        return f"USE LOCAL SGD: {ours}. Data parallelism at its best, {theirs}, takes {longer} to the same progress."
    if now.verdict == "data-parallel":
        return f"USE DATA PARALLELISM: {theirs}. Local SGD at its best, {ours}, takes {more(now.ratio)} to the same progress."
    return (
        f"NO DIFFERENCE BEYOND THE NOISE between {ours} and {theirs}: data parallelism is simpler. Measure for longer "
        "(--seconds) to tell them apart."
    )


def _remarks(advice: Advice) -> Iterator[str]:
    now = advice.now
    if now.error > SHAKY:
        yield "The measurements vary much: something else keeps these nodes or their network busy."
    m = advice.m[now.local.method]
    local = "local steps without islands" if len(advice.islands) > 1 else "local steps"
    against = "against overlapped data parallelism with these statistics"
    if advice.crossover is None:
        yield f"By the formulas alone no m makes {local} pay {against}; here m = {m:.2f}."
    else:
        yield f"By the formulas alone {local} pay from m = {advice.crossover:.2g} {against}; here m = {m:.2f}."
    others = {one.comparison.verdict for one in advice.scenarios} - {now.verdict, "undecided"}
    if others:
        yield "The answer changes with the noise, which grows while the loss falls: see the lines above."
    sync = _faster(advice, "sync")
    fixed = ", ".join(
        f"{advice.table['local-lin', period].own_epoch / sync.own_epoch:.2f} with H = {period}"
        for period in (4, 16, 64)
    )
    yield f"With a fixed number of epochs of data (local, local-lin, QSR) an epoch takes, in multiples of sync's: {fixed}."


def _faster(advice: Advice, method: str) -> Prediction:
    """Returns the prediction for a step of data parallelism with overlap or without, whichever is faster."""
    return min((advice.table[name, 1] for name in (f"{method} overlapped", method)), key=lambda one: one.round)


def _island(one: Prediction) -> str:
    return f"n = {one.island}" if one.island > 1 else ""


def _named(one: Prediction) -> str:
    """Returns the method's name; for acc-* followed by the number of micro-batches."""
    return one.method if one.method.startswith("sync") else f"{one.method}, {one.period}"


def _excess(one: Prediction) -> str:
    times = one.gain / one.justified
    if times * TRUSTED <= 1:
        return ""
    return f"({times:.1f}×)" if times < 9.95 else f"({min(times, 9999):.0f}×)"
