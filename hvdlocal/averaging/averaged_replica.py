"""A replica that is averaged with those of the other workers: its memory, its averages, and what becomes of the mean."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvdlocal.averaging.apply import OverlappedMean
from hvdlocal.averaging.buffers import Buffers
from hvdlocal.averaging.digest import Fact
from hvdlocal.averaging.flat_buffer import CoordinateSample, FlatBuffer
from hvdlocal.averaging.gain import LocalAdaScale, Scaling
from hvdlocal.averaging.guards import refuse_renormalised_weights, renormalised_weights
from hvdlocal.averaging.islands import islands_of
from hvdlocal.averaging.moments import Momentum
from hvdlocal.averaging.nonfinite import NonFiniteError, raise_nonfinite_buffers
from hvdlocal.averaging.outer import Outer, OuterOptimizer
from hvdlocal.averaging.replica import ReplicaOptimizer
from hvdlocal.averaging.replica_memory import ReplicaMemory
from hvdlocal.averaging.round_average import AVERAGE, Averaged, RoundAverage, name_of_its_own
from hvdlocal.averaging.round_statistics import RoundStatistics
from hvdlocal.averaging.setup import OnLoss
from hvdlocal.communicator import Communicator


class AveragedReplica(ReplicaOptimizer):
    """The part of `LocalOptimizer` that averages: what a replica sends, when it waits for the mean, and how it goes on from it.

    A subclass takes the steps of a round and says what must be equal on all ranks when they average (`_facts`). It calls
    `_begin_together` at the end of its construction, `_begin_round` before the first step of a round, `_count_step` after each
    step, and `_end_round` after the last one.

    Args: see `LocalOptimizer`.
    """

    _averages_parameters = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        *,
        scaling: Scaling,
        accumulate: int,
        buffers: Buffers,
        budget: float | None,
        max_norm: float | None,
        momentum: Momentum,
        island_period: int,
        outer: Outer | None,
        normalize_outer: bool | None,
        overlap: int,
        mixing: float | None,
        on_loss: OnLoss | None,
        communicator: Communicator | None,
    ) -> None:
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
        self._islands = islands_of(self.communicator, island_period)
        self._island_period = island_period
        self._statistics: RoundStatistics | None = None
        if isinstance(scaling, LocalAdaScale) and self.communicator.size > 1:
            self._statistics = RoundStatistics(scaling, self._parameters)
        self._memory = ReplicaMemory(
            optimizer,
            model,
            dict(zip(self._names, self._parameters, strict=True)),
            self._buffers_to_average(),
            momentum,
            statistics=self._statistics.size if self._statistics else 0,
            slices=self._ranks_per_worker,
            with_statistics=self._stale,
            sliced_parameters=outer is not None,
        )
        self._flat_replica = self._memory.flat
        self._resets_moments = momentum == "reset"
        self._outer: OuterOptimizer | None = None
        if outer is not None:
            refuse_renormalised_weights(model, self._parameters)
            self._outer = OuterOptimizer(outer, self._flat_replica.parameters, normalize_outer, self._islands)
        self._overlap = overlap
        self._overlapped = OverlappedMean(self._memory, mixing) if overlap else None
        self._sample = CoordinateSample(self._flat_replica.parameters)
        self._round_average = RoundAverage(
            self.communicator,
            self._islands,
            self._digest,
            self._sample,
            # A forward pass has changed rows of such layers when a round begins, other ones on every rank.
            compares_origin=not renormalised_weights(model, self._parameters),
            name=name_of_its_own(self.communicator) if overlap else AVERAGE,
        )
        self._own_settings = {
            "momentum": momentum if isinstance(momentum, str) else self._memory.periods,
            "island_size": self._ranks_per_worker,
            "island_period": island_period,
            **({"outer": repr(self._outer), "normalize_outer": self._outer.normalize} if self._outer else {}),
            **({"overlap": overlap, "mixing": mixing} if overlap else {}),
        }

        self._round = 0
        self._steps_in_round = 0
        self._steps_since_statistics = 0
        self._statistics_due = True
        self._held_statistics: tuple[float, float, float, int] | None = None
        self._divergence: float | None = None

    def _begin_together(self, settings: Mapping[str, Any]) -> None:
        """Refuses ranks with different settings, then makes rank 0's model everyone's; a collective.

        Args:
            settings: of the subclass, by name.
        """
        self._start_together(
            {**settings, **self._own_settings},
            self._flat_replica.replica,
            {id(tensor) for tensor in self._memory.tensors},
        )
        if self._outer:
            self._outer.begin_round()  # so that a state from before the first step has φ, and can be gone back to
        self._sample.move_origin()

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

    # -- a round -----------------------------------------------------------------------------------------------------

    def _begin_round(self) -> None:
        """Notes where the round begins, if it begins where all replicas are equal."""
        if self.in_sync:
            self._sample.move_origin()  # not after the averaging: the loop may have loaded other parameters since
            if self._outer:
                self._outer.begin_round()

    def _count_step(self) -> None:
        """Counts a step that was taken at the present gain and rates."""
        if self._outer and self._outer.normalize:
            # Also after an overflow, which other ranks do not have: the path must be the same on all.
            self._outer.path += self.gain * self._trained_rate()
        self._steps_in_round += 1
        self._steps_since_statistics += 1
        self._dropped_steps = 0
        self._round_average.look()

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
        complete = averaged.replicas == averaged.ranks // self._ranks_per_worker
        self._use_loss(averaged.loss, needed=complete)
        if averaged.lost:
            self._raise_nonfinite(mine_is_bad, "no rank holds a usable model any more.")
        if not complete:
            self._raise_nonfinite(mine_is_bad, "the model is now the average of the other ranks.")
        if averaged.buffer_replicas < averaged.ranks:
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
        """Takes in the mean loss of the round.

        Args:
            loss: None where no rank recorded one.
            needed: whether it must be there if the period depends on it.
        """
        if loss is not None:
            self._loss = loss

    def _facts(self) -> dict[Fact, Any]:
        """What must be equal on all ranks when they average."""
        raise NotImplementedError

    @property
    def _stale(self) -> bool:
        """Whether the statistics are sent with the average."""
        return isinstance(self.scaling, LocalAdaScale) and self.scaling.stale

    def _use_statistics(self, sum_sqr_norm: float, valid: float, sqr_norm_of_sum: float, ranks: int) -> None:
        """Makes an estimate of the summed statistics.

        An overflow, on any rank or of the sum, makes it void on all ranks alike, and so does a rank without a gradient. The
        gradient of one rank that is left has no variance.

        Args:
            sum_sqr_norm: Σ ‖g‖².
            valid: the number of finite gradients.
            sqr_norm_of_sum: ‖Σ g‖².
            ranks: in these sums, those of an island, too: their gradients are taken before their mean.
        """
        if ranks > 1 and valid > ranks - 0.5 and math.isfinite(sum_sqr_norm + sqr_norm_of_sum):
            self._update_statistics(
                sum_sqr_norm,
                sqr_norm_of_sum,
                gradients=ranks,
                micro_batches=self.accumulate,
                theta_batches=ranks * self._steps_since_statistics * self.accumulate,
            )
            self._steps_since_statistics = 0

    # -- state -------------------------------------------------------------------------------------------------------

    def _own_state(self) -> dict[str, Any]:
        return {
            **super()._own_state(),
            "round": self._round,
            "steps_in_round": self._steps_in_round,
            "steps_since_statistics": self._steps_since_statistics,
            "divergence": self._divergence,
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
        self._divergence = own["divergence"]
        if own["sample"] is None:
            self._sample.move_origin()
        else:
            self._sample.load_state(own["sample"])
        # States from before there were outer optimizers and overlap lack these.
        self._statistics_due = own.get("statistics_due", self._steps_in_round == 0)
        held = own.get("held_statistics")
        # Older ones have no number of ranks with the statistics, which were then those of all.
        self._held_statistics = (*held, own["num_workers"]) if held and len(held) == 3 else held
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
