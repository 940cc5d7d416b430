import gc
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

from hvdlocal.data import CropFlip, Loader, evaluation_batches
from hvdlocal.data.order import epoch_permutation


def source_index(images):
    """The source index that the first pixel of every test image spells."""
    first = images[:, 0, 0].numpy().astype(np.int64)
    return first[:, 0] + 256 * first[:, 1]


def loaders(dataset, num_workers, batch_size, **options):
    return [Loader(dataset, batch_size, rank=r, num_workers=num_workers, **options) for r in range(num_workers)]


def global_batches(ranks, steps):
    """What the ranks get in the next steps, as source indices (steps, global batch)."""
    per_rank = [[source_index(images) for images, _ in islice(loader.endless(), steps)] for loader in ranks]
    num_workers, batch_size = len(ranks), ranks[0].batch_size
    batches = np.empty((steps, num_workers * batch_size), np.int64)
    for rank, steps_of_rank in enumerate(per_rank):
        batches[:, rank::num_workers] = steps_of_rank
    return batches


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8])
def test_carry_gives_every_sample_once_per_epoch(make_dataset, num_workers):
    n = 101  # prime: no global batch divides it
    ranks = loaders(make_dataset(n, num_shards=3), num_workers, batch_size=4, seed=6)
    steps = -(-3 * n // (4 * num_workers))
    seen = global_batches(ranks, steps).ravel()
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(seen[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_global_batches_do_not_depend_on_the_number_of_workers(make_dataset):
    dataset = make_dataset(101, num_shards=2)
    expected = global_batches(loaders(dataset, 1, 24), 12)
    order = np.concatenate([epoch_permutation(0, epoch, 101) for epoch in range(3)])
    np.testing.assert_array_equal(expected.ravel(), dataset.index[order[: 12 * 24]])
    for num_workers in (2, 3, 8, 24):
        np.testing.assert_array_equal(global_batches(loaders(dataset, num_workers, 24 // num_workers), 12), expected)


def test_drop_leaves_out_the_rest(make_dataset):
    dataset = make_dataset(23)
    ranks = loaders(dataset, 2, 3, tail="drop")
    assert ranks[0].steps_per_epoch == 3
    seen = global_batches(ranks, 6).reshape(2, 18)
    for epoch in range(2):
        np.testing.assert_array_equal(seen[epoch], dataset.index[epoch_permutation(0, epoch, 23)[:18]])
    assert ranks[0].epoch == 2.0


def test_for_loops_walk_on_from_edge_to_edge(make_dataset):
    loader = Loader(make_dataset(23), 5)
    lengths, epochs = [], []
    for _ in range(5):
        lengths.append(sum(1 for _ in loader))
        epochs.append(loader.epoch)
    assert lengths == [5, 5, 4, 5, 4]  # the edges 23, 46, 69, 92, 115 are crossed at 25, 50, 70, 95, 115
    assert epochs == [25 / 23, 50 / 23, 70 / 23, 95 / 23, 5.0]
    assert loader.steps_per_epoch == 23 / 5


def test_batch_larger_than_the_data_set(make_dataset):
    loader = Loader(make_dataset(5), 12)
    images, _ = next(iter(loader))
    counts = np.bincount(source_index(images), minlength=5)
    assert set(counts) <= {2, 3}
    assert counts.sum() == 12


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


@pytest.mark.parametrize(("num_workers", "batch_size"), [(2, 3), (3, 2), (1, 6)])
def test_resume_at_every_step(make_dataset, num_workers, batch_size):
    dataset = make_dataset(23, num_shards=2)
    expected = global_batches(loaders(dataset, 2, 3), 11)
    uninterrupted = Loader(dataset, 3, num_workers=2)
    batches = uninterrupted.endless()
    for done in range(11):
        resumed = loaders(dataset, num_workers, batch_size)
        for loader in resumed:
            loader.load_state_dict(uninterrupted.state_dict())
        np.testing.assert_array_equal(global_batches(resumed, 11 - done), expected[done:])
        next(batches)


def test_only_what_was_handed_out_counts(make_dataset):
    loader = Loader(make_dataset(50), 4, num_workers=2, prefetch=5)
    batches = loader.endless()
    assert loader.samples_consumed == 0
    for step in range(3):
        next(batches)
        time.sleep(0.01)  # the thread runs ahead
        assert loader.samples_consumed == (step + 1) * 8
    assert loader.state_dict()["samples_consumed"] == 24
    stats = loader.stats()
    assert (stats["samples"], stats["bytes"]) == (12, 12 * 24)
    assert stats["wait_seconds"] > 0


def test_state_of_another_run_is_refused(make_dataset, tmp_path):
    dataset = make_dataset(50)
    state = Loader(dataset, 4).state_dict()
    with pytest.raises(ValueError, match="saved with seed 0, this loader has 1"):
        Loader(dataset, 4, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with samples_per_epoch 50, this loader has 48"):
        Loader(dataset, 4, tail="drop").load_state_dict(state)
    with pytest.raises(ValueError, match="saved with fingerprint abc"):
        Loader(dataset, 4).load_state_dict(state | {"fingerprint": "abc"})
    with pytest.raises(ValueError, match="saved with version None"):
        Loader(dataset, 4).load_state_dict({})


def test_only_the_latest_iteration_is_valid(make_dataset):
    loader = Loader(make_dataset(50), 4)
    first = iter(loader)
    next(first)
    second = loader.endless()
    next(second)
    with pytest.raises(RuntimeError, match="a later one was begun"):
        next(first)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="a state was loaded"):
        next(second)
    assert loader.samples_consumed == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "num_workers": 2}, r"rank is 2.*0\.\.1"),
        ({"rank": -1}, "rank is -1"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"tail": "pad"}, "tail is 'pad'"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"seed": -1}, "seed -1"),
        ({"batch_size": 51, "tail": "drop"}, "50 samples do not fill a global batch of 51"),
    ],
)
def test_unfit_arguments_are_refused(make_dataset, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(make_dataset(50), **({"batch_size": 4} | options))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8, 12])
def test_evaluation_sees_every_sample_once(make_dataset, source, num_workers):
    dataset = make_dataset(11, num_shards=2)
    per_rank = []
    for rank in range(num_workers):
        batches = list(evaluation_batches(dataset, 2, rank=rank, num_workers=num_workers))
        indices = [source_index(images) for images, _ in batches]
        for index, (_, labels) in zip(indices, batches, strict=True):
            np.testing.assert_array_equal(labels, source(11)[1][index])
        per_rank.append(np.concatenate([*indices, np.empty(0, np.int64)]))
    assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1
    np.testing.assert_array_equal(np.concatenate(per_rank), dataset.index)


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


def test_transform_runs_in_the_thread_for_the_cpu_and_at_the_consumer_else(make_dataset):
    dataset = make_dataset(20)
    seen = {"cpu": [], "meta": []}

    def transform(images, keys):
        seen[images.device.type].append(threading.current_thread().name)
        return images.permute(0, 3, 1, 2).float()

    next(iter(Loader(dataset, 5, transform=transform)))
    assert set(seen["cpu"]) == {"hvdlocal-prefetch"}
    images, labels = next(iter(Loader(dataset, 5, transform=transform, device="meta")))
    assert seen["meta"] == [threading.current_thread().name]
    assert images.shape == (5, 2, 4, 3)
    assert labels.device.type == "meta"


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


def test_exception_in_the_thread_reaches_the_consumer(make_dataset):
    calls = iter(range(100))

    def transform(images, keys):
        if next(calls) == 2:
            raise ZeroDivisionError("in the transform")
        return images

    batches = Loader(make_dataset(50), 4, transform=transform).endless()
    next(batches)
    next(batches)
    with pytest.raises(ZeroDivisionError, match="in the transform"):
        next(batches)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "hvdlocal-prefetch"]


def wait_for_no_threads():
    deadline = time.monotonic() + 10
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not prefetch_threads()


def test_abandoned_iterators_leave_no_thread(make_dataset):
    loader = Loader(make_dataset(50), 4)
    for _ in loader:
        break
    next(loader.endless())
    evaluation = evaluation_batches(loader.dataset, 4)
    next(evaluation)
    del evaluation
    gc.collect()
    assert wait_for_no_threads()


def test_program_ends_with_an_iterator_in_use(make_dataset, tmp_path):
    make_dataset(50)
    program = (
        "import atexit, sys, threading\n"
        "atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))\n"  # runs last
        "from hvdlocal.data import *\n"
        "dataset = ShardedDataset(sys.argv[1])\n"
        "batches = Loader(dataset, 4, transform=CropFlip(dataset.mean, dataset.std)).endless()\n"
        "next(batches)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "['MainThread']\n", "")
