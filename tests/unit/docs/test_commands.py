"""Commands in the documents' shell blocks: all of them have options that exist; those that take seconds are run."""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pages import PAGES, ROOT, blocks, commands, read

import hvdlocal.models
from data_prep.arguments import DATA_SETS
from hvdlocal.cli import main
from hvdlocal.cli.main import COMMANDS
from hvdlocal.communicator import SingleProcess
from hvdlocal.models import MODELS

LINES = [(page, words) for page in PAGES for words in commands(page)]
CONFIGURED = ("plan", "advise", "slurm", "reproduce")
"""Commands that take the settings of `hvdlocal train` as well."""


def after(words: list[str], *names: str) -> list[str]:
    """What follows the first of these words, whatever launcher or path stands before it; nothing if none is there."""
    places = [i for i, word in enumerate(words) if word.rpartition("/")[2] in names]
    return words[places[0] + 1 :] if places else []


def output_of(*arguments: str) -> tuple[int, str]:
    """The exit code of a command of hvdlocal's, and what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = main([*arguments])
        except SystemExit as end:
            code = end.code
    return int(code or 0), printed.getvalue()


@cache
def help_of(*words: str) -> str:
    code, text = output_of(*words, "--help")
    assert code == 0
    return text


def unknown(words: list[str], help_text: str) -> list[str]:
    options = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--help"]
    return [option for option in options if not re.search(rf"{re.escape(option)}\b", help_text)]


def help_for(command: str, *words: str) -> str:
    """The options that a command line may have."""
    if command == "prepare":
        return help_of(command, words[0])
    if command == "slurm" and "prepare" in words:  # the last arguments are those of a data set
        return help_of(command) + help_of("prepare", next(word for word in words if word in DATA_SETS))
    return help_of(command) + (help_of("train") if command in CONFIGURED else "")


@pytest.mark.parametrize(
    ("page", "words"), LINES, ids=lambda value: value if isinstance(value, str) else shlex.join(value)
)
def test_command(page, words):
    if words[0] == "conda":
        return
    if given := after(words, "hvdlocal", "$(hvdlocal"):
        assert given[0] in COMMANDS
        assert unknown(given, help_for(*given)) == []
    elif script := next((word for word in words if re.fullmatch(r"(benchmarks|examples)/\w+\.(py|sh)", word)), None):
        assert unknown(words[words.index(script) :], (ROOT / script).read_text()) == []
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    files = [word for word in words if re.fullmatch(r"(experiments|slurm|install)/[\w./-]+", word)]
    assert [name for name in files if not (ROOT / name).exists()] == []


def examples(page: str) -> Iterator[tuple[list[str], str]]:
    """The console blocks of a page: a command, and what it prints."""
    for block in blocks(page, "console"):
        command, _, printed = block.text.replace("\\\n", "").partition("\n")
        yield shlex.split(command)[2:], printed


@pytest.mark.parametrize(("words", "printed"), list(examples("docs/plan.md")), ids=["plan", "compare"])
def test_plan_prints_what_its_page_shows(words, printed, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = [str(tmp_path / word) if word == "plan.png" else word for word in words]
    code, text = output_of(*words)
    assert code == 0
    assert re.fullmatch(".*".join(map(re.escape, printed.split("…\n"))), text, flags=re.DOTALL)


def test_scale_prints_what_its_page_shows(monkeypatch, capsys):
    import scale

    lines = [words for page, words in LINES if page == "docs/scale.md"]
    for words, shown in zip(lines, [one for one in blocks("docs/scale.md", "") if "H = 64" in one.text], strict=True):
        monkeypatch.setattr("sys.argv", words[1:])
        scale.main()
        assert shown.text.strip() in capsys.readouterr().out


def test_the_playbook_prints_what_its_page_shows(monkeypatch, capsys):
    import playbook

    for block in blocks("docs/playbook.md", "console"):
        command, _, shown = block.text.partition("\n")
        monkeypatch.setattr("sys.argv", command.split()[2:])
        playbook.main()
        assert capsys.readouterr().out == shown


def test_the_playbook_agrees_with_what_was_measured():
    """Utilisation is one over the cost of a step, of which averaging.md has the measured and the predicted one."""
    cells = {"sync": [], "local, H = 4": [], "local, H = 16": []}
    for name, predicted, measured in re.findall(
        r"^(sync|local, H = \d+) +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+) ", read("docs/averaging.md"), flags=re.MULTILINE
    ):
        if name in cells:
            cells[name].append(f"{100 / float(measured):.0f} % ({100 / float(predicted):.0f})")
    rows = re.findall(
        r"^\| (?:data parallelism, one|local steps, H).*?\| (.*) \|$", read("docs/playbook.md"), flags=re.MULTILINE
    )
    assert rows == [" | ".join(row) for row in cells.values()]


def test_the_first_hour(tmp_path, monkeypatch):
    """The README's commands in their order, by one rank and for one epoch, and the examples that read the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    shutil.copytree(ROOT / "experiments", "experiments")
    lines = commands("README.md")
    assert ["source", ".venv/bin/activate"] in lines[: next(i for i, words in enumerate(lines) if "hvdlocal" in words)]
    run = []
    for words in lines:
        given = after(words, "hvdlocal")
        if words[0] == "cp":
            shutil.copy(*words[1:])
        elif given and given[0] not in ("advise", "export"):  # takes 20 seconds; wants a run that has not finished
            given = given[: given.index(">")] if ">" in given else given
            given += ["--epochs", "1"] * (given[0] == "train")
            given[1:2] = map(str, Path("runs").iterdir()) if given[0] == "report" else given[1:2]
            code, text = output_of(*given)
            assert code == 0, (given, text)
            run.append(given[0])
    assert run == ["prepare", "train", "plan", "train", "report", "slurm", "reproduce"]
    assert Path("report.html").stat().st_size > 100_000
    names = {"numpy": np}
    for page in ("docs/report.md", "docs/records.md"):
        exec(blocks(page, "python")[0].text, names)
    assert len(names["run"].rounds["gain"]) > 10


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    monkeypatch.setattr("hvdlocal.models.MODELS", dict(MODELS))
    monkeypatch.setattr("hvdlocal.models.registry.MODELS", hvdlocal.models.MODELS)
    exec(blocks("docs/train.md", "python")[0].text, {"__name__": "mine"})
    Path("run.yaml").write_text(blocks("docs/train.md", "yaml")[0].text)
    assert main(["prepare", "digits", "--output", "data/digits"]) == 0
    assert main(["train", "run.yaml", "--model.name", "tiny", "--epochs", "1"]) == 0


def test_own_data_and_a_model_of_ones_own(tmp_path, monkeypatch):
    """The page shows the files of examples/fields, which run as they are, also on data that were prepared."""
    page, folder = "docs/own-data-and-model.md", ROOT / "examples" / "fields"
    module = "\n\n".join(block.text for block in blocks(page, "python"))
    assert module.replace("\n\n\n", "\n\n") == (folder / "mymodel.py").read_text().replace("\n\n\n", "\n\n")
    assert blocks(page, "yaml")[0].text == (folder / "run.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    monkeypatch.setattr(sys, "path", list(sys.path))
    for file in folder.iterdir():
        shutil.copy(file, tmp_path)
    runpy.run_path("make_fields.py")
    for words in commands(page):
        given = after(words, "hvdlocal")
        if given and given[0] in ("prepare", "plan"):
            assert output_of(*given)[0] == 0
    own = ["--output", "own", "--task", "mymodel:RelativeError", "--epochs", "1"]
    assert output_of("train", "run.yaml", *own)[0] == 0
    result = json.loads(Path("own/summary.json").read_text())
    assert "within_tenth" in str(result)
    prepared = ["--data.path", "data/fields", *(f"--data.{name}=null" for name in ("inputs", "targets", "holdout"))]
    assert output_of("train", "run.yaml", *prepared, "--epochs", "1")[0] == 0
    sys.modules.pop("mymodel")


def test_from_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hvdlocal.communicator.launch._current", SingleProcess())
    assert main(["prepare", "digits", "--output", "data/digits"]) == 0
    Path("run.yaml").write_text(blocks("docs/train.md", "yaml")[0].text + "epochs: 1\n")
    names: dict[str, object] = {}
    exec(blocks("docs/train.md", "python")[1].text, names)
    assert names["summary"].steps > 5
