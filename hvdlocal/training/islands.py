"""Joining the ranks of a job in the islands that a configuration names."""

from __future__ import annotations

import os

from hvdlocal.communicator import Communicator, SetupError, init
from hvdlocal.communicator.islands import divide, node_name, parse_island
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.config_checks import check_ranges


def join(config: TrainConfig) -> Communicator:
    """Joins the ranks of this job in the configured islands.

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
    return init(island=island)


def require_islands(config: TrainConfig, communicator: Communicator) -> None:
    """Checks that a communicator has the configured islands; a collective where there are any.

    Raises:
        SetupError: on all ranks: it has others, or the ranks do not make such islands.
    """
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
