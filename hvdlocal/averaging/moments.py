"""The moments of torch's optimizers that can be averaged with the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdlocal.averaging.flat_buffer import FlatReplica


def averaged_moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names under which a torch optimizer keeps the moments that momentum="average" averages.

    Raises:
        ValueError: the optimizer is none of SGD, Adam and AdamW.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if any(group["momentum"] for group in optimizer.param_groups) else ()
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        amsgrad = any(group["amsgrad"] for group in optimizer.param_groups)
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
    raise ValueError(
        f"momentum='average' works for SGD, Adam and AdamW, not for {type(optimizer).__name__}: "
        "choose 'local' or 'reset'"
    )


def refuse_new_moments(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> None:
    """Refuses moments that the optimizer has kept only since the flat buffer was laid out.

    Args:
        optimizer: the wrapped one.
        names: the moments that the flat buffer has a place for.

    Raises:
        RuntimeError: naming the moments.
    """
    later = [name for name in averaged_moments(optimizer) if name not in names]
    if later:
        raise RuntimeError(
            f"the {type(optimizer).__name__} keeps {', '.join(later)} now, but did not when the LocalOptimizer was "
            "built, so momentum='average' has no room for it: build the optimizer with that momentum or amsgrad (a tiny "
            "momentum will do), and change it afterwards"
        )


def adopt_moments(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
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
