"""Writing checkpoints in the background, while training continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from hvdlocal.communicator import Communicator
from hvdlocal.communicator.agreement import by_first_rank
from hvdlocal.directory import Directory
from hvdlocal.training.checkpoint import files
from hvdlocal.training.run_files import CHECKPOINTS

RECORDS_BYTES = 2**18
"""Room that a checkpoint leaves on the disk for records."""


@dataclass
class _Open:
    """A checkpoint that this rank is writing or has written, and that is not complete yet."""

    step: int
    losses: int
    contents: dict[str, Any]
    write: Future[files.Written]


class CheckpointWriter:
    """One rank's part in writing checkpoints. A background thread writes the files.

    All ranks begin a checkpoint at the same step (`begin`) and complete it when all of them have written their files (`finish`);
    only then does it exist. If one rank fails, for lack of room or rights, there is no checkpoint, and `finish` returns the
    reason on all ranks; and if one dies in a job that goes on without it. The first of the ranks that are left writes the
    manifest and removes files, also those of ranks that died.

    Args:
        communicator: the ranks.
        output: the directory of the run, on a file system that all ranks share; checkpoints are written to `checkpoints/` in it.
        keep: how many complete checkpoints to keep.

    Attributes:
        write_seconds: how long this rank's last file took to write.
    """

    def __init__(self, communicator: Communicator, output: Directory, keep: int) -> None:
        self._communicator = communicator
        self._output = output
        self._keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hvdlocal-checkpoint")
        self._open: _Open | None = None
        self._completing: Future[None] | None = None
        self._others: list[Future[Any]] = []
        self.write_seconds = 0.0

    @property
    def open_step(self) -> int | None:
        """The step of the checkpoint that was begun and not finished, the same on all ranks; None when there is none."""
        return None if self._open is None else self._open.step

    @property
    def takes_room(self) -> bool:
        """Whether there may be files on disk that this rank or another one will complete or remove."""
        return self._open is not None or self.is_writing

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is busy."""
        write = None if self._open is None else self._open.write
        acts: list[Future[Any] | None] = [write, self._completing, *self._others]
        return any(act is not None and not act.done() for act in acts)

    def begin(self, step: int, state: dict[str, Any], contents: dict[str, Any]) -> None:
        """Copies this rank's state and starts writing it. All ranks call it at the same step, when no checkpoint is open.

        Args:
            step: optimizer steps done.
            state: this rank's values and tensors, on any device; they may change afterwards.
            contents: the contents of the manifest; only those of rank 0 are used.
        """
        assert self._open is None
        communicator = self._communicator
        write = self._thread.submit(self._write, step, communicator.rank, _copy(state))
        self._open = _Open(step, len(communicator.losses), contents, write)

    def finish(self, wait: bool = False) -> str | None:
        """Completes the open checkpoint; a collective. Waits for this rank's file, which is there once `is_writing` is false.

        Args:
            wait: whether to wait until the checkpoint is complete on disk, rather than leave that to the thread.

        Returns:
            Why there is no checkpoint, the same on all ranks, or None. Without `wait`, later failures are reported by
            `failures`.
        """
        assert self._open is not None
        opened, self._open = self._open, None
        mine: files.Written | str
        try:
            mine = opened.write.result()
        except (OSError, RuntimeError, ArithmeticError) as error:
            mine = str(error)
        everyone = self._communicator.gather(mine, "hvdlocal.checkpoint")
        failures = [f"{one} (rank {rank})" for rank, one in enumerate(everyone) if isinstance(one, str)]
        failures += [str(loss) for loss in self._communicator.losses[opened.losses :]]
        if not failures and self._communicator.rank == 0:
            self._completing = self._thread.submit(self._complete, opened, everyone)
        if not failures and wait:
            failures = self._completed(opened.step)
        if not failures:
            return None
        # Before another checkpoint may be begun, perhaps of the same step.
        by_first_rank(self._communicator, lambda: self._discard(opened.step), "hvdlocal.checkpoint.discarded")
        return f"no checkpoint of step {opened.step}: {failures[0]}"

    def after_loss(self, steps: int) -> None:
        """Goes on after ranks have died: the first rank removes what they have left. All ranks call it at the same step.

        A checkpoint that was open remains so until `finish`, which does not complete it, because other ranks may still be
        writing their files.

        Args:
            steps: optimizer steps done.
        """
        if self._communicator.rank == 0:
            self.submit(self._discard_left, steps, self.open_step)

    def failures(self, wait: bool = False) -> list[str]:
        """Returns what failed on the thread after a `finish` or a `submit`, each failure once. For rank 0."""
        acts = [act for act in (self._completing, *self._others) if act is not None and (wait or act.done())]
        if self._completing in acts:
            self._completing = None
        self._others = [act for act in self._others if act not in acts]
        return [str(error) for act in acts if (error := act.exception()) is not None]

    def submit(self, work: Callable[..., object], *arguments: Any) -> None:
        """Queues another write on the background thread; errors are reported by `failures`."""
        self._others.append(self._thread.submit(work, *arguments))

    def close(self) -> None:
        """Waits for the thread. An open checkpoint is abandoned."""
        self._open = None
        self._thread.shutdown(wait=True)

    def discard_all_but_good(self, good: int | None) -> None:
        """Removes what an earlier attempt did not complete, and sets aside what cannot be used; on rank 0, before training.

        Args:
            good: the step of the checkpoint from which the run continues; None if there is none.
        """
        if not self._output.exists(CHECKPOINTS):
            return
        with self._output.inner(CHECKPOINTS) as root:
            files.discard_incomplete(root)
            for step in files.steps_of(root.names()):
                if good is None or step > good:
                    files.set_aside(root, step)

    def _completed(self, step: int) -> list[str]:
        """Waits until the first rank has completed a checkpoint; a collective. Returns why there is none."""
        communicator, completing = self._communicator, self._completing
        while True:
            losses = len(communicator.losses)
            problem: object = None
            if completing is not None:
                problem = completing.exception()
            elif communicator.rank == 0 and not self._exists(step):
                problem = communicator.losses[-1]  # the rank that was to complete it
            problems = communicator.gather(problem and str(problem), "hvdlocal.checkpoint.complete")
            if len(communicator.losses) == losses:
                return problems[:1] if problems[0] else []

    def _write(self, step: int, rank: int, state: dict[str, Any]) -> files.Written:
        start = time.perf_counter()
        if not _is_finite(
            state["model"]
        ):  # training will notice; until then the earlier checkpoints remain the good ones
            raise ArithmeticError("NaN or infinity in the model")
        with self._output.inner(CHECKPOINTS, create=True) as root:
            if rank == 0 and root.stat(".").st_dev == self._output.stat(".").st_dev:
                files.reserve(root, step, _reserve_bytes(state["model"]))
            written = files.write_rank(root, step, rank, state)
        self.write_seconds = time.perf_counter() - start
        return written

    def _complete(self, opened: _Open, written: list[files.Written]) -> None:
        try:
            with self._output.inner(CHECKPOINTS) as root:
                files.complete(root, opened.step, opened.contents, written)
        except BaseException:
            self._discard(opened.step)
            raise
        self.submit(self._keep_newest)

    def _keep_newest(self) -> None:
        with self._output.inner(CHECKPOINTS) as root:
            files.keep_newest(root, self._keep)

    def _discard_left(self, before: int, but: int | None) -> None:
        if self._output.exists(CHECKPOINTS):
            with self._output.inner(CHECKPOINTS) as root:
                files.discard_left(root, before, but)

    def _exists(self, step: int) -> bool:
        with self._output.inner(CHECKPOINTS) as root:  # opened anew: another node may have renamed it
            return step in files.steps_of(root.names())

    def _discard(self, step: int) -> None:
        with suppress(OSError), self._output.inner(CHECKPOINTS) as root:
            files.discard_incomplete(root, step)


def _reserve_bytes(model: dict[str, Any]) -> int:
    """Returns the room that the run may need until its end: records, best.pt beside its predecessor, and model.pt."""
    return RECORDS_BYTES + 3 * sum(tensor.numel() * tensor.element_size() for tensor in model.values())


def _is_finite(model: dict[str, Any]) -> bool:
    return all(bool(value.isfinite().all()) for value in model.values() if value.is_floating_point())


def _copy(value: Any) -> Any:
    """Returns the same value with every tensor copied to memory of its own on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(inner) for inner in value)
    return value
