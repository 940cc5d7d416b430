"""What a configuration describes, built on one rank: for the trainer, for `advise` and for the experiments."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import Any

import torch
from torch import nn

from hvdlocal.communicator import Communicator, require_agreement, succeed_together
from hvdlocal.data import Loader, evaluation_batches
from hvdlocal.data.load.order import OrderMode
from hvdlocal.data.read.dataset import StoredSamples
from hvdlocal.training.builders import (
    check_model,
    code_paths,
    configured_loader,
    import_paths,
    memory_format,
    model_from_config,
    placed,
    preflight_facts,
    require_alike,
    shared_digests,
)
from hvdlocal.training.config import TrainConfig
from hvdlocal.training.config_checks import check_ranges
from hvdlocal.training.environment import choose_device, set_threads, versions
from hvdlocal.training.preprocessing import Preprocessing, preprocessing_from_config
from hvdlocal.training.random_state import random_state, restore_random_state
from hvdlocal.training.rules import build_period
from hvdlocal.training.run_length import RunLength, run_length
from hvdlocal.training.samples import open_samples
from hvdlocal.training.tasks import Batch, ImageClassification, Task, build_task
from hvdlocal.training.tasks.checked import CheckedTask
from hvdlocal.training.tasks.trial import try_task


class Session:
    """Everything that training needs before an optimizer is chosen. Building it is a collective.

    Training changes the model's parameters, and `redivide` the length; no other attribute changes after construction.

    Args:
        config: of the run; the same on every rank.
        communicator: the ranks.
        with_test_data: whether the test data are opened, too.
        task: takes the place of the configured one.
        model: takes the place of the configured one, and is trained itself.

    Attributes:
        device: the device of this rank.
        task: what is learned.
        train_data, test_data: the two splits of the data set; `test_data` is None without them.
        preprocessing: how samples are cut, augmented and normalised.
        loader: of this rank's training batches.
        length: epoch, budget and learning-rate schedule.
        model: as it is before training, the same on every rank.
        memory_format: memory format of the model and its inputs.
        fingerprints: the fingerprints of the data, by "training" and "test".
        parameters: number of trainable parameters of the model.
        threads: torch's CPU threads.

    Raises:
        SetupError: the configuration, the data or this machine do not allow the run; on all ranks.
        DisagreementError: the ranks differ in what must be equal; on all ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        communicator: Communicator,
        *,
        with_test_data: bool = True,
        task: Task | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.config = config
        self._given_task = task
        self._given_model = model
        self._model_as_given = copy.deepcopy(model)
        self.communicator = communicator
        self.device = succeed_together(communicator, lambda: check_settings(config, communicator), "hvdlocal.check")
        with ExitStack() as opened:
            self.train_data, self.test_data = open_samples(config, communicator, with_test_data)
            for samples in (self.train_data, self.test_data):
                if samples is not None:
                    opened.enter_context(closing(samples))
            self.memory_format = memory_format(config.model)
            self.task, self.preprocessing, self.loader, self.length, self.model = succeed_together(
                communicator, self._build, "hvdlocal.prepare"
            )
            self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            self.fingerprints = {"training": self.train_data.fingerprint}
            if self.test_data is not None:
                self.fingerprints["test"] = self.test_data.fingerprint
            code = shared_digests(communicator, code_paths(config))
            facts = preflight_facts(config, self.device, self.fingerprints, code)
            require_agreement(communicator, facts, "hvdlocal.preflight")
            self.threads = set_threads(config.threads, communicator)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Closes the data."""
        self._opened.close()

    def new_loader(self, *, seed: int | None = None, order: OrderMode | None = None) -> Loader:
        """Returns another loader of this rank's training batches, with another seed or order."""
        return self._loader(self.preprocessing, seed, order)

    def redivide(self, loader: Loader) -> float:
        """Makes the length that of a run on the ranks that are left, as a resumption on so many would have it.

        Args:
            loader: of this rank's share among them.

        Returns:
            The new epoch in units of the old one, by which progress is to be multiplied.
        """
        before = self.length
        self.length = run_length(self.config, loader.steps_per_epoch, self.communicator.size)
        return self.length.epoch / before.epoch

    def new_model(self) -> nn.Module:
        """Returns another copy of the model as it is before training."""
        return self._model(self.task)

    def formatted(self, batch: Batch) -> Batch:
        """Returns a batch with images in the memory format of the model."""
        inputs, targets = batch
        if isinstance(inputs, torch.Tensor) and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=self.memory_format)
        return inputs, targets

    def test_batches(self) -> Iterator[Batch]:
        """Returns this rank's batches of test samples, each once, on the device."""
        assert self.test_data is not None
        return self._test_batches(self.test_data, self.preprocessing)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which the model computes in the configured precision."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.precision))

    def _build(self) -> tuple[Task, Preprocessing, Loader, RunLength, nn.Module]:
        """Builds what can fail because of user input and needs no communication."""
        config, train, test = self.config, self.train_data, self.test_data
        if test is not None:
            require_alike(train, test, config.data.path)
        task = self._given_task or build_task(config)
        preprocessing = preprocessing_from_config(config.data, train, test)
        loader = self._loader(preprocessing)
        length = run_length(config, loader.steps_per_epoch, self.communicator.size)
        if config.method.is_local:  # a rule that cannot be built is reported now
            warmup = config.schedule.warmup_epochs * length.epoch
            build_period(config.method.period, config.optimizer.lr, warmup, length.epoch)
        check_model(config, task, train, self.communicator.size)
        own = import_paths(config)
        if own:
            task = CheckedTask(task, f"task={config.task} with model.name={config.model.name}")
        model = self._model(task) if self._given_model is None else placed(self._given_model, config, self.device)
        if own or type(task) is not ImageClassification:
            self._try(task, preprocessing)
        return task, preprocessing, loader, length, model

    def _try(self, task: Task, preprocessing: Preprocessing) -> None:
        """Trains a copy of the model for one step and evaluates it, so that mistakes in a user's code show before training."""
        before = random_state(self.device)
        with ExitStack() as opened:
            opened.callback(restore_random_state, before, self.device)
            training = opened.enter_context(closing(self._loader(preprocessing).endless()))
            testing = iter(()) if self.test_data is None else self._test_batches(self.test_data, preprocessing)
            batches = next(training), next(testing, None)
            try_task(self.config, task, self._model(task), batches, self.autocast, self.formatted)

    def _test_batches(self, data: StoredSamples, preprocessing: Preprocessing) -> Iterator[Batch]:
        return evaluation_batches(
            data,
            self.config.evaluation_batch_size,
            rank=self.communicator.rank,
            num_workers=self.communicator.size,
            crop=preprocessing.test_crop,
            transform=preprocessing.test_transform,
            device=self.device,
            threads=self.config.data.threads,
        )

    def _loader(self, preprocessing: Preprocessing, seed: int | None = None, order: OrderMode | None = None) -> Loader:
        return configured_loader(
            self.config,
            self.train_data,
            preprocessing,
            self.device,
            rank=self.communicator.rank,
            num_workers=self.communicator.size,
            seed=seed,
            order=order,
        )

    def _model(self, task: Task) -> nn.Module:
        if self._model_as_given is not None:
            return placed(copy.deepcopy(self._model_as_given), self.config, self.device)
        return model_from_config(self.config, task, self.train_data, self.device)


def check_settings(config: TrainConfig, communicator: Communicator) -> torch.device:
    """Checks what can be checked without data and without the other ranks.

    Returns:
        The device of this rank.

    Raises:
        ValueError: a setting is out of its range, or the device cannot be used.
    """
    check_ranges(config)
    versions()  # read once, where a failure is reported on all ranks
    return choose_device(config.device, communicator)
