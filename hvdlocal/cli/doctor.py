"""`hvdlocal doctor`: checks this installation; every line shows what was found and, if it is wrong, a remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdlocal.communicator.launched import launched_by_srun, launched_size
from hvdlocal.exit_codes import ExitCode
from hvdlocal.launch_command import (
    ALLOW_ROOT,
    REFUSES_ROOT,
    is_open_mpi,
    last_words,
    launcher_words,
    refused_root,
    without_leftovers,
)

TRIAL_SECONDS = 90
"""Deadline of the trial with two ranks; starting Python on a busy file system takes a while."""


@dataclass(frozen=True)
class Finding:
    """A line of the output: `level` is "ok", "note" (works, but not optimally) or "wrong" (does not work)."""

    level: str
    subject: str
    found: str
    remedy: str = ""


def run(arguments: Sequence[str]) -> int:
    """Prints the findings.

    Returns:
        FINISHED if hvdlocal can train here over the chosen backend, else FAILED.
    """
    if arguments:
        print(
            "usage: hvdlocal doctor\n\nChecks versions, MPI, Horovod, GPUs, core binding, a real allreduce of two ranks, "
            "and whether a job outlives the death of a rank."
        )
        return ExitCode.FINISHED if arguments[0] in ("-h", "--help") else ExitCode.MISTAKE
    marks = {"ok": "  ok  ", "note": " note ", "wrong": " WRONG"}
    findings = []
    for check in CHECKS:
        for finding in check():
            findings.append(finding)
            print(f"{marks[finding.level]} {finding.subject:18} {finding.found}", flush=True)
            if finding.remedy:
                print(f"{'':7}{'':18}   → {finding.remedy}", flush=True)
    usable = verdict(findings)
    print(f"\n{'hvdlocal can train here.' if usable else 'hvdlocal cannot train here: see the lines marked WRONG.'}")
    return ExitCode.FINISHED if usable else ExitCode.FAILED


def verdict(findings: Sequence[Finding]) -> bool:
    """Returns whether hvdlocal is usable: no essential part is wrong, and the ranks of the chosen backend find each other."""
    return not any(finding.level == "wrong" for finding in findings)


# -- the checks: each yields findings --------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Checks the libraries on which hvdlocal is built."""
    import h5py
    import numpy
    import torch

    from hvdlocal.version import __version__

    yield Finding("ok", "hvdlocal", f"{__version__} (Python {sys.version.split()[0]} at {sys.prefix})")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("ok", "torch", f"{torch.__version__} ({cuda}), numpy {numpy.__version__}, h5py {h5py.__version__}")
    yield torchvision(torch.__version__)


def torchvision(torch_version: str) -> Finding:
    """Checks whether torchvision loads by a plain import, or only by hvdlocal's import."""
    plainly = _python("import torchvision; print(torchvision.__version__)")
    if isinstance(plainly, list):
        return Finding("ok", "torchvision", plainly[-1])
    remedy = f"pip install the torchvision that was built for torch {torch_version} (docs/install.md)"
    within = _python(
        "from hvdlocal.models.torchvision_import import import_torchvision; print(import_torchvision().__version__)"
    )
    if isinstance(within, list):
        found = (
            f"{within[-1]} fails at a plain `import torchvision` ({plainly}); hvdlocal's models work all the same, your own "
            "scripts and other packages that import it do not"
        )
        return Finding("note", "torchvision", found, remedy)
    return Finding(
        "note", "torchvision", f"does not import: {plainly}", f"{remedy}; only its models are missing without it"
    )


def launcher() -> Iterator[Finding]:
    """Looks for mpirun or srun."""
    mpirun = shutil.which("mpirun")
    if mpirun:
        yield Finding("ok", "mpirun", f"{_first_line([mpirun, '--version'])} at {mpirun}")
    elif shutil.which("srun"):
        how = "srun" if _backend() == "torch" else "srun --mpi=pmix (srun --mpi=list shows what there is)"
        yield Finding("ok", "srun", f"no mpirun here; start ranks with {how}")
    elif _backend() == "torch":
        yield Finding("ok", "torchrun", "neither mpirun nor srun on PATH; start ranks with torchrun")
    else:
        yield Finding(
            "wrong", "launcher", "neither mpirun nor srun on PATH", "load the site's MPI module, or run `make setup`"
        )


def mpi4py() -> Iterator[Finding]:
    """Checks mpi4py and its MPI library."""
    probe = (
        "from mpi4py import MPI; import mpi4py;"
        "print(mpi4py.__version__, MPI.Query_thread() - MPI.THREAD_SERIALIZED, MPI.Get_library_version().split(', ')[0], sep='|')"
    )
    lines = _python(probe)
    if isinstance(lines, str):
        remedy = "pip install mpi4py, with the MPI library on LD_LIBRARY_PATH; only HVDLOCAL_BACKEND=mpi4py needs it"
        yield Finding(_level("mpi4py"), "mpi4py", lines, remedy)
        return
    version, spare, library = lines[-1].split("|", 2)
    levels = {
        "-2": "MPI_THREAD_SINGLE",
        "-1": "MPI_THREAD_FUNNELED",
        "0": "MPI_THREAD_SERIALIZED",
        "1": "MPI_THREAD_MULTIPLE",
    }
    found = f"{version} on {library.strip()}, {levels.get(spare, 'unknown thread level')}"
    if int(spare) < 0:
        yield Finding(
            "wrong", "mpi4py", found, "use an MPI built with thread support (MPI_THREAD_SERIALIZED or higher)"
        )
    else:
        yield Finding("ok", "mpi4py", found)


def horovod() -> Iterator[Finding]:
    """Checks how Horovod was built, and for which torch."""
    import torch

    probe = (
        "import horovod, horovod.torch as hvd, json;"
        "print(json.dumps([horovod.__version__, hvd.mpi_built(), hvd.gloo_built(), bool(hvd.nccl_built()), horovod.__file__]))"
    )
    lines = _python(probe)
    if isinstance(lines, str):
        remedy = "run `make setup`, or see docs/install.md; HVDLOCAL_BACKEND=mpi4py and =torch do without Horovod"
        yield Finding(_level("horovod"), "Horovod", lines, remedy)
        return
    version, mpi, gloo, nccl, file = json.loads(lines[-1])
    metadata = Path(file).with_name("metadata.json")
    built_for = json.loads(metadata.read_text()).get("pytorch") if metadata.exists() else None
    parts = [name for name, there in (("MPI", mpi), ("Gloo", gloo), ("NCCL", nccl)) if there]
    found = f"{version} with {', '.join(parts) or 'nothing'}, built for torch {built_for or '(unknown)'}"
    if built_for and built_for != torch.__version__:
        yield Finding("note", "Horovod", found, f"this torch is {torch.__version__}: rebuild Horovod (make setup)")
    elif not mpi:
        yield Finding(
            "note", "Horovod", found, "built without MPI: only horovodrun starts it; rebuild with HOROVOD_WITH_MPI=1"
        )
    else:
        yield Finding("ok", "Horovod", found)
    if torch.cuda.is_available() and not nccl:
        remedy = "rebuild with HOROVOD_GPU_OPERATIONS=NCCL (docs/install.md): without it every averaging goes through host memory"
        yield Finding("note", "NCCL", "Horovod was built without it", remedy)


def gpus() -> Iterator[Finding]:
    """Lists the GPUs that torch can use."""
    import torch

    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        yield Finding("ok", "GPUs", f"{torch.cuda.device_count()} × {', '.join(names)}: start that many ranks per node")
    elif torch.version.cuda:
        yield Finding(
            "note",
            "GPUs",
            "none visible to a CUDA build of torch",
            "run on a GPU node, and look at CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding("ok", "GPUs", "none: training on the CPU")


def cores() -> Iterator[Finding]:
    """Checks cores and threads, and Horovod's cycle time."""
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{usable} of {total} usable; OMP_NUM_THREADS={threads or '(unset: cores divided by ranks)'}"
    if usable == 1 < total:
        remedy = "this process is bound to one core, which Horovod's thread wants too: mpirun --bind-to none"
        yield Finding("note", "cores", found, remedy)
    else:
        yield Finding("ok", "cores", found)
    cycle = os.environ.get("HOROVOD_CYCLE_TIME")
    if cycle is None:
        yield Finding("ok", "Horovod's cycle", "5 ms (hvdlocal's default; HOROVOD_CYCLE_TIME changes it)")
    elif not re.fullmatch(r"\d+(\.\d*)?|\.\d+", cycle):
        remedy = "give a number of milliseconds, or leave it unset for 5 ms"
        yield Finding("note", "Horovod's cycle", f"HOROVOD_CYCLE_TIME={cycle!r} is not a number", remedy)
    elif float(cycle) < 2:
        remedy = (
            "below about 2 ms Horovod's background thread can take a whole core from training; leave it unset for 5 ms"
        )
        yield Finding("note", "Horovod's cycle", f"{cycle} ms", remedy)
    else:
        yield Finding("ok", "Horovod's cycle", f"{cycle} ms (from HOROVOD_CYCLE_TIME)")


def two_ranks() -> Iterator[Finding]:
    """Computes a real sum on two ranks, over each backend."""
    if not shutil.which("mpirun") and _backend() != "torch":
        yield Finding("note", "two ranks", "not tried: no mpirun", "try inside a job: srun -n 2 hvdlocal train …")
        return
    for backend in ("horovod", "mpi4py", "torch") if shutil.which("mpirun") else ("torch",):
        if backend != _backend() and isinstance(_python(f"import {backend}"), str):
            continue
        found = _trial(backend)
        if found is None:
            yield Finding("ok", f"2 × {backend}", "an allreduce of two ranks gives the right sum")
            continue
        remedy = "mpirun must be that of the MPI which the backend was built with; on a login node, try inside a job"
        if backend == "torch":
            remedy = "set MASTER_ADDR to this host's name and GLOO_SOCKET_IFNAME to its network interface, or try inside a job"
        if found == REFUSES_ROOT:
            remedy = ALLOW_ROOT
        yield Finding(_level(backend), f"2 × {backend}", found, remedy)


def survival() -> Iterator[Finding]:
    """Kills one of three ranks. Without mpirun, or below another one, there is nothing to try."""
    below_another = launched_size() is not None and not launched_by_srun()
    if not shutil.which("mpirun") or below_another or isinstance(_python("import mpi4py"), str):
        return
    if (found := _trial_of_survival()) is None:
        yield Finding("ok", "survive", "one of three ranks was killed, and the other two went on")
        return
    level = "wrong" if os.environ.get("HVDLOCAL_SURVIVE") == "1" else "note"
    remedy = "`survive` needs Open MPI 5 or later and mpi4py 4.1 or later (docs/survive.md); nothing else does"
    if found == REFUSES_ROOT:
        remedy = ALLOW_ROOT
    yield Finding(level, "survive", f"a job does not outlive the death of a rank: {found}", remedy)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    packages,
    launcher,
    mpi4py,
    horovod,
    gpus,
    cores,
    two_ranks,
    survival,
)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _backend() -> str:
    return os.environ.get("HVDLOCAL_BACKEND") or "horovod"


def _level(backend: str) -> str:
    """Returns the level of a failure of one backend: only the chosen one is needed."""
    return "wrong" if backend == _backend() else "note"


def _trial(backend: str) -> str | None:
    """Computes a sum on two ranks; returns what went wrong, or None."""
    program = (
        f"import torch, hvdlocal; c = hvdlocal.init({backend!r}, survive=False, timeout_seconds=30);"
        "t = torch.full((1000,), c.rank + 1.0); c.sum_(t, 'hvdlocal.doctor');"
        "print(f'hvdlocal-doctor {c.size} {t.min():g} {t.max():g} end', end=' ')"
    )
    if shutil.which("mpirun"):
        launcher = "mpirun"
        command = without_leftovers([*launcher_words(), "2", sys.executable, "-c", program])
    else:
        launcher = "torchrun"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "--no-python", sys.executable, "-c", program]
    return _outcome(launcher, command, ("2", "3", "3"))


def _trial_of_survival() -> str | None:
    """Kills one of three ranks, and computes a sum on the others; returns what went wrong, or None."""
    if not is_open_mpi("mpirun"):
        return f"{_first_line(['mpirun', '--version'])} is not Open MPI"
    # Ranks of this kind also outlive their mpirun, which is killed at the deadline: each has an alarm of its own.
    program = (
        f"import os, signal; signal.alarm({TRIAL_SECONDS}); import torch, hvdlocal;"
        "c = hvdlocal.init('mpi4py', survive=True, timeout_seconds=30); t = torch.full((1000,), c.rank + 1.0);"
        "c.barrier('hvdlocal.doctor_all'); c.rank == 1 and os.kill(os.getpid(), signal.SIGKILL);"
        "c.sum_(t, 'hvdlocal.doctor'); print(f'hvdlocal-doctor {c.size} {t.min():g} {t.max():g} end', end=' ')"
    )
    command = [*launcher_words(), "3", "--with-ft", "ulfm", sys.executable, "-c", program]
    return _outcome("mpirun", without_leftovers(command), ("2", "4", "4"))


def _outcome(launcher: str, command: list[str], answer: tuple[str, str, str]) -> str | None:
    """Runs a trial.

    Args:
        launcher: its name.
        command: with which it starts the trial.
        answer: what two ranks should print: the number of ranks, and the smallest and largest element of their sum.

    Returns:
        What went wrong, or None.
    """
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TRIAL_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TRIAL_SECONDS} s"
    # Words instead of lines, in one write: print() may send the line end separately, and mpirun mixes the ranks' pieces.
    answers = re.findall(r"hvdlocal-doctor (\d+) (\S+) (\S+) end", result.stdout)
    if result.returncode == 0 and answers == [answer] * 2:
        return None
    if answers and answers[0][0] == "1":
        return "each of the ranks is alone: mpirun and the library belong to different MPIs"
    if refused_root(result.stderr):
        return REFUSES_ROOT
    return f"{launcher} ended with code {result.returncode}: {_last_words(result.stderr or result.stdout)}"


def _python(program: str) -> list[str] | str:
    """Runs a program in its own process, since MPI can be initialised only once.

    Returns:
        The lines that it prints or, if it failed, the reason as one string.
    """
    command = [sys.executable, "-c", f"import sys; {program}"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TRIAL_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TRIAL_SECONDS} s"
    return result.stdout.splitlines() if result.returncode == 0 else _last_words(result.stderr)


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"({error})"
    return next(iter((result.stdout or result.stderr).splitlines()), "(no answer)")


def _last_words(output: str) -> str:
    # torchrun's table and the other ranks' words come after the exception that is the reason.
    raised = [line for line in output.splitlines() if re.match(r"[\w.]*(Error|Exception): *\S", line)]
    return last_words("\n".join(raised) or output, lambda line: "error" in line.lower())
