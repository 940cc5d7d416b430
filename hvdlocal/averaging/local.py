"""Local SGD: every rank steps its own replica; parameters are averaged with one collective every H steps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from hvdlocal.averaging.apply import OverlappedMean
from hvdlocal.averaging.buffers import Buffers
from hvdlocal.averaging.digest import Fact, rounded
from hvdlocal.averaging.flat_buffer import CoordinateSample, FlatBuffer
from hvdlocal.averaging.gain import AdaScale, LocalAdaScale, NoScaling, Scaling
from hvdlocal.averaging.gradients import GradientBuffer
from hvdlocal.averaging.guards import (
    refuse_renormalised_weights,
    refuse_sparse_gradients,
    renormalised_weights,
)
from hvdlocal.averaging.island_gradient import IslandGradient
from hvdlocal.averaging.islands import islands_of
from hvdlocal.averaging.moments import Momentum
from hvdlocal.averaging.nonfinite import NonFiniteError, raise_nonfinite_buffers
from hvdlocal.averaging.outer import Outer, OuterOptimizer
from hvdlocal.averaging.period import PeriodRule
from hvdlocal.averaging.replica import ReplicaOptimizer
from hvdlocal.averaging.replica_memory import ReplicaMemory
from hvdlocal.averaging.round_average import AVERAGE, Averaged, RoundAverage, name_of_its_own
from hvdlocal.averaging.round_statistics import RoundStatistics, summed_statistics
from hvdlocal.averaging.rounds import RoundPlanner
from hvdlocal.averaging.setup import check_island_period, check_overlap
from hvdlocal.communicator import Communicator


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

    With islands (`hvdlocal.init(island="node")`) a worker is an island of n ranks: every step uses the mean gradient of its
    ranks, and the islands are averaged. K of the papers is then the number of islands (`num_workers`), a step stands for n·a
    micro-batches, and the gradient statistics come from the gradients of all ranks. An island needs memory for the mean gradient,
    as data parallelism does; see `SynchronousOptimizer`, also for gradients that are changed between backward pass and `step`.

    Parameters are views of one large buffer, and torch.save writes whole buffers: clone the tensors of a `state_dict` first.

    Args:
        optimizer: steps this rank's replica; its learning rates are the base rates γ. All of its parameters, float32.
        model: the replica, on its device already. Do not move it afterwards.
        period: the rule for H.
        scaling: the rule for the gain; `NoScaling()` or None for none.
        momentum: the optimizer's moments at an averaging: "local" keeps each rank's own (both papers' choice), "average" averages
            them (SGD, Adam, AdamW and Muon; a rank on which a parameter has none yet counts as zero), "reset" starts them anew.
            A mapping averages each moment that it names with every n-th round only, and keeps each rank's own of the others:
            {"exp_avg": 3, "exp_avg_sq": 6} (DES-LOC, Iacob et al. 2025). Of any two periods, one must divide the other.
        buffers: the running statistics of batch and instance norm: "average" with the parameters, "local", or "reestimate" by
            calling `reestimate_buffers` before an evaluation. Every other buffer is each rank's own after the start. For
            something else, a mapping of names of buffers or modules, with * for any part of them, to these three; the first
            that matches a buffer holds: {"codebook": "average", "encoder.norm*": "local"}. See `buffer_policies`.
        accumulate: a, micro-batches (calls of `step`) per local step.
        budget: S, scale-invariant iterations after which `finished` turns true; None for no end.
        max_norm: clips the gradient of every local step to this norm, after the statistics were taken.
        rate_for_period: which learning rate the period rule sees: "scaled" (gain·γ, what is applied) or "base" (γ).
        island_period: with islands (`hvdlocal.init(island=…)`), 1 takes every step on the mean gradient of the island's ranks;
            p > 1 lets every rank step on its own gradient and averages the parameters inside of the island every p steps
            (hierarchical local SGD, Lin et al. 2020), for which no gain is derived.
        outer: builds an outer optimizer, any torch optimizer, for the one flat parameter φ that it is called with. It steps with
            Δ = φ − x̄ as the gradient, and all replicas go on from the new φ: `hvdlocal.nesterov()` is DiLoCo's,
            `hvdlocal.slowmo(0.5)` SlowMo's, `lambda parameters: torch.optim.SGD(parameters, lr=0.7)` one of your own. None, or
            SGD at lr=1 without momentum, makes the mean the next φ.
        normalize_outer: divides Δ by the path of its round, the sum of the applied learning rates of its steps, and multiplies
            the outer learning rate by it, for rules by which H or the rate changes from round to round. By default as
            `hvdlocal.nesterov` (no) and `hvdlocal.slowmo` (yes) have it, and not for another optimizer.
        overlap: τ, the steps of the next round during which the average is under way; 0 waits for it. The round that uses up the
            budget, and `synchronize`, wait. Gradient statistics are then taken τ steps later, where the replicas have drifted
            apart, and used from the next round on.
        mixing: α, 0 ≤ α < 1, with overlap: after τ steps a replica θ becomes α θ + (1 − α) φ (Streaming DiLoCo). None carries the
            steps that were taken meanwhile over: φ + (θ − s), s being what was sent (CoCoD-SGD).
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
        momentum: Momentum = "local",
        buffers: Buffers = "average",
        accumulate: int = 1,
        budget: float | None = None,
        max_norm: float | None = None,
        rate_for_period: Literal["scaled", "base"] = "scaled",
        island_period: int = 1,
        outer: Outer | None = None,
        normalize_outer: bool | None = None,
        overlap: int = 0,
        mixing: float | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        scaling = scaling or NoScaling()
        if not isinstance(period, PeriodRule):
            raise ValueError(
                f"period={period!r}: give a rule such as hvdlocal.ConstantPeriod(8) or hvdlocal.QSR(alpha=…, h_base=…)"
            )
        if isinstance(scaling, AdaScale):
            raise ValueError(
                "AdaScale has no local steps: use LocalAdaScale(), or LocalAdaScale(c=0) for AdaScale's gain"
            )
        if rate_for_period not in ("scaled", "base"):
            raise ValueError(f"rate_for_period={rate_for_period!r}: choose 'scaled' or 'base'")
        check_island_period(island_period, scaling)
        check_overlap(overlap, mixing, scaling)
        if outer is None and normalize_outer is not None:
            raise ValueError(
                f"normalize_outer={normalize_outer!r} without outer: give an outer optimizer, or leave it out"
            )
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
        self._islands = islands_of(self.communicator, int(island_period))
        self._island_period = int(island_period)
        self._planner = RoundPlanner(period, self._progress, rate_for_period)
        self._resets_moments = momentum == "reset"
        self._statistics: RoundStatistics | None = None
        if isinstance(scaling, LocalAdaScale) and self.communicator.size > 1:
            self._statistics = RoundStatistics(scaling, self._parameters)
        named = dict(zip(self._names, self._parameters, strict=True))
        self._memory = ReplicaMemory(
            optimizer,
            model,
            named,
            self._buffers_to_average(),
            momentum,
            statistics=self._statistics.size if self._statistics else 0,
            slices=self._ranks_per_worker,
            with_statistics=self._stale,
            sliced_parameters=outer is not None,
        )
        self._flat_replica = self._memory.flat
        self._accumulated = None
        self._inside: IslandGradient | None = None
        self._empty = 0
        if self._islands and island_period == 1:
            refuse_renormalised_weights(model, self._parameters)
            self._inside = IslandGradient(self._islands.inside, model, named, accumulate)
            self._accumulated = self._inside.sums
        elif accumulate > 1:
            layout = self._flat_replica.layout
            flat = torch.zeros(layout.numel, dtype=torch.float32, device=self._parameters[0].device)
            self._accumulated = GradientBuffer(self._parameters, layout, flat)

        self._round = 0
        self._steps_in_round = 0
        self._steps_since_statistics = 0
        self._statistics_due = True
        self._held_statistics: tuple[float, float, float] | None = None
        self._divergence: float | None = None
        self._short_rounds = 0
        self._outer: OuterOptimizer | None = None
        if outer is not None:
            refuse_renormalised_weights(model, self._parameters)
            self._outer = OuterOptimizer(outer, self._flat_replica.parameters, normalize_outer, self._islands)
        self._overlap = int(overlap)
        self._overlapped = OverlappedMean(self._memory, mixing) if overlap else None
        if overlap and mixing != 0 and isinstance(scaling, LocalAdaScale):
            self._warn(
                f"overlap={overlap} with LocalAdaScale: the replicas have drifted {overlap} steps apart where its statistics are "
                "taken, so that the noise and with it the gain come out too large, up to K times the base rate (measured in "
                "docs/outer.md). Use mixing=0, which lets all replicas go on from the mean, or another scaling."
            )
        self._start_together(
            {
                "period": repr(period),
                "momentum": momentum if isinstance(momentum, str) else self._memory.periods,
                "rate_for_period": rate_for_period,
                "island_size": self._ranks_per_worker,
                "island_period": self._island_period,
                **({"outer": repr(self._outer), "normalize_outer": self._outer.normalize} if self._outer else {}),
                **({"overlap": self._overlap, "mixing": mixing} if overlap else {}),
            },
            self._flat_replica.replica,
            {id(tensor) for tensor in self._memory.tensors},
        )
        if self._outer:
            self._outer.begin_round()  # so that a state from before the first step has φ, and can be gone back to
        self._sample = CoordinateSample(self._flat_replica.parameters)
        self._round_average = RoundAverage(
            self.communicator,
            self._islands,
            self._digest,
            self._sample,
            # A forward pass has changed rows of such layers when a round begins, other ones on every rank.
            compares_origin=not renormalised_weights(model, self._parameters),
            name=name_of_its_own() if overlap else AVERAGE,
        )

    def _warn(self, message: str) -> None:
        """Warns once for all ranks."""
        if self.communicator.rank == 0:
            warnings.warn(message, stacklevel=2)

    def averages(self, buffer: torch.Tensor) -> bool:
        """Whether this buffer of the model is one that is averaged."""
        return self._memory.holds(buffer)

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
        """Rounds completed, which is also the number of averages that were begun."""
        return self._round

    @property
    def steps_in_round(self) -> int:
        """Local steps taken since the last averaging."""
        return self._steps_in_round

    @property
    def in_sync(self) -> bool:
        """Whether all ranks hold the same bits of the model: it is the average, and only then evaluate or save it."""
        return not (self.round_under_way or self._round_average.pending)

    @property
    def is_quiet(self) -> bool:
        """Whether no average is under way behind steps, for which a collective that is waited for now would wait, too.

        Where rounds are no longer than the overlap, so that there is always one, it is true at their ends.
        """
        return not self._round_average.pending or (not self.round_under_way and self.period <= self._overlap)

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
        if self._inside:
            self._inside.sums.settle()
        if self.round_under_way:
            self._end_round(at_once=True)
            return
        self.finish_average()
        if self.communicator.size > 1:
            self._sample.move_origin()
            self._round_average.compare(self._flat_replica, self._facts())

    @torch.no_grad()
    def finish_average(self) -> None:
        """See `ReplicaOptimizer`."""
        if self._round_average.pending:
            self._prepare_replica()
            self._use_average(self._round_average.finish(), self._overlapped)

    @torch.no_grad()
    def resume_average(self) -> None:
        """See `ReplicaOptimizer`."""
        self._round_average.look()

    def _note_short_round(self) -> None:
        """Warns of a loop that averages after every step although its rounds are longer."""
        if self._steps_in_round == 1 < self.period:
            self._short_rounds += 1
            if self._short_rounds == 3:
                self._warn(
                    f"synchronize() has ended three rounds in succession after one of {self.period} steps, so every step is "
                    "averaged. Call it only before an evaluation and before saving, not around step()."
                )

    # -- a step ------------------------------------------------------------------------------------------------------

    def _take_gradient(self) -> None:
        if self._inside or self.accumulate > 1 or self._max_norm is not None:  # statistics look by themselves
            refuse_sparse_gradients(self._parameters, self._needs_dense_gradients() or "")
        self._unscale()
        if not self._collect():
            return
        begins = not self.round_under_way
        if begins and self.in_sync:
            self._sample.move_origin()  # not after the averaging: the loop may have loaded other parameters since
            if self._outer:
                self._outer.begin_round()
        if self._statistics and self._statistics_due:
            self._write_statistics(self._statistics)
            self._statistics_due = False
        if self._inside:
            start = time.perf_counter()
            self._overflowed = self._inside.give_mean(self._facts(), self._overflowed)
            self.seconds_inside += time.perf_counter() - start
        if begins:
            if self._statistics and not self._stale:
                self._timed_sum(self._flat_replica.with_statistics_scalars, "hvdlocal.statistics")
                self._use_statistics(*summed_statistics(self._flat_replica).tolist())
            self._choose_period()
            if self.progress == 0 and self._smoothed.grad_sqr is not None:
                # stale=False: no step lies before the first estimate, so it weighs as much as the round that it opens.
                self._smoothed.weigh_first(self._theta(self.communicator.size * self.period * self.accumulate))
        self._inner_step(self._progress.context(self.period))
        if self._outer and self._outer.normalize:
            # Also after an overflow, which other ranks do not have: the path must be the same on all.
            self._outer.path += self.gain * self._trained_rate()
        self._steps_in_round += 1
        self._steps_since_statistics += 1
        self._dropped_steps = 0
        self._round_average.look()
        if self._steps_in_round >= self.period:
            if self.period > 1:
                self._short_rounds = 0
            self._end_round(at_once=self.finished)
            return
        if self._steps_in_round >= self._overlap:
            self.finish_average()
        if self._island_period > 1 and self._steps_in_round % self._island_period == 0:
            self._average_inside()

    def _collect(self) -> bool:
        """Takes in the gradients of a micro-batch; returns whether it was the last of a step."""
        self._empty = 0
        if self._inside:
            complete = self._inside.sums.collect(unscaled=getattr(self, "found_inf", None) is not None)
            self._empty = self._inside.sums.empty
            return complete
        if isinstance(self._accumulated, GradientBuffer):
            self._accumulated.collect()
            if self._accumulated.micro_batches < self.accumulate:
                return False
            self._empty = self._accumulated.empty
            self._accumulated.flat.div_(self.accumulate)
            self._accumulated.give_back()
        return True

    def _choose_period(self) -> None:
        """Chooses H of the round that begins."""
        longest = self._planner.longest
        period, lr, _, limited = self._planner.next_round(self._trained_rate(), self._loss)
        # With a budget, the last round may well be cut short by it; the first one may not.
        if limited is not None and (period == limited or not self._round):
            self._warn(
                f"at the learning rate {lr:.3g}, {self.period_rule} asks for {limited} local steps or more, where the longest "
                f"round so far had {longest}: this one ends after {period}. If the learning rate is still warming up, tell the "
                "rule (warmup=…, warmup_lr=…); max_period=… sets a limit of your own."
            )

    def _trained_rate(self) -> float:
        """The largest base learning rate of the groups that train."""
        rates = self._rates()
        trained = [
            rate
            for group, rate in zip(self.param_groups, rates, strict=True)
            if any(p.requires_grad for p in group["params"])  # the rate of a frozen or empty group moves nothing
        ]
        return max(trained or rates)

    # -- statistics --------------------------------------------------------------------------------------------------

    @property
    def _stale(self) -> bool:
        return isinstance(self.scaling, LocalAdaScale) and self.scaling.stale

    def _write_statistics(self, statistics: RoundStatistics) -> None:
        """Writes the statistics of this rank's first gradient of the round into the flat buffer."""
        gradients = self._inside.own_means() if self._inside else [p.grad for p in self._parameters]
        complete = not (self._empty or self._overflowed) and any(gradient is not None for gradient in gradients)
        statistics.write(self._flat_replica, gradients, valid=complete)

    def _use_statistics(self, sum_sqr_norm: float, valid: float, sqr_norm_of_sum: float) -> None:
        """Makes an estimate of the summed statistics.

        An overflow, on any rank or of the sum, makes it void on all ranks alike, and so does a rank without a gradient.
        """
        ranks = self.communicator.size  # those of an island, too: their gradients are taken before their mean
        if valid > ranks - 0.5 and math.isfinite(sum_sqr_norm + sqr_norm_of_sum):
            self._update_statistics(
                sum_sqr_norm,
                sqr_norm_of_sum,
                gradients=ranks,
                micro_batches=self.accumulate,
                theta_batches=ranks * self._steps_since_statistics * self.accumulate,
            )
            self._steps_since_statistics = 0

    # -- the end of a round --------------------------------------------------------------------------------------------

    def _end_round(self, at_once: bool) -> None:
        """Finishes the average that is under way, then averages the replicas.

        It does so although the former was not finite, so that a loop which catches the error goes on with the next round.

        Args:
            at_once: see `_average_replicas`.
        """
        try:
            self.finish_average()
        except NonFiniteError:
            self._average_replicas(at_once)
            raise
        self._average_replicas(at_once)

    def _average_replicas(self, at_once: bool) -> None:
        """Averages the replicas, which ends the round.

        Args:
            at_once: whether to wait for the average where others are applied some steps later.
        """
        overlapped = None if at_once else self._overlapped
        if overlapped and self._island_period > 1:
            self._average_inside()  # so that the steps of this rank's island alone are carried over
        self._begin_average(overlapped)
        averaged = None if overlapped else self._round_average.finish()
        self._round += 1
        self._steps_in_round = 0
        if self._held_statistics is not None:
            self._use_statistics(*self._held_statistics)
            self._held_statistics = None
        if averaged:
            self._use_average(averaged)

    def _average_inside(self) -> None:
        """Averages the replicas of this rank's island."""
        assert self._islands is not None
        self._prepare_replica()
        start = time.perf_counter()
        self._islands.mean_weights_(self._flat_replica)
        self.seconds_inside += time.perf_counter() - start

    def _begin_average(self, overlapped: OverlappedMean | None) -> None:
        """Begins the average of the round: in the replica itself, or in a message with which the replica can go on."""
        self._prepare_replica()
        number = self._round + 1
        message: FlatBuffer = overlapped.take(number) if overlapped else self._flat_replica
        keep = overlapped.sent if overlapped else None
        self._round_average.begin(number, message, self._facts(), self._loss_sum, self._loss_count, self._stop, keep)
        if self._outer:
            self._outer.end_round()
        self._loss_sum.zero_()
        self._loss_count = 0

    def _prepare_replica(self) -> None:
        """Checks that the replica lies in the flat buffer, with the moments that are averaged."""
        self._check_parameters()
        self._memory.prepare()

    def _use_average(self, averaged: Averaged, overlapped: OverlappedMean | None = None) -> None:
        """Applies the mean, and takes in what came with it.

        Args:
            averaged: the mean, in the replica itself or in the message of `overlapped`.
            overlapped: the rule for a mean that was under way during further steps.

        Raises:
            NonFiniteError: on all ranks, when a replica or averaged buffers were not finite.
            ValueError: the period depends on the loss, and none was recorded.
        """
        if not averaged.lost:
            if self._outer:
                self._outer.step_(averaged.mean.parameters)
            if overlapped:
                self._sample.move_origin(averaged.mean.parameters)
                overlapped.apply(
                    round_number=averaged.round_number,
                    steps=self._steps_in_round,
                    contributed=averaged.mine_is_finite,
                )
        self.seconds_averaging += averaged.seconds
        self.seconds_hidden += averaged.hidden_seconds
        self._statistics_due = True
        if averaged.divergence is not None:
            self._divergence = averaged.divergence
        if averaged.statistics is not None and self._steps_in_round:
            # A gain that changed within a round would change its progress.
            self._held_statistics = averaged.statistics
        elif averaged.statistics is not None:
            self._use_statistics(*averaged.statistics)
        self._stop_requested = averaged.stop
        mine_is_bad = not averaged.mine_is_finite
        if mine_is_bad and overlapped:
            self._loss_sum.zero_()  # of the steps that are dropped
            self._loss_count = 0
        own_moments = not self._memory.averages_all_moments(averaged.round_number)
        if self._resets_moments or averaged.lost or (mine_is_bad and own_moments):
            self.state.clear()
        complete = averaged.replicas == self.num_workers
        self._use_loss(averaged.loss, needed=complete)
        if averaged.lost:
            self._raise_nonfinite(mine_is_bad, "no rank holds a usable model any more.")
        if not complete:
            self._raise_nonfinite(mine_is_bad, "the model is now the average of the other ranks.")
        if averaged.buffer_replicas < self.communicator.size:
            if not averaged.buffer_replicas:
                self._flat_replica.buffers.fill_(math.nan)
            elif overlapped:
                self._flat_replica.buffers.copy_(averaged.mean.buffers)  # what is not finite must not be mixed in
            raise_nonfinite_buffers(
                self.communicator,
                self._memory.names_of_nonfinite(averaged.finite_buffers),
                averaged.buffer_replicas,
                f"at progress {self.progress:.1f}",
            )

    def _use_loss(self, loss: float | None, needed: bool) -> None:
        if loss is not None:
            self._loss = loss
            if self._planner.first_loss is None:
                self._planner.first_loss = loss
        elif needed and self.period_rule.uses_loss:
            raise ValueError(
                f"{type(self.period_rule).__name__} chooses the period from the training loss: call "
                "optimizer.record_loss(loss) at every step"
            )

    def _facts(self) -> dict[Fact, Any]:
        """What must be equal on all ranks when they average."""
        return {
            Fact.STEPS: {"steps": self._steps_in_round, "period": self.period},
            Fact.RATES: self._named_rates(),
            Fact.PROGRESS: {"rounds": self._round, "progress": rounded(self.progress)},
        }

    # -- state -------------------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
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
            "statistics_due": self._statistics_due,
            "held_statistics": self._held_statistics,
            "pending": self._round_average.state(self._overlapped.sent) if self._overlapped else None,
            "moments": self._memory.periods,
            **({"outer_paths": self._outer.paths(), "shared": self.shared_state()} if self._outer else {}),
            "round_statistics": self._flat_replica.with_statistics_scalars.clone() if self._statistics else None,
        }

    def shared_state(self) -> dict[str, Any]:
        """See `ReplicaOptimizer`."""
        return self._outer.state() if self._outer else {}

    def load_shared_state(self, parts: Sequence[dict[str, Any]]) -> None:
        """See `ReplicaOptimizer`."""
        if self._outer:
            self._outer.load_state(parts)
        elif any(parts):
            raise ValueError(
                "the state holds that of an outer optimizer, and this LocalOptimizer has none: give it the outer optimizer of "
                "the run that saved it"
            )

    def load_averaged_state_dict(self, state_dict: dict[str, Any], progress: float) -> None:
        """See `ReplicaOptimizer`."""
        super().load_averaged_state_dict(state_dict, progress)
        if _in_a_round(state_dict["hvdlocal"]):
            if self._outer:
                self._outer.join_paths()
                with torch.no_grad():
                    self._outer.step_(self._flat_replica.parameters)
            if self._resets_moments:
                self.state.clear()

    def _after_averaging(self, own: dict[str, Any]) -> dict[str, Any]:
        ended = own["steps_in_round"] > 0
        dropped = dict.fromkeys(("sample", "round_statistics", "held_statistics", "pending"))
        return {"round": own["round"] + ended, "steps_in_round": 0, "statistics_due": True, **dropped}

    def _check_own_state(self, own: dict[str, Any]) -> None:
        super()._check_own_state(own)
        worker, mine = own.get("worker", [own["rank"]]), self._ranks_of_worker
        places = [len(worker), worker.index(own["rank"])], [len(mine), mine.index(self.communicator.rank)]
        if own.get("shared") and len(worker) > 1 and places[0] != places[1]:
            raise ValueError(
                f"this state holds the slice of the outer optimizer of rank {own['rank']} in an island of {len(worker)}, and "
                f"rank {self.communicator.rank} needs another one: load each rank's own"
            )
        if (pending := own.get("pending")) is None:
            return
        if not self._overlapped:
            raise ValueError(
                "this state was saved while an average was under way, which needs overlap=… of the optimizer that saved it: give "
                "the same, or save after synchronize()"
            )
        saved = own["moments"], pending["sent"].numel()
        here = self._memory.periods, self._flat_replica.sent(pending["round"]).numel()
        if saved != here:
            raise ValueError(
                f"this state was saved while an average of {saved[1]} numbers was under way, with the moments {saved[0]}, and "
                f"here it would be one of {here[1]} with {here[0]}: give the momentum, buffers, scaling and outer optimizer of "
                "the run that saved it, or save after synchronize()"
            )

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
        # States from before there were outer optimizers and overlap lack these.
        self._statistics_due = own.get("statistics_due", self._steps_in_round == 0)
        self._held_statistics = own.get("held_statistics")
        if self._overlapped:
            self._round_average.load_state(own.get("pending"), self._overlapped.message, self._overlapped.sent)
        if self._outer:
            self._outer.load_paths(own.get("outer_paths", (0.0, 0.0)))
        if own.get("shared"):
            self.load_shared_state([own["shared"]])
        statistics = own["round_statistics"]
        if statistics is not None and statistics.shape == self._flat_replica.with_statistics_scalars.shape:
            self._flat_replica.with_statistics_scalars.copy_(statistics)


def _in_a_round(own: Mapping[str, Any]) -> bool:
    """Whether a state is that of the middle of a round, or of an average under way: different on every rank."""
    return own["steps_in_round"] > 0 or own.get("pending") is not None
