"""Image files of one size as pixels, without loss: what a file is, by its header, and its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvdlocal.data.write.jpeg_check import open_with_pillow

LOSSLESS = ("PNG", "BMP")
_GRAY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "P", "PA")
_PNG_DEPTH = 24  # the byte of a PNG file that holds the bits per channel


@dataclass(frozen=True)
class Header:
    """What the header of a file says.

    Attributes:
        kind: Pillow's name of the format: PNG, BMP or JPEG.
        height, width: in pixels.
        channels: 1 for gray, 3 for colour.
    """

    kind: str
    height: int
    width: int
    channels: int

    @property
    def size(self) -> str:
        """Width and height, for people."""
        return f"{self.width}x{self.height} pixels"


def read_file(root: Path, name: str, size: int) -> bytes:
    """The bytes of a file of a tree.

    Raises:
        ValueError: it is no regular file, is empty, or has another size than when it was listed.
        OSError: it cannot be read.
    """
    path = root / name
    if size < 0:
        path.stat()  # says what is wrong with a link that leads nowhere
        raise ValueError("is not a regular file")  # reading it might never end
    content = path.read_bytes()
    if len(content) != size:
        raise OSError(f"{path} had {size} bytes when it was listed and has {len(content)} now")
    if not content:
        raise ValueError("is empty")
    return content


def read_header(content: bytes) -> Header:
    """What the header of a file says. Raises ValueError with the reason if its pixels are not 8 bits, gray or colour."""
    return _header(content, open_with_pillow(content))


def _header(content: bytes, image: Any) -> Header:
    if image.format not in (*LOSSLESS, "JPEG"):
        raise ValueError(f"is a {image.format} file; convert it to PNG")
    if image.format == "PNG" and content[_PNG_DEPTH] > 8:  # Pillow halves the bits of colours and says nothing
        raise ValueError(f"has {content[_PNG_DEPTH]} bits per channel; convert it to 8")
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"holds {image.n_frames} images; keep one of them")
    if image.mode not in (*_GRAY_MODES, *_COLOUR_MODES):
        raise ValueError(f"has pixels of Pillow's mode {image.mode}; convert it to 8-bit gray or RGB")
    return Header(image.format, image.height, image.width, 1 if image.mode in _GRAY_MODES else 3)


def decode(content: bytes, channels: int) -> NDArray[np.uint8]:
    """The pixels of a file, uint8 (H, W, channels); gray ones are repeated where 3 channels are wanted.

    A palette is looked up, one to four bits of gray become 0..255, and transparency without effect is left out.

    Raises:
        ValueError: with the reason, if the file is damaged or has pixels that are transparent.
    """
    image = open_with_pillow(content)
    header = _header(content, image)
    try:
        if "transparency" in image.info or image.mode in ("LA", "RGBA", "PA"):
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema()[0] < 255:
                raise ValueError("has transparent pixels; put it on a background")
        pixels = np.asarray(image.convert("L" if header.channels == 1 else "RGB"))
    except ValueError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # Pillow lets many kinds escape from a damaged file
        raise ValueError(f"cannot be decoded ({str(error) or type(error).__name__})") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    return np.repeat(pixels, channels, axis=2) if pixels.shape[2] < channels else pixels


class RawFiles:
    """Files of a tree as an `ImageSource`: decoded when they are asked for.

    Args:
        root: directory that the paths are relative to.
        paths: of the files.
        sizes: their sizes in bytes when they were listed.
        shape: (H, W, C) of every image.
    """

    def __init__(self, root: Path, paths: Sequence[str], sizes: Sequence[int], shape: tuple[int, int, int]) -> None:
        self._root = root
        self._paths = paths
        self._sizes = sizes
        self.shape = (len(paths), *shape)
        self.dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images with the given indices. Raises ValueError naming a file that cannot be used."""
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for image, row in zip(images, rows.tolist(), strict=True):
            name = self._paths[row]
            try:
                pixels = decode(read_file(self._root, name, self._sizes[row]), self.shape[3])
                if pixels.shape != self.shape[1:]:
                    raise ValueError(f"has another size than {self.shape[2]}x{self.shape[1]} pixels now")
            except ValueError as error:
                raise ValueError(f"{self._root / name} {error}; mend or remove it, and run again") from error
            image[:] = pixels
        return images
