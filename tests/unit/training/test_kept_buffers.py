"""Buffers that are each rank's own, and such as are never finite, in what a run writes."""

import math

import pytest
import torch
from support.configs import digits_config
from test_checkpoint_files import write

from hvdlocal.averaging.buffers import choose_policies
from hvdlocal.communicator import SingleProcess
from hvdlocal.directory import Directory
from hvdlocal.training.checkpoint.resume import averaged_model, resume
from hvdlocal.training.config import MethodConfig
from hvdlocal.training.config_checks import check_ranges, unused_settings
from hvdlocal.training.saved_model import LastGood


def test_another_number_of_ranks_has_rank_0s_own_buffers(tmp_path):
    """A mean of unit vectors is none."""
    vectors = torch.eye(3)
    states = [
        {
            "model": {"w": torch.tensor([float(rank)]), "mean": torch.tensor([float(rank)]), "u": vectors[rank]},
            "optimizer": {"state": {}, "hvdlocal": {"kept_buffers": ["u"]}},
        }
        for rank in range(3)
    ]
    path = write(tmp_path, 4, states)
    for model in (resume(SingleProcess(), tmp_path, lambda manifest: None).averaged["model"], averaged_model(path)):
        assert model["w"] == 1.0
        assert model["mean"] == 1.0
        assert torch.equal(model["u"], vectors[0])


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.full((2, 2), -math.inf))
        self.register_buffer("codebook", torch.zeros(2))


@pytest.mark.parametrize("spoilt", ["norm.weight", "norm.running_var", "codebook", None])
def test_the_last_good_model_may_hold_a_mask(tmp_path, spoilt):
    model = Masked()
    if spoilt:
        with torch.no_grad():
            model.get_parameter(spoilt).fill_(math.nan) if "weight" in spoilt else model.get_buffer(spoilt).fill_(
                math.nan
            )
    last_good = LastGood(model, choose_policies(model, {"codebook": "average"}))
    last_good.offer()
    with Directory(tmp_path) as held:
        assert last_good.save(held, "last_good.pt") is (spoilt is None)
    if spoilt is None:
        assert torch.equal(torch.load(tmp_path / "last_good.pt")["mask"], model.mask)


def config(buffers):
    return digits_config(method=MethodConfig(buffers=buffers))


@pytest.mark.parametrize("buffers", ["mean", {"norm": "mean"}, {"norm": "local", "*": ""}])
def test_a_policy_that_does_not_exist_is_refused(buffers):
    with pytest.raises(ValueError, match=r"method.buffers=.*choose one of average, local, reestimate, or a mapping"):
        check_ranges(config(buffers))


def test_reestimation_of_some_buffers_uses_its_setting():
    for buffers, used in (("reestimate", True), ({"1": "reestimate"}, True), ({"1": "local"}, False)):
        made = config(buffers)
        check_ranges(made)
        made.method.reestimate_batches = 3
        assert ("method.reestimate_batches=3" not in unused_settings(made)) is used
