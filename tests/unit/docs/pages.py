"""README.md, CONTRIBUTING.md and the pages of docs/, taken apart."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
WRITTEN_BY_COMMANDS = ("docs/results/", "docs/gpu/2026")
PAGES = [
    name
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "tests" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if not (name := str(path.relative_to(ROOT))).startswith(WRITTEN_BY_COMMANDS) or path.name == "README.md"
]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL)
    return [Block(page, language, text) for language, text in found if not languages or language in languages]


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)


def code_spans(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


def commands(page: str) -> list[list[str]]:
    """The words of every command line of the page's shell blocks, comments and prompts left out."""
    lines = []
    for block in blocks(page, "bash", "console"):
        text = re.sub(r"\\\n\s*", "", block.text)
        if block.language == "console":  # what is printed has no prompt
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
        lines += [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words]
