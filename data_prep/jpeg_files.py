"""Image files as JPEG: kept as they are, converted, or made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.raw_files import read_file
from hvdlocal.data import JpegSample
from hvdlocal.data.write.jpeg_check import decode_usual, is_usual, jpeg_libraries, open_with_pillow, to_rgb

CONVERSION_QUALITY = 95
"""Of JPEG files made from PNG and CMYK files that are not resized."""


class JpegFiles:
    """Files of a tree as samples for `JpegShardWriter`.

    Grayscale and RGB JPEG files keep their bytes, unless they are resized. Others become RGB JPEG. EXIF orientation is
    ignored, as it is by the usual ways to train on ImageNet.

    Args:
        root: directory that the paths are relative to.
        paths: of the files.
        sizes: their sizes in bytes when they were listed; -1 for what was no file that can be read.
        resize: length in pixels that the shorter side is reduced to; smaller images keep their size. None keeps all.
        quality: of the JPEG files that are made by resizing.
    """

    def __init__(
        self, root: Path, paths: Sequence[str], sizes: Sequence[int], resize: int | None = None, quality: int = 90
    ) -> None:
        self._root = root
        self._paths = paths
        self._sizes = sizes
        self._resize = resize
        self._quality = quality

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> JpegSample:
        """File `index`. Raises ValueError with the reason if it cannot be used, OSError if it cannot be read."""
        content = read_file(self._root, self._paths[index], self._sizes[index])
        if self._resize is None:
            what = _foreign(content)
            if not what:
                return JpegSample(content)
            pixels = to_rgb(open_with_pillow(content))
            return JpegSample(_encode(pixels, CONVERSION_QUALITY), f"converted from {what}")
        usual = decode_usual(content)
        pixels = to_rgb(open_with_pillow(content)) if usual is None else usual
        what = _foreign(content)
        return JpegSample(
            _encode(_shrink(pixels, self._resize), self._quality), f"converted from {what}" if what else ""
        )


def _foreign(content: bytes) -> str:
    """What a file is if it is neither a grayscale nor an RGB JPEG file; else the empty string."""
    if is_usual(content):
        return ""
    image = open_with_pillow(content)
    if image.format not in ("JPEG", "MPO"):
        return str(image.format)
    return "" if image.mode in ("L", "RGB") else f"{image.mode} JPEG"


def _shrink(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= side:
        return pixels
    cv2 = jpeg_libraries()[1]
    size = (round(width * side / short), round(height * side / short))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _encode(pixels: NDArray[np.uint8], quality: int) -> bytes:
    return jpeg_libraries()[0].encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")
