"""What a backward pass hides of the sum of its gradient, in closed form."""

import pytest

from hvdlocal.plan.overlap import BucketArrival, SumTime, even_buckets, exposed_seconds

LATENCY, PER_BYTE = 0.01, 0.001
SUM = SumTime(LATENCY, PER_BYTE)


@pytest.mark.parametrize("backward", [0.0, 0.5, 1e6])
def test_one_bucket_hides_nothing(backward):
    assert exposed_seconds(backward, [BucketArrival(1.0, 800)], SUM) == pytest.approx(SUM(800))


def test_a_long_backward_pass_hides_all_but_the_last_bucket():
    buckets = even_buckets(800, 100)
    assert exposed_seconds(100.0, buckets, SUM) == pytest.approx(SUM(100))


def test_a_short_backward_pass_hides_what_follows_the_first_bucket():
    """The network never waits: it begins after an eighth of the backward pass, and then sums eight buckets in succession."""
    buckets, backward = even_buckets(800, 100), 0.08
    assert exposed_seconds(backward, buckets, SUM) == pytest.approx(backward / 8 + 8 * SUM(100) - backward)


def test_no_backward_pass_hides_nothing_and_pays_the_latency_of_every_bucket():
    assert exposed_seconds(0.0, even_buckets(800, 100), SUM) == pytest.approx(8 * LATENCY + 0.8)


def test_a_bucket_that_comes_late_holds_up_the_ones_behind_it():
    buckets = [BucketArrival(0.9, 100), BucketArrival(0.95, 100), BucketArrival(1.0, 100)]
    assert exposed_seconds(1.0, buckets, SUM) == pytest.approx(0.9 + 3 * SUM(100) - 1.0)


def test_the_last_even_bucket_is_what_is_left():
    assert even_buckets(250, 100) == [BucketArrival(0.4, 100), BucketArrival(0.8, 100), BucketArrival(1.0, 50)]
    assert even_buckets(250, 1000) == [BucketArrival(1.0, 250)]
    assert even_buckets(200, 100)[-1] == BucketArrival(1.0, 100)


def test_a_line_through_two_measurements():
    line = SumTime.through(0.01, 800, 0.81)
    assert (line.latency, line.per_byte) == (pytest.approx(0.01), pytest.approx(0.001))
    noisy = SumTime.through(0.02, 800, 0.01)
    assert noisy(800) == 0.01, "a sum that is no slower than a very short one takes what was measured"
