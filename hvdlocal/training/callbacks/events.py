"""Calls the callbacks of a run at its events, so that a mistake in one of them neither stops a rank nor changes training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdlocal.communicator import Communicator
from hvdlocal.import_path import OwnCodeError, own_code
from hvdlocal.terminal import warn
from hvdlocal.training.callbacks.base import Callback, Outcome, Record, RunView
from hvdlocal.training.errors import CallbackError

EVENT_OF_KIND = {"steps": "on_log", "round": "on_round", "evaluation": "on_evaluation"}


class Events:
    """The callbacks of one rank.

    A callback that raises an error is called no more. `failure` then holds a sentence, the run is to stop at the next
    opportunity, and `check` raises the error on all ranks.

    Args:
        callbacks: by name; None where only rank 0 has one.
        run: what they see.
        communicator: the ranks.

    Attributes:
        failure: what the first callback that failed on this rank did; None while there is none.
        has_steps: whether a callback wants to be called after every step.
    """

    def __init__(self, callbacks: Mapping[str, Callback | None], run: RunView, communicator: Communicator) -> None:
        self._callbacks = {name: callback for name, callback in callbacks.items() if callback is not None}
        self._run = run
        self._communicator = communicator
        self._anywhere = bool(callbacks)
        self._ended = False
        self.failure: str | None = None
        self.has_steps = any(type(one).on_step is not Callback.on_step for one in self._callbacks.values())

    def start(self, states: Mapping[str, Any]) -> None:
        """Begins or continues; a collective.

        Args:
            states: what `state` returned when the checkpoint was written from which the run continues.

        Raises:
            CallbackError: on all ranks: a callback failed.
        """

        def restore(name: str, one: Callback) -> None:
            if name in states:
                one.load_state_dict(states[name])

        self._call("load_state_dict", restore)
        self._call("on_start", lambda _, one: one.on_start(self._run))
        self.check("training has not begun")

    def step(self) -> None:
        """Reports an optimizer step."""
        self._call("on_step", lambda _, one: one.on_step(self._run))

    def record(self, kind: str, step: int, values: Record) -> None:
        """Reports a record, if callbacks have an event for records of its kind."""
        if (event := EVENT_OF_KIND.get(kind)) is not None and self._callbacks:
            record = {"kind": kind, "step": step, **values}
            self._call(event, lambda _, one: getattr(one, event)(self._run, dict(record)))

    def checkpoint(self, path: Path) -> None:
        """Reports a checkpoint."""
        self._call("on_checkpoint", lambda _, one: one.on_checkpoint(self._run, path))

    def end(self, outcome: Outcome, summary: Record | None = None) -> None:
        """Reports the end, once. Where the ranks cannot meet any more, failures of callbacks are warnings."""
        if self._ended:
            return
        self._ended = True
        self._call("on_end", lambda _, one: one.on_end(self._run, outcome, summary))
        if outcome in ("diverged", "failed") and self.failure is not None:
            warn(self.failure)

    def state(self) -> dict[str, Any]:
        """Returns the states of all callbacks of this rank, for a checkpoint."""
        found: dict[str, Any] = {}

        def ask(name: str, one: Callback) -> None:
            if state := one.state_dict():
                found[name] = json.loads(json.dumps(state, allow_nan=False))

        self._call("state_dict", ask)
        return found

    def check(self, state: str) -> None:
        """Compares what happened on the ranks; a collective, if any rank has callbacks.

        Args:
            state: what has become of the run, for the message.

        Raises:
            CallbackError: on all ranks: a callback failed on one of them.
        """
        if not self._anywhere:
            return
        failures = self._communicator.gather(self.failure, "hvdlocal.callbacks.failures")
        failed = [rank for rank, failure in enumerate(failures) if failure is not None]
        if failed:
            where = f" (rank {', '.join(map(str, failed[:8]))} of {len(failures)})" if len(failures) > 1 else ""
            raise CallbackError(f"{failures[failed[0]]}{where}; {state}")

    def _call(self, event: str, act: Callable[[str, Callback], object]) -> None:
        if not self._callbacks:
            return
        for name, callback in list(self._callbacks.items()):
            try:
                with own_code(f"callback {name}, {event} after step {self._run.step}"), _unchanged(self._run):
                    act(name, callback)
            except (OwnCodeError, MemoryError, torch.OutOfMemoryError) as error:
                del self._callbacks[name]
                self.failure = self.failure or str(error)


@contextmanager
def _unchanged(run: RunView) -> Iterator[None]:
    """Restores torch's random state and the modes of modules, and refuses a change of parameters or gradients.

    Dropout draws from the random state, and replicas that changed on one rank alone would stay different under data parallelism.
    """
    modes = [module.training for module in run.model.modules()]
    before = _versions(run.model)
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        yield
    for module, training in zip(run.model.modules(), modes, strict=True):
        module.training = training
    if _versions(run.model) != before:
        raise ValueError("it changed parameters or gradients of the model, which differ between ranks then")


def _versions(model: nn.Module) -> list[tuple[int, int | None]]:
    """Returns what every in-place change of a parameter or of its gradient increases."""
    return [(p._version, None if p.grad is None else p.grad._version) for p in model.parameters()]
