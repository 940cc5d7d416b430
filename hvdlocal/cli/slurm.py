"""`hvdlocal slurm --template NAME … CONFIG.yaml …`: makes a script for sbatch and checks it before it waits in a queue."""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

from hvdlocal.directory import user_file
from hvdlocal.exit_codes import ExitCode
from hvdlocal.slurm import options as check
from hvdlocal.slurm.template import NAMES, Place, Template, directory
from hvdlocal.training.rules import count_workers

BACKENDS = ("horovod", "mpi4py", "torch")
COUNTS = ("nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node")
WORDS = ("account", "partition", "job-name")


def run(arguments: Sequence[str]) -> int:
    """Prints a script, writes it to a file, or submits it.

    Raises:
        ValueError: an option, the configuration or the data set's description is wrong, or sbatch refused.
    """
    given = _parser().parse_args(arguments)
    if given.list:
        print("\n".join(f"{name:15} {Template.load(name).summary}" for name in NAMES))
        return ExitCode.FINISHED
    if given.template is None:
        raise ValueError(f"no --template: choose one of {', '.join(NAMES)}")
    template = Template.load(given.template)
    if given.island is not None:
        given.island = _island(given.island)
    options = _options(given, template)
    numbers = _numbers(given, template, options)
    if numbers:
        last = len(numbers["ranks"]) * len(numbers["periods"]) - 1
        tasks = options.setdefault("array", f"0-{last}") or ""
        if check.largest_task(tasks) > last:
            raise ValueError(f"--sbatch array={tasks}: with these --ranks and --periods the tasks are 0 to {last}")
    job_arguments = _job_arguments(given, template.name, _ranks(template, options, numbers))
    if given.survive:
        _check_survival(given, template.name)
        options["no-kill"] = None
    script = template.render(
        options,
        job_arguments,
        _place(given.site),
        f"hvdlocal slurm {shlex.join(arguments)}",
        numbers,
        _variables(given),
    )
    if given.output is not None:
        _write(given.output, script)
    if given.submit:
        print(_submit(script, given.output))
    elif given.output is None:
        print(script, end="")
    return ExitCode.FINISHED


# -- options and arguments ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (hvdlocal slurm --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hvdlocal slurm",
        usage="hvdlocal slurm --template NAME [options of the job] (CONFIG.yaml [--section.key value …] | SCRIPT.py …)",
        description="Makes a script for sbatch from one of the templates in slurm/. What comes before CONFIG.yaml is about the "
        "job, what comes after it about the run. For prepare, the arguments of `python -m data_prep` take the place of both.",
        allow_abbrev=False,
    )
    parser.add_argument("--template", metavar="NAME", help="which one; --list names them")
    parser.add_argument("--list", action="store_true", help="name the templates and leave")
    for name in COUNTS:
        parser.add_argument(f"--{name}", metavar="N", help="as in sbatch")
    parser.add_argument("--time", help="as in sbatch: minutes, HH:MM:SS, D-HH:MM:SS")
    for name in WORDS:
        parser.add_argument(f"--{name}", metavar="NAME", help="as in sbatch")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="any other option of sbatch: --sbatch qos=long --sbatch exclusive",
    )
    parser.add_argument(
        "--island",
        metavar="node|N",
        help="ranks that are one worker: method.island of a configuration, HVDLOCAL_ISLAND of a script",
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, help="the engine, HVDLOCAL_BACKEND; srun needs no PMIx for torch"
    )
    parser.add_argument(
        "--survive",
        action="store_true",
        help="when ranks die, the others go on: setting survive of a configuration, HVDLOCAL_SURVIVE of a script",
    )
    parser.add_argument("--site", metavar="FILE", help="the site's settings, instead of slurm/site.sh")
    parser.add_argument("--image", metavar="FILE", help="of container: the Apptainer image")
    parser.add_argument("--ranks", metavar="K,K,…", help="of sweep: numbers of ranks")
    parser.add_argument("--periods", metavar="H,H,…", help="of sweep: numbers of local steps")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the script to a file instead of printing it")
    parser.add_argument("--submit", action="store_true", help="hand the script to sbatch and print the job's id")
    parser.add_argument("run", nargs=argparse.REMAINDER, metavar="CONFIG.yaml …", help="as for hvdlocal train")
    return parser


def _island(text: str) -> Literal["node"] | int:
    if text == "node":
        return "node"
    try:
        return int(check.count("island", text))
    except ValueError as error:
        raise ValueError(f"{error}, or node") from None


def _options(given: argparse.Namespace, template: Template) -> dict[str, str | None]:
    """Returns the options of sbatch that differ from the template's."""
    others: dict[str, str | None] = {}
    for text in given.sbatch:
        name, value = check.more(text, (*COUNTS, "time", *WORDS))
        if name in others:
            raise ValueError(f"--sbatch {text}: give --{name} once")
        if name == "array" and template.name != "sweep":
            raise ValueError(
                f"--sbatch {text}: all tasks would write to one directory; template sweep gives each its own"
            )
        others[name] = value
    notice = check.notice(others.get("signal") or template.options["signal"])
    if (shortest := others.get("time-min")) is not None:
        check.time_limit(shortest, notice, "time-min")
    options: dict[str, str | None] = {}
    for name in (*COUNTS, "time", *WORDS):
        text = getattr(given, name.replace("-", "_"))
        if text is not None:
            known = check.count if name in COUNTS else check.word
            options[name] = check.time_limit(text, notice) if name == "time" else known(name, text)
    if given.time is None:
        check.time_limit(template.options["time"], notice)
    options |= others
    if template.name.startswith("gpu"):
        _one_rank_per_gpu(options)
    if template.name == "gpu" and options.get("nodes", "1") != "1":
        raise ValueError(
            f"--nodes {options['nodes']}: template gpu is for one node, choose gpu-nodes or gpu-nodes-srun"
        )
    return options


def _one_rank_per_gpu(options: dict[str, str | None]) -> None:
    ranks, gpus = (options.get(name) for name in ("ntasks-per-node", "gpus-per-node"))
    if ranks != gpus and ranks is not None and gpus is not None:
        raise ValueError(f"--ntasks-per-node {ranks} with --gpus-per-node {gpus}: every rank has a GPU of its own")
    if ranks or gpus:
        options["ntasks-per-node"] = options["gpus-per-node"] = ranks or gpus


def _numbers(given: argparse.Namespace, template: Template, options: dict[str, str | None]) -> dict[str, list[int]]:
    """Returns K and H of a sweep."""
    asked = {"ranks": given.ranks, "periods": given.periods}
    if template.name != "sweep":
        for name, text in asked.items():
            if text is not None:
                raise ValueError(f"--{name} is an option of template sweep")
        return {}
    numbers = {
        name: template.numbers(name) if text is None else [int(check.count(name, part)) for part in text.split(",")]
        for name, text in asked.items()
    }
    for name, values in numbers.items():
        if len(set(values)) < len(values):
            raise ValueError(f"--{name} {asked[name]}: one of them is there twice")
    resources = {**template.options, **options}
    tasks = int(resources["nodes"] or 1) * int(resources["ntasks-per-node"] or 1)
    if max(numbers["ranks"]) > tasks:
        raise ValueError(f"--ranks {max(numbers['ranks'])}: the job has {tasks} tasks (--nodes, --ntasks-per-node)")
    return numbers


def _ranks(template: Template, options: dict[str, str | None], numbers: dict[str, list[int]]) -> list[tuple[int, int]]:
    """Returns the ranks of the job and those of a node; of a sweep, those of every task."""
    resources = {**template.options, **options}
    per_node = int(resources["ntasks-per-node"] or 1)
    counts = numbers.get("ranks", [int(resources["nodes"] or 1) * per_node])
    return [(ranks, min(ranks, per_node)) for ranks in counts]


def _job_arguments(given: argparse.Namespace, template: str, jobs: Sequence[tuple[int, int]]) -> list[str]:
    """Returns the arguments of the job after the name of its template, checked as far as possible on this machine.

    Args:
        given: the command line.
        template: name of the template.
        jobs: the ranks, and those of a node, of every training that is started.
    """

    def check_islands(island: Literal["node"] | int) -> None:
        for ranks, per_node in jobs:
            count_workers(ranks, island, per_node)

    if given.image is not None and template != "container":
        raise ValueError("--image is an option of template container")
    if template == "prepare":
        if given.island is not None:
            raise ValueError("--island is for training: template prepare has no workers")
        from data_prep.arguments import build_parser

        build_parser().parse_args(given.run)  # leaves with a sentence of its own when it does not like them
        return given.run
    if not given.run:
        raise ValueError("no configuration: hvdlocal slurm --template NAME … CONFIG.yaml")
    if not Path(given.run[0]).is_file():
        raise ValueError(f"no configuration {given.run[0]} here")
    if given.run[0].endswith(".py"):
        if given.island is not None:
            check_islands(given.island)
        if template in ("staging", "sweep"):
            raise ValueError(
                f"template {template} sets the trainer's own options: give it a configuration, not a script"
            )
        return given.run if template != "container" else [_image(given), *given.run]
    from hvdlocal.cli.configuration import parse  # torch takes seconds, and --list needs none of it
    from hvdlocal.training.config_checks import check_ranges

    run = given.run if given.island is None else [*given.run, f"--method.island={given.island}"]
    run = [*run, "--survive=true"] if given.survive else run
    config = parse(run)
    given.survive = config.survive
    check_ranges(config)
    check_islands(config.method.island)
    if not Path(config.data.path).exists() and not glob.glob(config.data.path):
        print(f"hvdlocal slurm: no data at {config.data.path} yet", file=sys.stderr)
    if template == "staging":
        if config.data.inputs is not None:
            raise ValueError(
                f"template staging copies the directory of a data set, and data.path={config.data.path} is your own file: make "
                "a data set of it with python -m data_prep arrays"
            )
        return [config.data.path, *run]
    if template == "container":
        return [_image(given), *run]
    return run


def _check_survival(given: argparse.Namespace, template: str) -> None:
    if template == "prepare":
        raise ValueError("--survive is for training: template prepare starts again from what is written")
    if template == "gpu-nodes-srun":
        raise ValueError(
            "template gpu-nodes-srun: a job survives the death of a rank under mpirun only; choose gpu-nodes"
        )
    if given.backend not in (None, "mpi4py"):
        raise ValueError(f"--backend {given.backend}: only engine mpi4py survives the death of a rank")


def _variables(given: argparse.Namespace) -> dict[str, str]:
    """Returns what the job exports beside the paths."""
    is_script = bool(given.run) and given.run[0].endswith(".py")
    found = {
        "HVDLOCAL_SURVIVE": "1" if given.survive else None,
        "HVDLOCAL_BACKEND": "mpi4py" if given.survive else given.backend,
        "HVDLOCAL_ISLAND": str(given.island) if given.island and is_script else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _image(given: argparse.Namespace) -> str:
    if given.image is None:
        raise ValueError("template container needs --image FILE.sif")
    if "://" not in given.image and not Path(given.image).exists():
        raise ValueError(f"no image {given.image} here")
    return str(given.image)


def _place(site: str | None) -> Place:
    if site is not None and not Path(site).is_file():
        raise ValueError(f"--site {site}: no such file")
    site = None if site is None else os.path.abspath(site)
    return Place(os.getcwd(), os.path.dirname(sys.executable), str(directory()), site)


# -- output and submission --------------------------------------------------------------------------------------


def _write(path: Path, script: str) -> None:
    if path.exists() and not path.read_bytes().startswith(b"#!"):
        raise ValueError(f"--output {path} is there and is not a script: not replaced")
    with user_file(path) as file:
        file.write(script.encode())


def _submit(script: str, path: Path | None) -> str:
    """Submits the script and returns the job's id."""
    if shutil.which("sbatch") is None:
        raise ValueError("no sbatch here: submit from a login node, or write the script with --output FILE")
    # For sbatch, variables count more than the script.
    ignored = sorted(os.environ.keys() & check.overriding_variables(Template("", script).options))
    if ignored:
        print(f"hvdlocal slurm: without effect, since the script decides: {', '.join(ignored)}", file=sys.stderr)
    environment = {name: value for name, value in os.environ.items() if name not in ignored}
    command = ["sbatch", "--parsable"] + ([] if path is None else [os.path.abspath(path)])
    done = subprocess.run(
        command, input=None if path else script, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"sbatch refused: {done.stderr.strip() or f'exit code {done.returncode}'}")
    sys.stderr.write(done.stderr)
    return done.stdout.strip().partition(";")[0]
