import math

import numpy as np
import pytest
import torch

from hvdlocal.data.augment import MixUp
from hvdlocal.data.augment.mixup import symmetric_beta
from hvdlocal.data.random_keys import sample_keys

stats = pytest.importorskip("scipy.stats")


def keys_of(n, seed=0):
    return sample_keys(seed, np.zeros(n, np.int64), np.arange(n))


def batch_of(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, 5, generator=generator), torch.randint(0, 6, (n,), generator=generator)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.5, 1.0, 2.0, 8.0])
def test_ratio_is_beta_distributed(alpha):
    uniform = np.random.RandomState(3).random_sample((4000, 2))
    found = stats.kstest(symmetric_beta(alpha, uniform), stats.beta(alpha, alpha).cdf)
    assert found.pvalue > 1e-3


def test_ratios_of_batches_are_beta_distributed():
    mix = MixUp(0.2, 6)
    found = [mix._ratio(keys_of(1, seed)) for seed in range(2000)]
    assert stats.kstest(found, stats.beta(0.2, 0.2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 1e3])
def test_extreme_alphas_stay_finite(alpha):
    uniform = np.random.RandomState(3).random_sample((2000, 2))
    corners = np.array([[0.0, 0.0], [0.0, 0.5], [1 - 2**-53, 0.0], [1 - 2**-53, 0.5], [0.5, 0.25]])
    found = symmetric_beta(alpha, np.concatenate([uniform, corners]))
    assert np.isfinite(found).all()
    assert 0 <= found.min() <= found.max() <= 1
    assert abs(found.mean() - 0.5) < 5 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_mixes_with_the_sample_before(n):
    (images, labels), keys, mix = batch_of(n), keys_of(n), MixUp(0.4, 6)
    ratio = mix._ratio(keys)
    found, soft = mix(images, labels, keys)
    torch.testing.assert_close(found, images * ratio + images.roll(1, 0) * (1 - ratio))
    expected = torch.zeros(n, 6)
    for i in range(n):
        expected[i, labels[i]] += ratio
        expected[i, labels[i - 1]] += 1 - ratio
    torch.testing.assert_close(soft, expected)
    assert (found.dtype, soft.dtype) == (torch.float32, torch.float32)


def test_labels_are_probabilities():
    _, soft = MixUp(1.0, 6)(*batch_of(50), keys_of(50))
    torch.testing.assert_close(soft.sum(1), torch.ones(50))
    assert float(soft.min()) >= 0


def test_same_keys_mix_alike_and_others_differently():
    images, labels = batch_of(8)
    first, second = (MixUp(0.4, 6)(images, labels, keys_of(8)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(MixUp(0.4, 6)(images, labels, keys_of(8, seed=1))[0], first[0])


def test_golden_ratio():
    assert MixUp(0.2, 6)._ratio(keys_of(1, seed=1)) == pytest.approx(0.0302316231842934, rel=1e-12)


def test_input_is_not_changed():
    images, labels = batch_of(8)
    before = images.clone()
    MixUp(0.4, 6)(images, labels, keys_of(8))
    assert torch.equal(images, before)


def test_results_that_are_held_stay_as_they_are():
    images, labels = torch.ones(300, 3, 16, 16), torch.zeros(300, dtype=torch.int64)
    mix = MixUp(0.4, 2)
    held = [mix(images * value, labels, keys_of(300))[0] for value in range(8)]
    for value, mixed in enumerate(held):
        torch.testing.assert_close(mixed, images * value)


def test_empty_batch():
    images, soft = MixUp(0.4, 6)(*batch_of(0), keys_of(0))
    assert images.shape == (0, 3, 4, 5)
    assert soft.shape == (0, 6)


def test_half_precision():
    images, labels = batch_of(4)
    found, soft = MixUp(0.4, 6)(images.bfloat16(), labels, keys_of(4))
    assert (found.dtype, soft.dtype) == (torch.bfloat16, torch.float32)


def test_unfit_arguments_are_refused():
    for alpha in (0, -1, math.nan):
        with pytest.raises(ValueError, match="alpha is"):
            MixUp(alpha, 6)
    with pytest.raises(ValueError, match="num_classes is 0"):
        MixUp(0.2, 0)
    images, labels = batch_of(4)
    with pytest.raises(ValueError, match=r"images are torch\.uint8"):
        MixUp(0.2, 6)(images.to(torch.uint8), labels, keys_of(4))
    with pytest.raises(ValueError, match="one key per image"):
        MixUp(0.2, 6)(images, labels, keys_of(3))
