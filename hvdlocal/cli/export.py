"""`hvdlocal export RUN [--output FILE]`: writes the model of a run that has not finished."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hvdlocal.directory import user_file
from hvdlocal.exit_codes import ExitCode
from hvdlocal.training.checkpoint import files
from hvdlocal.training.checkpoint.resume import averaged_model
from hvdlocal.training.run_files import CHECKPOINTS, SUMMARY
from hvdlocal.training.saved_model import write_state


def run(arguments: Sequence[str]) -> int:
    """Averages the replicas of a checkpoint and writes a plain `state_dict`, which the model loads without hvdlocal.

    Raises:
        ValueError: the run is finished, there is no checkpoint, or it cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="hvdlocal export",
        description="Writes the average of a checkpoint's replicas as a plain state_dict, like the model.pt of a finished run.",
    )
    parser.add_argument("run", type=Path, help="output directory of a run (its newest checkpoint), or one checkpoint")
    parser.add_argument("--output", type=Path, default=Path("model.pt"), help="file to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    path = _checkpoint(options.run)
    state = averaged_model(path)
    with user_file(options.output) as file:
        write_state(state, file)
    print(f"{options.output}: the average of {path} ({len(state)} tensors)")
    return ExitCode.FINISHED


def _checkpoint(run: Path) -> Path:
    if (run / files.MANIFEST).exists():
        return run
    if (run / SUMMARY).exists():  # whose checkpoints, if there are any left, are older than its model
        raise ValueError(f"the run in {run} is finished: its model is {run / 'model.pt'}")
    root = run / CHECKPOINTS
    steps = files.newest_first(root)
    if not steps and not run.exists():
        raise ValueError(f"there is no directory {run}: give the output directory of a run, or one of its checkpoints")
    if not steps:
        raise ValueError(f"{run} is no checkpoint, and there is none in {root}")
    return files.directory(root, steps[0])
