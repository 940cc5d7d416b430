"""`python -m data_prep folder`: trees of equally sized image files, pixel for pixel."""

import io
import json
import struct
import zlib

import numpy as np
import pytest

from data_prep.__main__ import main
from hvdlocal.data import ShardedDataset

Image = pytest.importorskip("PIL.Image")
RANDOM = np.random.default_rng(0)


def noise(*shape):
    """Noise, which JPEG would change most."""
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels, kind="PNG", mode=None, **options):
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png(pixels):
    """A PNG file of 16 bits per channel, uint16 (H, W, C), which Pillow cannot write."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def prepare(tmp_path, capsys):
    """Writes a tree from {path: bytes} and runs data_prep folder; returns its exit code and what it said on stderr."""

    def run(files, *options):
        for name, content in files.items():
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / name).write_bytes(content)
        arguments = ["folder", "--source", str(tmp_path / "tree"), "--output", str(tmp_path / "out"), *options]
        return main(arguments), capsys.readouterr().err

    return run


def images_of(tmp_path, split="train"):
    """Images and labels in the order of the source."""
    with ShardedDataset(tmp_path / "out", split) as data:
        order = np.argsort(data.index)
        return data.take(order), data.labels[order]


def test_gray_files(tmp_path, prepare):
    pixels = noise(60, 28, 28)
    files = {f"{split}/{'ab'[i % 2]}/{i:02}.png": encoded(pixels[i]) for split in ("train", "test") for i in range(60)}
    code, said = prepare(files, "--shards", "3", "--verify")
    assert (code, said) == (0, "stored as pixels, 28x28 pixels, gray\n")
    for split in ("train", "test"):
        images, labels = images_of(tmp_path, split)
        np.testing.assert_array_equal(images, np.concatenate([pixels[::2], pixels[1::2]])[..., None])
        np.testing.assert_array_equal(labels, np.repeat([0, 1], 30))
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["shape"], manifest["classes"]) == ("images", [28, 28, 1], ["a", "b"])
    assert manifest["preparation"] == {
        "data_set": "folder", "images": "raw", "channels": 1, "left_out": 0, "notes": {}
    }  # fmt: skip


def test_colour_files_and_gray_ones_among_them(tmp_path, prepare):
    colour, gray = noise(5, 8, 12, 3), noise(8, 12)
    files = {f"a/{i}.png": encoded(image) for i, image in enumerate(colour)}
    code, said = prepare(files | {"a/5.BMP": encoded(colour[0], "BMP"), "b/gray.png": encoded(gray)})
    assert (code, said) == (0, "stored as pixels, 12x8 pixels, colour\n")
    images, _ = images_of(tmp_path)
    np.testing.assert_array_equal(images[:5], colour)
    np.testing.assert_array_equal(images[5], colour[0])
    np.testing.assert_array_equal(images[6], np.repeat(gray[:, :, None], 3, axis=2))


def test_other_kinds_of_eight_bits_or_less(tmp_path, prepare):
    opaque = np.dstack([noise(8, 8, 3), np.full((8, 8), 255, np.uint8)])
    palette = Image.fromarray(noise(8, 8) // 100).convert("P")
    palette.putpalette([9, 8, 7, 200, 100, 0, 1, 2, 3])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", bits=2)
    bilevel = noise(8, 8) > 100
    files = {"a/0.png": encoded(opaque), "a/1.png": buffer.getvalue(), "a/2.png": encoded(bilevel)}
    assert prepare(files)[0] == 0
    images, _ = images_of(tmp_path)
    np.testing.assert_array_equal(images[0], opaque[..., :3])
    np.testing.assert_array_equal(images[1], np.array([[9, 8, 7], [200, 100, 0], [1, 2, 3]])[np.asarray(palette)])
    np.testing.assert_array_equal(images[2], np.repeat(255 * bilevel[:, :, None], 3, axis=2))


DEEP = RANDOM.integers(0, 2**16, (8, 8, 3)).astype(np.uint16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (deep_png(DEEP), "has 16 bits per channel; convert it to 8"),
        (deep_png(DEEP[..., :1]), "has 16 bits per channel; convert it to 8"),
        (deep_png(DEEP[..., :2]), "has 16 bits per channel; convert it to 8"),
        (encoded(noise(8, 8), "GIF"), "is a GIF file; convert it to PNG"),
        (
            encoded(noise(8, 8), "PNG", save_all=True, append_images=[Image.fromarray(noise(8, 8))]),
            "holds 2 images; keep one",
        ),
        (b"no picture", "is not an image of a known format"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--images", "raw")])
def test_files_whose_pixels_would_not_be_kept(tmp_path, prepare, content, message, options):
    code, said = prepare({"a/0.png": encoded(noise(8, 8)), "a/1.png": content}, *options)
    assert code == 2
    assert f"1 of the files cannot be stored as pixels (a/1.png {message}" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        encoded(np.dstack([noise(8, 8, 3), np.full((8, 8), 254, np.uint8)])),
        encoded(np.dstack([noise(8, 8), np.zeros((8, 8), np.uint8)])),
        encoded(np.full((8, 8), 7, np.uint8), transparency=7),
        encoded(noise(8, 8, 3), "PNG")[:-30],
    ],
    ids=["RGBA", "LA", "tRNS", "cut off"],
)
def test_files_that_are_found_out_when_they_are_decoded(tmp_path, prepare, content):
    code, said = prepare({"a/0.png": encoded(noise(8, 8)), "a/1.png": content})
    assert code == 2
    assert ("tree/a/1.png has transparent pixels; put it on a background" in said) or ("cannot be decoded" in said)
    assert "mend or remove it, and run again" in said
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_jpeg_files_stay_jpeg_files_unless_asked_for(tmp_path, prepare):
    simplejpeg = pytest.importorskip("simplejpeg")
    files = {f"a/{i}.jpg": encoded(noise(16, 16, 3), "JPEG", quality=90) for i in range(3)}
    files["b/x.png"] = encoded(noise(16, 16, 3))
    code, said = prepare(files)
    assert code == 0
    assert said.startswith("stored as JPEG files, since a/0.jpg is a JPEG file; --images raw stores pixels")
    assert ShardedDataset(tmp_path / "out").kind == "jpeg"
    assert prepare(files, "--images", "raw", "--overwrite")[0] == 0
    images, _ = images_of(tmp_path)
    for image, content in zip(images[:3], files.values(), strict=False):
        np.testing.assert_allclose(image.astype(int), simplejpeg.decode_jpeg(content), atol=4)  # Pillow decodes here


def test_files_of_several_sizes(tmp_path, prepare):
    files = {"a/0.png": encoded(noise(8, 8)), "a/1.png": encoded(noise(8, 8)), "a/2.png": encoded(noise(9, 8))}
    code, said = prepare(files, "--images", "raw")
    assert code == 2
    assert "tree/a/2.png has 8x9 pixels" in said
    assert "tree/a/0.png has 8x8 pixels; bring all to one size, or store JPEG files (--images jpeg)" in said
    code, said = prepare(files)
    assert code == 0
    assert said.startswith("stored as JPEG files, since a/2.png has 8x9 pixels and a/0.png has 8x8 pixels;")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "raw", "--resize", "16"), "--resize 16 is for JPEG files"),
        (("--images", "raw", "--bad", "skip"), "--bad skip is for JPEG files"),
        (("--quality", "0"), "--quality 0 is out of range"),
    ],
)
def test_options_that_do_not_go_together(prepare, options, message):
    code, said = prepare({"a/0.png": encoded(noise(8, 8))}, *options)
    assert code == 2
    assert message in said


def test_it_is_finished_by_the_same_command_and_is_another_data_set_with_other_files(tmp_path, prepare, monkeypatch):
    files = {f"a/{i:03}.png": encoded(noise(8, 8)) for i in range(200)}
    decode, asked = __import__("data_prep.raw_files").raw_files.decode, []

    def fails(content, channels):
        asked.append(content)
        if len(asked) == 150:
            raise OSError(5, "Input/output error")
        return decode(content, channels)

    monkeypatch.setattr("data_prep.raw_files.decode", fails)
    assert prepare(files, "--shards", "2")[0] == 2
    monkeypatch.setattr("data_prep.raw_files.decode", lambda *content: asked.append(0) or decode(*content))
    asked.clear()
    assert prepare(files, "--shards", "2")[0] == 0
    assert len(asked) == 100, "one shard was whole"
    asked.clear()
    assert prepare(files, "--shards", "2")[0] == 0
    assert not asked
    code, said = prepare({"a/200.png": encoded(noise(8, 8))}, "--shards", "2")
    assert code == 2
    assert "already holds a different data set" in said
    assert "--overwrite" in said


def test_it_holds_no_more_than_a_block_of_images(prepare, monkeypatch):
    """The memory that it takes does not grow with the tree."""
    from data_prep.raw_files import RawFiles

    most, get = [0], RawFiles.__getitem__

    def note(self, rows):
        most[0] = max(most[0], len(rows))
        return get(self, rows)

    monkeypatch.setattr(RawFiles, "__getitem__", note)
    assert prepare({f"a/{i:03}.png": encoded(noise(4, 4)) for i in range(300)})[0] == 0
    assert most[0] == 64


CLASS_SIZES = {"a": 1, "b": 2, "c": 4, "d": 26, "e": 100}
HELD_OUT = {"a": 0, "b": 1, "c": 1, "d": 3, "e": 10}  # ⌊c / 10 + 1/2⌋, at least 1 of 2 or more: 2.6 gives 3


def tree_of_classes(top=""):
    pixels = iter(noise(sum(CLASS_SIZES.values()), 4, 4))
    return {f"{top}{name}/{i:03}.png": encoded(next(pixels)) for name, n in CLASS_SIZES.items() for i in range(n)}


def test_a_share_of_each_class_is_held_out(tmp_path, prepare):
    files = tree_of_classes()
    code, said = prepare(files, "--holdout", "0.1", "--seed", "3")
    assert code == 0
    assert "test: 15 of 133 images, held out at random by seed 3, 1 to 10 of each class but 1 of one image\n" in said
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in files.values()])[..., None]
    whole = {pixels.tobytes(): number for number, pixels in enumerate(decoded)}
    found = {}
    for split, counts in (("test", HELD_OUT), ("train", {name: n - HELD_OUT[name] for name, n in CLASS_SIZES.items()})):
        images, labels = images_of(tmp_path, split)
        assert np.bincount(labels, minlength=5).tolist() == list(counts.values())
        found[split] = [whole[image.tobytes()] for image in images]
        manifest = json.loads((tmp_path / "out" / split / "manifest.json").read_text())
        assert manifest["preparation"]["holdout"] == {"share": 0.1, "seed": 3, "from": "train"}
    assert sorted(found["test"] + found["train"]) == list(range(133))
    assert found["test"] == sorted(found["test"])
    assert np.ptp(np.array(found["test"])[-10:]) > 10, "no run of neighbours"
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    next((tmp_path / "out" / "test").glob("*.h5")).unlink()
    assert prepare({}, "--holdout", "0.1", "--seed", "3")[0] == 0
    assert {path: path.read_bytes() for path in before} == before
    code, said = prepare({}, "--holdout", "0.2", "--seed", "3")
    assert code == 2
    assert "already holds a different data set" in said


def test_a_test_split_is_not_left_beside_images_that_contain_it(prepare):
    assert prepare(tree_of_classes(), "--holdout", "0.1")[0] == 0
    code, said = prepare({}, "--overwrite")
    assert code == 2
    assert "test was held out of an earlier train split, and the new one may contain its samples: remove it" in said


def test_a_share_of_jpeg_files_is_held_out(tmp_path, prepare):
    pytest.importorskip("simplejpeg")
    files = {f"{name}/{i}.jpg": encoded(noise(16, 16, 3), "JPEG") for name in "ab" for i in range(5)}
    code, said = prepare(files, "--holdout", "0.4")
    assert code == 0
    assert "test: 4 of 10 images, held out at random by seed 0, 2 to 2 of each class" in said
    assert [np.bincount(images.labels).tolist() for images in map(jpegs(tmp_path), ("train", "test"))] == [
        [3, 3],
        [2, 2],
    ]


def jpegs(tmp_path):
    return lambda split: ShardedDataset(tmp_path / "out", split)


@pytest.mark.parametrize(
    ("top", "options", "message"),
    [
        ("", ("--holdout", "0"), "a share of 0 cannot be held out; choose one between 0 and 1"),
        ("", ("--holdout", "1"), "a share of 1 cannot be held out"),
        ("", ("--holdout", "nan"), "a share of nan cannot be held out"),
        ("", ("--holdout", "0.1", "--seed", "-1"), "seed -1 is out of range"),
        ("test/", ("--holdout", "0.1"), "makes a test split of the training images, but"),
        ("train/", ("--splits", "train", "val=train", "--holdout", "0.1"), "has train, val: leave it out"),
    ],
)
def test_a_share_that_cannot_be_held_out(tmp_path, prepare, top, options, message):
    code, said = prepare(tree_of_classes(top), *options)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_classes_of_one_image_give_none_to_hold_out(prepare):
    code, said = prepare({"a/0.png": encoded(noise(4, 4)), "b/0.png": encoded(noise(4, 4))}, "--holdout", "0.5")
    assert code == 2
    assert "of 2 samples none can be held out: no class has two" in said


def test_the_output_may_not_lie_in_the_tree(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(encoded(noise(4, 4)))
    assert main(["folder", "--source", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "--output lies inside --source" in capsys.readouterr().err
