"""What the ranks exchange between averagings: who was asked to stop, whether a checkpoint is due, who is still writing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from hvdlocal.communicator import Communicator

POLL_SECONDS = 2.0
"""Approximate time between two exchanges. An answer is used at the next exchange, so a request takes effect within two intervals,
and inside a round a rank can be one interval ahead of the others before it waits for them."""

_MOST_STEPS = 10_000


@dataclass(frozen=True)
class Status:
    """The status of one rank, or the sum over all ranks.

    Attributes:
        stop: this rank was asked to stop.
        due: a checkpoint is due (only rank 0 decides).
        writing: this rank is still writing the last checkpoint.
    """

    stop: int = 0
    due: int = 0
    writing: int = 0


class StatusExchange:
    """A small allreduce about every two seconds. A rank waits for it only if it is more than one interval ahead of the slowest.

    It is started at one exchange and read at the next, by which time it has normally completed. All ranks exchange at the same
    steps: each answer also schedules the exchange after the next, by the clock of rank 0, or of the first rank that is left.

    Args:
        communicator: the ranks.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        # float64, or Horovod might pack it into one buffer with the averaging's float32, and copy that.
        self._sums = torch.zeros(4, dtype=torch.float64, device="cpu")
        self._pending: Callable[[], None] | None = None
        self._next_step = 0
        self._last: tuple[int, float] | None = None

    def is_at(self, step: int) -> bool:
        """Returns whether the ranks exchange their status at this step."""
        return step >= self._next_step

    def exchange(self, step: int, now: float, news: Status) -> Status | None:
        """Reads the answer of the last exchange and starts the next one; a collective.

        Args:
            step: optimizer steps done.
            now: seconds of training.
            news: the status of this rank.

        Returns:
            The sum over all ranks at the last exchange; None the first time.
        """
        answer, gap = self._read()
        seconds_per_step = (
            (now - self._last[1]) / (step - self._last[0]) if self._last and step > self._last[0] else 1.0
        )
        self._last = step, now
        # At most twice the last gap: the first steps may be slower than the rest, or faster.
        wanted = min(max(round(POLL_SECONDS / max(seconds_per_step, 1e-9)), 1), 2 * gap, _MOST_STEPS)
        mine = [*astuple(news), wanted if self._communicator.rank == 0 else 0]
        self._sums.copy_(torch.tensor(mine, dtype=torch.float64, device="cpu"))
        self._pending = self._communicator.start_sum_(self._sums, "hvdlocal.poll")
        self._next_step = step + gap
        return answer

    def close(self) -> None:
        """Waits for the exchange under way; to be called at the same step on all ranks."""
        self._read()

    def _read(self) -> tuple[Status | None, int]:
        if self._pending is None:
            return None, 1
        pending, self._pending = self._pending, None
        pending()
        *said, gap = (round(value) for value in self._sums.tolist())
        return Status(*said), max(gap, 1)  # nobody has set it if the first rank died before this exchange
