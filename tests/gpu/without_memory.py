"""`hvdlocal`, but on rank 1 the device's memory is used up from the fourth step on."""

import sys

import torch

from hvdlocal.cli import main
from hvdlocal.training import Trainer

original = Trainer._micro_batch


def micro_batch(self, batches):
    if self.communicator.rank == 1 and self.position.steps == 3:
        if self.device.type == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory, as a test has it")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-6)  # from here on the device refuses to give any
    original(self, batches)


if __name__ == "__main__":
    Trainer._micro_batch = micro_batch
    sys.exit(main())
