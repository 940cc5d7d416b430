"""One rank's LocalOptimizer is its torch optimizer, whatever the precision, memory format and compiler: the same bits."""

import copy
from contextlib import nullcontext

import pytest
import torch
from support.models import flat, local

import hvdlocal
from hvdlocal.models import build_model

STEPS = 6


def train(model, optimizer, device, precision, channels_last, compiled):
    forward = model
    if compiled:
        forward = torch.compile(model, backend="inductor" if device.type == "cuda" else "eager")
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=precision == "float16")
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x = torch.randn(16, 3, 32, 32, generator=generator).to(device)
        y = torch.randint(10, (16,), generator=generator).to(device)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        half = nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))
        with half:
            loss = torch.nn.functional.cross_entropy(forward(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return flat(model)


@pytest.mark.parametrize(
    ("precision", "channels_last", "compiled"),
    [
        ("float32", False, False),
        ("float32", True, False),
        ("bfloat16", False, False),
        ("bfloat16", True, False),
        ("float16", True, False),
        ("bfloat16", True, True),
    ],
)
@pytest.mark.usefixtures("comm", "deterministic")
def test_one_rank_is_the_bare_optimizer(device, precision, channels_last, compiled):
    torch.manual_seed(0)
    model = build_model("resnet9_narrow", 10, (32, 32, 3)).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    ours = copy.deepcopy(model)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    bare = train(model, torch.optim.SGD(model.parameters(), **settings), device, precision, channels_last, compiled)
    optimizer = local(
        ours, 3, optimizer=torch.optim.SGD(ours.parameters(), **settings), scaling=hvdlocal.LocalAdaScale()
    )
    assert all(
        p.is_contiguous(memory_format=torch.channels_last) or not channels_last or p.ndim < 4 for p in ours.parameters()
    )
    wrapped = train(ours, optimizer, device, precision, channels_last, compiled)
    assert optimizer.round == STEPS // 3
    assert torch.isfinite(bare).all()
    assert torch.equal(wrapped, bare), float((wrapped - bare).abs().max())
