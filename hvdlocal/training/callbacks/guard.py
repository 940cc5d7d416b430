"""What holds while a callback is called: it may use the model and torch's random numbers, and changes neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

Fingerprints = dict[str, tuple[int | bool | None, ...]]


@contextmanager
def restored(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores torch's random state, the modes of modules, and where the model's tensors lie; gradients are not recorded.

    Dropout draws from the random state. Errors change nothing in this, since the run goes on to its next checkpoint.
    """
    modules = [(one, one.training, dict(one._parameters), dict(one._buffers)) for one in model.modules()]
    parameters = [(one, one.requires_grad, one.detach(), one.grad) for one in model.parameters()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module, training, own, buffers in modules:
            module.training = training
            module._parameters.update(own)
            module._buffers.update(buffers)
        for parameter, requires_grad, data, gradient in parameters:
            if parameter.data_ptr() != data.data_ptr():  # as after model.cpu()
                parameter.data = data
            if parameter.grad is not gradient:
                parameter.grad = gradient
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)


def fingerprints(model: nn.Module, values: bool) -> Fingerprints:
    """Returns by name what changes with a parameter, a gradient or a saved buffer.

    Args:
        model: the model.
        values: whether to read all values. Otherwise these are torch's counters of changes, which `tensor.data` does not raise.
    """
    found: Fingerprints = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[f"parameter {prefix}{name}"] = _fingerprint(parameter, values)
                if parameter.grad is not None:
                    found[f"gradient of {prefix}{name}"] = _fingerprint(parameter.grad, values)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:  # those may be caches
                found[f"buffer {prefix}{name}"] = _fingerprint(buffer, values)
    return found


def _fingerprint(tensor: torch.Tensor, values: bool) -> tuple[int | bool | None, ...]:
    counted = (tensor._version, tensor.requires_grad)
    if tensor.layout is not torch.strided:
        return counted
    return (*counted, tensor.data_ptr(), _checksum(tensor) if values else None)


def _checksum(tensor: torch.Tensor) -> int:
    """Returns the sum of the values' bits, which is exact for numbers that are not finite, too."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    return int(tensor.detach().flatten().contiguous().view(integer).sum(dtype=torch.int64))
