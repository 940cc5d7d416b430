"""One class and its entry in the list are a kind: it is written, verified, opened and read in batches like the others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hvdlocal.data import EpochSampler, Loader, ShardedDataset, TorchDataset, evaluation_batches, verify
from hvdlocal.data.format.manifest import Manifest, ShardEntry
from hvdlocal.data.kinds import KINDS
from hvdlocal.data.kinds.base import Assembly, Column, Kind, timed, units_of
from hvdlocal.data.permutations import pre_shuffle
from hvdlocal.data.write.shard_writer import write_shard
from hvdlocal.data.write.split_writer import SplitWriter
from hvdlocal.data.write.staging import Receipt

N = 41


class Walks(Kind):
    """Walks of `steps` steps, float32, with the sum of all steps as a statistic; a batch is (walks, epochs)."""

    name = "walks"
    facts = ("steps",)
    statistics = ("sum",)
    per_sample = ("index",)

    def sound(self, facts):
        return {"steps": type(facts["steps"]) is int and facts["steps"] > 0, "sum": type(facts["sum"]) is float}

    def least_bytes(self, facts):
        return 4 * facts["steps"]

    def combine(self, parts):
        return {"sum": float(sum(parts))}

    def tables(self, facts, samples):
        return {"index": ("<i8", (samples,)), "crc32": ("<u4", (-(-samples // 8),))}

    def columns(self, facts, samples, tables):
        return [Column("walks", np.dtype("<f4"), (samples, facts["steps"]), units_of(samples, 8))]

    def take(self, samples, rows, out=None):
        out = np.empty((len(rows), samples.facts["steps"]), np.float32) if out is None else out
        samples.gather(rows, out)
        return out

    def batch(self, samples, selection, crop, empty):
        walks = empty((len(selection.samples), samples.facts["steps"]), np.float32)

        def read():
            samples.gather(selection.samples, walks.numpy())
            return walks.numel() * 4

        return Assembly([timed(read)], lambda: (walks, torch.from_numpy(selection.epochs)))


class WalkWriter(SplitWriter):
    """Writes walks."""

    def write(self, walks):
        draft = self._draft("walks", {"steps": walks.shape[1]}, {"source": "a test"})

        def write(path, name, rows):
            blocks = (walks[rows[start : start + 8]] for start in range(0, len(rows), 8))
            sha256 = write_shard(path, draft, len(rows), [blocks], {"index": rows})
            return Receipt(ShardEntry(name, len(rows), path.stat().st_size, sha256), float(walks[rows].sum()))

        return self._write_split(draft, len(walks), write, {})


@pytest.fixture
def walks(monkeypatch, tmp_path):
    """The walks of a data set under tmp_path, whose kind is in the list: step s of walk w is 100 w + s."""
    monkeypatch.setitem(KINDS, "walks", Walks())
    walks = (100 * np.arange(N)[:, None] + np.arange(7)).astype(np.float32)
    WalkWriter(tmp_path, "train", num_shards=3, seed=5).write(walks)
    return walks


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
def test_it_is_read(walks, tmp_path: Path, storage):
    dataset = ShardedDataset(tmp_path, storage=storage)
    assert (dataset.kind, len(dataset), dataset.labels, dataset.shape, dataset.classes) == ("walks", N, None, None, ())
    assert dataset.facts == {"steps": 7, "sum": walks.sum()}
    np.testing.assert_array_equal(dataset.index, pre_shuffle(5, N))
    np.testing.assert_array_equal(dataset.take([3, 3, 40]), walks[dataset.index[[3, 3, 40]]])
    (batch, epochs), *_ = evaluation_batches(dataset, N)
    np.testing.assert_array_equal(batch.numpy(), walks[dataset.index])
    assert epochs.tolist() == [0] * N
    dataset.close()


def test_every_sample_comes_once_in_each_epoch(walks, tmp_path):
    dataset = ShardedDataset(tmp_path)
    loader = Loader(dataset, 5, tail="partial", seed=2)
    for epoch in range(2):
        batches = list(loader)
        assert sorted(torch.cat([walk[:, 0] for walk, _ in batches]).tolist()) == walks[:, 0].tolist()
        assert {int(one) for _, epochs in batches for one in epochs} == {epoch}


def test_torch_s_loader_gives_the_same(walks, tmp_path):
    dataset = ShardedDataset(tmp_path)
    loader = Loader(dataset, 5, seed=2, tail="drop")
    sampler = EpochSampler(dataset, 5, seed=2, tail="drop")
    for epoch in range(2):
        sampler.set_epoch(epoch)
        theirs = list(torch.utils.data.DataLoader(TorchDataset(dataset), 5, sampler=sampler))
        torch.testing.assert_close(theirs, [list(batch) for batch in loader])


def test_damage_is_named(walks, tmp_path):
    manifest = Manifest.load(tmp_path / "train" / "manifest.json")
    path = tmp_path / "train" / manifest.shards[1].file
    raw = bytearray(path.read_bytes())
    place = raw.index(walks[ShardedDataset(tmp_path).index[13 + 9]].tobytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"is damaged in samples 8\.\.13"):
        verify(tmp_path)


def test_a_manifest_of_a_kind_that_is_not_in_the_list(walks, tmp_path, monkeypatch):
    monkeypatch.delitem(KINDS, "walks")
    with pytest.raises(ValueError, match="its kind 'walks' is none of images, jpeg"):
        ShardedDataset(tmp_path)
