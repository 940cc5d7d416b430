"""The published tables and what follows from them, against numbers of the papers and exact fractions."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdlocal.papers.published import METHODS, TABLES, Cell, read_table
from hvdlocal.plan import pseudo_wall_clock
from hvdlocal.plan.crossover import crossovers, skyline


def test_shape():
    """Tables 2 and 3 have 18 rows, Table 4 nine; four methods each."""
    sizes = {name: len(read_table(name).cells) for name in TABLES}
    assert sizes == {"cifar10": 18 * 4, "imagenet32": 18 * 4, "imagenet": 9 * 4}
    assert read_table("imagenet").periods == [2, 8, 32]
    assert read_table("cifar10").periods == [2, 4, 8, 16, 32, 64]
    assert all(read_table(name).workers == [8, 16, 24] for name in TABLES)


@pytest.mark.parametrize(
    ("name", "method", "workers", "period", "accuracy", "epochs"),
    [
        ("cifar10", "acc-ada", 24, 64, 92.73, 8542),
        ("cifar10", "acc-lin", 8, 64, 10.70, 201),
        ("cifar10", "local-ada", 8, 2, 95.07, 338),
        ("imagenet32", "acc-lin", 24, 4, 45.41, 40),
        ("imagenet32", "local-lin", 24, 64, 54.18, 40),
        ("imagenet", "local-ada", 16, 8, 92.85, 217),
        ("imagenet", "local-lin", 24, 32, 84.08, 90),
    ],
)
def test_cells(name, method, workers, period, accuracy, epochs):
    assert read_table(name).cells[method, workers, period] == Cell(accuracy, epochs)


def test_plausible():
    """What the paper says of the tables: epochs of the adaptive methods grow with H, the linear ones keep their budget."""
    for name, budget in (("cifar10", 200), ("imagenet32", 40), ("imagenet", 90)):
        table = read_table(name)
        for workers in table.workers:
            for method in METHODS:
                epochs = list(table.epochs(method, workers).values())
                assert epochs == sorted(epochs)
                assert epochs[0] >= budget
                if method.endswith("-lin"):
                    assert max(epochs) <= 1.02 * budget
            assert table.epochs("local-ada", workers)[32] < table.epochs("acc-ada", workers)[32]
            assert table.epochs("local-ada", workers)[2] > table.epochs("acc-ada", workers)[2]


@pytest.mark.parametrize(
    ("name", "workers", "acc", "local"),
    [
        # (epochs, H) of the two lines that meet, read off the tables
        ("cifar10", 8, (353, 4), (469, 8)),  # m = 3.92
        ("cifar10", 16, (502, 4), (666, 8)),  # 3.88
        ("cifar10", 24, (617, 4), (813, 8)),  # 3.72
        ("imagenet32", 8, (74, 8), (89, 16)),  # 4.07
        ("imagenet32", 16, (73, 4), (123, 16)),  # 4.73
        ("imagenet32", 24, (87, 4), (121, 8)),  # 5.13
        ("imagenet", 8, (108, 2), (156, 8)),  # 1.39
        ("imagenet", 16, (213, 8), (377, 32)),  # 11.05
        ("imagenet", 24, (260, 8), (536, 32)),  # 17.52
    ],
)
def test_crossovers_by_hand(name, workers, acc, local):
    """n_a (1 + m/H_a) = n_b (1 + m/H_b), solved for m."""
    table = read_table(name)
    found = crossovers(table.epochs("acc-ada", workers), table.epochs("local-ada", workers))
    m = (local[0] - acc[0]) / (acc[0] / acc[1] - local[0] / local[1])
    assert found == pytest.approx([m])


def test_what_the_paper_says_of_m():
    """Sec. 6.2: with K = 24, SGD is faster on CIFAR-10 for m ≤ 3, and on ImageNet32 local steps only win for m ≥ 4."""
    for name, m in (("cifar10", 3), ("imagenet32", 4)):
        table = read_table(name)
        assert skyline(table.epochs("acc-ada", 24), 24, m) < skyline(table.epochs("local-ada", 24), 24, m)
        assert skyline(table.epochs("acc-ada", 24), 24, 6) > skyline(table.epochs("local-ada", 24), 24, 6)


def test_skyline():
    epochs = {2: 10.0, 8: 13.0}
    assert skyline(epochs, 4, 0) == pseudo_wall_clock(10, 4, 2, 0) == 2.5
    assert skyline(epochs, 4, 100) == pseudo_wall_clock(13, 4, 8, 100)


def test_no_crossover():
    assert crossovers({2: 10.0}, {2: 10.0}) == []
    assert crossovers({2: 10.0}, {2: 11.0}) == []
    assert crossovers({1: 1.0}, {2: 3.0}) == [], "in the negative only"
    assert crossovers({1: 1.0}, {2: 1.0}) == [], "meets at 0 and stays ahead"


EPOCHS = st.dictionaries(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 200), min_size=1)


@given(EPOCHS, EPOCHS)
def test_the_faster_changes_at_crossovers_and_nowhere_else(before, after):
    found = crossovers(before, after)
    edges = [0.0, *found, (found[-1] if found else 0) + 1e4]
    leads = []
    for low, high in pairwise(edges):
        inside = [low + (high - low) * share for share in (1e-6, 0.3, 0.7, 1 - 1e-6)]
        differences = [skyline(after, 1, m) - skyline(before, 1, m) for m in inside]
        assert all(d <= 1e-9 * (1 + high) for d in differences) or all(d >= -1e-9 * (1 + high) for d in differences)
        leads.append(sum(differences) < 0)
    assert all(one != other for one, other in pairwise(leads))


def test_no_such_table():
    with pytest.raises(ValueError, match="no published table 'mnist': choose one of cifar10, imagenet32, imagenet"):
        read_table("mnist")
