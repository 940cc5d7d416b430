"""Draws plans: H, the learning rate, and the accumulated communication over the epochs of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from matplotlib.ticker import NullLocator, StrMethodFormatter

from hvdlocal.figures.style import COLORS, DASHES, Figure, new_figure, style
from hvdlocal.plan.run_plan import RunPlan


def plan_figure(plans: Sequence[tuple[str, RunPlan]]) -> Figure:
    """Draws H, the base learning rate, and the accumulated share of data parallelism's collectives.

    Args:
        plans: the plans with their labels.
    """
    with style():
        figure, grid = new_figure(3, 1, width=7, height=1.9, sharex=True)
        periods, rates, shares = grid[:, 0]
        for i, (label, plan) in enumerate(plans):
            color, dashes = COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
            width = 1.3 + 0.45 * (len(plans) - 1 - i)  # so that coinciding curves all remain visible
            look = {"color": color, "ls": dashes, "lw": width, "label": label}
            starts = [phase.epoch for phase in plan.phases]
            edges = [*starts, plan.epochs]
            periods.stairs([phase.period for phase in plan.phases], edges, baseline=None, **look)
            epochs = [plan.epochs * j / 600 for j in range(600)]
            rates.plot(epochs, [plan.schedule(epoch) for epoch in epochs], **look)
            per_round = plan.collectives / plan.rounds
            done = accumulate((phase.rounds for phase in plan.phases), initial=0)
            shares.plot(edges, [100 * per_round * rounds / plan.micro_batches for rounds in done], **look)
        periods.set_yscale("log")
        periods.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        periods.yaxis.set_minor_locator(NullLocator())
        periods.set_title("Local steps between two averagings, H")
        rates.set_title("Base learning rate, γ")
        rates.set_ylim(bottom=0)
        shares.set_title("Collectives so far, % of data parallelism's in the whole run")
        shares.set_ylim(bottom=0)
        shares.set_xlim(0, max(plan.epochs for _, plan in plans))
        shares.set_xlabel("Scale-invariant epochs")
        if len(plans) > 1:
            figure.legend(*periods.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
