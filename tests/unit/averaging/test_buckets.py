"""BucketLayout: which gradients travel together, and where they lie."""

import pytest
import torch

from hvdlocal.averaging.buckets import BucketLayout

MIB = 2**20
FLOATS = MIB // 4


def layout(mebibytes, bucket_bytes, scalars=39):
    parameters = [torch.empty(round(size * FLOATS), dtype=torch.float32, device="meta") for size in mebibytes]
    return BucketLayout(parameters, scalars, bucket_bytes)


def groups(one):
    return [list(bucket.parameters) for bucket in one.buckets]


def test_one_bucket_has_the_scalars_behind_the_gradients():
    one = layout([2, 3], None)
    assert groups(one) == [[0, 1]]
    assert (one.gradients, one.scalars) == (slice(0, 5 * FLOATS), slice(5 * FLOATS, 5 * FLOATS + 39))
    assert one.buckets[0].message == slice(0, one.numel) == slice(0, 5 * FLOATS + 39)
    assert one.flags == slice(0, 0)


def test_the_last_bucket_is_the_beginning_and_has_the_scalars():
    """3 flags and 39 scalars, up to a multiple of 16, before the gradients."""
    one = layout([0.5, 2, 3], 3 * MIB)
    assert groups(one) == [[2], [1], [0]]
    assert [bucket.message for bucket in one.buckets] == [
        slice(48 + round(2.5 * FLOATS), 48 + round(5.5 * FLOATS)),
        slice(48 + round(0.5 * FLOATS), 48 + round(2.5 * FLOATS)),
        slice(0, 48 + round(0.5 * FLOATS)),
    ]
    assert (one.flags, one.scalars, one.numel) == (slice(0, 3), slice(3, 42), 48 + round(5.5 * FLOATS))


@pytest.mark.parametrize(
    ("mebibytes", "bucket_bytes", "expected"),
    [
        ([0.5, 0.25, 0.25], 25 * MIB, [[0, 1, 2]]),  # not worth a collective more
        ([0.5, 0.5, 0.5], 25 * MIB, [[2], [0, 1]]),
        (
            [1] * 16,
            25 * MIB,
            [[14, 15], [12, 13], [10, 11], [8, 9], [6, 7], [4, 5], [2, 3], [1], [0]],
        ),  # an eighth each
        ([1] * 4, 25 * MIB, [[3], [2], [1], [0]]),  # not less than 1 MiB
        ([1] * 4, None, [[0, 1, 2, 3]]),
        ([25] * 10, 50 * MIB, [[9], [8], [7], [6], [5], [4], [3], [2], [1], [0]]),  # 31 MiB are one of them
        ([25] * 16, 50 * MIB, [[14, 15], [12, 13], [10, 11], [8, 9], [6, 7], [4, 5], [2, 3], [1], [0]]),
        ([10] * 32, 25 * MIB, [[i, i + 1] for i in range(30, 0, -2)] + [[1], [0]]),
        ([100, 1, 1], 25 * MIB, [[1, 2], [0]]),  # the first is large, and travels with the scalars
        ([0.5, 100, 1, 0.5], 25 * MIB, [[2, 3], [1], [0]]),  # larger than a bucket
    ],
)
def test_which_gradients_travel_together(mebibytes, bucket_bytes, expected):
    assert groups(layout(mebibytes, bucket_bytes)) == expected


@pytest.mark.parametrize("bucket_bytes", [1, 64, 3 * MIB, 25 * MIB])
def test_buckets_are_the_whole_buffer(bucket_bytes):
    one = layout([0.3, 0, 2.7, 0.001, 8.1, 1, 0.6, 0.6], bucket_bytes)
    assert [i for bucket in reversed(one.buckets) for i in bucket.parameters] == list(range(8))
    ends = [bucket.message.stop for bucket in reversed(one.buckets)]
    assert [bucket.message.start for bucket in reversed(one.buckets)] == [0, *ends[:-1]]
    assert ends[-1] == one.numel
