"""The first gradients of a round: what each rank writes into its flat buffer, and what their sum shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdlocal.averaging.flat_buffer import FlatBuffer, StatisticsScalar
from hvdlocal.averaging.gain import LocalAdaScale
from hvdlocal.averaging.sketch import GradientSketch, default_size


class RoundStatistics:
    """A rank's gradient of a round's first step, whole or as a sketch.

    Args:
        scaling: says which of the two.
        parameters: whose gradients are meant.

    Attributes:
        size: length of the vector that is sent.
    """

    def __init__(self, scaling: LocalAdaScale, parameters: Sequence[torch.nn.Parameter]) -> None:
        numels = [p.numel() for p in parameters]
        self._parameters = parameters
        self._sketch: GradientSketch | None = None
        self.size = sum(numels)
        if scaling.statistics == "sketch":
            size = scaling.sketch_size or default_size(self.size)
            self._sketch = GradientSketch(numels, size, parameters[0].device)
            self.size = self._sketch.size

    def write(self, buffer: FlatBuffer, gradients: Sequence[torch.Tensor | None], valid: bool) -> None:
        """Writes this rank's vector and scalars into `buffer`.

        Args:
            buffer: where the statistics have a place.
            gradients: this rank's, one for each parameter.
            valid: whether every micro-batch brought a gradient without overflow. Else there is no estimate on any rank: no
                gradient is not a gradient of zero.
        """
        vector, scalars = buffer.statistics, buffer.statistics_scalars
        assert scalars is not None
        dense = [_dense_gradient(p, gradient) for p, gradient in zip(self._parameters, gradients, strict=True)]
        if self._sketch:
            self._sketch.project(dense, vector)
        else:
            torch.cat([gradient.as_strided((gradient.numel(),), (1,)) for gradient in dense], out=vector)
        sqr_norm = torch.dot(vector, vector)
        scalars[StatisticsScalar.SQR_NORM].copy_(sqr_norm)
        if valid:
            scalars[StatisticsScalar.VALID].copy_(sqr_norm.isfinite())  # not read: a local step does not wait for a GPU
        else:
            scalars[StatisticsScalar.VALID].zero_()


def summed_statistics(buffer: FlatBuffer) -> torch.Tensor:
    """Σ ‖g‖², how many ranks' gradients are finite, and ‖Σ g‖², from summed statistics: float32 (3,)."""
    assert buffer.statistics_scalars is not None
    vector = buffer.statistics
    return torch.cat([buffer.statistics_scalars, torch.dot(vector, vector).view(1)])


def _dense_gradient(parameter: torch.nn.Parameter, gradient: torch.Tensor | None) -> torch.Tensor:
    """The gradient in the parameter's memory order, itself when it has the parameter's strides."""
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.is_sparse:
        raise ValueError("sparse gradients are not supported: use Embedding(sparse=False)")
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=torch.float32, device=parameter.device
        ).copy_(gradient)
    return gradient
