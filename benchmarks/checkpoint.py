"""The cost of a checkpoint: the copy for which training waits, and the writing in the background.

    mpirun -np 2 python benchmarks/checkpoint.py

Every rank has a replica of the size of a ResNet-50, with momentum. "Held up" is the time until training continues; "on disk" is
the time until every rank's file and the manifest are written. Both are compared with one averaging of the same model. All
numbers are medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import hvdlocal
from hvdlocal.directory import Directory
from hvdlocal.models import build_model
from hvdlocal.training.checkpoint.writer import CheckpointWriter


def main() -> None:
    """Runs the benchmark on every rank; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--directory", help="where to write (default: the directory for temporary files)")
    options = parser.parse_args()
    communicator = hvdlocal.init()
    place = tempfile.mkdtemp(dir=options.directory) if communicator.rank == 0 else ""
    root = Path(communicator.gather(place, "checkpoint.place")[0])
    torch.manual_seed(0)
    model = build_model("resnet50", 1000, (224, 224, 3))
    inner = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    optimizer = hvdlocal.LocalOptimizer(inner, model, period=hvdlocal.ConstantPeriod(2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    writer = CheckpointWriter(communicator, Directory(root), keep=1)

    averaging, held_up, on_disk = [], [], []
    for trial in range(options.trials):
        optimizer.step()
        optimizer.step()
        optimizer.step()  # inside a round: every rank writes its replica
        communicator.barrier("checkpoint.trial")
        start = time.perf_counter()
        writer.begin(trial, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, {"num_workers": 2})
        held_up.append(time.perf_counter() - start)
        problem = writer.finish(wait=True)
        on_disk.append(time.perf_counter() - start)
        assert problem is None, problem
        before = optimizer.seconds_averaging
        optimizer.synchronize()
        averaging.append(optimizer.seconds_averaging - before)
    size = sum(file.stat().st_size for file in root.rglob("rank-*.pt")) / communicator.size
    everyone = communicator.gather([statistics.median(x) for x in (averaging, held_up, on_disk)], "checkpoint.result")
    if communicator.rank == 0:
        shutil.rmtree(root)
        base, held, disk = (max(times) for times in zip(*everyone, strict=True))
        print(f"{communicator.size} ranks, {size / 1e6:.0f} MB each, {torch.get_num_threads()} threads per rank")
        print(
            f"one averaging {1e3 * base:.0f} ms; training held up {held / base:.2f} ×; on disk after {disk / base:.1f} ×"
        )
    writer.close()
    communicator.barrier("checkpoint.end")


if __name__ == "__main__":
    main()
