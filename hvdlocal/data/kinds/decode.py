"""Decoding the wanted part of a JPEG at the wanted size.

simplejpeg decodes and OpenCV resizes where they are installed (`pip install hvdlocal[jpeg]`); Pillow does what they do not:
CMYK, damaged but readable files, PNGs with a JPEG's name. All three release the GIL, so threads are enough. Pixel values differ
between decoders by a few units, which is why `decoder_description` belongs into the record of a run.
"""

from __future__ import annotations

import importlib
import io
import time
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError

from hvdlocal.data.errors import DamagedDataError

if TYPE_CHECKING:
    from hvdlocal.data.kinds.base import Samples


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# The scaled transform cuts frequencies off crudely and its pixels lie on a grid of their own. Scaled to just the size that is
# wanted, photographs differ from an average over areas by 5 units, with twice the size by 2.6, as bilinear resizing does by 2.4.
OVERSAMPLING = 2

simplejpeg, cv2 = _optional("simplejpeg"), _optional("cv2")
if cv2 is not None:
    cv2.setNumThreads(1)  # the loader has threads of its own; OpenCV's would fight with them for the rank's cores


def decoder_description() -> str:
    """The libraries that decode and resize, with their versions, e.g. for the record of a run."""
    decoder = f"simplejpeg {metadata.version('simplejpeg')}, else " if simplejpeg else ""
    resize = f"OpenCV {cv2.__version__}" if cv2 else "Pillow"
    return f"decoded by {decoder}Pillow {metadata.version('pillow')}; resized by {resize}"


def decode_crops(
    samples: Samples, indices: ArrayLike, boxes: NDArray[np.int64], out: NDArray[np.uint8]
) -> tuple[int, float, float]:
    """Decodes boxes of JPEGs to one size.

    Args:
        samples: of kind "jpeg".
        indices: integers (n,), which of them.
        boxes: int64 (n, 4): top, left, height, width in pixels of the original.
        out: C-contiguous uint8 (n, S, S, 3) to fill with RGB.

    Returns:
        The bytes that were read, the seconds that it took to get at them, and the seconds that decoding took.

    Raises:
        ValueError: a JPEG cannot be decoded, or its bytes are damaged; it names shard, sample and byte range.
    """
    dims = samples.tables["dims"]
    num_bytes, read_seconds, decode_seconds = 0, 0.0, 0.0
    before = time.perf_counter()
    for sample, box, image in zip(np.asarray(indices).tolist(), boxes.tolist(), out, strict=True):
        data = samples.bytes_of(sample)
        began = time.perf_counter()
        read_seconds += began - before
        num_bytes += len(data)
        height, width = dims[sample].tolist()
        try:
            decode_crop(data, (height, width), box, image)
        except Exception as error:
            raise DamagedDataError(
                f"{samples.name_of(sample)} cannot be decoded: {error}; replace or remove this image in the source and write "
                "the data set again (python -m data_prep … --overwrite)"
            ) from error
        before = time.perf_counter()
        decode_seconds += before - began
    return num_bytes, read_seconds, decode_seconds


def decode_crop(data: Any, dims: tuple[int, int], box: list[int], out: NDArray[np.uint8]) -> None:
    """Decodes one box of one image to `out`.

    A large box is decoded at half of its size or less, by libjpeg's scaled inverse transform, as long as it stays at least
    twice as large as `out`; the rest of the way is a resize that averages over areas when it shrinks.

    Args:
        data: the bytes of a JPEG (or of whatever Pillow opens), anything with a buffer.
        dims: (height, width) of the whole image in pixels.
        box: top, left, height, width in pixels of the original.
        out: C-contiguous uint8 (S, S, 3), RGB.

    Raises:
        Exception: whatever the decoder says of bytes that it cannot make sense of.
    """
    size = len(out)
    # Decoded at h/H of its height H, a box of height b keeps b*h/H >= OVERSAMPLING * size rows.
    least = [-(-side * OVERSAMPLING * size // extent) for side, extent in zip(dims, box[2:], strict=True)]
    image = None
    if simplejpeg is not None:
        try:
            # Fractions above a half have no vector code and cost more than they save.
            image = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], min_factor=2)
        except Exception:  # also of files that are fine, such as CMYK; Pillow knows more, and what it says is raised
            image = None
    if image is None:
        image = _decode_with_pillow(data, dims, least)
    ratios = [found / side for found, side in zip(image.shape[:2], dims, strict=True)]
    top, bottom = _scaled(box[0], box[2], ratios[0], image.shape[0])
    left, right = _scaled(box[1], box[3], ratios[1], image.shape[1])
    _resize(image[top:bottom, left:right], out)


def _scaled(start: int, extent: int, ratio: float, side: int) -> tuple[int, int]:
    """Where a range of pixels lies in an image that was decoded at `ratio` of its size."""
    first = min(round(start * ratio), side - 1)
    return first, min(max(round((start + extent) * ratio), first + 1), side)


def _decode_with_pillow(data: Any, dims: tuple[int, int], least: list[int]) -> NDArray[np.uint8]:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("it is no image of a kind that Pillow knows") from None
    with image:
        if image.size != (dims[1], dims[0]):
            raise ValueError(f"it is {image.size[1]}×{image.size[0]} pixels large, {dims[0]}×{dims[1]} are on record")
        if image.mode != "CMYK":
            image.draft("RGB", (least[1], least[0]))  # without effect on anything but a JPEG
        return np.asarray(image.convert("RGB"))


def _resize(image: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    size = len(out)
    if image.shape == out.shape:
        out[:] = image
    elif cv2 is not None:
        shrinks = min(image.shape[:2]) >= size
        cv2.resize(image, (size, size), dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    else:
        out[:] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
