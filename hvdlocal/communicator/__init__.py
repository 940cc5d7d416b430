"""The only package that knows Horovod or MPI. Everything above it sees a `Communicator`."""

from hvdlocal.communicator.agreement import DisagreementError, SetupError, require_agreement, succeed_together
from hvdlocal.communicator.base import CollectiveTimeoutError, CommunicationError, Communicator
from hvdlocal.communicator.launch import LaunchError, current, init
from hvdlocal.launched import launched_rank, launched_size

__all__ = [
    "CollectiveTimeoutError",
    "CommunicationError",
    "Communicator",
    "DisagreementError",
    "LaunchError",
    "SetupError",
    "current",
    "init",
    "launched_rank",
    "launched_size",
    "require_agreement",
    "succeed_together",
]
