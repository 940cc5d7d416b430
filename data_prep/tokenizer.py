"""From text to token ids: bytes as they are, or a tokenizer of the tokenizers library."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

BYTES = "bytes"
"""The name of the tokenizer whose token ids are the bytes of the text."""


class Tokenizer(Protocol):
    """Maps text to token ids.

    Attributes:
        description: facts for people, which the manifests record.
        identity: hex sha256 of what determines the token ids of a text, or a name.
        needs_utf8: whether the text must be UTF-8.
        token_bytes: uint16 (V,), how many bytes of text each token id stands for; special tokens stand for none.
    """

    @property
    def description(self) -> dict[str, str]: ...
    @property
    def identity(self) -> str: ...
    @property
    def needs_utf8(self) -> bool: ...
    @property
    def token_bytes(self) -> NDArray[np.uint16]: ...

    def encode(self, text: bytes) -> NDArray[np.integer[Any]]:
        """Returns the token ids (n,) of a text, in `dtype_of` this vocabulary.

        Raises:
            UnicodeDecodeError: the text is not UTF-8, and must be.
            ValueError: the tokenizer has no token for some of it.
        """


def dtype_of(vocabulary: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16 and uint32 that holds the token ids 0..vocabulary-1."""
    return np.dtype(np.min_scalar_type(vocabulary - 1))


def open_tokenizer(name: str) -> Tokenizer:
    """Opens the tokenizer that `--tokenizer` names: "bytes", or a JSON file of the tokenizers library.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no tokenizer, or the library is not installed.
    """
    return ByteTokenizer() if name == BYTES else FileTokenizer.open(Path(name))


class ByteTokenizer:
    """Every byte of the text is a token."""

    description = {"tokenizer": BYTES}  # noqa: RUF012
    identity = BYTES
    needs_utf8 = False
    token_bytes = np.ones(256, np.uint16)

    def encode(self, text: bytes) -> NDArray[np.uint8]:
        """See `Tokenizer`."""
        return np.frombuffer(text, np.uint8)


@dataclass(frozen=True, eq=False)
class FileTokenizer:
    """A tokenizer of the tokenizers library. It adds no special tokens to a text; those that are in the text, it recognises."""

    description: dict[str, str]
    identity: str
    token_bytes: NDArray[np.uint16]
    _library: Library
    needs_utf8 = True

    @classmethod
    def open(cls, path: Path) -> FileTokenizer:
        """Reads a JSON file. Errors: see `open_tokenizer`."""
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--tokenizer {path} needs the tokenizers library, which is not installed; pip install 'hvdlocal[text]'"
            ) from error
        if not path.is_file():
            raise FileNotFoundError(
                f"--tokenizer {path}: there is no such file; it is {BYTES!r}, or a JSON file of the tokenizers library"
            )
        content = path.read_bytes()
        try:
            library = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(
                f"--tokenizer {path}: this is no tokenizer of the tokenizers library ({error}); name the tokenizer.json that "
                "its save() wrote"
            ) from error
        library.no_truncation()  # a file may say that texts are cut off, or filled up
        library.no_padding()
        if not library.get_vocab_size():
            raise ValueError(f"--tokenizer {path}: its vocabulary is empty; train it first")
        description = {"tokenizer": path.name, "tokenizers": tokenizers.__version__}
        digest = hashlib.sha256(content).hexdigest()
        return cls(description | {"tokenizer_sha256": digest}, digest, _token_bytes(library), library)

    def encode(self, text: bytes) -> NDArray[np.integer[Any]]:
        """See `Tokenizer`."""
        decoded = text.decode("utf-8")
        try:
            ids = self._library.encode_batch_fast([decoded], add_special_tokens=False)[0].ids
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"the tokenizer cannot encode the text ({error})") from error
        return np.array(ids, dtype_of(len(self.token_bytes)))


def _token_bytes(library: Library) -> NDArray[np.uint16]:
    """How many bytes of UTF-8 each token id stands for, uint16 (V,); 0 for special tokens and for ids that no token has."""
    parts = json.loads(library.to_str())
    model = parts["model"]
    encoding = [step["type"] for name in ("normalizer", "pre_tokenizer") for step in _steps(parts[name])]
    by_byte = "ByteLevel" in encoding  # such a vocabulary spells every byte as one character
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    if parts["decoder"] is None and model["type"] in ("BPE", "Unigram"):
        library = _joining(
            library, [(prefix, ""), (suffix, ""), *(("▁", " ") for step in encoding if step == "Metaspace")]
        )
    vocabulary = library.get_vocab(with_added_tokens=True)
    added = library.get_added_tokens_decoder()
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    decoded = []
    for token, number in vocabulary.items():
        if number in added:
            lengths[number] = 0 if added[number].special else len(added[number].content.encode())
        elif by_byte:
            lengths[number] = len(token.removeprefix(prefix).removesuffix(suffix))
        elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            lengths[number] = 1
        else:
            decoded.append(number)
    if decoded:  # tokens at the ends of a text may lose a space when they are decoded, one between two others does not
        plain = min(decoded)
        around = len(_decode(library, [plain, plain]))
        for number in decoded:
            lengths[number] = len(_decode(library, [plain, number, plain])) - around
    return np.clip(lengths, 0, np.iinfo(np.uint16).max).astype(np.uint16)


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yields the steps of a part of a tokenizer, which may be a sequence of parts."""
    if part is None:
        return
    yield part
    for name in ("normalizers", "pretokenizers"):
        for step in part.get(name, ()):
            yield from _steps(step)


def _joining(library: Library, replacements: list[tuple[str, str]]) -> Library:
    """Returns a copy whose decoder makes the replacements in parts of words and joins them, without spaces in between."""
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import Fuse, Replace, Sequence

    copy = Library.from_str(library.to_str())
    steps = [Replace(old, new) for old, new in replacements if old]
    copy.decoder = Sequence([*steps, Fuse()])
    return copy


def _decode(library: Library, ids: list[int]) -> bytes:
    return library.decode(ids, skip_special_tokens=False).encode()
