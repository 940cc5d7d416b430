"""Which tensors of a replica and of its optimizer lie in the flat buffer, and that they stay there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hvdlocal.averaging.buffers import check_averaged, refuse_shared_memory, split_aliases
from hvdlocal.averaging.claims import BufferClaims
from hvdlocal.averaging.flat_buffer import FlatReplica
from hvdlocal.averaging.guards import refuse_moved_tensors
from hvdlocal.averaging.moments import (
    Momentum,
    adopt_moments,
    averages_all_moments,
    decays,
    moment_periods,
    refuse_new_moments,
)
from hvdlocal.averaging.setup import owner_of


class ReplicaMemory:
    """Moves the parameters, the averaged buffers and the averaged moments of a replica into one flat buffer.

    Args:
        optimizer: steps the replica.
        model: the replica.
        parameters: the parameters to train, by name.
        buffers: the buffers to average, by name.
        momentum: what becomes of the moments; see `LocalOptimizer`.
        statistics, slices, with_statistics, sliced_parameters: see `FlatReplica`.

    Attributes:
        flat: the flat buffer.
        periods: the period of each averaged moment in rounds, in the order of their places.

    Raises:
        ValueError: a buffer or a moment cannot be averaged.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        buffers: Mapping[str, torch.Tensor],
        momentum: Momentum,
        *,
        statistics: int,
        slices: int,
        with_statistics: bool,
        sliced_parameters: bool,
    ) -> None:
        self._optimizer = optimizer
        self._all_moments = momentum == "average"
        self._parameters = list(parameters.values())
        self.periods = moment_periods(optimizer, momentum)
        averaged, aliases = split_aliases(dict(buffers))
        check_averaged(averaged, self._parameters[0].device, torch.float32)
        refuse_shared_memory(model, {**parameters, **averaged}, [alias for alias, _ in aliases])
        self._claims = BufferClaims(averaged, self._parameters)
        self.flat = FlatReplica(
            self._parameters,
            list(averaged.values()),
            list(self.periods.values()),
            statistics,
            slices=slices,
            with_statistics=with_statistics,
            sliced_parameters=sliced_parameters,
        )
        for alias, name in aliases:
            alias.data = averaged[name].data
        self._names = list(averaged)
        self._owners = [owner_of(model, name) for name in [*parameters, *averaged]]
        self.tensors = [*self._parameters, *averaged.values()]

    def holds(self, buffer: torch.Tensor) -> bool:
        """Whether this buffer of the model is one that is averaged."""
        return self._claims.hold(buffer)

    def prepare(self) -> None:
        """Makes the flat buffer hold the replica as it is now, with the moments that the optimizer has made since.

        Raises:
            RuntimeError: a tensor has been replaced, or the optimizer keeps moments that have no place.
        """
        present = [getattr(module, name, None) for module, name in self._owners[len(self._parameters) :]]
        refuse_moved_tensors(self._owners, [*self._parameters, *present], self.flat.views)
        if self._all_moments:
            refuse_new_moments(self._optimizer, self.periods)
        adopt_moments(self._optimizer, self.periods, self._parameters, self.flat)

    def decays(self) -> dict[str, list[float]]:
        """β of every averaged moment; see `moments.decays`."""
        return decays(self._optimizer, self.periods, self._parameters)

    def averages_all_moments(self, round_number: int) -> bool:
        """Whether the average of a round holds all moments of the optimizer; see `moments.averages_all_moments`."""
        return averages_all_moments(self._optimizer, self.periods, round_number)

    def names_of_nonfinite(self, finite: torch.Tensor) -> list[str]:
        """The averaged buffers in which a mask of finite elements has a hole."""
        masks = self.flat.buffer_layout.of(finite)
        return [name for name, mask in zip(self._names, masks, strict=True) if not mask.all()]
