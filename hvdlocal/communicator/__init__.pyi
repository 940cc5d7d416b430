from .agreement import (
    on_rank_zero as on_rank_zero,
    require_agreement as require_agreement,
    succeed_together as succeed_together,
)
from .base import Communicator as Communicator, StartedSum as StartedSum
from .errors import (
    CollectiveTimeoutError as CollectiveTimeoutError,
    CommunicationError as CommunicationError,
    DisagreementError as DisagreementError,
    LaunchError as LaunchError,
    SetupError as SetupError,
)
from .launch import current as current, init as init
from .launched import launched_rank as launched_rank, launched_size as launched_size
from .losses import Loss as Loss, MissingRanksError as MissingRanksError, TooFewRanksError as TooFewRanksError
from .single import SingleProcess as SingleProcess
