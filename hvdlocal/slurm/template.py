"""The templates: scripts that sbatch accepts unchanged, and that can be adapted to one job."""

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
"""The names of the templates, the simplest first."""


def directory() -> Path:
    """Returns the directory of the templates and common.sh.

    Raises:
        FileNotFoundError: the package was installed without them.
    """
    path = Path(str(resources.files("hvdlocal.slurm"))) / "templates"
    if not (path / "common.sh").is_file():
        raise FileNotFoundError(f"no templates in {path}: hvdlocal is not installed completely")
    return path.resolve()


@dataclass(frozen=True)
class Place:
    """The absolute paths on the cluster that a job uses.

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

    def commands(self, arguments: Sequence[str], variables: Mapping[str, str]) -> str:
        """Returns the lines that replace those with which an unchanged template finds its directory and arguments."""
        paths = {"HVDLOCAL_SITE": self.site, "HVDLOCAL_BIN": self.executables}
        lines = [
            f"cd {shlex.quote(self.directory)}",
            *(f"export {name}={shlex.quote(path)}" for name, path in paths.items() if path is not None),
            f"source {shlex.quote(self.templates + '/common.sh')}",
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            f"set -- {shlex.join(arguments)}",
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Template:
    """One of slurm/*.sbatch."""

    name: str
    text: str

    @classmethod
    def load(cls, name: str) -> Template:
        """Reads a template.

        Raises:
            ValueError: no template has this name.
        """
        if name not in NAMES:
            raise ValueError(f"no template {name!r}: choose one of {', '.join(NAMES)}")
        return cls(name, (directory() / f"{name}.sbatch").read_text(encoding="utf-8"))

    @property
    def summary(self) -> str:
        """Its purpose, in one sentence."""
        return self.text.splitlines()[1].removeprefix("# ")

    @property
    def options(self) -> dict[str, str]:
        """The options of sbatch that the template sets."""
        found = (_DIRECTIVE.fullmatch(line) for line in self.text.splitlines())
        return {match["name"]: match["value"] or "" for match in found if match}

    def numbers(self, variable: str) -> list[int]:
        """Returns a list of numbers in the template, such as `ranks=(1 2 4)`; empty if there is no such list."""
        match = re.search(rf"^{variable}=\((.*)\)$", self.text, re.MULTILINE)
        return [int(number) for number in match[1].split()] if match else []

    def render(
        self,
        options: Mapping[str, str | None],
        arguments: Sequence[str],
        place: Place,
        made_by: str,
        numbers: Mapping[str, Iterable[int]] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Makes a script that can be submitted from any directory.

        Args:
            options: checked options of sbatch; None stands for an option without a value. They replace those of the template or
                are added to them.
            arguments: arguments of the job, which an unchanged template would get after its name.
            place: the paths that the job uses.
            made_by: the command that made the script, for its reader.
            numbers: lists of numbers that replace those of the template.
            variables: of the environment, which the job exports after the site's settings, so that they count.

        Raises:
            ValueError: a part of the script contains a control character.
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
        text = text.replace(_PLACE, place.commands(arguments, variables or {}))
        return "\n".join(_with_directives(text.splitlines(), options)) + "\n"


def _with_directives(lines: Sequence[str], options: Mapping[str, str | None]) -> list[str]:
    """Returns the lines with these options of sbatch: instead of the template's own, or after the template's last one."""
    remaining = {name: f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()}
    merged, end = [], 0
    for line in lines:
        match = _DIRECTIVE.fullmatch(line)
        merged.append(remaining.pop(match["name"], line) if match else line)
        end = len(merged) if match else end
    return merged[:end] + list(remaining.values()) + merged[end:]
