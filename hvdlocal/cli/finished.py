"""`hvdlocal finished CONFIG.yaml …`: says whether a run has finished, by its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvdlocal.cli.configuration import parse
from hvdlocal.exit_codes import ExitCode
from hvdlocal.training.attempts import was_used_by_this_job
from hvdlocal.training.config_checks import effective_settings
from hvdlocal.training.run_files import RunStatus, find_status

USAGE = """usage: hvdlocal finished CONFIG.yaml [--section.key value …]

Given the arguments of a run, looks into its directory. Exit code 0: the run is finished (summary.json is there); 1: it is not."""


def run(arguments: Sequence[str]) -> int:
    """Looks for what the run of these arguments has left.

    Returns:
        FINISHED, or FAILED if the run has not ended well yet.

    Raises:
        ValueError: the configuration is wrong, or its directory holds a run with other settings.
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(USAGE)
        return ExitCode.FINISHED
    config = parse(arguments)
    path = Path(config.output)
    replaces_another = config.overwrite and not was_used_by_this_job(path)
    is_finished = find_status(path, effective_settings(config), replaces_another) is RunStatus.FINISHED
    print(f"the run in {path} is {'finished' if is_finished else 'not finished'}")
    return ExitCode.FINISHED if is_finished else ExitCode.FAILED
