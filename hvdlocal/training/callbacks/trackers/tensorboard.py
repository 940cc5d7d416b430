"""TensorBoard's event files."""

from __future__ import annotations

from hvdlocal.training.callbacks.base import Outcome, RunView
from hvdlocal.training.callbacks.trackers.base import Tracker


class TensorBoard(Tracker):
    """Writes event files to `tensorboard/` in the output directory: `tensorboard --logdir runs`.

    A run that continues hides what an earlier part wrote after the checkpoint.
    """

    def on_start(self, run: RunView) -> None:
        """Opens a file for this part of the run."""
        from torch.utils.tensorboard import SummaryWriter

        first_step = 0 if run.resumed_step is None else run.resumed_step + 1
        self._writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=first_step)

    def write(self, numbers: dict[str, float], kind: str, step: int) -> None:
        """See `Tracker`."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._writer.close()
