"""Types of command-line arguments that several commands share."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> float:
    """Converts the text of an argument to a number above 0.

    Raises:
        argparse.ArgumentTypeError: it is not such a number.
    """
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
