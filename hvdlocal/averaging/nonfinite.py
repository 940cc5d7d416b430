"""NaN and infinity: how they are found in the same pass that divides a sum, and what is raised on all ranks."""

from __future__ import annotations

from typing import NoReturn

import torch

from hvdlocal.communicator import Communicator


class NonFiniteError(ArithmeticError):
    """A rank's loss, gradient or replica became NaN or infinite; raised on all ranks at the same step."""


class CheckedScale:
    """Multiplies tensors in place and looks for NaN and infinity in the same pass.

    Args:
        device: where the tensors lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._found, self._factor = (torch.zeros(1, dtype=torch.float32, device=device) for _ in range(2))

    def __call__(self, parts: list[torch.Tensor], factor: torch.Tensor | float) -> torch.Tensor:
        """Multiplies each of `parts` by `factor` with GradScaler's kernel, which does both at once.

        Returns:
            Positive where there is such a number, else 0; float32 (1,), on the device and overwritten by the next call.
        """
        self._found.zero_()
        self._factor.fill_(factor)
        torch._amp_foreach_non_finite_check_and_unscale_(parts, self._found, self._factor)
        return self._found


def raise_nonfinite(communicator: Communicator, mine: bool, when: str, what: str) -> NoReturn:
    """Raises the error for replicas or gradients that are not finite; a collective.

    Args:
        communicator: the ranks.
        mine: whether this rank's is one of them.
        when: as part of the message, 'at progress 12.0 (gain 1.3)'.
        what: what has become of the model.
    """
    found = communicator.gather(mine, "hvdlocal.nonfinite")
    ranks = [rank for rank, bad in zip(communicator.job_ranks, found, strict=True) if bad]
    listed = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    where = (
        f"on rank{'s' if len(ranks) > 1 else ''} {listed} of {communicator.job_size}"
        if ranks
        else _nowhere(communicator)
    )
    raise NonFiniteError(
        f"NaN or infinity {where} {when}: {what} Lower the learning rate, "
        "clip gradients (max_norm), or look at the data of that rank."
    )


def raise_nonfinite_buffers(communicator: Communicator, mine: list[str], healthy: int, when: str) -> NoReturn:
    """Raises the error for averaged buffers that are not finite; a collective.

    Args:
        communicator: the ranks.
        mine: names of this rank's buffers that are not finite.
        healthy: on how many ranks all are finite.
        when: as for `raise_nonfinite`.
    """
    names = communicator.gather(mine, "hvdlocal.nonfinite_buffers")
    found = [
        f"{own[0]!r} on rank {rank}" + (f" and {len(own) - 1} more there" * (len(own) > 1))
        for rank, own in zip(communicator.job_ranks, names, strict=True)
        if own
    ]
    where = "; ".join(found[:4]) + (f"; and on {len(found) - 4} more ranks" if len(found) > 4 else "")
    name = next((own[0] for own in names if own), "…")
    state = "they are now the average of the other ranks" if healthy else "no rank holds usable ones"
    raise NonFiniteError(
        f"NaN or infinity {when} in averaged buffers: {where or _nowhere(communicator)}: "
        f"{state}. Look at the data of that rank, or keep such a buffer out of the average: buffers={{{name!r}: 'local'}}."
    )


def _nowhere(communicator: Communicator) -> str:
    """Where NaN or infinity were when no rank has them now."""
    return ("on a rank that is lost now, or " if communicator.losses else "") + "in the sum over all ranks"
