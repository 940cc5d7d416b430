"""The page about runs: what stands on it, for few runs and for many."""

import base64
import json
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from recorded import write_run
from support.records import records

from hvdlocal.report.figures import plateaus, thin
from hvdlocal.report.lines import describe_period, draw_as, short_names
from hvdlocal.report.page import make_report
from hvdlocal.report.records import read_run


def table(html):
    """The rows of the first table, each as a dict of cells by the heads of their columns and the notes below them."""
    heads = [" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in re.findall("<th[ >].*?</th>", html)]
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    rows = [
        [re.sub("<[^>]*>", "", cell).strip() for cell in re.findall("<td.*?</td>", row)] for row in body.split("<tr>")
    ]
    return [dict(zip(heads, row, strict=False)) for row in rows[1:]]


def test_one_run(tmp_path):
    report = make_report([write_run(tmp_path / "digits")])
    html = report.html()
    assert [drawing.name for drawing in report.drawings] == ["test", "training", "statistics", "time"]
    (row,) = table(html)
    assert row == {
        "Run": "digits",
        "State": "finished",
        "Best accuracy": "98.75 %",
        "Test accuracy": "98.75 %",
        "Test loss": "0.0013",
        "Model": "digits_cnn",
        "Data": "digits",
        "Preset": "local-ada",
        "K workers": "2",
        "H steps": "H = 4",
        "Batch of a rank": "32",
        "Optimizer and γ, its rate": "sgd 0.05, cosine",
        "Progress epochs": "8.0",
        "Data epochs": "16.0",
        "Steps": "800",
        "Averagings": "200",
        "Sent per rank": "200.0 kB",
        "Sent % of parallel": "25.0",
        "m Eq. 16": "2.40",
        "Time": "8.0 s",
    }
    assert "<title>digits – hvdlocal report</title>" in html
    assert "digits_cnn on digits, local-ada on 2 ranks: finished, best test accuracy 98.75 % at epoch 8.0." in html
    assert "Settings that differ" not in html
    assert "preset: local-ada" in html, "the configuration"


def test_a_run_with_islands(tmp_path):
    islands, ranks = write_run(tmp_path / "a", workers=2, island_size=4), write_run(tmp_path / "b", workers=2)
    report = make_report([islands, ranks])
    assert [row["K workers"] for row in table(report.html())] == ["2 × 4 ranks", "2"]
    assert "inside islands" in [entry.label for entry in report.drawings[-1].legend]
    assert "local-ada on 8 ranks in islands of 4: finished" in make_report([islands]).html()
    assert "inside islands" not in [entry.label for entry in make_report([ranks]).drawings[-1].legend]


def test_a_run_with_overlap(tmp_path):
    """In the table and below the bar: 2.4 s of averaging are exposed, and 4.8 s hidden behind steps."""
    runs = [write_run(tmp_path / "overlap", "diloco", hidden=0.006), write_run(tmp_path / "plain")]
    report = make_report(runs)
    rows = table(report.html())
    assert [row["Averaging exposed"] for row in rows] == ["2.4 s", "2.4 s"]
    assert [row["Averaging hidden"] for row in rows] == ["4.8 s (67 %)", "–"]
    [time] = [drawing for drawing in report.drawings if drawing.name == "time"]
    assert "hidden averaging" in [entry.label for entry in time.legend]
    assert "Averaging hidden" not in table(make_report(runs[1:]).html())[0]


def test_the_best_value_is_not_the_last(tmp_path):
    directory = write_run(tmp_path / "a")
    edit_accuracies(directory, lambda step, accuracy: 0.25 if step == 800 else accuracy)
    html = make_report([directory]).html()
    (row,) = table(html)
    assert (row["Best accuracy"], row["Test accuracy"]) == ("98.57 %", "25.00 %")
    assert "best test accuracy 98.57 % at epoch 7.0." in html


def test_metrics_of_any_name(tmp_path):
    """A task's own metric, whose smallest value is the best, beside a run of image classification."""
    ours = write_run(tmp_path / "fields", task={"best": "$rmse", "direction": "min", "percent": []})
    edit_records(ours, lambda record: record | {"$rmse": 5 + abs(record["step"] - 300) / 100, "accuracy": None})
    report = make_report([ours])
    assert [panel.title for panel in report.drawings[0].panels][::4] == ["Test $rmse", "Test loss"]
    (row,) = table(report.html())
    assert (row["Best $rmse"], row["Test $rmse"]) == ("5.0000", "10")
    both = make_report([ours, write_run(tmp_path / "digits")])
    assert [row["Best of its metric"] for row in table(both.html())] == ["$rmse 5.0000", "accuracy 98.75 %"]
    assert [row["Test $rmse"] for row in table(both.html())] == ["10", "–"]
    titles = [panel.title for panel in both.drawings[0].panels]
    assert titles == 4 * ["Test $rmse"] + 4 * ["Test accuracy [%]"] + 4 * ["Test loss"]


def edit_records(directory, change):
    """Changes the records of evaluations."""
    path = directory / "metrics.jsonl"
    changed = [change(record) if record["kind"] == "evaluation" else record for record in records(directory)]
    path.write_text("".join(json.dumps(record) + "\n" for record in changed))


def edit_accuracies(directory, change):
    edit_records(directory, lambda record: record | {"accuracy": change(record["step"], record["accuracy"])})


def test_the_page_fits_small_and_dark_screens(tmp_path):
    """Panels are pictures of their own, which a narrow page stacks; their background is that of the page."""
    html = make_report([write_run(tmp_path / "a")]).html()
    assert "prefers-color-scheme: dark" in html
    assert re.findall("--wide: (.); --medium: (.)", html) == [("4", "2"), ("4", "2"), ("4", "2"), ("1", "1")]
    svg = base64.b64decode(re.search('base64,([^"]*)', html)[1]).decode()
    assert "fill: #ffffff" not in svg.lower()


def test_nothing_from_outside(tmp_path):
    """The page and its figures name no address but those of SVG's own vocabulary."""
    html = make_report([write_run(tmp_path / "a")]).html()
    assert html.count('src="data:image/svg+xml;base64,') == 8 + 4 + 4 + 1
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script|<link", html)


def test_text_is_escaped(tmp_path):
    html = make_report([write_run(tmp_path / "<b>&")]).html()
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html


def test_running_beside_others(tmp_path):
    finished = write_run(tmp_path / "a", "sync", period=1)
    running = write_run(tmp_path / "b", steps=200, finished=False)
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "ro')
    started = write_run(tmp_path / "c", steps=0, finished=False)
    html = make_report([finished, running, started]).html()
    states = [row["State"] for row in table(html)]
    assert states == ["finished", "running at 25 %", "running"]
    assert [row["Test accuracy"] for row in table(html)] == ["98.75 %", "95.00 %", "–"]
    assert "b: the last line of metrics.jsonl is incomplete" in html


def test_before_the_first_record(tmp_path):
    started = write_run(tmp_path / "a", steps=0, finished=False)
    with pytest.raises(ValueError, match=r"has no records yet: a run writes the first after 1.0 s"):
        make_report([started])


def test_before_the_first_evaluation(tmp_path):
    report = make_report([write_run(tmp_path / "a", steps=40, finished=False)])
    assert [drawing.name for drawing in report.drawings] == ["training", "statistics"]
    assert report.html()


def test_one_worker_and_no_statistics(tmp_path):
    report = make_report([write_run(tmp_path / "a", "sync", workers=1)])
    assert report.drawings[0].columns == 3, "no panels of bytes"
    (row,) = table(report.html())
    assert [row[head] for head in ("Averagings", "Sent per rank", "Sent % of parallel", "m Eq. 16")] == 4 * ["–"]


def test_numbers_that_are_not_finite(tmp_path):
    """A run that diverges writes null."""
    directory = write_run(tmp_path / "a")
    text = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text(re.sub(r'"(loss|grad_sqr)": [\d.e-]+', r'"\1": null', text))
    assert "Test loss" not in table(make_report([directory]).html())[0]


def test_given_twice_counts_once(tmp_path):
    directory = write_run(tmp_path / "a")
    assert len(make_report([directory, tmp_path / "a" / ".." / "a"]).lines) == 1


def test_few_runs_have_their_own_names(tmp_path):
    lines = draw_as([read_run(write_run(tmp_path / f"h{h}", period=h)) for h in (2, 4, 8)])
    assert [line.legend for line in lines] == ["h2", "h4", "h8"]
    assert len({line.color for line in lines}) == 3


def test_seeds_look_the_same(tmp_path):
    runs = [read_run(write_run(tmp_path / f"h{h}-{seed}", period=h, seed=seed)) for h in (2, 4) for seed in (0, 1)]
    lines = draw_as(runs)
    assert [line.legend for line in lines[::2]] == [
        "local-ada, K = 2, H = 2 (2 runs)",
        "local-ada, K = 2, H = 4 (2 runs)",
    ]
    assert lines[0].style == lines[1].style != lines[2].style


def test_many_runs_share_a_colour_by_preset(tmp_path):
    presets = ("acc-ada", "local-ada")
    grid = [(p, k, h) for p in presets for k in (2, 4) for h in (2, 8, 32)]
    directories = [write_run(tmp_path / f"{p}-{k}-{h}", p, workers=k, period=h) for p, k, h in grid]
    report = make_report(directories)
    assert {line.legend for line in report.lines} == {f"{p} (6 runs, darker for larger H)" for p in presets}
    assert len({line.color for line in report.lines}) == 6
    gain = next(drawing for drawing in report.drawings if drawing.name == "gain").figure()
    titles = [panel.get_title(loc="left") for panel in gain.axes]
    assert titles == [f"K = {k}, H = {h}: ρ or r/H" for h in (2, 8, 32) for k in (2, 4)], (
        "rows H, columns K, as in Figs. 12 and 13"
    )
    acc, local = (dict.fromkeys(np.unique(line.get_ydata())) for line in gain.axes[2].get_lines())
    assert list(acc) == [pytest.approx(1.5 / 8)], "r/H"
    assert list(local) == [1.5], "ρ"
    assert "Settings that differ" not in report.html()


def test_settings_that_differ(tmp_path):
    html = make_report([write_run(tmp_path / str(seed), seed=seed) for seed in (3, 5)]).html()
    assert re.search("<th>seed</th>.*<td>3</td>.*<td>5</td>", html, re.DOTALL)


@pytest.mark.parametrize(
    ("preset", "rule", "text"),
    [
        ("local", {"rule": "qsr", "alpha": 0.2, "h_base": 4}, "QSR α = 0.2, ≥ 4"),
        ("local", {"rule": "qsr", "alpha": 0.2, "h_base": 4, "max_period": 64}, "QSR α = 0.2, ≥ 4, ≤ 64"),
        ("local", {"rule": "power", "alpha": 0.2, "h_base": 4, "exponent": 3.0}, "(α/η)^3.0, α = 0.2, ≥ 4"),
        ("local", {"rule": "post-local", "period": 8}, "1, then 8"),
        ("local", {"rule": "adacomm", "period": 8}, "AdaComm from 8"),
        ("acc-lin", {"period": 8}, "a = 8"),
        ("sync", {"period": 8}, "H = 1"),
    ],
)
def test_period_in_words(tmp_path, preset, rule, text):
    assert describe_period(read_run(write_run(tmp_path / "a", preset, steps=0, finished=False, **rule))) == text


def test_names(tmp_path):
    assert short_names([tmp_path / "a"]) == ["a"]
    assert short_names([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]


def test_thinning_keeps_means_and_long_rounds():
    x = np.concatenate([np.linspace(0, 1, 100_000), [2.0, 3.0]])
    y = np.concatenate([np.tile([0.0, 2.0], 50_000), [7.0, 9.0]])
    short_x, short_y = thin(x, y, 300)
    assert len(short_x) <= 300
    assert short_y[:99] == pytest.approx(1, abs=0.01)
    assert short_y[-2:].tolist() == [7, 9], "the last rounds, of one bin each, are not drowned by the many before"
    assert thin(np.array([0.0, 1, 2]), np.array([1.0, np.nan, 3]))[1].tolist() == [1, 3]


def test_plateaus():
    x, y = plateaus(np.arange(7.0), np.array([4.0, 4, 4, 8, 8, 8, 3]))
    assert x.tolist() == [0, 2, 3, 5, 6]
    assert y.tolist() == [4, 4, 8, 8, 3]
    assert plateaus(np.array([]), np.array([]))[0].size == 0
