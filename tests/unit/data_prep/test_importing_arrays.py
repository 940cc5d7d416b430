"""`python -m data_prep arrays`: what is written of a user's arrays, and what is refused."""

import json

import h5py
import numpy as np
import pytest

from data_prep.__main__ import main
from hvdlocal.data import ShardedDataset

N = 120
RANDOM = np.random.default_rng(0)
FIELD = RANDOM.normal(size=(N, 6, 5, 4, 2)).astype(np.float32)
MASK = RANDOM.integers(0, 3, (N, 6)).astype(np.uint8)
ENERGY = np.arange(N) / 7


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs the command; returns its exit code and what it said on stderr."""

    def run(*arguments, inputs="field", targets="energy"):
        given = ["arrays", "--inputs", inputs, "--targets", targets, "--output", str(tmp_path / "out"), "--source"]
        return main([*given, *map(str, arguments)]), capsys.readouterr().err

    return run


def write(path, part=slice(None), **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("field", data=FIELD[part], **options)
        file["more/mask"] = MASK[part]
        file["energy"] = ENERGY[part]
    return path


def read(tmp_path, split="train"):
    """The arrays of a split, and the number of each sample in the source."""
    with ShardedDataset(tmp_path / "out", split) as data:
        return data.take(np.arange(len(data))), data.index


def manifest(tmp_path, split="train"):
    return json.loads((tmp_path / "out" / split / "manifest.json").read_text())


def test_two_inputs_of_three_files_in_shards(tmp_path, prepare):
    files = [write(tmp_path / "a.h5", slice(50)), write(tmp_path / "b.h5", slice(50, 90), chunks=(9, 6, 5, 4, 1))]
    np.savez_compressed(
        tmp_path / "c.npz", **{"field": FIELD[90:], "more/mask": MASK[90:], "energy": ENERGY[90:].astype(">f8")}
    )
    code, said = prepare(*files, tmp_path / "c.npz", "--shards", 3, "--verify", inputs="field,more/mask")
    assert code == 0
    assert f"{files[1]}: field is chunked or compressed: unpacked once\n" in said
    assert "there is no test split; --holdout or --test-source makes one\n" in said
    arrays, index = read(tmp_path)
    assert sorted(index) == list(range(N))
    for name, whole in (("field", FIELD), ("more/mask", MASK), ("energy", ENERGY)):
        np.testing.assert_array_equal(arrays[name], whole[index])
    assert [array["role"] for array in manifest(tmp_path)["arrays"]] == ["input", "input", "target"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train"]


def test_a_share_is_held_out_and_the_files_are_the_same_however_they_are_written(tmp_path, prepare):
    write(tmp_path / "a.h5", compression="gzip", chunks=(7, 6, 5, 4, 2))
    code, said = prepare(tmp_path / "a.h5", "--holdout", 0.1, "--seed", 5)
    assert code == 0
    assert f"test: 12 of {N} samples, held out at random by seed 5\n" in said
    found = {split: read(tmp_path, split) for split in ("train", "test")}
    assert [len(energies["energy"]) for energies, _ in found.values()] == [108, 12]
    together = np.concatenate([arrays["energy"] for arrays, _ in found.values()])
    np.testing.assert_array_equal(np.sort(together), ENERGY)
    assert np.ptp(found["test"][0]["energy"]) > 12 / 7, "no run of neighbours"
    assert manifest(tmp_path, "test")["preparation"]["holdout"] == {"share": 0.1, "seed": 5, "from": "train"}
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    next((tmp_path / "out" / "train").glob("*.h5")).unlink()
    write(tmp_path / "b.h5", slice(33))
    write(tmp_path / "c.h5", slice(33, N))
    assert prepare(tmp_path / "b.h5", tmp_path / "c.h5", "--holdout", 0.1, "--seed", 5)[0] == 0
    assert {path: path.read_bytes() for path in before} == before
    code, said = prepare(tmp_path / "a.h5", "--holdout", 0.2, "--seed", 5)
    assert code == 2
    assert "already holds a different data set" in said


def test_a_test_split_is_not_left_beside_a_training_split_that_contains_it(tmp_path, prepare):
    a, b = write(tmp_path / "a.h5"), write(tmp_path / "b.h5", slice(9))
    assert prepare(a, "--holdout", 0.2)[0] == 0
    code, said = prepare(a, "--overwrite")
    assert code == 2
    assert said.splitlines()[-1] == (
        f"data_prep: {tmp_path / 'out' / 'test'} was held out of an earlier train split, and the new one may contain its "
        "samples: remove it, hold out as before, or choose another --output"
    )
    assert len(read(tmp_path)[1]) == 96, "the training split is as it was"
    assert prepare(a, "--test-source", b, "--overwrite")[0] == 0
    assert prepare(b, "--overwrite")[0] == 0, "given test samples were held out of nothing"


def test_files_to_test_on(tmp_path, prepare):
    a, b = write(tmp_path / "a.h5", slice(100)), write(tmp_path / "b.h5", slice(100, N), compression="lzf")
    assert prepare(a, "--test-source", b)[0] == 0
    arrays, index = read(tmp_path, "test")
    np.testing.assert_array_equal(arrays["field"], FIELD[100 + index])
    assert len(read(tmp_path)[1]) == 100
    with h5py.File(b, "a") as file:
        del file["energy"]
        file["energy"] = ENERGY[100:].astype(np.float32)
    code, said = prepare(a, "--test-source", b, "--overwrite")
    assert code == 2
    assert "--test-source holds samples of field float32 (6, 5, 4, 2), energy float32 ()" in said
    assert said.count("\n") == 1


def test_files_that_are_both_to_train_on_and_to_test_on(tmp_path, prepare):
    a, b = write(tmp_path / "a.h5", chunks=(9, 6, 5, 4, 1)), write(tmp_path / "b.h5", slice(9))
    code, said = prepare(a, "--test-source", b, a)
    assert (code, said.count("\n")) == (2, 1)
    assert f"{a} is both to train on and to test on; name other files to test on, or hold a share out" in said
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_refused_or_kept(tmp_path, prepare):
    field = FIELD.copy()
    field[17, 0, 0, :2, 0] = np.nan
    field[99, 1, 0, 0, 0] = -np.inf
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["field"], file["energy"] = field, ENERGY
    code, said = prepare(tmp_path / "a.h5")
    assert code == 2
    counted = f"field holds 3 numbers that are not finite, in 2 samples, the first in sample 17 of {tmp_path / 'a.h5'}"
    assert said == f"data_prep: {counted}: mend or remove them, or keep them with --keep-nonfinite\n"
    assert not (tmp_path / "out").exists()
    code, said = prepare(tmp_path / "a.h5", "--keep-nonfinite")
    assert code == 0
    assert f"kept: {counted}\n" in said
    statistics = manifest(tmp_path)["statistics"]["field"]
    assert (statistics["nan"], statistics["inf"]) == (2, 1)
    arrays, index = read(tmp_path)
    np.testing.assert_array_equal(arrays["field"], field[index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "x"}, "a.h5 has no dataset /x; it has energy, field, more/mask"),
        ({"targets": "field"}, "field is named 2 times in inputs field and targets field; name every array once"),
        ({"targets": "more"}, "a.h5 has a group /more, which holds mask: name a data set in it"),
        ({"inputs": ""}, "inputs are missing and targets energy; name at least one array of each"),
    ],
)
def test_names_that_are_wrong(tmp_path, prepare, options, message):
    code, said = prepare(write(tmp_path / "a.h5"), **options)
    assert (code, said.count("\n")) == (2, 1)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_files_that_are_wrong(tmp_path, prepare):
    (tmp_path / "a.h5").write_text("field,energy\n")
    for path, message in (
        (tmp_path / "no.h5", "does not exist; name an HDF5 file of field, energy"),
        (tmp_path / "a.h5", "cannot be opened as HDF5"),
        (tmp_path, "is a directory; name the HDF5 files in it"),
    ):
        code, said = prepare(path)
        assert (code, said.count("\n")) == (2, 1)
        assert message in said
    for share in ("0", "1", "2"):
        code, said = prepare(write(tmp_path / "b.h5"), "--holdout", share)
        assert code == 2
        assert f"a share of {share} cannot be held out" in said


def test_the_output_is_used_by_one_process(tmp_path, prepare, monkeypatch):
    from hvdlocal.directory import Directory
    from hvdlocal.lock import hold

    monkeypatch.setattr("hvdlocal.lock.PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("data_prep.unpacked.hold", lambda directory, name: hold(directory, name, 0.1))
    (tmp_path / "out" / ".unpacked").mkdir(parents=True)
    with Directory(tmp_path / "out" / ".unpacked") as directory, hold(directory, ".lock"):
        code, said = prepare(write(tmp_path / "a.h5", chunks=(9, 6, 5, 4, 1)))
    assert code == 2
    assert ".unpacked is used by another process (process " in said
