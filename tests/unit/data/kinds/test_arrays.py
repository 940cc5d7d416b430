"""Named arrays: the same numbers from every storage, in every type, and what is refused."""

import copy
import json
import math
import pickle

import h5py
import numpy as np
import pytest
import torch

from hvdlocal import ArrayWriter
from hvdlocal.data import EpochSampler, Loader, ShardedDataset, TorchDataset, evaluation_batches, verify
from hvdlocal.data.format.manifest import sha256_of_json
from hvdlocal.data.kinds.arrays import DTYPES, is_array_name
from hvdlocal.data.permutations import pre_shuffle

N = 103
TENSORS = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}


@pytest.fixture
def fields():
    """Sample i of "density" is full of i + 0.5, of "counts" of i, of "flag" whether i is odd; "energy" is 10 i."""
    i = np.arange(N)
    return {
        "density": np.broadcast_to((i + 0.5).astype(np.float32)[:, None, None, None], (N, 2, 3, 5)).copy(),
        "grid/counts": np.broadcast_to(i.astype(np.uint16)[:, None], (N, 7)).copy(),
        "flag": i % 2 == 1,
        "energy": (10.0 * i).astype(np.float64),
    }


ROLES = {"inputs": ["density", "grid/counts"], "targets": ["energy", "flag"]}


@pytest.fixture
def dataset_of(tmp_path, fields, monkeypatch):
    """Writes the fields in units of 4 samples, and opens them."""
    monkeypatch.setattr("hvdlocal.data.kinds.arrays._UNIT_BYTES", 4 * 143)

    def make(num_shards=1, seed=0, **reading):
        ArrayWriter(tmp_path, "train", **ROLES, num_shards=num_shards, seed=seed).write(fields)
        return ShardedDataset(tmp_path, **reading)

    return make


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_storage_gives_the_numbers_that_were_written(dataset_of, fields, storage, num_shards):
    dataset = dataset_of(num_shards, 7, storage=storage)
    assert (dataset.kind, len(dataset), dataset.storage, dataset.labels) == ("arrays", N, storage, None)
    assert (dataset.shape, dataset.classes, dataset.num_bytes) == (None, (), N * (120 + 14 + 8 + 1))
    np.testing.assert_array_equal(dataset.index, pre_shuffle(7, N))
    rows = np.array([5, 102, 0, 5, 77])
    taken = dataset.take(rows)
    assert list(taken) == [*ROLES["inputs"], *ROLES["targets"]]
    for name, values in taken.items():
        assert values.dtype == fields[name].dtype
        np.testing.assert_array_equal(values, fields[name][dataset.index[rows]])
    (inputs, targets), *_ = evaluation_batches(dataset, N)
    for name in ROLES["inputs"]:
        np.testing.assert_array_equal(inputs[name].numpy(), fields[name][dataset.index])
    for name in ROLES["targets"]:
        np.testing.assert_array_equal(targets[name].numpy(), fields[name][dataset.index])
    dataset.verify()
    dataset.close()


def test_take_fills_what_is_given(dataset_of, fields):
    dataset = dataset_of()
    out = {name: np.empty((3, *values.shape[1:]), values.dtype) for name, values in fields.items()}
    assert dataset.take([1, 2, 3], out)["energy"] is out["energy"]
    np.testing.assert_array_equal(out["energy"], fields["energy"][dataset.index[1:4]])
    with pytest.raises(ValueError, match=r"out\['energy'\] is float32 \(3,\); C-contiguous float64 \(3,\) is needed"):
        dataset.take([1, 2, 3], out | {"energy": np.empty(3, np.float32)})


def test_one_array_of_a_role_is_a_tensor(tmp_path, fields):
    ArrayWriter(tmp_path, "train", inputs=["density"], targets=["energy"]).write(fields)
    for inputs, targets in Loader(ShardedDataset(tmp_path), 10, tail="partial"):
        assert (inputs.dtype, inputs.shape[1:], targets.dtype, targets.shape[1:]) == (
            torch.float32,
            (2, 3, 5),
            torch.float64,
            (),
        )
        torch.testing.assert_close(10 * (inputs[:, 0, 0, 0].double() - 0.5), targets)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("storage", ["mmap", "stream"])
def test_every_sample_comes_once_in_each_epoch(dataset_of, storage, num_workers):
    dataset = dataset_of(3, storage=storage)
    for _ in range(2):
        seen = []
        for rank in range(num_workers):
            loader = Loader(dataset, 4, rank=rank, num_workers=num_workers, tail="partial", seed=1)
            for inputs, targets in loader:
                assert (inputs["grid/counts"][:, 6] * 10 == targets["energy"]).all()
                seen += targets["energy"].tolist()
        assert sorted(seen) == [10.0 * i for i in range(N)]
    dataset.close()


def test_a_loader_resumes_in_the_middle_of_an_epoch(dataset_of):
    dataset = dataset_of()
    whole = [targets["energy"] for _, targets in Loader(dataset, 10, seed=4)]
    loader, again = Loader(dataset, 10, seed=4), Loader(dataset, 10, seed=4)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    again.load_state_dict(loader.state_dict())
    torch.testing.assert_close([targets["energy"] for _, targets in again], whole[3:])


def test_torch_s_loader_gives_the_same(dataset_of):
    dataset = dataset_of()
    sampler = EpochSampler(dataset, 10, seed=2, tail="drop")
    theirs = torch.utils.data.DataLoader(TorchDataset(pickle.loads(pickle.dumps(dataset))), 10, sampler=sampler)
    for (inputs, targets), (expected, expected_targets) in zip(
        theirs, Loader(dataset, 10, seed=2, tail="drop"), strict=True
    ):
        torch.testing.assert_close(inputs, expected)
        torch.testing.assert_close(targets, expected_targets)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_reaches_torch_without_loss(tmp_path, dtype, order):
    plain = np.dtype(dtype)
    if plain.kind == "f":
        numbers = np.array([0, -1.5, np.finfo(plain).max, np.finfo(plain).tiny], plain)
    elif plain.kind == "b":
        numbers = np.array([True, False, False, True])
    else:
        most = min(np.iinfo(plain).max, 2**63 - 1)
        numbers = np.array([0, np.iinfo(plain).min, most, most - 1], plain)
    source = numbers.astype(plain.newbyteorder(order)).reshape(4, 1)
    ArrayWriter(tmp_path, "train", inputs=["x"], targets=["y"]).write({"x": source, "y": np.arange(4)})
    dataset = ShardedDataset(tmp_path)
    ((x, y),) = evaluation_batches(dataset, 4)
    assert x.dtype == TENSORS.get(dtype, torch.from_numpy(np.empty(0, plain)).dtype)
    assert x[:, 0].tolist() == numbers[y.numpy()].tolist()
    assert dataset.take(np.arange(4))["x"].dtype == plain
    statistics = dataset.facts["statistics"]["x"]
    assert (statistics["min"], statistics["max"]) == (numbers.min(), numbers.max())


def test_unsigned_numbers_beyond_int64_are_refused(tmp_path):
    writer = ArrayWriter(tmp_path, "train", inputs=["x"], targets=["y"])
    with pytest.raises(ValueError, match=r"x holds 9223372036854775808, which no tensor of integers can have"):
        writer.write({"x": np.array([1, 2**63], np.uint64), "y": np.zeros(2)})


def test_the_manifest_states_what_a_task_can_standardise_by(dataset_of, tmp_path):
    statistics = dataset_of(3).facts["statistics"]
    uniform = (N * N - 1) / 12  # the variance of 0..N-1
    assert statistics["energy"]["mean"] == pytest.approx(10 * (N - 1) / 2, rel=1e-14)
    assert statistics["energy"]["std"] == pytest.approx(10 * math.sqrt(uniform), rel=1e-14)
    assert statistics["density"] == {
        "mean": pytest.approx(N / 2, rel=1e-14),
        "std": pytest.approx(math.sqrt(uniform), rel=1e-14),
        "min": 0.5,
        "max": N - 0.5,
        "nan": 0,
        "inf": 0,
    }
    assert statistics["flag"]["mean"] == pytest.approx(51 / N)
    content = json.loads((tmp_path / "train" / "manifest.json").read_text())
    assert content["arrays"][1] == {"name": "grid/counts", "role": "input", "dtype": "uint16", "shape": [7]}


def test_the_bytes_depend_on_the_content_alone(dataset_of, tmp_path, fields, monkeypatch):
    first = dataset_of(2)
    read = [path.read_bytes() for path in sorted((tmp_path / "train").iterdir())]
    monkeypatch.setattr("hvdlocal.data.write.array_writer._READ_BYTES", 1000)
    with h5py.File(tmp_path / "source.h5", "w") as source:
        for name, values in fields.items():
            big = values.astype(values.dtype.newbyteorder(">"))
            source.create_dataset(name, data=big, chunks=(9, *values.shape[1:]), compression="gzip")
        ArrayWriter(tmp_path / "again", "train", **ROLES, num_shards=2).write(source)
    assert [path.read_bytes() for path in sorted((tmp_path / "again" / "train").iterdir())] == read
    assert ShardedDataset(tmp_path / "again").fingerprint == first.fingerprint


def test_a_shard_is_read_with_h5py_alone(dataset_of, tmp_path, fields):
    dataset = dataset_of()
    (path,) = (tmp_path / "train").glob("*.h5")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["inputs/density"][:], fields["density"][file["index"][:]])
        np.testing.assert_array_equal(file["targets/flag"][:], fields["flag"][dataset.index])
        assert file["crc32"].shape == (4, 26)


@pytest.mark.parametrize("column", [0, 3])
def test_a_flipped_bit_is_named(dataset_of, tmp_path, column):
    dataset = dataset_of(2)
    extent = dataset._layouts[column].extents[1]
    raw = bytearray(extent.path.read_bytes())
    raw[extent.data_offset + 9 * dataset._layouts[column].sample_bytes] ^= 1
    extent.path.write_bytes(raw)
    for storage in ("ram", "mmap", "stream"):
        with pytest.raises(ValueError, match=rf"{extent.path.name} is damaged in samples 8\.\.11"):
            ShardedDataset(tmp_path, storage=storage).take([51 + 9])
    with pytest.raises(ValueError, match=r"is damaged in samples 8\.\.11"):
        verify(tmp_path)


def test_streamed_columns_have_blocks_of_the_same_samples(dataset_of, monkeypatch):
    monkeypatch.setattr("hvdlocal.data.read.storage.base.BLOCK_BYTES", 2000)
    dataset = dataset_of(2, storage="stream")
    starts = [layout.block_starts.tolist() for layout in dataset._layouts]
    assert starts == [[0, 16, 32, 51, 67, 83, 103]] * 4  # 16 samples of 143 bytes are the first whole units of 2,000
    assert dataset.block_starts.tolist() == starts[0]
    dataset.close()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([np.zeros(2), np.zeros(3)], "x is a list, whose samples may differ in shape"),
        (np.array([np.zeros(2), np.zeros(3)], object), "x is arrays of various lengths or objects, .*pad or cut"),
        (np.array(["a", "b"]), "x is text, .*number it"),
        (np.array([b"a", b"b"]), "x is text"),
        (np.zeros(2, complex), "x is complex numbers, .* write them as two channels"),
        (np.zeros(2, "M8[s]"), "x is dates"),
        (np.zeros(2, "m8[s]"), "x is spans of time"),
        (np.zeros(2, [("a", "f4")]), "records of several fields"),
        (np.zeros(2, np.longdouble), "x is float128, which torch has not got"),
        (torch.zeros(2, 3), "x is a Tensor of torch.float32: give a NumPy array, as x.numpy"),
        (
            np.ma.masked_array(np.zeros(2), [0, 1]),
            "x is a masked array, of which the masked numbers would be stored too",
        ),
        (np.float32(3), "x is a single value"),
        (np.zeros((0, 3)), r"x is an array of shape \(0, 3\), which is empty"),
        (np.zeros((2, 0)), r"x is an array of shape \(2, 0\), which is empty"),
        (np.zeros((3, 2)), "x has 3 samples and y has 2; every sample needs one of each"),
        (np.array([1, np.nan]), "x holds 1 NaN and 0 infinite numbers"),
        (np.array([-np.inf, np.inf]), "x holds 0 NaN and 2 infinite numbers"),
    ],
)
def test_what_is_no_array_of_samples_is_refused(tmp_path, x, message):
    with pytest.raises(ValueError, match=message) as raised:
        ArrayWriter(tmp_path, "train", inputs=["x"], targets=["y"]).write({"x": x, "y": np.zeros(2)})
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("*.h5"))


def test_numbers_that_are_not_finite_are_kept_knowingly(tmp_path):
    x = np.array([[1, np.nan], [3, np.inf], [np.nan, 5]])
    with pytest.warns(UserWarning, match="x holds 2 NaN and 1 infinite numbers, which are kept"):
        manifest = ArrayWriter(tmp_path, "train", inputs=["x"], targets=["y"], keep_nonfinite=True).write(
            {"x": x, "y": np.zeros(3)}
        )
    expected = {"mean": 3.0, "std": pytest.approx(math.sqrt(8 / 3)), "min": 1.0, "max": 5.0, "nan": 2, "inf": 1}
    assert manifest.statistics["statistics"]["x"] == expected
    dataset = ShardedDataset(tmp_path)
    np.testing.assert_array_equal(dataset.take([0, 1, 2])["x"], x[dataset.index])


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([], ["y"], r"inputs is \[\]; give a list of at least one name"),
        ("x", ["y"], "inputs is 'x'; give a list"),
        (["x"], ["x"], "'x' is named twice"),
        (["x"], ["x/y"], "'x/y' lies in 'x', which is an array itself and no group; rename one of them"),
        (["../x"], ["y"], r"'\.\./x' in inputs cannot be the name of an array"),
        (["x"], [""], "'' in targets cannot be the name of an array"),
        (["x"], [3], "3 in targets cannot be the name of an array"),
    ],
)
def test_names_that_cannot_be(tmp_path, inputs, targets, message):
    with pytest.raises(ValueError, match=message):
        ArrayWriter(tmp_path, "train", inputs=inputs, targets=targets)


def test_a_missing_array(tmp_path):
    with pytest.raises(ValueError, match="array 'y' is missing among x, z"):
        ArrayWriter(tmp_path, "train", inputs=["x"], targets=["y"]).write({"x": np.zeros(2), "z": np.zeros(2)})


NOT_COVERED = ("preparation", "plan", "num_samples", "fingerprint")  # by the fingerprint


def test_names():
    assert all(map(is_array_name, ["x", "fields/x", "Ω", "a b", "..x", "x.y"]))
    assert not any(map(is_array_name, ["", "/x", "x/", "a//b", ".", "..", "a/../b", "./x", "x\0", 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["arrays"][0].update(dtype="complex64"), "its arrays cannot be"),
        (lambda m: m["arrays"][0].update(shape=[2, 3, 0]), "its arrays cannot be"),
        (lambda m: m["arrays"][0].update(name="../x"), "its arrays cannot be"),
        (lambda m: m["arrays"][0].update(role="label"), "its arrays cannot be"),
        (lambda m: m["arrays"][0].pop("role"), "its arrays cannot be"),
        (lambda m: m.update(arrays=[]), "its arrays cannot be"),
        (lambda m: m.update(samples_per_checksum=0), "its samples_per_checksum cannot be 0"),
        (lambda m: m["statistics"].pop("flag"), "its statistics cannot be"),
        (lambda m: m["statistics"]["flag"].update(mean="x"), "its statistics cannot be"),
        (lambda m: m.pop("arrays"), "it lacks 'arrays'"),
        (lambda m: m["arrays"][0].update(dtype="float64"), "has facts_sha256 .* it is another data set's"),
    ],
)
def test_another_manifest(dataset_of, tmp_path, change, message):
    dataset_of()
    path = tmp_path / "train" / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    covered = copy.deepcopy({name: content[name] for name in content if name not in NOT_COVERED})
    for shard in covered["shards"]:
        del shard["bytes"]
    path.write_text(json.dumps(content | {"fingerprint": sha256_of_json(covered)}))
    with pytest.raises(ValueError, match=message):
        ShardedDataset(tmp_path)
