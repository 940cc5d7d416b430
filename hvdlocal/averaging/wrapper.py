"""An optimizer around another one: groups, state and hooks in common, and steps at a scaled learning rate."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from hvdlocal.averaging.digest import rounded
from hvdlocal.averaging.guards import check_rate, guard_wrapped, refuse_state_makers

STATE_VERSION = 1

_MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What torch's optimizers call moments that have their parameter's shape."""


class WrappedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that shares `param_groups` and `state` with the optimizer it wraps.

    Learning-rate schedulers set the base learning rate γ in the groups, a step applies gain·γ, and the groups are left as they
    were. A subclass says what a call of `step` does (`_take_gradient`), and which state of its own lies in a `state_dict` under
    "hvdlocal" (`_own_state`, `_check_own_state`, `_load_own_state`).

    Args:
        optimizer: the optimizer to wrap; from now on nothing else may step it.
    """

    _step_supports_amp_scaling = True
    """GradScaler then calls `step` also after an overflow, so that no rank ever misses a collective. During the call this
    object has two more attributes, `found_inf` and `grad_scale`."""

    _parameters: list[torch.nn.Parameter]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if cls.__module__.startswith("horovod."):  # how hvd.DistributedOptimizer wraps an optimizer
            raise ValueError(
                f"hvd.DistributedOptimizer around a {cls.__name__} would average the gradients at every step: delete that line"
            )

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._constructed = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._constructed = True
        self._overflowed = False
        self.stepping = False
        guard_wrapped(optimizer, self)

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
        self._check_own_state(own)
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

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a {type(self).__name__} belongs to its process and cannot be copied or pickled: save its state_dict()"
        )

    # -- for the subclasses --------------------------------------------------------------------------------------------

    def _take_gradient(self) -> None:
        raise NotImplementedError

    def _own_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _check_own_state(self, own: dict[str, Any]) -> None:
        raise NotImplementedError

    def _load_own_state(self, own: dict[str, Any]) -> None:
        raise NotImplementedError

    def _step_at(self, gain: float) -> None:
        """Steps the wrapped optimizer at `gain` times the groups' learning rates, unless a micro-batch overflowed."""
        if not self._overflowed:
            self.stepping = True
            try:
                with scaled_rates(self.param_groups, gain):
                    self.optimizer.step()
            finally:
                self.stepping = False
        self._overflowed = False

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

    def _rates(self) -> list[float]:
        """The base learning rates of the parameter groups.

        Raises:
            ValueError: one is not a number that can be stepped with.
        """
        return [check_rate(i, group.get("lr")) for i, group in enumerate(self.param_groups)]

    def _trained_rate(self) -> float:
        """The largest base learning rate of the groups that train."""
        rates = self._rates()
        trained = [
            rate
            for group, rate in zip(self.param_groups, rates, strict=True)
            if any(p.requires_grad for p in group["params"])  # the rate of a frozen or empty group moves nothing
        ]
        return max(trained or rates)

    def _named_rates(self) -> dict[str, float]:
        return {f"learning rate of group {i}": rounded(rate) for i, rate in enumerate(self._rates())}


@contextmanager
def scaled_rates(groups: list[dict[str, Any]], factor: float) -> Iterator[None]:
    """Within, the learning rates of parameter groups are multiplied by a factor.

    Raises:
        ValueError: one is not a number that can be stepped with.
    """
    base: list[Any] = [group.get("lr") for group in groups]
    for i, lr in enumerate(base):
        if not isinstance(lr, torch.Tensor):  # which would have to be waited for
            check_rate(i, lr)
    scaled = [lr * factor for lr in base]
    for group, lr in zip(groups, scaled, strict=True):
        group["lr"] = lr
    try:
        yield
    finally:
        for group, lr, applied in zip(groups, base, scaled, strict=True):
            # What the optimizer itself has written is the rate that it applies next, the factor included.
            group["lr"] = lr if _untouched(group["lr"], applied) else group["lr"] / factor


def refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that evaluates the loss by itself.

    Raises:
        ValueError: it is such an optimizer.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times per step, which is not supported"
        )


def _untouched(now: Any, applied: Any) -> bool:
    """Whether a learning rate is still the one that was applied, a number or a fresh tensor."""
    if isinstance(now, torch.Tensor) or isinstance(applied, torch.Tensor):
        return now is applied and now._version == 0
    return bool(now == applied)
