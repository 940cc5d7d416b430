"""`hvdlocal advise CONFIG.yaml …`: measures on these ranks whether local steps pay, and with which H."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hvdlocal.cli.arguments import positive
from hvdlocal.cli.configuration import parse
from hvdlocal.directory import user_file
from hvdlocal.exit_codes import ExitCode


def run(arguments: Sequence[str]) -> int:
    """Measures on all ranks; rank 0 prints the advice."""
    options, rest = _parser().parse_known_args(arguments)
    if not rest:
        raise ValueError("no configuration: mpirun -np N hvdlocal advise CONFIG.yaml (see experiments/)")
    config = parse(rest)
    from hvdlocal.advise.advice import advise
    from hvdlocal.advise.facts import as_dict
    from hvdlocal.advise.measure import measure  # loads torch
    from hvdlocal.advise.text import ALONE, advice_text, measured_text
    from hvdlocal.communicator import init, succeed_together

    os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")  # islands of several sizes are formed after the start
    communicator = init(island=1)

    def prepare() -> None:
        if options.json and communicator.rank == 0:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.touch()  # an error now is better than after the measurements

    succeed_together(communicator, prepare, "hvdlocal.json")
    measured = measure(config, communicator, options.seconds)
    if communicator.rank == 0:
        if communicator.size == 1:
            text, facts = f"{measured_text(measured)}\n\n{ALONE}", {"measured": asdict(measured)}
        else:
            advice = advise(measured, config.method.c, config.method.statistics)
            text, facts = advice_text(advice), as_dict(advice)
        if options.json:
            with user_file(options.json) as file:
                file.write((json.dumps(facts, indent=1) + "\n").encode())
        print(text, flush=True)
    communicator.barrier("hvdlocal.end")
    return ExitCode.FINISHED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvdlocal advise",
        usage="mpirun -np N hvdlocal advise CONFIG.yaml [--section.key value …] [--seconds 60] [--json FILE]",
        description="Measures steps, averagings and gradient statistics with the model, data and optimizer of a configuration on "
        "these ranks, and says whether local steps pay, with which H and which islands. Trains nothing for keeps.",
        epilog="CONFIG.yaml and --section.key are those of hvdlocal train; its --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--seconds", type=positive, default=60.0, metavar="S", help="to measure for (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write measurements and predictions there too")
    return parser
