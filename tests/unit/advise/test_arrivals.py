"""The order in which gradients come."""

import pytest
import torch
from torch import nn

from hvdlocal.advise.arrivals import GradientArrivals
from hvdlocal.averaging.buckets import Bucket
from hvdlocal.plan.overlap import BucketArrival


def test_gradients_come_from_the_last_layer_to_the_first():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    arrivals = GradientArrivals(list(model.parameters()))
    for _ in range(2):
        loss = model(torch.ones(1, 4)).sum()
        arrivals.watch(loss.backward)
    buckets = [Bucket(range(i, i + 1), slice(16 * i, 16 * (i + 1))) for i in (2, 1, 0)]
    found = arrivals.of(buckets)
    assert [one.bytes for one in found] == [64, 64, 64]
    assert 0 < found[0].ready < found[1].ready < found[2].ready <= 1
    both = arrivals.of([Bucket(range(0, 3), slice(0, 48))])
    assert both == [BucketArrival(found[2].ready, 192)], "a bucket is complete with its last gradient"


def test_a_gradient_that_does_not_come_is_the_last():
    used, unused = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    arrivals = GradientArrivals([used.weight, unused.weight])
    arrivals.watch(used(torch.ones(1, 4)).sum().backward)
    assert arrivals.of([Bucket(range(1, 2), slice(0, 16))])[0].ready == pytest.approx(1.0)
