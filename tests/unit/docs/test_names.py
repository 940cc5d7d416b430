"""Paths, names, settings and variables that the documents quote exist; links lead somewhere; lines of prose are short."""

import importlib
import re
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

import pytest
from pages import PAGES, ROOT, code_spans, prose, read
from torch.nn import Module

from hvdlocal import LocalOptimizer
from hvdlocal.training import TrainConfig

FOLDERS = "hvdlocal|data_prep|benchmarks|tests|docs|experiments|examples|install|slurm"


@pytest.mark.parametrize("page", PAGES)
def test_paths(page):
    named = {span for span in code_spans(page) if re.fullmatch(rf"(?:{FOLDERS})/[\w./*-]*", span)}
    assert [name for name in sorted(named) if not any(ROOT.glob(name))] == []


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", prose(page))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not ((ROOT / page).parent / target).exists()] == []


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(words[:length]))
        except ImportError:
            continue
        for word in words[length:]:
            if not hasattr(found, word):
                return False
            found = getattr(found, word)
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package(page):
    named = set(re.findall(r"\b(?:hvdlocal|data_prep)(?:\.[A-Za-z_]\w*)+", read(page)))
    files = {name for name in named if re.search(r"\.(py|yaml|sh|out|failures)$", name)}
    assert [name for name in sorted(named - files) if not resolves(name)] == []


@cache
def settings() -> frozenset[str]:
    def names(cls: type, prefix: str = "") -> list[str]:
        hints = get_type_hints(cls)
        found = []
        for field in fields(cls):
            found.append(prefix + field.name)
            if is_dataclass(hints[field.name]):
                found += names(hints[field.name], f"{prefix}{field.name}.")
        return found

    return frozenset(names(TrainConfig))


SECTIONS = "data|model|optimizer|schedule|method|checkpoint"


@pytest.mark.parametrize("page", PAGES)
def test_settings(page):
    if page == "docs/mistakes.md":
        pytest.skip("a page of mistakes, which a test of its own makes")
    spans = [span.split(":")[0] for span in code_spans(page)]
    named = {span for span in spans if re.fullmatch(rf"(?:{SECTIONS})(?:\.[a-z_0-9]+)+", span)}
    attributes = {f"optimizer.{name}" for name in dir(LocalOptimizer)} | {f"model.{name}" for name in dir(Module)}
    assert sorted(named - settings() - attributes - {"model.pt"}) == []


@pytest.mark.parametrize("page", PAGES)
def test_environment_variables(page):
    sources = [
        path for folder in ("hvdlocal", "slurm", "install") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    known = "\n".join(
        path.read_text(encoding="utf-8") for path in sources if path.suffix in (".py", ".sh", ".sbatch", "")
    )
    named = set(re.findall(r"\bHVDLOCAL_[A-Z_]+[A-Z]", read(page)))
    assert [name for name in sorted(named) if name not in known] == []


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_are_short(page):
    lines = [line for line in prose(page).splitlines() if not re.match(r"\s*(\||!\[|#|:::|    )", line)]
    assert [line for line in lines if len(line) > 120] == []
