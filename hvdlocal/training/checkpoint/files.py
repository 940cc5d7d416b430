"""One checkpoint on disk: a directory with one file per rank and a manifest, either complete or absent.

::

    checkpoints/step-0000001200/manifest.json      steps, loader, settings, …; length and SHA-256 of every file
    checkpoints/step-0000001200/rank-00000.pt      torch.save of plain values and tensors, read with weights_only=True
    checkpoints/latest -> step-0000001200          for people; hvdlocal itself looks for the newest good one

The files are written to `step-….tmp` and the directory is renamed last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from hvdlocal.directory import NO_ROOM, TEMPORARY, Directory
from hvdlocal.training.saved_model import write_state

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
RESERVE = "reserve"
_COMPLETE = re.compile(r"step-(\d{10,})")
_INCOMPLETE = re.compile(r"step-(\d{10,})(?:\.old)?\.tmp")
_DAMAGED = ".damaged"


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint as it was written."""

    bytes: int
    sha256: str


def directory_name(step: int) -> str:
    """Returns the name of the checkpoint of a step."""
    return f"step-{step:010}"


def directory(root: Path, step: int) -> Path:
    """Returns the path of the checkpoint of a step."""
    return root / directory_name(step)


def rank_file(rank: int) -> str:
    """Returns the name of a rank's file."""
    return f"rank-{rank:05}.pt"


def write_rank(root: Directory, step: int, rank: int, state: dict[str, Any]) -> Written:
    """Writes a rank's file of a checkpoint that is not complete yet, and waits until it is on disk.

    Args:
        root: directory of the checkpoints.
        state: tensors, numbers, strings and containers of them; tensors with memory of their own.

    Raises:
        OSError: the file could not be written; nothing of it is left.
    """
    with root.inner(_temporary(step), create=True) as temporary, temporary.creating(rank_file(rank)) as file:
        hashed = _HashingFile(file)
        write_state(state, hashed)
    return Written(hashed.bytes, hashed.sha256.hexdigest())


def reserve(root: Directory, step: int, bytes_: int) -> None:
    """Reserves room on the disk until the checkpoint is complete.

    So a checkpoint never takes the last room of a disk, which the run needs for its records and its models.

    Raises:
        OSError: there is not enough room.
    """
    with root.inner(_temporary(step), create=True) as temporary, temporary.creating(RESERVE, sync=False) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, bytes_)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            # This file system cannot reserve room.


def complete(root: Directory, step: int, contents: dict[str, Any], written: list[Written]) -> Path:
    """Writes the manifest and gives the directory its final name; one rank does so last, when all ranks have written.

    Args:
        root: directory of the checkpoints.
        contents: the contents of the manifest, as JSON; `files`, `format`, `step` and `sha256` are added.
        written: what each rank wrote.

    Raises:
        OSError: a file differs from what was written, or the manifest cannot be written.
    """
    with root.inner(_temporary(step)) as temporary:
        for rank, one in enumerate(written):
            if (size := temporary.stat(rank_file(rank)).st_size) != one.bytes:
                path = temporary.path / rank_file(rank)
                raise OSError(f"{path} has {size} bytes where rank {rank} wrote {one.bytes}")
        files = {rank_file(rank): asdict(one) for rank, one in enumerate(written)}
        manifest = {"format": FORMAT, "step": step, **contents, "files": files}
        manifest["sha256"] = _checksum(manifest)
        temporary.write_text(MANIFEST, json.dumps(manifest, indent=1))
        temporary.remove(RESERVE)
    root.rename(_temporary(step), directory_name(step))
    root.sync()
    link = LATEST + TEMPORARY
    with suppress(OSError):  # a convenience, and some file systems have no links
        root.remove(link)
        root.link(link, directory_name(step))
        root.rename(link, LATEST)
    return directory(root.path, step)


def newest_first(root: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, the newest first."""
    return steps_of([path.name for path in root.iterdir()] if root.is_dir() else [])


def steps_of(names: list[str]) -> list[int]:
    """Returns the steps in the names of complete checkpoints, the newest first."""
    return sorted((int(match[1]) for name in names if (match := _COMPLETE.fullmatch(name))), reverse=True)


def keep_newest(root: Directory, keep: int) -> None:
    """Removes all complete checkpoints but the newest `keep`.

    Raises:
        OSError: some could not be removed; the error is that of the first.
    """
    errors = []
    for step in steps_of(root.names())[keep:]:
        try:
            _discard(root, directory_name(step))
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def discard_incomplete(root: Directory, step: int | None = None) -> None:
    """Removes the incomplete checkpoint of one step, or without a step all incomplete ones, before training."""
    for name in root.names() if step is None else [_temporary(step)]:
        if name.endswith(TEMPORARY):
            with suppress(OSError):
                root.remove(name)


def discard_left(root: Directory, before: int, but: int | None) -> None:
    """Removes what a process that died has left incomplete, while other processes go on.

    Args:
        root: directory of the checkpoints.
        before: only checkpoints of earlier steps.
        but: the step of a checkpoint that processes are still writing.
    """
    for name in root.names():
        match = _INCOMPLETE.fullmatch(name)
        if match and int(match[1]) < before and int(match[1]) != but:
            with suppress(OSError):
                root.remove(name)


def set_aside(root: Directory, step: int) -> None:
    """Renames a checkpoint that cannot be used, so that its step can be written again."""
    name = directory_name(step)
    with suppress(OSError):
        root.remove(name + _DAMAGED)
    root.rename(name, name + _DAMAGED)


def newest_manifest(root: Path) -> dict[str, Any] | None:
    """Returns the manifest of the newest checkpoint that has one; None if there is none."""
    for step in newest_first(root):
        with suppress(CheckpointError):
            return read_manifest(directory(root, step))
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest of the checkpoint in directory `path`.

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
    named = _COMPLETE.fullmatch(path.name)
    if named and manifest.get("step") != int(named[1]):
        raise CheckpointError(f"{file} is that of step {manifest.get('step')}, so the directory has a wrong name")
    workers, listed = manifest.get("num_workers"), manifest.get("files")
    if (
        type(workers) is not int
        or not isinstance(listed, dict)
        or list(listed) != [rank_file(k) for k in range(workers)]
    ):
        raise CheckpointError(f"{file} does not list the files of its ranks")
    return manifest


def read_state(path: Path, manifest: dict[str, Any], rank: int) -> dict[str, Any]:
    """Reads what a rank wrote into the checkpoint in directory `path`; tensors are on the CPU.

    Raises:
        CheckpointError: the file is missing, shorter or longer than written, or its checksum is wrong.
    """
    file = path / rank_file(rank)
    if rank >= manifest["num_workers"]:
        raise CheckpointError(f"{path / MANIFEST} lists no file {file.name}")
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
    except Exception as error:  # whatever the unpickler meets in a file that was forged to fit its checksum
        raise CheckpointError(f"{file} cannot be read: {error}") from error


class _HashingFile:
    """Writes to a file and hashes what is written, so that the file need not be read again for its checksum."""

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


def _temporary(step: int) -> str:
    return directory_name(step) + TEMPORARY


def _discard(root: Directory, name: str) -> None:
    """Removes a checkpoint; at no moment does half of one have its name."""
    doomed = name + ".old" + TEMPORARY
    root.rename(name, doomed)
    root.remove(doomed)
