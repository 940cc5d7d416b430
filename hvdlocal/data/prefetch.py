"""Running an iterator ahead of its consumer, in one background thread."""

import atexit
import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

# MPI and fork do not go together, hence a thread: it overlaps because gathering, decoding and tensor arithmetic
# release the GIL.

_POLL_SECONDS = 0.05
_exiting = threading.Event()
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


@atexit.register
def _finish_threads() -> None:
    # A daemon thread that is inside native code while the interpreter is torn down can crash the process on its way
    # out.
    _exiting.set()
    for thread in list(_threads):
        thread.join(timeout=5)


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield what ``items`` yields, up to ``depth`` items computed ahead in a background thread.

    An exception in ``items`` is raised here, after the items that came before it. Closing or dropping this generator
    ends the thread after the item at hand; it never holds up the end of the program for more than a few seconds.
    """
    results: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def put(more: bool, value: T | BaseException | None) -> bool:
        # Polling leaves this generator's finaliser with nothing but a flag to set. The garbage collector may run that
        # finaliser in any thread at any moment, even inside results.put, where draining the queue or joining the
        # thread would deadlock.
        while not (closed.is_set() or _exiting.is_set()):
            try:
                results.put((more, value), timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(True, item):
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=produce, name="hvdlocal-prefetch", daemon=True)
    _threads.add(thread)
    thread.start()
    try:
        while True:
            more, value = results.get()
            if isinstance(value, BaseException) and not more:
                raise value
            if not more:
                return
            yield value  # type: ignore[misc]
    finally:
        closed.set()
