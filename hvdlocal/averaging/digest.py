"""What must be equal on all ranks, as bits that ride in a collective.

All facts together have one checksum, and each of its bits is sent as 0 or 1. The sum of a bit over K ranks is 0 or K everywhere
exactly when all ranks sent the same bit. A difference is therefore found without a collective of its own, on any number of ranks;
only then the ranks exchange the facts themselves.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from operator import attrgetter
from typing import Any

import torch

from hvdlocal.communicator import CommunicationError, Communicator, DisagreementError

DIGEST_SIZE = 32
"""How many numbers a digest adds to a collective, each a bit: a difference escapes with a probability of 2e-10."""


class Fact(IntEnum):
    """What the ranks compare."""

    STEPS = 0  # local steps of the round, and its period
    RATES = 1  # the learning rate of every parameter group
    PROGRESS = 2  # rounds done and progress
    PARAMETERS = 3  # trained parameters where they ought to be equal
    CONSTANTS = 4  # frozen parameters and integer buffers


_REMEDIES = {
    Fact.STEPS: "Every rank must call step equally often and see the same learning rate: drive the schedule by "
    "optimizer.progress or by the step, never by a rank's own loss.",
    Fact.RATES: "the learning rates differ between the ranks. Drive the schedule by what is equal on all ranks; give "
    "ReduceLROnPlateau the mean loss of all ranks (optimizer.loss), for example.",
    Fact.PROGRESS: "the ranks stand at different rounds. Load the same state on every rank, and let every rank take equally "
    "many steps.",
    Fact.PARAMETERS: "the parameters differ where they must be equal, so something changed them on some ranks only. Load a "
    "checkpoint on every rank, before the optimizer is built or after synchronize(). Run one batch through layers that take "
    "their first values from it before the optimizer is built.",
    Fact.CONSTANTS: "frozen parameters or integer buffers differ between the ranks. Change them in the same way on every rank, "
    "or give a buffer that is each rank's own the policy local: buffers={'its name': 'local'}. "
    "A teacher that follows each rank's replica belongs outside of the model that the optimizer is given.",
}

_ODD = 0x1E3779B97F4A7C15

ROUNDING = 1e-4
"""Replicas that are stepped on different hardware drift apart by less than this share of the largest parameter, and so do those
whose loop moves the parameters and moves them back, as sharpness-aware minimisation does."""

Parts = dict[str, torch.Tensor]
"""Contiguous vectors, by name."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Digest:
    """This rank's facts as numbers that are summed over the ranks, and the verdict on the sums.

    Args:
        communicator: the ranks.
        model: the replica.
        constants: its frozen parameters and integer buffers, by name.
        device: where the replica lies.
        lasting: whether parameters that differ by rounding errors stay so, which is then told once.
    """

    def __init__(
        self,
        communicator: Communicator,
        model: torch.nn.Module,
        constants: Mapping[str, torch.Tensor],
        device: torch.device,
        lasting: bool,
    ) -> None:
        self._communicator = communicator
        self._lasting = lasting
        self._constants = TensorSample({name: t for name, t in constants.items() if _can_be_read(t, device)}, model)
        self._checksum = TensorChecksum(device)
        self._mine: dict[Fact, Any] = {}
        self._rounded = False

    def write(
        self, digest: torch.Tensor, values: Mapping[Fact, Any], parameters: Parts, *, everything: bool = False
    ) -> None:
        """Fills in this rank's bits, without waiting for the device.

        Args:
            digest: float32, `DIGEST_SIZE` elements.
            values: the facts that are Python values; equal values have an equal `repr`.
            parameters: parts of the trained parameters.
            everything: whether to look at all constants, not only at the few whose turn it is.
        """
        constants = self._constants.parts(everything)
        parameters = {} if self._rounded else parameters
        self._mine = {**values, Fact.PARAMETERS: parameters, Fact.CONSTANTS: constants}
        start = zlib.crc32(repr(list(values.values())).encode())
        digest.copy_(self._checksum.bits(start, parameters.values(), constants.values()))

    def check_all(self, present: float, totals: Sequence[float]) -> None:
        """Reads the part of a collective that shows whether all ranks take part and agree.

        Args:
            present: the sum of a 1 of every rank that takes part.
            totals: as for `check`.

        Raises:
            CommunicationError: a rank took no part, and this is not a job that goes on without it.
            DisagreementError: as for `check`.
        """
        size = self._communicator.size
        if size == 1:
            return
        if round(present) != size and not self._communicator.survives:
            raise CommunicationError(
                f"{size - round(present)} of {size} ranks took no part in an averaging and counted as zeros, most likely by "
                "hvd.join(): delete that call, and give every rank equally many steps."
            )
        self.check(totals, round(present))

    def check(self, totals: Sequence[float], ranks: int) -> None:
        """Compares; a collective of its own only when there is a difference.

        Args:
            totals: the sums over the ranks, `DIGEST_SIZE` numbers.
            ranks: the number of ranks in these sums.

        Raises:
            DisagreementError: on every rank, with the same message: which ranks differ, and in what.
        """
        if all(round(bit) in (0, ranks) for bit in totals):
            return
        mine = {fact: {name: self._described(one) for name, one in facts.items()} for fact, facts in self._mine.items()}
        everyone = self._communicator.gather(mine, "hvdlocal.differences")
        told = {fact: _difference(fact, [one[fact] for one in everyone], self._communicator) for fact in mine}
        if [fact for fact in told if told[fact]] == [Fact.PARAMETERS] and self._only_rounded(everyone):
            return
        if told.get(Fact.STEPS) and len({one[Fact.PROGRESS]["rounds"] for one in everyone}) == 1:
            told[Fact.PROGRESS] = ""  # it differs by the steps, which are told already
        differences = " ".join(filter(None, told.values()))
        raise DisagreementError(
            differences or "Ranks that are lost now differed from the others in what must be equal on all ranks."
        )

    def _described(self, one: Any) -> Any:
        """What the ranks exchange: a number as it is, a vector of floats as a tuple, one of integers as its checksum."""
        if not isinstance(one, torch.Tensor):
            return one
        return tuple(one.tolist() if one.is_floating_point() else self._checksum.bits(0, [one]).tolist())

    def _only_rounded(self, everyone: Sequence[Mapping[Fact, Any]]) -> bool:
        """Whether the parameters differ by rounding errors alone. They are then not compared any more."""
        rows = [[x for part in one[Fact.PARAMETERS].values() for x in part] for one in everyone]
        together = torch.tensor(rows, dtype=torch.float64, device="cpu")
        spread = (together.amax(0) - together.amin(0)).max()
        if not spread <= ROUNDING * together.abs().max():
            return False
        self._rounded = True
        if self._lasting and self._communicator.rank == 0:
            warnings.warn(
                f"the replicas differ by up to {float(spread):.1g}, as rounding errors make them on nodes of different hardware. "
                "They are not compared any more. LocalOptimizer makes replicas equal at every averaging.",
                stacklevel=2,
            )
        return True


class TensorSample:
    """A few elements of every tensor, a few tensors at a time: what many tensors hold, at a bounded price.

    Args:
        named: the tensors, by name.
        model: that has them under these names, where other tensors may take their place; None where they stay.
    """

    ELEMENTS = 64
    TENSORS = 4

    def __init__(self, named: Mapping[str, torch.Tensor], model: torch.nn.Module | None = None) -> None:
        self._named = [(name, tensor, _is_dense(tensor)) for name, tensor in named.items() if tensor.numel()]
        self._model = model
        self._calls = 0

    def parts(self, everything: bool = False) -> Parts:
        """A sample, by the names of the tensors. Each call looks at the next few tensors.

        Args:
            everything: whether to look at all of them, which does not count as a call.
        """
        chosen, count = self._named, len(self._named)
        if not everything and count > self.TENSORS:
            first = self._calls * self.TENSORS % count
            chosen = (chosen + chosen)[first : first + self.TENSORS]
        # Another stretch of each tensor whenever all have had their turn.
        stretch = self._calls * self.TENSORS // max(count, self.TENSORS)
        self._calls += not everything
        parts = {}
        for name, tensor, dense in chosen:
            present = tensor if self._model is None else _present(self._model, name)
            if present is not tensor:
                if present is None or not _can_be_read(present, tensor.device):
                    continue
                dense = _is_dense(present)
            parts[name] = self._stretch(present.detach(), dense, stretch)
        return parts

    def _stretch(self, tensor: torch.Tensor, dense: bool, which: int) -> torch.Tensor:
        # A dense tensor is looked at in its order in memory: reshape would copy a whole one that is channels_last.
        flat = tensor.as_strided((tensor.numel(),), (1,)) if dense else tensor.reshape(-1)
        start = which * self.ELEMENTS % flat.numel()
        return flat[start : start + self.ELEMENTS]


class TensorChecksum:
    """Checksums of the bits of tensors, computed on their device and in memory of its own.

    Args:
        device: where the tensors lie.
    """

    SIZE = 16384

    def __init__(self, device: torch.device) -> None:
        # The high bits of a sum of products with random odd factors make a good checksum; its low bits do not.
        generator = torch.Generator(device="cpu").manual_seed(0x5EED)
        factors = torch.randint(-(2**62), 2**62, (self.SIZE,), generator=generator, dtype=torch.int64, device="cpu")
        self._factors = (factors * 2 + 1).to(device)
        self._work = torch.empty_like(self._factors)
        self._shifts = torch.arange(64 - DIGEST_SIZE, 64, dtype=torch.int64, device=device)

    def bits(self, start: int, *groups: Iterable[torch.Tensor]) -> torch.Tensor:
        """The checksum as `DIGEST_SIZE` integers, each 0 or 1.

        Args:
            start: a number that also counts.
            groups: contiguous vectors, of at most `SIZE` words each.
        """
        total = torch.full((), start * _ODD % 2**63, dtype=torch.int64, device=self._shifts.device)
        for group in groups:
            filled = 0
            for vector in group:
                part = vector.view(_INTEGERS[min(vector.element_size(), 8)])
                if filled + part.numel() > self.SIZE:
                    self._add(total, filled)
                    filled = 0
                self._work[filled : filled + part.numel()].copy_(part)
                filled += part.numel()
            self._add(total, filled)
        return (total >> self._shifts) & 1

    def _add(self, total: torch.Tensor, filled: int) -> None:
        words = self._work[:filled].mul_(self._factors[:filled])
        total.mul_(_ODD).add_(words.sum())  # modulo 2⁶⁴


def rounded(number: float) -> float:
    """A number without the digits in which ranks on different hardware may differ; statistics carry them into gains and rates."""
    return float(f"{number:.6g}")


def _present(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The tensor that has this name in the model now, if there is one."""
    try:
        found = attrgetter(name)(model)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in memory without gaps, in any order."""
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()


def _can_be_read(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether it is a plain tensor on that device, whose bytes can be looked at."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device == device and not tensor.is_quantized and tensor.numel() > 0


def _difference(fact: Fact, values: Sequence[Mapping[str, Any]], communicator: Communicator) -> str:
    """A sentence that says which ranks differ from most, in what, and what to do; empty where all are equal."""
    told = [repr(value) for value in values]
    usual = max(told, key=told.count)  # of several that are equally frequent, the first rank's
    odd = [rank for rank, one in enumerate(told) if one != usual]
    if not odd:
        return ""
    if fact is Fact.STEPS:
        steps, periods = [one["steps"] for one in values[:8]], [one["period"] for one in values[:8]]
        what = f"the ranks took different numbers of local steps in this round, {steps}, with the periods {periods}"
        return f"{what}. {_REMEDIES[fact]}"
    ranks = ", ".join(str(communicator.job_ranks[rank]) for rank in odd[:8]) + (" …" if len(odd) > 8 else "")
    there, elsewhere = values[odd[0]], values[told.index(usual)]
    names = [name for name in {**elsewhere, **there} if there.get(name) != elsewhere.get(name)]
    shown = ", ".join(
        repr(name) if isinstance(there.get(name), tuple) else f"{name} {there.get(name)}, not {elsewhere.get(name)}"
        for name in names[:4]
    )
    plural = "s" if len(odd) > 1 else ""
    return (
        f"Rank{plural} {ranks} of {communicator.job_size} ({shown}{' …' if len(names) > 4 else ''}): {_REMEDIES[fact]}"
    )
