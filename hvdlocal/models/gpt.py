"""GPT-2's transformer (Radford et al. 2019), a language model over tokens."""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor, nn
from torch.nn import functional as F

INITIAL_STD = 0.02
"""Standard deviation of the initial weights of GPT-2."""


class _Attention(nn.Module):
    """Causal self-attention over heads of equal width."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.inputs = nn.Linear(width, 3 * width)  # query, key and value in one product
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.inputs(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


class _Layer(nn.Module):
    """A transformer layer with its norms before attention and feed-forward network, as in GPT-2."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.feed_forward(self.feed_forward_norm(x)))


class GPT(nn.Module):
    """The model that `gpt` builds.

    Attributes:
        vocabulary: number of token ids; the length of the output.
        block: the longest sequence of tokens.
    """

    def __init__(self, vocabulary: int, block: int, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.block = block
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(block, width)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, vocabulary, bias=False)
        self.logits.weight = self.tokens.weight  # tied: one parameter, counted and averaged once
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits (B, T, vocabulary) of the next token at each of T ≤ block positions of int64 (B, T) token ids."""
        length = tokens.shape[1]
        if length > self.block:
            raise ValueError(f"a sequence of {length} tokens is longer than the model's block of {self.block}")
        x = self.drop(self.tokens(tokens) + self.positions.weight[:length])
        for layer in self.layers:
            x = layer(x)
        return self.logits(self.norm(x))

    def _initialise(self) -> None:
        """Draws the weights as GPT-2 does; each of the 2 · layers branches that are added up begins smaller."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            for projection in (layer.attention.output, layer.feed_forward[-1]):
                assert isinstance(projection, nn.Linear)
                nn.init.normal_(projection.weight, std=INITIAL_STD / math.sqrt(2 * len(self.layers)))


def gpt(
    vocabulary: int, block: int, *, layers: int = 12, heads: int = 12, width: int = 768, dropout: float = 0.0
) -> GPT:
    """Builds GPT-2's transformer, freshly initialised. The defaults are those of its smallest size, 124 million parameters.

    With tied input and output embeddings there are (V + T) d + L (12 d² + 13 d) + 2 d parameters for vocabulary V, block
    T, width d and L layers.

    Args:
        vocabulary: V, number of token ids.
        block: T, the longest sequence of tokens.
        layers: L, number of transformer layers.
        heads: attention heads per layer; they divide `width`.
        width: d, length of the vector of a token.
        dropout: share of the activations, and of the attention weights, that is dropped in training.

    Raises:
        ValueError: a number is out of its range, or the heads do not divide the width.
    """
    sizes = {"vocabulary": vocabulary, "block": block, "layers": layers, "heads": heads, "width": width}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: gpt needs a whole number of at least 1")
    if width % heads:
        raise ValueError(
            f"width={width} is not a multiple of heads={heads}: every head takes an equal part of the width"
        )
    if not isinstance(dropout, Real) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: must be a number of at least 0 and less than 1")
    return GPT(vocabulary, block, layers, heads, width, dropout)
