"""K workers of Local SGD simulated in NumPy, in float64 and without communication: every replica after every step.

`Workers` follows the published equations alone and shares no code with hvdlocal, so that the two can be compared. The problems
have gradients that are written by hand.

Notation: θ a replica, φ the point of the last average that was applied, H the steps of a round, τ the steps between the end of a
round and the application of its average, S = Σ lr over the steps of the round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


# -- problems --------------------------------------------------------------------------------------------------------


class Quadratic:
    """f(θ) = ½ Σ a_j (θ_j − c_j)², each gradient with noise of its own.

    Args:
        seed: of the curvatures a, the minimum c, the start and the noise.
        size: numbers in θ.
    """

    def __init__(self, seed: int, size: int = 7) -> None:
        random = np.random.default_rng(seed)
        self.seed = seed
        self.curvatures = random.uniform(0.2, 2.0, size)
        self.minimum = random.normal(size=size)
        self.start: Vector = random.normal(size=size)

    def noise(self, rank: int, batch: int) -> Vector:
        """The noise of a rank's micro-batch, (size,)."""
        return np.random.default_rng((self.seed, rank, batch)).normal(size=self.start.size)

    def gradient(self, theta: Vector, rank: int, batch: int) -> Vector:
        """The gradient at `theta` that a rank computes from its micro-batch, (size,)."""
        return self.curvatures * (theta - self.minimum) + self.noise(rank, batch)


class Network:
    """One hidden layer, y = W₂ tanh(W₁ x + b₁) + b₂, and half the squared error, averaged over the batch.

    θ holds W₁, b₁, W₂ and b₂, each row by row.

    Args:
        seed: of the start and the data. The targets of every rank are shifted, so that the ranks pull apart.
        widths: numbers in x, in the hidden layer, and in y.
        batch_size: samples of a micro-batch.
    """

    def __init__(self, seed: int, widths: tuple[int, int, int] = (3, 4, 2), batch_size: int = 5) -> None:
        self.seed, self.widths, self.batch_size = seed, widths, batch_size
        inputs, hidden, outputs = widths
        self.shapes = ((hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
        self.start: Vector = np.random.default_rng(seed).normal(size=sum(int(np.prod(s)) for s in self.shapes))

    def data(self, rank: int, batch: int) -> tuple[Vector, Vector]:
        """x, (batch_size, inputs), and the targets, (batch_size, outputs), of a rank's micro-batch."""
        random = np.random.default_rng((self.seed, rank, batch))
        x = random.normal(size=(self.batch_size, self.widths[0]))
        return x, random.normal(loc=rank, size=(self.batch_size, self.widths[2]))

    def split(self, theta: Vector) -> list[Vector]:
        """W₁, b₁, W₂ and b₂ as views of `theta`."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        return [part.reshape(shape) for part, shape in zip(np.split(theta, ends[:-1]), self.shapes, strict=True)]

    def gradient(self, theta: Vector, rank: int, batch: int) -> Vector:
        """The gradient at `theta` that a rank computes from its micro-batch, like θ."""
        w1, b1, w2, b2 = self.split(theta)
        x, target = self.data(rank, batch)
        h = np.tanh(x @ w1.T + b1)
        dy = (h @ w2.T + b2 - target) / len(x)
        dz = (dy @ w2) * (1 - h**2)
        return np.concatenate([(dz.T @ x).ravel(), dz.sum(0), (dy.T @ h).ravel(), dy.sum(0)])


# -- inner optimizers ------------------------------------------------------------------------------------------------


class SGD:
    """m ← βm + g, θ ← θ − lr·m, where g includes the weight decay."""

    def __init__(self, size: int, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.decays = {"momentum_buffer": momentum} if momentum else {}
        self.size = size
        self.reset()

    def reset(self) -> None:
        """Forgets the moments."""
        self.moments = {name: np.zeros(self.size) for name in self.decays}

    def step(self, theta: Vector, gradient: Vector, lr: float) -> Vector:
        """Returns θ after a step."""
        direction = gradient + self.weight_decay * theta
        if self.momentum:
            direction = self.moments["momentum_buffer"] = self.momentum * self.moments["momentum_buffer"] + direction
        return theta - lr * direction


class AdamW:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², θ ← (1 − lr·wd)θ − lr·m̂/(√v̂ + ε), with the bias of m and v removed."""

    def __init__(
        self, size: int, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, eps: float = 1e-8
    ) -> None:
        self.betas, self.weight_decay, self.eps = betas, weight_decay, eps
        self.decays = dict(zip(("exp_avg", "exp_avg_sq"), betas, strict=True))
        self.size = size
        self.reset()

    def reset(self) -> None:
        """Forgets the moments and the steps."""
        self.steps = 0
        self.moments = {name: np.zeros(self.size) for name in self.decays}

    def step(self, theta: Vector, gradient: Vector, lr: float) -> Vector:
        """Returns θ after a step."""
        self.steps += 1
        unbiased = []
        for (name, beta), sample in zip(self.decays.items(), (gradient, gradient**2), strict=True):
            self.moments[name] = beta * self.moments[name] + (1 - beta) * sample
            unbiased.append(self.moments[name] / (1 - beta**self.steps))
        return (1 - lr * self.weight_decay) * theta - lr * unbiased[0] / (np.sqrt(unbiased[1]) + self.eps)


# -- outer optimizers ------------------------------------------------------------------------------------------------


class OuterSGD:
    """m ← βm + Δ/s, φ ← φ − γs·m, or φ − γs(Δ/s + βm) with Nesterov's momentum; s is S if normalised, else 1."""

    def __init__(self, gamma: float, beta: float = 0.0, *, nesterov: bool = False) -> None:
        self.gamma, self.beta, self.nesterov = gamma, beta, nesterov
        self.m: Vector | float = 0.0

    def step(self, phi: Vector, delta: Vector, scale: float) -> Vector:
        """Returns φ after a step on Δ = `delta` with s = `scale`."""
        seen = delta / scale
        self.m = self.beta * self.m + seen
        return phi - self.gamma * scale * (seen + self.beta * self.m if self.nesterov else self.m)


class OuterAdam:
    """AdamW's equations without weight decay on Δ/s, with the rate γs."""

    def __init__(self, size: int, gamma: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> None:
        self.gamma = gamma
        self.adam = AdamW(size, betas, eps=eps)

    def step(self, phi: Vector, delta: Vector, scale: float) -> Vector:
        """Returns φ after a step on Δ = `delta` with s = `scale`."""
        return self.adam.step(phi, delta / scale, self.gamma * scale)


# -- the workers -----------------------------------------------------------------------------------------------------


@dataclass
class Average:
    """An average that was begun and is not applied yet.

    Attributes:
        sent: by worker, its θ at the end of the round.
        moments: by name and worker, what was sent of a moment that was due.
        path: S of the round.
        steps: taken since.
    """

    sent: dict[int, Vector]
    moments: dict[str, dict[int, Vector]]
    path: float
    steps: int = 0


@dataclass
class Workers:
    """K replicas that start equal.

    Args:
        start: θ of all of them.
        inner: their inner optimizers, one each.
        period: the rule for H: called with the rate of a round's first step and with the steps taken before it.
        outer: the outer optimizer; None replaces φ by the mean.
        normalize: whether the outer optimizer sees Δ/S and steps at γS.
        overlap: τ.
        mixing: α of θ ← αθ + (1 − α)φ; None carries the steps taken meanwhile, θ ← φ + (θ − sent).
        moment_periods: by name, the number of rounds after which a moment is averaged; other moments stay with their worker.
        reset: whether the moments start anew when an average is applied.
        budget: steps after which the run ends; its last round is shortened, and nothing of it overlaps.
        deaths: by round, 1 for the first, the workers that are gone when its average begins.

    Attributes:
        present: the workers that are left, ascending.
        num_workers: K of the last average that was applied.
    """

    start: Vector
    inner: Sequence[SGD | AdamW]
    period: Callable[[float, int], int]
    outer: OuterSGD | OuterAdam | None = None
    normalize: bool = False
    overlap: int = 0
    mixing: float | None = None
    moment_periods: Mapping[str, int] = field(default_factory=dict)
    reset: bool = False
    budget: int | None = None
    deaths: Mapping[int, Collection[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inner = list(self.inner)
        self.present = list(range(len(self.inner)))
        self.num_workers = len(self.inner)
        self.phi = self.start.copy()
        self.thetas = [self.start.copy() for _ in self.inner]
        self.pending: Average | None = None
        self.rounds = self.steps = self.steps_in_round = 0
        self.path = 0.0

    def step(self, gradients: Sequence[Vector], lr: float) -> None:
        """Takes a step of every worker that is left.

        Args:
            gradients: one for each of them, at its replica.
            lr: the rate of the step, gain included.
        """
        if self.steps_in_round == 0:
            self.round_length = self.period(lr, self.steps)
            if self.budget is not None:
                self.round_length = min(self.round_length, self.budget - self.steps)
        self.thetas = [
            inner.step(theta, g, lr) for inner, theta, g in zip(self.inner, self.thetas, gradients, strict=True)
        ]
        self.path += lr
        self.steps += 1
        self.steps_in_round += 1
        if self.pending:
            self.pending.steps += 1
            if self.pending.steps == self.overlap:
                self._apply()
        if self.steps_in_round == self.round_length:
            self._end_round(overlap=self.overlap > 0 and self.steps != self.budget)

    def synchronize(self) -> None:
        """Ends the round, if it has begun, and leaves nothing pending."""
        if self.steps_in_round:
            self._end_round(overlap=False)
        elif self.pending:
            self._apply()

    def _by_worker(self, values: Sequence[Vector]) -> dict[int, Vector]:
        return dict(zip(self.present, values, strict=True))

    def _lose(self, workers: Collection[int]) -> None:
        left = [k for k, worker in enumerate(self.present) if worker not in workers]
        self.thetas = [self.thetas[k] for k in left]
        self.inner = [self.inner[k] for k in left]
        self.present = [self.present[k] for k in left]

    def _end_round(self, overlap: bool) -> None:
        if self.pending:
            self._apply()
        self.rounds += 1
        self._lose(self.deaths.get(self.rounds, ()))
        due = [name for name, period in self.moment_periods.items() if self.rounds % period == 0]
        moments = {name: self._by_worker([inner.moments[name] for inner in self.inner]) for name in due}
        self.pending = Average(self._by_worker(self.thetas), moments, self.path)
        self.path, self.steps_in_round = 0.0, 0
        if not overlap:
            self._apply()

    def _apply(self) -> None:
        average, self.pending = self.pending, None
        assert average is not None
        self.num_workers = len(average.sent)
        mean = np.mean(list(average.sent.values()), axis=0)
        if self.outer is None:
            self.phi = mean
        else:
            self.phi = self.outer.step(self.phi, self.phi - mean, average.path if self.normalize else 1.0)
        for k, worker in enumerate(self.present):
            self.thetas[k] = self._joined(self.thetas[k], average.sent[worker], self.phi, 1.0, average.steps)
        for name, sent_moments in average.moments.items():
            mean = np.mean(list(sent_moments.values()), axis=0)
            for worker, inner in zip(self.present, self.inner, strict=True):
                sent = sent_moments[worker]
                found = self._joined(inner.moments[name], sent, mean, inner.decays[name], average.steps)
                # Without rounding, no second moment would be negative here.
                inner.moments[name] = np.maximum(found, 0) if name == "exp_avg_sq" else found
        if self.reset:
            for inner in self.inner:
                inner.reset()

    def _joined(self, now: Vector, sent: Vector, common: Vector, decay: float, steps: int) -> Vector:
        """What becomes of a worker's own value and the common one, `steps` after the worker's value was `sent`.

        A difference that a moment had then has decayed by `decay` a step since; parameters do not decay.
        """
        if self.mixing is not None and steps:
            return self.mixing * now + (1 - self.mixing) * common
        return now + decay**steps * (common - sent)
