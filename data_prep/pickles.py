"""Reading other people's pickles of arrays without running any code that they name.

A pickle is a program for a small machine that can call any function it names. Here it finds a few names, all of them
harmless stand-ins of this module; what they stand for in NumPy is never called by the pickle, and nothing that outlives
the reading can be changed by it. The machine is Python's own slow one, since the fast one allocates whatever a damaged
file asks for. A few bytes can nest a tuple so often within itself that hashing, printing or converting it takes for ever;
so none of that is done to more than flat lists.
"""

from __future__ import annotations

import mmap
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")


def load_arrays(path: Path) -> Any:
    """The content of a pickle file: text, a number, an array of numbers, a flat list or tuple, or a dict of those.

    Text of Python 2 comes back as bytes. Large uint8 arrays are read-only maps of the file where possible.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no pickle, is damaged, or asks for anything else; the message is the reason alone.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; unpack the whole archive")
    with path.open("rb") as file:
        try:
            content = _ArrayUnpickler(file, encoding="bytes").load()
            return _with_arrays(content, path)
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(str(error) or type(error).__name__) from error


class _ArrayUnpickler(pickle._Unpickler):
    """Builds plain containers, text, numbers and `_Array`s, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY and name == "_reconstruct":
            return _new_array
        if module in _NUMPY and name == "scalar":
            return _scalar
        if module in _NUMERIC and name == "_frombuffer":
            return _from_buffer
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 spells bytes in the old protocol
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")

    def load_build(self: Any) -> None:
        if not isinstance(self.stack[-2], _Array | _Dtype):  # the functions and classes here could be changed
            raise pickle.UnpicklingError("it changes what is no array")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)

    def load_setitem(self: Any) -> None:
        _check_keys(self.stack[-2:-1])
        pickle._Unpickler.dispatch[pickle.SETITEM[0]](self)

    def load_setitems(self: Any) -> None:
        _check_keys(self.stack[::2])
        pickle._Unpickler.dispatch[pickle.SETITEMS[0]](self)

    def load_dict(self: Any) -> None:
        _check_keys(self.stack[::2])
        pickle._Unpickler.dispatch[pickle.DICT[0]](self)

    def load_bytearray8(self: Any) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))  # Python's own sets aside whatever length the file claims

    def refuse_set(self: Any) -> None:
        raise pickle.UnpicklingError("it holds a set, which no array needs")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {  # by opcode: overriding a method alone has no effect
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.EMPTY_SET[0]: refuse_set,
        pickle.ADDITEMS[0]: refuse_set,
        pickle.FROZENSET[0]: refuse_set,
    }


def _check_keys(keys: Sequence[Any]) -> None:
    for key in keys:
        if not isinstance(key, str | bytes | int):
            raise pickle.UnpicklingError(f"it holds a dict with a {type(key).__name__} as a key")


class _Dtype:
    """Stands in for numpy.dtype: remembers what it was called with, and its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = _text(code)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])

    def numpy(self) -> np.dtype[Any]:
        if self.code[:1] not in ("i", "u", "b", "f") or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"it holds an array of type {self.code!r}; numbers are expected")
        return np.dtype(self.code).newbyteorder(">" if self.order == ">" else "<")


class _Array:
    """Stands in for numpy.ndarray: remembers its state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def numpy(self, path: Path) -> NDArray[Any]:
        _, shape, dtype, fortran, raw = self.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
            raise ValueError("it holds a malformed array")
        kind, shape = dtype.numpy(), tuple(int(length) for length in shape)
        if len(shape) > 8 or min(shape, default=0) < 0 or kind.itemsize * _product(shape) != len(raw):
            raise ValueError(f"it holds an array whose shape {shape} does not go with its {len(raw)} bytes")
        array = _mapped(path, raw) if kind == np.uint8 and len(raw) >= mmap.PAGESIZE else None
        if array is None:
            array = np.frombuffer(raw, kind)
        return array.reshape(shape, order="F" if fortran else "C")


def _mapped(path: Path, raw: bytes | bytearray) -> NDArray[np.uint8] | None:
    """The bytes where they lie in the file, so that they need no memory; None if they are not there in one piece."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        offset = content.find(raw[: mmap.PAGESIZE])
    if offset < 0 or offset + len(raw) > path.stat().st_size:
        return None
    array = np.memmap(path, np.uint8, "r", offset, (len(raw),))
    return array if np.array_equal(array, np.frombuffer(raw, np.uint8)) else None


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _with_arrays(content: Any, path: Path) -> Any:
    """The content with arrays in place of their stand-ins, wherever a batch may hold them."""
    if isinstance(content, dict):
        return {key: _flat_or_array(value, path) for key, value in content.items()}
    return _flat_or_array(content, path)


def _flat_or_array(value: Any, path: Path) -> Any:
    if isinstance(value, _Array):
        return value.numpy(path)
    if isinstance(value, dict) or (
        isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value)
    ):
        raise ValueError("it nests containers, which no batch of images does")
    return value


def _new_array(*_: Any) -> _Array:
    return _Array()  # as NumPy's pickles begin; the array's own state follows


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()  # as NumPy's pickles of protocol 5 do it
    array.state = (1, shape, dtype, order == "F", raw)
    return array


def _scalar(dtype: Any, raw: Any) -> int:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return int(np.frombuffer(raw, dtype.numpy(), 1)[0])


def _latin1(text: str, encoding: str | bytes = "latin1") -> bytes:
    return text.encode("latin1")


def _text(value: Any) -> str:
    if not isinstance(value, str | bytes):
        raise ValueError("it holds an array of no known type")
    return value.decode("ascii") if isinstance(value, bytes) else value
