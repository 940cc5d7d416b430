"""One bad run, whatever is bad about it, is named and left out; the others are shown."""

import json
import os
import random
import re

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from recorded import write_run
from support.records import records

from hvdlocal.cli import main
from hvdlocal.report.page import make_report


def edit_line(number, **changes):
    """Changes values of one record of metrics.jsonl; a value of ... removes the field."""

    def change(run):
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines()
        record = json.loads(lines[number])
        record.update(changes)
        lines[number] = json.dumps({name: value for name, value in record.items() if value is not ...})
        path.write_text("\n".join(lines) + "\n")

    return change


def edit_config(**changes):
    """Changes settings; those of the method's period by their name, others by dotted names with __ for the dot."""

    def change(run):
        path = run / "config.yaml"
        config = yaml.safe_load(path.read_text())
        for name, value in changes.items():
            *above, last = name.split("__")
            place = config
            for part in above:
                place = place[part]
            place[last] = value
        path.write_text(yaml.safe_dump(config))

    return change


def put(name, content):
    return lambda run: (run / name).write_bytes(content)


def a_pipe(run):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")


def a_loop(run):
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(run / "config.yaml")


BAD = {
    "a broken line": (lambda run: edit_bytes(run, b'"epoch"', b"epoch"), r"metrics.jsonl, line 1 is damaged"),
    "a line that is no UTF-8": (lambda run: edit_bytes(run, b'"round"', b'"\xff"'), r"line 1 is damaged"),
    "a line that nests deeply": (
        put("metrics.jsonl", b"[" * 100_000 + b"\n{}\n"),
        r"line 1 is damaged \(too deeply nested",
    ),
    "a field twice": (lambda run: edit_bytes(run, b'"step": 4,', b'"step": 4, "step": 4,'), r"a key occurs twice"),
    "an endless line": (put("metrics.jsonl", b" " * (1 << 21)), r"line 1 is longer than 1048576 bytes"),
    "a number that is text": (
        edit_line(3, epoch="half"),
        r"line 4: epoch of a record of kind 'round' is not a valid number",
    ),
    "a number that is a list": (
        edit_line(3, elapsed_seconds=[1]),
        r"line 4: elapsed_seconds of a record of kind 'round'",
    ),
    "a step that is true": (edit_line(3, step=True), r"line 4: not a record of hvdlocal train"),
    "a step below 0": (edit_line(0, step=-4), r"line 1: not a record of hvdlocal train"),
    "a step of 400 digits": (edit_line(-1, step=10**400), r"not a record of hvdlocal train"),
    "an end without seconds": (edit_line(-1, seconds=None), r"seconds of a record of kind 'end' is not a valid number"),
    "an end with a part of them": (edit_line(-1, seconds={"elapsed": 1.0}), r"seconds of a record of kind 'end'"),
    "an end with text": (edit_line(-1, bytes_sent="many"), r"bytes_sent of a record of kind 'end'"),
    "a missing field": (edit_line(3, progress=...), r"line 4: a record of kind 'round' without progress"),
    "a pipe": (a_pipe, r"metrics.jsonl is not a regular file"),
    "a loop of links": (a_loop, r"no config.yaml"),
    "a list for a configuration": (put("config.yaml", b"[1, 2]\n"), r"config.yaml is empty or damaged"),
    "another configuration": (
        put("config.yaml", b"name: a service\nreplicas: 3\n"),
        r"has no valid epochs, which hvdlocal train",
    ),
    "a configuration of 20 MB": (put("config.yaml", b"#" * 20_000_000), r"config.yaml is longer than 16777216 bytes"),
    "a configuration that is no UTF-8": (put("config.yaml", b"epochs: \xff\n"), r"config.yaml: byte 8 is not UTF-8"),
    "an object of Python": (put("config.yaml", b"a: !!python/object/apply:os.getpid []\n"), r"tags are not read"),
    "a bomb of aliases": (put("config.yaml", b"a: &a [x, x]\nb: [*a, *a]\n"), r"anchors and aliases are not read"),
    "a setting twice": (put("config.yaml", b"epochs: 1\nepochs: 2\n"), r"a key occurs twice"),
    "no preset": (edit_config(method__preset=None), r"has no valid method.preset,"),
    "a preset of 50,000 letters": (edit_config(method__preset="x" * 50_000), r"has no valid method.preset,"),
    "a period that is text": (edit_config(method__period__period="often"), r"has no valid method.period.period,"),
    "a period that is a list": (edit_config(method__period=[8]), r"has no valid method.period.rule,"),
    "epochs below 0": (edit_config(epochs=-1), r"has no valid epochs,"),
    "epochs that are no number": (edit_config(epochs=float("nan")), r"has no valid epochs,"),
    "an interval that is null": (edit_config(log_every_seconds=None), r"has no valid log_every_seconds,"),
    "no ranks": (
        put("environment.json", b'{"ranks": "two"}'),
        r"environment.json has no valid ranks",
    ),
    "ranks below 1": (put("environment.json", b'{"ranks": 0}'), r"has no valid ranks,"),
    "ranks that are not JSON": (put("environment.json", b'{"ranks": NaN}'), r"NaN is not JSON"),
}


def edit_bytes(run, old, new):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", BAD)
def test_a_bad_run(tmp_path, what):
    damage, reason = BAD[what]
    damage(write_run(tmp_path / "bad", steps=100))
    with pytest.raises(ValueError, match=reason) as error:
        make_report([tmp_path / "bad"])
    assert str(tmp_path / "bad") in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_runs_beside_a_good_one(tmp_path, capsys):
    write_run(tmp_path / "good", steps=100)
    edit_bytes(write_run(tmp_path / "bad", steps=100), b'"epoch"', b"epoch")
    edit_config(epochs="many")(write_run(tmp_path / "worse", steps=100))
    page = tmp_path / "page.html"
    runs = [str(tmp_path / name) for name in ("bad", "good", "worse", "<nowhere>")]
    assert main(["report", *runs, "--output", str(page)]) == 2
    said = capsys.readouterr()
    assert f"{page}: 1 run, 4 figures" in said.out
    warnings = said.err.splitlines()
    assert len(warnings) == 3
    assert warnings[0].startswith(f"hvdlocal: WARNING: left out: {tmp_path}/bad/metrics.jsonl, line 1 is damaged")
    assert "worse/config.yaml has no valid epochs, which hvdlocal train always writes" in warnings[1]
    html = page.read_text()
    assert html.count("Left out: ") == 3
    assert ">good</td>" in html
    assert "<nowhere>" not in html
    page.unlink()
    assert main(["report", runs[0], runs[2], "--output", str(page)]) == 2
    assert capsys.readouterr().err.endswith("(and 1 more that are no runs)\n")
    assert not page.exists()


ODD = {
    "null everywhere": edit_line(3, loss=None, gain=None, lr=None, epoch=None, data_epoch=None, bytes_sent=None),
    "a period of null": edit_line(3, period=None),
    "a period beyond all bounds": edit_line(3, period=10**99),
    "a period of 0": edit_line(3, period=0),
    "beyond float64": edit_line(3, loss=10**400, divergence=-(10**400)),
    "beyond any statistics": edit_line(3, loss=1.7e308, grad_sqr=1e308, elapsed_seconds=1e308),
    "true for a number": edit_line(3, loss=True),
    "text where a number is not needed": edit_line(3, loss="small"),
    "an interval of null": edit_line(20, elapsed_seconds=None),
    "progress that goes back": edit_line(9, epoch=0.0, progress=-5.0),
    "all accuracies null": lambda run: edit_bytes_all(run, rb'"accuracy": [\d.]+', b'"accuracy": null'),
    "all losses zero": lambda run: edit_bytes_all(run, rb'"loss": [\d.e-]+', b'"loss": 0.0'),
    "no bytes": lambda run: edit_bytes_all(run, rb'"bytes_sent": \d+', b'"bytes_sent": 0'),
    "another kind": edit_line(3, kind="of another version"),
    "strange attempts": put("attempts.jsonl", b'{"step": 1e999, "ranks": 2}\n{"step": [], "ranks": {}}\n[]\nx\n\xff\n'),
    "half a sign": edit_config(seed="\ud800", model__name="$x_{$ \x00\x07\n"),
}


def edit_bytes_all(run, pattern, new):
    path = run / "metrics.jsonl"
    path.write_bytes(re.sub(pattern, new, path.read_bytes()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", ODD)
def test_odd_values_are_left_blank(tmp_path, what):
    write_run(tmp_path / "a", steps=100)
    ODD[what](write_run(tmp_path / "b", steps=100))
    report = make_report([tmp_path / "a", tmp_path / "b"])
    assert report.left_out == []
    assert len(report.lines) == 2
    assert report.html().count("data:image/svg+xml;base64,") == sum(len(drawing.panels) for drawing in report.drawings)


NAMES = ["$", "$x_{$", "a$b$c", r"\frac", "$\\", "_hidden", "x" * 200, "a\nb", "tab\there", "\x01", "<script>", "é"]
NAMES.append(os.fsdecode(b"\xff"))


def test_one_run_without_a_single_accuracy(tmp_path):
    ODD["all accuracies null"](write_run(tmp_path / "a", steps=100))
    report = make_report([tmp_path / "a"])
    assert report.drawings[0].title == "Test loss"
    assert "not evaluated yet" in report.html()


def test_names(tmp_path, capsys):
    """Of directories, in tables, legends and on axes."""
    directories = [write_run(tmp_path / name, steps=100, period=1 + i) for i, name in enumerate(NAMES)]
    page = tmp_path / "page.html"
    assert main(["report", *map(str, directories[:5]), "--output", str(page)]) == 0, "a legend of names"
    assert main(["report", *map(str, directories), "--output", str(page)]) == 0
    assert "<script>" not in page.read_text(encoding="utf-8")
    assert capsys.readouterr().err == ""


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 1e308, -1e308, 5e-324, 0, -1, 2**63, 1e100]),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink a failure would draw too many pages
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.integers(0, 10**6), odd), min_size=1, max_size=6), st.integers(0, 2**32))
def test_any_value_anywhere(tmp_path_factory, changes, seed):
    """A page or a sentence, and no other exception."""
    draws = random.Random(seed)
    directory = tmp_path_factory.mktemp("any")
    write_run(directory / "good", steps=60)
    run = write_run(
        directory / "odd", draws.choice(["local-ada", "sync", "acc-ada"]), steps=60, finished=draws.random() < 0.5
    )
    lines = records(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for place, value in changes:
        target = draws.choice([*lines, *lines, config, config["method"] or config])
        name = sorted(target)[place % len(target)]
        target[name] = value
        config["method"] = config["method"] if isinstance(config.get("method"), dict) else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    report = make_report([directory / "good", run])
    assert len(report.lines) + len(report.left_out) == 2
    assert all("\n" not in reason for reason in report.left_out)
    assert all(drawing.figure() for drawing in report.drawings)
