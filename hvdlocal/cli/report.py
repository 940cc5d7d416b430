"""`hvdlocal report RUN… [--output report.html] [--png DIR]`: writes a page about runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hvdlocal.directory import user_file
from hvdlocal.exit_codes import ExitCode
from hvdlocal.terminal import warn


def run(arguments: Sequence[str]) -> int:
    """Writes a page about one run or many.

    Returns:
        FINISHED; MISTAKE when a directory is not a readable run, in which case the page is about the others.
    """
    parser = argparse.ArgumentParser(
        prog="hvdlocal report",
        description="Write one HTML page, with everything in it, about one run or many: running, finished or interrupted.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output directory of hvdlocal train")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write each figure as a PNG into this directory")
    options = parser.parse_args(arguments)
    if options.output.is_dir():
        raise ValueError(f"--output {options.output} is a directory: name a file, such as {options.output}/report.html")

    from hvdlocal.report.page import make_report

    report = make_report(options.runs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with user_file(options.output) as file:
        file.write(report.html().encode(errors="backslashreplace"))  # a name may hold what UTF-8 cannot encode
    print(
        f"{options.output}: {len(report.lines)} run{'s' if len(report.lines) > 1 else ''}, {len(report.drawings)} figures"
    )
    if options.png:
        for path in report.save_png(options.png):
            print(path)
    for reason in report.left_out:
        warn(f"left out: {reason}")
    return ExitCode.MISTAKE if report.left_out else ExitCode.FINISHED
