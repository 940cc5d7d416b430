"""Counts and means of an evaluation, in closed form."""

import pytest
import torch

from hvdlocal.training.evaluation import evaluate
from hvdlocal.training.tasks import ImageClassification

CPU, TASK = torch.device("cpu"), ImageClassification()


class TwoRanks:
    """The other rank has the same totals."""

    def gather(self, value, name):
        return [value, value]

    def sum_(self, tensor, name):
        tensor *= 2


class Table(torch.nn.Module):
    """Logits that are the inputs."""

    def forward(self, x):
        assert not self.training
        return x


def test_means_over_unequal_batches():
    # six classes; the label's rank among the logits is 1st, 2nd, 5th and 6th
    logits = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).repeat(4, 1)
    labels = torch.tensor([0, 1, 4, 5])
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    model = Table()
    result = evaluate(TASK, model, batches, TwoRanks(), CPU)
    assert result.samples == 8
    assert result.accuracy == pytest.approx(1 / 4)
    assert result.top5 == pytest.approx(3 / 4)
    assert result.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    assert model.training, "as it was"


def test_no_top5_among_five_classes():
    result = evaluate(TASK, Table(), [(torch.eye(5), torch.arange(5))], TwoRanks(), CPU)
    assert (result.accuracy, result.top5) == (1.0, None)


class OtherHolds:
    """This rank has no images; the other has two, both among its five best, one of them right."""

    def gather(self, value, name):
        return [value, ["loss", "accuracy", "top5"]]

    def sum_(self, tensor, name):
        tensor += torch.tensor([2.0, 0.0, 3.0, 2.0, 1.0, 2.0, 2.0, 2.0], dtype=tensor.dtype)


def test_a_rank_without_images_knows_the_same():
    result = evaluate(TASK, Table(), [], OtherHolds(), CPU)
    assert (result.samples, result.loss, result.accuracy, result.top5) == (2, 1.5, 0.5, 1.0)
