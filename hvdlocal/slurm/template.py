"""The templates: scripts that sbatch takes as they are, and that can be made ready for one job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

_DIRECTIVE = re.compile(r"#SBATCH --(?P<name>[a-z-]+)(?:=(?P<value>.*))?")
_PLACE = """\
# sbatch runs a copy of this file from elsewhere. Submit it from the directory that holds slurm/.
cd "${SLURM_SUBMIT_DIR:-.}"
source slurm/common.sh
"""


NAMES = ("cpu", "gpu", "gpu-nodes", "gpu-nodes-srun", "staging", "prepare", "sweep", "container")
"""The simplest first."""


def directory() -> Path:
    """Where the templates and common.sh are.

    Raises:
        FileNotFoundError: the package was installed without them.
    """
    path = Path(str(resources.files("hvdlocal.slurm"))) / "templates"
    if not (path / "common.sh").is_file():
        raise FileNotFoundError(f"no templates in {path}: hvdlocal is not installed completely")
    return path.resolve()


@dataclass(frozen=True)
class Place:
    """Where a job works: absolute paths on the cluster.

    Attributes:
        directory: the working directory, to which relative paths of the run refer.
        executables: the directory of the Python that runs the job.
        templates: the directory of common.sh.
        site: a file of the site's settings instead of site.sh beside common.sh.
    """

    directory: str
    executables: str
    templates: str
    site: str | None = None

    def commands(self, arguments: Sequence[str]) -> str:
        """The lines that replace those by which an unchanged template finds its place and arguments."""
        given = {"HVDLOCAL_SITE": self.site, "HVDLOCAL_BIN": self.executables}
        lines = [f"cd {shlex.quote(self.directory)}"]
        lines += [f"export {name}={shlex.quote(path)}" for name, path in given.items() if path is not None]
        lines.append(f"source {shlex.quote(self.templates + '/common.sh')}")
        lines.append(f"set -- {shlex.join(arguments)}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Template:
    """One of slurm/*.sbatch."""

    name: str
    text: str

    @classmethod
    def load(cls, name: str) -> Template:
        """Reads one.

        Raises:
            ValueError: no template has this name.
        """
        if name not in NAMES:
            raise ValueError(f"no template {name!r}: choose one of {', '.join(NAMES)}")
        return cls(name, (directory() / f"{name}.sbatch").read_text(encoding="utf-8"))

    @property
    def summary(self) -> str:
        """What it is for, in one sentence."""
        return self.text.splitlines()[1].removeprefix("# ")

    @property
    def options(self) -> dict[str, str]:
        """The options of sbatch that it sets."""
        found = (_DIRECTIVE.fullmatch(line) for line in self.text.splitlines())
        return {match["name"]: match["value"] or "" for match in found if match}

    def numbers(self, variable: str) -> list[int]:
        """A list of numbers in it, such as `ranks=(1 2 4)`; empty when it has none of this name."""
        match = re.search(rf"^{variable}=\((.*)\)$", self.text, re.MULTILINE)
        return [int(number) for number in match[1].split()] if match else []

    def render(
        self,
        options: Mapping[str, str | None],
        arguments: Sequence[str],
        place: Place,
        made_by: str,
        numbers: Mapping[str, Iterable[int]] | None = None,
    ) -> str:
        """A script that sbatch takes from any directory.

        Args:
            options: of sbatch, checked; None for one without a value. They replace those of the template or come in addition.
            arguments: of the job: what an unchanged template gets after its name.
            place: where the job works.
            made_by: the command that asked for it, for the reader of the script.
            numbers: lists of numbers that replace those of the template.

        Raises:
            ValueError: a control character in anything that becomes part of the script.
        """
        paths = (place.directory, place.executables, place.templates, place.site or "")
        for part in (*arguments, *paths, made_by):
            if not part.isprintable() and part:
                raise ValueError(f"{part!r}: no newlines or other control characters in a job")
        assert self.text.count(_PLACE) == 1, f"{self.name} does not say where it works as the other templates do"
        text = re.sub(r"^#   sbatch .*$", lambda _: f"# Made by: {made_by}", self.text, flags=re.MULTILINE)
        for name, values in (numbers or {}).items():
            line = f"{name}=({' '.join(map(str, values))})"
            text, changes = re.subn(rf"^{name}=\(.*\)$", line, text, flags=re.MULTILINE)
            assert changes == 1, f"{self.name} has no list {name}"
        text = text.replace(_PLACE, place.commands(arguments))
        return "\n".join(_with_directives(text.splitlines(), options)) + "\n"


def _with_directives(lines: Sequence[str], options: Mapping[str, str | None]) -> list[str]:
    """The lines with these options of sbatch: in the place of the template's own, others after its last one."""
    remaining = {name: f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()}
    merged, end = [], 0
    for line in lines:
        match = _DIRECTIVE.fullmatch(line)
        merged.append(remaining.pop(match["name"], line) if match else line)
        end = len(merged) if match else end
    return merged[:end] + list(remaining.values()) + merged[end:]
