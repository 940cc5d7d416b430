"""Runs of the trainer in this process that end like a killed one."""

from hvdlocal.training import Trainer
from hvdlocal.training.checkpoint.coordinator import CheckpointCoordinator


class Killed(BaseException):
    """In place of SIGKILL, which tests/launch sends."""


def train(comm, settings, monkeypatch, die_after=None):
    """Trains; ends like a killed process after so many steps of the run. Returns the trainer."""
    trainer = Trainer(settings, comm)
    original = CheckpointCoordinator.after_step

    def after_step(self, steps):
        original(self, steps)
        if steps == die_after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCoordinator, "after_step", after_step)
        try:
            trainer.run()
        except Killed:
            trainer.coordinator.status.close()
            trainer.optimizer.synchronize()  # a process that is killed leaves no collective to the next run
    comm.barrier("test.trained")
    return trainer
