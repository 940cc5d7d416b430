"""Training from a script: `hvdlocal.train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from torch import nn

from hvdlocal.communicator import Communicator
from hvdlocal.training import interruption
from hvdlocal.training.callbacks.base import Callback
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.configuration import load_config
from hvdlocal.training.given import names_of
from hvdlocal.training.joining import join
from hvdlocal.training.output_directory import AlreadyFinished
from hvdlocal.training.recorder import Summary
from hvdlocal.training.tasks import Task
from hvdlocal.training.trainer import Trainer


def train(
    config: str | PathLike[str] | Mapping[str, Any] | TrainConfig,
    *,
    task: Task | None = None,
    model: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
    communicator: Communicator | None = None,
) -> Summary:
    """Trains as `hvdlocal train` does, from a script that all ranks execute.

        class Denoising(hvdlocal.Task):
            …

        summary = hvdlocal.train("run.yaml", task=Denoising(), model=UNet(depth=4))

    Started again after an interruption, the script continues the run. While it trains, the signals USR2, USR1, TERM and INT are
    requests to stop.

    Args:
        config: path of a YAML file, a dict with what one holds, or a `TrainConfig`.
        task: what is learned, in place of the setting `task`. Its class is recorded; its attributes are not, and are not
            compared when the run is continued.
        model: the network to train, in place of the section `model`; afterwards it is the averaged model. All ranks begin with
            rank 0's parameters.
        callbacks: are called at the events of the run, beside those of the configuration.
        communicator: by default that of `hvdlocal.init()`, with the islands of `method.island`.

    Returns:
        The summary of the run.

    Raises:
        ValueError: a setting, the data or the directory cannot be used; on all ranks, before training (`SetupError`,
            `DisagreementError`). `hvdlocal train` exits with 2.
        Interrupted: the run was asked to stop, with a checkpoint on disk; on all ranks. Uncaught, it exits with 85.
        AlreadyFinished: the directory holds this run, finished; on all ranks. Uncaught, it exits with 0.
        DivergedError: the loss or the model is no longer finite; on all ranks. `hvdlocal train` exits with 3.
        DamageError: samples are damaged; on all ranks. `hvdlocal train` exits with 2.
        CallbackError: a callback failed; on all ranks, with a checkpoint on disk. `hvdlocal train` exits with 2.
        LostRankError: this rank cannot go on. `hvdlocal train` exits with 1.
        TooFewRanksError: with `survive`, ranks do not answer, and the others could not go on without them. `hvdlocal train`
            exits with 85.
        CommunicationError: another rank has ended. `hvdlocal train` exits with 4.
    """
    if not isinstance(config, TrainConfig):
        config = load_config(config, names_of(task, model))
    communicator = communicator or join(config)
    ended = None
    interruption.install_handlers()
    try:
        return Trainer(config, communicator, task=task, model=model, callbacks=callbacks).run()
    except (AlreadyFinished, interruption.Interrupted) as reason:
        ended = str(reason)
        raise
    finally:
        interruption.restore_handlers()
        if ended:
            interruption.announce_end(communicator, ended)
