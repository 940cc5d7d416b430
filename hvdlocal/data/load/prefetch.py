"""Doing an iterator's work ahead of its consumer, in a few background threads."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

# MPI and fork do not go together, hence threads: they overlap because gathering, decoding and tensor arithmetic
# release the GIL.

_POLL_SECONDS = 0.05
_exiting = threading.Event()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _finish_threads() -> None:
    # A daemon thread that is inside native code while the interpreter is torn down can crash the process on its way
    # out.
    _exiting.set()
    deadline = time.monotonic() + 5
    for thread in list(_threads):
        thread.join(timeout=max(0.0, deadline - time.monotonic()))


@dataclass(frozen=True)
class Job(Generic[T]):
    """The work for one item: `parts`, at least one, in any order and at the same time, then `finish` gives the item."""

    parts: Sequence[Callable[[], object]]
    finish: Callable[[], T]


def prefetch(
    jobs: Iterator[Job[T]], depth: int, *, threads: int = 1, initialize: Callable[[], object] | None = None
) -> Generator[T, None, None]:
    """Yields what the jobs give, in their order, `depth` items ahead of the consumer.

    An exception in `jobs` or in a job is raised here, after the items that came before it. Closing or dropping this
    generator ends the threads after the part at hand; they never hold up the end of the program for more than a few
    seconds.

    Args:
        jobs: what is to be done; asked for the next job by one thread at a time.
        depth: items that are prepared ahead, besides the one that is being prepared.
        threads: number of background threads.
        initialize: called first in every thread; no item is yielded before that is done in all.
    """
    work = _Work(jobs, depth + 1, threads)
    for _ in range(threads):
        thread = threading.Thread(target=_run, args=(work, initialize), name="hvdlocal-prefetch", daemon=True)
        _threads.add(thread)
        thread.start()
    try:
        while (running := work.next_done()) is not None:
            if running.error is not None:
                raise running.error
            item = running.item
            del running  # the generator would otherwise hold on to the item until it is asked for the next
            yield item  # type: ignore[misc]
            del item
    finally:
        # Nothing but a flag is set, and the threads poll it: the garbage collector may run this finaliser in any thread
        # at any moment, even inside the condition's own code, where taking its lock or joining a thread would deadlock.
        work.closed = True


@dataclass
class _Running(Generic[T]):
    """A job under way."""

    job: Job[T] | None
    claimed: int = 0
    left: int = 0
    item: T | None = None
    error: BaseException | None = None
    done: bool = False


@dataclass
class _Work(Generic[T]):
    """What the threads and the consumer share."""

    jobs: Iterator[Job[T]]
    capacity: int
    threads: int
    closed: bool = False
    condition: threading.Condition = field(default_factory=threading.Condition)
    running: deque[_Running[T]] = field(default_factory=deque)
    planning: bool = False
    exhausted: bool = False
    initialized: int = 0
    ended: int = 0

    def next_done(self) -> _Running[T] | None:
        """Waits for the oldest job and takes it out. None: there is no more."""
        with self.condition:
            while True:
                if self.running and self.running[0].done and self.initialized == self.threads:
                    self.condition.notify_all()
                    return self.running.popleft()
                if self.exhausted and not self.running:
                    return None
                if _exiting.is_set() or self.ended == self.threads:
                    raise RuntimeError("the loader's threads have ended; batches cannot be asked for any more")
                self.condition.wait(_POLL_SECONDS)

    def next_part(self) -> tuple[_Running[T], int] | None:
        """Waits for something to do. None: there is nothing more to do."""
        with self.condition:
            while not (self.closed or _exiting.is_set()):
                for running in self.running:
                    if running.job is not None and running.claimed < len(running.job.parts):
                        running.claimed += 1
                        return running, running.claimed - 1
                if self.exhausted:
                    return None
                if self.planning or len(self.running) >= self.capacity:
                    self.condition.wait(_POLL_SECONDS)
                else:
                    self._plan()
        return None

    def _plan(self) -> None:
        self.planning = True
        self.condition.release()
        running: _Running[T] | None = None
        try:
            job = next(self.jobs, None)
            if job is not None:
                running = _Running(job, left=len(job.parts))
        except BaseException as error:
            running = _Running(None, error=error, done=True)
        finally:
            self.condition.acquire()
        self.planning = False
        if running is not None:
            self.running.append(running)
        self.exhausted = running is None or running.error is not None
        self.condition.notify_all()

    def run_part(self, running: _Running[T], number: int) -> None:
        """Does one part of a job, and finishes the job if it was the last."""
        assert running.job is not None
        error, item = None, None
        try:
            if running.error is None:
                running.job.parts[number]()
        except BaseException as raised:
            error = raised
        with self.condition:
            running.error = running.error or error
            running.left -= 1
            if running.left:
                return
        try:
            if running.error is None:
                item = running.job.finish()
        except BaseException as raised:
            error = raised
        with self.condition:
            running.item, running.error = item, running.error or error
            running.job, running.done = None, True
            self.exhausted |= running.error is not None
            self.condition.notify_all()


def _run(work: _Work[T], initialize: Callable[[], object] | None) -> None:
    try:
        if initialize is not None:
            initialize()
        with work.condition:
            work.initialized += 1
            work.condition.notify_all()
        while (part := work.next_part()) is not None:
            work.run_part(*part)
            del part
    except BaseException as error:
        with work.condition:
            work.running.appendleft(_Running(None, error=error, done=True))
            work.initialized = work.threads
    finally:
        with work.condition:
            work.ended += 1
            work.condition.notify_all()
