"""Makes the callbacks that a configuration names."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from hvdlocal import import_path
from hvdlocal.communicator import Communicator, require_agreement, succeed_together
from hvdlocal.training.callbacks.base import Callback
from hvdlocal.training.config import TrainConfig

TRACKERS = {
    name: f"hvdlocal.training.callbacks.trackers.{name}:{kind}"
    for name, kind in {"tensorboard": "TensorBoard", "wandb": "Wandb", "mlflow": "MLflow", "trackio": "Trackio"}.items()
}
"""The short names of hvdlocal's own callbacks; each is the name of the package that it needs, too."""


Maker = Callable[[int], Callback | None]
"""Makes a callback on a rank of this number, if such a rank has it."""


def build_callbacks(
    config: TrainConfig, communicator: Communicator, objects: Sequence[Callback]
) -> dict[str, Callback | None]:
    """Makes the callbacks of this rank; a collective.

    Args:
        config: its `callbacks` are names, or mappings with `name` and `arguments`.
        communicator: the ranks.
        objects: callbacks that are there already.

    Returns:
        The callbacks of the run by their names, the same names on all ranks; None for those that only rank 0 has.

    Raises:
        SetupError: there is no such callback, it does not take these arguments, or it raises an error; on all ranks.
        DisagreementError: the ranks have different callbacks; on all ranks.
    """

    def build() -> dict[str, Callback | None]:
        _check_objects(objects)
        return {name: make(communicator.rank) for name, make in makers(config, objects).items()}

    callbacks = succeed_together(communicator, build, "hvdlocal.callbacks")
    require_agreement(communicator, {"callbacks": list(callbacks)}, "hvdlocal.callbacks.names")
    return callbacks


def makers(config: TrainConfig, objects: Sequence[Callback]) -> dict[str, Maker]:
    """Returns the functions that make the callbacks of a run, by the names of these; arguments as for `build_callbacks`."""
    entries = [*config.callbacks]
    if config.tensorboard and "tensorboard" not in map(_name, entries):
        entries.append("tensorboard")
    found: dict[str, Maker] = {}
    for entry in entries:
        found[_unused(_name(entry), found)] = partial(_build, entry)
    for one in objects:
        found[_unused(type(one).__qualname__, found)] = partial(_given, one)
    return found


def _given(one: Callback, rank: int) -> Callback | None:
    return one if one.all_ranks or rank == 0 else None


def _build(entry: str | Mapping[str, Any], rank: int) -> Callback | None:
    """Makes one callback, if this rank has it; its mistakes are found on every rank."""
    name = _name(entry)
    arguments: Any = {}
    if not isinstance(entry, str):
        arguments = entry.get("arguments") or {}
        if not isinstance(arguments, Mapping) or set(entry) - {"name", "arguments"}:
            raise ValueError(f"callbacks={dict(entry)}: an entry is a name, or a mapping of name and arguments")
    path = _path(name)
    kind = import_path.load(path, "callbacks")
    if not (isinstance(kind, type) and issubclass(kind, Callback)):
        raise ValueError(f"callbacks={name}: it must be a subclass of hvdlocal.Callback")
    import_path.check_arguments(kind, path, "callbacks", arguments=arguments)
    return import_path.call(path, "callbacks", arguments=arguments) if kind.all_ranks or rank == 0 else None


def _check_objects(objects: object) -> None:
    """Checks the callbacks that a script gives. Raises ValueError if they are no list of callbacks."""
    if not isinstance(objects, Sequence) or isinstance(objects, str):
        raise ValueError(
            f"callbacks is {_described(objects)}: give a list of instances of subclasses of hvdlocal.Callback"
        )
    for one in objects:
        if not isinstance(one, Callback):
            raise ValueError(f"callbacks has {_described(one)}: give instances of subclasses of hvdlocal.Callback")


def _described(value: object) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"{value!r:.80}"


def _name(entry: object) -> str:
    name = entry.get("name") if isinstance(entry, Mapping) else entry
    if not isinstance(name, str):
        raise ValueError(f"callbacks={entry}: an entry is a name, or a mapping of name and arguments")
    return name


def _unused(name: str, names: Collection[str]) -> str:
    """Returns the name, with a number if there is a callback of this name."""
    numbered = (name if number == 1 else f"{name} ({number})" for number in count(1))
    return next(one for one in numbered if one not in names)


def _path(name: str) -> str:
    """Returns the import path behind a name."""
    if import_path.is_import_path(name):
        return name
    if name not in TRACKERS:
        near = difflib.get_close_matches(name, TRACKERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"callbacks={name}: {hint}choose from {', '.join(TRACKERS)}, or write an import path as package.module:Class"
        )
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a mere directory, as wandb makes one of its name, has no origin
        raise ImportError(f"callbacks={name} needs the package {name}: pip install hvdlocal[{name}]")
    return TRACKERS[name]
