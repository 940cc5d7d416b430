"""Checkpoints: what every rank needs to go on as if nothing had happened, also from the middle of a round.

`files` knows what a checkpoint is on disk; `writer` writes one beside the training; `resume` finds the newest good one and
hands every rank its part; `pace` says how often.
"""

from hvdlocal.training.checkpoint.files import CheckpointError
from hvdlocal.training.checkpoint.interval import CheckpointInterval
from hvdlocal.training.checkpoint.resume import Resumed, averaged_model, resume
from hvdlocal.training.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointError", "CheckpointInterval", "CheckpointWriter", "Resumed", "averaged_model", "resume"]
