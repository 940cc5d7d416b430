"""manifest.json: what a split of a data set consists of, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hvdlocal.data.kinds import KINDS
from hvdlocal.data.kinds.base import Facts, Kind, is_whole
from hvdlocal.directory import write_text

FORMAT = "hvdlocal-shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
OVERWRITE = "--overwrite (from Python: overwrite=True)"  # for messages


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
        kind: the name of the kind of its samples, a key of `KINDS`.
        facts: what the kind says of all samples (for images, `shape` and `classes`).
        seed: seed of the pre-shuffle.
        statistics: what the kind counts while samples are written (for images, `mean` and `std`); empty in a draft.
        shards: the shards, in order; sample 0 of the split is sample 0 of the first.
        preparation: how the data set came about, for people: options, library versions, how many files were left out.
        plan: hex sha256 of all that determined the content; a writer with the same plan has nothing left to do.
    """

    split: str
    kind: str
    facts: Facts
    seed: int
    statistics: Facts = field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()
    preparation: Mapping[str, Any] = field(default_factory=dict)
    plan: str = ""

    @property
    def num_samples(self) -> int:
        """Number of samples over all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of every image; None for JPEGs and other kinds."""
        return self.facts.get("shape")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i means classes[i]. Empty where samples have no classes."""
        return self.facts.get("classes", ())

    @property
    def contents(self) -> str:
        """How much there is, for people."""
        return KINDS[self.kind].contents(self.facts, self.num_samples)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 that identifies the data: the same wherever, whenever and by whatever HDF5 release written."""
        content = self._content()
        if not KINDS[self.kind].named_in_fingerprint:
            del content["kind"]
        for key in ("preparation", "plan"):  # which are not content
            del content[key]
        for shard in content["shards"]:
            del shard["bytes"]
        return sha256_of_json(content)

    def save(self, path: Path) -> None:
        """Writes the manifest as JSON to `path`, whole or not at all."""
        content = self._content() | {"num_samples": self.num_samples, "fingerprint": self.fingerprint}
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "split": self.split,
            "kind": self.kind,
            **self.facts,
            "seed": self.seed,
            **self.statistics,
            "shards": [asdict(shard) for shard in self.shards],
            "preparation": self.preparation,
            "plan": self.plan,
        }

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
            kind = _kind(content.get("kind", "images"))
            manifest = cls(
                split=content["split"],
                kind=kind.name,
                facts={name: _frozen(content[name]) for name in kind.facts},
                seed=content["seed"],
                statistics={name: _frozen(content[name]) for name in kind.statistics},
                shards=tuple(map(_entry, content["shards"])),
                preparation=content.get("preparation", {}),
                plan=content.get("plan", ""),
            )
            if manifest.fingerprint != content["fingerprint"]:
                raise ValueError("its content does not match its fingerprint (edited by hand or damaged)")
            _check_values(manifest, kind)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} is not a usable manifest: {reason}; write the data set again with {OVERWRITE}"
            ) from error
        return manifest


def _kind(name: Any) -> Kind:
    if name not in KINDS:
        raise ValueError(f"its kind {reprlib.repr(name)} is none of {', '.join(KINDS)}")
    return KINDS[name]


def _frozen(value: Any) -> Any:
    """The same with tuples for lists, in dicts too."""
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _entry(content: Mapping[str, Any]) -> ShardEntry:
    names = ShardEntry.__dataclass_fields__
    for name in content:
        if name not in names:
            raise ValueError(f"a shard cannot have {reprlib.repr(name)}")
    return ShardEntry(**content)


def _check_values(manifest: Manifest, kind: Kind) -> None:
    """Raises ValueError for what no writer writes: a fingerprint shows damage, not where the content came from."""
    shards, facts = manifest.shards, {**manifest.facts, **manifest.statistics}
    values = {"split": manifest.split, "seed": manifest.seed, "shards": shards, **facts}
    sound = {
        "split": isinstance(manifest.split, str),
        "seed": is_whole(manifest.seed, 0),
        "shards": len(shards) > 0,
        **kind.sound(facts),
    }
    for name in sound:
        if not sound[name]:
            raise ValueError(f"its {name} cannot be {reprlib.repr(values[name])}")
    least_bytes = kind.least_bytes(facts)
    for shard in shards:
        file = shard.file
        if not (isinstance(file, str) and re.fullmatch(r"[^/\0]+", file)) or file in (".", ".."):
            raise ValueError(f"a shard cannot be called {reprlib.repr(file)}: shards lie beside the manifest")
        if not (is_whole(shard.num_samples, 1) and is_whole(shard.bytes, shard.num_samples * least_bytes)):
            raise ValueError(f"{file} cannot hold {shard.num_samples!r} samples in {shard.bytes!r} bytes")
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("it names a shard twice")


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
