"""Output to terminals, pipes and logs that may become unwritable.

A terminal may be closed, the reader of a pipe may exit (`| head`), a log's disk may be full, and standard output may be closed
or accept only ASCII. None of this may end a training run; a command that only prints should end as other programs do.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class OutputError(OSError):
    """Standard output cannot be written, and the command was started for what it prints."""


class Guarded:
    """A text stream that escapes characters its encoding lacks, and that can discard what cannot be written.

    Args:
        stream: the stream to write to; None discards everything (`sys.stdout` is None in a process started without one).
        name: name of the stream for the error message; None discards what cannot be written and continues.
    """

    def __init__(self, stream: TextIO | None, name: str | None = None) -> None:
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        """Writes the text, or discards it.

        Raises:
            OutputError: the stream has a name, and the text cannot be written.
        """
        with self._explained():
            stream = self._opened()
            try:
                stream.write(text)
            except UnicodeEncodeError:
                stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream; see `write`."""
        with self._explained():
            self._opened().flush()

    def isatty(self) -> bool:
        """Returns whether the stream is a terminal."""
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _opened(self) -> TextIO:
        if self._stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._stream

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: this program has closed the stream
            if self._name is not None:
                reason = plain(error) if isinstance(error, OSError) else str(error)
                raise OutputError(f"{self._name} cannot be written: {reason}") from error


def plain(error: OSError) -> str:
    """Formats a system error without its number: "/data/x: Permission denied"."""
    if error.errno is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror


def output() -> Guarded:
    """Returns the current standard output, for lines that may be discarded."""
    return Guarded(sys.stdout)


def say(text: str) -> None:
    """Prints a line on standard output, or discards it."""
    print(text, file=output(), flush=True)


def complain(text: str) -> None:
    """Prints a line on standard error, or discards it."""
    # A single write: with PYTHONUNBUFFERED, print() sends the line end separately, and mpirun would mix the ranks' pieces.
    stream = Guarded(sys.stderr)
    stream.write(text + "\n")
    stream.flush()


def warn(text: str) -> None:
    """Prints a warning on standard error."""
    complain(f"hvdlocal: WARNING: {text}")


@contextmanager
def guarded(*, lasting: bool) -> Iterator[None]:
    """Sends everything that is printed within the context through `Guarded`.

    Args:
        lasting: discard what cannot be written; otherwise a failure of standard output raises `OutputError`.
    """
    _open_what_is_closed()
    out, err = sys.stdout, sys.stderr
    sys.stdout = Guarded(out, None if lasting else "standard output")
    sys.stderr = Guarded(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for stream in (out, err):
            _let_go(stream)


def _open_what_is_closed() -> None:
    """Opens closed standard descriptors on /dev/null.

    Otherwise the next file to be opened would get such a number, and libraries would print into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _let_go(stream: TextIO | None) -> None:
    """Discards what a stream can no longer write; Python would try again at exit, and exit with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
