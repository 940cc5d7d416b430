"""What is checked, and made equal on all ranks, before the first step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch

from hvdlocal.averaging.buffers import (
    Buffers,
    broadcast_from_rank_0,
    check_policies,
    describe_layout,
    memory_of,
    policy_by_name,
)
from hvdlocal.averaging.gain import LocalAdaScale, Scaling
from hvdlocal.averaging.guards import check_rate, renormalised_weights
from hvdlocal.averaging.wrapper import WrappedOptimizer, refuse_closure
from hvdlocal.communicator import Communicator, Loss, require_agreement

OnLoss: TypeAlias = Callable[[Loss], object]
"""What is called when ranks are lost."""


def check_arguments(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    scaling: Scaling,
    accumulate: int,
    buffers: Buffers,
    budget: float | None,
    max_norm: float | None,
    on_loss: OnLoss | None,
) -> None:
    if isinstance(optimizer, WrappedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"give a torch.optim.Optimizer to wrap, not a {type(optimizer).__name__}")
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model is {'the class ' + model.__name__ if isinstance(model, type) else 'a ' + type(model).__name__}: give the "
            "torch.nn.Module whose parameters the optimizer steps; several go into a torch.nn.ModuleList"
        )
    for i, group in enumerate(optimizer.param_groups):
        check_rate(i, group.get("lr"))
    refuse_closure(optimizer)
    if not isinstance(scaling, Scaling):
        raise ValueError(f"scaling={scaling!r}: give a rule such as hvdlocal.LocalAdaScale() or NoScaling()")
    if not (isinstance(accumulate, Integral) and accumulate >= 1):
        raise ValueError(f"accumulate={accumulate!r}: must be a whole number of at least 1")
    check_policies(buffers)
    check_budget(budget)
    if max_norm is not None and not (isinstance(max_norm, Real) and max_norm > 0):
        raise ValueError(f"max_norm={max_norm!r}: must be a positive number, or None")
    if on_loss is not None and not callable(on_loss):
        raise ValueError(f"on_loss={on_loss!r}: give a function that takes a hvdlocal.communicator.Loss, or None")


def check_budget(budget: float | None) -> None:
    if budget is not None and not (isinstance(budget, Real) and 0 < budget < math.inf):
        raise ValueError(f"budget={budget!r}: a positive number of scale-invariant iterations, or None")


def check_island_period(island_period: int, scaling: Scaling) -> None:
    if not (isinstance(island_period, Integral) and island_period >= 1):
        raise ValueError(f"island_period={island_period!r}: must be a whole number of at least 1")
    if island_period > 1 and scaling.uses_statistics:
        raise ValueError(
            f"island_period={island_period} with {type(scaling).__name__}: no gain is derived for parameters that are averaged "
            "inside of an island; use island_period=1, NoScaling() or LinearScaling()"
        )


def check_overlap(overlap: int, mixing: float | None, scaling: Scaling) -> None:
    if not (isinstance(overlap, Integral) and overlap >= 0):
        raise ValueError(f"overlap={overlap!r}: give a whole number of steps, 0 for none")
    if mixing is not None and not overlap:
        raise ValueError(f"mixing={mixing!r} without overlap: give overlap=…, the steps before the mean is mixed in")
    if mixing is not None and not (isinstance(mixing, Real) and 0 <= mixing < 1):
        raise ValueError(f"mixing={mixing!r}: give 0 ≤ mixing < 1, the share of the replica that is kept, or None")
    if overlap and isinstance(scaling, LocalAdaScale) and not scaling.stale:
        raise ValueError(
            f"overlap={overlap} with LocalAdaScale(stale=False): its statistics would be sent at the first step of a round and "
            "wait for the average that is under way; use stale=True, or overlap=0"
        )


def trainable(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> tuple[list[str], list[torch.nn.Parameter]]:
    """The parameters to train, in the model's order; tied weights once, frozen ones left out."""
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    in_model = dict(model.named_parameters())
    strangers = len(in_optimizer - {id(p) for p in in_model.values()})
    if strangers:
        raise ValueError(
            f"{strangers} of the optimizer's {len(in_optimizer)} parameters are not the model's: build the optimizer from "
            "model.parameters() of the same model, after moving the model to its device"
        )
    trained = {name: p for name, p in in_model.items() if id(p) in in_optimizer and p.requires_grad}
    if not trained:
        raise ValueError("the optimizer holds no parameter that requires a gradient: there is nothing to train")
    for name, p in trained.items():
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(f"parameter {name!r} has no shape yet: run one batch through the model before wrapping")
    for name, p in trained.items():
        if p.dtype != torch.float32:
            raise ValueError(
                f"parameter {name!r} is {p.dtype}; hvdlocal averages float32. Keep parameters in float32 and use torch.autocast "
                "for bfloat16 or float16."
            )
    devices = {p.device for p in trained.values()}
    if len(devices) > 1 or next(iter(devices)).type == "meta":
        raise ValueError(
            f"the parameters to train lie on {', '.join(sorted(map(str, devices)))}: a replica must lie on one device"
        )
    return list(trained), list(trained.values())


def constants(model: torch.nn.Module, buffers: Buffers) -> dict[str, torch.Tensor]:
    """What ought to stay equal on all ranks without being averaged: frozen parameters and integer buffers, by name.

    Left out are buffers that the user has called local, zero points that a layer estimates from its data for quantisation,
    tables whose rows are rescaled when they are looked up, and batch norm's count of batches, which has no effect unless
    momentum is None.
    """
    parameters = dict(model.named_parameters())
    rescaled = renormalised_weights(model, parameters.values())
    frozen: dict[str, torch.Tensor] = {
        name: p for name, p in parameters.items() if not (p.requires_grad or any(p is one for one in rescaled.values()))
    }
    counts = {
        f"{name}.num_batches_tracked".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.momentum is not None
    }
    estimates = {
        id(buffer)
        for module in model.modules()
        if any(cls.__module__.startswith("torch.ao.quantization.") for cls in type(module).__mro__)
        for buffer in module.buffers(recurse=False)
    }
    integers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if not (buffer.is_floating_point() or buffer.is_complex())
        and name not in counts
        and id(buffer) not in estimates
        and policy_by_name(name, buffers) != "local"
    }
    return frozen | integers


def start_together(
    communicator: Communicator,
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    settings: Mapping[str, Any],
    flat: torch.Tensor,
    in_flat: set[int],
) -> None:
    """Refuses ranks with different settings, then makes rank 0's model everyone's.

    Args:
        communicator: the ranks.
        optimizer: the wrapped one; its groups and the number of its states must be equal.
        model: the replica.
        settings: what else must be equal, by name.
        flat: holds the tensors `in_flat`, to be sent in one piece.
        in_flat: ids of the parameters and buffers in `flat`.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    facts = {
        **settings,
        "wrapped optimizer": type(optimizer).__name__,
        "model (names, shapes, dtypes)": layout_digest(model),
        "parameters with optimizer state": len(optimizer.state),
        "torch": torch.__version__,
        **hyperparameters(optimizer),
    }
    require_agreement(communicator, facts, "hvdlocal.settings")
    others = {
        f"hvdlocal.start.{name}.{i}": part
        for name, tensor in tensors.items()
        for i, part in enumerate(memory_of(tensor))
        if id(tensor) not in in_flat and part.numel()
    }
    broadcast_from_rank_0(communicator, {"hvdlocal.start": flat, **others})


def layout_digest(model: torch.nn.Module) -> str:
    """A digest of the names, shapes and dtypes of the model's parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    layout = repr([(name, *describe_layout(tensor)) for name, tensor in tensors.items()])
    return hashlib.sha256(layout.encode()).hexdigest()[:16]


def hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The settings of all parameter groups, by names such as "param group 0 lr"."""
    return {
        f"param group {i} {key}": _plain(value)
        for i, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    }


def owner_of(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    path, _, own_name = name.rpartition(".")
    return model.get_submodule(path), own_name


def _plain(value: Any) -> Any:
    """A setting without its device and its place in memory, which differ between ranks."""
    return value.tolist() if isinstance(value, torch.Tensor) else value
