"""One checkpoint on disk: a directory with a file of each rank and a manifest, complete or not there.

::

    checkpoints/step-0000001200/manifest.json      steps, clock, loader, settings; length and SHA-256 of every file
    checkpoints/step-0000001200/rank-00000.pt      torch.save of plain values and tensors, read with weights_only=True
    checkpoints/latest -> step-0000001200          for people; hvdlocal looks for the newest good one itself

The files are written to `step-….tmp` and the directory is renamed last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_COMPLETE = re.compile(r"step-(\d{10,})")
_TEMPORARY = ".tmp"
_DAMAGED = ".damaged"


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint as it was written."""

    bytes: int
    sha256: str


def directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step-{step:010}"


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05}.pt"


def write_state(root: Path, step: int, rank: int, state: dict[str, Any]) -> Written:
    """Writes a rank's file of a checkpoint that is not complete yet, down to the disk.

    Args:
        state: tensors, numbers, strings and containers of them; tensors with memory of their own.
    """
    temporary = _temporary(root, step)
    temporary.mkdir(parents=True, exist_ok=True)
    with (temporary / rank_file(rank)).open("wb") as file:
        hashed = _HashingFile(file)
        torch.save(state, cast(IO[bytes], hashed))
        file.flush()
        os.fsync(file.fileno())
    return Written(hashed.bytes, hashed.sha256.hexdigest())


def complete(root: Path, step: int, contents: dict[str, Any], written: list[Written]) -> Path:
    """Writes the manifest and makes the checkpoint one: the last act, by one rank, when all have written.

    Args:
        contents: of the manifest, JSON; `files`, `format` and `sha256` are added.
        written: what each rank wrote.

    Raises:
        OSError: a file is not as it was written, or the manifest cannot be.
    """
    temporary, final = _temporary(root, step), directory(root, step)
    for rank, one in enumerate(written):
        if (size := (temporary / rank_file(rank)).stat().st_size) != one.bytes:
            raise OSError(f"{temporary / rank_file(rank)} has {size} bytes where rank {rank} wrote {one.bytes}")
    files = {rank_file(rank): asdict(one) for rank, one in enumerate(written)}
    manifest = {"format": FORMAT, "step": step, **contents, "files": files}
    manifest["sha256"] = _checksum(manifest)
    with (temporary / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(temporary)
    temporary.rename(final)
    _sync_directory(root)
    link = root / (LATEST + _TEMPORARY)
    link.unlink(missing_ok=True)
    with suppress(OSError):  # a convenience, and some file systems have no links
        link.symlink_to(final.name)
        link.replace(root / LATEST)
    return final


def newest_first(root: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted((int(match[1]) for name in names if (match := _COMPLETE.fullmatch(name))), reverse=True)


def keep_newest(root: Path, keep: int) -> None:
    """Removes all complete checkpoints but the newest `keep`.

    Raises:
        OSError: some could not be removed; tells of the first.
    """
    errors = []
    for step in newest_first(root)[keep:]:
        try:
            _discard(directory(root, step))
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def discard_incomplete(root: Path, step: int | None = None) -> None:
    """Removes what was not completed: of one step; or, before training, of an interrupted attempt."""
    for path in root.glob(f"*{_TEMPORARY}") if step is None else [_temporary(root, step)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def set_aside(root: Path, step: int) -> Path:
    """Renames a checkpoint that cannot be used, so that its step can be written again; returns the new name."""
    path = directory(root, step)
    aside = path.with_name(path.name + _DAMAGED)
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in directory `path`.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != _checksum(manifest):
        raise CheckpointError(f"{file} is damaged: its checksum is wrong")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {manifest.get('format')}; this hvdlocal reads format {FORMAT}")
    workers, listed = manifest.get("num_workers"), manifest.get("files")
    if (
        type(workers) is not int
        or not isinstance(listed, dict)
        or list(listed) != [rank_file(k) for k in range(workers)]
    ):
        raise CheckpointError(f"{file} does not list the files of its ranks")
    return manifest


def read_state(path: Path, manifest: dict[str, Any], rank: int) -> dict[str, Any]:
    """What a rank wrote into the checkpoint in directory `path`, on the CPU.

    Raises:
        CheckpointError: the file is missing, shorter or longer than written, or its checksum is wrong.
    """
    file = path / rank_file(rank)
    if rank >= manifest["num_workers"]:
        raise CheckpointError(f"{path / MANIFEST} knows no file {file.name}")
    try:
        expected = manifest["files"][file.name]
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes instead of {expected['bytes']}")
        with file.open("rb") as stream:
            digest = _sha256_of(stream)
            if digest != expected["sha256"]:
                raise CheckpointError(f"{file} is damaged: its checksum is wrong")
            stream.seek(0)
            state = torch.load(stream, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
            raise CheckpointError(f"{file} is not the state of a rank")
        return state
    except CheckpointError:
        raise
    except Exception as error:  # whatever the unpickler meets in a file that was made to fit its checksum
        raise CheckpointError(f"{file} cannot be read: {error}") from error


class _HashingFile:
    """Passes on what is written, and sums it up: the file need not be read again for its checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        written = self._file.write(data)
        self.bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()


def _sha256_of(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _temporary(root: Path, step: int) -> Path:
    path = directory(root, step)
    return path.with_name(path.name + _TEMPORARY)


def _discard(path: Path) -> None:
    """Removes a checkpoint so that at no moment half of one bears its name."""
    doomed = path.with_name(path.name + ".old" + _TEMPORARY)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems know no such thing
            raise
    finally:
        os.close(descriptor)
