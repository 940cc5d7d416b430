"""Joining the ranks of a job as a configuration wants them: in islands, and going on without ranks that die."""

from __future__ import annotations

import os

from hvdlocal.communicator import Communicator, SetupError, init
from hvdlocal.communicator.islands import divide, node_name, parse_island
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.config_checks import check_ranges


def join(config: TrainConfig) -> Communicator:
    """Joins the ranks of this job in the configured islands, as a job that survives if the configuration or HVDLOCAL_SURVIVE
    asks for it.

    Raises:
        ValueError: a setting cannot be used, or the ranks do not make such islands; and what `init` raises.
    """
    check_ranges(config)
    island, variable = config.method.island, os.environ.get("HVDLOCAL_ISLAND")
    if variable and parse_island(variable, "HVDLOCAL_ISLAND") != island:
        raise ValueError(
            f"HVDLOCAL_ISLAND={variable}, but method.island={island}: the configuration decides, so set method.island to what "
            "you want, and unset the variable"
        )
    return init(island=island, survive=config.survive or None)


def require_as_configured(config: TrainConfig, communicator: Communicator) -> None:
    """Checks that a communicator has the configured islands, and survives if it is to; a collective where there are islands.

    Raises:
        SetupError: on all ranks: it does not, or the ranks do not make such islands, or are too few.
    """
    _require_islands(config, communicator)
    if not communicator.survives:
        if config.survive:
            raise SetupError(
                "survive=true, but the communicator ends with the first rank that dies: call "
                'hvdlocal.init(backend="mpi4py", survive=True), or leave survive out'
            )
        if config.min_workers > 1:
            raise SetupError(
                f"min_workers={config.min_workers} without survive: the job ends with the first rank that dies, so there is no "
                "smaller number to go on with; set survive: true, or leave min_workers out"
            )
    elif config.data.tail == "drop":
        raise SetupError(
            "data.tail=drop with survive: an epoch would leave out other samples with every rank that dies; choose carry or "
            "partial"
        )
    elif config.min_workers > (workers := communicator.num_islands):
        raise SetupError(
            f"min_workers={config.min_workers}, but the job has {workers} {'islands' if communicator.island else 'ranks'}: start "
            f"more, or choose at most {workers}"
        )


def _require_islands(config: TrainConfig, communicator: Communicator) -> None:
    island, size = config.method.island, 1
    if island != 1:
        try:
            size = len(divide(island, communicator.gather(node_name(), "hvdlocal.nodes"))[0])
        except ValueError as error:
            raise SetupError(f"method.{error}") from error
    if size != communicator.island_size:
        raise SetupError(
            f"method.island={island} needs islands of {size}, but those of the communicator have {communicator.island_size}: "
            f"call hvdlocal.init(island={island!r}), or write method.island as hvdlocal.init had it"
        )
