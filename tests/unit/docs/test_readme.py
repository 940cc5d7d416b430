"""The README's commands are ones that there are, of files that there are or that a command above makes."""

import re
import shlex
from pathlib import Path

import pytest

from hvdlocal.cli.configuration import parse
from hvdlocal.cli.main import COMMANDS

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]


def commands():
    """The words of every command of hvdlocal's, without its launcher."""
    for words in LINES:
        if "hvdlocal" in words:
            yield words[words.index("hvdlocal") + 1 :]


def test_the_environment_is_activated_first():
    first = next(i for i, words in enumerate(LINES) if "hvdlocal" in words)
    assert ["source", ".venv/bin/activate"] in LINES[:first]


def test_files():
    made = {"run.yaml", "job.sbatch", "report.html", "model.pt"}
    assert ["cp", "experiments/digits.yaml", "run.yaml"] in LINES
    named = {word for words in LINES for word in words if re.search(r"\.(yaml|py|sbatch|html|pt)$", word)} - made
    named |= set(re.findall(r"(?:examples|experiments|install|docs)/[\w./-]*\w", README))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands(words):
    assert words[0] in COMMANDS
    if words[0] == "train" and "--help" not in words:
        settings = [str(ROOT / "experiments" / "digits.yaml") if word == "run.yaml" else word for word in words[1:]]
        assert parse(settings).output in ("runs/mine", "runs/digits")
