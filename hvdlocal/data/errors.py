"""What goes wrong with data while they are read."""


class DamagedDataError(ValueError):
    """Bytes are not what was written; the message names the file and, where known, the samples, and the remedy."""
