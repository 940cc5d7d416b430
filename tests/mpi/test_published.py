"""What a run evaluates and saves is one model, also when buffers are each rank's own."""

import math

import pytest
import torch
from support.models import everywhere_equal
from test_resume import config

from hvdlocal.models import build_model
from hvdlocal.training import Trainer, evaluation
from hvdlocal.training.config import MethodConfig, PeriodConfig


class Extras(torch.nn.Module):
    """A mask that is infinite and the last rows seen, which are the rank's own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
        self.register_buffer("bank", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.bank.copy_(x[0].detach())
        return x


@pytest.mark.parametrize("preset", ["local", "sync"])
@pytest.mark.parametrize("buffers", ["local", "average", {"*.bank": "average", "*.running_*": "reestimate"}], ids=str)
def test_the_model_that_is_evaluated_is_the_model_that_is_saved(comm, place, monkeypatch, capsys, preset, buffers):
    def build(name, num_classes, shape, arguments):
        return torch.nn.ModuleDict({"net": build_model(name, num_classes, shape), "extras": Extras()})

    class Chain(torch.nn.ModuleDict):
        def forward(self, x):
            return self["extras"](self["net"](x))

    monkeypatch.setattr("hvdlocal.training.tasks.image_classification.build_model", lambda *args: Chain(build(*args)))
    seen = []

    def evaluate(task, model, *args):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return original(task, model, *args)

    original = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    method = MethodConfig(preset, period=PeriodConfig(period=3), buffers=buffers)
    run = Trainer(config(place, f"published-{preset}-{buffers}".replace("*", ""), method=method, overwrite=True), comm)
    run.run()
    comm.barrier("test.saved")
    saved = torch.load(run.output.path / "model.pt", weights_only=True)
    for name, value in seen[-1].items():
        assert torch.equal(value, saved[name]), name
    if comm.size > 1:
        assert not everywhere_equal(comm, run.session.model["extras"].bank) or "*.bank" in buffers
        assert everywhere_equal(comm, next(b for n, b in run.session.model.named_buffers() if "running" in n)) is (
            buffers != "local"
        )
    said = capsys.readouterr().out
    if comm.rank == 0:
        kept = "extras.mask" if "*.bank" in buffers else "extras.mask, extras.bank"
        assert f"note: buffers that are each rank's own (the saved model has rank 0's): {kept}\n" in said
