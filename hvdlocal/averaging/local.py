"""Local SGD: every rank steps its own replica; parameters are averaged with one collective every H steps."""

from __future__ import annotations

import time
import warnings
from typing import Any, Literal

import torch

from hvdlocal.averaging.averaged_replica import AveragedReplica
from hvdlocal.averaging.buffers import Buffers
from hvdlocal.averaging.digest import Fact, rounded
from hvdlocal.averaging.gain import AdaScale, LocalAdaScale, NoScaling, Scaling
from hvdlocal.averaging.gradients import GradientBuffer
from hvdlocal.averaging.guards import refuse_renormalised_weights, refuse_sparse_gradients
from hvdlocal.averaging.island_gradient import IslandGradient
from hvdlocal.averaging.moments import Momentum
from hvdlocal.averaging.outer import Outer, OuterRule
from hvdlocal.averaging.period import PeriodRule
from hvdlocal.averaging.round_statistics import RoundStatistics, summed_statistics
from hvdlocal.averaging.rounds import RoundPlanner
from hvdlocal.averaging.setup import OnLoss, check_island_period, check_overlap
from hvdlocal.communicator import Communicator


class LocalOptimizer(AveragedReplica):
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
        on_loss: a function that is called when a job goes on without ranks that died (`hvdlocal.init(survive=True)`). Every rank
            that is left calls it once for each `hvdlocal.communicator.Loss`, at the end of the `step` or `synchronize` in which
            the others noticed the loss; at the end of the next one, if they noticed it elsewhere. `num_workers`, and `rank` and
            `size` of the communicator, are then those of the ranks that are left.
        communicator: by default that of `hvdlocal.init()`.

    Raises:
        ValueError: an argument cannot be used, with the reason; on all ranks.
        DisagreementError: the ranks were given different settings; on all ranks.
    """

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
        on_loss: OnLoss | None = None,
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
            momentum=momentum,
            island_period=int(island_period),
            outer=outer,
            normalize_outer=normalize_outer,
            overlap=int(overlap),
            mixing=mixing,
            on_loss=on_loss,
            communicator=communicator,
        )
        self._planner = RoundPlanner(period, self._progress, rate_for_period)
        self._short_rounds = 0
        self._accumulated = None
        self._inside: IslandGradient | None = None
        self._empty = 0
        if self._islands and island_period == 1:
            refuse_renormalised_weights(model, self._parameters)
            named = dict(zip(self._names, self._parameters, strict=True))
            self._inside = IslandGradient(self._islands.inside, model, named, accumulate)
            self._accumulated = self._inside.sums
        elif accumulate > 1:
            layout = self._flat_replica.layout
            flat = torch.zeros(layout.numel, dtype=torch.float32, device=self._parameters[0].device)
            self._accumulated = GradientBuffer(self._parameters, layout, flat)
        if overlap and mixing != 0 and isinstance(scaling, LocalAdaScale):
            self._warn(
                f"overlap={overlap} with LocalAdaScale: the replicas have drifted {overlap} steps apart where its statistics are "
                "taken, so that the noise and with it the gain come out too large, up to K times the base rate (measured in "
                "docs/outer.md). Use mixing=0, which lets all replicas go on from the mean, or another scaling."
            )
        self._begin_together({"period": repr(period), "rate_for_period": rate_for_period})

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

    def replace_rules(self, period: PeriodRule, outer: OuterRule | None = None) -> None:
        """Goes on with rules of the same kinds for another number of workers; the round that is under way keeps its period.

        Args:
            period: the rule for H.
            outer: the outer optimizer, if it was built by such a rule: its learning rate and momentum, not its state.
        """
        self._planner.rule = period
        if outer and self._outer:
            self._outer.replace_rule(outer)

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
        else:
            self.finish_average()
            if self.communicator.size > 1:
                self._sample.move_origin()
                self._round_average.compare(self._flat_replica, self._facts())
        self._tell_losses()

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
        if begins:
            self._begin_round()
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
                sum_sqr_norm, valid, sqr_norm_of_sum = summed_statistics(self._flat_replica).tolist()
                self._use_statistics(sum_sqr_norm, valid, sqr_norm_of_sum, self.communicator.size)
            self._choose_period()
            if self.progress == 0 and self._smoothed.grad_sqr is not None:
                # stale=False: no step lies before the first estimate, so it weighs as much as the round that it opens.
                self._smoothed.weigh_first(self._theta(self.communicator.size * self.period * self.accumulate))
        self._inner_step(self._progress.context(self.period))
        self._count_step()
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

    def _write_statistics(self, statistics: RoundStatistics) -> None:
        """Writes the statistics of this rank's first gradient of the round into the flat buffer."""
        gradients = self._inside.own_means() if self._inside else [p.grad for p in self._parameters]
        complete = not (self._empty or self._overflowed) and any(gradient is not None for gradient in gradients)
        statistics.write(self._flat_replica, gradients, valid=complete)

    def _facts(self) -> dict[Fact, Any]:
        """See `AveragedReplica`."""
        return {
            Fact.STEPS: {"steps": self._steps_in_round, "period": self.period},
            Fact.RATES: self._named_rates(),
            Fact.PROGRESS: {"rounds": self._round, "progress": rounded(self.progress)},
        }

    def _use_loss(self, loss: float | None, needed: bool) -> None:
        """See `AveragedReplica`.

        Raises:
            ValueError: the period depends on the loss, and none was recorded.
        """
        super()._use_loss(loss, needed)
        if loss is None:
            if needed and self.period_rule.uses_loss:
                raise ValueError(
                    f"{type(self.period_rule).__name__} chooses the period from the training loss: call "
                    "optimizer.record_loss(loss) at every step"
                )
        elif self._planner.first_loss is None:
            self._planner.first_loss = loss

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), **self._planner.state()}

    def _load_own_state(self, own: dict[str, Any]) -> None:
        super()._load_own_state(own)
        self._planner.load_state(own)
