"""The API reference has every public name once, and the pages of docs/ are all in the menu."""

import ast
import re
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))


def exported(stub: Path) -> set[str]:
    """The names that a stub re-exports, submodules left out."""
    imports = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports if node.module for alias in node.names}


def test_every_public_name_is_there_once():
    entries = [name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), flags=re.MULTILINE)]
    documented = Counter(name.split(".")[-1] for name in entries)
    stubs = [ROOT / "hvdlocal" / "__init__.pyi", *(ROOT / "hvdlocal").glob("*/__init__.pyi")]
    public = set().union(*map(exported, stubs)) - {"__version__"}
    assert len(public) > 40
    assert sorted(public - set(documented)) == []
    assert [name for name, count in documented.items() if count > 1] == []


def test_every_page_is_in_the_menu():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    docs = ROOT / "docs"
    menu = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))
