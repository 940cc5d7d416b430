"""How ranks are divided into islands."""

import pytest
from support.mortal import Death, run_mortal

from hvdlocal.communicator import launch
from hvdlocal.communicator.islands import divide, form_islands, node_name, parse_island
from hvdlocal.communicator.losses import MissingRanksError

TWO = ["a", "a", "b", "b"]
FOUR = [*"aabbccdd"]
UNEVEN = [*"aaaabb"]


@pytest.mark.parametrize(
    ("island", "nodes", "expected"),
    [
        ("node", TWO, [[0, 1], [2, 3]]),
        ("node", [*"abc"], [[0], [1], [2]]),
        ("node", [*"aaaa"], [[0, 1, 2, 3]]),
        (1, TWO, [[0], [1], [2], [3]]),
        (2, [*"aaaa"], [[0, 1], [2, 3]]),
        (2, UNEVEN, [[0, 1], [2, 3], [4, 5]]),
        (4, FOUR, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (8, FOUR, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (6, UNEVEN, [[0, 1, 2, 3, 4, 5]]),
        # Ranks are dealt out to the nodes one after another.
        ("node", [*"abab"], [[0, 2], [1, 3]]),
        (2, [*"abba"], [[0, 3], [1, 2]]),
        (4, [*"abcabc" + "de" * 2 + "ff"], [[0, 1, 3, 4], [2, 5, 6, 8], [7, 9, 10, 11]]),
    ],
)
def test_division(island, nodes, expected):
    assert divide(island, nodes) == expected


@pytest.mark.parametrize(
    ("island", "nodes", "message"),
    [
        ("node", UNEVEN, r"different numbers of ranks \(a: 4, b: 2\): start the same number"),
        (3, TWO, "island=3 does not divide 4 ranks: give"),
        (5, TWO, "island=5 does not divide 4 ranks: give"),
        (
            2,
            [*"aaabbb"],
            r"island=2: the island of the ranks \[2, 3\] would hold only a part of a node \(a: 3, b: 3\): give",
        ),
        (3, [*FOUR, "e"], r"island=3: the island of the ranks \[0, 1, 2\] would hold only a part"),
        (3, UNEVEN, r"island=3: the island of the ranks \[3, 4, 5\] would hold only a part"),
        (4, [*"aaaaaabbcccc"], r"\[4, 5, 6, 7\] would hold only a part"),
    ],
)
def test_what_cannot_be_divided(island, nodes, message):
    with pytest.raises(ValueError, match=message):
        divide(island, nodes)


@pytest.mark.parametrize(("text", "island"), [("node", "node"), ("1", 1), ("16", 16), (4, 4)])
def test_what_a_user_may_give(text, island):
    assert parse_island(text, "HVDLOCAL_ISLAND") == island


@pytest.mark.parametrize("text", ["nodes", "0", 0, -1, "-2", "2.0", 2.0, True, "", "²", None])
def test_what_is_no_island(text):
    with pytest.raises(ValueError, match=r'HVDLOCAL_ISLAND=.*: give "node" or a number of ranks'):
        parse_island(text, "HVDLOCAL_ISLAND")


def test_init_refuses_it_before_it_joins(monkeypatch):
    monkeypatch.setenv("HVDLOCAL_ISLAND", "rack")
    with pytest.raises(ValueError, match="HVDLOCAL_ISLAND='rack'"):
        launch.init("mpi4py")
    with pytest.raises(ValueError, match="island=0"):
        launch.init("mpi4py", island=0)


def test_two_nodes_of_slurm_on_one_host(monkeypatch):
    """And, with MPICH, one node of Slurm told to the ranks of all hosts."""
    monkeypatch.setattr("socket.gethostname", lambda: "host.site")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert node_name() == "n1 (host.site)"
    monkeypatch.setenv("SLURMD_NODENAME", "host")
    assert node_name() == "host.site"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert node_name() == "host.site"


def test_a_rank_that_dies_before_there_are_islands():
    """The others do not ask for islands that three ranks cannot make, which would be a mistake of the user's."""

    def body(communicator):
        with pytest.raises(MissingRanksError, match="rank 1 on node1 is lost; the other 3 ranks go on"):
            form_islands(communicator, 2)
        return True

    assert run_mortal(4, body, Death(1, "hvdlocal.island")) == [True, None, True, True]
