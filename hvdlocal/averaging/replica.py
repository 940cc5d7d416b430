"""What both optimizers share: one rank's replica of the model, stepped by an ordinary torch optimizer at a scaled rate."""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NoReturn

import torch

from hvdlocal.averaging.buffers import (
    BufferPolicy,
    Buffers,
    averaged_buffers,
    buffers_of_rank_0,
    check_averaged,
    check_policies,
    check_tensors,
    choose_policies,
    describe_layout,
    kept_buffers,
    memory_of,
    other_buffers,
    policy_by_name,
    put_back,
    running_statistics,
)
from hvdlocal.averaging.digest import Digest, rounded
from hvdlocal.averaging.gain import Scaling, ScalingContext
from hvdlocal.averaging.gradients import GradientBuffer
from hvdlocal.averaging.guards import (
    check_rate,
    guard_wrapped,
    refuse_data_parallelism,
    refuse_sparse_layers,
    refuse_state_makers,
    renormalised_weights,
)
from hvdlocal.averaging.statistics import SmoothedStatistics, default_smoothing, gradient_statistics
from hvdlocal.communicator import CommunicationError, Communicator, current, require_agreement

STATE_VERSION = 1

_MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What torch's optimizers call moments that have their parameter's shape."""


class NonFiniteError(ArithmeticError):
    """A rank's loss, gradient or replica became NaN or infinite; raised on all ranks at the same step."""


class ReplicaOptimizer(torch.optim.Optimizer):
    """The common part of `LocalOptimizer` and `SynchronousOptimizer`.

    It is a `torch.optim.Optimizer` that shares `param_groups` and `state` with the optimizer it wraps: learning-rate schedulers
    set the base learning rate γ in the groups, a step applies gain·γ, and the groups are left as they were.
    """

    _averages_parameters = False
    """Whether differences between the parameters of the ranks end at the next averaging."""

    _step_supports_amp_scaling = True
    """GradScaler then calls `step` also after an overflow, so that no rank ever misses a collective. During the call this
    object has two more attributes, `found_inf` and `grad_scale`."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if cls.__module__.startswith("horovod."):  # how hvd.DistributedOptimizer wraps an optimizer
            raise ValueError(
                f"hvd.DistributedOptimizer around a {cls.__name__} would average the gradients at every step: delete that line"
            )

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
        communicator: Communicator | None,
    ) -> None:
        _check_arguments(optimizer, model, scaling, accumulate, buffers, budget, max_norm)
        refuse_data_parallelism(optimizer, model)
        self.communicator = communicator or current()
        self.optimizer = optimizer
        self.model = model
        self.scaling = scaling
        self.accumulate = accumulate
        self.budget = budget
        self._max_norm = max_norm
        self._names, self._parameters = _trainable(optimizer, model)
        self._owners = [owner_of(model, name) for name in self._names]
        if reason := self._needs_dense_gradients():
            refuse_sparse_layers(model, self._parameters, reason)
        check_tensors(model)
        self._buffers = dict(buffers) if isinstance(buffers, Mapping) else buffers
        self._buffer_policies = choose_policies(model, buffers)
        check_averaged(self._buffers_to_average(), self._parameters[0].device)
        self._constructed = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._constructed = True
        self.stepping = False
        guard_wrapped(optimizer, self)

        self._progress = 0.0
        self._gain = 1.0
        self._smoothed = SmoothedStatistics()
        device = self._parameters[0].device
        self._digest = Digest(
            self.communicator, model, self._constants(), device, lasting=not self._averages_parameters
        )
        self._nonfinite_found, self._factor = (torch.zeros(1, dtype=torch.float32, device=device) for _ in range(2))
        self._loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        self._loss_count = 0
        self._loss: float | None = None
        self._overflowed = False
        self._dropped_steps = 0
        self._stop = False
        self._stop_requested = False
        self.seconds_averaging = 0.0

    # -- shared with the wrapped optimizer, whose own load_state_dict replaces both ------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups, with the base learning rates."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._constructed:  # torch's constructor would begin with empty ones
            self.optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[torch.Tensor, Any]) -> None:
        if self._constructed:
            self.optimizer.state = state

    # -- what a training loop reads ----------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """s, scale-invariant iterations done: the sum of the gains of all steps (`Scaling.progress`)."""
        return self._progress

    @property
    def finished(self) -> bool:
        """Whether the budget is used up; never without a budget."""
        return self._ends_at(self._progress)

    @property
    def gain(self) -> float:
        """ρ of the last step: the factor that was put on the base learning rate."""
        return self._gain

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
        """Takes in the gradient of one micro-batch; every `accumulate`-th call is an optimizer step.

        Args:
            closure: computes the loss and the gradients, called once.

        Returns:
            The closure's loss.

        Raises:
            NonFiniteError: on every rank, when one rank's numbers are no longer finite.
            DisagreementError: on every rank, when learning rates, steps or what else must be equal differ between the ranks.
            CommunicationError: another rank ended, or did not come.
        """
        refuse_state_makers()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            with torch.no_grad():
                self._take_gradient()
        except BaseException:
            # GradScaler takes its attributes away only after a step that succeeds, and would use them in the next one.
            vars(self).pop("found_inf", None)
            vars(self).pop("grad_scale", None)
            raise
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

    def request_stop(self) -> None:
        """Asks all ranks to stop, for example from a signal handler; see `stop_requested`."""
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the averaged buffer is laid out once."""
        if self._constructed:
            raise ValueError(
                f"parameters cannot be added to a {type(self).__name__}: give the wrapped optimizer all its parameter groups, "
                "then wrap it"
            )

    def skip_synchronize(self) -> NoReturn:
        """Refused: Horovod's optimizer has it, to clip gradients after they were averaged; here, `max_norm` clips them.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"a {type(self).__name__} has no gradients to wait for before a step: delete skip_synchronize() and the "
            "synchronize() before the step. Clip with max_norm=…, or after scaler.unscale_(optimizer) as with any torch optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and under "hvdlocal" this rank's own; different on every rank inside a round."""
        refuse_state_makers()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict: dict[str, Any] = {**self.optimizer.state_dict(), "hvdlocal": self._own_state()}
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a `state_dict` of the same rank of a run with as many ranks.

        Raises:
            ValueError: the state is not one of this class, or of another number of ranks in the middle of a round.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        own = state_dict.get("hvdlocal")
        if own is None or own.get("class") != type(self).__name__:
            raise ValueError(
                f"this state is not that of a {type(self).__name__} (it is of {own['class'] if own else 'a bare optimizer'}): "
                "load it into what saved it"
            )
        if own["version"] != STATE_VERSION:
            raise ValueError(f"this state has version {own['version']}; this hvdlocal reads version {STATE_VERSION}")
        if (saved := own.get("optimizer", inside := type(self.optimizer).__name__)) != inside:
            raise ValueError(
                f"this state is that of a {type(self).__name__} around {saved}, and here it is around {inside}: build the same "
                "optimizer, or begin without its state"
            )
        elsewhere = own["rank"] != self.communicator.rank or own["num_workers"] != self.communicator.size
        if elsewhere and (own["accumulated"] or own.get("steps_in_round")):
            raise ValueError(
                f"this state was saved in the middle of a round by rank {own['rank']} of {own['num_workers']} and cannot be "
                f"continued by rank {self.communicator.rank} of {self.communicator.size}: load each rank's own, or save after "
                "synchronize()"
            )
        if own["accumulated"] and own["accumulate"] != self.accumulate:
            raise ValueError(
                f"this state was saved in the middle of an accumulation of {own['accumulate']} micro-batches and cannot be "
                f"continued with accumulate={self.accumulate}"
            )
        self._check_moments(state_dict)
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "hvdlocal"})
        self._load_own_state(own)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _check_moments(self, state_dict: dict[str, Any]) -> None:
        """Refuses moments that have another shape than their parameter: torch's optimizers would fail at the next step."""
        if not type(self.optimizer).__module__.startswith("torch.optim."):
            return  # others keep moments of a lower rank under the same names
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, parameters, strict=False):  # torch itself compares the lengths
            for name, moment in state_dict["state"].get(key, {}).items():
                if name in _MOMENTS and isinstance(moment, torch.Tensor) and moment.shape != p.shape:
                    raise ValueError(
                        f"this state is that of another model: its {name} of shape {tuple(moment.shape)} belongs to a parameter "
                        f"of shape {tuple(p.shape)} here"
                    )

    def load_averaged_state_dict(self, state_dict: dict[str, Any], progress: float) -> None:
        """Continues from the state of a run with another number of ranks, after loading the average of its replicas.

        The round that was under way counts as ended by that averaging, and its unfinished statistics and micro-batches are
        dropped. The moving averages of G and σ² stay: they are those of one micro-batch of one worker.

        Args:
            state_dict: any old rank's, with the moments that all ranks are to start from; the same on every rank.
            progress: `progress` of the old run in units of this one, whose steps stand for another number of samples.
        """
        own = {**state_dict.get("hvdlocal", {}), "progress": progress, "rank": self.communicator.rank}
        own |= {"num_workers": self.communicator.size, "loss_count": 0, "accumulated": {}, "overflowed": False}
        own["loss_sum"] = torch.zeros((), dtype=torch.float32, device="cpu")
        self.load_state_dict({**state_dict, "hvdlocal": {**own, **self._after_averaging(own)}})

    # -- for the two optimizers --------------------------------------------------------------------------------------

    def _after_averaging(self, own: dict[str, Any]) -> dict[str, Any]:
        """What an averaging in another number of ranks changes of a state."""
        raise NotImplementedError

    _accumulated: GradientBuffer | None

    def _take_gradient(self) -> None:
        raise NotImplementedError

    def _own_state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "class": type(self).__name__,
            "num_workers": self.communicator.size,
            "rank": self.communicator.rank,
            "optimizer": type(self.optimizer).__name__,
            "accumulate": self.accumulate,
            "progress": self._progress,
            "gain": self._gain,
            "statistics": self._smoothed.state_dict(),
            "loss": self._loss,
            "loss_sum": self._loss_sum.clone(),
            "loss_count": self._loss_count,
            "accumulated": self._accumulated.state() if self._accumulated else {},
            "overflowed": self._overflowed,
            "kept_buffers": self.kept_buffers,
        }

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self._progress = own["progress"]
        self._gain = own["gain"]
        self._smoothed.load_state_dict(own["statistics"])
        self._loss = own["loss"]
        self._loss_sum.copy_(own["loss_sum"])
        self._loss_count = own["loss_count"]
        if self._accumulated:
            self._accumulated.load_state(own["accumulated"])
        self._overflowed = own["overflowed"]

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be copied or pickled: save its state_dict()"
        )

    def _ends_at(self, progress: float) -> bool:
        """Whether the budget is used up there, rounding errors of the sum of gains aside."""
        return self.budget is not None and progress >= self.budget * (1 - 1e-9)

    def _check_parameters(self) -> None:
        """Refuses parameters that came into training, or into a trained one's place, after the optimizer was built."""
        for (module, name), p in zip(self._owners, self._parameters, strict=True):
            present = getattr(module, name, None)
            if present is p:
                continue
            # Pruning and weight norm make the name that of a tensor which they compute, and keep the parameter under another.
            if isinstance(present, torch.nn.Parameter) or not any(p is one for one in self.model.parameters()):
                raise RuntimeError(
                    f"{name!r} of a {type(module).__name__} was replaced after the {type(self).__name__} was built "
                    "(load_state_dict(assign=True), assigning a parameter), and what is in its place is not trained. Build the "
                    f"{type(self).__name__} last, and change parameters in place."
                )
        known = {id(p) for p in self._parameters}
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad and id(p) not in known:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} was frozen, or in no parameter group, when the "
                        f"{type(self).__name__} was built and trains now, so it is not averaged. Build the optimizer after "
                        "unfreezing and after adding parameters."
                    )

    def _needs_dense_gradients(self) -> str | None:
        """The setting with which gradients must be dense, if there is one."""
        if self.accumulate > 1:
            return f"accumulate={self.accumulate}"
        if self._max_norm is not None:
            return f"max_norm={self._max_norm}"
        return type(self.scaling).__name__ if self.scaling.uses_statistics else None

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _unscale(self) -> None:
        """Divides by GradScaler's factor, and notes an overflow of this micro-batch."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return
        self._overflowed |= bool(found_inf)  # 0, a plain number, when no parameter has a gradient
        scale = getattr(self, "grad_scale", None)  # None when the loop has called unscale_ itself
        if scale is not None and (gradients := self._gradients()):
            torch._foreach_mul_(gradients, 1 / scale)

    def _scaling_context(self, period: int, progress: float | None = None) -> ScalingContext:
        return ScalingContext(
            num_workers=self.communicator.size,
            accumulate=self.accumulate,
            period=period,
            progress=self._progress if progress is None else progress,
            budget=self.budget,
            grad_sqr=self.grad_sqr,
            grad_var=self.grad_var,
        )

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
        """Steps the wrapped optimizer at gain times the groups' learning rates, unless a micro-batch overflowed."""
        gain = self.scaling.gain(now)
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        if not self._overflowed:
            self.stepping = True
            try:
                with self._scaled_lr(gain):
                    self.optimizer.step()
            finally:
                self.stepping = False
        self._overflowed = False
        self._gain = gain
        self._progress += self.scaling.progress(now)

    @contextmanager
    def _scaled_lr(self, gain: float) -> Iterator[None]:
        base: list[Any] = [group.get("lr") for group in self.param_groups]
        for i, lr in enumerate(base):
            if not isinstance(lr, torch.Tensor):  # which would have to be waited for
                check_rate(i, lr)
        scaled = [lr * gain for lr in base]
        for group, lr in zip(self.param_groups, scaled, strict=True):
            group["lr"] = lr
        try:
            yield
        finally:
            for group, lr, applied in zip(self.param_groups, base, scaled, strict=True):
                # What the optimizer itself has written is the rate that it applies next, gain included.
                group["lr"] = lr if _untouched(group["lr"], applied) else group["lr"] / gain

    def _rates(self) -> list[float]:
        """The base learning rates of the parameter groups.

        Raises:
            ValueError: one is not a number that can be stepped with.
        """
        return [check_rate(i, group.get("lr")) for i, group in enumerate(self.param_groups)]

    def _named_rates(self) -> dict[str, float]:
        return {f"learning rate of group {i}": rounded(rate) for i, rate in enumerate(self._rates())}

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

    def _check_equality(self, present: float, digest: list[float]) -> None:
        """Reads the part of a collective that tells whether all ranks take part and agree.

        Args:
            present: how many ranks take part.
            digest: the sums of the ranks' digests.
        """
        size = self.communicator.size
        if size == 1:
            return
        if round(present) != size:
            raise CommunicationError(
                f"{size - round(present)} of {size} ranks took no part in an averaging and counted as zeros, most likely by "
                "hvd.join(): delete that call, and give every rank equally many steps."
            )
        self._digest.check(digest)

    def _constants(self) -> dict[str, torch.Tensor]:
        """What ought to stay equal on all ranks without being averaged: frozen parameters and integer buffers, by name.

        Left out are buffers that the user has called local, zero points that a layer estimates from its data for quantisation,
        tables whose rows are rescaled when they are looked up, and batch norm's count of batches, which has no effect unless
        momentum is None.
        """
        parameters = dict(self.model.named_parameters())
        rescaled = renormalised_weights(self.model, parameters.values())
        frozen: dict[str, torch.Tensor] = {
            name: p
            for name, p in parameters.items()
            if not (p.requires_grad or any(p is one for one in rescaled.values()))
        }
        counts = {
            f"{name}.num_batches_tracked".lstrip(".")
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.momentum is not None
        }
        estimates = {
            id(buffer)
            for module in self.model.modules()
            if any(cls.__module__.startswith("torch.ao.quantization.") for cls in type(module).__mro__)
            for buffer in module.buffers(recurse=False)
        }
        integers = {
            name: buffer
            for name, buffer in self.model.named_buffers()
            if not (buffer.is_floating_point() or buffer.is_complex())
            and name not in counts
            and id(buffer) not in estimates
            and policy_by_name(name, self._buffers) != "local"
        }
        return frozen | integers

    def _buffers_to_average(self) -> dict[str, torch.Tensor]:
        return averaged_buffers(self.model, self._buffer_policies)

    def _average_buffers(self, buffers: Mapping[str, torch.Tensor], faulty: bool = False) -> int:
        """Averages buffers outside of any arena; one collective, or none without buffers.

        Returns:
            On how many ranks something was `faulty`; the buffers are then left as they were.

        Raises:
            NonFiniteError: on all ranks, when a buffer of one is not finite; it is then the average of the other ranks.
        """
        if not buffers:
            return int(faulty)
        bad = [name for name, buffer in buffers.items() if not buffer.isfinite().all()]
        device = self._parameters[0].device
        notices = torch.tensor([float(faulty), float(bool(bad))], dtype=torch.float64, device=device)
        flat = torch.cat([part.reshape(-1).double() for part in [*buffers.values(), notices]])
        *parts, notices = flat.split([part.numel() for part in [*buffers.values(), notices]])
        if bad:
            flat[: -len(notices)].zero_()
        if self.communicator.size > 1:
            self._timed_sum(flat, "hvdlocal.buffers")
        faulty_ranks, bad_ranks = map(round, notices.tolist())
        healthy = self.communicator.size - bad_ranks
        if healthy and not faulty_ranks:
            for buffer, part in zip(buffers.values(), parts, strict=True):
                buffer.copy_(part.div_(healthy).view(buffer.shape))
        if bad_ranks:
            self._raise_nonfinite_buffers(bad, healthy)
        return faulty_ranks

    def _scale(self, parts: list[torch.Tensor], factor: torch.Tensor | float) -> torch.Tensor:
        """Multiplies in place, and looks for NaN and infinity: GradScaler's kernel does both in one pass.

        Returns:
            Positive where there is such a number, else 0; float32 (1,), on the device and overwritten by the next call.
        """
        self._nonfinite_found.zero_()
        self._factor.fill_(factor)
        torch._amp_foreach_non_finite_check_and_unscale_(parts, self._nonfinite_found, self._factor)
        return self._nonfinite_found

    def _timed_sum(self, tensor: torch.Tensor, name: str) -> None:
        start = time.perf_counter()
        self.communicator.sum_(tensor, name)
        self.seconds_averaging += time.perf_counter() - start

    def _raise_nonfinite(self, mine: bool, what: str) -> None:
        ranks = [rank for rank, bad in enumerate(self.communicator.gather(mine, "hvdlocal.nonfinite")) if bad]
        listed = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
        where = (
            f"on rank{'s' if len(ranks) > 1 else ''} {listed} of {self.communicator.size}"
            if ranks
            else "in the sum over all ranks"
        )
        raise NonFiniteError(
            f"NaN or infinity {where} at progress {self._progress:.1f} (gain {self._gain:.3g}): {what} Lower the learning rate, "
            "clip gradients (max_norm), or look at the data of that rank."
        )

    def _raise_nonfinite_buffers(self, mine: list[str], healthy: int) -> None:
        """Raises the error for averaged buffers that are not finite, of which `mine` are this rank's; a collective."""
        names = self.communicator.gather(mine, "hvdlocal.nonfinite_buffers")
        found = [
            f"{own[0]!r} on rank {rank}" + (f" and {len(own) - 1} more there" * (len(own) > 1))
            for rank, own in enumerate(names)
            if own
        ]
        where = "; ".join(found[:4]) + (f"; and on {len(found) - 4} more ranks" if len(found) > 4 else "")
        name = next((own[0] for own in names if own), "…")
        state = "they are now the average of the other ranks" if healthy else "no rank holds usable ones"
        raise NonFiniteError(
            f"NaN or infinity at progress {self._progress:.1f} in averaged buffers: {where or 'in their sum over all ranks'}: "
            f"{state}. Look at the data of that rank, or keep such a buffer out of the average: buffers={{{name!r}: 'local'}}."
        )

    def _start_together(self, settings: dict[str, Any], flat: torch.Tensor, in_flat: set[int]) -> None:
        """Refuses ranks with different settings, then makes rank 0's model everyone's.

        Args:
            settings: more that must be equal, by name.
            flat: holds the tensors `in_flat`, to be sent in one piece.
            in_flat: ids of the parameters and buffers in `flat`.
        """
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        shapes = repr([(name, *describe_layout(tensor)) for name, tensor in tensors.items()])
        facts = {
            "optimizer class": type(self).__name__,
            "wrapped optimizer": type(self.optimizer).__name__,
            "scaling": repr(self.scaling),
            "accumulate": self.accumulate,
            "budget": self.budget,
            "buffers": self._buffers,
            "max_norm": self._max_norm,
            "parameters to train": len(self._parameters),
            "model (names, shapes, dtypes)": hashlib.sha256(shapes.encode()).hexdigest()[:16],
            "parameters with optimizer state": len(self.state),
            "torch": torch.__version__,
            **settings,
        }
        for i, group in enumerate(self.param_groups):
            facts |= {f"param group {i} {key}": _plain(value) for key, value in group.items() if key != "params"}
        require_agreement(self.communicator, facts, "hvdlocal.settings")
        self.communicator.broadcast_(flat, "hvdlocal.start")
        for name, tensor in tensors.items():
            for i, part in enumerate(memory_of(tensor)):
                if id(tensor) not in in_flat and part.numel():
                    self.communicator.broadcast_(part, f"hvdlocal.start.{name}.{i}")


def owner_of(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    path, _, own_name = name.rpartition(".")
    return model.get_submodule(path), own_name


def _plain(value: Any) -> Any:
    """A setting without its device and its place in memory, which differ between ranks."""
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _untouched(now: Any, applied: Any) -> bool:
    """Whether a learning rate is still the one that was applied, a number or a fresh tensor."""
    if isinstance(now, torch.Tensor) or isinstance(applied, torch.Tensor):
        return now is applied and now._version == 0
    return bool(now == applied)


def _trainable(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> tuple[list[str], list[torch.nn.Parameter]]:
    """The parameters to train, in the model's order; tied weights once, frozen ones left out."""
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    in_model = dict(model.named_parameters())
    strangers = len(in_optimizer - {id(p) for p in in_model.values()})
    if strangers:
        raise ValueError(
            f"{strangers} of the optimizer's {len(in_optimizer)} parameters are not the model's: build the optimizer from "
            "model.parameters() of the same model, after moving the model to its device"
        )
    trained = {name: p for name, p in in_model.items() if id(p) in in_optimizer and p.requires_grad}
    if not trained:
        raise ValueError("the optimizer holds no parameter that requires a gradient: there is nothing to train")
    for name, p in trained.items():
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(f"parameter {name!r} has no shape yet: run one batch through the model before wrapping")
    for name, p in trained.items():
        if p.dtype != torch.float32:
            raise ValueError(
                f"parameter {name!r} is {p.dtype}; hvdlocal averages float32. Keep parameters in float32 and use torch.autocast "
                "for bfloat16 or float16."
            )
    devices = {p.device for p in trained.values()}
    if len(devices) > 1 or next(iter(devices)).type == "meta":
        raise ValueError(
            f"the parameters to train lie on {', '.join(sorted(map(str, devices)))}: a replica must lie on one device"
        )
    return list(trained), list(trained.values())


def _check_arguments(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module,
    scaling: Scaling,
    accumulate: int,
    buffers: Buffers,
    budget: float | None,
    max_norm: float | None,
) -> None:
    if isinstance(optimizer, ReplicaOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"give a torch.optim.Optimizer to wrap, not a {type(optimizer).__name__}")
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model is {'the class ' + model.__name__ if isinstance(model, type) else 'a ' + type(model).__name__}: give the "
            "torch.nn.Module whose parameters the optimizer steps; several go into a torch.nn.ModuleList"
        )
    for i, group in enumerate(optimizer.param_groups):
        check_rate(i, group.get("lr"))
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times per step, which is not supported"
        )
    if not isinstance(scaling, Scaling):
        raise ValueError(f"scaling={scaling!r}: give a rule such as hvdlocal.LocalAdaScale() or NoScaling()")
    if not (isinstance(accumulate, Integral) and accumulate >= 1):
        raise ValueError(f"accumulate={accumulate!r}: must be a whole number of at least 1")
    check_policies(buffers)
    if budget is not None and not (isinstance(budget, Real) and 0 < budget < math.inf):
        raise ValueError(f"budget={budget!r}: a positive number of scale-invariant iterations, or None")
    if max_norm is not None and not (isinstance(max_norm, Real) and max_norm > 0):
        raise ValueError(f"max_norm={max_norm!r}: must be a positive number, or None")
