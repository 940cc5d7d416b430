import builtins
import errno
import io
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.folder_tree import list_tree
from hvdlocal.data import verify
from hvdlocal.data.format.manifest import Manifest

simplejpeg = pytest.importorskip("simplejpeg")
cv2 = pytest.importorskip("cv2")
Image = pytest.importorskip("PIL.Image")


def picture(seed=0, height=40, width=60):
    """A smooth picture: JPEG changes it little."""
    y, x = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin((x * (c + 1) + y * (3 - c) + 20 * seed) / 25) for c in range(3)]
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path):
    """Writes a tree from {path: bytes} and returns its root."""

    def write(files):
        root = tmp_path / "tree"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root

    return write


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs data_prep imagenet; returns its exit code, output directory and what it said on stderr."""

    def run(root, *options, output="out"):
        code = main(["imagenet", "--source", str(root), "--output", str(tmp_path / output), *options])
        return code, tmp_path / output, capsys.readouterr().err

    return run


def stored(output, split="train"):
    """{source index: (bytes, label, dims)} of a split, and its manifest, with plain h5py."""
    manifest = Manifest.load(output / split / "manifest.json")
    found = {}
    for entry in manifest.shards:
        with h5py.File(output / split / entry.file) as file:
            data, offsets = file["jpeg"][:].tobytes(), file["offsets"][:]
            for i, index in enumerate(file["index"][:].tolist()):
                label, dims = int(file["labels"][i]), tuple(file["dims"][i].tolist())
                found[index] = data[offsets[i] : offsets[i + 1]], label, dims
    return found, manifest


KINDS = {
    "a/1.jpg": encoded(picture(1)),
    "a/2.JPEG": encoded(picture(2), progressive=True),
    "a/3.jpeg": encoded(picture(3).convert("L")),
    "b/4.JPG": encoded(picture(4).convert("CMYK")),
    "b/5.JPEG": encoded(picture(5), "PNG"),
    "b/deep/6.png": encoded(picture(6).convert("RGBA"), "PNG"),
    "b/deep/7.PNG": encoded(picture(7).quantize(256), "PNG"),
}


def test_what_can_stay_stays_and_the_rest_becomes_rgb_jpeg(tree, prepare):
    code, output, _ = prepare(tree(KINDS), "--shards", "2", "--verify")
    assert code == 0
    samples, manifest = stored(output)
    assert manifest.classes == ("a", "b")
    assert [samples[i][1] for i in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    assert all(samples[i][2] == (40, 60) for i in range(7))
    for i, content in enumerate(KINDS.values()):
        if i < 3:
            assert samples[i][0] == content
        else:
            assert simplejpeg.decode_jpeg_header(samples[i][0])[2] != "CMYK"
        pixels = simplejpeg.decode_jpeg(samples[i][0], "RGB").astype(int)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        assert np.abs(pixels - expected).mean() < (0.5 if i < 3 else 4)
    assert manifest.preparation["notes"] == {"converted from CMYK JPEG": 1, "converted from PNG": 3}
    assert (manifest.preparation["conversion_quality"], manifest.preparation["left_out"]) == (95, 0)


def test_exif_orientation_is_ignored(tree, prepare):
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(picture(), exif=exif)
    samples, _ = stored(prepare(tree({"a/1.jpg": content}))[1])
    assert samples[0] == (content, 0, (40, 60))


def test_resize_reduces_the_short_side_and_never_enlarges(tree, prepare):
    sizes = [(40, 60), (61, 40), (20, 90), (20, 20), (41, 57)]
    root = tree({f"a/{i}.jpg": encoded(picture(i, *size), quality=95) for i, size in enumerate(sizes)})
    code, output, _ = prepare(root, "--resize", "20", "--quality", "93")
    assert code == 0
    samples, manifest = stored(output)
    assert [samples[i][2] for i in range(5)] == [(20, 30), (30, 20), (20, 90), (20, 20), (20, 28)]
    expected = cv2.resize(
        simplejpeg.decode_jpeg((root / "a" / "0.jpg").read_bytes()), (30, 20), interpolation=cv2.INTER_AREA
    )
    assert samples[0][0] == simplejpeg.encode_jpeg(expected, 93, "RGB", "420")
    assert (manifest.preparation["resize"], manifest.preparation["quality"]) == (20, 93)


def test_resize_takes_every_kind_of_file(tree, prepare):
    code, output, _ = prepare(tree(KINDS), "--resize", "16")
    assert code == 0
    samples, manifest = stored(output)
    assert {dims for _, _, dims in samples.values()} == {(16, 24)}
    assert manifest.preparation["notes"] == {"converted from CMYK JPEG": 1, "converted from PNG": 3}


BAD = {
    "a/cut.jpg": encoded(picture(8))[:-300],
    "a/empty.jpg": b"",
    "b/deep16.png": encoded(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)), "PNG"),
    "b/text.jpeg": b"not a picture",
}


@pytest.mark.parametrize("resize", [(), ("--resize", "16")])
def test_bad_files(tree, prepare, resize):
    root = tree(
        {f"{split}/{name}": content for split in ("train", "val") for name, content in {**KINDS, **BAD}.items()}
    )
    code, output, said = prepare(root, "--shards", "3", *resize)
    assert code == 2
    assert said.count("4 of 11 samples cannot be used") == 2, "one run tells of all splits"
    for split in ("train", "val"):
        lines = (output / split / "bad_files.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == [f"{split}/{name}" for name in sorted(BAD)]
        assert "cannot be decoded" in lines[0]
        assert lines[1] == f"{split}/a/empty.jpg is empty"
        assert "has pixels of Pillow's mode I;16; convert it" in lines[2]
        assert lines[3].endswith("is not an image of a known format")
        assert not (output / split / "manifest.json").exists()
    code, output, _ = prepare(root, "--shards", "3", "--bad", "skip", *resize)
    assert code == 0
    assert verify(output) == {"train": 7, "val": 7}
    _, fresh, _ = prepare(root, "--shards", "3", "--bad", "skip", *resize, output="fresh")
    for path in output.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (fresh / path.relative_to(output)).read_bytes()


def test_a_slightly_damaged_file_is_kept_and_counted(tree, prepare):
    content = encoded(picture(1, 100, 100))
    odd = content.replace(b"\xff\xda", b"\x11\x22\xff\xda", 1)  # extraneous bytes before a marker
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(odd)
    code, output, _ = prepare(tree({"a/odd.jpg": odd}))
    assert code == 0
    samples, manifest = stored(output)
    assert samples[0][0] == odd
    assert manifest.preparation["notes"] == {"decoded leniently": 1}


def test_splits(tree, prepare):
    one = encoded(picture())
    root = tree({"ILSVRC_train/x/1.jpg": one, "ILSVRC_train/y/1.jpg": one, "ILSVRC_val/y/2.jpg": one})
    code, output, _ = prepare(root, "--splits", "train=ILSVRC_train", "val=ILSVRC_val")
    assert code == 0
    assert stored(output, "val")[0][0][1] == 1, "classes are those of the first split"
    code, output, _ = prepare(root / "ILSVRC_train", output="single")
    assert code == 0
    assert sorted(path.name for path in output.iterdir()) == ["train"]


def test_other_files_are_ignored_but_told(tree, prepare):
    code, output, said = prepare(tree({"a/1.jpg": encoded(picture()), "a/notes.txt": b"x", "a/.hidden.jpg": b"y"}))
    assert code == 0
    assert "train: 1 file of other kinds ignored, for instance a/notes.txt" in said
    assert len(stored(output)[0]) == 1


def test_hidden_folders_are_left_out(tree, prepare):
    one = encoded(picture())
    code, output, said = prepare(tree({"a/1.jpg": one, "a/.thumbs/1.jpg": one, ".b/1.jpg": one}))
    assert (code, said) == (0, "")
    assert len(stored(output)[0]) == 1


def test_links_are_followed_but_not_in_circles(tree, prepare):
    one = encoded(picture())
    root = tree({"x/1.jpg": one, "tree/a/2.jpg": one, "tree/b/3.jpg": one}) / "tree"
    (root / "a" / "more").symlink_to(root.parent / "x")
    assert prepare(root)[0] == 0
    (root / "b" / "deep").mkdir()
    (root / "b" / "deep" / "back").symlink_to(root / "b")
    code, _, said = prepare(root, output="other")
    assert code == 2
    assert f"{root}/b/deep/back leads back to {root}/b; remove the link" in said


def test_an_unreadable_folder_ends_it(tree, monkeypatch):
    root = tree({"a/1.jpg": b"x", "a/locked/2.jpg": b"x"})
    scandir = os.scandir

    def locked(path):  # permissions do not bind root, as whom tests may run
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", locked)
    with pytest.raises(PermissionError, match=r"a/locked"):
        list_tree(root, ())


def test_files_that_cannot_be_read_are_bad_files(tree, prepare):
    one = encoded(picture())
    root = tree({"a/1.jpg": one, "b/2.jpg": one})
    (root / "a" / "nowhere.jpg").symlink_to("gone")
    os.mkfifo(root / "b" / "pipe.png")
    code, output, said = prepare(root)
    assert code == 2
    assert "2 of 4 samples cannot be used" in said
    assert (output / "train" / "bad_files.txt").read_text().splitlines() == [
        "a/nowhere.jpg cannot be read (No such file or directory)",
        "b/pipe.png is not a regular file",
    ]
    assert prepare(root, "--bad", "skip")[0] == 0
    assert len(stored(output)[0]) == 2


@pytest.mark.parametrize("resize", [(), ("--resize", "16")])
def test_a_file_mended_at_equal_size(tree, prepare, resize):
    good = encoded(picture())
    files = {f"a/{i}.jpg": encoded(picture(i)) for i in range(6)} | {"a/7.jpg": good}
    root = tree({**files, "a/7.jpg": bytes(len(good))})
    assert prepare(root, "--shards", "2", *resize)[0] == 2
    tree(files)
    code, output, _ = prepare(root, "--shards", "2", *resize)
    assert code == 0
    assert len(stored(output)[0]) == 7


@pytest.mark.parametrize("output", ["tree", "tree/out", "tree/a/out"])
def test_the_tree_itself_is_not_written_to(tree, prepare, output):
    root = tree({"a/1.jpg": encoded(picture())})
    for name in (output, "out/../" + output):
        code, _, said = prepare(root, output=name)
        assert code == 2
        assert "--output lies inside --source" in said
        assert "choose a directory outside of it" in said
    assert [path.name for path in root.rglob("*")] == ["a", "1.jpg"]


def test_the_tree_is_not_where_a_split_would_be(tree, prepare, tmp_path):
    root = tree({"a/1.jpg": encoded(picture())}).rename(tmp_path / "train")
    code, _, said = prepare(root, output=".")
    assert code == 2
    assert "--output lies inside --source" in said


def test_names_that_are_not_utf_8(tree, prepare):
    root = tree({"a/1.jpg": encoded(picture())})
    bad = os.fsencode(root / "a") + b"/\xff.jpg"
    Path(os.fsdecode(bad)).write_bytes(b"no picture")
    code, output, _ = prepare(root)
    assert code == 2
    assert (output / "train" / "bad_files.txt").read_text() == "a/\\udcff.jpg is not an image of a known format\n"
    assert prepare(root, "--bad", "skip")[0] == 0
    Path(os.fsdecode(os.fsencode(root) + b"/\xe9")).mkdir()
    code, _, said = prepare(root)
    assert code == 2
    assert r"the folder '\udce9' in " in said
    assert "not UTF-8" in said


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"1.jpg": b"x"}, (), "holds no folders; one per class is needed"),
        ({"a/1.txt": b"x"}, (), r"tree/a holds no images (.jpg, .jpeg, .png)"),
        ({"train/a/1.jpg": b"x", "val/b/1.jpg": b"x"}, (), "val has 1 classes that train does not have (b, …)"),
        ({"a/1.jpg": b"x"}, ("--splits", "valid"), "tree/valid is not a directory; --splits takes folders of"),
        ({"a/1.jpg": b"x"}, ("--resize", "0"), "--resize 0 is too small"),
        ({"a/1.jpg": b"x"}, ("--quality", "101"), "--quality 101 is out of range"),
        ({"a/1.jpg": b"x"}, ("--shards", "0"), "num_shards is 0"),
        ({"a/1.jpg": b"x"}, ("--shards", "2"), "1 files cannot fill 2 shards"),
    ],
)
def test_mistakes_are_one_sentence(tree, prepare, files, options, message):
    code, output, said = prepare(tree(files), *options)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
    assert not output.exists()


def test_a_changed_tree_is_another_data_set(tree, prepare):
    root = tree(KINDS)
    assert prepare(root)[0] == 0
    assert prepare(root)[0] == 0
    (root / "a" / "8.jpg").write_bytes(KINDS["a/1.jpg"])
    code, _, said = prepare(root)
    assert code == 2
    assert "already holds a different data set" in said
    assert prepare(root, "--overwrite")[0] == 0


def test_without_the_libraries(tree, prepare, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "cv2":
            raise ModuleNotFoundError("No module named 'cv2'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, said = prepare(tree(KINDS))
    assert code == 2
    assert "(No module named 'cv2'); pip install 'hvdlocal[jpeg]'" in said


def test_real_images(prepare, jpeg_source):
    code, output, said = prepare(jpeg_source, "--shards", "3", "--verify")
    assert (code, said) == (0, "")
    files = sorted((jpeg_source / "train").glob("*/*.jpg"))
    samples, manifest = stored(output)
    assert len(samples) == len(files) == 96
    assert manifest.classes == tuple(sorted({path.parent.name for path in files}))
    total, squares, count = np.zeros(3), np.zeros(3), 0
    for i, path in enumerate(files):
        content, label, dims = samples[i]
        assert content == path.read_bytes()
        assert manifest.classes[label] == path.parent.name
        pixels = simplejpeg.decode_jpeg(content, "RGB").astype(np.float64) / 255
        assert dims == pixels.shape[:2]
        total, squares, count = (
            total + pixels.sum((0, 1)),
            squares + (pixels**2).sum((0, 1)),
            count + pixels[..., 0].size,
        )
    np.testing.assert_allclose(manifest.statistics["mean"], total / count, rtol=1e-12)
    np.testing.assert_allclose(manifest.statistics["std"], np.sqrt(squares / count - (total / count) ** 2), rtol=1e-10)
    assert json.loads((output / "val" / "manifest.json").read_text())["num_samples"] == 24
