"""The only package that knows Horovod or MPI. Everything above it sees a `Communicator`."""

from hvdlocal.communicator.agreement import DisagreementError, require_agreement
from hvdlocal.communicator.base import CollectiveTimeoutError, CommunicationError, Communicator
from hvdlocal.communicator.launch import current, init

__all__ = [
    "CollectiveTimeoutError",
    "CommunicationError",
    "Communicator",
    "DisagreementError",
    "current",
    "init",
    "require_agreement",
]
