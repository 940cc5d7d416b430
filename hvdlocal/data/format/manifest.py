"""manifest.json: what a split of a data set consists of, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hvdlocal.directory import write_text

FORMAT = "hvdlocal-shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
OVERWRITE = "--overwrite (from Python: overwrite=True)"  # for messages

Kind = Literal["images", "jpeg"]
"""How samples are stored: as equally sized uint8 images, or as JPEG files of any size."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard file.

    Attributes:
        file: file name, inside the split's directory.
        num_samples: number of samples it holds.
        bytes: size of the file.
        sha256: `Shard.sha256` of its content (not of the file: another HDF5 release may lay the same content out
        otherwise).
    """

    file: str
    num_samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of a split's manifest.json.

    Attributes:
        split: name of the split, e.g. "train".
        shape: (height, width, channels) of every image; None for JPEG, where every image has its own.
        classes: class names; label i means classes[i].
        seed: seed of the pre-shuffle.
        mean, std: per channel, of the pixel values divided by 255 (population standard deviation).
        shards: the shards, in order; sample 0 of the split is sample 0 of the first.
        kind: how the samples are stored; "jpeg" exactly if `shape` is None.
        preparation: how the data set came about, for people: options, library versions, how many files were left out.
        plan: hex sha256 of all that determined the content; a writer with the same plan has nothing left to do.
    """

    split: str
    shape: tuple[int, int, int] | None
    classes: tuple[str, ...]
    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[ShardEntry, ...]
    kind: Kind = "images"
    preparation: Mapping[str, Any] = field(default_factory=dict)
    plan: str = ""

    @property
    def num_samples(self) -> int:
        """Number of samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 that identifies the data: the same wherever, whenever and by whatever HDF5 release written."""
        content = self._content()
        for key in ("kind", "preparation", "plan"):  # the first is what `shape` says; the others are not content
            del content[key]
        for shard in content["shards"]:
            del shard["bytes"]
        return sha256_of_json(content)

    def save(self, path: Path) -> None:
        """Writes the manifest as JSON to `path`, whole or not at all."""
        content = self._content() | {"num_samples": self.num_samples, "fingerprint": self.fingerprint}
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "split": self.split, "kind": self.kind} | asdict(self)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads and checks a manifest.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a manifest of this format and version, or does not match its own fingerprint.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so {path.parent} holds no finished data set; "
                "write it with `python -m data_prep` or ShardWriter"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = (content["format"], content["version"])
            if found != (FORMAT, VERSION):
                raise ValueError(f"it is of format {found[0]!r} version {found[1]!r}, not {FORMAT!r} version {VERSION}")
            manifest = cls(
                split=content["split"],
                shape=None if content["shape"] is None else tuple(content["shape"]),
                classes=tuple(content["classes"]),
                seed=content["seed"],
                mean=tuple(content["mean"]),
                std=tuple(content["std"]),
                shards=tuple(map(_entry, content["shards"])),
                kind=content.get("kind", "images"),
                preparation=content.get("preparation", {}),
                plan=content.get("plan", ""),
            )
            if manifest.kind != ("jpeg" if manifest.shape is None else "images"):
                raise ValueError(f"its kind {manifest.kind!r} does not go with the shape {manifest.shape}")
            if manifest.fingerprint != content["fingerprint"]:
                raise ValueError("its content does not match its fingerprint (edited by hand or damaged)")
            _check_values(manifest)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} is not a usable manifest: {reason}; write the data set again with {OVERWRITE}"
            ) from error
        return manifest


def _entry(content: Mapping[str, Any]) -> ShardEntry:
    names = ShardEntry.__dataclass_fields__
    for name in content:
        if name not in names:
            raise ValueError(f"a shard cannot have {reprlib.repr(name)}")
    return ShardEntry(**content)


def _check_values(manifest: Manifest) -> None:
    """Raises ValueError for what no writer writes: a fingerprint shows damage, not where the content came from."""
    shape, shards = manifest.shape, manifest.shards
    channels = (shape or (3,))[-1]
    values = {
        "split": isinstance(manifest.split, str),
        "shape": shape is None or (len(shape) == 3 and all(_is_whole(side, 1) for side in shape)),
        "classes": len(manifest.classes) > 0 and all(isinstance(name, str) for name in manifest.classes),
        "seed": _is_whole(manifest.seed, 0),
        "mean": len(manifest.mean) == channels and all(map(_is_share, manifest.mean)),
        "std": len(manifest.std) == channels and all(map(_is_share, manifest.std)),
        "shards": len(shards) > 0,
    }
    for name, sound in values.items():
        if not sound:
            raise ValueError(f"its {name} cannot be {reprlib.repr(getattr(manifest, name))}")
    least_bytes = 1 if shape is None else math.prod(shape)  # of a sample
    for shard in shards:
        file = shard.file
        if not (isinstance(file, str) and re.fullmatch(r"[^/\0]+", file)) or file in (".", ".."):
            raise ValueError(f"a shard cannot be called {reprlib.repr(file)}: shards lie beside the manifest")
        if not (_is_whole(shard.num_samples, 1) and _is_whole(shard.bytes, shard.num_samples * least_bytes)):
            raise ValueError(f"{file} cannot hold {shard.num_samples!r} samples in {shard.bytes!r} bytes")
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("it names a shard twice")


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least  # not bool, which is an int too


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def classes_sha256(classes: Sequence[str]) -> str:
    """Hex sha256 of the class list, which every shard carries so that it cannot be read with another list."""
    return sha256_of_json(list(classes))


def split_directory(directory: str | Path, split: str) -> Path:
    """The directory of a split. Raises ValueError for a name that is not letters, digits, '_' and '-'."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise ValueError(f"split name {split!r} may hold only letters, digits, '_' and '-'; for instance 'train'")
    return Path(directory) / split


def shard_name(split: str, number: int, num_shards: int) -> str:
    """File name of shard `number` (from 0)."""
    return f"{split}-{number:05d}-of-{num_shards:05d}.h5"


def sha256_of_json(content: Any) -> str:
    """Hex sha256 of the canonical JSON of `content`: sorted keys, no spaces, UTF-8."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
