from .agreement import (
    DisagreementError as DisagreementError,
    SetupError as SetupError,
    on_rank_zero as on_rank_zero,
    require_agreement as require_agreement,
    succeed_together as succeed_together,
)
from .base import (
    CollectiveTimeoutError as CollectiveTimeoutError,
    CommunicationError as CommunicationError,
    Communicator as Communicator,
)
from .launch import LaunchError as LaunchError, current as current, init as init
from .launched import launched_rank as launched_rank, launched_size as launched_size
from .single import SingleProcess as SingleProcess
