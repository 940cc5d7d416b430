"""Mistakes of a training loop that would otherwise go unnoticed, most of them left over from a move away from Horovod."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch

_TORCHS_OWN = (
    "torch.distributed.checkpoint.state_dict",
    "torch's get_optimizer_state_dict and set_optimizer_state_dict take a step with zero gradients, and leave out the "
    "part of the state that is under 'hvdlocal'. Use the optimizer's own state_dict() and load_state_dict().",
)

_STATE_MAKERS = {
    "broadcast_optimizer_state": (
        "horovod.torch.functions",
        "hvd.broadcast_optimizer_state takes a step with zero gradients and sends rank 0's moments to all ranks. Delete that "
        "line: the ranks start from rank 0's model. After an interruption load the same state_dict on every rank.",
    ),
    "_init_optim_state": _TORCHS_OWN,
    "_get_optim_state_dict": _TORCHS_OWN,
}
"""Functions that make an optimizer's state by stepping it: their module, and what to do instead."""


def refuse_state_makers() -> None:
    """Refuses calls from functions that would take a step which is none; to be called by `step` and `state_dict`.

    Raises:
        RuntimeError: the caller is such a function; the message says which, and what to do instead.
    """
    frame = sys._getframe(2)
    for _ in range(5):  # torch's profiler and schedulers wrap a step a few times
        name = frame.f_code.co_name
        if name in _STATE_MAKERS:
            module, message = _STATE_MAKERS[name]
            if frame.f_globals.get("__name__") == module:
                raise RuntimeError(message)
        if frame.f_back is None:
            return
        frame = frame.f_back


def refuse_data_parallelism(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuses a model or an optimizer that communicates at every step by itself.

    Raises:
        ValueError: with what to take away.
    """
    if type(optimizer).__module__.startswith("horovod."):
        raise ValueError(
            "the optimizer is an hvd.DistributedOptimizer, which averages the gradients at every step: delete that line and give "
            "the optimizer that it wraps"
        )
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(("torch.nn.parallel.distributed", "torch.distributed.fsdp", "deepspeed.")):
            where = f"the model's part {name!r} is" if name else "the model is"
            raise ValueError(
                f"{where} a {kind.__name__}, which communicates at every step by itself: give the module that it wraps"
            )
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            raise ValueError(
                f"parameter {name!r} is a {type(parameter.data).__name__}, not a plain tensor: every rank needs a whole "
                "replica of the model, on one device"
            )


def check_rate(group: int, rate: Any) -> float:
    """The learning rate of a parameter group as a number.

    Raises:
        ValueError: it is missing, not a number, negative or not finite.
    """
    if not (isinstance(rate, Real) or (isinstance(rate, torch.Tensor) and rate.numel() == 1)):
        what = "no learning rate" if rate is None else f"the learning rate {rate!r}"
        raise ValueError(
            f"parameter group {group} has {what}: hvdlocal scales it at every step, so 'lr' must be a number"
        )
    if not 0 <= float(rate) < math.inf:
        raise ValueError(f"the learning rate of parameter group {group} is {float(rate)}: look at what sets it")
    return float(rate)


def renormalised_weights(model: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Weights of embeddings whose forward pass rescales the rows that it looks up, which are other rows on every rank.

    Args:
        model: the replica.
        parameters: those that are looked for.

    Returns:
        The weights, by the names of the layers.
    """
    return {name: one.weight for name, one in _embeddings(model, parameters).items() if one.max_norm is not None}


def refuse_renormalised_weights(model: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Refuses layers that change their weights in the forward pass, where replicas must be equal after every step.

    Raises:
        ValueError: naming the layer.
    """
    for name in renormalised_weights(model, parameters):
        raise ValueError(
            f"{name or 'the model'!r} has a max_norm, with which every rank rescales the rows that it looks up, "
            "so that the replicas would differ: build it without, and rescale all rows after each step"
        )


def refuse_sparse_layers(model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter], reason: str) -> None:
    """Refuses layers that make sparse gradients.

    Args:
        model: the replica.
        parameters: those to train.
        reason: the setting that needs dense gradients.

    Raises:
        ValueError: naming the layer.
    """
    for name, module in _embeddings(model, parameters).items():
        if module.sparse:
            raise ValueError(
                f"{name or 'the model'!r} makes sparse gradients, but {reason} needs dense ones: use sparse=False"
            )


def refuse_sparse_gradients(parameters: Sequence[torch.nn.Parameter], reason: str) -> None:
    """Refuses gradients that are sparse, like `refuse_sparse_layers`; for layers that are not known to make them.

    Raises:
        ValueError: with the shape of the parameter.
    """
    for p in parameters:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise ValueError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, but {reason} needs dense ones: use "
                "sparse=False"
            )


def refuse_new_parameters(
    kind: str,
    model: torch.nn.Module,
    owners: Sequence[tuple[torch.nn.Module, str]],
    parameters: Sequence[torch.nn.Parameter],
    groups: Iterable[Mapping[str, Any]],
) -> None:
    """Refuses parameters that came into training, or into a trained one's place, after the optimizer was built.

    Args:
        kind: the optimizer's class, for the message.
        model: the replica.
        owners: the module that holds each parameter, and its name there.
        parameters: those that are trained.
        groups: the optimizer's parameter groups.

    Raises:
        RuntimeError: naming the parameter.
    """
    for (module, name), p in zip(owners, parameters, strict=True):
        present = getattr(module, name, None)
        if present is p:
            continue
        # Pruning and weight norm make the name that of a tensor which they compute, and keep the parameter under another.
        if isinstance(present, torch.nn.Parameter) or not any(p is one for one in model.parameters()):
            raise RuntimeError(
                f"{name!r} of a {type(module).__name__} was replaced after the {kind} was built "
                "(load_state_dict(assign=True), assigning a parameter), and what is in its place is not trained. Build the "
                f"{kind} last, and change parameters in place."
            )
    known = {id(p) for p in parameters}
    for group in groups:
        for p in group["params"]:
            if p.requires_grad and id(p) not in known:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} was frozen, or in no parameter group, when the "
                    f"{kind} was built and trains now, so it is not averaged. Build the optimizer after "
                    "unfreezing and after adding parameters."
                )


def refuse_moved_tensors(
    owners: Iterable[tuple[torch.nn.Module, str]],
    tensors: Iterable[torch.Tensor | None],
    views: Iterable[torch.Tensor],
) -> None:
    """Refuses parameters and buffers that no longer lie in the flat buffer.

    Args:
        owners: the module that holds each, and its name there.
        tensors: what is there now.
        views: where each ought to lie.

    Raises:
        RuntimeError: naming the tensor.
    """
    for (module, name), tensor, view in zip(owners, tensors, views, strict=True):
        if tensor is None or tensor.data_ptr() != view.data_ptr():
            raise RuntimeError(
                f"{name!r} of a {type(module).__name__} no longer lies in hvdlocal's buffer: something replaced it after the "
                "optimizer was built (model.to(…), load_state_dict(assign=True), assigning a parameter, a buffer or .data). "
                "Build the LocalOptimizer last, and change buffers in place."
            )


def guard_wrapped(optimizer: torch.optim.Optimizer, wrapper: Any) -> None:
    """Makes the wrapped optimizer refuse what belongs to its wrapper, as long as that lives.

    Args:
        optimizer: whose `step` nobody but the wrapper may call from now on.
        wrapper: its attribute `stepping` is true while it does.
    """
    alive = weakref.ref(wrapper)

    def refuse_bare_step(_: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        owner = alive()
        if owner is not None and owner.optimizer is optimizer and not owner.stepping:
            refuse_state_makers()
            kind = type(owner).__name__
            raise RuntimeError(
                f"the {type(optimizer).__name__} inside the {kind} was stepped by itself, which no averaging would follow: "
                f"call the step of the {kind} (with a GradScaler, scaler.step(that))"
            )

    def refuse_wrapped_state(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        owner = alive()
        if owner is not None and "hvdlocal" in state_dict:
            kind, inside = type(owner).__name__, type(optimizer).__name__
            raise ValueError(
                f"this state was saved by a {state_dict['hvdlocal'].get('class', kind)}: load it with the {kind}'s "
                f"load_state_dict, not with that of the {inside} inside, which would leave out rounds, progress and "
                "statistics"
            )

    optimizer.register_step_pre_hook(refuse_bare_step)
    optimizer.register_load_state_dict_pre_hook(refuse_wrapped_state)


def _embeddings(
    model: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]
) -> dict[str, torch.nn.Embedding | torch.nn.EmbeddingBag]:
    """The embeddings whose weights are among the parameters, by name."""
    wanted = {id(p) for p in parameters}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and id(module.weight) in wanted
    }
