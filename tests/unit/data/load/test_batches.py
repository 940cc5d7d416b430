"""What is in a batch: images, labels, augmentation."""

import numpy as np
import pytest
import torch
from loaders import loaders, source_index

from hvdlocal.data import CropFlip, Loader, Normalize
from hvdlocal.data.augment import Compose, MixUp, RandomResizedCrop


def test_labels_belong_to_their_images(make_dataset, source):
    _, labels = source(60)
    for images, batch_labels in Loader(make_dataset(60, num_shards=2), 7):
        assert images.dtype == torch.uint8
        assert images.shape == (7, 4, 3, 2)
        assert batch_labels.dtype == torch.int64
        np.testing.assert_array_equal(batch_labels, labels[source_index(images)])


def test_batches_in_hand_are_never_overwritten(make_dataset):
    loader = Loader(make_dataset(200), 5)
    held = list(loader)
    assert sorted(np.concatenate([source_index(images) for images, _ in held])) == list(range(200))


def test_augmentation_does_not_depend_on_the_number_of_workers(make_dataset, tmp_path):
    dataset = make_dataset(50)

    def augmented(num_workers, batch_size):
        transform = CropFlip((0, 0), (1 / 255, 1 / 255), padding=2)
        ranks = loaders(dataset, num_workers, batch_size, transform=transform, seed=3)
        streams = [loader.endless() for loader in ranks]
        batches = torch.empty(10, num_workers * batch_size, 2, 4, 3)
        for step in range(10):
            for rank, stream in enumerate(streams):
                batches[step, rank::num_workers] = next(stream)[0]
        return batches

    expected = augmented(1, 12)
    assert torch.equal(augmented(4, 3), expected)
    assert torch.equal(augmented(3, 4), expected)
    plain = next(Loader(dataset, 12, seed=3).endless())[0].permute(0, 3, 1, 2)
    assert not torch.equal(expected[0], plain.float())


def test_mix_makes_labels_probabilities(make_dataset):
    dataset = make_dataset(40)
    loader = Loader(dataset, 8, transform=Normalize(dataset.mean, dataset.std), mix=MixUp(0.4, 5))
    for images, labels in loader:
        assert images.shape == (8, 2, 4, 3)
        assert labels.shape == (8, 5)
        torch.testing.assert_close(labels.sum(1), torch.ones(8))
    for images, labels in Loader(
        dataset, 8, transform=Normalize(dataset.mean, dataset.std), mix=MixUp(0.4, 5), device="meta"
    ):
        assert (images.device.type, labels.device.type, labels.shape) == ("meta", "meta", (8, 5))


def test_resized_crops_of_images_are_a_transform(make_dataset):
    dataset = make_dataset(20)
    transform = Compose([RandomResizedCrop(6), Normalize(dataset.mean, dataset.std)])
    images, _ = next(iter(Loader(dataset, 5, transform=transform)))
    assert images.shape == (5, 2, 6, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_batches_equal_cpu_batches(make_dataset):
    dataset = make_dataset(50)
    transform = CropFlip(dataset.mean, dataset.std, padding=1)
    on_cpu, on_gpu = (Loader(dataset, 7, transform=transform, device=device).endless() for device in ("cpu", "cuda"))
    for _ in range(20):
        (images, labels), (gpu_images, gpu_labels) = next(on_cpu), next(on_gpu)
        assert gpu_images.device.type == "cuda"
        torch.testing.assert_close(gpu_images.cpu(), images)
        assert torch.equal(gpu_labels.cpu(), labels)
