"""What both optimizers share: one rank's replica of the model, stepped by an ordinary torch optimizer at a scaled rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NoReturn

import torch

from hvdlocal.averaging.buffers import (
    BufferPolicy,
    Buffers,
    average_buffers,
    averaged_buffers,
    buffers_of_rank_0,
    check_averaged,
    check_tensors,
    choose_policies,
    kept_buffers,
    other_buffers,
    put_back,
    running_statistics,
)
from hvdlocal.averaging.digest import Digest
from hvdlocal.averaging.gain import Scaling, ScalingContext
from hvdlocal.averaging.gradients import GradientBuffer
from hvdlocal.averaging.guards import refuse_data_parallelism, refuse_new_parameters, refuse_sparse_layers
from hvdlocal.averaging.mean_gradient import MeanGradient
from hvdlocal.averaging.nonfinite import raise_nonfinite
from hvdlocal.averaging.rounds import Progress
from hvdlocal.averaging.setup import (
    OnLoss,
    check_arguments,
    check_budget,
    constants,
    owner_of,
    start_together,
    trainable,
)
from hvdlocal.averaging.statistics import SmoothedStatistics, default_smoothing, gradient_statistics
from hvdlocal.averaging.wrapper import STATE_VERSION, WrappedOptimizer
from hvdlocal.communicator import Communicator, current


class ReplicaOptimizer(WrappedOptimizer):
    """The common part of `LocalOptimizer` and `SynchronousOptimizer`.

    It is a `torch.optim.Optimizer` that shares `param_groups` and `state` with the optimizer it wraps: learning-rate schedulers
    set the base learning rate γ in the groups, a step applies gain·γ, and the groups are left as they were.
    """

    _averages_parameters = False
    """Whether differences between the parameters of the ranks end at the next averaging, and islands are workers."""

    _accumulated: GradientBuffer | MeanGradient | None

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
        on_loss: OnLoss | None,
        communicator: Communicator | None,
    ) -> None:
        check_arguments(optimizer, model, scaling, accumulate, buffers, budget, max_norm, on_loss)
        refuse_data_parallelism(optimizer, model)
        self.communicator = communicator = communicator or current()
        self._on_loss = on_loss
        self._losses_told = len(self.communicator.losses)
        self.model = model
        self._smoothed = SmoothedStatistics()
        self._accumulate = accumulate
        ranks = self._ranks_per_worker
        self._progress = Progress(
            scaling, lambda: communicator.size // ranks, ranks * accumulate, budget, self._smoothed
        )
        if budget is None:
            scaling.gain(self._progress.context(1))  # refuses a rule that needs the budget now, not at the first step
        self._max_norm = max_norm
        self._names, self._parameters = trainable(optimizer, model)
        self._owners = [owner_of(model, name) for name in self._names]
        if reason := self._needs_dense_gradients():
            refuse_sparse_layers(model, self._parameters, reason)
        check_tensors(model)
        self._buffers = dict(buffers) if isinstance(buffers, Mapping) else buffers
        self._buffer_policies = choose_policies(model, buffers)
        check_averaged(self._buffers_to_average(), self._parameters[0].device)
        super().__init__(optimizer)

        device = self._parameters[0].device
        self._digest = Digest(
            self.communicator,
            model,
            constants(model, self._buffers),
            device,
            lasting=not self._averages_parameters,
        )
        self._loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        self._loss_count = 0
        self._loss: float | None = None
        self._dropped_steps = 0
        self._stop = False
        self._stop_requested = False
        self.seconds_averaging = 0.0
        self.seconds_hidden = 0.0
        self.seconds_inside = 0.0

    # -- what a training loop reads ----------------------------------------------------------------------------------

    @property
    def scaling(self) -> Scaling:
        """The rule for the gain."""
        return self._progress.scaling

    @property
    def accumulate(self) -> int:
        """a, micro-batches (calls of `step`) per optimizer step."""
        return self._accumulate

    @property
    def num_workers(self) -> int:
        """K of the papers' formulas: the replicas that differ between two averagings, islands or ranks. It falls with a loss."""
        return self._progress.num_workers

    @property
    def budget(self) -> float | None:
        """S, the progress at which the run is finished; None for no end."""
        return self._progress.budget

    @property
    def settings(self) -> dict[str, Any]:
        """What else it was built with, by name; the same on all ranks."""
        return dict(self._settings)

    @property
    def progress(self) -> float:
        """s, scale-invariant iterations done: the sum of the gains of all steps (`Scaling.progress`)."""
        return self._progress.done

    @property
    def round(self) -> int:
        """Rounds completed."""
        raise NotImplementedError

    @property
    def steps_in_round(self) -> int:
        """Local steps taken since the round began; 0 between two rounds."""
        raise NotImplementedError

    @property
    def round_under_way(self) -> bool:
        """Whether a round was begun and is not over. Only between two rounds can the replicas be equal (`in_sync`)."""
        return self.steps_in_round > 0

    @property
    def in_sync(self) -> bool:
        """Whether all ranks hold the same bits of the parameters."""
        raise NotImplementedError

    @property
    def is_quiet(self) -> bool:
        """Whether no average is under way behind steps, for which a collective that is waited for now would wait, too."""
        return True

    def finish_average(self) -> None:
        """Waits for the average that is under way behind steps, if there is one, and applies it; a collective.

        `synchronize` does so, too. Called before it, the wait and the traffic can be counted apart.
        """

    @property
    def finished(self) -> bool:
        """Whether the budget is used up; never without a budget."""
        return self._progress.ended()

    @property
    def gain(self) -> float:
        """ρ of the last step: the factor that was put on the base learning rate."""
        return self._progress.gain

    @property
    def grad_sqr(self) -> float | None:
        """Moving average of G = ‖∇f‖²; None before the first estimate or when the scaling rule needs none."""
        return self._smoothed.grad_sqr

    @property
    def grad_var(self) -> float | None:
        """Moving average of σ², the variance of one worker's gradient of one micro-batch; None as for `grad_sqr`."""
        return self._smoothed.grad_var

    @property
    def loss(self) -> float | None:
        """Mean of the recorded losses of all workers between the last two collectives; None before."""
        return self._loss

    @property
    def micro_batches(self) -> int:
        """Micro-batches collected towards the next step; 0 right after a step."""
        return self._accumulated.micro_batches if self._accumulated else 0

    @property
    def stop_requested(self) -> bool:
        """Whether any rank had called `request_stop` by the last collective; the same on every rank."""
        return self._stop_requested

    @property
    def buffer_policies(self) -> dict[str, BufferPolicy]:
        """What is done with every buffer of the model, by name: "average", "local" or "reestimate"."""
        return dict(self._buffer_policies)

    @property
    def kept_buffers(self) -> list[str]:
        """Floating-point buffers that are saved with the model and stay each rank's own, batch norm's statistics aside.

        A saved model holds those of rank 0. Name them in `buffers` when they should be averaged.
        """
        return kept_buffers(self.model, self._buffer_policies)

    # -- what a training loop calls ----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `WrappedOptimizer`; afterwards `on_loss` is called for the ranks that were lost."""
        loss = super().step(closure)
        self._tell_losses()
        return loss

    def record_loss(self, loss: torch.Tensor | float) -> None:
        """Notes a training loss: its mean over all workers rides in the next collective and becomes `.loss`.

        AdaComm needs it, and with it a loss that is NaN or infinite on one rank stops all ranks.

        Args:
            loss: mean over the micro-batch, a tensor of one element (not copied from its device) or a number.

        Raises:
            ValueError: the loss is not one number.
        """
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self._loss_sum += loss.detach().reshape(())
        elif isinstance(loss, Real):
            self._loss_sum += float(loss)
        else:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise ValueError(f"record_loss({what}): give one number, the mean loss of the micro-batch")
        self._loss_count += 1

    def restart_clock(self, progress: float, budget: float | None) -> None:
        """Goes on with other units of progress, between two steps: where a unit is a step, fewer workers need more of them.

        The round that is under way keeps its period.

        Args:
            progress: s, the iterations done in the new units; the same on all ranks, as is the budget.
            budget: S in the new units; None for no end.

        Raises:
            ValueError: the budget is not positive.
        """
        check_budget(budget)
        self._progress.done = progress
        self._progress.budget = budget

    def resume_average(self) -> None:
        """Begins the average anew that was under way when a state was saved; a collective, which the next step would begin else.

        To be called after `load_state_dict` by who counts what training sends: this message was counted before.
        """

    def request_stop(self) -> None:
        """Asks all ranks to stop, for example from a signal handler.

        The request travels with the next collective; then `stop_requested` is true on every rank, at the same step.
        """
        self._stop = True

    def reestimate_buffers(self, batches: Iterable[Any]) -> None:
        """Computes the batch-norm statistics of the present model anew, over `batches` of all ranks; a collective.

        Args:
            batches: this rank's inputs, or (inputs, …) tuples whose first element is the input; at least one.

        Raises:
            ValueError: no batch was given.
        """
        if not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in self.model.modules()):
            return
        seen = 0

        def counted() -> Iterator[Any]:
            nonlocal seen
            for batch in batches:
                seen += 1
                yield batch

        with put_back(other_buffers(self.model)):  # the forward passes are those of training, and would move them
            torch.optim.swa_utils.update_bn(counted(), self.model, self._parameters[0].device)
        without = self._average_buffers(running_statistics(self.model), faulty=not seen)
        if without:
            raise ValueError(
                f"reestimate_buffers: {without} of {self.communicator.size} ranks gave no batch to estimate from; every rank "
                "must give at least one"
            )

    @contextmanager
    def published(self) -> Iterator[None]:
        """Within, this rank's model is the one that rank 0 would save: buffers that are not averaged are those of rank 0.

        For an evaluation over all ranks, after `synchronize`. A collective; afterwards each rank has its own buffers again.
        """
        own = [buffer for name, buffer in self.model.named_buffers() if self._buffer_policies.get(name) != "average"]
        with buffers_of_rank_0(self.communicator, own):
            yield

    def load_averaged_state_dict(self, state_dict: dict[str, Any], progress: float) -> None:
        """Continues from the state of a run with another number of ranks, after loading the average of its replicas.

        The round that was under way counts as ended by that averaging, and its unfinished statistics and micro-batches are
        dropped. The moving averages of G and σ² stay: they are those of one micro-batch of one worker.

        Args:
            state_dict: any old rank's, with the moments that all ranks are to start from; the same on every rank.
            progress: `progress` of the old run in units of this one, whose steps stand for another number of samples.
        """
        own = {**state_dict.get("hvdlocal", {}), "progress": progress, "rank": self.communicator.rank}
        own |= {"num_workers": self.communicator.size, "worker": self._ranks_of_worker}
        own |= {"loss_count": 0, "accumulated": {}, "overflowed": False}
        own["loss_sum"] = torch.zeros((), dtype=torch.float32, device="cpu")
        self.load_state_dict({**state_dict, "hvdlocal": {**own, **self._after_averaging(own)}})

    # -- for the two optimizers --------------------------------------------------------------------------------------

    def _after_averaging(self, own: dict[str, Any]) -> dict[str, Any]:
        """What an averaging in another number of ranks changes of a state."""
        raise NotImplementedError

    def _own_state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "class": type(self).__name__,
            "num_workers": self.communicator.size,
            "worker": self._ranks_of_worker,
            "rank": self.communicator.rank,
            "optimizer": type(self.optimizer).__name__,
            "accumulate": self.accumulate,
            "progress": self._progress.done,
            "gain": self._progress.gain,
            "statistics": self._smoothed.state_dict(),
            "loss": self._loss,
            "loss_sum": self._loss_sum.clone(),
            "loss_count": self._loss_count,
            "accumulated": self._accumulated.state() if self._accumulated else {},
            "overflowed": self._overflowed,
            "kept_buffers": self.kept_buffers,
        }

    def _check_own_state(self, own: dict[str, Any]) -> None:
        elsewhere = own["rank"] != self.communicator.rank or own["num_workers"] != self.communicator.size
        in_a_round = own.get("steps_in_round") or own.get("pending")
        if elsewhere and (own["accumulated"] or in_a_round):
            raise ValueError(
                f"this state was saved in the middle of a round by rank {own['rank']} of {own['num_workers']} and cannot be "
                f"continued by rank {self.communicator.rank} of {self.communicator.size}: load each rank's own, or save after "
                "synchronize()"
            )
        worker = own.get("worker", [own["rank"]])  # older states lack it
        if worker != self._ranks_of_worker and in_a_round:
            raise ValueError(
                f"this state was saved in the middle of a round in which the ranks {worker} were one worker, and cannot be "
                f"continued where the ranks {self._ranks_of_worker} are one: start with the same islands, or save after "
                "synchronize()"
            )
        if own["accumulated"] and own["accumulate"] != self.accumulate:
            raise ValueError(
                f"this state was saved in the middle of an accumulation of {own['accumulate']} micro-batches and cannot be "
                f"continued with accumulate={self.accumulate}"
            )

    def shared_state(self) -> dict[str, Any]:
        """This rank's part of what all workers hold alike beside the model, and a `state_dict` leaves out.

        It is to be saved once: without islands by rank 0, which has the whole; with islands by the ranks of one island, each of
        which has a slice. It is empty as long as an averaging makes the mean everyone's model and keeps nothing.
        """
        return {}

    def load_shared_state(self, parts: Sequence[dict[str, Any]]) -> None:
        """Continues from the `shared_state` of the ranks of one island, on any number of ranks in any islands.

        To be called before the state of the rank is loaded.

        Args:
            parts: of all ranks of the island, in their order; without islands that of rank 0 alone.

        Raises:
            ValueError: the state is not one of this optimizer.
        """
        if names := {name for part in parts for name in part}:
            raise ValueError(f"the state holds {', '.join(sorted(names))}, which a {type(self).__name__} does not use")

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self._progress.done = own["progress"]
        self._progress.gain = own["gain"]
        self._smoothed.load_state_dict(own["statistics"])
        self._loss = own["loss"]
        self._loss_sum.copy_(own["loss_sum"])
        self._loss_count = own["loss_count"]
        if self._accumulated:
            self._accumulated.load_state(own["accumulated"])
        self._overflowed = own["overflowed"]

    def _tell_losses(self) -> None:
        """Calls `on_loss` for each loss that it has not been called for."""
        losses = self.communicator.losses
        while self._losses_told < len(losses):
            self._losses_told += 1
            if self._on_loss:
                self._on_loss(losses[self._losses_told - 1])

    def _check_parameters(self) -> None:
        refuse_new_parameters(type(self).__name__, self.model, self._owners, self._parameters, self.param_groups)

    @property
    def _ranks_per_worker(self) -> int:
        """n, the ranks of an island where islands are workers; else 1."""
        return self.communicator.island_size if self._averages_parameters else 1

    @property
    def _ranks_of_worker(self) -> list[int]:
        """The ranks of this rank's island where islands are workers; else this rank. Their numbers are those of ranks left."""
        island = self.communicator.island if self._averages_parameters else None
        return list(map(self.communicator.job_ranks.index, island.job_ranks)) if island else [self.communicator.rank]

    def _needs_dense_gradients(self) -> str | None:
        """The setting with which gradients must be dense, if there is one."""
        if self._ranks_per_worker > 1:
            return f"island={self._ranks_per_worker}"
        if self.accumulate > 1:
            return f"accumulate={self.accumulate}"
        if self._max_norm is not None:
            return f"max_norm={self._max_norm}"
        return type(self.scaling).__name__ if self.scaling.uses_statistics else None

    def _update_statistics(
        self, sum_sqr_norm: float, sqr_norm_of_sum: float, gradients: int, micro_batches: int, theta_batches: int
    ) -> None:
        """Takes in one estimate.

        Args:
            sum_sqr_norm: Σ ‖g_i‖² over `gradients` gradients, each the mean of `micro_batches` micro-batches.
            sqr_norm_of_sum: ‖Σ g_i‖².
            theta_batches: micro-batches of all workers since the last estimate, for the moving average's default.
        """
        grad_sqr, grad_var = gradient_statistics(sum_sqr_norm / gradients, sqr_norm_of_sum / gradients**2, gradients)
        self._smoothed.update(grad_sqr, grad_var * micro_batches, self._theta(theta_batches))

    def _theta(self, micro_batches: int) -> float:
        """θ of the moving averages when all workers have consumed so many micro-batches since the last estimate."""
        theta = getattr(self.scaling, "smoothing", None)
        return default_smoothing(micro_batches) if theta is None else theta

    def _inner_step(self, now: ScalingContext) -> None:
        """Takes an optimizer step with what now are the parameters' gradients."""
        gain = self.scaling.gain(now)
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._step_at(gain)
        self._progress.count(now, gain)

    def _note_dropped_step(self) -> None:
        """Counts calls of `synchronize` that take away micro-batches. A step in between starts the count anew.

        Raises:
            RuntimeError: two calls in succession: in such a loop no step is ever completed.
        """
        if not self.micro_batches:
            return
        self._dropped_steps += 1
        if self._dropped_steps > 1:
            raise RuntimeError(
                f"synchronize() was called twice without a whole step of {self.accumulate} micro-batches in between, so "
                "nothing is ever trained. Delete synchronize() before step(): it belongs before an evaluation or a saved model."
            )

    def _buffers_to_average(self) -> dict[str, torch.Tensor]:
        return averaged_buffers(self.model, self._buffer_policies)

    def _average_buffers(self, buffers: Mapping[str, torch.Tensor], faulty: bool = False) -> int:
        """Averages buffers that lie outside of the flat buffer; see `average_buffers`."""
        return average_buffers(self.communicator, buffers, self._timed_sum, f"at progress {self.progress:.1f}", faulty)

    def _start_together(self, settings: Mapping[str, Any], flat: torch.Tensor, in_flat: set[int]) -> None:
        """Refuses ranks with different settings, then makes rank 0's model everyone's; see `start_together`."""
        own = {
            "optimizer class": type(self).__name__,
            "scaling": repr(self.scaling),
            "accumulate": self.accumulate,
            "budget": self.budget,
            "buffers": self._buffers,
            "max_norm": self._max_norm,
            "parameters to train": len(self._parameters),
        }
        self._settings = {**own, **settings}
        start_together(self.communicator, self.optimizer, self.model, self._settings, flat, in_flat)

    def _timed_sum(self, tensor: torch.Tensor, name: str) -> None:
        start = time.perf_counter()
        self.communicator.sum_(tensor, name)
        self.seconds_averaging += time.perf_counter() - start

    def _raise_nonfinite(self, mine: bool, what: str) -> NoReturn:
        raise_nonfinite(self.communicator, mine, f"at progress {self.progress:.1f} (gain {self.gain:.3g})", what)
