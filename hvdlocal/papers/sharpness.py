"""The sharpness of a loss at a point: largest eigenvalue and trace of its Hessian, from Hessian-vector products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharpness:
    """The Hessian of a loss at one point.

    Attributes:
        largest: its largest eigenvalue.
        trace: an estimate of its trace.
        trace_error: standard error of that estimate.
    """

    largest: float
    trace: float
    trace_error: float


def sharpness(
    parameters: Sequence[Tensor],
    losses: Callable[[], Iterable[Tensor]],
    *,
    probes: int = 16,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> Sharpness:
    """Computes the largest eigenvalue of a Hessian (Lanczos, ARPACK) and estimates its trace (Hutchinson 1990).

    Args:
        parameters: the variables of the Hessian, at the point where it is taken; each requires a gradient.
        losses: called once for every product; yields scalars whose sum is the loss. They are differentiated one by one, so
            that only one graph is held at a time.
        probes: number of random sign vectors for the trace, at least 2.
        seed: seed of these and of the first Lanczos vector.
        tolerance: relative error of the eigenvalue.

    Raises:
        ImportError: SciPy is missing.
        ValueError: a parameter does not require a gradient, or fewer than 2 probes.
    """
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise ImportError("the largest eigenvalue needs SciPy: pip install hvdlocal[reproduce]") from error
    if not all(p.requires_grad for p in parameters):
        raise ValueError("every parameter must require a gradient")
    if probes < 2:
        raise ValueError(f"probes={probes}: at least 2, for the error of the trace")
    size = sum(p.numel() for p in parameters)
    random = np.random.default_rng(seed)

    def times(vector: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return _hessian_times(parameters, losses, vector)

    if size < 3:  # too small for ARPACK
        hessian = np.stack([times(row) for row in np.eye(size)])
        largest = float(np.linalg.eigvalsh(hessian)[-1])
    else:
        operator = LinearOperator((size, size), matvec=times, dtype=np.float64)
        found = eigsh(
            operator, k=1, which="LA", v0=random.standard_normal(size), tol=tolerance, return_eigenvectors=False
        )
        largest = float(found[0])
    signs = (random.choice((-1.0, 1.0), size) for _ in range(probes))
    traces = np.array([vector @ times(vector) for vector in signs])
    return Sharpness(largest, float(traces.mean()), float(traces.std(ddof=1) / np.sqrt(probes)))


def _hessian_times(
    parameters: Sequence[Tensor], losses: Callable[[], Iterable[Tensor]], vector: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Computes Pearlmutter's product: the gradient of (gradient · vector)."""
    parts = torch.from_numpy(np.ascontiguousarray(vector).ravel()).split([p.numel() for p in parameters])
    directions = [part.view(p.shape).to(p) for part, p in zip(parts, parameters, strict=True)]
    total = [torch.zeros_like(p) for p in parameters]
    for loss in losses():
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        slope = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
        assert isinstance(slope, Tensor)
        if not slope.requires_grad:  # the loss is linear
            continue
        products = torch.autograd.grad(slope, parameters, materialize_grads=True)
        for mine, product in zip(total, products, strict=True):
            mine += product
    return torch.cat([part.flatten().double() for part in total]).cpu().numpy()
