"""Learning to predict the next token of a text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdlocal.data.kinds.tokens import IGNORED
from hvdlocal.import_path import accepts, call, is_import_path, load
from hvdlocal.training.config import ModelConfig
from hvdlocal.training.tasks.base import Batch, DataDescription, Metrics, Task, checked_model

SIZES = ("vocabulary", "block")
"""The arguments of a model that the data give, unless the configuration does."""


class LanguageModel(Task):
    """Predicts each token of a sequence from those before it, by the cross-entropy of logits (B, T, V).

    The model maps int64 token ids (B, T) to the logits of the next token at each position. `gpt` is GPT-2's transformer; a model
    by import path gets the arguments `vocabulary` and `block` if it takes them and the configuration does not give them.

    The loss is in nats per token. Bits per byte are Σ nats / (ln 2 · Σ bytes) over the predicted tokens that stand for bytes,
    and do not depend on the tokenizer. Special tokens stand for none, and are in neither sum.
    """

    best = ("bits_per_byte", "min")

    def __init__(self) -> None:
        self._vocabulary = 0
        self._token_bytes = torch.empty(0, dtype=torch.int64, device="cpu")

    def build_model(self, model: ModelConfig, data: DataDescription) -> nn.Module:
        """Builds `gpt`, or the user's own model.

        Raises:
            ValueError: the data are no tokens, there is no such model, or it is too small for the tokens.
        """
        if data.kind != "tokens":
            raise ValueError(
                f"task=language-model needs tokens, but the data are {data.kind}: prepare text with python -m data_prep text"
            )
        sizes = {name: data.facts[name] for name in SIZES}
        for name, size in sizes.items():
            given = model.arguments.get(name, size)
            if isinstance(given, int) and given < size:
                what = "token ids of the data" if name == "vocabulary" else "tokens of a sequence (data.block)"
                raise ValueError(
                    f"model.arguments.{name}={given}: it must hold the {size} {what}; leave it out, or raise it"
                )
        self._vocabulary = sizes["vocabulary"]
        token_bytes = getattr(data, "tables", {}).get("token_bytes")  # a manifest alone does not have them
        if token_bytes is not None:
            self._token_bytes = torch.tensor(token_bytes.tolist(), dtype=torch.int64, device="cpu")
        if is_import_path(model.name):
            builder = load(model.name, "model.name")
            taken = {name: size for name, size in sizes.items() if accepts(builder, name)}
            return checked_model(call(model.name, "model.name", arguments=taken | model.arguments), model)
        if model.name != "gpt":
            raise ValueError(
                f"model.name={model.name}: choose gpt for language-model, or your own as package.module:name"
            )
        return call("hvdlocal.models:gpt", "model.name", arguments=sizes | model.arguments)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Computes the mean cross-entropy over the tokens, in nats; the nats of each token, (B, T), are the output."""
        nats = self._nats(model, batch)
        return nats.sum() / (batch[1] != IGNORED).sum().clamp(min=1), nats.detach()

    def metrics(self, output: Any, batch: Batch) -> Metrics:
        """Computes the bits per byte."""
        targets = batch[1]
        if self._token_bytes.device != targets.device:
            self._token_bytes = self._token_bytes.to(targets.device)
        num_bytes = self._token_bytes[targets.clamp(min=0)] * (targets != IGNORED)
        nats = output.double().masked_fill(num_bytes == 0, 0)
        return {"bits_per_byte": (nats.sum() / math.log(2), num_bytes.sum())}

    def evaluate(self, model: nn.Module, batch: Batch) -> Metrics:
        """Computes the loss, weighted by the tokens, and the bits per byte."""
        nats = self._nats(model, batch)
        return {"loss": (nats.double().sum(), (batch[1] != IGNORED).sum()), **self.metrics(nats, batch)}

    def _nats(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the cross-entropy of each token, (B, T); 0 where the target is `IGNORED`."""
        inputs, targets = batch
        logits = model(inputs)
        if logits.shape[:-1] != targets.shape or logits.shape[-1] < self._vocabulary:
            raise ValueError(
                f"the model returns {tuple(logits.shape)} for token ids {tuple(inputs.shape)}; logits (B, T, V) are needed, with "
                f"V at least {self._vocabulary}, the number of token ids of the data"
            )
        nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return nats.view_as(targets)
