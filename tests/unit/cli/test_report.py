"""`hvdlocal report` and `hvdlocal figures` from end to end, on a run that `hvdlocal train` has made."""

import subprocess
import sys

import pytest

import hvdlocal
from data_prep.__main__ import main as data_prep
from hvdlocal.cli import main

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on one rank."""
    directory = tmp_path_factory.mktemp("report")
    pytest.importorskip("sklearn")
    assert data_prep(["digits", "--output", f"{directory}/data"]) == 0
    (directory / "run.yaml").write_text(
        f"data: {{path: {directory}/data, batch_size: 32}}\nmodel: {{name: digits_cnn}}\noutput: {directory}/out\nepochs: 1\n"
    )
    program = "import hvdlocal; hvdlocal.init('mpi4py'); from hvdlocal.cli import main; main(['train', 'run.yaml'])"
    subprocess.run([sys.executable, "-c", program], cwd=directory, check=True, timeout=120, capture_output=True)
    return directory / "out"


def test_what_train_writes_can_be_read(trained, tmp_path, capsys):
    assert main(["report", str(trained), "--output", f"{tmp_path}/new/page.html", "--png", f"{tmp_path}/png"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}/new/page.html: 1 run, ")
    html = (tmp_path / "new" / "page.html").read_text()
    assert "finished" in html
    assert "local-ada" in html
    pictures = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert {"test.png", "time.png", "training.png"} <= set(pictures)
    assert all((tmp_path / "png" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such directory; give the output directory of a run"),
        (["."], "it has no metrics.jsonl and no config.yaml"),
        (["out", "--output", "out"], "--output out is a directory: name a file, such as out/report.html"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


def test_figures(tmp_path, capsys, monkeypatch):
    from hvdlocal.papers import paper_figures

    few = {name: paper_figures.FIGURES[name] for name in ("figure3_gain", "figure6_periods")}  # the others take longer
    monkeypatch.setattr(paper_figures, "FIGURES", few)
    assert main(["figures", "--output", f"{tmp_path}/figures", "--format", "png"]) == 0
    said = capsys.readouterr().out
    assert "CIFAR-10    K = 24   m = 3.72" in said
    assert len(list((tmp_path / "figures").glob("figure*.png"))) == 2


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "hvdlocal report RUN" in capsys.readouterr().out
    assert hvdlocal.__version__
