"""Streams of tokens are written as they are, once, and refused where they are none."""

import json

import numpy as np
import pytest
import torch

from hvdlocal.data import ShardedDataset, TokenWriter


def write(directory, tokens, token_bytes=None, block=8, **options):
    lengths = np.ones(300, int) if token_bytes is None else token_bytes
    return TokenWriter(directory, "train", **options).write(tokens, lengths, block=block)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_token_is_kept(tmp_path, dtype, num_shards):
    tokens = (np.arange(5000) * 7 % 250).astype(dtype)
    manifest = write(tmp_path, tokens, num_shards=num_shards)
    assert manifest.facts == {"dtype": np.dtype(dtype).name, "vocabulary": 300, "num_tokens": 5000, "block": 8}
    assert manifest.contents == "5000 tokens"
    dataset = ShardedDataset(tmp_path)
    windows = dataset.take(np.arange(len(dataset)))
    assert windows.dtype == dtype
    np.testing.assert_array_equal(windows[:, :8].ravel(), tokens[: len(dataset) * 8])


def test_the_bytes_of_the_text_are_added_up(tmp_path):
    token_bytes = np.arange(300) % 5
    tokens = (np.arange(2000) * 7 % 300).astype(np.uint16)
    manifest = write(tmp_path, tokens, token_bytes, num_shards=2)
    assert manifest.statistics == {"text_bytes": int(token_bytes[tokens].sum())}
    np.testing.assert_array_equal(ShardedDataset(tmp_path).tables["token_bytes"], token_bytes)


def test_a_memory_map_is_read_lazily(tmp_path):
    np.arange(5000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    stream = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    write(tmp_path / "out", stream % 300)
    assert len(ShardedDataset(tmp_path / "out")) == 5000 // 8 - 1


def test_the_same_stream_is_written_once(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16) % 300
    write(tmp_path, tokens)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    write(tmp_path, tokens)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    for other in (tokens[::-1].copy(), tokens.astype(np.uint32)):
        with pytest.raises(FileExistsError, match="already holds a different data set"):
            write(tmp_path, other)
    with pytest.raises(FileExistsError, match="already holds a different data set"):
        write(tmp_path, tokens, np.full(300, 2))


def test_a_stream_of_another_length_is_no_edit_of_the_manifest(tmp_path):
    from hvdlocal.data.format.manifest import Manifest

    write(tmp_path, np.zeros(1000, np.uint8))
    path = tmp_path / "train" / "manifest.json"
    content = json.loads(path.read_text())
    content["num_tokens"] = 2000
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not match its fingerprint"):
        Manifest.load(path)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (np.zeros(100, np.int64), {}, "tokens are int64; one of uint8, uint16, uint32 is needed"),
        (np.zeros(100), {}, "tokens are float64"),
        (np.zeros((10, 10), np.uint8), {}, r"tokens are uint8 \(10, 10\); a stream has one axis"),
        (np.zeros(8, np.uint8), {}, "there are 8 tokens, fewer than a block of 8 and the one after it"),
        ([1, 2, 3] * 100, {}, "tokens are a list; an array of uint8, uint16, uint32 is needed, such as np.asarray"),
        (b"text" * 100, {}, "tokens are a bytes; an array"),
        (None, {}, "tokens are a NoneType; an array"),
        (torch.zeros(100, dtype=torch.uint8), {}, "tokens are a Tensor; an array"),
        (torch.zeros(100, dtype=torch.int64), {}, "tokens are a Tensor; an array"),
        (np.zeros(100, np.uint8), {"block": 0}, "block=0: a block is a whole number of tokens, at least 1"),
        (np.zeros(100, np.uint8), {"block": None}, "block=None: a block is a whole number"),
        (np.zeros(100, np.uint8), {"block": 64.5}, r"block=64\.5: a block is a whole number"),
        (np.zeros(100, np.uint8), {"block": 8.0}, r"block=8\.0: a block is a whole number"),
        (np.zeros(100, np.uint8), {"block": "8"}, "block='8': a block is a whole number"),
        (np.zeros(100, np.uint8), {"block": True}, "block=True: a block is a whole number"),
        (np.zeros(100, np.uint8), {"num_shards": 2}, "1 rows of 256 tokens cannot fill 2 shards"),
        (np.full(100, 300, np.uint16), {}, "token 300 at position 0 is not in the vocabulary of 300"),
        (np.zeros(100, np.uint8), {"token_bytes": [1.5]}, "token_bytes must be integers"),
        (np.zeros(100, np.uint8), {"token_bytes": [-1]}, "token_bytes must be integers"),
        (np.zeros(100, np.uint8), {"token_bytes": []}, "token_bytes must be integers"),
    ],
)
def test_refusals(tmp_path, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, tokens, **options)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_block_may_be_an_integer_of_numpy(tmp_path):
    assert write(tmp_path, np.zeros(100, np.uint8), block=np.int64(8)).facts["block"] == 8
