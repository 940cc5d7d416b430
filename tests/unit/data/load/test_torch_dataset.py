import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset

from hvdlocal.data import Loader, ShardedDataset
from hvdlocal.data.augment import CenterCrop, CropFlip, Normalize, RandomResizedCrop
from hvdlocal.data.load.loader import evaluation_batches
from hvdlocal.data.load.torch_dataset import EpochSampler, SampleIndex, TorchDataset


def samplers(dataset, num_workers, batch_size, **options):
    return [EpochSampler(dataset, batch_size, rank=r, num_workers=num_workers, **options) for r in range(num_workers)]


def loader_samples(dataset, batch_size, epochs, **options):
    """The images of every epoch that Loader gives."""
    loader = Loader(dataset, batch_size, **options)
    return [torch.cat([images for images, _ in loader]) for _ in range(epochs)]


def test_items_are_images_and_labels(make_dataset):
    dataset = make_dataset(60, num_shards=2)
    items = TorchDataset(dataset)
    assert len(items) == 60
    for i in (0, 31, 59):
        image, label = items[i]
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image, dataset.take([i])[0])
        assert isinstance(label, int)
        assert label == dataset.labels[i]
    for i, (image, label) in zip([5, 59, 5], items.__getitems__([5, 59, 5]), strict=True):
        np.testing.assert_array_equal(image, dataset.take([i])[0])
        assert label == dataset.labels[i]


def test_transform_is_called_with_every_image(make_dataset):
    dataset = make_dataset(10)
    items = TorchDataset(dataset, transform=lambda image: image.permute(2, 0, 1).float() / 255)
    images, labels = next(iter(DataLoader(items, 4)))
    np.testing.assert_array_equal(
        images, dataset.take(range(4)).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    )
    np.testing.assert_array_equal(labels, dataset.labels[:4])


@pytest.mark.parametrize("order", ["global", "block", "replacement"])
@pytest.mark.parametrize("tail", ["carry", "drop"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_data_loader_with_the_sampler_gives_what_the_loader_gives(make_dataset, order, tail, num_workers):
    dataset = make_dataset(53, num_shards=2)
    options = {"order": order, "tail": tail, "seed": 4, "num_workers": num_workers}
    for rank in range(num_workers):
        expected = loader_samples(dataset, 5, 4, rank=rank, **options)
        sampler = EpochSampler(TorchDataset(dataset), 5, rank=rank, **options)
        batches = DataLoader(TorchDataset(dataset), 5, sampler=sampler)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            assert len(batches) * 5 == len(sampler) == len(expected[epoch])
            assert torch.equal(torch.cat([images for images, _ in batches]), expected[epoch])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8])
def test_ranks_get_equally_many_and_together_every_sample_once(make_dataset, num_workers):
    n = 101
    ranks = samplers(make_dataset(n), num_workers, 4)
    seen = []
    for epoch in range(3):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        assert len({len(sampler) for sampler in ranks}) == 1
        per_rank = [list(sampler) for sampler in ranks]
        assert {len(indices) for indices in per_rank} == {len(ranks[0])}
        seen += np.array(per_rank).T.ravel().tolist()
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize(("num_workers", "batch_size"), [(2, 3), (3, 2), (1, 5)])
def test_resume_at_every_batch(make_dataset, num_workers, batch_size):
    dataset = make_dataset(23)
    loader = Loader(dataset, 3, num_workers=2)
    batches = loader.endless()
    for _ in range(9):
        state = loader.state_dict()
        ranks = samplers(dataset, num_workers, batch_size)
        loaders = [Loader(dataset, batch_size, rank=r, num_workers=num_workers) for r in range(num_workers)]
        for sampler, other in zip(ranks, loaders, strict=True):
            sampler.load_state_dict(state)
            assert sampler.state_dict() == state
            other.load_state_dict(state)
            epoch = state["samples_consumed"] // 23
            for following in range(epoch, epoch + 3):
                sampler.set_epoch(following)
                indices = list(sampler)
                assert len(indices) == len(sampler)
                images = torch.cat([images for images, _ in other])
                np.testing.assert_array_equal(dataset.take(indices), images)
        next(batches)


def test_state_counts_the_batches_that_were_trained_with(make_dataset):
    dataset = make_dataset(23)
    sampler = EpochSampler(dataset, 3, num_workers=2)
    loader = Loader(dataset, 3, num_workers=2)
    sampler.set_epoch(1)
    for _ in loader:
        pass
    for batches in range(3):
        assert sampler.state_dict(batches) == loader.state_dict()
        next(iter(loader))


def test_states_of_another_run_are_refused(make_dataset):
    dataset = make_dataset(23)
    state = EpochSampler(dataset, 3).state_dict()
    with pytest.raises(ValueError, match="saved with seed 0, this loader has 1"):
        EpochSampler(dataset, 3, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="tail is 'partial'"):
        EpochSampler(dataset, 3, tail="partial")


def test_pickles_hold_no_data_and_workers_may_be_spawned(make_dataset, tmp_path):
    make_dataset(3000, num_shards=2)
    dataset = ShardedDataset(tmp_path, storage="mmap")
    items = TorchDataset(dataset)
    assert len(pickle.dumps(items)) < 2000 < dataset.take(range(3000)).nbytes
    sampler = EpochSampler(items, 10)
    direct = list(DataLoader(items, 10, sampler=sampler))
    spawned = DataLoader(items, 10, sampler=sampler, num_workers=1, multiprocessing_context="spawn")
    for (images, labels), (expected_images, expected_labels) in zip(islice(spawned, 20), direct, strict=False):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_jpegs_are_cropped_as_by_the_loader(make_jpeg_dataset):
    dataset = make_jpeg_dataset(20)
    crop = RandomResizedCrop(8)
    items = TorchDataset(dataset, crop=crop)
    sampler = EpochSampler(items, 5, seed=2)
    loader = Loader(dataset, 5, seed=2, crop=crop)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (images, labels), (expected_images, expected_labels) in zip(
            DataLoader(items, 5, sampler=sampler), loader, strict=True
        ):
            assert torch.equal(images, expected_images)
            assert torch.equal(labels, expected_labels)


def test_foreign_samplers_crop_at_random(make_jpeg_dataset):
    items = TorchDataset(make_jpeg_dataset(20), crop=RandomResizedCrop(8))
    torch.manual_seed(0)
    images = [items[3][0] for _ in range(5)]
    assert not all(torch.equal(images[0], image) for image in images)
    torch.manual_seed(0)
    assert torch.equal(items[3][0], images[0])
    assert len(list(DataLoader(items, 4, sampler=RandomSampler(items)))) == 5


def test_jpegs_need_a_crop(make_jpeg_dataset):
    with pytest.raises(ValueError, match="the samples are jpeg"):
        TorchDataset(make_jpeg_dataset(5))


def test_images_refuse_a_crop(make_dataset):
    with pytest.raises(ValueError, match="the samples are images"):
        TorchDataset(make_dataset(5), crop=CenterCrop(4, 5))


def test_an_index_is_a_number_with_a_key_an_epoch_and_a_seed():
    index = SampleIndex(7, 2**64 - 1, 3, 5)
    assert index == 7
    assert [10 * i for i in range(9)][index] == 70
    again = pickle.loads(pickle.dumps(index))
    assert (again, again.key, again.epoch, again.seed, type(again)) == (7, 2**64 - 1, 3, 5, SampleIndex)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_batch_transform_augments_as_the_loader_does(make_dataset, num_workers):
    dataset = make_dataset(23, num_shards=2)
    transform = CropFlip(dataset.mean, dataset.std, padding=2)
    items = TorchDataset(dataset, batch_transform=transform)
    for rank in range(num_workers):
        options = {"rank": rank, "num_workers": num_workers, "seed": 3}
        sampler = EpochSampler(items, 5, **options)
        loader = Loader(dataset, 5, transform=transform, **options)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for (images, labels), (expected_images, expected_labels) in zip(
                DataLoader(items, 5, sampler=sampler), loader, strict=True
            ):
                assert torch.equal(images, expected_images)
                assert torch.equal(labels, expected_labels)


def test_one_transform_at_most(make_dataset):
    with pytest.raises(ValueError, match="batch_transform and transform are both given"):
        TorchDataset(make_dataset(5), batch_transform=Normalize((0, 0), (1, 1)), transform=torch.clone)


def test_items_count_from_the_end_too_and_have_one(make_dataset):
    items = TorchDataset(make_dataset(5))
    assert len(list(items)) == 5
    for i in range(5):
        assert torch.equal(items[i - 5][0], items[i][0])
    for i in (5, -6):
        with pytest.raises(IndexError, match=f"index {i} leaves the data set of 5"):
            items[i]


def test_epochs_without_a_batch_are_refused(make_dataset):
    dataset = make_dataset(23)
    assert len(list(EpochSampler(dataset, 23))) == 23
    with pytest.raises(ValueError, match="a global batch of 24 is more than the 23 samples of an epoch"):
        EpochSampler(dataset, 12, num_workers=2)


def test_what_is_no_data_set_of_hvdlocal(make_dataset):
    items = TorchDataset(make_dataset(20))
    for other in (Subset(items, range(5)), ConcatDataset([items, items]), [1, 2], None):
        for taker in (lambda data: EpochSampler(data, 2), TorchDataset, lambda data: Loader(data, 2)):
            with pytest.raises(
                ValueError, match=rf"takes a ShardedDataset.*not a {type(other).__name__}: .*DistributedSampler"
            ):
                taker(other)
    for taker in (TorchDataset, lambda data: Loader(data, 2), lambda data: evaluation_batches(data, 2)):
        with pytest.raises(ValueError, match="takes what a TorchDataset is made of: give its attribute dataset"):
            taker(items)
