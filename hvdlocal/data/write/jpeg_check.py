"""Decoding a JPEG file once, in full, before it enters a shard: what is unreadable is found here and not in training."""

from __future__ import annotations

import io
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PIXELS = 178_956_970
"""Larger images (as Pillow, twice 1 GiB / 4 / 3 pixels) are taken for decompression bombs."""

_COUNTABLE = 1 << 24  # OpenCV counts in float32, which is exact up to here


@dataclass(frozen=True, eq=False)
class JpegFacts:
    """Facts found by decoding a JPEG file.

    Attributes:
        height, width: in pixels.
        histogram: int64 (3, 256), how often each value occurs in red, green and blue.
        lenient: libjpeg warned of damage that only a lenient decoder (Pillow) forgives.
    """

    height: int
    width: int
    histogram: NDArray[np.int64]
    lenient: bool


def jpeg_libraries() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules simplejpeg, cv2 and PIL.Image. Raises ValueError saying what to install."""
    try:
        import cv2
        import PIL.Image
        import simplejpeg  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ValueError(
            f"JPEG files need simplejpeg, OpenCV and Pillow ({error}); pip install 'hvdlocal[jpeg]'"
        ) from error
    cv2.setNumThreads(1)  # our threads share the cores out among themselves
    return simplejpeg, cv2, PIL.Image


def jpeg_versions() -> dict[str, str]:
    """Versions of the libraries on which decoded pixels and encoded bytes depend."""
    simplejpeg, cv2, _ = jpeg_libraries()
    import PIL

    return {"simplejpeg": simplejpeg.__version__, "opencv": cv2.__version__, "pillow": PIL.__version__}


def check_jpeg(data: bytes) -> JpegFacts:
    """Decodes a grayscale or RGB JPEG file in full.

    Raises:
        ValueError: it is not such a file, is damaged or cut off, or is larger than `MAX_PIXELS`; the message is the
            reason. Or a library is missing.
    """
    pixels = decode_usual(data)
    lenient = pixels is None
    if pixels is None:
        pixels = _leniently(data)
    return JpegFacts(pixels.shape[0], pixels.shape[1], rgb_histogram(pixels), lenient)


def is_usual(data: bytes) -> bool:
    """Whether the header is that of a grayscale or RGB JPEG file, of believable size, that simplejpeg knows."""
    try:
        height, width, colorspace, _ = jpeg_libraries()[0].decode_jpeg_header(data)
    except Exception:  # ValueError, but KeyError for a subsampling that it has no name for
        return False
    if colorspace not in ("Gray", "RGB", "YCbCr"):
        return False
    check_size(width, height)
    return True


def decode_usual(data: bytes) -> NDArray[np.uint8] | None:
    """Decodes a grayscale or RGB JPEG file strictly: uint8 (H, W, 3); None if it is no such file, or has any damage."""
    simplejpeg = jpeg_libraries()[0]
    if not is_usual(data):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except Exception:
        return None


def check_size(width: int, height: int) -> None:
    """Raises ValueError for an image that is too large to be one."""
    if width * height > MAX_PIXELS or max(width, height) > 65535:
        raise ValueError(f"claims {width}x{height} pixels, more than are believed")


def open_with_pillow(data: bytes) -> Any:
    """A PIL.Image of the file, its header read and its size believable. Raises ValueError with the reason if not."""
    image_module = jpeg_libraries()[2]
    try:
        image = image_module.open(io.BytesIO(data))
    except image_module.DecompressionBombError as error:
        raise ValueError("claims more pixels than are believed") from error
    except Exception as error:  # Pillow lets many kinds escape from a damaged file
        raise ValueError(_reason(error)) from error
    check_size(*image.size)
    return image


def to_rgb(image: Any) -> NDArray[np.uint8]:
    """Decodes a PIL.Image in full: uint8 (H, W, 3). Raises ValueError with the reason if that fails."""
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"has pixels of Pillow's mode {image.mode}; convert it to 8-bit RGB")
    try:
        return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise ValueError(_reason(error)) from error


def rgb_histogram(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Exact counts, int64 (3, 256), of uint8 (H, W, 3)."""
    cv2 = jpeg_libraries()[1]
    rows = max(1, _COUNTABLE // pixels.shape[1])
    histogram = np.zeros((3, 256), np.int64)
    for top in range(0, len(pixels), rows):
        for channel, counts in enumerate(histogram):
            found = cv2.calcHist([pixels[top : top + rows]], [channel], None, [256], [0, 256])
            counts += found.ravel().astype(np.int64)
    return histogram


def _leniently(data: bytes) -> NDArray[np.uint8]:
    image = open_with_pillow(data)
    if image.format not in ("JPEG", "MPO"):
        raise ValueError(f"is a {image.format} file; convert it to JPEG")
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"is a {image.mode} JPEG; convert it to RGB")
    return to_rgb(image)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "is not an image of a known format"
    return f"cannot be decoded ({str(error) or type(error).__name__})"
