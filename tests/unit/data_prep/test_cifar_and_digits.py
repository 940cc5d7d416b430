import builtins
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep import cifar10, cifar100
from data_prep.__main__ import _num_shards, main
from data_prep.planar import PlanarImages
from data_prep.progress import ProgressBar
from hvdlocal.data import ShardedDataset

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "data-format.md"


@pytest.fixture
def digits(tmp_path):
    pytest.importorskip("sklearn")
    assert main(["digits", "--output", str(tmp_path / "digits"), "--shards", "2"]) == 0
    return tmp_path / "digits"


def test_digits(digits):
    from sklearn.datasets import load_digits

    train, test = ShardedDataset(digits), ShardedDataset(digits, "test")
    assert (len(train), len(test)) == (1501, 296)
    assert train.shape == (8, 8, 1)
    assert train.classes == tuple("0123456789")
    assert set(np.bincount(test.labels)) == {29, 30}
    stored = np.concatenate([train.take(np.arange(1501)), test.take(np.arange(296))])
    assert (stored.min(), stored.max()) == (0, 255)
    original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in stored) == sorted(image.tobytes() for image in original)


def test_digits_without_scikit_learn(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["digits", "--output", str(tmp_path)]) == 2
    assert "pip install 'hvdlocal[digits]'" in capsys.readouterr().err


def test_refusal_and_overwrite(digits, capsys):
    arguments = ["digits", "--output", str(digits), "--shards", "2"]
    assert main(arguments) == 0  # the same again is fine
    assert main([*arguments, "--seed", "5"]) == 2
    assert "already holds a different data set" in capsys.readouterr().err
    assert main([*arguments, "--seed", "5", "--overwrite"]) == 0


def test_verify(digits, capsys):
    assert main(["verify", str(digits)]) == 0
    assert "train: 1501 samples, all checksums agree" in capsys.readouterr().out
    path = digits / "test" / "test-00001-of-00002.h5"
    with h5py.File(path) as file:
        offset = file["images"].id.get_offset()
    with path.open("r+b") as file:
        file.seek(offset + 100 * 64)
        file.write(b"\xff" * 64)
    assert main(["verify", str(digits)]) == 2
    error = capsys.readouterr().err
    assert f"{path} is damaged in samples 64..127" in error
    assert error.count("\n") == 1
    assert main(["verify", str(digits / "nowhere")]) == 2
    assert "holds no finished data set" in capsys.readouterr().err


def test_the_example_of_the_format_document(digits, monkeypatch, capsys):
    example = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(digits / "train")
    exec(compile(example, DOCUMENT, "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    dataset = ShardedDataset(digits)
    assert lines[0] == f"train-00000-of-00002.h5 (750, 8, 8, 1) {dataset.classes[dataset.labels[0]]}"
    assert len(lines) == 2


def test_the_jpeg_example_of_the_format_document(tmp_path, monkeypatch, capsys):
    pytest.importorskip("simplejpeg")
    pytest.importorskip("PIL")
    assert main(["synthetic", "--jpeg", "--samples", "20", "--shards", "2", "--output", str(tmp_path)]) == 0
    example = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / "train")
    capsys.readouterr()
    exec(compile(example, DOCUMENT, "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"train-00000-of-00002\.h5 10 files, the first (\d+)x(\d+), class\d", lines[0])


def test_h5dump_reads_every_shard(digits):
    h5dump = shutil.which("h5dump")
    if h5dump is None:
        pytest.skip("no h5dump on PATH")
    for path in digits.rglob("*.h5"):
        done = subprocess.run([h5dump, "-d", "/labels", str(path)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "H5T_STD_I32LE" in done.stdout


def test_the_format_document_defines_the_hashes(digits):
    """Fingerprint and shard digest, computed from the document's words alone."""
    from hashlib import sha256

    def canonical(content):
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    manifest = json.loads((digits / "train" / "manifest.json").read_text())
    for shard in manifest["shards"]:
        with h5py.File(digits / "train" / shard["file"]) as file:
            content = b"".join(file[name][:].tobytes() for name in ("labels", "index", "crc32"))
            assert file.attrs["classes_sha256"] == sha256(canonical(manifest["classes"])).hexdigest()
        assert sha256(content).hexdigest() == shard["sha256"]
        assert (digits / "train" / shard["file"]).stat().st_size == shard.pop("bytes")
    fingerprint = manifest.pop("fingerprint")
    for key in ("num_samples", "kind", "preparation", "plan"):
        manifest.pop(key)
    assert sha256(canonical(manifest)).hexdigest() == fingerprint


def test_planar_images_of_parts_of_unequal_length():
    rows = np.arange(10 * 12, dtype=np.uint8).reshape(10, 12)
    images = PlanarImages([rows[:3], rows[3:8], rows[8:]], 2)
    assert images.shape == (10, 2, 2, 3)
    expected = rows.reshape(10, 3, 2, 2).transpose(0, 2, 3, 1)
    for wanted in ([*range(10)], [2, 3], [7, 8], [0, 9], [4, 5], [1, 2, 3, 7, 8, 9], [9]):
        np.testing.assert_array_equal(images[np.array(wanted)], expected[wanted])


# CIFAR-10: small batches in both layouts


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its str, as in the official archive."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch[str] = dispatch[bytes] = save_string


@pytest.fixture
def batches(monkeypatch):
    monkeypatch.setattr(cifar10, "_SAMPLES", 7)
    rng = np.random.RandomState(0)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {name: (rng.randint(0, 256, (7, 3072)).astype(np.uint8), rng.randint(0, 10, 7)) for name in names}


def write_binary(directory, batches):
    directory.mkdir()
    for name, (data, labels) in batches.items():
        records = np.concatenate([labels[:, None].astype(np.uint8), data], axis=1)
        (directory / f"{name}.bin").write_bytes(records.tobytes())


def write_python(directory, batches, pickler):
    directory.mkdir()
    for name, (data, labels) in batches.items():
        with (directory / name).open("wb") as file:
            pickler(file, 2).dump({"data": data, "labels": labels.tolist(), "batch_label": "a batch"})


def test_both_layouts_of_cifar10(tmp_path, batches):
    write_binary(tmp_path / "bin", batches)
    write_python(tmp_path / "py", batches, Python2Pickler)
    for layout in ("bin", "py"):
        assert main(["cifar10", "--source", str(tmp_path / layout), "--output", str(tmp_path / f"from-{layout}")]) == 0
        dataset = ShardedDataset(tmp_path / f"from-{layout}")
        stored = dataset.take(np.argsort(dataset.index))
        expected = np.concatenate([batches[f"data_batch_{number}"][0] for number in range(1, 6)])
        np.testing.assert_array_equal(stored[20, :, :, 1].ravel(), expected[20, 1024:2048])  # the green plane
        np.testing.assert_array_equal(stored, expected.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        assert dataset.classes[:2] == ("airplane", "automobile")
    fingerprints = {ShardedDataset(tmp_path / f"from-{layout}", "test").fingerprint for layout in ("bin", "py")}
    assert len(fingerprints) == 1


@pytest.mark.parametrize("limit", [1, 7, 8, 35])
def test_fewer_and_smaller_images_of_cifar10(tmp_path, batches, limit):
    write_binary(tmp_path / "bin", batches)
    write_python(tmp_path / "py", batches, Python2Pickler)
    options = ["--pool", "4", "--limit", str(limit)]
    for layout in ("bin", "py"):
        output = tmp_path / f"from-{layout}"
        assert main(["cifar10", "--source", str(tmp_path / layout), "--output", str(output), *options]) == 0
        train, test = ShardedDataset(output), ShardedDataset(output, "test")
        assert (len(train), len(test), train.shape) == (limit, 7, (8, 8, 3))
        whole = np.concatenate([batches[f"data_batch_{number}"][0] for number in range(1, 6)])[:limit]
        squares = whole.reshape(-1, 3, 8, 4, 8, 4).mean((3, 5)).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(train.take(np.argsort(train.index)), np.rint(squares))
    facts = json.loads((tmp_path / "from-bin" / "train" / "manifest.json").read_text())["preparation"]
    assert (facts["pool"], facts["limit"]) == (4, limit)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pool", "3", "must divide the images' sides, 32 and 32"),
        ("--pool", "0", "--pool 0"),
        ("--limit", "0", "from 1 to 35"),
        ("--limit", "36", "from 1 to 35 training images"),
    ],
)
def test_unfit_ways_to_shrink_cifar10(tmp_path, batches, capsys, option, value, message):
    write_binary(tmp_path / "bin", batches)
    arguments = ["cifar10", "--source", str(tmp_path / "bin"), "--output", str(tmp_path / "out"), option, value]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_python_batch_written_by_python_3(tmp_path, batches):
    data, labels = batches["test_batch"]
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": data, b"labels": labels.tolist()}, protocol=2))
    found_data, found_labels = cifar10.read_python_batch(tmp_path / "test_batch")
    np.testing.assert_array_equal(found_data, data)
    np.testing.assert_array_equal(found_labels, labels)


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_malicious_pickle_is_not_run(tmp_path, protocol, capsys):
    proof, path = tmp_path / "proof", tmp_path / "data_batch_1"
    for attack in (
        Attack(os.system, f"touch {proof}"),
        Attack(eval, f"open({str(proof)!r}, 'w')"),
        Attack(np.load, "x"),
    ):
        path.write_bytes(pickle.dumps({b"data": attack}, protocol))
        with pytest.raises(ValueError, match=r"asks for .* which no array needs"):
            cifar10.read_python_batch(path)
        assert main(["cifar10", "--source", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
        assert not proof.exists()
    assert "Traceback" not in capsys.readouterr().err
    pickle.load(io.BytesIO(pickle.dumps(Attack(proof.touch), protocol)))  # the very weapon is sharp
    assert proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([]),
        pickle.dumps({b"data": np.zeros((7, 3072), np.uint8)}, 2),
        pickle.dumps({b"data": np.zeros((7, 3071), np.uint8), b"labels": [0] * 7}, 2),
        pickle.dumps({b"data": np.zeros((7, 3072), np.uint8), b"labels": [0] * 6}, 2),
        pickle.dumps({b"data": np.zeros((7, 3072), np.uint8), b"labels": [300] * 7}, 2),
        pickle.dumps({b"data": "text", b"labels": [0] * 7}, 2),
    ],
)
def test_damaged_python_batch(tmp_path, batches, content):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch .*download it again"):
        cifar10.read_python_batch(tmp_path / "test_batch")


def test_unfit_cifar10_sources(tmp_path, batches, capsys):
    def error(source):
        assert main(["cifar10", "--source", str(source), "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "holds neither data_batch_1.bin nor data_batch_1" in error(tmp_path / "nowhere")
    write_binary(tmp_path / "bin", batches)
    (tmp_path / "bin" / "data_batch_3.bin").write_bytes(b"short")
    assert "data_batch_3.bin has 5 bytes where 21511 are due" in error(tmp_path / "bin")
    (tmp_path / "bin" / "data_batch_3.bin").unlink()
    assert "data_batch_3.bin is missing" in error(tmp_path / "bin")
    assert not (tmp_path / "out").exists()


def test_label_outside_the_classes_is_refused(tmp_path, batches, capsys):
    batches["data_batch_2"][1][3] = 10
    write_binary(tmp_path / "bin", batches)
    assert main(["cifar10", "--source", str(tmp_path / "bin"), "--output", str(tmp_path / "out")]) == 2
    assert "label 10 of sample 10 is out of range" in capsys.readouterr().err


def test_real_cifar10(tmp_path, cifar10_source):
    assert main(["cifar10", "--source", str(cifar10_source), "--output", str(tmp_path), "--shards", "4"]) == 0
    train, test = ShardedDataset(tmp_path), ShardedDataset(tmp_path, "test")
    assert (len(train), len(test), train.shape) == (50_000, 10_000, (32, 32, 3))
    assert np.round(train.mean, 4).tolist() == [0.4914, 0.4822, 0.4465]
    assert np.round(train.std, 4).tolist() == [0.2470, 0.2435, 0.2616]
    assert np.bincount(train.labels).tolist() == [5000] * 10
    # Pre-shuffled: any run of neighbours is a fair sample of the classes.
    assert np.abs(np.bincount(train.labels[:5000], minlength=10) - 500).max() < 110
    record = np.fromfile(cifar10_source / "data_batch_4.bin", np.uint8).reshape(-1, 3073)[1234]
    position = int(np.flatnonzero(train.index == 31_234)[0])
    assert train.labels[position] == record[0]
    np.testing.assert_array_equal(train.take([position])[0], record[1:].reshape(3, 32, 32).transpose(1, 2, 0))


# CIFAR-100


@pytest.fixture
def cifar100_files(tmp_path, monkeypatch):
    """Both layouts of a small CIFAR-100; returns their pixels and labels, coarse and fine."""
    monkeypatch.setattr(cifar100, "_SAMPLES", {"train": 7, "test": 5})
    rng = np.random.RandomState(1)
    content = {}
    for layout in ("bin", "py"):
        (tmp_path / layout).mkdir()
    for split, count in (("train", 7), ("test", 5)):
        data = rng.randint(0, 256, (count, 3072)).astype(np.uint8)
        coarse, fine = rng.randint(0, 20, count), rng.randint(20, 100, count)
        records = np.concatenate([np.stack([coarse, fine], axis=1).astype(np.uint8), data], axis=1)
        (tmp_path / "bin" / f"{split}.bin").write_bytes(records.tobytes())
        with (tmp_path / "py" / split).open("wb") as file:
            batch = {"data": data, "coarse_labels": coarse.tolist(), "fine_labels": fine.tolist()}
            Python2Pickler(file, 2).dump(batch)
        content[split] = data, {"coarse": coarse, "fine": fine}
    return content


@pytest.mark.parametrize("labels", ["fine", "coarse"])
def test_both_layouts_of_cifar100(tmp_path, cifar100_files, labels):
    for layout in ("bin", "py"):
        output = tmp_path / f"{labels}-{layout}"
        assert main(["cifar100", "--source", str(tmp_path / layout), "--output", str(output), "--labels", labels]) == 0
        dataset = ShardedDataset(output)
        data, expected = cifar100_files["train"]
        stored = dataset.take(np.argsort(dataset.index))
        np.testing.assert_array_equal(stored, data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(dataset.labels, expected[labels][dataset.index])
    assert dataset.num_classes == {"fine": 100, "coarse": 20}[labels]
    assert len({ShardedDataset(tmp_path / f"{labels}-{layout}").fingerprint for layout in ("bin", "py")}) == 1


def test_unfit_cifar100_sources(tmp_path, cifar100_files, capsys):
    def error(source):
        assert main(["cifar100", "--source", str(source), "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "holds neither train.bin nor train; unpack cifar-100-binary.tar.gz" in error(tmp_path)
    (tmp_path / "bin" / "test.bin").write_bytes(b"short")
    assert "test.bin has 5 bytes where 15370 are due" in error(tmp_path / "bin")
    (tmp_path / "py" / "test").write_bytes(pickle.dumps({b"data": Attack(os.system, "touch /tmp/never")}, 2))
    assert "asks for posix.system, which no array needs" in error(tmp_path / "py")


# The command line


def test_shards_by_size():
    assert [_num_shards(size, 10**6) for size in (1, 184 * 10**6, 600 << 20, 3_936 * 10**6, 140 * 10**9)] == [
        1,
        1,
        1,
        7,
        261,
    ]
    assert _num_shards(10**12, 5) == 5


def test_progress_off_a_terminal(monkeypatch, capsys):
    now = iter([0.0, 4.0, 11.0, 12.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with ProgressBar("train", 1000, True) as progress:
        for samples in (400, 150, 1):
            progress(samples)
    assert capsys.readouterr().err == "train: 550 of 1000 samples, 50 per second\n"


@pytest.mark.parametrize("command", ["digits", "cifar10", "cifar100", "imagenet32", "imagenet", "synthetic", "verify"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert len(capsys.readouterr().out) > 100


def test_verify_option(tmp_path, capsys):
    assert main(["synthetic", "--samples", "50", "--output", str(tmp_path), "--verify"]) == 0
    assert "train: 50 samples, all checksums agree\ntest: 10 samples, all checksums agree" in capsys.readouterr().out
