"""The moments of torch's optimizers that can be averaged with the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from hvdlocal.averaging.flat_buffer import FlatReplica
from hvdlocal.averaging.moment_periods import check_moment_periods

Momentum = Literal["local", "average", "reset"] | Mapping[str, int]
"""What becomes of the optimizer's moments at an averaging: one policy for all, or the periods of those that are averaged."""

POLICIES = ("local", "average", "reset")


def moment_periods(optimizer: torch.optim.Optimizer, momentum: Momentum) -> dict[str, int]:
    """The moments that are averaged and their periods in rounds, in the order of their places: by period.

    Args:
        optimizer: the one that keeps the moments.
        momentum: see `LocalOptimizer`.

    Raises:
        ValueError: the policy is unknown; the optimizer has no such moments; a period is not a whole number of at least 1; one
            of two periods does not divide the other.
    """
    if isinstance(momentum, str) and momentum in POLICIES:
        return dict.fromkeys(kept_moments(optimizer), 1) if momentum == "average" else {}
    if not (isinstance(momentum, Mapping) and momentum):
        raise ValueError(
            f"momentum={momentum!r}: choose one of {', '.join(POLICIES)}, or give moments and how many rounds lie between two "
            'averages of each, such as {"exp_avg": 3, "exp_avg_sq": 6}'
        )
    kept = kept_moments(optimizer)
    for name in momentum:
        if name not in kept:
            raise ValueError(
                f"momentum={dict(momentum)}: this {type(optimizer).__name__} keeps no {name!r}; "
                + (f"choose among {', '.join(kept)}" if kept else "choose 'local', or build it with a momentum")
            )
    check_moment_periods(momentum, "momentum")
    named = [name for name in kept if name in momentum]
    return {name: int(momentum[name]) for name in sorted(named, key=lambda name: momentum[name])}


def kept_moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names under which a torch optimizer keeps moments that can be averaged.

    Raises:
        ValueError: the optimizer is none of SGD, Adam, AdamW and Muon.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if any(group["momentum"] for group in optimizer.param_groups) else ()
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        amsgrad = any(group["amsgrad"] for group in optimizer.param_groups)
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
    if isinstance(optimizer, getattr(torch.optim, "Muon", ())):  # torch 2.9 brought it
        return ("momentum_buffer",)
    raise ValueError(
        f"moments can be averaged for SGD, Adam, AdamW and Muon, not for {type(optimizer).__name__}: choose 'local' or 'reset'"
    )


def averages_all_moments(optimizer: torch.optim.Optimizer, periods: Mapping[str, int], round_number: int) -> bool:
    """Whether the average of a round holds all moments of the optimizer.

    Args:
        optimizer: the wrapped one.
        periods: of the moments that are averaged.
        round_number: 1 for the first round.
    """
    due = {name for name, period in periods.items() if round_number % period == 0}
    return bool(due) and due.issuperset(kept_moments(optimizer))


def refuse_new_moments(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
    """Refuses moments that the optimizer has kept only since the flat buffer was laid out.

    Args:
        optimizer: the wrapped one.
        names: the moments that the flat buffer has a place for.

    Raises:
        RuntimeError: naming the moments.
    """
    later = [name for name in kept_moments(optimizer) if name not in names]
    if later:
        raise RuntimeError(
            f"the {type(optimizer).__name__} keeps {', '.join(later)} now, but did not when the LocalOptimizer was "
            "built, so momentum='average' has no room for it: build the optimizer with that momentum or amsgrad (a tiny "
            "momentum will do), and change it afterwards"
        )


def adopt_moments(
    optimizer: torch.optim.Optimizer,
    names: Iterable[str],
    parameters: Sequence[torch.nn.Parameter],
    replica: FlatReplica,
) -> None:
    """Moves the optimizer's moments into the flat buffer; the optimizer updates them there, in place, from then on.

    Args:
        optimizer: the wrapped one.
        names: the moments, in the order of their places.
        parameters: those that the flat buffer holds, in its order.
        replica: the flat buffer. The moment of a parameter that has none yet is zero there.
    """
    for name, views in zip(names, replica.moments, strict=True):
        for parameter, view in zip(parameters, views, strict=True):
            moment = optimizer.state[parameter].get(name) if parameter in optimizer.state else None
            if moment is None:
                view.zero_()
            elif moment.data_ptr() != view.data_ptr():
                view.copy_(moment)
                optimizer.state[parameter][name] = view


def decays(
    optimizer: torch.optim.Optimizer, names: Iterable[str], parameters: Sequence[torch.nn.Parameter]
) -> dict[str, list[float]]:
    """The share β of a moment that is left after one step: for each of `names` a list with one β for each parameter.

    Args:
        optimizer: SGD, Muon, Adam or AdamW.
        names: of moments that are moving averages.
        parameters: in any order.

    Raises:
        ValueError: a moment is none.
    """
    if "max_exp_avg_sq" in names:
        raise ValueError(
            "the largest second moments of amsgrad are no moving averages, so that an average of them that comes later cannot be "
            "carried over: use amsgrad=False, momentum='local', or mixing=…"
        )
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def decay(name: str, group: Mapping[str, Any]) -> float:
        if name == "momentum_buffer":
            return float(group["momentum"])
        return float(group["betas"][0 if name == "exp_avg" else 1])

    return {name: [decay(name, group_of[id(p)]) for p in parameters] for name in names}


def carry_moments(
    now: list[torch.Tensor],
    mean: list[torch.Tensor],
    sent: list[torch.Tensor],
    left: Sequence[float],
    *,
    positive: bool,
) -> None:
    """Replaces what is left of the moments that were sent by as much of their mean: now + left · (mean − sent).

    Args:
        now: the moment of each parameter, which becomes the result.
        mean: of all replicas' moments; overwritten.
        sent: this replica's part of that mean.
        left: β^steps of each parameter.
        positive: whether the moments are never negative; rounding must not make them so.
    """
    torch._foreach_sub_(mean, sent)
    torch._foreach_mul_(mean, list(left))
    torch._foreach_add_(now, mean)
    if positive:
        torch._foreach_clamp_min_(now, 0.0)
