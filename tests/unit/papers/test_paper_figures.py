"""The paper's figures: they show what the formulas and tables say."""

from itertools import pairwise

import pytest

pytest.importorskip("matplotlib")

from hvdlocal.figures.style import data_uri, fit_scale, new_figure, save, style
from hvdlocal.figures.units import bytes_text, seconds_text
from hvdlocal.papers.paper_figures import FIGURES, crossover_table, gain_figure
from hvdlocal.papers.published import read_table


def curves(panel):
    """The lines by their legend."""
    return {line.get_label(): line.get_xydata() for line in panel.get_lines()}


def test_the_gain_and_its_limits():
    """Fig. 3 and the text beside it: 1 without variance, K with much of it, smaller for larger H, below 1 for little variance."""
    wide, narrow = gain_figure(8).axes
    periods = [f"H = {h}" for h in (1, 2, 4, 8, 16, 32, 64)]
    gains = curves(wide)
    for panel in (gains, curves(narrow)):
        for more, less in pairwise(periods):
            assert (panel[more][1:, 1] > panel[less][1:, 1]).all()
    for period in periods:
        assert gains[period][-1, 1] == pytest.approx(8, abs=0.03)
        assert curves(narrow)[period][0, 1] == pytest.approx(1)
    assert curves(narrow)["H = 8"][:, 1].min() == pytest.approx(0.669, abs=1e-3)
    assert curves(narrow)["H = 2"][:, 1].min() >= 1


def test_epochs_are_the_table():
    panel = FIGURES["figure5_epochs"]().axes[2]
    assert panel.get_title(loc="left") == "CIFAR-10, K = 24"
    assert dict(curves(panel)["local-ada"].tolist()) == read_table("cifar10").epochs("local-ada", 24)


def test_pseudo_wall_clock_starts_at_epochs_over_workers():
    panel = FIGURES["figure6_periods"]().axes[0]
    assert curves(panel)["acc-ada, H = 2"][0].tolist() == [0, 443 / 24]
    assert curves(panel)["local-ada, H = 8"][-1].tolist() == pytest.approx([10, 813 / 24 * (1 + 10 / 8)])


def test_crossovers():
    rows = crossover_table()
    assert len(rows) == 9
    assert [round(m, 1) for title, _, (m,) in rows if title == "ImageNet"] == [1.4, 11.0, 17.5]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_can_be_saved(tmp_path, name):
    save(FIGURES[name](), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("<path") > 20


def test_the_same_figure_gives_the_same_file(tmp_path):
    for name in ("one.svg", "two.svg"):
        save(gain_figure(), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_scales():
    with style():
        figure, axes = new_figure(1, 4)
    for panel, values, scale in zip(
        axes[0],
        ([1, 2, 3], [1, 100], [0, 0.001, 1000], [float("nan"), 0]),
        ("linear", "log", "log", "linear"),
        strict=True,
    ):
        fit_scale(panel, "y", values)
        assert panel.get_yscale() == scale
    assert data_uri(figure).startswith("data:image/svg+xml;base64,")


def test_units():
    assert [seconds_text(s) for s in (0, 12.34, 245, 12000)] == ["0.0 s", "12.3 s", "4:05 min", "3:20 h"]
    assert [bytes_text(b) for b in (0, 1572900, 2.5e12)] == ["0.0 kB", "1.6 MB", "2.5 TB"]
