"""Listing a tree with one folder per class."""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.source import add_source_argument
from hvdlocal.communicator import Communicator, on_rank_zero
from hvdlocal.data.permutations import held_out

EXTENSIONS = (".jpg", ".jpeg", ".png")
USUAL_SPLITS = ("train", "val", "test")


@dataclass
class Listing:
    """Files of one split.

    Attributes:
        files: paths relative to the root of the tree, class by class, sorted within each.
        sizes: in bytes; -1 for what cannot be looked at (a link to nowhere) or is no regular file.
        labels: index of each file's class.
        ignored: paths of other files, which are none of the data set.
    """

    files: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def subset(self, rows: Sequence[int]) -> Listing:
        """The files with the given places."""
        return Listing(
            [self.files[row] for row in rows], [self.sizes[row] for row in rows], [self.labels[row] for row in rows]
        )


@dataclass(frozen=True)
class Tree:
    """A tree of image files.

    Attributes:
        root: directory that the paths of the files are relative to.
        classes: class names; label i means classes[i].
        listings: the files of each split.
        preparation: facts that the manifests shall record.
        remarks: sentences for the user.
    """

    root: Path
    classes: tuple[str, ...]
    listings: Mapping[str, Listing]
    preparation: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def open_tree(
    arguments: argparse.Namespace, communicator: Communicator, extensions: tuple[str, ...] = EXTENSIONS
) -> Tree:
    """The tree that the options name; a collective, in which rank 0 alone walks it. Errors: see `list_tree`, `hold_out`."""

    def find() -> Tree:
        tree = list_tree(arguments.source, arguments.splits, extensions)
        return tree if arguments.holdout is None else hold_out(tree, arguments.holdout, arguments.seed)

    return on_rank_zero(communicator, find, "data.list")


def list_tree(root: Path, splits: Sequence[str], extensions: tuple[str, ...] = EXTENSIONS) -> Tree:
    """Lists the images of a tree.

    Args:
        root: holds `train/<class>/…`, `val/<class>/…`, or only `<class>/…`.
        splits: names of splits, which are folders of `root`, or NAME=FOLDER; none: those of train, val and test that
            there are, and if there is none, the tree itself as "train".
        extensions: of the names of images, in lower case; other files are ignored.

    Returns:
        The tree, with its class names sorted. They are those of the first split; the others may lack some, but have no
        further ones.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: a folder cannot be read.
        ValueError: there are no class folders, or one is empty or unknown, or a link leads in a circle.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a directory; name the one that holds train/<class>/… or <class>/…")
    folders = dict(_named(root, split) for split in splits)
    if not splits:
        folders = {name: name for name in USUAL_SPLITS if (root / name).is_dir()} or {"train": "."}
    classes: tuple[str, ...] = ()
    listings = {}
    for split, folder in folders.items():
        found = _class_folders(root / folder)
        if not found:
            raise ValueError(f"{root / folder} holds no folders; one per class is needed, with images in it")
        classes = classes or tuple(found)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise ValueError(
                f"{root / folder} has {len(unknown)} classes that {next(iter(folders))} does not have ({unknown[0]}, …); "
                "make the folders agree"
            )
        listings[split] = _list_split(root, folder, found, classes, extensions)
    remarks = [_remark_of_ignored(name, listing.ignored) for name, listing in listings.items() if listing.ignored]
    return Tree(root, classes, listings, remarks=remarks)


def _remark_of_ignored(split: str, ignored: Sequence[str]) -> str:
    files = f"{len(ignored)} file{'s' if len(ignored) > 1 else ''}"
    return f"{split}: {files} of other kinds ignored, for instance {ignored[0]}"


def hold_out(tree: Tree, share: float, seed: int) -> Tree:
    """Makes a test split of a share of each class.

    Args:
        tree: with one split, which is not for testing.
        share, seed: see `held_out`.

    Returns:
        A tree with the same files, in their order, in two splits: that of before, and "test".

    Raises:
        ValueError: there is a split to test on, or see `held_out`.
    """
    (name, listing), *others = tree.listings.items()
    if others or name in USUAL_SPLITS[1:]:
        raise ValueError(
            f"--holdout {share:g} makes a test split of the training images, but {tree.root} has {', '.join(tree.listings)}: "
            "leave it out, or name the training images alone (--splits train or --splits train=FOLDER)"
        )
    labels = np.array(listing.labels)
    mask = held_out(seed, labels, share)
    per_class = np.bincount(labels[mask], minlength=len(tree.classes))
    kept, test = (listing.subset(np.flatnonzero(part).tolist()) for part in (~mask, mask))
    kept.ignored = listing.ignored
    alone = np.count_nonzero(per_class == 0)
    remark = (
        f"test: {len(test.files)} of {len(listing.files)} images, held out at random by seed {seed}, "
        f"{per_class[per_class > 0].min()} to {per_class.max()} of each class"
        + (f" but {alone} of one image" if alone else "")
    )
    facts = {"holdout": {"share": share, "seed": seed, "from": name}}
    return replace(tree, listings={name: kept, "test": test}, preparation=facts, remarks=[*tree.remarks, remark])


def _named(root: Path, split: str) -> tuple[str, str]:
    name, _, folder = split.partition("=")
    if not (root / (folder or name)).is_dir():
        raise FileNotFoundError(f"{root / (folder or name)} is not a directory; --splits takes folders of {root}")
    return name, folder or name


def _class_folders(directory: Path) -> list[str]:
    found = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[:1] != ".")
    for name in found:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the folder {name!a} in {directory} has a name that is not UTF-8, so no class can be named after it; "
                "rename it"
            ) from None
    return found


def _list_split(
    root: Path, folder: str, found: Sequence[str], classes: Sequence[str], extensions: tuple[str, ...]
) -> Listing:
    listing = Listing()
    listing.ignored += [entry.name for entry in os.scandir(root / folder) if entry.is_file() and entry.name[:1] != "."]
    for name in found:
        files: list[tuple[str, int]] = []
        for path in _walk(root / folder / name):
            relative = os.path.relpath(path, root)
            if path.lower().endswith(extensions):
                files.append((relative, _file_size(path)))
            else:
                listing.ignored.append(relative)
        if not files:
            raise ValueError(
                f"{root / folder / name} holds no images ({', '.join(extensions)}); fill or remove the folder"
            )
        for relative, size in sorted(files):
            listing.files.append(relative)
            listing.sizes.append(size)
            listing.labels.append(classes.index(name))
    return listing


def _walk(top: Path) -> Iterator[str]:
    """Paths of all files below, but hidden ones and those in hidden folders; links are followed."""
    seen: dict[str, str] = {}

    def fail(error: OSError) -> None:
        raise error  # os.walk would leave the folder out

    for directory, folders, names in os.walk(top, onerror=fail, followlinks=True):
        first = seen.setdefault(os.path.realpath(directory), directory)
        if first != directory:
            raise ValueError(f"{directory} leads back to {first}; remove the link")
        folders[:] = [name for name in folders if name[:1] != "."]
        yield from (os.path.join(directory, name) for name in names if name[:1] != ".")


def _file_size(path: str) -> int:
    try:
        found = os.stat(path)
    except OSError:  # reading it will tell why
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def add_tree_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of data sets that are trees of image files."""
    add_source_argument(command, "directory that holds train/<class>/… and val/<class>/…, or just <class>/…")
    command.add_argument(
        "--splits",
        nargs="+",
        default=(),
        metavar="NAME[=FOLDER]",
        help="splits and the folders of the source that hold them (default: those of train, val and test that there are; "
        "else the source itself is train)",
    )
    command.add_argument(
        "--holdout",
        type=float,
        metavar="SHARE",
        help="make a test split of this share of each class of a tree without one, chosen at random by --seed",
    )
    command.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="reduce the short side of larger images to this and encode them anew (default: keep the files as they are)",
    )
    command.add_argument(
        "--quality", type=int, default=90, help="JPEG quality with --resize, 1 to 100 (default: %(default)s)"
    )
    command.add_argument(
        "--bad",
        choices=("refuse", "skip"),
        default="refuse",
        help="files that cannot be decoded: refuse the data set after all have been tried, or leave them out; "
        "<output>/<split>/bad_files.txt lists them either way (default: %(default)s)",
    )
