"""`gpt` has GPT-2's size and initialisation, and predicts a token from those before it alone."""

import math

import pytest
import torch
from torch.nn import functional as F

import hvdlocal
from hvdlocal.communicator import SingleProcess
from hvdlocal.models import gpt

SMALL = {"vocabulary": 50, "block": 16, "layers": 2, "heads": 4, "width": 32}


def small(**changes):
    torch.manual_seed(0)
    return gpt(**(SMALL | changes))


@pytest.mark.parametrize(
    ("layers", "heads", "width", "parameters"),
    [(12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080)],
    ids=["GPT-2", "medium", "large"],
)
def test_the_published_sizes(layers, heads, width, parameters):
    """As OpenAI's weights have them: 124, 355 and 774 million, the tied embedding counted once."""
    with torch.device("meta"):
        model = gpt(50_257, 1024, layers=layers, heads=heads, width=width)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert parameters == (50_257 + 1024) * width + layers * (12 * width**2 + 13 * width) + 2 * width


def test_tied_weights_are_one_parameter():
    model = small()
    assert model.logits.weight is model.tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert "tokens.weight" in names
    assert "logits.weight" not in names


def test_no_output_depends_on_later_tokens():
    model = small().eval()
    tokens = torch.arange(16).view(1, 16)
    for changed in (1, 7, 15):
        other = tokens.clone()
        other[:, changed:] = 49
        before, after = model(tokens), model(other)
        torch.testing.assert_close(before[:, :changed], after[:, :changed])
        assert not torch.allclose(before[:, changed], after[:, changed])


def test_a_shorter_sequence_gives_the_same_logits():
    model = small().eval()
    tokens = torch.arange(16).view(1, 16)
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


def test_initial_weights():
    model = small(width=128, layers=8, vocabulary=500, block=64)
    residual = 0.02 / math.sqrt(2 * 8)
    for layer in model.layers:
        for projection in (layer.attention.output, layer.feed_forward[-1]):
            assert projection.weight.std().item() == pytest.approx(residual, rel=0.05)
        assert layer.attention.inputs.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.feed_forward[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.positions.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_the_initial_loss_is_that_of_a_uniform_guess():
    model, generator = small(width=128), torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (64, 17), generator=generator)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(50), abs=0.05)


def test_dropout_acts_in_training_alone():
    model, tokens = small(dropout=0.5), torch.arange(16).view(1, 16)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_local_steps_keep_the_tie():
    """The flat buffer of LocalOptimizer holds a tied weight once; a local step changes both of its uses."""
    model, plain = small(), small()
    optimizer = hvdlocal.LocalOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        model,
        period=hvdlocal.ConstantPeriod(2),
        communicator=SingleProcess(),
    )
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        tokens = torch.randint(50, (4, 17), generator=generator)
        for network, stepper in ((model, optimizer), (plain, reference)):
            stepper.zero_grad()
            F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            stepper.step()
    optimizer.synchronize()
    assert model.logits.weight is model.tokens.weight
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "width=32 is not a multiple of heads=5"),
        ({"layers": 0}, "layers=0: gpt needs a whole number of at least 1"),
        ({"width": 32.0}, "width=32.0: gpt needs a whole number"),
        ({"dropout": 1.0}, r"dropout=1\.0: must be a number of at least 0 and less than 1"),
        ({"dropout": "a"}, "dropout='a': must be a number"),
        ({"dropout": None}, "dropout=None: must be a number"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"dropout": -0.1}, r"dropout=-0\.1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_sequence_longer_than_the_block_is_refused():
    with pytest.raises(ValueError, match="a sequence of 17 tokens is longer than the model's block of 16"):
        small()(torch.zeros(1, 17, dtype=torch.int64))
