"""A task that can only be solved in context, and an attention-only transformer that learns it with induction heads.

    exemplar a, label of a, exemplar b, label of b, query a or b   ->   label of the query

Classes are Gaussian prototypes with noise. Each sequence gives its two classes two labels drawn anew, so that no label
can be remembered: the query has to be matched with an exemplar, and the token after it copied. It stands in for the
Omniglot task of Singh et al. (2024), and is learned within minutes on one core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from patchclamp.errors import DataError
from patchclamp.model.site import Site

LENGTH, QUERY = 5, 4
EXEMPLARS, LABELS = (0, 2), (1, 3)


class InContextBatch(NamedTuple):
    """Sequences of the task."""

    inputs: torch.Tensor
    """`[batch, 5, features + labels]` float32: an exemplar in the first columns or a label, one-hot, in the last."""
    target: torch.Tensor
    """`[batch]` int64, the label of the query."""
    right: torch.Tensor
    """`[batch]` int64, the position of the label that is to be copied: 1 or 3."""
    wrong: torch.Tensor
    """`[batch]` int64, the position of the other one."""


@dataclass(frozen=True)
class InContextTask:
    """The task: which prototypes there are, how noisy exemplars are, how many labels there are.

    Attributes:
        classes: how many prototypes.
        labels: how many labels, of which each sequence uses two.
        features: dimensions of a prototype, whose entries have variance 1.
        noise: standard deviation of what is added to each entry, anew for each exemplar.
        seed: of the prototypes.
    """

    classes: int = 50
    labels: int = 5
    features: int = 64
    noise: float = 0.1
    seed: int = 0

    @property
    def width(self) -> int:
        """Columns of an input: features, then labels."""
        return self.features + self.labels

    def prototypes(self) -> torch.Tensor:
        """`[classes, features]` float32."""
        return torch.randn(self.classes, self.features, generator=torch.Generator().manual_seed(self.seed))

    def batch(self, size: int, generator: torch.Generator) -> InContextBatch:
        """Draw sequences.

        Raises:
            DataError: there are not two classes, two labels or one sequence.
        """
        if min(self.classes, self.labels) < 2 or size < 1:
            raise DataError(f"a sequence has two classes and two labels; not {self.classes}, {self.labels} ({size=})")
        classes = torch.rand(size, self.classes, generator=generator).topk(2).indices
        labels = torch.rand(size, self.labels, generator=generator).topk(2).indices
        asked = torch.randint(2, (size,), generator=generator)
        rows = torch.arange(size)
        shown = torch.cat([classes, classes[rows, asked][:, None]], 1)
        noise = self.noise * torch.randn(size, 3, self.features, generator=generator)
        inputs = torch.zeros(size, LENGTH, self.width)
        inputs[:, [*EXEMPLARS, QUERY], : self.features] = self.prototypes()[shown] + noise
        for place, position in enumerate(LABELS):
            inputs[rows, position, self.features + labels[:, place]] = math.sqrt(self.features)
        return InContextBatch(inputs, labels[rows, asked], 1 + 2 * asked, 3 - 2 * asked)


class InContextNetwork(nn.Module):
    """A causal transformer of attention alone, with rotary positions.

    Its blocks have no MLP, so that `Model` does not list them: `pattern_site` and `value_site` say where its heads are.

    Args:
        task: what it is to read.
        width: of the residual stream.
        heads: of each layer.
        layers: of attention.
    """

    def __init__(self, task: InContextTask, width: int = 64, heads: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(task.width, width, bias=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.unembedding = nn.Linear(width, task.labels, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, 5, features + labels]` -> logits of the query's label, `[batch, labels]`."""
        states = self.embedding(inputs)
        for block in self.blocks:
            states = block(states)
        return self.unembedding(self.norm(states[:, -1]))


class Block(nn.Module):
    """A norm and attention, added to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.attention(self.norm(states))


class CausalAttention(nn.Module):
    """Causal attention, with rotary positions or without any.

    Raises:
        DataError: the heads do not share the width in even parts.
    """

    def __init__(self, width: int, heads: int, rotary: bool = True) -> None:
        super().__init__()
        if width % (2 * heads):
            raise DataError(f"{heads} heads do not share a width of {width} in even parts")
        self.num_heads, self.rotary = heads, rotary
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, length, width = states.shape
        size = width // self.num_heads

        def split(values: torch.Tensor) -> torch.Tensor:
            return values.reshape(batch, length, self.num_heads, size).transpose(1, 2)

        query, key, value = (split(each(states)) for each in (self.query, self.key, self.value))
        if self.rotary:
            query, key = _turned(query), _turned(key)
        scores = query @ key.transpose(-2, -1) / math.sqrt(size)
        seen = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        pattern = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return self.output((pattern @ value).transpose(1, 2).reshape(batch, length, width))


def pattern_site(network: InContextNetwork, layer: int) -> Site:
    """The attention probabilities of a layer; heads are its neurons."""
    attention = network.get_submodule(f"blocks.{layer}.attention")
    assert isinstance(attention, CausalAttention)
    return Site(
        f"pattern.{layer}",
        "pattern",
        layer,
        attention.num_heads,
        module=f"blocks.{layer}.attention",
        tensor="output",
        axis=1,
        through="attention",
    )


def value_site(layer: int) -> Site:
    """What the heads of a layer copy, before the pattern weighs it, `[batch, 5, width]`."""
    return Site.custom(f"blocks.{layer}.attention.value")


def previous_token_pattern() -> torch.Tensor:
    """`[5, 5]`: every token attends to the one before it, the first to itself."""
    return torch.eye(LENGTH)[[0, 0, 1, 2, 3]]


def induction_pattern(batch: InContextBatch, strength: float = 1.0) -> torch.Tensor:
    """`[batch, 5, 5]`: the query attends to the right label, and no other token to another than itself.

    Args:
        batch: the sequences.
        strength: attention to the right label less that to the wrong one, between -1 and 1; they sum to 1.
    """
    pattern = torch.eye(LENGTH).repeat(len(batch.target), 1, 1)
    rows = torch.arange(len(pattern))
    pattern[:, QUERY] = 0.0
    pattern[rows, QUERY, batch.right] = (1 + strength) / 2
    pattern[rows, QUERY, batch.wrong] = (1 - strength) / 2
    return pattern


# Helpers --------------------------------------------------------------------------------------------


def _turned(values: torch.Tensor) -> torch.Tensor:
    """Rotary positions: `[..., length, size]`, each pair of coordinates turned by its frequency times the position."""
    length, half = values.shape[-2], values.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=values.device) / half)
    angle = torch.arange(length, device=values.device)[:, None] * frequency
    first, second = values[..., :half], values[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1).to(
        values
    )
