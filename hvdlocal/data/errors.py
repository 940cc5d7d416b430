"""Errors of reading data."""

from __future__ import annotations


class DamagedDataError(ValueError):
    """The bytes differ from what was written; the message names the file and, where known, the samples, and the remedy."""
