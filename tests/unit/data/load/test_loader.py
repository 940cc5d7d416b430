import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import warnings
from itertools import islice

import numpy as np
import pytest
import torch

from hvdlocal.data import CropFlip, Loader, Normalize, evaluation_batches
from hvdlocal.data.augment import Compose, MixUp, RandomResizedCrop
from hvdlocal.data.load.order import EpochOrder, epoch_permutation, replacement_draws
from hvdlocal.data.load.prefetch import Job, prefetch
from hvdlocal.data.read.dataset import ShardedDataset


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


def sequence(ranks, steps):
    """What the ranks get together in each of the next steps, as source indices, in the order of the global sequence."""
    per_rank = [[source_index(images) for images, _ in islice(loader.endless(), steps)] for loader in ranks]
    together = []
    for pieces in zip(*per_rank, strict=True):
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
        batch = np.empty(sum(map(len, pieces)), np.int64)
        for rank, piece in enumerate(pieces):
            batch[rank :: len(ranks)] = piece
        together.append(batch)
    return together


@pytest.fixture
def small_blocks(monkeypatch):
    """Data sets of four samples per block, so that small ones have several streams and windows."""
    blocks = property(lambda dataset: np.append(np.arange(0, len(dataset), 4), len(dataset)))
    monkeypatch.setattr(ShardedDataset, "block_starts", blocks)


ORDERS = ["global", "block", "replacement"]
TAILS = ["carry", "partial", "drop"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8])
def test_epochs_hold_what_they_should(make_dataset, num_workers, tail, order):
    n = 101  # prime: no global batch divides it
    dataset = make_dataset(n, num_shards=3)
    ranks = loaders(dataset, num_workers, batch_size=4, seed=6, order=order, tail=tail)
    global_batch = 4 * num_workers
    used = n - n % global_batch if tail == "drop" else n
    assert {loader.samples_per_epoch for loader in ranks} == {used}
    full, rest = divmod(n, global_batch)
    steps_per_epoch = full + (rest >= num_workers) if tail == "partial" else used / global_batch
    assert {loader.steps_per_epoch for loader in ranks} == {steps_per_epoch}

    batches = sequence(ranks, -(-3 * used // global_batch) + 3)
    sizes = [len(batch) for batch in batches]
    if tail == "partial":
        last = [rest] if rest >= num_workers else []
        expected = [global_batch] * full + last
        expected[-1] += 0 if last else rest
        assert sizes[: int(steps_per_epoch)] == expected
    else:
        assert set(sizes) == {global_batch}
    seen = np.concatenate(batches)[: 3 * used].reshape(3, used)
    epoch_order = EpochOrder(order, 6, n, block_starts=dataset.block_starts)
    for epoch in range(3):
        np.testing.assert_array_equal(seen[epoch], dataset.index[epoch_order(epoch)[:used]])
        if order != "replacement":
            assert len(set(seen[epoch])) == used


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("tail", "resumed_with"),
    [
        ("carry", [(2, 3), (3, 2), (1, 5), (5, 1)]),
        ("partial", [(2, 3), (3, 2), (1, 5), (8, 1)]),
        ("drop", [(2, 3), (3, 2), (1, 6)]),
    ],
)
def test_resume_at_every_step_with_other_ranks(make_dataset, order, tail, resumed_with):
    dataset = make_dataset(23, num_shards=2)
    options = {"order": order, "tail": tail, "seed": 5}
    expected = np.concatenate(sequence(loaders(dataset, 2, 3, **options), 16))
    uninterrupted = Loader(dataset, 3, num_workers=2, **options)
    batches = uninterrupted.endless()
    for _ in range(8):  # two epochs of four steps
        state = uninterrupted.state_dict()
        for num_workers, batch_size in resumed_with:
            resumed = loaders(dataset, num_workers, batch_size, **options)
            for loader in resumed:
                loader.load_state_dict(state)
            rest = np.concatenate(sequence(resumed, 4))
            done = state["samples_consumed"]
            np.testing.assert_array_equal(rest, expected[done : done + len(rest)])
            assert {loader.samples_consumed for loader in resumed} == {done + len(rest)}
        next(batches)


def test_partial_epochs_end_at_their_edge_on_every_rank(make_dataset):
    dataset = make_dataset(29)
    ranks = loaders(dataset, 4, 2, tail="partial", transform=CropFlip(dataset.mean, dataset.std, padding=1))
    for epoch in range(3):
        lengths = [[len(labels) for _, labels in loader] for loader in ranks]
        assert lengths == [[2, 2, 2, 2], [2, 2, 2, 1], [2, 2, 2, 1], [2, 2, 2, 1]]
        assert {loader.epoch for loader in ranks} == {epoch + 1}


def test_partial_leaves_no_rank_without_a_sample(make_dataset):
    dataset = make_dataset(26)  # two samples are left over for four ranks: the batch before takes them
    ranks = loaders(dataset, 4, 2, tail="partial")
    assert [[len(labels) for _, labels in loader] for loader in ranks] == [[2, 2, 3], [2, 2, 3], [2, 2, 2], [2, 2, 2]]
    assert {loader.steps_per_epoch for loader in ranks} == {3}
    with pytest.raises(ValueError, match="26 samples are fewer than the 27 ranks"):
        Loader(dataset, 1, num_workers=27, tail="partial")


def test_partial_goes_on_where_more_ranks_than_samples_are_left(make_dataset):
    dataset = make_dataset(23)
    state = Loader(dataset, 3, num_workers=2, tail="partial", seed=5).state_dict() | {"samples_consumed": 18}
    ranks = loaders(dataset, 8, 1, tail="partial", seed=5)
    for loader in ranks:
        loader.load_state_dict(state)
    first = [len(next(loader.endless())[1]) for loader in ranks]
    assert sum(first) == 5 + 8
    assert {loader.samples_consumed for loader in ranks} == {18 + 13}


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 8])
def test_carry_gives_every_sample_once_per_epoch(make_dataset, num_workers):
    n = 101
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
    with pytest.raises(ValueError, match="saved with order global, this loader has block"):
        Loader(dataset, 4, order="block").load_state_dict(state)
    with pytest.raises(ValueError, match="saved with tail carry, this loader has partial"):
        Loader(dataset, 4, tail="partial").load_state_dict(state)
    blocked = Loader(dataset, 4, order="block")
    with pytest.raises(ValueError, match="saved with streams 2, this loader has 1"):
        blocked.load_state_dict(blocked.state_dict() | {"streams": 2})
    with pytest.raises(ValueError, match="saved with window 9, this loader has 8"):
        blocked.load_state_dict(blocked.state_dict() | {"window": 9})
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
        ({"threads": 0}, "threads is 0"),
        ({"order": "sorted"}, "order is 'sorted'"),
        ({"crop": RandomResizedCrop(8)}, "crop is for JPEGs"),
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

    next(iter(Loader(dataset, 5, transform=transform, threads=2)))
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

    batches = Loader(make_dataset(50), 4, transform=transform, threads=1).endless()
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


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_batches_do_not_depend_on_the_number_of_threads(make_dataset, threads):
    dataset = make_dataset(101, num_shards=2)

    def batches(threads):
        def transform(images, keys):
            time.sleep(float(keys[0] % 7) / 2000)  # some batches take longer than others
            return crop_flip(images, keys)

        crop_flip = CropFlip(dataset.mean, dataset.std, padding=2)
        mix = MixUp(0.4, dataset.num_classes)
        loader = Loader(dataset, 4, transform=transform, mix=mix, threads=threads, prefetch=5)
        return list(islice(loader.endless(), 40))

    for (images, labels), (expected_images, expected_labels) in zip(batches(threads), batches(1), strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


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


def test_replacement_follows_its_draws(make_dataset):
    dataset = make_dataset(50)
    batches = global_batches([Loader(dataset, 10, order="replacement", seed=3)], 10).reshape(2, 50)
    for epoch in range(2):
        np.testing.assert_array_equal(batches[epoch], dataset.index[replacement_draws(3, epoch, 50)])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_streamed_data_come_in_block_order_and_are_announced(make_dataset, tmp_path, monkeypatch, num_workers):
    make_dataset(300, num_shards=2)
    dataset = ShardedDataset(tmp_path, storage="stream")
    announced, taken = [], []
    take, read_ahead = dataset.take, dataset.read_ahead
    monkeypatch.setattr(dataset, "take", lambda rows, out: (taken.append(rows), take(rows, out))[1])
    monkeypatch.setattr(dataset, "read_ahead", lambda rows: (announced.append(rows), read_ahead(rows))[1])
    loader = Loader(dataset, 5, num_workers=num_workers, threads=1)
    order = EpochOrder("block", 0, 300, block_starts=dataset.block_starts)
    assert order.window_samples == 4 * 8 * 4
    assert loader.state_dict()["order"] == "block"
    seen = np.concatenate([source_index(images) for images, _ in islice(loader.endless(), 10)])
    np.testing.assert_array_equal(seen, dataset.index[order(0)[: 10 * 5 * num_workers : num_workers]])
    ahead = sum(map(len, announced)) - sum(map(len, taken))
    assert ahead >= 128 / num_workers - 5
    np.testing.assert_array_equal(np.concatenate(announced)[: 10 * 5], np.concatenate(taken)[: 10 * 5])
    dataset.close()


def test_streamed_data_are_evaluated_in_order(make_dataset, tmp_path):
    make_dataset(300, num_shards=2)
    dataset = ShardedDataset(tmp_path, storage="stream")
    seen = [source_index(images) for images, _ in evaluation_batches(dataset, 7, rank=1, num_workers=3)]
    np.testing.assert_array_equal(np.concatenate(seen), dataset.index[100:200])
    dataset.close()


def test_order_of_streamed_data_that_are_not_shuffled_must_be_chosen(make_dataset, tmp_path):
    make_dataset(20)
    dataset = ShardedDataset(tmp_path, storage="stream")
    dataset.shuffled = False
    with pytest.raises(ValueError, match="do not lie in random order"):
        Loader(dataset, 4)
    Loader(dataset, 4, order="block")
    dataset.close()


def test_no_thread_or_file_is_left_after_many_epochs(make_dataset):
    dataset = make_dataset(10)
    loader = Loader(dataset, 4, threads=3, transform=Normalize(dataset.mean, dataset.std))
    for _ in loader:
        pass
    assert wait_for_no_threads()
    files = len(os.listdir("/proc/self/fd"))
    for epoch in range(200):
        for _ in loader:
            if epoch % 3 == 0:
                break
        for _ in evaluation_batches(dataset, 4, threads=2):
            pass
    gc.collect()
    assert wait_for_no_threads()
    assert len(os.listdir("/proc/self/fd")) == files


def test_torch_keeps_its_threads_everywhere_else(make_dataset):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside = []
        loader = Loader(
            make_dataset(20), 4, transform=lambda images, keys: inside.append(torch.get_num_threads()) or images
        )
        for _ in loader:
            pass
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (set(inside), torch.get_num_threads(), later) == ({1}, 3, [3])
    finally:
        torch.set_num_threads(before)


def jobs_of(parts, delays=(0.0,), log=None):
    """Job i has some parts, each of which notes (i, part) and takes its time, and gives i with what was noted."""
    delay = itertools.cycle(delays)

    def job(i):
        noted = []

        def part(number, seconds):
            def do():
                time.sleep(seconds)
                noted.append(number)
                if log is not None:
                    log.append((i, number))

            return do

        return Job([part(number, next(delay)) for number in range(parts)], lambda: (i, sorted(noted)))

    return map(job, itertools.count())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 4])
def test_jobs_give_their_items_in_order(threads, depth):
    items = prefetch(jobs_of(3, delays=(0.003, 0, 0.001, 0, 0.002)), depth, threads=threads)
    assert list(islice(items, 50)) == [(i, [0, 1, 2]) for i in range(50)]


def test_work_stops_when_the_consumer_does():
    log = []
    items = prefetch(jobs_of(1, log=log), 3, threads=2)
    next(items)
    deadline = time.monotonic() + 10
    while len(log) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert sorted(i for i, _ in log) == [0, 1, 2, 3, 4]  # one handed out, three ahead, one more that is being prepared
    for expected in range(1, 20):
        assert next(items) == (expected, [0])
    items.close()
    assert wait_for_no_threads()


def test_all_threads_work_on_the_item_that_is_wanted():
    barrier = threading.Barrier(4, timeout=10)
    items = prefetch(iter([Job([barrier.wait] * 4, lambda: "done")]), 1, threads=4)
    assert list(items) == ["done"]


@pytest.mark.parametrize("where", ["plan", "part", "finish", "initialize"])
@pytest.mark.parametrize("threads", [1, 4])
def test_errors_come_after_the_items_before_them(where, threads):
    def fail():
        raise ZeroDivisionError(f"in the {where}")

    def plan():
        yield Job([lambda: None], lambda: 0)
        yield Job([lambda: time.sleep(0.05)], lambda: 1)
        if where == "plan":
            fail()
        yield Job([lambda: None, fail if where == "part" else lambda: None], fail if where == "finish" else lambda: 2)
        yield Job([lambda: None], lambda: 3)

    items = prefetch(plan(), 5, threads=threads, initialize=fail if where == "initialize" else None)
    if where != "initialize":
        assert list(islice(items, 2)) == [0, 1]
    with pytest.raises(ZeroDivisionError, match=f"in the {where}"):
        next(items)
    assert list(items) == []
    assert wait_for_no_threads()


def test_a_stream_with_too_little_room_is_said(make_dataset, monkeypatch):
    dataset = make_dataset(101, storage="stream")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loader(dataset, 8)
    monkeypatch.setattr(ShardedDataset, "stream_bytes", property(lambda _: 2 * 101 * 24 // 2 - 1))
    with pytest.warns(UserWarning, match="two windows of the streamed data set"):
        Loader(dataset, 8, num_workers=2)


@pytest.mark.parametrize("order", ["global", "replacement"])
def test_a_slow_order_of_streamed_data_is_said(make_dataset, monkeypatch, order):
    dataset = make_dataset(101, storage="stream")
    monkeypatch.setattr(ShardedDataset, "stream_bytes", property(lambda _: 101 * 24))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loader(dataset, 8, order=order)
    monkeypatch.setattr(ShardedDataset, "stream_bytes", property(lambda _: 101 * 24 - 1))
    with pytest.warns(
        UserWarning, match=rf"order='{order}' reads a block for almost every sample.*choose order='block'"
    ):
        Loader(dataset, 8, order=order)


@pytest.mark.parametrize("consumed", [-1, 1.5, "3", None])
def test_states_without_a_usable_cursor_are_refused(make_dataset, consumed):
    loader = Loader(make_dataset(20), 4)
    state = loader.state_dict()
    for broken in (state | {"samples_consumed": consumed}, {k: v for k, v in state.items() if k != "samples_consumed"}):
        with pytest.raises(ValueError, match="the loader's state has samples_consumed"):
            loader.load_state_dict(broken)
    loader.load_state_dict(state | {"samples_consumed": np.int64(8)})
    assert loader.samples_consumed == 8


@pytest.mark.parametrize("name", ["batch_size", "rank", "num_workers"])
def test_counts_must_be_integers(make_dataset, name):
    with pytest.raises(ValueError, match=rf"{name} is 1\.5; it must be an integer"):
        Loader(make_dataset(20), **({"batch_size": 4, "num_workers": 3} | {name: 1.5}))
