import errno
import io
import os
import zlib

import h5py
import numpy as np
import pytest

from hvdlocal.data import BadSamplesError, JpegSample, JpegShardWriter
from hvdlocal.data.format.manifest import Manifest
from hvdlocal.data.format.shard import open_shard
from hvdlocal.data.permutations import pre_shuffle

simplejpeg = pytest.importorskip("simplejpeg")
Image = pytest.importorskip("PIL.Image")

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def writer(tmp_path, **options):
    return JpegShardWriter(tmp_path, "train", **({"classes": CLASSES} | options))


def content(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_shards", [1, 4])
def test_every_file_lies_in_the_stream_as_it_was(tmp_path, jpeg_files, num_shards):
    files, labels = jpeg_files(41)
    manifest = writer(tmp_path, num_shards=num_shards, seed=9, threads=3).write(files, labels)
    assert (manifest.kind, manifest.shape, manifest.num_samples) == ("jpeg", None, 41)
    assert manifest == Manifest.load(tmp_path / "train" / "manifest.json")
    found = []
    for entry in manifest.shards:
        with h5py.File(tmp_path / "train" / entry.file) as file:
            assert {name: (file[name].dtype.str, file[name].ndim, file[name].chunks) for name in file} == {
                "jpeg": ("|u1", 1, None),
                "offsets": ("<u8", 1, None),
                "dims": ("<u2", 2, None),
                "labels": ("<i4", 1, None),
                "index": ("<i8", 1, None),
                "crc32": ("<u4", 1, None),
            }
            stream, offsets = file["jpeg"][:].tobytes(), file["offsets"][:]
            for i, index in enumerate(file["index"][:]):
                one = stream[offsets[i] : offsets[i + 1]]
                assert one == files[index]
                assert file["labels"][i] == labels[index]
                assert file["crc32"][i] == zlib.crc32(one)
                assert tuple(file["dims"][i]) == simplejpeg.decode_jpeg_header(one)[:2]
                found.append(index)
            assert file["jpeg"].id.get_offset() % 4096 == 0
    np.testing.assert_array_equal(found, pre_shuffle(9, 41))


def test_open_shard_tells_where_each_file_lies(tmp_path, jpeg_files):
    files, labels = jpeg_files(12)
    manifest = writer(tmp_path).write(files, labels)
    (entry,) = manifest.shards
    shard = open_shard(tmp_path / "train" / entry.file, entry, manifest)
    raw = (tmp_path / "train" / entry.file).read_bytes()
    (column,) = shard.columns
    assert column.data_bytes == sum(map(len, files))
    np.testing.assert_array_equal(shard.tables["offsets"], column.unit_bounds)
    for i, index in enumerate(shard.tables["index"]):
        start, stop = column.data_offset + column.unit_bounds[i : i + 2]
        assert raw[start:stop] == files[index]
        column.check_unit(i, raw[start:stop])
    shard.verify()


def test_mean_and_std_are_those_of_all_decoded_pixels(tmp_path, jpeg_files):
    files, labels = jpeg_files(23)
    manifest = writer(tmp_path, num_shards=3).write(files, labels)
    pixels = np.concatenate([simplejpeg.decode_jpeg(one, "RGB").reshape(-1, 3) for one in files]) / 255
    np.testing.assert_allclose(manifest.statistics["mean"], pixels.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(manifest.statistics["std"], pixels.std(axis=0), rtol=1e-12)


def test_a_flipped_bit_is_named(tmp_path, jpeg_files):
    manifest = writer(tmp_path).write(*jpeg_files(12))
    (entry,) = manifest.shards
    path = tmp_path / "train" / entry.file
    shard = open_shard(path, entry, manifest)
    start, stop = (int(bound) + shard.columns[0].data_offset for bound in shard.columns[0].unit_bounds[7:9])
    raw = bytearray(path.read_bytes())
    expected = zlib.crc32(raw[start:stop])
    raw[start + 100] ^= 1 << 5
    found = zlib.crc32(raw[start:stop])
    path.write_bytes(raw)
    message = (
        rf"{path} is damaged in sample 7 \(bytes {start}\.\.{stop - 1} of the file\): "
        rf"their crc32 is {found:08x}, {expected:08x} was written; copy"
    )
    with pytest.raises(ValueError, match=message):
        shard.verify()


@pytest.mark.parametrize("name", ["offsets", "dims", "labels", "index", "crc32"])
def test_a_changed_number_beside_the_stream_is_noticed(tmp_path, jpeg_files, name):
    manifest = writer(tmp_path).write(*jpeg_files(12))
    (entry,) = manifest.shards
    with h5py.File(tmp_path / "train" / entry.file, "r+") as file:
        file[name][...] = file[name][:] + np.eye(1, file[name].size, 5, dtype=np.uint8).reshape(file[name].shape)
    with pytest.raises(ValueError, match=r"is not the shard that manifest\.json describes"):
        open_shard(tmp_path / "train" / entry.file, entry, manifest)


def bad_files(jpeg_files):
    """Twenty files, four of them bad: 3 cut off, 8 empty, 11 a PNG, 12 CMYK."""
    files, labels = jpeg_files(20)
    buffers = [io.BytesIO(), io.BytesIO()]
    Image.new("RGB", (9, 9)).save(buffers[0], "PNG")
    Image.new("CMYK", (9, 9)).save(buffers[1], "JPEG")
    files[3], files[8], files[11], files[12] = files[3][:200], b"", *(buffer.getvalue() for buffer in buffers)
    return files, labels


BAD_REASONS = {
    3: "cannot be decoded",
    8: "is not an image of a known format",
    11: "is a PNG file; convert it to JPEG",
    12: "is a CMYK JPEG; convert it to RGB",
}


def test_bad_files_are_refused_after_all_have_been_tried(tmp_path, jpeg_files):
    files, labels = bad_files(jpeg_files)
    names = [f"class/{i}.jpg" for i in range(20)]
    with pytest.raises(BadSamplesError, match=r"4 of 20 samples cannot be used \(class/3\.jpg .*bad skip") as error:
        writer(tmp_path, num_shards=3).write(files, labels, names=names)
    report = (tmp_path / "train" / "bad_files.txt").read_text().splitlines()
    assert report == error.value.lines
    assert [line.split()[0] for line in report] == [names[i] for i in BAD_REASONS]
    assert all(reason in line for line, reason in zip(report, BAD_REASONS.values(), strict=True))
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_bad_files_are_left_out_on_request(tmp_path, jpeg_files):
    files, labels = bad_files(jpeg_files)
    manifest = writer(tmp_path, num_shards=3, skip_bad=True).write(files, labels)
    assert manifest.num_samples == 16
    assert manifest.preparation["left_out"] == 4
    index = np.concatenate(
        [open_shard(tmp_path / "train" / e.file, e, manifest).tables["index"] for e in manifest.shards]
    )
    np.testing.assert_array_equal(index, [i for i in pre_shuffle(0, 20) if i not in BAD_REASONS])
    report = (tmp_path / "train" / "bad_files.txt").read_text()
    assert report.startswith("sample 3 cannot be decoded")


class Reads(list):
    """Files that note which were read."""

    def __init__(self, files):
        super().__init__(files)
        self.read = set()

    def __getitem__(self, index):
        self.read.add(index)
        return super().__getitem__(index)


def test_a_refused_set_is_finished_by_skipping(tmp_path, jpeg_files):
    files, labels = bad_files(jpeg_files)
    with pytest.raises(BadSamplesError):
        writer(tmp_path, num_shards=5).write(files, labels, identity="x")
    again = Reads(files)
    writer(tmp_path, num_shards=5, skip_bad=True).write(again, labels, identity="x")
    shards = pre_shuffle(0, 20).reshape(5, 4).tolist()
    with_bad = [shard for shard in shards if set(shard) & set(BAD_REASONS)]
    assert again.read == {row for shard in with_bad for row in shard}
    assert len(with_bad) < 5, "the others are kept"
    writer(tmp_path / "direct", num_shards=5, skip_bad=True).write(files, labels, identity="x")
    found, expected = content(tmp_path / "train"), content(tmp_path / "direct" / "train")
    assert found == expected
    assert len(found) == 7


@pytest.mark.parametrize("skipped_before", [False, True])
def test_mended_files_are_taken_when_it_runs_again(tmp_path, jpeg_files, skipped_before):
    """Nothing but the content of the bad files changes, so that the plan is the same."""
    files, labels = bad_files(jpeg_files)
    if skipped_before:
        writer(tmp_path, num_shards=3, skip_bad=True).write(files, labels, identity="x")
        before = content(tmp_path)
    with pytest.raises(BadSamplesError):
        writer(tmp_path, num_shards=3).write(files, labels, identity="x")
    if skipped_before:
        assert before.items() <= content(tmp_path).items(), "until there is a better one, it stays"
    mended, _ = jpeg_files(20)
    writer(tmp_path, num_shards=3).write(mended, labels, identity="x")
    writer(tmp_path / "direct", num_shards=3).write(mended, labels, identity="x")
    assert content(tmp_path / "train") == content(tmp_path / "direct" / "train")
    assert not (tmp_path / "train" / "bad_files.txt").exists()


def test_names_that_are_not_utf_8(tmp_path, jpeg_files):
    files, labels = bad_files(jpeg_files)
    names = [f"\udcff{i}" for i in range(20)]  # as the file system's b"\xff…" comes from os
    with pytest.raises(BadSamplesError):
        writer(tmp_path).write(files, labels, names=names)
    lines = (tmp_path / "train" / "bad_files.txt").read_text("ascii").splitlines()
    assert [line.split()[0] for line in lines] == [rf"\udcff{i}" for i in BAD_REASONS]


def test_a_shard_of_bad_files_alone(tmp_path, jpeg_files):
    with pytest.raises(ValueError, match="no sample of shard 0 can be used"):
        writer(tmp_path, num_shards=2, skip_bad=True).write([b"no"] * 2, [0, 1])


@pytest.mark.parametrize(
    ("number", "bad"), [(errno.ENOENT, True), (errno.EACCES, True), (errno.EIO, True), (errno.ESTALE, False)]
)
@pytest.mark.parametrize("identity", [None, "x"])
def test_an_unreadable_file_is_a_bad_one_and_a_lost_file_system_is_not(tmp_path, jpeg_files, number, bad, identity):
    files, labels = jpeg_files(5)

    class Failing(list):
        def __getitem__(self, index):
            if index == 3:
                raise OSError(number, os.strerror(number))
            return super().__getitem__(index)

    if bad:
        with pytest.raises(BadSamplesError, match=rf"sample 3 cannot be read \({os.strerror(number)}\)"):
            writer(tmp_path).write(Failing(files), labels, identity=identity)
        assert writer(tmp_path, skip_bad=True).write(Failing(files), labels, identity=identity).num_samples == 4
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            writer(tmp_path, skip_bad=True).write(Failing(files), labels, identity=identity)
        assert not content(tmp_path)


def test_notes_are_counted(tmp_path, jpeg_files):
    files, labels = jpeg_files(9)
    samples = [JpegSample(one, "turned" if i % 3 == 0 else "") for i, one in enumerate(files)]
    manifest = writer(tmp_path, num_shards=2).write(samples, labels, preparation={"about": "a test"})
    assert manifest.preparation["notes"] == {"turned": 3}
    assert manifest.preparation["about"] == "a test"
    assert manifest.preparation["simplejpeg"] == simplejpeg.__version__


def test_a_giant_is_not_believed(tmp_path):
    start_of_frame = b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    with pytest.raises(BadSamplesError, match=r"claims .*more .*than are believed"):
        writer(tmp_path).write([b"\xff\xd8" + start_of_frame + b"\xff\xd9"], [0])


def test_a_header_that_simplejpeg_has_no_name_for(tmp_path, jpeg_files, monkeypatch):
    files, labels = jpeg_files(4)

    def unnamed(data):
        raise KeyError(6)  # as for 4:1:0 and other rare subsamplings

    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", unnamed)
    manifest = writer(tmp_path).write(files, labels)
    assert (manifest.num_samples, manifest.preparation["notes"]) == (4, {"decoded leniently": 4})


def test_progress_counts_every_sample(tmp_path, jpeg_files):
    steps = []
    writer(tmp_path, num_shards=3, progress=steps.append).write(*jpeg_files(20))
    assert sum(steps) == 20


def test_without_the_libraries(tmp_path, monkeypatch, jpeg_files):
    files, labels = jpeg_files(2)
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    with pytest.raises(ValueError, match=r"pip install 'hvdlocal\[jpeg\]'"):
        writer(tmp_path).write(files, labels)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, 5], {}, "label 5 of sample 2 is out of range"),
        ([0, 1], {}, r"labels are int64 \(2,\).*shape \(3,\)"),
        ([0, 1, 2], {"num_shards": 4}, "3 files cannot fill 4 shards"),
        ([0, 1, 2], {"threads": 0}, "threads is 0"),
    ],
)
def test_unfit_input_is_refused(tmp_path, jpeg_files, labels, options, message):
    with pytest.raises(ValueError, match=message):
        writer(tmp_path, **options).write(jpeg_files(3)[0], labels)
    assert not content(tmp_path)
