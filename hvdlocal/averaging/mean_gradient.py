"""The sum of the ranks' gradients of one optimizer step, taken in buckets while the backward pass goes on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from hvdlocal.averaging.buckets import BucketLayout, Flag
from hvdlocal.averaging.gradients import GradientBuffer
from hvdlocal.communicator import Communicator

MOST_REPEATS = 3
"""Steps whose sums had to be repeated, after which the backward pass is waited for."""

_Taken = tuple[torch.Tensor | None, int]
"""A gradient that was copied, and its version then; autograd counts a tensor's changes in place."""


class MeanGradient:
    """Collects the gradients of `accumulate` micro-batches and sums them over the ranks.

    The gradients are copied into buckets, slices of one flat buffer, as the last micro-batch's backward pass computes them, and
    the sum of a bucket begins when it is complete and all buckets before it have begun: in the same order on all ranks. What has
    not begun then begins in `sum`, the last bucket always, since the scalars that travel with it are complete only then. The
    parameters' own `.grad` is left alone until the sum is there.

    A gradient that changes after it was copied (several backward passes before a step, clipping by hand, a step that never came
    after a backward pass) is found in `sum`, as another tensor or another version of it. Then all ranks repeat all sums with what
    the gradients are now, and after three such steps they wait for the end of the backward pass from then on, with a warning.
    So they do at once with a GradScaler, whose factor may differ between the ranks. A change that autograd does not count, such
    as one through `.grad.data` or NumPy's memory, is found if it is made in the first step, in which no sum begins early and
    every copy is compared with its gradient; one that begins later is not found.

    With one bucket all of this is left out.

    Where ranks are lost between the sums of a step, the ranks that are left repeat all of them, so that all sums of a step are
    those of the same ranks.

    Attributes:
        scalars: numbers that are summed with the gradients; to be written before `sum`.
        flat: the gradients, or after `sum` their sum over micro-batches and ranks; float32.
        views: the parameters' places in `flat`.
        overlaps: whether sums begin during the backward pass; the same on all ranks.
        empty: of the step's micro-batches, those that brought no gradient at all.

    Args:
        communicator: the ranks.
        parameters: whose `.grad` is summed, in the model's order.
        accumulate: micro-batches of a step.
        scalars: how many numbers travel with the gradients.
        bucket_bytes: see `BucketLayout`.
        name: of the last bucket's collective, and the beginning of the others'.
    """

    def __init__(
        self,
        communicator: Communicator,
        parameters: Sequence[torch.nn.Parameter],
        *,
        accumulate: int,
        scalars: int,
        bucket_bytes: int | None,
        name: str,
    ) -> None:
        layout = BucketLayout(parameters, scalars, bucket_bytes if communicator.size > 1 else None)
        flat = torch.zeros(layout.numel, dtype=torch.float32, device=parameters[0].device)
        self.flat = flat[layout.gradients]
        self.scalars = flat[layout.scalars]
        self.views = layout.views.of(self.flat)
        self.empty = 0
        self._flags = flat[layout.flags]
        self._communicator = communicator
        self._parameters = parameters
        self._accumulate = accumulate
        self._collected: GradientBuffer | None = None
        several = len(layout.buckets) > 1
        if accumulate > 1 or not several:
            self._collected = GradientBuffer(
                parameters, layout.views, torch.zeros_like(self.flat) if several else self.flat
            )

        number = _numbers[communicator] = _numbers.get(communicator, -1) + 1
        *early, last = layout.buckets
        self._buckets = [
            _Bucket(one.parameters, flat[one.message], f"{name}.{number}.{i}") for i, one in enumerate(early)
        ]
        self._buckets.append(_Bucket(last.parameters, flat[last.message], name))
        self._bucket_of = {i: bucket for bucket in self._buckets for i in bucket.parameters}
        self._pending: list[Callable[[], None]] = []
        self._taken: dict[int, _Taken] = {}
        self._arrived: set[int] = set()
        self._late: set[int] = set()
        self._ever_late: set[int] = set()
        self._still: set[int] = set()
        self._losses = len(communicator.losses)
        self._await(range(len(parameters)))
        self._unscaled = False
        self._repeats = 0
        self.overlaps = False
        self._watches = several
        if several:
            self._hooks = [
                p.register_post_accumulate_grad_hook(_hook(weakref.ref(self), i)) for i, p in enumerate(parameters)
            ]
            weakref.finalize(self, _remove, self._hooks)

    @property
    def micro_batches(self) -> int:
        """Micro-batches collected towards the next step."""
        return self._collected.micro_batches if self._collected else 0

    def collect(self, unscaled: bool = False) -> bool:
        """Takes in the present gradients as those of one micro-batch, and takes them away unless it is the last of the step.

        Args:
            unscaled: whether they were divided by a GradScaler's factor since they were computed.

        Returns:
            Whether it was the last: then `sum` is to follow.
        """
        if self._collected and (self._single or not self._at_last_micro_batch):
            self._collected.collect()
            self.empty = self._collected.empty
            return self._collected.micro_batches == self._accumulate
        self.empty += all(p.grad is None for p in self._parameters)
        self._unscaled = unscaled
        return True

    def own_sums(self) -> list[torch.Tensor | None]:
        """This rank's sum of the step's gradients for every parameter, before `sum`; None where there is none."""
        return [self._own_sum(i) for i in range(len(self._parameters))]

    def _own_sum(self, i: int) -> torch.Tensor | None:
        latest = self._parameters[i].grad
        before = self._collected.sum_of(i) if self._collected else None
        return latest if before is None else before if latest is None else latest + before

    @torch.no_grad()
    def sum(self) -> None:
        """Replaces the gradients and the scalars by their sums over the ranks; a collective of as many messages as buckets.

        Afterwards the parameters have no gradients; see `give_back`.
        """
        self._still = {i for i, p in enumerate(self._parameters) if not p.requires_grad and self._own_sum(i) is None}
        if self._single:
            assert self._collected is not None
            self._collected.fill_unseen()
            self._communicator.sum_(self._buckets[0].message, self._buckets[0].name)
            return
        flags = self._checked()
        scalars = self.scalars.clone()
        self._flags.copy_(torch.tensor(flags, dtype=torch.float32, device="cpu"))
        self._sum_the_rest()
        repeat = self._watches and self._judge([round(ranks) for ranks in self._flags.tolist()])
        while repeat or self._has_lost_ranks():
            self._losses = len(self._communicator.losses)
            self.scalars.copy_(scalars)
            self._take(range(len(self._parameters)))
            self._sum_the_rest()
            repeat = False
        for parameter in self._parameters:
            parameter.grad = None
        self._restart()

    def give_back(self) -> None:
        """Makes the sum, or what it has become, the parameters' gradients; one that was frozen since has none, and stays."""
        for i, (parameter, view) in enumerate(zip(self._parameters, self.views, strict=True)):
            parameter.grad = None if i in self._still else view
        self.drop()

    def drop(self) -> None:
        """Forgets the micro-batches that were collected. Sums that have begun go on, see `settle`."""
        self.empty = 0
        if self._collected:
            self._collected.drop()

    @torch.no_grad()
    def settle(self) -> None:
        """Ends the sums that a backward pass without a step has begun on any rank, and forgets them; a collective."""
        if self.overlaps:
            while len(self._pending) < len(self._buckets) - 1:
                self._begin_next()
            self._wait()
        self._restart()

    def state(self) -> dict[str, object]:
        """What was collected so far; empty between two steps."""
        return self._collected.state() if self._collected else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
        for parameter in self._parameters:
            parameter.grad = None  # it may be a view of the flat buffer
        self.empty = state.get("empty", 0)
        if self._collected:
            self._collected.load_state(state)

    # -- during the backward pass --------------------------------------------------------------------------------------

    @property
    def _single(self) -> bool:
        return len(self._buckets) == 1

    @property
    def _at_last_micro_batch(self) -> bool:
        return self._collected is None or self._collected.micro_batches == self._accumulate - 1

    @torch.no_grad()
    def _arrive(self, i: int) -> None:
        """Takes in a gradient that the backward pass has just computed."""
        grad = self._parameters[i].grad
        if not (self._watches and self._at_last_micro_batch) or grad is None or grad.layout is not torch.strided:
            return
        first = i not in self._arrived
        self._arrived.add(i)
        bucket = self._bucket_of[i]
        if bucket.begun:
            if first:
                self._late.add(i)
            return
        self._take([i])
        bucket.awaited.discard(i)
        while self.overlaps and len(self._pending) < len(self._buckets) - 1 and not self._next.awaited:
            self._begin_next()

    @property
    def _next(self) -> _Bucket:
        return self._buckets[len(self._pending)]

    def _begin_next(self) -> None:
        bucket = self._next
        self._take([i for i in bucket.parameters if i not in self._taken])
        self._pending.append(self._communicator.start_sum_(bucket.message, bucket.name))
        bucket.begun = True

    def _take(self, indices: Iterable[int]) -> None:
        """Copies the present gradients, with the sums of the micro-batches before, to their places."""
        copies, sums = [], []
        for i in indices:
            parameter, place = self._parameters[i], self.views[i]
            grad = parameter.grad
            if grad is not None and self._keeps_gradients and _share_memory(grad, self.flat):
                # zero_grad(set_to_none=False) keeps it there, where backward would add to it during the sum.
                grad = parameter.grad = grad.clone()
            self._taken[i] = (grad, _version(grad))
            parts = [] if grad is None or grad.layout is not torch.strided else [grad]  # `step` refuses a sparse one
            if self._collected and (before := self._collected.sum_of(i)) is not None:
                parts.insert(0, before)
            if parts:
                copies.append((place, parts[0]))
                sums += [(place, part) for part in parts[1:]]
            else:
                place.zero_()
        if copies:
            torch._foreach_copy_([place for place, _ in copies], [part for _, part in copies])
        if sums:
            torch._foreach_add_([place for place, _ in sums], [part for _, part in sums])

    # -- at the step ---------------------------------------------------------------------------------------------------

    def _checked(self) -> list[bool]:
        """Completes the buckets that have not begun, and returns this rank's flags for those that have."""
        flags = [False] * len(Flag)
        flags[Flag.UNSCALED] = self._unscaled
        first_step = self._watches and not self.overlaps
        again = []
        for i, parameter in enumerate(self._parameters):
            if i not in self._taken:
                again.append(i)
                continue
            grad, version = self._taken[i]
            stale = parameter.grad is not grad or _version(grad) != version
            if self._bucket_of[i].begun:
                flags[Flag.LATE if i in self._late else Flag.CHANGED] |= stale
            elif first_step:
                copy = self.views[i].clone()
                self._take([i])
                flags[Flag.CHANGED] |= stale or not _same_bits(copy, self.views[i])
            elif stale:
                again.append(i)
        self._take(again)
        return flags

    def _sum_the_rest(self) -> None:
        while len(self._pending) < len(self._buckets):
            self._begin_next()
        self._wait()

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for bucket in self._buckets:
            bucket.begun = False
        for finish in pending:
            finish()

    def _judge(self, ranks: list[int]) -> bool:
        """Decides whether the sums are those of the gradients, and whether the next ones may begin early.

        Args:
            ranks: how many ranks have raised each flag.

        Returns:
            Whether the sums must be repeated.
        """
        first_step, self.overlaps = not self.overlaps, True
        repeat = any(ranks) and not first_step
        self._repeats += repeat and ranks[Flag.CHANGED] > 0
        if ranks[Flag.UNSCALED]:
            self._stop_watching()
        elif self._repeats == MOST_REPEATS or (first_step and ranks[Flag.CHANGED]):
            self._stop_watching()
            if self._communicator.rank == 0:
                warnings.warn(
                    "gradients changed between their arrival in the backward pass and step(), on "
                    f"{ranks[Flag.CHANGED]} of {self._communicator.size} ranks (several backward passes before a step, or "
                    "gradients that were clipped or scaled in between): their sums no longer overlap with the backward pass. "
                    "Clip with max_norm=…, or choose bucket_bytes=None.",
                    stacklevel=2,
                )
        return repeat

    def _has_lost_ranks(self) -> bool:
        """Whether ranks were lost since the sums of the last step, so that those of this one may be of different ranks."""
        return len(self._communicator.losses) > self._losses

    @property
    def _keeps_gradients(self) -> bool:
        """Whether a gradient is needed until the end of a step, in case that sums are repeated."""
        return self._watches or self._communicator.survives

    def _stop_watching(self) -> None:
        self.overlaps = self._watches = False
        _remove(self._hooks)

    def _restart(self) -> None:
        """Makes ready for the next step, for which the gradients are awaited that have come in this one."""
        self._ever_late |= self._late
        if self._arrived:
            self._await(self._arrived | self._ever_late)
        else:
            self._await(self._awaited)
        self._taken.clear()
        self._arrived.clear()
        self._late.clear()

    def _await(self, indices: Iterable[int]) -> None:
        self._awaited = {i for i in indices if self._parameters[i].requires_grad}
        for bucket in self._buckets:
            bucket.awaited = self._awaited.intersection(bucket.parameters)


class _Bucket:
    """A slice of the flat buffer and the gradients that are to come before its sum begins."""

    def __init__(self, parameters: range, message: torch.Tensor, name: str) -> None:
        self.parameters = parameters
        self.message = message
        self.name = name
        self.awaited: set[int] = set()
        self.begun = False


_numbers: weakref.WeakKeyDictionary[Communicator, int] = weakref.WeakKeyDictionary()
"""How many there were over each communicator: the sums of two must not have the same name at the same time."""


def _hook(mean_gradient: weakref.ref[MeanGradient], i: int) -> Callable[[torch.Tensor], None]:
    """A hook on parameter i, which does not keep the object alive."""

    def arrive(_: torch.Tensor) -> None:
        if (alive := mean_gradient()) is not None:
            alive._arrive(i)

    return arrive


def _remove(hooks: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _version(grad: torch.Tensor | None) -> int:
    """How often a gradient was changed in place; torch does not count it for a tensor made in inference mode."""
    return 0 if grad is None or grad.is_inference() else grad._version


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
