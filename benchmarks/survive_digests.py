"""A callback for benchmarks/survive.py: every rank notes checksums of its replica wherever all replicas should be equal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

import hvdlocal
from hvdlocal.communicator import current
from hvdlocal.training.callbacks.base import Outcome, Record, RunView

DIGESTS = "digests-{rank}.jsonl"
"""Name of a rank's file beside the output directory; the number is that of the job's start."""


def digest(model: nn.Module, with_buffers: bool) -> str:
    """Returns a checksum of all parameters, and of the buffers where these are equal too."""
    found = hashlib.sha256()
    for tensor in [*model.parameters(), *(model.buffers() if with_buffers else ())]:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class Digests(hvdlocal.Callback):
    """Writes a line after each evaluation and at the end of the run, when every replica is the average."""

    all_ranks = True

    def on_start(self, run: RunView) -> None:
        """Opens the rank's file."""
        communicator = current()
        rank = communicator.job_ranks[communicator.rank]
        self._file = (Path(run.directory).parent / DIGESTS.format(rank=rank)).open("a", encoding="utf-8")

    def on_evaluation(self, run: RunView, record: Record) -> None:
        """Notes the replica that was evaluated."""
        self._note(run, "evaluation")

    def on_end(self, run: RunView, outcome: Outcome, summary: Record | None) -> None:
        """Notes the last replica, and how the run ended."""
        self._note(run, outcome)
        self._file.close()

    def _note(self, run: RunView, event: str) -> None:
        checksum = digest(run.model, with_buffers=run.config["method"]["buffers"] != "local")
        self._file.write(json.dumps({"event": event, "step": run.step, "digest": checksum}) + "\n")
        self._file.flush()
