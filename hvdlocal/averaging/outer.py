"""The outer optimizer: it steps from the last common parameters in the direction of the mean of a round's replicas.

With φ the parameters that all replicas began from, x̄ the mean of the replicas, and Δ = φ − x̄ in the place of a gradient, any
torch optimizer makes the next φ: Nesterov's momentum is DiLoCo (Douillard et al. 2023, Alg. 1), the heavy ball SlowMo (Wang et
al. 2020, Alg. 1). γ is its learning rate and β its momentum; γ = 1 with β = 0 is plain averaging.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from hvdlocal.averaging.islands import INSIDE, Islands
from hvdlocal.averaging.setup import hyperparameters
from hvdlocal.averaging.wrapper import WrappedOptimizer, scaled_rates

Outer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
"""Builds an outer optimizer for the one flat parameter φ, float32."""

SLOWMO_MOMENTA = {1: 0.0, 4: 0.2, 8: 0.5, 16: 0.6}
"""Tuned β of SlowMo, from so many workers on (FairScale's documentation of its SlowMo, for WMT16)."""

_REMEDY = "give another optimizer, such as hvdlocal.nesterov(), torch.optim.SGD or torch.optim.Adam"

_PIECE = 2**20  # elements that are compared at once, so that comparing needs little memory


@dataclass(frozen=True)
class OuterRule:
    """SGD with momentum as an outer optimizer.

    Attributes:
        name: "nesterov" or "slowmo".
        lr: γ > 0.
        momentum: β, 0 ≤ β < 1.
        nesterov: whether the momentum is Nesterov's.
        normalize: whether Δ is divided by the path of its round, Σ of the learning rates of its steps, and γ multiplied by it.
    """

    name: str
    lr: float
    momentum: float
    nesterov: bool
    normalize: bool

    def __post_init__(self) -> None:
        if not (isinstance(self.lr, Real) and 0 < self.lr < float("inf")):
            raise ValueError(f"{self.name}(lr={self.lr!r}): the outer learning rate must be a positive number")
        if not (isinstance(self.momentum, Real) and 0 <= self.momentum < 1):
            raise ValueError(f"{self.name}(momentum={self.momentum!r}): give 0 ≤ momentum < 1")

    def __call__(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Builds the optimizer."""
        nesterov = self.nesterov and self.momentum > 0  # of which torch's SGD accepts no other
        # With foreach, torch adds the momentum to the gradient in place; without it, to a copy.
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, nesterov=nesterov, foreach=True)


def nesterov(lr: float = 0.7, momentum: float = 0.5) -> OuterRule:
    """DiLoCo's outer optimizer: m ← β m + Δ, φ ← φ − γ (Δ + β m) (Douillard et al. 2023).

    The defaults are the best of the sweep in docs/outer.md, over runs of 10 to 40 rounds. For longer runs β = 0.9 is published.

    Args:
        lr: γ.
        momentum: β.
    """
    return OuterRule("nesterov", lr, momentum, nesterov=True, normalize=False)


def slowmo(momentum: float, lr: float = 1.0) -> OuterRule:
    """SlowMo's outer optimizer: u ← β u + Δ/S, φ ← φ − γ S u (Wang et al. 2020, Alg. 1, with S in the place of one rate).

    S is the sum of the learning rates of the round's steps. With a constant rate and a constant H it is SlowMo as published.

    Args:
        momentum: β; `default_slowmo_momentum` has one for the number of workers.
        lr: γ, the paper's slow learning rate α.
    """
    return OuterRule("slowmo", lr, momentum, nesterov=False, normalize=True)


def default_slowmo_momentum(num_workers: int) -> float:
    """β of SlowMo for K workers: 0 below 4, 0.2 from 4 on, 0.5 from 8 on, 0.6 from 16 on (see `SLOWMO_MOMENTA`)."""
    return max(beta for workers, beta in SLOWMO_MOMENTA.items() if workers <= max(num_workers, 1))


class OuterOptimizer:
    """Makes of the mean of a round's replicas the parameters from which all replicas go on.

    As long as it is SGD with learning rate 1 and nothing else, the mean is left as it is, and no memory is taken. In islands,
    each rank has its slice of φ and of the moments.

    Args:
        build: makes the torch optimizer.
        parameters: the flat parameters of this rank's replica; with islands of n, n slices of equal length.
        normalize: whether Δ is divided by the path of the round; None for what `build` says, if it is an `OuterRule`.
        islands: the islands of the ranks; None where every rank is a worker.

    Attributes:
        normalize: whether Δ is divided by the path of the round.
        path: Σ of the learning rates of the steps of the round under way; the same on all ranks.

    Raises:
        ValueError: `build` made something else than an optimizer of φ, one that cannot step φ, or one without a learning rate
            that is to be normalised.
    """

    def __init__(self, build: Outer, parameters: torch.Tensor, normalize: bool | None, islands: Islands | None) -> None:
        self._islands = islands
        self._start = self._slice(parameters)
        self._phi = torch.nn.Parameter(self._start)  # shares its memory until the first step needs one of its own
        self._optimizer = _built(build, self._phi)
        self._has_rule = isinstance(build, OuterRule)
        self.normalize = build.normalize if normalize is None and isinstance(build, OuterRule) else bool(normalize)
        if self.normalize and any("lr" not in group for group in self._groups):
            raise ValueError(
                "normalize_outer=True multiplies the outer learning rate by the path of a round, and "
                f"{type(self._optimizer).__name__} has no 'lr' in its parameter groups: give another optimizer, or "
                "normalize_outer=False"
            )
        self.path = 0.0
        self._path_of_mean = 0.0
        self._holds = False

    def __repr__(self) -> str:
        return f"{type(self._optimizer).__name__}({hyperparameters(self._optimizer)})"

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @property
    def _is_plain(self) -> bool:
        """Whether a step would make φ the mean."""
        plain = {"lr": 1, "momentum": 0, "weight_decay": 0, "maximize": False}
        return type(self._optimizer) is torch.optim.SGD and all(
            group[name] == value for group in self._groups for name, value in plain.items()
        )

    def replace_rule(self, rule: OuterRule) -> None:
        """Steps at the learning rate and with the momentum of another rule from now on."""
        for group in self._groups:
            group.update(lr=rule.lr, momentum=rule.momentum, nesterov=rule.nesterov and rule.momentum > 0)

    def begin_round(self) -> None:
        """Looks where the round begins; to be called when all replicas are equal and no mean is to be applied.

        It is φ, unless the training loop has loaded other parameters since.
        """
        if self._holds:
            if _differ(self._start, self._phi.data):
                self._phi.data.copy_(self._start)
        elif not self._is_plain:
            self._hold(self._start)

    def end_round(self) -> None:
        """Notes that the next mean is that of the round that ends now."""
        self._path_of_mean, self.path = self.path, 0.0

    def step_(self, mean: torch.Tensor) -> None:
        """Replaces the mean of the replicas by the next φ; with islands a collective inside of them.

        Args:
            mean: flat, like the parameters that this object was built with; the same bits on every rank.
        """
        own = self._slice(mean)
        path, self._path_of_mean = self._path_of_mean, 0.0
        if not self._holds or self._is_plain or (self.normalize and not path > 0):
            # Without a step, at a learning rate of 0, there is no direction to go on in either.
            if self._holds:
                self._phi.data.copy_(own)
            elif not self._is_plain:
                self._hold(own)
            return
        self._phi.grad = torch.sub(self._phi.data, own, out=own)
        if self.normalize:
            self._phi.grad.div_(path)
        with scaled_rates(self._groups, path) if self.normalize else nullcontext():
            self._optimizer.step()
        self._phi.grad = None
        own.copy_(self._phi.data)
        if self._islands:
            self._islands.inside.share_slices_(mean, INSIDE)

    # -- state -------------------------------------------------------------------------------------------------------

    def paths(self) -> tuple[float, float]:
        """The paths of the round under way and of the round whose mean comes next."""
        return self.path, self._path_of_mean

    def load_paths(self, paths: Sequence[float]) -> None:
        """The reverse of `paths`."""
        self.path, self._path_of_mean = paths

    def join_paths(self) -> None:
        """Makes one round of the two whose means were not applied, for a run that goes on from the averaged replicas."""
        self.path += self._path_of_mean
        self.end_round()

    def state(self) -> dict[str, Any]:
        """This rank's part of what all islands, or all ranks, hold alike; empty while that is nothing.

        Returns:
            φ, float32, the state of the torch optimizer, and its class.
        """
        if not self._holds:
            return {}
        return {
            "phi": self._phi.data,
            "optimizer": self._optimizer.state_dict(),
            "class": type(self._optimizer).__name__,
        }

    def load_state(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Continues from the parts of the ranks of one island, from the one part of a run without islands, or from this rank's.

        Args:
            parts: `state` of these ranks, in their order; nothing is loaded where all are empty.

        Raises:
            ValueError: the parts do not make up these parameters, or are those of another optimizer.
        """
        parts = [part for part in parts if part]
        if not parts:
            return
        if (saved := parts[0]["class"]) != (here := type(self._optimizer).__name__):
            raise ValueError(
                f"this state is that of {saved} as the outer optimizer, and here it is {here}: build the same optimizer, or "
                "begin without its state"
            )
        is_own = [part["phi"].numel() for part in parts] == [self._phi.numel()]
        # A copy, as torch's optimizers use the tensors that they are given.
        part = copy.deepcopy(parts[0]) if is_own else self._slice_of_state(parts)
        if not self._holds:
            self._hold(self._start)
        self._phi.data.copy_(part["phi"])
        # A rule is what it was built with, such as SlowMo's β for another number of workers; else as torch's optimizers do it.
        groups = (self._optimizer.state_dict() if self._has_rule else part["optimizer"])["param_groups"]
        self._optimizer.load_state_dict({**part["optimizer"], "param_groups": groups})

    # -- inside --------------------------------------------------------------------------------------------------------

    def _slice_of_state(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Joins the slices of φ and of its moments that other islands held, and cuts out this rank's.

        Args:
            parts: `state` of the ranks of one island, in their order. They may be more or fewer than the ranks of an island here.

        Returns:
            `state`, as this rank would have it.

        Raises:
            ValueError: the parts are those of another number of parameters.
        """
        ranks = self._islands.inside.size if self._islands else 1
        saved, here = sum(part["phi"].numel() for part in parts), self._phi.numel() * ranks
        if abs(saved - here) >= 16 * max(len(parts), ranks):  # the flat buffer is padded to whole slices
            raise ValueError(
                f"the state of the outer optimizer is that of a model with {saved} parameters (padding included), and here there "
                f"are {here}"
            )

        def cut(slices: Sequence[torch.Tensor]) -> torch.Tensor:
            whole = torch.cat([one.to(self._phi.device) for one in slices])
            whole = torch.nn.functional.pad(whole, (0, here - saved))  # which cuts off where that is negative
            return self._slice(whole).clone()

        states = [part["optimizer"]["state"].get(0, {}) for part in parts]  # of φ, the only parameter
        moments = {
            name: cut([state[name] for state in states])
            if isinstance(value, torch.Tensor) and value.shape == parts[0]["phi"].shape
            else value
            for name, value in states[0].items()
        }
        optimizer = {**parts[0]["optimizer"], "state": {0: moments} if moments else {}}
        return {"phi": cut([part["phi"] for part in parts]), "optimizer": optimizer}

    def _slice(self, flat: torch.Tensor) -> torch.Tensor:
        if self._islands is None:
            return flat
        inside = self._islands.inside
        return flat.split(flat.numel() // inside.size)[inside.rank]

    def _hold(self, start: torch.Tensor) -> None:
        self._phi.data = start.clone()
        self._holds = True


def _built(build: Outer, phi: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The optimizer that `build` makes for φ."""
    if not callable(build) or build in (nesterov, slowmo):
        raise ValueError(
            f"outer={build!r}: give a function that builds the outer optimizer, such as hvdlocal.nesterov() "
            "or lambda parameters: torch.optim.SGD(parameters, lr=0.7)"
        )
    try:
        optimizer = build([phi])
    except (RuntimeError, ValueError) as error:  # Muon, for instance, takes matrices alone
        raise ValueError(
            f"outer: the function fails for a flat float32 parameter on {phi.device} ({_reason(error)}): {_REMEDY}"
        ) from error
    if isinstance(optimizer, WrappedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"outer: the function returned {optimizer!r}; it must return a torch.optim.Optimizer")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(held) != 1 or held[0] is not phi:
        raise ValueError(
            "outer: the function built an optimizer of other parameters than the one that it was given: the outer optimizer "
            "steps the flat parameter of its argument, and nothing else"
        )
    if not isinstance(build, OuterRule):  # whose SGD is one that can
        _try_step(optimizer, phi)
    return optimizer


def _try_step(optimizer: torch.optim.Optimizer, phi: torch.nn.Parameter) -> None:
    """Takes a step with a copy of an optimizer on a copy of φ, to find now what would fail at the first average.

    The copies are as large as φ and its moments, and do not stay. An optimizer that cannot be copied is not tried.

    Raises:
        ValueError: the step fails.
    """
    trial = torch.nn.Parameter(phi.detach().clone())
    trial.grad = torch.zeros_like(phi)
    copied = object.__new__(type(optimizer))
    try:
        # Of torch's optimizers, `deepcopy` leaves out the attributes that a subclass has added.
        vars(copied).update(copy.deepcopy(vars(optimizer), {id(phi): trial}))
    except Exception:
        return
    try:
        with torch.no_grad():
            type(optimizer).step(copied)  # not what a scheduler has put in its place, which steps the original
    except Exception as error:
        settings = ("capturable", "differentiable")
        given = [name for name in settings if any(group.get(name) for group in optimizer.param_groups)]
        raise ValueError(
            f"outer: {type(optimizer).__name__} cannot step a flat float32 parameter on {phi.device} by its gradient alone "
            f"({_reason(error)}): " + (f"build it without {' and '.join(given)}" if given else _REMEDY)
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two flat tensors differ by more than the rounding errors of a change that was undone."""
    if torch.equal(one, other):  # as nearly always; on a CPU `allclose` takes 25 times as long
        return False
    return not all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)
        for a, b in zip(one.split(_PIECE), other.split(_PIECE), strict=True)
    )
