"""`data_prep text`: the end of every file is held out, and what cannot be used is one sentence."""

import json

import numpy as np
import pytest
from test_text_tokens import TEXT, byte_level

from data_prep.__main__ import main
from hvdlocal.data import ShardedDataset


def prepare(tmp_path, *arguments):
    return main(["text", "--output", str(tmp_path / "out"), "--source", *map(str, arguments)])


def stream(dataset):
    """All tokens of a split that whole windows of 8 hold, from its beginning on."""
    return dataset.take(np.arange(len(dataset)))[:, :-1].ravel()


def test_bytes(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"a" * 900 + b"A" * 100)
    (tmp_path / "b.txt").write_bytes(b"b" * 1800 + b"B" * 200)
    assert prepare(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", "--block", 8, "--verify") == 0
    out = capsys.readouterr().out
    assert "train: 2700 tokens in 1 shard" in out
    assert "test: 300 tokens, all checksums agree" in out
    train, test = (ShardedDataset(tmp_path / "out", split, block=1) for split in ("train", "test"))
    assert bytes(stream(train)) == (b"a" * 900 + b"b" * 1800)[:-1]
    assert bytes(stream(test)) == (b"A" * 100 + b"B" * 200)[:-1]
    assert (train.facts["vocabulary"], train.facts["dtype"], train.facts["text_bytes"]) == (256, "uint8", 2700)
    assert ShardedDataset(tmp_path / "out").facts["block"] == 8


def test_bytes_need_no_encoding(tmp_path):
    content = bytes(range(256)) * 10
    (tmp_path / "a.txt").write_bytes(content)
    assert prepare(tmp_path, tmp_path / "a.txt", "--holdout", 0, "--block", 8) == 0
    assert bytes(stream(ShardedDataset(tmp_path / "out", block=1))) == content[:-1]
    assert not (tmp_path / "out" / "test").exists()


def test_a_test_split_is_not_left_beside_a_text_that_contains_it(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"a" * 900)
    assert prepare(tmp_path, tmp_path / "a.txt", "--block", 8) == 0
    assert prepare(tmp_path, tmp_path / "a.txt", "--block", 8, "--holdout", 0, "--overwrite") == 2
    assert "was held out of an earlier train split" in capsys.readouterr().err


def test_a_tokenizer(tmp_path, capsys):
    library = byte_level(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    options = ["--tokenizer", tmp_path / "tokenizer.json", "--holdout", 0, "--block", 8]
    assert prepare(tmp_path, tmp_path / "a.txt", *options) == 0
    assert "stand for" not in capsys.readouterr().err, "every byte of the text is in a token"
    dataset = ShardedDataset(tmp_path / "out", block=1)
    ids = library.encode(TEXT).ids
    np.testing.assert_array_equal(stream(dataset), ids[:-1])
    assert dataset.facts["dtype"] == "uint16"
    assert dataset.facts["text_bytes"] == len(TEXT.encode())
    preparation = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())["preparation"]
    assert preparation["tokenizer"] == "tokenizer.json"


def test_a_tokenizer_that_drops_characters_is_said(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<unk>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("one two " * 50)
    options = ["--tokenizer", tmp_path / "tokenizer.json", "--holdout", 0, "--block", 8]
    assert prepare(tmp_path, tmp_path / "a.txt", *options) == 0
    assert "the tokens of the train split stand for 200 bytes, but its text has 400" in capsys.readouterr().err


def test_shards_hold_the_same_stream(tmp_path):
    byte_level(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    streams = []
    for shards in (1, 3):
        options = ["--tokenizer", tmp_path / "tokenizer.json", "--shards", shards, "--holdout", 0, "--block", 8]
        assert (
            main(
                ["text", "--output", str(tmp_path / str(shards)), *map(str, ["--source", tmp_path / "a.txt", *options])]
            )
            == 0
        )
        streams.append(stream(ShardedDataset(tmp_path / str(shards))))
    np.testing.assert_array_equal(*streams)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "there is no such file"),
        (b"", [], "a.txt is empty"),
        (
            b"a" * 100,
            ["--block", "90"],
            "the train split has 90 tokens, fewer than a sequence of 90 and the token after it",
        ),
        (b"a" * 100, ["--block", "20"], "the test split has 10 tokens, fewer than a sequence of 20"),
        (b"a" * 100, ["--block", "0"], "--block 0: a sequence has at least one token"),
        (b"a" * 100, ["--holdout", "1"], "--holdout 1.0: choose a share from 0 to less than 1"),
        (b"a" * 100, ["--holdout", "nan"], "--holdout nan: choose a share"),
        (b"a" * 100, ["--tokenizer", "nowhere.json"], "--tokenizer nowhere.json: there is no such file; it is 'bytes'"),
    ],
)
def test_refusals(tmp_path, capsys, content, options, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    assert prepare(tmp_path, tmp_path / "a.txt", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path).rglob("*.h5"))


def test_a_file_that_comes_twice_is_refused(tmp_path, capsys):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    path.write_bytes(b"a" * 1000)
    link.symlink_to(path)
    (tmp_path / "copy.txt").write_bytes(b"a" * 1000)
    for files, message in [((path, path), "a.txt is named twice"), ((path, link), "link.txt are the same file")]:
        assert prepare(tmp_path, *files, "--block", 8) == 2
        assert f"{message}, so its text would come twice in an epoch; name every file once" in capsys.readouterr().err
    assert prepare(tmp_path, path, tmp_path / "copy.txt", "--block", 8) == 0, "a copy is another file"


def test_text_that_is_not_utf8(tmp_path, capsys):
    byte_level(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_bytes(b"good\n" * 100 + b"caf\xe9\n" + b"good\n" * 100)
    assert prepare(tmp_path, tmp_path / "a.txt", "--tokenizer", tmp_path / "tokenizer.json") == 2
    assert "a.txt is not UTF-8 at byte 503 (0xe9)" in capsys.readouterr().err
