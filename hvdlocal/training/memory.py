"""How much memory a rank takes, and how it is recognised that memory has run out, which torch reports in three ways."""

from __future__ import annotations

import re
import resource

import torch

_ALLOCATOR = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_TOO_LARGE = (
    "Storage size calculation overflowed",
    "Overflow when unpacking long",
    "numel: integer multiplication overflow",
)

REMEDY = "lower data.batch_size, evaluation_batch_size or data.image_size, take a smaller model, or start fewer ranks on a node"


def out_of_memory(error: BaseException) -> str | None:
    """Returns a sentence about what ran out and what to do; None for an error of another kind."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU is out of memory ({str(error).partition('. ')[0]}): {REMEDY}"
    if isinstance(error, MemoryError):
        return f"out of memory ({error}): {REMEDY}" if str(error) else f"out of memory: {REMEDY}"
    if isinstance(error, RuntimeError):
        if found := _ALLOCATOR.search(str(error)):
            return f"out of memory ({int(found[1]) / 2**30:,.1f} GiB were asked for at once): {REMEDY}"
        if any(words in str(error) for words in _TOO_LARGE):
            return f"out of memory (more was asked for than can be addressed): {REMEDY}"
    return None


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Returns the most memory in bytes that this process has taken since it started, as fields of a record.

    Args:
        device: of the model; without a GPU, `peak_gpu_memory_bytes` is None.
    """
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kibibytes
    return {"peak_memory_bytes": resident, "peak_gpu_memory_bytes": gpu}
