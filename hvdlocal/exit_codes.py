"""The exit codes of `hvdlocal`; docs/checkpoints.md says what to do about each."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended.

    A launcher may report another code than its ranks' (docs/slurm.md); slurm/common.sh interprets those.
    """

    FINISHED = 0
    FAILED = 1
    MISTAKE = 2
    DIVERGED = 3
    PEER_FAILED = 4
    INTERRUPTED = 85
    STOPPED = 130
    UNREAD = 141
