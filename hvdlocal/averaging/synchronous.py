"""Data parallelism with accumulation: the baseline, and the home of AdaScale."""

from __future__ import annotations

import math
import time
from numbers import Integral
from typing import Any

import torch

from hvdlocal.averaging.buckets import BUCKET_BYTES
from hvdlocal.averaging.buffers import Buffers
from hvdlocal.averaging.digest import DIGEST_SIZE, Fact, TensorSample, rounded
from hvdlocal.averaging.gain import LocalAdaScale, NoScaling, Scaling
from hvdlocal.averaging.gradients import squared_norm
from hvdlocal.averaging.guards import refuse_renormalised_weights, refuse_sparse_gradients
from hvdlocal.averaging.mean_gradient import MeanGradient
from hvdlocal.averaging.nonfinite import CheckedScale
from hvdlocal.averaging.replica import ReplicaOptimizer
from hvdlocal.averaging.setup import OnLoss
from hvdlocal.communicator import Communicator

SQR_NORM, LOSS_SUM, LOSS_COUNT, OVERFLOW, STOP, EMPTY, PRESENT = range(7)
DIGEST = slice(7, 7 + DIGEST_SIZE)
NUM_SCALARS = DIGEST.stop

GRADIENTS = "hvdlocal.gradients"
"""The name of a step's collective."""


class SynchronousOptimizer(ReplicaOptimizer):
    """Makes any torch optimizer a data-parallel one: a step on the mean gradient of K workers × `accumulate` micro-batches.

    ACC-LIN and ACC-ADA of Balles et al. (Alg. 2), and with `accumulate=1` and no scaling plain data parallelism. Loop,
    learning-rate schedulers and GradScaler as with `LocalOptimizer`; every rank must call `step` the same number of times. A
    parameter without a gradient on a rank counts as one with gradient zero, unless it was frozen (`requires_grad_(False)`, on all
    ranks): then it is left alone. A micro-batch without any gradient gives no estimate of the statistics.

    Gradients are summed in buckets while the backward pass of a step's last micro-batch goes on, as far as the model is larger
    than 1 MiB. The last bucket, which begins in `step`, carries the scalars that the ranks must agree on and, for AdaScale, each
    worker's Σ‖g_i‖². The first step waits for the end of the backward pass, and so does every step with a GradScaler, since an
    overflow may have changed the scale of some ranks only.

    A gradient that is changed between the backward pass and `step`, as by clipping or by a second backward pass, counts as it is
    in `step`: a rank where it has changed makes all ranks repeat the step's sums, and after three such steps none overlaps any
    more, with a warning. Changes that torch does not count (through `.grad.data`, NumPy's memory or an extension that writes past
    autograd) are found when they are made in the first step already, and otherwise not. Between the backward pass and `step` no
    other collective may be called, unless all ranks compute gradients of the same parameters.

    On two ranks the sums have the same bits whatever the buckets are. On more, an allreduce adds the ranks' numbers in an order
    that may depend on the length of the message, so `bucket_bytes` then changes rounding errors. So does Horovod where it fuses
    buckets that are ready within one cycle, which depends on time: HOROVOD_FUSION_THRESHOLD=0 makes such runs repeatable.

    Memory beside model and optimizer, in multiples of the parameters: 2 during the backward pass and the sum (the gradients
    and the flat buffer), 3 with accumulation; with bucket_bytes=None 2 during the backward pass and 1 during the sum.

    Args:
        optimizer: steps the replica; its learning rates are the base rates γ.
        model: the replica, on its device already.
        accumulate: a, micro-batches (calls of `step`) per optimizer step.
        scaling: `AdaScale()`, `LinearScaling()` or `NoScaling()`.
        buffers: as in `LocalOptimizer`, but every buffer is each rank's own while training, and averaged by `synchronize`.
        budget: as in `LocalOptimizer`.
        max_norm: the mean gradient is clipped to this norm.
        bucket_bytes: the most bytes of gradients that are summed at once, as far as no parameter is larger; None for one
            collective after the backward pass.
        on_loss: as in `LocalOptimizer`.
        communicator: as in `LocalOptimizer`.

    Raises:
        ValueError: an argument cannot be used, with the reason; on all ranks.
        DisagreementError: the ranks were given different settings; on all ranks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        accumulate: int = 1,
        scaling: Scaling | None = None,
        buffers: Buffers = "average",
        budget: float | None = None,
        max_norm: float | None = None,
        bucket_bytes: int | None = BUCKET_BYTES,
        on_loss: OnLoss | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        scaling = scaling or NoScaling()
        if isinstance(scaling, LocalAdaScale):
            raise ValueError("LocalAdaScale is for local steps: use AdaScale() with a SynchronousOptimizer")
        if bucket_bytes is not None and not (isinstance(bucket_bytes, Integral) and bucket_bytes > 0):
            raise ValueError(
                f"bucket_bytes={bucket_bytes!r}: give a positive number of bytes, or None for one collective a step"
            )
        super().__init__(
            optimizer,
            model,
            scaling=scaling,
            accumulate=accumulate,
            buffers=buffers,
            budget=budget,
            max_norm=max_norm,
            on_loss=on_loss,
            communicator=communicator,
        )
        refuse_renormalised_weights(model, self._parameters)
        self._sample = TensorSample(dict(zip(self._names, self._parameters, strict=True)))
        self._accumulated: MeanGradient = MeanGradient(
            self.communicator,
            self._parameters,
            accumulate=accumulate,
            scalars=NUM_SCALARS,
            bucket_bytes=bucket_bytes,
            name=GRADIENTS,
        )
        self._scalars = self._accumulated.scalars
        self._sqr_norm = torch.zeros_like(self._loss_sum)
        self._scale = CheckedScale(self._scalars.device)
        self._steps = 0

        # The gradients' place carries the parameters once.
        views, flat = self._accumulated.views, self._accumulated.flat
        with torch.no_grad():
            parameters: list[torch.Tensor] = list(self._parameters)
            torch._foreach_copy_(views, parameters)
            self._start_together({"bucket_bytes": bucket_bytes}, flat, {id(p) for p in self._parameters})
            torch._foreach_copy_(parameters, views)

    @property
    def period(self) -> int:
        """1: the replicas are equal after every step."""
        return 1

    @property
    def round(self) -> int:
        """Steps taken; each is a round."""
        return self._steps

    @property
    def steps_in_round(self) -> int:
        """0: there are no local steps."""
        return 0

    @property
    def in_sync(self) -> bool:
        """True: all ranks always hold the same bits of the parameters. `synchronize` averages batch-norm statistics."""
        return True

    @property
    def divergence(self) -> float:
        """0: replicas do not diverge."""
        return 0.0

    @torch.no_grad()
    def synchronize(self) -> None:
        """Averages the batch-norm statistics (buffers="average"), for evaluation. Drops micro-batches that are no whole step.

        A collective: call it on all ranks at the same step. The ranks also compare what must be equal.

        Raises:
            DisagreementError: the ranks stand at different steps, or their models differ; on all ranks.
        """
        self._note_dropped_step()
        self._drop()
        self._accumulated.settle()
        if self.communicator.size > 1:
            digest = self._scalars[DIGEST]
            self._write_digest(digest, everything=True)
            # Under the gradients' name: a rank that is at a step meets this one there, and both get an error.
            self.communicator.sum_(digest, GRADIENTS)
            self._digest.check(digest.tolist(), self.communicator.size)
        self._average_buffers(self._buffers_to_average())
        self._tell_losses()

    def _write_digest(self, digest: torch.Tensor, *, everything: bool = False) -> None:
        values = {
            Fact.RATES: self._named_rates(),
            Fact.PROGRESS: {"steps": self._steps, "progress": rounded(self.progress)},
        }
        self._digest.write(digest, values, self._sample.parts(everything), everything=everything)

    def _needs_dense_gradients(self) -> str:
        return "a SynchronousOptimizer"

    def _take_gradient(self) -> None:
        refuse_sparse_gradients(self._parameters, self._needs_dense_gradients())
        self._unscale()
        if self.scaling.uses_statistics and (own := self._gradients()):
            self._sqr_norm += squared_norm(own)
        if not self._accumulated.collect(unscaled=getattr(self, "found_inf", None) is not None):
            return
        self._check_parameters()
        flat = self._accumulated.flat
        mine = torch.stack([self._sqr_norm, self._loss_sum])
        self._reduce()
        gradients = self.communicator.size * self.accumulate  # of the ranks in the sum
        # Everything that is wanted of a GPU is asked for first, and then read at once: a step waits for it once.
        wanted = [self._scalars, mine, self._scale([flat], 1 / gradients)]
        if self.scaling.uses_statistics and gradients > 1:
            wanted.append(torch.dot(flat, flat).view(1))
        numbers = torch.cat(wanted).tolist()
        totals, (my_sqr_norm, my_loss_sum, found, *sqr_norm) = (
            numbers[:NUM_SCALARS],
            numbers[NUM_SCALARS:],
        )
        self._digest.check_all(totals[PRESENT], totals[DIGEST])
        bad = not self._overflowed and not math.isfinite(my_sqr_norm + my_loss_sum)
        if totals[OVERFLOW] < 0.5 and not (found == 0 and math.isfinite(totals[SQR_NORM] + totals[LOSS_SUM])):
            self._drop()
            self._raise_nonfinite(bad, "the step was not taken; the model is that of the step before.")
        if totals[LOSS_COUNT]:
            self._loss = totals[LOSS_SUM] / totals[LOSS_COUNT]
        self._stop_requested = totals[STOP] > 0.5
        if totals[OVERFLOW] > 0.5:  # on any rank: GradScaler's rule is to skip the step, and all ranks skip it
            self._drop()
            return
        if totals[EMPTY] > 0.5:  # no gradient is not a gradient of zero: there is no estimate
            sqr_norm = []
        self._step_on_mean(gradients, totals[SQR_NORM], *sqr_norm)

    def _reduce(self) -> None:
        scalars = self._scalars
        scalars[SQR_NORM].copy_(self._sqr_norm)
        scalars[LOSS_SUM].copy_(self._loss_sum)
        scalars[LOSS_COUNT].fill_(self._loss_count)
        scalars[OVERFLOW].fill_(self._overflowed)
        scalars[STOP].fill_(self._stop)
        scalars[EMPTY].fill_(self._accumulated.empty)
        scalars[PRESENT].fill_(1)
        self._sqr_norm.zero_()
        self._loss_sum.zero_()
        self._loss_count = 0
        if self.communicator.size > 1:
            self._write_digest(scalars[DIGEST])
        start = time.perf_counter()
        self._accumulated.sum()
        self.seconds_averaging += time.perf_counter() - start

    def _step_on_mean(self, count: int, sum_sqr_norm: float, sqr_norm_of_mean: float | None = None) -> None:
        """Takes the step on what now holds the mean of all workers' micro-batch gradients, of which there are `count`."""
        if sqr_norm_of_mean is not None:
            self._update_statistics(
                sum_sqr_norm,
                sqr_norm_of_mean * count**2,
                gradients=count,
                micro_batches=1,
                theta_batches=count,
            )
        self._accumulated.give_back()
        self._inner_step(self._progress.context(1))
        self._steps += 1
        self._dropped_steps = 0

    def _drop(self) -> None:
        self._accumulated.drop()
        self._sqr_norm.zero_()
        self._overflowed = False

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "steps": self._steps, "sqr_norm": self._sqr_norm.clone()}

    def _after_averaging(self, own: dict[str, Any]) -> dict[str, Any]:
        return {"sqr_norm": torch.zeros((), dtype=torch.float32, device="cpu")}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        super()._load_own_state(own)
        self._steps = own["steps"]
        self._sqr_norm.copy_(own["sqr_norm"])
