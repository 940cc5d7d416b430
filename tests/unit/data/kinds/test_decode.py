import io
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from hvdlocal.data import JpegShardWriter, Loader, ShardedDataset
from hvdlocal.data.augment import CenterCrop, RandomResizedCrop
from hvdlocal.data.errors import DamagedDataError
from hvdlocal.data.kinds import decode
from hvdlocal.data.kinds.decode import decode_crop, decode_crops, decoder_description
from hvdlocal.data.random_keys import sample_keys


def picture(height, width):
    """A smooth RGB picture, on which all decoders agree to a few units: bright to the right, red to the bottom."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([40 + 170 * y, 30 + 200 * x, 128 + 60 * np.sin(3 * x + 2 * y)], axis=2).round().astype(np.uint8)


def encoded(pixels, image_format="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} | options if image_format == "JPEG" else options
    Image.fromarray(pixels).convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def whole(data, height, width, size):
    out = np.zeros((size, size, 3), np.uint8)
    decode_crop(data, (height, width), [0, 0, height, width], out)
    return out


@pytest.fixture
def make_jpegs(tmp_path):
    """Writes n JPEGs of differing sizes, number i with a mean brightness of about 2 i, and opens them."""

    def make(n, num_shards=2):
        files = [encoded(np.full((20 + i % 7, 30 - i % 5, 3), 2 * i, np.uint8)) for i in range(n)]
        writer = JpegShardWriter(tmp_path, "train", classes=("ant", "bee", "cat"), num_shards=num_shards)
        writer.write(files, np.arange(n) % 3)
        return ShardedDataset(tmp_path)

    return make


@pytest.mark.parametrize(
    ("image_format", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"subsampling": 2}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "L", {}),
    ],
)
@pytest.mark.parametrize("missing", [(), ("simplejpeg",), ("simplejpeg", "cv2")])
def test_every_kind_of_file_looks_as_pillow_sees_it(monkeypatch, image_format, mode, options, missing):
    for library in missing:
        monkeypatch.setattr(decode, library, None)
    data = encoded(picture(64, 64), image_format, mode, **options)
    assert np.abs(whole(data, 64, 64, 64) - by_pillow(data)).max() <= 4
    small = np.asarray(Image.fromarray(by_pillow(data).astype(np.uint8)).resize((16, 16), Image.Resampling.BOX))
    assert np.abs(whole(data, 64, 64, 16).astype(int) - small).max() <= 8


@pytest.mark.parametrize("missing", [(), ("simplejpeg",), ("cv2",)])
@pytest.mark.parametrize("box", [[0, 0, 480, 640], [100, 50, 300, 200], [10, 20, 40, 60], [470, 0, 10, 640]])
def test_a_box_is_what_it_is_in_the_whole_image(monkeypatch, missing, box):
    for library in missing:
        monkeypatch.setattr(decode, library, None)
    data = encoded(picture(480, 640))
    out = np.zeros((32, 32, 3), np.uint8)
    decode_crop(data, (480, 640), box, out)
    top, left, height, width = box
    expected = Image.fromarray(picture(480, 640)[top : top + height, left : left + width]).resize((32, 32))
    assert np.abs(out - np.asarray(expected).astype(int)).max() <= 4


def test_what_is_decoded_at_a_fraction_is_still_large_enough(monkeypatch):
    decoded = []
    monkeypatch.setattr(decode, "_resize", lambda image, out: decoded.append(image.shape[:2]))
    data = encoded(picture(400, 600))
    for library in (decode.simplejpeg, None):
        monkeypatch.setattr(decode, "simplejpeg", library)
        for side in (400, 399, 200, 199, 100, 50):
            decode_crop(data, (400, 600), [0, 0, side, side], np.zeros((50, 50, 3), np.uint8))
            found = decoded.pop()[0]
            if side < 2 * 2 * 50:
                assert found == side
            else:
                assert 2 * 50 <= found <= side / 2 + 1


def test_a_box_of_one_pixel_at_the_corner():
    data = encoded(picture(401, 601))
    out = np.zeros((2, 2, 3), np.uint8)
    decode_crop(data, (401, 601), [400, 600, 1, 1], out)
    assert np.abs(out - picture(401, 601)[400, 600].astype(int)).max() <= 4


def test_real_photographs_look_as_pillow_sees_them(jpeg_source):
    differences = []
    for path in sorted(jpeg_source.glob("*/*/*.jpg"))[::10]:
        data = path.read_bytes()
        with Image.open(path) as image:
            width, height = image.size
            side = min(height, width)
            box = [(height - side) // 2, (width - side) // 2, side, side]
            region = (box[1], box[0], box[1] + side, box[0] + side)
            expected = image.convert("RGB").resize((112, 112), Image.Resampling.BOX, region)
        out = np.zeros((112, 112, 3), np.uint8)
        decode_crop(data, (height, width), box, out)
        differences.append(np.abs(out - np.asarray(expected).astype(int)).mean())
    assert differences
    assert max(differences) < 4


def test_crops_of_a_data_set(make_jpegs):
    dataset = make_jpegs(20)
    keys = sample_keys(0, np.zeros(20, np.int64), np.arange(20))
    crop = RandomResizedCrop(8)
    out = np.zeros((20, 8, 8, 3), np.uint8)
    num_bytes, read_seconds, decode_seconds = decode_crops(dataset, np.arange(20), crop.boxes(dataset.dims, keys), out)
    assert np.abs(out - 2 * dataset.index[:, None, None, None]).max() <= 2
    assert num_bytes == sum(len(dataset.bytes_of(i)) for i in range(20))
    assert read_seconds > 0
    assert decode_seconds > 0


def test_loader_of_jpegs(make_jpegs):
    dataset = make_jpegs(30)
    loader = Loader(dataset, 4, crop=RandomResizedCrop(8), threads=2)
    for _ in range(2):
        seen = []
        for images, labels in loader:
            assert images.shape == (4, 8, 8, 3)
            brightness = images.float().mean((1, 2, 3)).numpy() / 2
            np.testing.assert_array_equal(brightness.round() % 3, labels)
            seen.append(brightness.round().astype(int))
    seen = np.concatenate(seen)
    assert len(set(seen)) == len(seen) == 28  # the second epoch: positions 32..59
    stats = loader.stats()
    assert stats["samples"] == 60
    assert stats["decode_rate"] == stats["samples"] / stats["decode_seconds"] > 0
    assert 60 * 300 < stats["bytes"] < 60 * 2000


def test_batches_do_not_depend_on_the_number_of_threads(make_jpegs):
    dataset = make_jpegs(30)

    def batches(threads):
        loader = Loader(dataset, 20, crop=RandomResizedCrop(8), threads=threads, prefetch=3)
        return [images.numpy().copy() for images, _ in islice(loader.endless(), 12)]

    expected = batches(1)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(batches(threads), expected)


@pytest.mark.parametrize("damage", ["garbage", "half"])
def test_an_unreadable_jpeg_is_named(make_jpegs, monkeypatch, damage):
    dataset = make_jpegs(30)
    bytes_of, bad = dataset.bytes_of, 17
    half = bytes(bytes_of(bad))[: len(bytes_of(bad)) // 2]
    replacement = memoryview(b"no picture" if damage == "garbage" else half)
    monkeypatch.setattr(dataset, "bytes_of", lambda sample: replacement if sample == bad else bytes_of(sample))
    for threads in (1, 3):
        with pytest.raises(DamagedDataError, match="cannot be decoded") as error:
            list(Loader(dataset, 8, crop=CenterCrop(8, 10), threads=threads))
        assert str(error.value).startswith(dataset.name_of(bad))
        assert "00001-of-00002.h5" in str(error.value)
        assert "sample 2 (bytes" in str(error.value)
        assert "write the data set again" in str(error.value)


def test_crop_is_for_jpegs_and_needed_there(make_jpegs, tmp_path):
    with pytest.raises(ValueError, match="crop is needed"):
        Loader(make_jpegs(5), 2)


def test_the_decoder_says_what_it_is(monkeypatch):
    pytest.importorskip("simplejpeg")
    pytest.importorskip("cv2")
    described = decoder_description()
    assert described.startswith("decoded by simplejpeg 1.")
    assert ", else Pillow 1" in described
    assert "resized by OpenCV" in described
    monkeypatch.setattr(decode, "simplejpeg", None)
    monkeypatch.setattr(decode, "cv2", None)
    assert decoder_description().startswith("decoded by Pillow 1")
    assert decoder_description().endswith("resized by Pillow")


def test_a_file_that_is_not_as_recorded_is_refused():
    with pytest.raises(ValueError, match="64×64 pixels large, 32×64 are on record"):
        whole(encoded(picture(64, 64), "PNG"), 32, 64, 16)
