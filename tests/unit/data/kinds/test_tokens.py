"""Windows of a stream of tokens: which of them an epoch has, in every storage, over any number of ranks."""

from itertools import islice

import h5py
import numpy as np
import pytest

from hvdlocal.data import (
    EpochSampler,
    Loader,
    ShardedDataset,
    TokenWriter,
    TorchDataset,
    evaluation_batches,
    verify,
)
from hvdlocal.data.kinds.tokens import IGNORED, offsets
from hvdlocal.data.read.storage import base

# (N, T): many windows, an odd block, one window and its shortest text, between one and two, a block of several rows
SIZES = [(5000, 64), (1000, 7), (65, 64), (100, 64), (128, 64), (129, 64), (3000, 700), (300, 1)]


@pytest.fixture
def make_stream(tmp_path):
    """Writes the tokens 0, 1, …, N − 1 with a block of T, so that a token tells its position, and opens them."""

    def make(n, prepared, num_shards=1, **reading):
        writer = TokenWriter(tmp_path, "train", num_shards=num_shards)
        writer.write(np.arange(n, dtype=np.uint32), np.ones(n, int), block=prepared)
        return ShardedDataset(tmp_path, **reading)

    return make


def gathered(batches):
    """All targets, in ascending order; on their way, inputs and targets are seen to be neighbours."""
    seen = [np.empty(0, np.int64)]
    for inputs, targets in batches:
        assert inputs.shape == targets.shape
        counted = targets != IGNORED
        assert (targets[counted] == inputs[counted] + 1).all()
        assert (targets[~counted] == IGNORED).all()
        seen.append(targets[counted].numpy())
    return np.sort(np.concatenate(seen))


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
@pytest.mark.parametrize(("n", "block"), SIZES)
def test_an_evaluation_predicts_every_token_once(make_stream, n, block, storage):
    dataset = make_stream(n, block, num_shards=min(2, -(-n // 256)), storage=storage)
    for ranks in (1, 3):
        seen = [gathered(evaluation_batches(dataset, 5, rank=rank, num_workers=ranks)) for rank in range(ranks)]
        np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(1, n))
    assert dataset.num_evaluated == -(-(n - 1) // block)
    dataset.close()


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
@pytest.mark.parametrize(("n", "block"), SIZES)
def test_an_epoch_has_neighbouring_windows_from_its_offset_on(make_stream, n, block, storage):
    dataset = make_stream(n, block, storage=storage)
    windows = max(n // block - 1, 1)
    assert len(dataset) == windows
    loader = Loader(dataset, 1, seed=3, tail="partial")
    for epoch in range(4):
        first = int(offsets(3, np.array([epoch]), n, block)[0])
        np.testing.assert_array_equal(gathered(loader), first + 1 + np.arange(windows * block))
    dataset.close()


def test_the_offset_is_uniform_and_a_function_of_seed_and_epoch():
    drawn = offsets(7, np.arange(6400), 10_000, 64)
    counts = np.bincount(drawn, minlength=64)
    assert len(counts) == 64
    assert counts.min() > 60  # of 100; five standard deviations are 50
    assert counts.max() < 150
    np.testing.assert_array_equal(offsets(7, np.array([5, 3]), 10_000, 64), drawn[[5, 3]])
    assert (offsets(8, np.arange(6400), 10_000, 64) != drawn).mean() > 0.9
    assert set(offsets(7, np.arange(500), 70, 64).tolist()) == set(range(6)), "all places where a window of 65 fits"


@pytest.mark.parametrize("order", ["global", "block"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_over_ranks_is_that_of_one(make_stream, ranks, order, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_BYTES", 1 << 14)
    dataset = make_stream(60_000, 64, num_shards=3)
    loaders = [Loader(dataset, 4, rank=r, num_workers=ranks, order=order, tail="partial") for r in range(ranks)]
    first = int(offsets(0, np.array([0]), 60_000, 64)[0])
    seen = np.sort(np.concatenate([gathered(loader) for loader in loaders]))
    np.testing.assert_array_equal(seen, first + 1 + np.arange(len(dataset) * 64))


def test_a_batch_across_the_edge_of_an_epoch_has_two_offsets(make_stream):
    dataset = make_stream(1000, 64)
    assert len(dataset) == 14
    loader = Loader(dataset, 10)
    batches = [targets[:, 0].numpy() - 1 for _, targets in islice(loader.endless(), 2)]
    first, second = offsets(0, np.array([0, 1]), 1000, 64)
    assert first != second
    np.testing.assert_array_equal(np.sort(np.concatenate([batches[0], batches[1][:4]])), first + 64 * np.arange(14))
    assert set((batches[1][4:] - second) % 64) == {0}


@pytest.mark.parametrize("after", [1, 9, 14, 30])
def test_a_loader_goes_on_at_any_step(make_stream, after):
    dataset = make_stream(1000, 64)
    whole = [inputs for inputs, _ in islice(Loader(dataset, 3, seed=5).endless(), 40)]
    loader = Loader(dataset, 3, seed=5)
    for _ in islice(loader.endless(), after):
        pass
    resumed = Loader(dataset, 3, seed=5)
    resumed.load_state_dict(loader.state_dict())
    for expected, (inputs, _) in zip(whole[after:], resumed.endless(), strict=False):
        assert (inputs == expected).all()


def test_a_state_belongs_to_a_block(make_stream):
    """Blocks of 251 and 300 cut 1,000 tokens into two windows each, at other places."""
    loader, other = Loader(make_stream(1000, 251), 1), Loader(make_stream(1000, 251, block=300), 1)
    assert loader.state_dict()["samples_per_epoch"] == other.state_dict()["samples_per_epoch"]
    message = "the loader's state was saved with block 251, this loader has 300; resume with the data set, block, seed"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(loader.state_dict())
    sampler = EpochSampler(make_stream(1000, 251, block=300), 1)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(EpochSampler(make_stream(1000, 251), 1).state_dict())


def test_no_windows_are_an_empty_array(make_stream):
    windows = make_stream(1000, 64).take([])
    assert (windows.shape, windows.dtype) == ((0, 65), np.uint32)
    out = np.empty((0, 65), np.uint32)
    assert make_stream(1000, 64).take([], out) is out


def test_take_gives_windows_from_0_on(make_stream):
    dataset = make_stream(1000, 64)
    windows = dataset.take([3, 0, 3])
    assert windows.dtype == np.uint32
    np.testing.assert_array_equal(windows, np.array([192, 0, 192])[:, None] + np.arange(65))
    out = np.empty((1, 65), np.uint32)
    assert dataset.take([13], out) is out
    with pytest.raises(ValueError, match=r"out is int64 \(1, 65\); uint32 \(1, 65\) is needed"):
        dataset.take([13], out.astype(np.int64))
    with pytest.raises(ValueError, match=r"indices 14\.\.14 leave the data set of 14 samples"):
        dataset.take([14])
    with pytest.raises(ValueError, match="samples of kind 'tokens' are not stored one by one: use take"):
        dataset.bytes_of(3)


def test_a_reader_may_choose_another_block(make_stream):
    dataset = make_stream(1000, 64, block=100)
    assert len(dataset) == 9
    assert next(iter(Loader(dataset, 2)))[0].shape == (2, 100)
    assert make_stream(1000, 64).fingerprint == dataset.fingerprint
    with pytest.raises(
        ValueError, match="block=1000: the text has 1000 tokens, and a block must be shorter; choose at most 999"
    ):
        make_stream(1000, 64, block=1000)
    assert make_stream(1000, 64, block=np.int64(100)).facts == dataset.facts
    for block, named in [(0, "0"), ("8", "'8'"), (64.5, r"64\.5"), (True, "True")]:
        with pytest.raises(ValueError, match=f"block={named}: a block is a whole number of tokens, at least 1"):
            make_stream(1000, 64, block=block)


def test_a_block_is_for_tokens(make_dataset):
    with pytest.raises(ValueError, match="block=64 is for tokens, but these samples are images; leave it out"):
        make_dataset(10, block=64)


def test_torch_gives_the_same_windows(make_stream):
    import torch

    dataset = make_stream(1000, 64)
    sampler = EpochSampler(dataset, 4, seed=2)
    loader = Loader(dataset, 4, seed=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        theirs = torch.utils.data.DataLoader(TorchDataset(dataset), 4, sampler=sampler)
        for ours, other in zip(loader, theirs, strict=True):
            assert all((mine == yours).all() for mine, yours in zip(ours, other, strict=True))


def test_what_is_stored(make_stream, tmp_path):
    make_stream(1000, 64, num_shards=2)
    files = sorted((tmp_path / "train").glob("*.h5"))
    stored = []
    for path in files:
        with h5py.File(path) as file:
            stored.append(file["tokens"][:])
            assert (file["token_bytes"][:] == 1).all()
    np.testing.assert_array_equal(np.concatenate(stored).ravel()[:1000], np.arange(1000))
    assert not np.concatenate(stored).ravel()[1000:].any()
    assert verify(tmp_path) == {"train": 4}


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
def test_damaged_tokens_are_never_read(make_stream, tmp_path, storage):
    make_stream(1000, 64)
    (path,) = (tmp_path / "train").glob("*.h5")
    with h5py.File(path) as file:
        offset = file["tokens"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset + 4 * 700] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged in samples 0\.\.3"):
        for _ in Loader(ShardedDataset(tmp_path, storage=storage), 2):
            pass
    with pytest.raises(ValueError, match="is damaged"):
        verify(tmp_path)


def test_a_streamed_text_is_read_ahead_where_its_windows_lie(make_stream, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_BYTES", 1 << 14)
    dataset = make_stream(60_000, 64, num_shards=2, storage="stream")
    announced, taken = [], []
    storage = dataset._storages[0]
    gather, read_ahead = storage.gather, storage.read_ahead
    monkeypatch.setattr(storage, "gather", lambda rows, out: (taken.append(rows), gather(rows, out))[1])
    monkeypatch.setattr(storage, "read_ahead", lambda rows: (announced.append(rows), read_ahead(rows))[1])
    for _ in islice(Loader(dataset, 8, order="auto").endless(), 200):
        pass
    assert set(np.concatenate(taken).tolist()) <= set(np.concatenate(announced).tolist())
    dataset.close()
