"""A cell of Balles et al.'s Table 2 on one GPU: python benchmarks/gpu_cell.py --cifar10 DIR [--minutes 4] [--wheels DIR].

Trains experiments/cifar10_resnet18.yaml (ResNet-18 at full width) with data parallelism and with LocalAdaScale, in
bfloat16, by ranks that share the GPU over mpi4py. The paper trains for 200 scale-invariant epochs with 8 workers and more;
here the number of epochs follows from the minutes and from a short run of each method. The script writes a page with the
accuracy against progress, data and time, and the paper's result.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from gpu_report import ROOT, Report, Stage, environment

sys.path.insert(0, str(ROOT))

from hvdlocal.papers.published import read_table
from hvdlocal.report.records import read_run

METHODS = ("local-ada", "sync")
CALIBRATION_EPOCHS = 0.5
START_SECONDS = 25.0
"""Time to reserve for the start of each job of several ranks."""


def train(arguments: argparse.Namespace, data: Path, output: Path, method: str, epochs: float) -> list[str]:
    """Returns the command of one run."""
    small = ["--model.name", "resnet9_narrow", "--data.batch_size", "16"] if arguments.device == "cpu" else []
    command = ["install/mpirun", "-np", str(arguments.ranks), sys.executable, "-m", "hvdlocal"]
    command += ["train", "experiments/cifar10_resnet18.yaml", "--data.path", str(data), "--device", arguments.device]
    command += ["--model.channels_last", "true", "--precision", "bfloat16", "--method.preset", method]
    command += ["--method.period.period", str(arguments.period), "--evaluate_every_epochs", str(min(1.0, epochs))]
    return [*command, "--epochs", str(epochs), "--output", str(output), "--log_every_seconds", "5", *small]


def seconds_per_epoch(output: Path) -> float:
    """Returns the seconds of a scale-invariant epoch of a finished run, without evaluations."""
    run = read_run(output)
    if run.end is None:
        raise RuntimeError(f"the short run in {output} did not come to its end: give --epochs, or more --minutes")
    return (run.seconds["elapsed"] - run.seconds["evaluating"]) / run.end["scale_invariant_epochs"]


def accuracies(output: Path) -> list[str]:
    """Returns the evaluations of a run so far, as a table."""
    try:
        run = read_run(output)
    except (ValueError, OSError) as error:
        return ["", f"Nothing was recorded: {error}"]
    names = ("epoch", "data_epoch", "accuracy", "loss", "elapsed_seconds", "bytes_sent")
    columns = zip(*(run.evaluations[name].tolist() for name in names), strict=True)
    lines = ["", "| progress, epochs | data, epochs | test accuracy | loss | seconds | sent per rank, GB |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for epoch, data_epoch, accuracy, loss, seconds, sent in columns:
        lines.append(
            f"| {epoch:.2f} | {data_epoch:.1f} | {accuracy:.2%} | {loss:.3f} | {seconds:.0f} | {sent / 1e9:.2f} |"
        )
    return lines if run.end else [*lines, "", "The run did not come to its end."]


def published() -> list[str]:
    """Returns the nearest published result."""
    table = read_table("cifar10")
    cell = table.cells["local-ada", 8, 8]
    return [
        "",
        f"local-ada with K = 8 and H = 8 reaches {cell.accuracy_percent} % after 200 scale-invariant epochs ({cell.epochs} of "
        f"data) of all 50,000 images; the aim, that of one worker, is {table.target_percent:g} %.",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cifar10", type=Path, help="directory with data_batch_1.bin … and test_batch.bin")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--period", type=int, default=8, help="H of local-ada")
    parser.add_argument("--epochs", type=float, help="scale-invariant epochs (default: as many as the minutes allow)")
    parser.add_argument("--minutes", type=float, default=4.0, help="that all of it may take (default: %(default)s)")
    parser.add_argument("--revision", help="of hvdlocal, for the page (default: what git says)")
    parser.add_argument("--wheels", type=Path, help="directory of wheels to install first")
    parser.add_argument("--output", type=Path, help="for the page (default: docs/gpu; with the CPU runs/gpu)")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    arguments.output = arguments.output or ROOT / ("runs/gpu" if on_cpu else "docs/gpu")
    if arguments.cifar10 is None and not on_cpu:
        parser.error("--cifar10: name the directory of CIFAR-10's binary version")
    end = time.monotonic() + 60 * arguments.minutes
    place = Path(tempfile.mkdtemp(prefix="hvdlocal-gpu-"))
    data = place / "data"
    try:
        report = Report(arguments, environment(arguments.wheels, place, small=on_cpu), name="-cell")
        if arguments.cifar10 is None:
            images = 200
            make = ["synthetic", "--samples", str(images)]
        else:
            images = 10_000 * len(list(arguments.cifar10.glob("data_batch_*.bin")))
            make = ["cifar10", "--source", str(arguments.cifar10), "--limit", str(images)]
        report.run([Stage("Data", [["-m", "data_prep", *make, "--output", str(data)]], 60)])
        epochs = arguments.epochs
        if epochs is None:
            short = {method: place / f"{method}-short" for method in METHODS}
            for method, output in short.items():
                command = train(arguments, data, output, method, CALIBRATION_EPOCHS)
                report.run([Stage(f"{method}, to see how fast it is", [command], 90, keep="(?!)")])
            left = end - time.monotonic() - len(METHODS) * START_SECONDS
            epochs = max(1.0, float(int(0.85 * left / sum(map(seconds_per_epoch, short.values())))))
        what = f"{arguments.ranks} ranks, {epochs:g} scale-invariant epochs of {images:,} images"
        for runs_left, method in zip((2, 1), METHODS, strict=True):
            command = train(arguments, data, place / method, method, epochs)
            limit = 1.4 * (end - time.monotonic()) / runs_left
            result = partial(accuracies, place / method)
            name = method if method == "sync" else f"{method} with H = {arguments.period}"
            report.run([Stage(f"{name}, {what}", [command], limit, keep="(?!)", result=result)])
        report.run([Stage("The paper, Table 2", [], 10, result=published)])
        report.close()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(report.page.read_text())
    return bool(report.failed)


if __name__ == "__main__":
    sys.exit(main())
