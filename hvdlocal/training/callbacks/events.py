"""Calls the callbacks of a run at its events, so that a mistake in one of them neither stops a rank nor changes training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hvdlocal.communicator import Communicator
from hvdlocal.import_path import OwnCodeError, own_code
from hvdlocal.terminal import warn
from hvdlocal.training.callbacks.base import EVENT_OF_KIND, Callback, Outcome, Record, RunView
from hvdlocal.training.callbacks.guard import fingerprints, restored
from hvdlocal.training.errors import CallbackError

FREQUENT = {"on_step", "on_log", "on_round"}
"""Events at which a callback's changes of values are looked for once: reading the whole model every time would be slow."""


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
        self._had = set(self._callbacks)
        self._run = run
        self._communicator = communicator
        self._anywhere = bool(callbacks)
        self._ended = False
        self._compared: set[tuple[str, str]] = set()
        self.failure: str | None = None
        self._look_for_steps()

    def start(self, states: Mapping[str, Any]) -> None:
        """Begins or continues; a collective.

        Args:
            states: what `state` returned when the checkpoint was written from which the run continues.

        Raises:
            CallbackError: on all ranks: a callback failed.
        """
        self._begin(states)
        if self._run.rank == 0:
            self.state()  # a state that no checkpoint can hold is reported now
        self.check("training has not begun")

    def take_over(
        self,
        makers: Mapping[str, Callable[[int], Callback | None]],
        states: Mapping[str, Any],
        step: int,
        records: Sequence[Record],
    ) -> None:
        """Begins the callbacks that only rank 0 has, on the rank that has become it, as a start from the newest checkpoint would.

        Args:
            makers: of all callbacks of the run.
            states: what `state` returned when that checkpoint was written.
            step: of that checkpoint; 0 if there is none.
            records: those since that checkpoint.
        """
        self._run.resumed_step = step
        missing = [name for name in makers if name not in self._had]
        own, self._callbacks = self._callbacks, {}
        for name in missing:
            try:
                if (made := makers[name](0)) is not None:
                    self._callbacks[name] = made
            except (OwnCodeError, ValueError, ImportError, OSError) as error:
                self.failure = self.failure or str(error)
        self._had.update(missing)
        self._begin(states)
        self._call("on_take_over", lambda _, one: one.on_take_over(self._run, records))
        self._callbacks |= own
        self._look_for_steps()

    def _begin(self, states: Mapping[str, Any]) -> None:
        def restore(name: str, one: Callback) -> None:
            if name in states:
                one.load_state_dict(states[name])

        self._call("load_state_dict", restore)
        self._call("on_start", lambda _, one: one.on_start(self._run))

    def _look_for_steps(self) -> None:
        self.has_steps = any(type(one).on_step is not Callback.on_step for one in self._callbacks.values())

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
            state = one.state_dict()
            problem = None if isinstance(state, dict) else f"it returned {state!r:.80}"
            try:
                text = json.dumps(state, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                problem = problem or str(error)
            if problem:
                raise OwnCodeError(
                    f"{self._what(name, 'state_dict')}: it must return a dict that JSON can hold: {problem}"
                )
            if state:
                found[name] = json.loads(text)

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
        for name, callback in list(self._callbacks.items()):
            if getattr(type(callback), event) is getattr(Callback, event):
                continue
            values = event not in FREQUENT or (name, event) not in self._compared
            self._compared.add((name, event))
            try:
                before = fingerprints(self._run.model, values)
                with restored(self._run.model, self._run.device), own_code(self._what(name, event)):
                    act(name, callback)
                    after = fingerprints(self._run.model, values)
                if changed := sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)):
                    more = f" and {len(changed) - 1} more" if changed[1:] else ""
                    raise OwnCodeError(
                        f"{self._what(name, event)}: it changed the model ({changed[0]}{more}), which a callback may only read"
                    )
            except (OwnCodeError, MemoryError, torch.OutOfMemoryError) as error:
                del self._callbacks[name]
                self.failure = self.failure or str(error)

    def _what(self, name: str, event: str) -> str:
        return f"callback {name}, {event} after step {self._run.step}"
