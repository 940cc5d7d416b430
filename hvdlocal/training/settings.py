"""What is declared about a setting where it stands: facts in `Annotated`, beside its type, its default and its text.

An example: `threads: Annotated[int | None, Range(1, 1024), Affects.EXECUTION] = None`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    Arguments = dict[str, Any]
    Named = list[str | dict[str, Any]]
else:
    Arguments, Named = dict, list
"""Arguments of a user's own code, by name, and lists of names, some with arguments. The bare types keep jsonargparse from looking
into the values: in a `dict[str, Any]` it imports and builds whatever a `class_path` names."""

LARGE = 1e30
"""Larger numbers would overflow float32 in a product."""


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`.

    Args:
        above: leave out `low` itself.
        below: leave out `high` itself.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def holds(self, number: float) -> bool:
        """Whether a number is in it; NaN never is."""
        over = number > self.low if self.above else number >= self.low
        return over and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low, high = f"{self.low:,}", "1e30" if self.high == LARGE else f"{self.high:,}"
        if self.above and self.below:
            return f"between {low} and {high}"
        if self.above:
            return f"{'positive' if self.low == 0 else f'above {low}'}, and at most {high}"
        return f"at least {low}, and below {high}" if self.below else f"from {low} to {high}"


class Affects(enum.Enum):
    """What another value of a setting changes."""

    RESULT = "result"
    """What the run computes: a run that is continued keeps the value. So it is unless something else is declared."""
    EXECUTION = "execution"
    """Where and how the run computes it: the value may change when the run is continued."""
    RECORDS = "records"
    """What is kept of the run, and when it ends: the value may also change, and reports do not compare runs by it."""


@dataclass(frozen=True)
class UsedIf:
    """The runs in which a setting has an effect.

    Args:
        holds: whether a run is one of them, from its whole configuration.
    """

    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class NeededBy(UsedIf):
    """The same for a setting without a default that goes with some values of the first setting of its section.

    Args:
        choices: the values that need the setting; with every other value it is refused.
    """

    choices: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """All that is declared about a setting, but for its text."""

    type: Any
    default: Any
    range: Range | None
    affects: Affects
    used_if: tuple[UsedIf, ...]

    @property
    def nullable(self) -> bool:
        """Whether it may be null."""
        return NoneType in get_args(self.type)

    @property
    def takes_mapping(self) -> bool:
        """Whether it may be a mapping of names to values."""
        return any((get_origin(kind) or kind) is dict for kind in (self.type, *get_args(self.type)))

    @property
    def takes_any(self) -> bool:
        """Whether its lists and mappings may hold further lists and mappings, such as arguments of a user's function."""
        return self.type in (dict, list)

    @property
    def resumable(self) -> bool:
        """Whether it may change when a run is continued."""
        return self.affects is not Affects.RESULT

    @property
    def compared(self) -> bool:
        """Whether reports compare runs by it."""
        return self.affects is not Affects.RECORDS

    @property
    def needed_by(self) -> tuple[str, ...]:
        """The values of its section's first setting that need it."""
        return next((condition.choices for condition in self.used_if if isinstance(condition, NeededBy)), ())

    def has_effect(self, configuration: Any) -> bool:
        """Whether it changes anything in a run."""
        return all(condition.holds(configuration) for condition in self.used_if)


def settings_of(kind: type, prefix: str = "") -> dict[str, Setting]:
    """The settings of a dataclass of dataclasses by their dotted names, in the order of their declaration."""
    found: dict[str, Setting] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], prefix + field.name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= settings_of(hint, f"{name}.")
        else:
            made = field.default_factory
            found[name] = _setting(hint, field.default if made is dataclasses.MISSING else made())
    return found


_Fact = TypeVar("_Fact")


def _setting(hint: Any, default: Any) -> Setting:
    kind, *facts = get_args(hint) if get_origin(hint) is Annotated else (hint,)

    def declared(what: type[_Fact]) -> tuple[_Fact, ...]:
        return tuple(fact for fact in facts if isinstance(fact, what))

    return Setting(
        kind,
        default,
        range=next(iter(declared(Range)), None),
        affects=next(iter(declared(Affects)), Affects.RESULT),
        used_if=declared(UsedIf),
    )
