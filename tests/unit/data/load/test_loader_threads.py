"""The loader's threads: what they do, what reaches the consumer, and that none is left."""

import gc
import os
import subprocess
import sys
import threading
import time
from itertools import islice

import pytest
import torch
from loaders import wait_for_no_threads

from hvdlocal.data import CropFlip, Loader, Normalize, evaluation_batches
from hvdlocal.data.augment import MixUp


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
