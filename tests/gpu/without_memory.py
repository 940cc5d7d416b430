"""`hvdlocal`, but on rank 1 the device's memory is used up from the fourth step on."""

import itertools
import sys

import torch

from hvdlocal.cli import main
from hvdlocal.communicator.launched import launched_rank
from hvdlocal.training.step import TrainingStep

original = TrainingStep.compute
calls = itertools.count()


def compute(self, batch):
    if launched_rank() == 1 and next(calls) == 3:
        if batch[0].device.type == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory, as a test has it")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-6)  # from here on the device refuses to give any
    return original(self, batch)


if __name__ == "__main__":
    TrainingStep.compute = compute
    sys.exit(main())
