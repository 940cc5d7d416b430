"""What a data set's module hands to the writer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Source:
    """A data set in memory.

    Attributes:
        classes: class names; label i means classes[i].
        splits: name of the split -> (uint8 images (N, H, W, C), integer labels (N,)).
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[NDArray[np.uint8], NDArray[np.integer]]]
