"""Directories that are held open, and files that are written completely or not at all.

A path may lead to another directory later, and in a directory that others may write to, a name may be a link to one of the
user's files elsewhere. This module writes into the directory that was opened, and follows no link inside it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"

_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that cannot sync a directory."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full file system and of an exhausted quota."""


class MovedError(OSError):
    """The directory is no longer where it was opened."""


class LinkError(OSError):
    """A name inside a directory is a link, perhaps to something that somebody else wants to have overwritten."""


class Directory:
    """A directory held open. Its own path may be a link; the names inside it may not.

    Errors are OSErrors that give the whole path. The object is a context manager that closes the directory.

    Args:
        path: path of an existing directory.
        descriptor: a descriptor of the directory if it is already open; it is closed with this object.

    Attributes:
        path: the path as it was given.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY) if descriptor is None else descriptor

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the directory; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def check(self) -> None:
        """Checks that the path still leads to this directory.

        Raises:
            MovedError: the directory was moved, removed or replaced.
        """
        try:
            there = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # an error of the file server is no evidence about the directory
            return
        else:
            if os.path.samestat(there, os.fstat(self._descriptor)):
                return
        raise MovedError(f"the directory {self.path} was moved or removed, or replaced by another one")

    def inner(self, name: str, create: bool = False) -> Directory:
        """Opens a directory inside this one.

        Args:
            name: name of the inner directory.
            create: create it if it does not exist.

        Raises:
            LinkError: the name is a link.
        """
        with self._named(name):
            if create:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=self._descriptor)
            self._refuse_link(name)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            return Directory(self.path / name, os.open(name, flags, dir_fd=self._descriptor))

    def names(self) -> list[str]:
        """Returns the names inside."""
        return os.listdir(self._descriptor)

    def stat(self, name: str) -> os.stat_result:
        """Returns the status of a file, a directory or a link inside."""
        with self._named(name):
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)

    def exists(self, name: str) -> bool:
        """Returns whether the name exists, even if it is a link that leads nowhere."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def is_directory(self, name: str) -> bool:
        """Returns whether the name is a directory and not a link to one."""
        return self.exists(name) and stat.S_ISDIR(self.stat(name).st_mode)

    def rename(self, name: str, new: str) -> None:
        """Renames something inside; a file that has the new name is replaced."""
        with self._named(name):
            os.rename(name, new, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def rename_if_first(self, name: str, new: str) -> None:
        """Renames a file inside, or removes it if the new name exists: of several processes, the first one prevails."""
        with self._named(name):
            with suppress(FileExistsError):
                os.link(name, new, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor, follow_symlinks=False)
            self._unlink(name)

    def link(self, name: str, target: str) -> None:
        """Makes `name` a symbolic link to `target`."""
        with self._named(name):
            os.symlink(target, name, dir_fd=self._descriptor)

    def remove(self, name: str) -> None:
        """Removes a file, a link, or a directory with everything inside it, if the name exists."""
        with self._named(name):
            try:
                self._unlink(name)
                return
            except (IsADirectoryError, PermissionError):  # which one depends on the file system
                if not self.is_directory(name):
                    raise
        with self.inner(name) as directory:
            directory.clear()
        with self._named(name):
            os.rmdir(name, dir_fd=self._descriptor)

    def clear(self) -> None:
        """Removes everything inside."""
        for name in self.names():
            self.remove(name)

    def sync(self) -> None:
        """Writes the names inside to disk, if the file system supports that."""
        with self._named(""):
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                if error.errno not in _NO_FSYNC:
                    raise

    def read_text(self, name: str) -> str:
        """Reads a UTF-8 file inside."""
        with self._named(name), self.open_to_read(name) as file:
            return file.read().decode()

    def open_to_read(self, name: str) -> IO[bytes]:
        """Opens a file inside for reading."""
        with self._named(name):
            self._refuse_link(name)
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._descriptor)
            return os.fdopen(descriptor, "rb")

    def open_to_append(self, name: str) -> IO[bytes]:
        """Opens a file inside for reading and appending, unbuffered; the file is created if necessary.

        Raises:
            LinkError: the name is a link or not a regular file, or the file has a second name elsewhere.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        with self._named(name):
            self._refuse_link(name)
            descriptor = os.open(name, flags, 0o666, dir_fd=self._descriptor)
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                os.close(descriptor)
                raise self._link_error(name, "not a plain file, or one with a second name elsewhere")
            return os.fdopen(descriptor, "a+b", buffering=0)

    @contextmanager
    def creating(self, name: str, sync: bool = True) -> Iterator[IO[bytes]]:
        """Opens a new file for writing, which replaces an existing one.

        If anything fails, the file is removed: on a full disk it would occupy the remaining space.

        Args:
            name: name of the file.
            sync: write the file to disk before returning.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with self._named(name):
            self._unlink(name)  # perhaps left by a process that was killed
            file = os.fdopen(os.open(name, flags, 0o666, dir_fd=self._descriptor), "wb")
            try:
                with file:
                    yield file
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):
                    self._unlink(name)
                raise

    @contextmanager
    def replacing(self, name: str) -> Iterator[IO[bytes]]:
        """Like `creating`, but the file has another name until it is complete: no reader sees half of it."""
        temporary = name + TEMPORARY
        with self.creating(temporary) as file:
            yield file
        try:
            self.rename(temporary, name)
        except BaseException:
            with suppress(OSError):
                self._unlink(temporary)
            raise
        self.sync()

    def write_text(self, name: str, text: str) -> None:
        """Writes a UTF-8 file, completely or not at all."""
        with self.replacing(name) as file:
            file.write(text.encode())

    def _unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def _refuse_link(self, name: str) -> None:
        if self.exists(name) and stat.S_ISLNK(self.stat(name).st_mode):
            raise self._link_error(name, "a symbolic link, which hvdlocal does not follow here")

    def _link_error(self, name: str, what: str) -> LinkError:
        return LinkError(errno.ELOOP, f"{what}: remove it", str(self.path / name))

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Makes errors give the whole path."""
        try:
            yield
        except OSError as error:
            if error.errno is None or os.sep in (error.filename or "") or isinstance(error, MovedError | LinkError):
                raise
            raise OSError(error.errno, error.strerror, str(self.path / name)) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that replaces `path` once it is complete and on disk; see `Directory.replacing`."""
    with Directory(path.parent) as directory, directory.replacing(path.name) as file:
        yield file


@contextmanager
def user_file(path: Path) -> Iterator[IO[bytes]]:
    """Like `replacing`, for a file that the user has named: links are followed, and devices and pipes are written directly."""
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    with replacing(Path(os.path.realpath(path))) as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, completely or not at all, without following a link."""
    with replacing(path) as file:
        file.write(text.encode())
