"""Jobs in threads give their items in order, and their errors too."""

import itertools
import threading
import time
from itertools import islice

import pytest
from loaders import wait_for_no_threads

from hvdlocal.data.load.prefetch import Job, prefetch


def jobs_of(parts, delays=(0.0,), log=None):
    """Job i has some parts, each of which notes (i, part) and takes its time, and gives i with what was noted."""
    delay = itertools.cycle(delays)

    def job(i):
        noted = []

        def part(number, seconds):
            def do():
                time.sleep(seconds)
                noted.append(number)
                if log is not None:
                    log.append((i, number))

            return do

        return Job([part(number, next(delay)) for number in range(parts)], lambda: (i, sorted(noted)))

    return map(job, itertools.count())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 4])
def test_jobs_give_their_items_in_order(threads, depth):
    items = prefetch(jobs_of(3, delays=(0.003, 0, 0.001, 0, 0.002)), depth, threads=threads)
    assert list(islice(items, 50)) == [(i, [0, 1, 2]) for i in range(50)]


def test_work_stops_when_the_consumer_does():
    log = []
    items = prefetch(jobs_of(1, log=log), 3, threads=2)
    next(items)
    deadline = time.monotonic() + 10
    while len(log) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert sorted(i for i, _ in log) == [0, 1, 2, 3, 4]  # one handed out, three ahead, one more that is being prepared
    for expected in range(1, 20):
        assert next(items) == (expected, [0])
    items.close()
    assert wait_for_no_threads()


def test_all_threads_work_on_the_item_that_is_wanted():
    barrier = threading.Barrier(4, timeout=10)
    items = prefetch(iter([Job([barrier.wait] * 4, lambda: "done")]), 1, threads=4)
    assert list(items) == ["done"]


@pytest.mark.parametrize("where", ["plan", "part", "finish", "initialize"])
@pytest.mark.parametrize("threads", [1, 4])
def test_errors_come_after_the_items_before_them(where, threads):
    def fail():
        raise ZeroDivisionError(f"in the {where}")

    def plan():
        yield Job([lambda: None], lambda: 0)
        yield Job([lambda: time.sleep(0.05)], lambda: 1)
        if where == "plan":
            fail()
        yield Job([lambda: None, fail if where == "part" else lambda: None], fail if where == "finish" else lambda: 2)
        yield Job([lambda: None], lambda: 3)

    items = prefetch(plan(), 5, threads=threads, initialize=fail if where == "initialize" else None)
    if where != "initialize":
        assert list(islice(items, 2)) == [0, 1]
    with pytest.raises(ZeroDivisionError, match=f"in the {where}"):
        next(items)
    assert list(items) == []
    assert wait_for_no_threads()
