"""Local SGD: every rank steps its own replica; parameters are averaged with one collective every H steps."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any, Literal

import torch

from hvdlocal.averaging.buffers import Buffers, check_averaged, refuse_shared_memory, split_aliases
from hvdlocal.averaging.digest import Fact, rounded
from hvdlocal.averaging.flat_buffer import CoordinateSample, FlatReplica, Scalar, StatisticsScalar
from hvdlocal.averaging.gain import AdaScale, LocalAdaScale, NoScaling, Scaling
from hvdlocal.averaging.gradients import GradientBuffer
from hvdlocal.averaging.guards import refuse_sparse_gradients, renormalised_weights
from hvdlocal.averaging.nonfinite import raise_nonfinite_buffers
from hvdlocal.averaging.period import PeriodRule
from hvdlocal.averaging.replica import ReplicaOptimizer
from hvdlocal.averaging.rounds import RoundPlanner
from hvdlocal.averaging.setup import owner_of
from hvdlocal.averaging.sketch import GradientSketch, default_size
from hvdlocal.communicator import Communicator

AVERAGE = "hvdlocal.average"
"""The name of the averaging's collective."""

_owners_of_buffers: weakref.WeakValueDictionary[int, LocalOptimizer] = weakref.WeakValueDictionary()

MOMENTUM_POLICIES = ("local", "average", "reset")


class LocalOptimizer(ReplicaOptimizer):
    """Makes any torch optimizer a Local SGD optimizer (Alg. 3): H local steps, then the average of all replicas.

    It is to Local SGD what `hvd.DistributedOptimizer` is to data parallelism:

        hvdlocal.init()
        optimizer = hvdlocal.LocalOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model,
            period=hvdlocal.ConstantPeriod(8), scaling=hvdlocal.LocalAdaScale())
        for x, y in loader:                      # a different part of the data on every rank
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()                     # a local step; at the end of a round also the average
        optimizer.synchronize()                  # evaluate and save only after this

    Every rank must call `step` the same number of times. All ranks start from rank 0's model. An averaging sends one float32
    buffer in one collective, statistics included; nothing is copied or allocated for it.

    What happens when: the period H is chosen before a round's first step and stays; the averaging follows the update of the
    round's last step. With a budget, the last round is shortened to end on the step that uses it up. With `LocalAdaScale`, the
    gain of a round comes from gradients of earlier rounds (`stale=True`) or of its own first step (`stale=False`).

    Parameters are views of one large buffer, and torch.save writes whole buffers: clone the tensors of a `state_dict` first.

    Args:
        optimizer: steps this rank's replica; its learning rates are the base rates γ. All of its parameters, float32.
        model: the replica, on its device already. Do not move it afterwards.
        period: the rule for H.
        scaling: the rule for the gain; `NoScaling()` or None for none.
        momentum: the optimizer's moments at an averaging: "local" keeps each rank's own (both papers' choice), "average" averages
            them (SGD, Adam and AdamW; a rank on which a parameter has none yet counts as zero), "reset" starts them anew.
        buffers: the running statistics of batch and instance norm: "average" with the parameters, "local", or "reestimate" by
            calling `reestimate_buffers` before an evaluation. Every other buffer is each rank's own after the start. For
            something else, a mapping of names of buffers or modules, with * for any part of them, to these three; the first
            that matches a buffer holds: {"codebook": "average", "encoder.norm*": "local"}. See `buffer_policies`.
        accumulate: a, micro-batches (calls of `step`) per local step.
        budget: S, scale-invariant iterations after which `finished` turns true; None for no end.
        max_norm: clips the gradient of every local step to this norm, after the statistics were taken.
        rate_for_period: which learning rate the period rule sees: "scaled" (gain·γ, what is applied) or "base" (γ).
        communicator: by default that of `hvdlocal.init()`.

    Raises:
        ValueError: an argument cannot be used, with the reason; on all ranks.
        DisagreementError: the ranks were given different settings; on all ranks.
    """

    _averages_parameters = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        period: PeriodRule,
        scaling: Scaling | None = None,
        momentum: Literal["local", "average", "reset"] = "local",
        buffers: Buffers = "average",
        accumulate: int = 1,
        budget: float | None = None,
        max_norm: float | None = None,
        rate_for_period: Literal["scaled", "base"] = "scaled",
        communicator: Communicator | None = None,
    ) -> None:
        scaling = scaling or NoScaling()
        if not isinstance(period, PeriodRule):
            raise ValueError(
                f"period={period!r}: give a rule such as hvdlocal.ConstantPeriod(8) or hvdlocal.QSR(alpha=…, h_base=…)"
            )
        if isinstance(scaling, AdaScale):
            raise ValueError(
                "AdaScale knows no local steps: use LocalAdaScale(), or LocalAdaScale(c=0) for AdaScale's gain"
            )
        if momentum not in MOMENTUM_POLICIES:
            raise ValueError(f"momentum={momentum!r}: choose one of {', '.join(MOMENTUM_POLICIES)}")
        if rate_for_period not in ("scaled", "base"):
            raise ValueError(f"rate_for_period={rate_for_period!r}: choose 'scaled' or 'base'")
        super().__init__(
            optimizer,
            model,
            scaling=scaling,
            accumulate=accumulate,
            buffers=buffers,
            budget=budget,
            max_norm=max_norm,
            communicator=communicator,
        )
        if budget is None:
            scaling.gain(self._progress.context(1))  # refuses a rule that needs the budget now, not at the first step
        self._planner = RoundPlanner(period, self._progress, rate_for_period)
        self._momentum_policy = momentum
        self._moment_names = averaged_moments(optimizer) if momentum == "average" else ()

        averaged, aliases = split_aliases(self._buffers_to_average())
        check_averaged(averaged, self._parameters[0].device, torch.float32)
        moved = {**dict(zip(self._names, self._parameters, strict=True)), **averaged}
        refuse_shared_memory(model, moved, [alias for alias, _ in aliases])
        numels = [p.numel() for p in self._parameters]
        device = self._parameters[0].device
        self._sketch: GradientSketch | None = None
        vector = 0
        if isinstance(scaling, LocalAdaScale) and self.communicator.size > 1:
            if scaling.statistics == "sketch":
                self._sketch = GradientSketch(numels, scaling.sketch_size or default_size(sum(numels)), device)
                vector = self._sketch.size
            else:
                vector = sum(numels)
        self._claim(averaged)
        self._flat_replica = FlatReplica(self._parameters, list(averaged.values()), len(self._moment_names), vector)
        for alias, name in aliases:
            alias.data = averaged[name].data
        self._averaged_names = list(averaged)
        self._buffer_owners = [owner_of(model, name) for name in averaged]
        self._accumulated = None
        if accumulate > 1:
            flat = torch.zeros(self._flat_replica.layout.numel, dtype=torch.float32, device=device)
            self._accumulated = GradientBuffer(self._parameters, self._flat_replica.layout, flat)

        self._round = 0
        self._steps_in_round = 0
        self._steps_since_statistics = 0
        self._divergence: float | None = None
        self._short_rounds = 0
        self._start_together(
            {"period": repr(period), "momentum": momentum, "rate_for_period": rate_for_period},
            self._flat_replica.replica,
            {id(tensor) for tensor in [*self._parameters, *averaged.values()]},
        )
        self._sample = CoordinateSample(self._flat_replica.parameters)
        # A forward pass has changed rows of such layers when a round begins, other ones on every rank.
        self._renormalised = bool(renormalised_weights(model, self._parameters))

    def _warn(self, message: str) -> None:
        """Warns once for all ranks."""
        if self.communicator.rank == 0:
            warnings.warn(message, stacklevel=2)

    def _claim(self, buffers: dict[str, torch.Tensor]) -> None:
        """Refuses buffers that another optimizer with other parameters averages: they can lie in one arena only."""
        mine = {id(p) for p in self._parameters}
        for name, buffer in buffers.items():
            owner = _owners_of_buffers.get(id(buffer))
            if owner is not None and owner.averages(buffer) and mine.isdisjoint(map(id, owner._parameters)):
                raise ValueError(
                    f"buffer {name!r} is averaged by another LocalOptimizer already: give each optimizer the part of the model "
                    "that it trains (LocalOptimizer(optimizer, model.part)), or one of the two buffers='local'"
                )
        self._averaged_buffers = list(buffers.values())
        for buffer in self._averaged_buffers:
            _owners_of_buffers[id(buffer)] = self

    def averages(self, buffer: torch.Tensor) -> bool:
        """Whether this buffer of the model is one that is averaged."""
        return any(one is buffer for one in self._averaged_buffers)

    # -- what a training loop reads ----------------------------------------------------------------------------------

    @property
    def period_rule(self) -> PeriodRule:
        """The rule for H."""
        return self._planner.rule

    @property
    def period(self) -> int:
        """H of the round under way, or of the last one between two rounds; 1 before the first."""
        return self._planner.period

    @property
    def round(self) -> int:
        """Rounds completed, which is also the number of averagings."""
        return self._round

    @property
    def steps_in_round(self) -> int:
        """Local steps taken since the last averaging."""
        return self._steps_in_round

    @property
    def in_sync(self) -> bool:
        """Whether this rank's model is the average: only then evaluate or save it."""
        return self._steps_in_round == 0

    @property
    def divergence(self) -> float | None:
        """(1/K) Σ_k ‖w_k − w̄‖² just before the last averaging (Eq. 22); None before the first.

        From a fixed sample of 16,384 coordinates when the model is larger.
        """
        return self._divergence

    # -- what a training loop calls ----------------------------------------------------------------------------------

    @torch.no_grad()
    def synchronize(self) -> None:
        """Ends the round now, if one is under way: afterwards the model is the average on every rank.

        A collective: call it on all ranks at the same step. Micro-batches that are not yet a whole step are dropped. Between two
        rounds the ranks only compare what must be equal, for the price of a very small collective.

        Raises:
            DisagreementError: the ranks stand at different rounds, or their models differ; on all ranks.
        """
        self._note_dropped_step()
        self._note_short_round()
        if self._accumulated:
            self._accumulated.drop()
            self._overflowed = False
        if not self.in_sync:
            self._average()
        elif self.communicator.size > 1:
            self._compare()

    def _note_short_round(self) -> None:
        """Warns of a loop that averages after every step although its rounds are longer."""
        if self._steps_in_round == 1 < self.period:
            self._short_rounds += 1
            if self._short_rounds == 3:
                self._warn(
                    f"synchronize() has ended three rounds in succession after one of {self.period} steps, so every step is "
                    "averaged. Call it only before an evaluation and before saving, not around step()."
                )

    def _compare(self) -> None:
        """Compares all that must be equal between two rounds."""
        self._sample.move_origin()
        self._write_digest(everything=True)
        # Under the averaging's name: a rank that is in the middle of a round meets this one there, and both get an error.
        self.communicator.sum_(self._flat_replica.digest, AVERAGE)
        self._digest.check(self._flat_replica.digest.tolist())

    # -- a step ------------------------------------------------------------------------------------------------------

    def _take_gradient(self) -> None:
        if self.accumulate > 1 or self._max_norm is not None:  # statistics look by themselves, once a round
            refuse_sparse_gradients(self._parameters, self._needs_dense_gradients() or "")
        self._unscale()
        empty = 0
        if self._accumulated:
            self._accumulated.collect()
            if self._accumulated.micro_batches < self.accumulate:
                return
            empty = self._accumulated.empty
            self._accumulated.flat.div_(self.accumulate)
            self._accumulated.give_back()
        if self._steps_in_round == 0:
            self._sample.move_origin()  # not after the averaging: the loop may have loaded other parameters since
            if self._flat_replica.statistics_scalars is not None:
                self._take_statistics(valid=not (empty or self._overflowed) and bool(self._gradients()))
            self._choose_period()
            if self.progress == 0 and self._smoothed.grad_sqr is not None:
                # stale=False: no step lies before the first estimate, so it weighs as much as the round that it opens.
                self._smoothed.weigh_first(self._theta(self.communicator.size * self.period * self.accumulate))
        self._inner_step(self._progress.context(self.period))
        self._steps_in_round += 1
        self._steps_since_statistics += 1
        self._dropped_steps = 0
        if self._steps_in_round >= self.period:
            if self.period > 1:
                self._short_rounds = 0
            self._average()

    def _choose_period(self) -> None:
        """Chooses H of the round that begins."""
        rates = self._rates()
        trained = [
            rate
            for group, rate in zip(self.param_groups, rates, strict=True)
            if any(p.requires_grad for p in group["params"])  # the rate of a frozen or empty group moves nothing
        ]
        longest = self._planner.longest
        period, lr, _, limited = self._planner.next_round(max(trained or rates), self._loss)
        # With a budget, the last round may well be cut short by it; the first one may not.
        if limited is not None and (period == limited or not self._round):
            self._warn(
                f"at the learning rate {lr:.3g}, {self.period_rule} asks for {limited} local steps or more, where the longest "
                f"round so far had {longest}: this one ends after {period}. If the learning rate is still warming up, tell the "
                "rule (warmup=…, warmup_lr=…); max_period=… sets a limit of your own."
            )

    # -- statistics --------------------------------------------------------------------------------------------------

    def _take_statistics(self, valid: bool) -> None:
        """Puts what this rank's first gradient of the round tells into the arena.

        Args:
            valid: whether every micro-batch brought a gradient without overflow. Else there is no estimate on any rank: no
                gradient is not a gradient of zero.
        """
        assert isinstance(self.scaling, LocalAdaScale)
        assert self._flat_replica.statistics_scalars is not None
        vector = self._flat_replica.statistics
        gradients = [_dense_gradient(p) for p in self._parameters]
        if self._sketch:
            self._sketch.project(gradients, vector)
        else:
            torch.cat([gradient.as_strided((gradient.numel(),), (1,)) for gradient in gradients], out=vector)
        sqr_norm = torch.dot(vector, vector)
        scalars = self._flat_replica.statistics_scalars
        scalars[StatisticsScalar.SQR_NORM].copy_(sqr_norm)
        if valid:
            scalars[StatisticsScalar.VALID].copy_(sqr_norm.isfinite())  # not read: a local step does not wait for a GPU
        else:
            scalars[StatisticsScalar.VALID].zero_()
        if not self.scaling.stale:
            self._timed_sum(self._flat_replica.with_statistics_scalars, "hvdlocal.statistics")
            self._use_statistics(*self._summed_statistics().tolist())

    def _summed_statistics(self) -> torch.Tensor:
        """Σ ‖g‖², how many ranks' gradients are finite, and ‖Σ g‖², all of the summed statistics: float32 (3,)."""
        assert self._flat_replica.statistics_scalars is not None
        vector = self._flat_replica.statistics
        return torch.cat([self._flat_replica.statistics_scalars, torch.dot(vector, vector).view(1)])

    def _use_statistics(self, sum_sqr_norm: float, valid: float, sqr_norm_of_sum: float) -> None:
        """Makes an estimate of the summed statistics. An overflow, on any rank or of the sum, makes it void on all alike, and so
        does a rank without a gradient.
        """
        workers = self.communicator.size
        if valid > workers - 0.5 and math.isfinite(sum_sqr_norm + sqr_norm_of_sum):
            self._update_statistics(
                sum_sqr_norm,
                sqr_norm_of_sum,
                gradients=workers,
                micro_batches=self.accumulate,
                theta_batches=workers * self._steps_since_statistics * self.accumulate,
            )
            self._steps_since_statistics = 0

    # -- the averaging -----------------------------------------------------------------------------------------------

    def _average(self) -> None:
        self._check_parameters()
        self._check_views()
        self._adopt_moments()
        mine, finite = self._write_scalars()
        with_statistics = self._flat_replica.statistics_scalars is not None and self._stale
        if self.communicator.size > 1:
            self._timed_sum(
                self._flat_replica.flat if with_statistics else self._flat_replica.without_statistics, AVERAGE
            )
        workers = self.communicator.size
        on_device = self._flat_replica.scalars
        healthy_ranks = (workers - on_device[Scalar.NONFINITE]).clamp_(min=1)
        nonfinite = self._scale(self._flat_replica.weights, healthy_ranks.reciprocal_())
        buffers = self._flat_replica.buffers.div_((workers - on_device[Scalar.NONFINITE_BUFFERS]).clamp_(min=1))
        # Everything that is wanted of a GPU is asked for first, and then read at once: an averaging waits for it once.
        moved = self._sample.distance().view(1)
        wanted = [on_device, nonfinite, mine.view(1), moved, buffers.isfinite().all().view(1)]
        if with_statistics:
            wanted.append(self._summed_statistics())
        numbers = torch.cat(wanted).tolist()
        scalars, (found, bad, moved, finite_sum, *statistics) = (
            numbers[: on_device.numel()],
            numbers[on_device.numel() :],
        )
        self._digest.check_all(scalars[Scalar.PRESENT], scalars[len(Scalar) :])
        healthy = workers - round(scalars[Scalar.NONFINITE])
        lost = not healthy or found > 0
        self._measure_divergence(scalars[Scalar.DISPLACEMENT], moved, healthy)
        if with_statistics:
            self._use_statistics(*statistics)
        self._stop_requested = scalars[Scalar.STOP] > 0.5
        if self._momentum_policy == "reset" or lost or (bad and self._momentum_policy == "local"):
            self.state.clear()
        self._round += 1
        self._steps_in_round = 0
        self._read_loss(scalars, complete=healthy == workers)
        if lost:
            self._raise_nonfinite(bool(bad), "no rank holds a usable model any more.")
        if healthy < workers:
            self._raise_nonfinite(bool(bad), "the model is now the average of the other ranks.")
        if scalars[Scalar.NONFINITE_BUFFERS] or not finite_sum:
            healthy = finite_sum and workers - round(scalars[Scalar.NONFINITE_BUFFERS])
            if not healthy:
                buffers.fill_(math.nan)
            raise_nonfinite_buffers(
                self.communicator, self._names_of_nonfinite(finite), healthy, f"at progress {self.progress:.1f}"
            )

    @property
    def _stale(self) -> bool:
        return isinstance(self.scaling, LocalAdaScale) and self.scaling.stale

    def _write_scalars(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fills in the numbers that ride along; a replica that is seen not to be finite takes its contribution back.

        Seen by its losses, or at the sampled coordinates: NaN spreads through a network fast, and to look at every parameter
        would cost a tenth of an averaging. What escapes is found in the sum.

        Returns:
            Whether this rank's replica is not finite: 0 or 1, on the device and of shape (). And which elements of its averaged
            buffers are finite, a mask: they are few, so all are looked at, and taken back alone.
        """
        scalars = self._flat_replica.scalars
        displacement = self._sample.distance()
        scalars[Scalar.DISPLACEMENT].copy_(displacement)
        scalars[Scalar.LOSS_SUM].copy_(self._loss_sum)
        scalars[Scalar.LOSS_COUNT].fill_(self._loss_count)
        bad = displacement.isfinite().logical_and_(self._loss_sum.isfinite()).logical_not_()
        if bad.device.type != "cpu":
            self._flat_replica.flat.masked_fill_(
                bad, 0.0
            )  # reads all of it, which costs a GPU less than to be waited for
        elif bad:
            self._flat_replica.flat.zero_()
        finite = self._flat_replica.buffers.isfinite()
        bad_buffers = finite.all().logical_not_()
        self._flat_replica.buffers.masked_fill_(bad_buffers, 0.0)
        scalars[Scalar.NONFINITE_BUFFERS].copy_(bad_buffers.logical_or_(bad))
        scalars[Scalar.PRESENT].fill_(1)
        scalars[Scalar.NONFINITE].copy_(bad)
        scalars[Scalar.STOP].fill_(self._stop)
        self._write_digest()
        self._loss_sum.zero_()
        self._loss_count = 0
        return bad.to(torch.float32), finite

    def _write_digest(self, *, everything: bool = False) -> None:
        """Fills in the digest of what must be equal on all ranks."""
        if self.communicator.size == 1:
            return
        values = {
            Fact.STEPS: {"steps": self._steps_in_round, "period": self.period},
            Fact.RATES: self._named_rates(),
            Fact.PROGRESS: {"rounds": self._round, "progress": rounded(self.progress)},
        }
        origin = {} if self._renormalised else {"trained parameters": self._sample.origin}
        self._digest.write(self._flat_replica.digest, values, origin, everything=everything)

    def _measure_divergence(self, sum_displacement: float, moved: float, healthy: int) -> None:
        """(1/K) Σ ‖w_k − w̄‖² = (1/K) Σ ‖w_k − w‖² − ‖w̄ − w‖², w being where the round began; the last is `moved`."""
        if healthy:
            self._divergence = max(sum_displacement / healthy - moved, 0.0)

    def _read_loss(self, scalars: list[float], complete: bool) -> None:
        count = scalars[Scalar.LOSS_COUNT]
        if count:
            self._loss = scalars[Scalar.LOSS_SUM] / count
            if self._planner.first_loss is None:
                self._planner.first_loss = self._loss
        elif complete and self.period_rule.uses_loss:
            raise ValueError(
                f"{type(self.period_rule).__name__} chooses the period from the training loss: call "
                "optimizer.record_loss(loss) at every step"
            )

    def _adopt_moments(self) -> None:
        """Moves the wrapped optimizer's moments into the arena; it updates them in place from then on."""
        if self._momentum_policy == "average":
            later = [name for name in averaged_moments(self.optimizer) if name not in self._moment_names]
            if later:
                raise RuntimeError(
                    f"the {type(self.optimizer).__name__} keeps {', '.join(later)} now, but did not when the LocalOptimizer was "
                    "built, so momentum='average' has no room for it: build the optimizer with that momentum or amsgrad (a tiny "
                    "momentum will do), and change it afterwards"
                )
        for name, views in zip(self._moment_names, self._flat_replica.moments, strict=True):
            for parameter, view in zip(self._parameters, views, strict=True):
                moment = self.state[parameter].get(name) if parameter in self.state else None
                if moment is None:
                    view.zero_()
                elif moment.data_ptr() != view.data_ptr():
                    view.copy_(moment)
                    self.state[parameter][name] = view

    def _names_of_nonfinite(self, finite: torch.Tensor) -> list[str]:
        """The averaged buffers in which the mask of finite elements has a hole."""
        masks = self._flat_replica.buffer_layout.of(finite)
        return [name for name, mask in zip(self._averaged_names, masks, strict=True) if not mask.all()]

    def _check_views(self) -> None:
        """Refuses a model whose parameters or buffers are no longer those in the arena."""
        buffers = [getattr(module, name, None) for module, name in self._buffer_owners]
        present = [*self._parameters, *buffers]
        owners = [*self._owners, *self._buffer_owners]
        for (module, name), tensor, view in zip(owners, present, self._flat_replica.views, strict=True):
            if tensor is None or tensor.data_ptr() != view.data_ptr():
                raise RuntimeError(
                    f"{name!r} of a {type(module).__name__} no longer lies in hvdlocal's buffer: something replaced it after the "
                    "optimizer was built (model.to(…), load_state_dict(assign=True), assigning a parameter, a buffer or .data). "
                    "Build the LocalOptimizer last, and change buffers in place."
                )

    # -- state -------------------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        with_statistics = self._flat_replica.statistics_scalars is not None
        return {
            **super()._own_state(),
            "round": self._round,
            "steps_in_round": self._steps_in_round,
            "steps_since_statistics": self._steps_since_statistics,
            "period": self._planner.period,
            "divergence": self._divergence,
            "max_lr": self._planner.max_lr,
            "longest_period": self._planner.longest,
            "first_loss": self._planner.first_loss,
            "sample": self._sample.state(),
            "round_statistics": self._flat_replica.with_statistics_scalars.clone() if with_statistics else None,
        }

    def load_averaged_state_dict(self, state_dict: dict[str, Any], progress: float) -> None:
        """See `ReplicaOptimizer`."""
        super().load_averaged_state_dict(state_dict, progress)
        if self._momentum_policy == "reset" and state_dict["hvdlocal"]["steps_in_round"]:
            self.state.clear()

    def _after_averaging(self, own: dict[str, Any]) -> dict[str, Any]:
        ended = own["steps_in_round"] > 0
        return {"round": own["round"] + ended, "steps_in_round": 0, "sample": None, "round_statistics": None}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        super()._load_own_state(own)
        self._round = own["round"]
        self._steps_in_round = own["steps_in_round"]
        self._steps_since_statistics = own["steps_since_statistics"]
        self._planner.period = own["period"]
        self._divergence = own["divergence"]
        self._planner.max_lr = own["max_lr"]
        self._planner.longest = own.get("longest_period", own["period"])  # older states lack it
        self._planner.first_loss = own["first_loss"]
        if own["sample"] is None:
            self._sample.move_origin()
        else:
            self._sample.load_state(own["sample"])
        statistics = own["round_statistics"]
        if statistics is not None and statistics.shape == self._flat_replica.with_statistics_scalars.shape:
            self._flat_replica.with_statistics_scalars.copy_(statistics)


def averaged_moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names under which a torch optimizer keeps the moments that momentum="average" averages.

    Raises:
        ValueError: the optimizer is not one whose moments hvdlocal knows.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if any(group["momentum"] for group in optimizer.param_groups) else ()
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        amsgrad = any(group["amsgrad"] for group in optimizer.param_groups)
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
    raise ValueError(
        f"momentum='average' knows the moments of SGD, Adam and AdamW, not of {type(optimizer).__name__}: "
        "choose 'local' or 'reset'"
    )


def _dense_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient in the parameter's memory order, itself when it has the parameter's strides."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.is_sparse:
        raise ValueError("sparse gradients are not supported: use Embedding(sparse=False)")
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=torch.float32, device=parameter.device
        ).copy_(gradient)
    return gradient
