"""Text becomes tokens piece by piece: the same tokens, however it is read, and the bytes that each stands for."""

import numpy as np
import pytest

from data_prep import text_tokens
from data_prep.text_tokens import TextTokens, cut_text
from data_prep.tokenizer import ByteTokenizer, dtype_of, open_tokenizer
from hvdlocal.communicator import SingleProcess

ALONE = SingleProcess()
TEXT = "One, two, three: où sont les œufs?\nDrei Äpfel, vier Birnen.\n" * 40


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "a.txt"


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text_tokens, "PIECE_BYTES", 160)
    monkeypatch.setattr(text_tokens, "_LINE_BYTES", 80)


def byte_level(path, vocabulary=400, **trainer):
    """Writes a tokenizer like GPT-2's: pairs of bytes, with one special token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False} | trainer
    tokenizer.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, **options))
    tokenizer.save(str(path))
    return tokenizer


def test_the_end_of_a_file_is_held_out(path):
    train, test = cut_text(path, 0.25)
    size = path.stat().st_size
    assert (train[0].start, train[-1].stop, test[-1].stop) == (0, test[0].start, size)
    assert train[-1].stop == size - size // 4
    assert cut_text(path, 0)[1] == []


def test_a_cut_does_not_divide_a_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ä€😀" * 10, encoding="utf-8")
    for percent in range(1, 100):
        train, test = cut_text(path, percent / 100)
        text = "".join(piece.read().decode("utf-8") for piece in train + test)
        assert text == "ä€😀" * 10


def test_pieces_end_with_lines(path, small_pieces):
    train, _ = cut_text(path, 0)
    assert len(train) > 5
    assert [piece.stop for piece in train[:-1]] == [piece.start for piece in train[1:]]
    assert all(piece.read().endswith(b"\n") for piece in train)
    assert b"".join(piece.read() for piece in train) == path.read_bytes()


def test_pieces_without_lines_end_with_a_character(tmp_path, small_pieces):
    path = tmp_path / "a.txt"
    path.write_text("😀" * 200, encoding="utf-8")
    pieces, _ = cut_text(path, 0)
    assert "".join(piece.read().decode("utf-8") for piece in pieces) == "😀" * 200
    assert all(158 <= piece.stop - piece.start <= 160 for piece in pieces[:-1])


@pytest.mark.parametrize("name", ["bytes", "json"])
def test_any_part_of_the_tokens_is_the_same(path, small_pieces, tmp_path, name):
    if name == "json":
        byte_level(tmp_path / "tokenizer.json")
    tokenizer = open_tokenizer("bytes" if name == "bytes" else str(tmp_path / "tokenizer.json"))
    pieces, _ = cut_text(path, 0)
    tokens = TextTokens(pieces, tokenizer, ALONE)
    expected = np.concatenate([tokenizer.encode(piece.read()) for piece in pieces])
    assert tokens.dtype == expected.dtype == (np.uint8 if name == "bytes" else np.uint16)
    np.testing.assert_array_equal(tokens[0 : len(tokens)], expected)
    for start in range(0, len(tokens), 37):
        np.testing.assert_array_equal(tokens[start : start + 90], expected[start : start + 90])
    assert tokens.text_bytes == len(TEXT.encode())
    assert tokenizer.token_bytes[expected].sum() == len(TEXT.encode())


def test_special_tokens_stand_for_no_bytes(tmp_path):
    byte_level(tmp_path / "tokenizer.json")
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(b"One<|endoftext|>two")
    assert tokenizer.token_bytes[ids].sum() == 6
    assert 0 in tokenizer.token_bytes[ids]


def test_a_tokenizer_neither_cuts_nor_fills_nor_adds(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    saved = byte_level(tmp_path / "tokenizer.json")
    plain = saved.encode(TEXT).ids
    saved.enable_truncation(max_length=8)
    saved.enable_padding(length=16)
    saved.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    saved.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).encode(TEXT.encode()).tolist() == plain


def test_words_and_sentence_pieces_count_their_bytes(tmp_path):
    """A vocabulary that marks the beginnings of words: "▁two" stands for a space and three letters."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "▁": 1, "one": 2, "▁two": 3, "é": 4, "<0x0A>": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Metaspace(), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).token_bytes.tolist() == [0, 1, 3, 4, 2, 1]


def trained(tmp_path, *, model=None, suffix=None, prefix=None, normalizer=None, pre_tokenizer=None, decoder=None):
    """Trains a tokenizer of some kind on the text, and opens it."""
    tokenizers = pytest.importorskip("tokenizers")
    marks = {"end_of_word_suffix": suffix, "continuing_subword_prefix": prefix}
    marks = {name: value for name, value in marks.items() if value}
    library = tokenizers.Tokenizer(model or tokenizers.models.BPE(**marks))
    if normalizer:
        library.normalizer = normalizer
    if pre_tokenizer:
        library.pre_tokenizer = pre_tokenizer
    if decoder:
        library.decoder = decoder
    kinds = {"BPE": tokenizers.trainers.BpeTrainer, "Unigram": tokenizers.trainers.UnigramTrainer}
    options = {"initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet(), "show_progress": False} | marks
    library.train_from_iterator([TEXT], kinds[type(library.model).__name__](vocab_size=500, **options))
    library.save(str(tmp_path / "tokenizer.json"))
    return open_tokenizer(str(tmp_path / "tokenizer.json"))


KINDS = {
    "GPT-2": lambda t: {
        "pre_tokenizer": t.pre_tokenizers.ByteLevel(add_prefix_space=False),
        "decoder": t.decoders.ByteLevel(),
    },
    "bytes in the normalizer": lambda t: {"normalizer": t.normalizers.ByteLevel(), "decoder": t.decoders.ByteLevel()},
    "CLIP": lambda t: {
        "suffix": "</w>",
        "pre_tokenizer": t.pre_tokenizers.ByteLevel(add_prefix_space=False),
        "decoder": t.decoders.ByteLevel(),
    },
    "bytes with a prefix": lambda t: {
        "prefix": "##",
        "pre_tokenizer": t.pre_tokenizers.ByteLevel(add_prefix_space=False),
    },
    "a sequence": lambda t: {
        "pre_tokenizer": t.pre_tokenizers.Sequence(
            [t.pre_tokenizers.Digits(), t.pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    },
    "characters": lambda t: {},
    "characters that are joined": lambda t: {"decoder": t.decoders.Fuse()},
    "characters with marks": lambda t: {"suffix": "</w>", "prefix": "##"},
    "Metaspace": lambda t: {
        "pre_tokenizer": t.pre_tokenizers.Metaspace(prepend_scheme="never"),
        "decoder": t.decoders.Metaspace(prepend_scheme="never"),
    },
    "Metaspace without a decoder": lambda t: {"pre_tokenizer": t.pre_tokenizers.Metaspace(prepend_scheme="never")},
    "Unigram": lambda t: {
        "model": t.models.Unigram(),
        "pre_tokenizer": t.pre_tokenizers.Metaspace(prepend_scheme="never"),
        "decoder": t.decoders.Metaspace(prepend_scheme="never"),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_text_stand_for_its_bytes(tmp_path, kind):
    tokenizer = trained(tmp_path, **KINDS[kind](pytest.importorskip("tokenizers")))
    for text in (TEXT, *TEXT.splitlines(keepends=True)[:2]):
        assert tokenizer.token_bytes[tokenizer.encode(text.encode())].sum() == len(text.encode())


def test_a_word_ends_with_a_space_where_the_decoder_makes_one(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    parts = {"suffix": "</w>", "pre_tokenizer": tokenizers.pre_tokenizers.WhitespaceSplit()}
    tokenizer = trained(tmp_path, **parts, decoder=tokenizers.decoders.BPEDecoder())
    assert tokenizer.token_bytes[tokenizer.encode(TEXT.encode())].sum() == len(TEXT.encode())


def test_the_bytes_of_tokens_do_not_depend_on_the_order_of_the_vocabulary(tmp_path):
    """`get_vocab` has another order each time; a token whose neighbour is joined to it must not matter."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "do": 1, "##g": 2, "##s": 3, "not": 4}))
    words.decoder = tokenizers.decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    for _ in range(20):
        assert open_tokenizer(str(tmp_path / "tokenizer.json")).token_bytes.tolist() == [6, 3, 1, 1, 4]


def test_a_token_that_names_a_step_does_not_make_it_one(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {'"type": "ByteLevel"': 0, "é": 1}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    library.post_processor = tokenizers.processors.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).token_bytes.tolist() == [19, 2]


def test_text_that_the_tokenizer_cannot_encode(path, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"One": 0}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    message = (
        r"a\.txt: the tokenizer cannot encode the text \(.*\[UNK\].*\); choose a tokenizer with a token for what it"
    )
    with pytest.raises(ValueError, match=message):
        TextTokens(cut_text(path, 0)[0], open_tokenizer(str(tmp_path / "tokenizer.json")), ALONE)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(256, "u1"), (257, "u2"), (65_536, "u2"), (65_537, "u4")])
def test_dtype_of_a_vocabulary(vocabulary, dtype):
    assert dtype_of(vocabulary) == np.dtype(dtype)


def test_the_identity_depends_on_the_text_and_the_tokenizer(path, tmp_path):
    byte_level(tmp_path / "a.json")
    byte_level(tmp_path / "b.json", vocabulary=270)
    tokenizers = [ByteTokenizer(), open_tokenizer(str(tmp_path / "a.json")), open_tokenizer(str(tmp_path / "b.json"))]
    before = {TextTokens(cut_text(path, 0)[0], tokenizer, ALONE).identity for tokenizer in tokenizers}
    path.write_text(TEXT.replace("vier", "fünf"), encoding="utf-8")
    after = {TextTokens(cut_text(path, 0)[0], tokenizer, ALONE).identity for tokenizer in tokenizers}
    assert len(before | after) == 6


def test_text_that_is_not_utf8(path, tmp_path, small_pieces):
    byte_level(tmp_path / "tokenizer.json")
    content = bytearray(path.read_bytes())
    content[1000] = 0xFF
    path.write_bytes(content)
    pieces, _ = cut_text(path, 0)
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 at byte 1000 \(0xff\)"):
        TextTokens(pieces, open_tokenizer(str(tmp_path / "tokenizer.json")), ALONE)
    assert len(TextTokens(pieces, ByteTokenizer(), ALONE)) == len(content)


def test_a_file_that_changes_meanwhile(path):
    tokens = TextTokens(cut_text(path, 0)[0], ByteTokenizer(), ALONE)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"a\.txt became shorter while it was read"):
        tokens[0:10]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.write_bytes(b""), r"a\.txt is empty"),
        (lambda path: path.mkdir(), "is no regular file; name the text files themselves"),
    ],
    ids=["missing", "empty", "directory"],
)
def test_refused_files(tmp_path, make, message):
    make(tmp_path / "a.txt")
    with pytest.raises((ValueError, OSError), match=message):
        cut_text(tmp_path / "a.txt", 0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; it is 'bytes', or a JSON file of the tokenizers library"),
        ("", "this is no tokenizer of the tokenizers library"),
        ('{"a": 1}', "this is no tokenizer of the tokenizers library"),
        ("\x00\xff", "this is no tokenizer of the tokenizers library"),
    ],
)
def test_refused_tokenizers(tmp_path, content, message):
    pytest.importorskip("tokenizers")
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        open_tokenizer(str(tmp_path / "tokenizer.json"))


def test_an_empty_tokenizer_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="its vocabulary is empty; train it first"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
