"""Whatever a configuration holds: a valid one, or one sentence. No other exception, no hang, and nothing of it is run."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hvdlocal.cli.configuration import parse
from hvdlocal.directory import Directory
from hvdlocal.training import TrainConfig
from hvdlocal.training.config import SETTINGS
from hvdlocal.training.config_checks import check_ranges
from hvdlocal.training.run_files import describe

GOOD = {"data": {"path": "x", "batch_size": 8}, "model": {"name": "digits_cnn"}, "output": "o"}
KEYS = sorted(SETTINGS)
SECTIONS = sorted({key.rsplit(".", 1)[0] for key in KEYS if "." in key})

FUZZ = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**30, 10**400, -(2**63), 1e308, float("nan"), float("inf"), float("-inf"), 0, -1]),
)
scalars = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=20), st.dates(), st.binary(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)


def outcome(*arguments: str) -> TrainConfig | None:
    """The configuration, which must be sound; None after an error, which must be one sentence."""
    try:
        config = parse(list(arguments))
    except (ValueError, OSError) as error:
        assert is_a_sentence(error)  # noqa: PT017  (there need not be an error)
        return None
    assert isinstance(config, TrainConfig)
    describe(Directory(Path(arguments[0]).parent), asdict(config), {})  # what a run leaves can be given to another
    assert repr(parse([str(Path(arguments[0]).with_name("config.yaml"))])) == repr(config)  # NaN is not equal to itself
    try:
        check_ranges(config)
    except ValueError as error:
        assert is_a_sentence(error)  # noqa: PT017
    return config


def is_a_sentence(error: Exception) -> bool:
    return bool(str(error)) and "\n" not in str(error)


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good configuration with another value at a dotted path."""
    tree: dict[str, Any] = {**GOOD, "data": dict(GOOD["data"]), "model": dict(GOOD["model"])}
    *above, last = path.split(".")
    place = tree
    for name in above:
        place = place.setdefault(name, {})
    place[last] = value
    return tree


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    outcome(str(path))


@FUZZ
@given(st.text("abd:{}[]&*!|>-?#,'\"% \n\t~<0.é\ufeff\u2028", max_size=60))
def test_any_text_of_yaml_s_signs(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD) + content, encoding="utf-8")
    outcome(str(path))


@FUZZ
@given(values)
def test_any_document(tmp_path, document):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    outcome(str(path))


@settings(FUZZ, max_examples=50)
@given(st.sampled_from([*KEYS, *SECTIONS]), values)
@example("epochs", 10**400)
@example("optimizer", "os.system")
def test_another_value_somewhere(tmp_path, key, value):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(changed(key, value), allow_unicode=True), encoding="utf-8")
    outcome(str(path))


@FUZZ
@given(st.sampled_from([*KEYS, *SECTIONS]), st.text(max_size=12).filter(lambda name: name != ""))
def test_another_key_somewhere(tmp_path, key, name):
    path = tmp_path / "run.yaml"
    above = key.rsplit(".", 1)[0] + "." if "." in key else ""
    tree = changed(above + name, 1)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    if outcome(str(path)) is not None:
        assert above + name in KEYS


@settings(FUZZ, max_examples=50)
@given(st.sampled_from([*KEYS, *SECTIONS]), st.text(max_size=30) | values.map(str))
@example("optimizer.betas", "&a [*a, *a]")
@example("optimizer.betas", "[" * 3000)
@example("epochs", "9" * 400)
@example("optimizer", "os.system")
@example("seed", "!!python/object/apply:os.getpid []")
def test_any_value_on_the_command_line(tmp_path, key, value):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    outcome(str(path), f"--{key}={value}")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "line 1: it holds no settings"),
        (b"null\n", "line 1: it holds no settings"),
        (b"just words\n", "line 1: settings are written as `key: value`"),
        (b"seed: 1\nseed: 2\n", "line 2: 'seed' is here again, after line 1"),
        (b"data: x.yaml\n", "line 1: 'data' is a section: write its keys below it, as in 'data.path'"),
        (b"\nseed: {a: 1}\n", "line 2: 'seed' is one value, not a section"),
        (b"output:\n", "line 1: 'output' has no value"),
        (b"seed: 1\n---\nseed: 2\n", "line 2: a second document"),
        (b"data: {\xff: 1}\n", "line 1: this is not UTF-8"),
        (b"data:\n\tpath: x\n", "line 2: this is no YAML"),
        (b"a" * 70_000, "is longer than 65536 bytes"),
        (b"data: " + b"[" * 20_000, "line 1: 'data' is a section"),
        (b"optimizer: {betas: " + b"[" * 20_000, "line 1: 'optimizer.betas' takes a list of plain values"),
        (b"&a {data: *a, model: *a, output: x}\n", "line 1: anchors and aliases"),
        (b"optimizer: {betas: &a [*a, *a]}\n", "line 1: anchors and aliases"),
        (b"seed: !!python/object/apply:os.system [id]\n", "line 1: tags"),
        (b"? {a: 1}\n: 2\n", "line 1: a key must be one word"),
    ],
)
def test_what_is_said(tmp_path, content, said):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the next line is the match)
        parse([str(path)])
    assert f"{path}{' ' if said.startswith('is') else ', '}{said}" in str(error.value)


def test_a_byte_order_mark_and_an_empty_section_are_no_mistakes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfoptimizer:\n  # lr: 0.5\n" + yaml.safe_dump(GOOD).encode())
    assert parse([str(path)]).optimizer.lr == 0.1


@pytest.mark.parametrize("argument", ["", "/", "/dev/zero", "missing.yaml", "a\0b", "\udcff", "--config", "--config="])
def test_what_is_no_file(argument):
    with pytest.raises((ValueError, OSError)):
        parse([argument])


@pytest.mark.parametrize(
    "content",
    [
        "optimizer: canary.Thing",
        "optimizer: {class_path: canary.Thing}",
        "method: {period: canary.Thing}",
        "seed: !!python/object/apply:canary.run []",
        "seed: !!python/object/new:canary.Thing []",
        "seed: !!python/name:canary.Thing",
        "seed: !!python/module:canary",
        "model: {name: canary.Thing}",
        "model: {name: 'canary:Thing', arguments: {class_path: canary.Thing, init_args: {}}}",
        "task: canary:run",
        "callbacks: [{class_path: canary.Thing}, {name: x, arguments: {a: {class_path: canary.Thing}}}]",
        "task_arguments: {a: {class_path: canary.Thing}, b: [canary.run, '$(touch ran)']}",
        "data: {path: d, transform: 'canary:run'}",
        "data: {path: canary.Thing, train_split: '$(touch ran)', test_split: '${oc.env:HOME}'}",
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_nothing_is_imported_or_run(tmp_path, monkeypatch, content, as_file):
    (tmp_path / "canary.py").write_text(
        "open('ran', 'w').close()\nclass Thing: pass\ndef run(): open('ran', 'w').close()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(yaml.safe_dump(GOOD))
    Path("more.yaml").write_text(content + "\n")
    name, value = content.split(": ", 1)
    outcome("good.yaml", *(["--config", "more.yaml"] if as_file else [f"--{name}={value}"]))
    assert "canary" not in sys.modules
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{norm: local, 'head.*': average}", None),
        ("{norm: local, norm: average}", "line 1: 'method.buffers' has norm twice"),
        ("{norm: [local]}", "line 1: 'method.buffers' takes a mapping of names to plain values"),
    ],
)
def test_a_mapping(tmp_path, written, said):
    """Only a setting that takes one may have it; what the run then writes is a configuration again."""
    path = tmp_path / "run.yaml"
    path.write_text(f"method: {{buffers: {written}}}\n" + yaml.safe_dump(GOOD))
    if said is None:
        config = outcome(str(path))
        assert config is not None
        assert config.method.buffers == {"norm": "local", "head.*": "average"}
    else:
        with pytest.raises(ValueError, match=said):
            parse([str(path)])


def test_arguments_of_own_code(tmp_path):
    """They may be nested; what the run then writes is a configuration again, and single ones can be given."""
    path = tmp_path / "run.yaml"
    written = {
        "a": 1,
        "b": "2",
        "c": [1.5, {"d": None}],
        "e": {"f": True},
        "g": "x: y",
        "h": 1e-3,
        "class_path": "os.sep",
    }
    path.write_text(yaml.safe_dump(GOOD | {"model": {"name": "mine:Net", "arguments": written}}))
    config = outcome(str(path))
    assert config is not None
    assert config.model.arguments == written
    config = outcome(
        str(path), "--model.arguments.a=7", "--model.arguments.new", "[1, {x: 1e-3}]", "--task_arguments.rate", "1e-3"
    )
    assert config is not None
    assert config.model.arguments == written | {"a": 7, "new": [1, {"x": 0.001}]}
    assert config.task_arguments == {"rate": 0.001}
    for wrong, said in (
        ("--model.arguments.a=!!python/name:os.sep", "write a number, a word, a list or a mapping"),
        ("--model.arguments.a", "--model.arguments.a needs a value"),
        ("--model.arguments=[1]", "model.arguments: Expected"),
    ):
        with pytest.raises(ValueError, match=said):
            parse([str(path), wrong])
