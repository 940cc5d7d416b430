"""The task language-model: exact losses and bits per byte, gpt and a user's own model, and what does not fit."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hvdlocal.data.kinds.tokens import IGNORED
from hvdlocal.training.config import ModelConfig
from hvdlocal.training.tasks import LanguageModel

V, T = 5, 3
BYTES = np.array([0, 1, 2, 3, 4], np.uint16)  # token 0 is special


def described(vocabulary=V, block=T, kind="tokens", token_bytes=BYTES):
    facts = {"vocabulary": vocabulary, "block": block}
    return SimpleNamespace(kind=kind, facts=facts, tables={"token_bytes": token_bytes}, shape=None, classes=())


class Fixed(nn.Module):
    """Gives every token the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float32))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def built(**data):
    task = LanguageModel()
    task.build_model(ModelConfig("gpt", arguments={"layers": 1, "heads": 1, "width": 4}), described(**data))
    return task


def test_a_uniform_guess():
    """Ln V nats for each of five tokens. Four of them stand for bytes, 1 + 2 + 3 + 4; the special one is in neither sum."""
    task, model = built(), Fixed(torch.zeros(V))
    batch = torch.tensor([[0, 1, 2], [3, 0, 0]]), torch.tensor([[1, 2, 3], [0, 4, IGNORED]])
    loss, output = task.loss(model, batch)
    assert loss.item() == pytest.approx(math.log(V))
    metrics = {name: [float(part.detach()) for part in parts] for name, parts in task.evaluate(model, batch).items()}
    assert metrics["loss"] == pytest.approx([5 * math.log(V), 5])
    assert metrics["bits_per_byte"] == pytest.approx([4 * math.log2(V), 10])
    assert [float(part) for part in task.metrics(output, batch)["bits_per_byte"]] == metrics["bits_per_byte"]


def test_a_special_token_counts_for_the_loss_alone():
    """However badly it is predicted, the bits per byte are those of the token that stands for bytes."""
    task, model = built(), Fixed([-math.inf, 0.0, 0.0, -math.inf, -math.inf])
    metrics = task.evaluate(model, (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 2, IGNORED]])))
    assert metrics["loss"][0].item() == math.inf
    assert [float(part.detach()) for part in metrics["bits_per_byte"]] == pytest.approx([1, 2])


def test_the_gradient_is_that_of_the_mean_over_counted_tokens():
    task, model = built(), Fixed(torch.zeros(V))
    loss, _ = task.loss(model, (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 1, IGNORED]])))
    loss.backward()
    torch.testing.assert_close(model.logits.grad, torch.full((V,), 1 / V) - torch.eye(V)[1])


def test_a_batch_without_a_counted_token_has_no_loss():
    task, model = built(), Fixed(torch.zeros(V))
    loss, _ = task.loss(model, (torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), IGNORED)))
    assert loss.item() == 0


def test_gpt_gets_its_sizes_from_the_data():
    model = LanguageModel().build_model(
        ModelConfig("gpt", arguments={"layers": 1, "heads": 1, "width": 4}), described()
    )
    assert (model.vocabulary, model.block) == (V, T)
    larger = {"layers": 1, "heads": 1, "width": 4, "vocabulary": 8, "block": 16}
    model = LanguageModel().build_model(ModelConfig("gpt", arguments=larger), described())
    assert (model.vocabulary, model.block) == (8, 16)


def test_a_model_of_ones_own_may_take_the_sizes(tmp_path, monkeypatch):
    (tmp_path / "my_words.py").write_text(
        "from torch import nn\n"
        "def bigram(vocabulary): return nn.Embedding(vocabulary, vocabulary)\n"
        "def fixed(): return nn.Embedding(7, 7)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert LanguageModel().build_model(ModelConfig("my_words:bigram"), described()).num_embeddings == V
    assert LanguageModel().build_model(ModelConfig("my_words:fixed"), described()).num_embeddings == 7


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (ModelConfig("gpt"), {"kind": "images"}, "task=language-model needs tokens, but the data are images"),
        (
            ModelConfig("resnet9"),
            {},
            "model.name=resnet9: choose gpt for language-model, or your own as package.module:name",
        ),
        (
            ModelConfig("gpt", arguments={"vocabulary": 4}),
            {},
            "model.arguments.vocabulary=4: it must hold the 5 token ids of the data; leave it out, or raise it",
        ),
        (
            ModelConfig("gpt", arguments={"block": 2}),
            {},
            "model.arguments.block=2: it must hold the 3 tokens of a sequence",
        ),
        (ModelConfig("gpt", arguments={"head": 2}), {}, "head"),
        (ModelConfig("gpt", arguments={"heads": 5, "width": 4}), {}, "width=4 is not a multiple of heads=5"),
    ],
)
def test_refusals(model, data, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel().build_model(model, described(**data))


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 5), (6, 5)])
def test_logits_that_do_not_fit(shape):
    class Wrong(nn.Module):
        def forward(self, tokens):
            return torch.zeros(shape)

    batch = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"V at least 5, the number of token ids of the data"):
        built().loss(Wrong(), batch)
