"""The islands that ranks can form."""

import pytest

from hvdlocal.advise.candidates import island_sizes


@pytest.mark.parametrize(
    ("nodes", "sizes"),
    [
        ("aaaa", [1, 2, 4]),
        ("aaaaaa", [1, 2, 3, 6]),
        ("aaaabbbb", [1, 2, 4, 8]),
        ("abababab", [1, 2, 4, 8]),
        ("aaab", [1, 4]),
        ("aaaabb", [1, 2, 6]),
        ("abc", [1, 3]),
        ("aa", [1, 2]),
    ],
)
def test_islands_lie_in_nodes_or_are_all_ranks(nodes, sizes):
    assert island_sizes(list(nodes)) == sizes
