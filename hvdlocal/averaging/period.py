"""How many local steps until the next averaging. Arithmetic on numbers, to be read beside the papers.

A rule is asked once a round, before its first step; the answer holds for the round. Symbols: H `period`, η the learning rate
that the round's first step applies, s `progress`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Integral


@dataclass(frozen=True)
class RoundStart:
    """What a rule may look at when a round starts.

    Attributes:
        lr: η, the learning rate that the round's first step applies.
        gain: how much of `lr` is the scaling rule's factor.
        progress: scale-invariant iterations done.
        loss: mean training loss of the last round over all workers; None before there is one.
        max_lr: the largest `lr` of any round so far, this one included: after a warm-up, its peak.
        first_loss: `loss` after the first round; None before.
        longest: steps of the longest round so far, 0 before the first; None where no rounds are counted.
    """

    lr: float
    gain: float = 1.0
    progress: float = 0.0
    loss: float | None = None
    max_lr: float | None = None
    first_loss: float | None = None
    longest: int | None = None


@dataclass(frozen=True, kw_only=True)
class PeriodRule:
    """A rule for H.

    Args:
        max_period: H never exceeds it; None for no limit. QSR's last rounds can be thousands of steps long.
    """

    max_period: int | None = None
    uses_loss = False

    def __post_init__(self) -> None:
        if self.max_period is not None:
            _at_least_one("max_period", self.max_period)

    def __call__(self, start: RoundStart) -> int:
        """H of the round that starts now, at least 1."""
        limits = [limit for limit in (self.max_period, self.limit(start)) if limit is not None]
        return min([max(self._period(start), 1), *limits])

    def limit(self, start: RoundStart) -> int | None:
        """The longest round that may follow the rounds so far; None for no limit but `max_period`.

        A learning rate that is tiny by mistake would otherwise mean a round without end. A fall of the learning rate to a tenth
        between two rounds is within the limit.
        """
        return None

    def _period(self, start: RoundStart) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class ConstantPeriod(PeriodRule):
    """The same H in every round."""

    period: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("period", self.period)

    def _period(self, start: RoundStart) -> int:
        return self.period


@dataclass(frozen=True)
class PostLocal(PeriodRule):
    """Synchronous first, local afterwards: H = 1 before `switch`, `period` from then on (Lin et al. 2020).

    Args:
        switch: progress (scale-invariant iterations) at which local steps begin.
        period: H from there on.
    """

    switch: float
    period: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("period", self.period)
        if not self.switch >= 0:
            raise ValueError(f"switch={self.switch}: a progress ≥ 0")

    def _period(self, start: RoundStart) -> int:
        return self.period if start.progress >= self.switch else 1


@dataclass(frozen=True)
class PowerRule(PeriodRule):
    """H = max(H_base, ⌊(coefficient/η)^exponent⌋) (Gu et al. 2023 and 2024).

    Exponent 2 is the Quadratic Synchronization Rule, see `QSR`; 1 is H = β/η; the authors found 3 to be worse.

    Args:
        coefficient: α (exponent 2) or β (exponent 1), in units of the learning rate.
        h_base: H_base, the smallest H.
        exponent: of the rule.
        warmup: progress up to which the learning rate rises. Rounds that start there take the H that `warmup_lr` gives: a
            small η at the start must not mean a long round.
        warmup_lr: the base learning rate at the end of the warm-up; given together with `warmup`.
    """

    coefficient: float
    h_base: int
    exponent: float = 2.0
    warmup: float = 0.0
    warmup_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("h_base", self.h_base)
        if not 0 < self.coefficient < math.inf:
            raise ValueError(f"the rule's coefficient must be a positive number, not {self.coefficient}")
        if not self.exponent > 0:
            raise ValueError(f"exponent={self.exponent}: must be positive")
        if self.warmup_lr is not None and not 0 < self.warmup_lr < math.inf:
            raise ValueError(f"warmup_lr={self.warmup_lr}: must be a positive learning rate")
        if (self.warmup > 0) != (self.warmup_lr is not None):
            raise ValueError(
                f"warmup={self.warmup} and warmup_lr={self.warmup_lr} belong together: until the progress `warmup`, H is that "
                "of `warmup_lr`, the learning rate that the warm-up leads to"
            )

    def _period(self, start: RoundStart) -> int:
        lr = start.lr
        if self.warmup_lr is not None and start.progress < self.warmup:
            lr = self.warmup_lr * start.gain
        if lr <= 0:
            if self.max_period is None:
                remedy = "let the schedule end above 0"
                if start.progress == 0:
                    remedy = "let the warm-up begin above 0, or tell the rule where it leads (warmup=…, warmup_lr=…)"
                raise ValueError(
                    f"the learning rate is {lr}, so (coefficient/η)^exponent has no value: {remedy}, or give the rule a "
                    "max_period"
                )
            return self.max_period
        try:
            exact = (self.coefficient / lr) ** self.exponent
        except OverflowError:
            exact = math.inf
        # A ratio that is a whole number on paper may come out a hair below it.
        return max(self.h_base, math.floor(min(exact * (1 + 1e-12), sys.maxsize)))

    def limit(self, start: RoundStart) -> int | None:
        """See `PeriodRule`: 10^exponent times the longest round so far, which for QSR is 100 times."""
        if start.longest is None or self.max_period is not None:
            return None
        # One more, since the longest round was rounded down.
        return math.ceil(min(10.0 ** min(self.exponent, 15), 1e15) * (max(start.longest, self.h_base) + 1))


def QSR(  # noqa: N802  (a rule, used like the classes beside it)
    alpha: float,
    h_base: int,
    *,
    warmup: float = 0.0,
    warmup_lr: float | None = None,
    max_period: int | None = None,
) -> PowerRule:
    """The Quadratic Synchronization Rule, H = max(H_base, ⌊(α/η)²⌋) (Gu, Lyu, Arora, Zhang, Huang, ICLR 2024).

    See `PowerRule` for the arguments; the authors' α was 0.0175 for ViT-B with AdamW.
    """
    return PowerRule(alpha, h_base, 2.0, warmup=warmup, warmup_lr=warmup_lr, max_period=max_period)


@dataclass(frozen=True)
class AdaComm(PeriodRule):
    """H = ⌈H_0 · sqrt(η_0 F / (η F_0))⌉ from the training loss F: shorter rounds as the loss falls (Wang & Joshi 2019).

    η_0 is the largest rate so far, which with a warm-up is its peak. Needs the losses: call `optimizer.record_loss(loss)` at
    every step.

    Args:
        first_period: H_0, the period of the first round.
        max_period: the cap; the loss may rise.
    """

    first_period: int
    uses_loss = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("first_period", self.first_period)

    def _period(self, start: RoundStart) -> int:
        if start.loss is None or start.first_loss is None or start.max_lr is None:
            return self.first_period
        if start.lr <= 0 or start.first_loss <= 0 or start.loss < 0:
            raise ValueError(
                f"AdaComm needs a positive learning rate and loss, but has lr={start.lr}, loss={start.loss}, "
                f"first loss={start.first_loss}"
            )
        ratio = start.max_lr * start.loss / (start.lr * start.first_loss)
        return math.ceil(self.first_period * math.sqrt(ratio))

    def limit(self, start: RoundStart) -> int | None:
        """See `PeriodRule`: 100 times the longest round so far."""
        if start.longest is None or self.max_period is not None:
            return None
        return 100 * (max(start.longest, self.first_period) + 1)


def _at_least_one(name: str, value: int) -> None:
    if not (isinstance(value, Integral) and value >= 1):
        raise ValueError(f"{name}={value!r}: must be a whole number of at least 1")
