"""The exit codes of `hvdlocal`; docs/checkpoints.md says what to do about each."""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended. Of a launcher's code, which may be another, only the job's script makes sense: slurm/common.sh."""

    FINISHED = 0
    FAILED = 1
    MISTAKE = 2
    DIVERGED = 3
    PEER_FAILED = 4
    INTERRUPTED = 85
    STOPPED = 130
    UNREAD = 141
