"""Any tree of image files with one folder per class: as pixels, without loss, or as JPEG files.

Pixels are kept (`--images raw`) of PNG and BMP files, and of JPEG files as they are decoded, if all have one size. The data set
is gray if all files are. Without `--images` a tree of PNG and BMP files of one size is stored so, and any other as JPEG files,
by the rules of imagenet.py.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Literal

import numpy as np

from data_prep.folder_tree import EXTENSIONS, Tree, add_tree_arguments, open_tree
from data_prep.imagenet import check_encoding, identity, jpeg_source
from data_prep.raw_files import LOSSLESS, Header, RawFiles, read_file, read_header
from data_prep.source import ImageSplit, Source
from hvdlocal.communicator import Communicator, succeed_together
from hvdlocal.data.write.jpeg_check import jpeg_versions

SUMMARY = (
    "any tree of image files with a folder per class, as pixels without loss if they have one size, else as JPEG files"
)

Choice = Literal["auto", "raw", "jpeg"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of this data set."""
    command.add_argument(
        "--images",
        choices=("auto", "raw", "jpeg"),
        default="auto",
        help="raw: pixels, of files of one size; jpeg: JPEG files, as imagenet makes them; auto: raw if all are PNG or BMP files "
        "of one size, unless --resize or --bad skip is given (default: %(default)s)",
    )
    add_tree_arguments(command)


def open_source(arguments: argparse.Namespace, communicator: Communicator) -> Source:
    """Opens the data set; a collective, in which the ranks share out the looking at headers.

    Raises:
        FileNotFoundError, ValueError: as `open_tree`; or the files cannot be stored as wished; the message names one.
    """
    images: Choice = arguments.images
    resize, quality, skip_bad = arguments.resize, arguments.quality, arguments.bad == "skip"
    check_encoding(resize, quality)
    if images == "raw" and (resize is not None or skip_bad):
        option = "--bad skip" if resize is None else f"--resize {resize}"
        raise ValueError(f"{option} is for JPEG files; leave it out, or use --images jpeg")
    versions = succeed_together(communicator, jpeg_versions, "data.libraries")
    tree = open_tree(arguments, communicator, (*EXTENSIONS, ".bmp"))
    if images == "jpeg" or resize is not None or skip_bad:
        return jpeg_source("folder", tree, resize, quality, versions, skip_bad)
    headers, bad = _headers(tree, communicator, all_of_them=images == "raw")
    first = next(iter(headers.values()), None)
    if images == "auto" and (reason := _why_not_raw(headers)):
        remark = f"stored as JPEG files, since {reason}; --images raw stores pixels, of files of one size"
        made = jpeg_source("folder", tree, resize, quality, versions, skip_bad)
        return replace(made, remarks=[remark, *made.remarks])
    if bad:
        raise ValueError(
            f"{len(bad)} of the files cannot be stored as pixels ({'; '.join(bad[:3])}{'; …' if len(bad) > 3 else ''}); "
            "mend or remove them, or store JPEG files (--images jpeg)"
        )
    assert first is not None  # a folder without files is refused
    for name, header in headers.items():
        if header.size != first.size:
            raise ValueError(
                f"{tree.root / name} has {header.size}, {tree.root / next(iter(headers))} has {first.size}; bring all to one "
                "size, or store JPEG files (--images jpeg)"
            )
    channels = max(header.channels for header in headers.values())
    shape = (first.height, first.width, channels)
    preparation = {"data_set": "folder", "images": "raw", "channels": channels, **tree.preparation}
    if any(header.kind == "JPEG" for header in headers.values()):
        preparation |= versions
    kind = "gray" if channels == 1 else "colour"
    return Source(
        {
            name: ImageSplit(
                RawFiles(tree.root, listing.files, listing.sizes, shape),
                np.array(listing.labels, np.int64),
                tree.classes,
                identity(listing, preparation),
            )
            for name, listing in tree.listings.items()
        },
        preparation,
        [f"stored as pixels, {first.size}, {kind}", *tree.remarks],
    )


def _headers(tree: Tree, communicator: Communicator, all_of_them: bool) -> tuple[dict[str, Header], list[str]]:
    """The headers of the files by name, in their order, and what is wrong with files that have none; a collective.

    Without `all_of_them` each rank stops at the first JPEG file, of which one is enough to decide.
    """
    files = [pair for listing in tree.listings.values() for pair in zip(listing.files, listing.sizes, strict=True)]

    def look() -> tuple[dict[str, Header], list[str]]:
        found, bad = {}, []
        for name, size in files[communicator.rank :: communicator.size]:
            try:
                found[name] = read_header(read_file(tree.root, name, size))
            except ValueError as error:
                bad.append(f"{name} {error}")
                continue
            except OSError as error:
                bad.append(f"{name} cannot be read ({error.strerror or error})")
                continue
            if found[name].kind == "JPEG" and not all_of_them:
                break
        return found, bad

    parts = communicator.gather(succeed_together(communicator, look, "data.look"), "data.headers")
    together = {name: header for found, _ in parts for name, header in found.items()}
    return {name: together[name] for name, _ in files if name in together}, [line for _, bad in parts for line in bad]


def _why_not_raw(headers: dict[str, Header]) -> str:
    """Why the files are not stored as pixels unless that is asked for; empty if they are."""
    first = next(iter(headers.items()), None)
    for name, header in headers.items():
        if header.kind not in LOSSLESS:
            return f"{name} is a {header.kind} file"
        assert first is not None
        if header.size != first[1].size:
            return f"{name} has {header.size} and {first[0]} has {first[1].size}"
    return ""
