"""Whatever manifest.json holds: the data set that was written, or one error that names the file."""

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvdlocal.data import ShardedDataset, ShardWriter
from hvdlocal.data.format.manifest import Manifest, sha256_of_json

FUZZ = settings(max_examples=150, deadline=None)
IMAGES = np.random.RandomState(0).randint(0, 256, (70, 4, 3, 2)).astype(np.uint8)
CONTENT = ("format", "version", "split", "shape", "classes", "seed", "mean", "std", "shards", "kind", "fingerprint")
"""What must be as it was written; the rest is for people, or counted anew."""

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from([10**400, -1, 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Directory of a data set of two shards, the path of its manifest, and what it holds."""
    directory = tmp_path_factory.mktemp("data")
    ShardWriter(directory, "train", classes=["a", "b"], num_shards=2).write(IMAGES, np.arange(70) % 2)
    path = directory / "train" / "manifest.json"
    raw = path.read_bytes()
    yield directory, path, raw
    path.write_bytes(raw)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The same with the fingerprint that belongs to it: not damage, but another writer's mistake, or malice."""
    covered = {
        key: copy.deepcopy(content[key]) for key in CONTENT if key not in ("kind", "fingerprint") and key in content
    }
    for shard in covered["shards"] if isinstance(covered.get("shards"), list) else []:
        if isinstance(shard, dict):
            shard.pop("bytes", None)
    return content | {"fingerprint": sha256_of_json(covered)}


def refused(directory, path, raw) -> bool:
    """Whether the data set is refused, which must name the manifest or a shard beside it; else it must be the one written."""
    path.write_bytes(raw)
    try:
        with ShardedDataset(directory) as dataset:
            dataset.verify()
            assert sorted(dataset.take(np.arange(70)).reshape(70, -1).tolist()) == sorted(
                IMAGES.reshape(70, -1).tolist()
            )
            return False
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    assert str(path.parent) in message
    assert "\n" not in message
    return True


@FUZZ
@given(st.binary(max_size=300))
@example(b"[" * 100_000)
@example(b"9" * 5_000)
def test_any_bytes(split, content):
    directory, path, _ = split
    assert refused(directory, path, content)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3), st.integers(0, 10**6))
def test_flipped_bits_and_a_lost_end(split, flips, length):
    directory, path, raw = split
    content = bytearray(raw)
    for place, bits in flips:
        content[place % len(raw)] ^= bits
    refused(directory, path, bytes(content))
    assert refused(directory, path, raw[: length % (len(raw) - 2)])  # the last two bytes are "}" and a line's end


@FUZZ
@given(st.sampled_from(CONTENT), values)
def test_another_value_without_its_fingerprint(split, key, value):
    directory, path, raw = split
    content = json.loads(raw)
    assert refused(directory, path, json.dumps(content | {key: value}).encode()) or value == content[key]


@FUZZ
@given(st.sampled_from([key for key in CONTENT if key != "fingerprint"]), values)
@example("shape", [])
@example("shards", [])
@example("shards", [{"\n": None}])
@example("mean", ["x", "y"])
@example("mean", [float("nan"), 0.5])
@example("std", [0.5])
@example("classes", [1, 2])
@example("seed", [1, 2])
def test_another_value_with_its_fingerprint(split, key, value):
    directory, path, raw = split
    content = json.loads(raw)
    changed = sealed(content | {key: value})
    if not refused(directory, path, json.dumps(changed).encode()):
        assert key in ("mean", "std") or value == content[key]


@FUZZ
@given(st.sampled_from(["file", "num_samples", "bytes", "sha256"]), values)
@example("file", "/etc/passwd")
@example("file", "../train/train-00000-of-00002.h5")
@example("file", "train-00001-of-00002.h5")
@example("file", "a\0b")
@example("file", "..")
@example("num_samples", 10**30)
@example("num_samples", True)
@example("bytes", -1)
def test_another_value_of_a_shard(split, key, value):
    directory, path, raw = split
    content = json.loads(raw)
    before = content["shards"][0][key]
    content["shards"][0][key] = value
    assert refused(directory, path, json.dumps(sealed(content)).encode()) or value == before


def test_a_shard_twice(split):
    _, path, raw = split
    content = json.loads(raw)
    content["shards"] *= 2
    path.write_text(json.dumps(sealed(content)))
    with pytest.raises(ValueError, match="it names a shard twice"):
        Manifest.load(path)


def test_the_seal_of_these_tests_is_the_writer_s(split):
    content = json.loads(split[2])
    assert sealed(content) == content
