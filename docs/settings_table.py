"""A hook of mkdocs: puts the tables of all settings, as they are declared, into settings.md."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from hvdlocal.training import config
from hvdlocal.training.settings import Setting, settings_of

MARK = "<!-- settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the mark by one table for each section of a configuration."""
    return markdown.replace(MARK, tables()) if MARK in markdown else markdown


def tables() -> str:
    """The tables in Markdown."""
    texts = descriptions()
    sections: dict[str, list[str]] = {}
    for name, setting in settings_of(config.TrainConfig).items():
        section, _, key = name.rpartition(".")
        words = [f"`{key}`{' ↻' if setting.resumable else ''}", values(setting), default(setting), texts[name]]
        sections.setdefault(section, []).append(f"| {' | '.join(words)} |")
    ordered = sorted(sections.items(), key=lambda item: item[0] != "")  # the keys without a section first
    return "\n\n".join(
        "\n".join(
            [
                f"## {f'`{section}`' if section else 'Run'}",
                "",
                "| key | values | default | |",
                "|---|---|---|---|",
                *rows,
            ]
        )
        for section, rows in ordered
    )


def values(setting: Setting) -> str:
    """The values that a setting may have, in words."""
    kinds = get_args(setting.type) if get_origin(setting.type) in (UnionType, Union) else (setting.type,)
    words = [_kind(kind) for kind in kinds if kind is not NoneType]
    return ", ".join(
        words
        + [str(setting.range).replace(", and at most 1e30", "").replace(" to 1e30", " on")]
        * (setting.range is not None)
    )


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is dict:
        return "a mapping"
    if kind is list:
        return "a list"
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers"
    return {
        str: "text",
        bool: "`true`, `false`",
        int: "whole number",
        float: "number",
        dict: "mapping of names to values",
    }[kind]


def default(setting: Setting) -> str:
    """The default of a setting, as YAML has it."""
    if setting.default is dataclasses.MISSING:
        return "required" if not setting.needed_by else ""
    if setting.default is None:
        return ""
    value = setting.default
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


def descriptions() -> dict[str, str]:
    """The text below each field, by the dotted name of its setting."""
    classes = {node.name: node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)}

    def walk(name: str, prefix: str) -> dict[str, str]:
        found: dict[str, str] = {}
        body = classes[name].body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                if isinstance(node.annotation, ast.Name) and node.annotation.id in classes:
                    found |= walk(node.annotation.id, f"{prefix}{node.target.id}.")
                elif isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    found[prefix + node.target.id] = " ".join(str(following.value.value).split()).replace("|", "\\|")
        return found

    return walk("TrainConfig", "")
