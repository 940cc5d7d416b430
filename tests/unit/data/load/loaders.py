"""Loaders of several ranks in one process, and what they give."""

import threading
import time
from itertools import islice

import numpy as np

from hvdlocal.data import Loader


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


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "hvdlocal-prefetch"]


def wait_for_no_threads():
    deadline = time.monotonic() + 10
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not prefetch_threads()
