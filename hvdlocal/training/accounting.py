"""What a run has taken and sent so far, counted on through interruptions."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from hvdlocal.averaging import ReplicaOptimizer


class _Communication(NamedTuple):
    """What one rank has spent on collectives: between the workers, inside its island, and behind further steps."""

    seconds: float = 0.0
    bytes: int = 0
    collectives: int = 0
    island_seconds: float = 0.0
    island_bytes: int = 0
    hidden_seconds: float = 0.0

    def plus(self, other: _Communication) -> _Communication:
        return _Communication(*map(operator.add, self, other))

    def minus(self, other: _Communication) -> _Communication:
        return _Communication(*map(operator.sub, self, other))


_OF_A_ROUND = (
    "round_seconds",
    "round_averaging_seconds",
    "round_bytes_sent",
    "round_island_seconds",
    "round_island_bytes_sent",
    "round_hidden_seconds",
)


class RunTotals:
    """Seconds of this rank by what they were spent on, and what training handed to collectives.

    What is sent beside training, for evaluations and checkpoints, is not counted.

    Args:
        optimizer: trains, times its averagings, and has the communicator whose traffic is counted.
    """

    def __init__(self, optimizer: ReplicaOptimizer) -> None:
        self._optimizer = optimizer
        self._elapsed_before = 0.0
        self._before = _Communication()
        self.waiting_for_data = 0.0
        self.evaluating = 0.0
        self._round_began: tuple[float, ...] = (0.0, 0.0, 0, 0.0, 0, 0.0)
        self.start()

    def start(self) -> None:
        """Starts the clock: training begins or continues now. What was sent during set-up is not counted."""
        self._start = time.perf_counter()
        self._not_counted = self._so_far()

    @property
    def elapsed(self) -> float:
        """Seconds since training began, without those between an interruption and the resumption."""
        return self._elapsed_before + time.perf_counter() - self._start

    @property
    def averaging(self) -> float:
        """Seconds spent on averaging and on waiting for other ranks."""
        return self._counted().seconds

    @property
    def bytes_sent(self) -> int:
        """Bytes that training has handed to collectives between the workers."""
        return self._counted().bytes

    @property
    def hidden(self) -> float:
        """Seconds for which averages were under way behind further steps."""
        return self._counted().hidden_seconds

    @property
    def inside_islands(self) -> float:
        """Seconds that steps have waited for the gradients of this rank's island."""
        return self._counted().island_seconds

    @property
    def island_bytes_sent(self) -> int:
        """Bytes that training has handed to collectives inside this rank's island."""
        return self._counted().island_bytes

    @property
    def collectives(self) -> int:
        """Collectives of training between the workers."""
        return self._counted().collectives

    def end_round(self) -> dict[str, float]:
        """Returns what the round that ends now has taken, by the names of its record; the next round begins."""
        now = self._now()
        taken = {name: end - start for name, start, end in zip(_OF_A_ROUND, self._round_began, now, strict=True)}
        self._round_began = now
        return taken

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """Does not count the communication inside the context."""
        before = self._so_far()
        try:
            yield
        finally:
            self._not_counted = self._not_counted.plus(self._so_far().minus(before))

    def waited(self, seconds: float) -> None:
        """Adds a wait for other ranks to the time of averaging, which includes waiting for the slowest rank anyway."""
        self._before = self._before.plus(_Communication(seconds))

    def seconds(self) -> dict[str, float]:
        """Returns all seconds by name; the time that is not accounted for was spent on computing.

        Hidden averages passed during the others, and take no time of their own.
        """
        spent = {
            "averaging": self.averaging,
            "inside_islands": self.inside_islands,
            "waiting_for_data": self.waiting_for_data,
            "evaluating": self.evaluating,
        }
        elapsed = self.elapsed
        return {"elapsed": elapsed, "computing": elapsed - sum(spent.values()), **spent, "hidden": self.hidden}

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers for a checkpoint."""
        counts = {
            "bytes_sent": self.bytes_sent,
            "collectives": self.collectives,
            "island_bytes_sent": self.island_bytes_sent,
        }
        return {**self.seconds(), **counts, "round_began": self._round_began}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`; to be followed by `start`."""
        self._elapsed_before = state["elapsed"]
        # Checkpoints from before there were islands, or overlap, lack what was spent on them.
        island = state.get("inside_islands", 0.0), state.get("island_bytes_sent", 0)
        hidden = state.get("hidden", 0.0)
        self._before = _Communication(state["averaging"], state["bytes_sent"], state["collectives"], *island, hidden)
        self.waiting_for_data, self.evaluating = state["waiting_for_data"], state["evaluating"]
        # In checkpoints from before these were kept, the round under way counts from here.
        now = (state["elapsed"], state["averaging"], state["bytes_sent"], *island, hidden)
        began = tuple(state.get("round_began", ()))
        self._round_began = began + now[len(began) :]

    def _so_far(self) -> _Communication:
        """Everything since the communicator and the optimizer exist."""
        optimizer, communicator = self._optimizer, self._optimizer.communicator
        between = [communicator.traffic] + ([communicator.peers.traffic] if communicator.peers else [])
        return _Communication(
            optimizer.seconds_averaging,
            sum(traffic.bytes for traffic in between),
            sum(traffic.collectives for traffic in between),
            optimizer.seconds_inside,
            communicator.island.traffic.bytes if communicator.island else 0,
            optimizer.seconds_hidden,
        )

    def _now(self) -> tuple[float, ...]:
        counted = self._counted()
        inside = counted.island_seconds, counted.island_bytes
        return self.elapsed, counted.seconds, counted.bytes, *inside, counted.hidden_seconds

    def _counted(self) -> _Communication:
        return self._before.plus(self._so_far().minus(self._not_counted))
