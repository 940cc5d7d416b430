"""Listing a tree with one folder per class."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png")
USUAL_SPLITS = ("train", "val", "test")


@dataclass
class Listing:
    """Files of one split.

    Attributes:
        files: paths relative to the root of the tree, class by class, sorted within each.
        sizes: in bytes.
        labels: index of each file's class.
        ignored: paths of other files, which are none of the data set.
    """

    files: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def list_tree(root: Path, splits: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Listing]]:
    """List the images of a tree.

    Args:
        root: holds ``train/<class>/…``, ``val/<class>/…``, or only ``<class>/…``.
        splits: names of splits, which are folders of ``root``, or NAME=FOLDER; none: those of train, val and test that
            there are, and if there is none, the tree itself as "train".

    Returns:
        The class names, sorted, and the files of each split. Class names are those of the first split; the others may lack
        some, but have no further ones.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no class folders, or one is empty or unknown.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a directory; name the one that holds train/<class>/… or <class>/…")
    folders = dict(_named(root, split) for split in splits)
    if not splits:
        folders = {name: name for name in USUAL_SPLITS if (root / name).is_dir()} or {"train": "."}
    classes: tuple[str, ...] = ()
    listings = {}
    for split, folder in folders.items():
        found = sorted(entry.name for entry in os.scandir(root / folder) if entry.is_dir() and entry.name[:1] != ".")
        if not found:
            raise ValueError(f"{root / folder} holds no folders; one per class is needed, with images in it")
        classes = classes or tuple(found)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise ValueError(
                f"{root / folder} has {len(unknown)} classes that {next(iter(folders))} does not have ({unknown[0]}, …); "
                "make the folders agree"
            )
        listings[split] = _list_split(root, folder, found, classes)
    return classes, listings


def _named(root: Path, split: str) -> tuple[str, str]:
    name, _, folder = split.partition("=")
    if not (root / (folder or name)).is_dir():
        raise FileNotFoundError(f"{root / (folder or name)} is not a directory; --splits takes folders of {root}")
    return name, folder or name


def _list_split(root: Path, folder: str, found: Sequence[str], classes: Sequence[str]) -> Listing:
    listing = Listing()
    listing.ignored += [entry.name for entry in os.scandir(root / folder) if entry.is_file() and entry.name[:1] != "."]
    for name in found:
        files: list[tuple[str, int]] = []
        for directory, _, names in os.walk(root / folder / name, followlinks=True):
            for file in names:
                path = os.path.join(directory, file)
                relative = os.path.relpath(path, root)
                if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                    files.append((relative, os.stat(path).st_size))
                elif not file.startswith("."):
                    listing.ignored.append(relative)
        if not files:
            raise ValueError(
                f"{root / folder / name} holds no images ({', '.join(EXTENSIONS)}); fill or remove the folder"
            )
        for relative, size in sorted(files):
            listing.files.append(relative)
            listing.sizes.append(size)
            listing.labels.append(classes.index(name))
    return listing
