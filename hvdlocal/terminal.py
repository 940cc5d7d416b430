"""Writing for people, who may have left.

A terminal is closed, the reader of a pipe leaves (`| head`), the disk of a log is full, or standard output is closed or takes
only ASCII. Training must not end because of that, and a command that only prints should end as other programs do.
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
    """A text stream that writes a sign which its encoding lacks as an escape, and that can lose what cannot be written.

    Args:
        stream: to write to; None, as `sys.stdout` is in a process started without one, loses everything.
        name: of the stream, for the error; None to lose what cannot be written and to go on.
    """

    def __init__(self, stream: TextIO | None, name: str | None = None) -> None:
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        """Writes, or loses, the text.

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
        """Hands to the system what was written; see `write`."""
        with self._explained():
            self._opened().flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    @property
    def encoding(self) -> str:
        """Of the stream."""
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
        except (OSError, ValueError) as error:  # ValueError: it was closed by this program
            if self._name is not None:
                reason = plain(error) if isinstance(error, OSError) else str(error)
                raise OutputError(f"{self._name} cannot be written: {reason}") from error


def plain(error: OSError) -> str:
    """An error of the system without its number: "/data/x: Permission denied"."""
    if error.errno is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror


def output() -> Guarded:
    """Today's standard output, for lines that may be lost."""
    return Guarded(sys.stdout)


def say(text: str) -> None:
    """Prints a line on standard output, or loses it."""
    print(text, file=output(), flush=True)


def complain(text: str) -> None:
    """Prints a line on standard error, or loses it."""
    # One write: with PYTHONUNBUFFERED print() sends the end of the line by itself, and mpirun mixes the ranks' pieces.
    stream = Guarded(sys.stderr)
    stream.write(text + "\n")
    stream.flush()


def warn(text: str) -> None:
    """Says on standard error what must not be overlooked."""
    complain(f"hvdlocal: WARNING: {text}")


@contextmanager
def guarded(*, lasting: bool) -> Iterator[None]:
    """Within it, everything that is printed by anybody goes through `Guarded`.

    Args:
        lasting: lose what cannot be written; otherwise `OutputError` is raised, for standard output alone.
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
    """Opens the standard descriptors that are closed, on nothing.

    The next file to be opened would get such a number, and what libraries print would be written into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _let_go(stream: TextIO | None) -> None:
    """Drops what a stream cannot write any more; Python would try again at its end, and exit with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
