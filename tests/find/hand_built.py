"""A decoder whose every weight is set by hand: what each token, head and neuron does is a line of the test.

Two blocks with attention and an MLP, a residual stream in which one feature is one coordinate, and an unembedding that
reads some of them. Nothing here comes from patchclamp but `load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import patchclamp as pc

HEADS = 2


class Attention(nn.Module):
    """Attention from the last token to where a feature is, and a copy of features; each head has a part of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.query = nn.Linear(width, HEADS * width, bias=False)
        self.key = nn.Linear(width, HEADS * width, bias=False)
        self.value = nn.Linear(width, HEADS * width, bias=False)
        self.output = nn.Linear(HEADS * width, width, bias=False)
        for each in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(each.weight)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, length, width = states.shape

        def split(values: torch.Tensor) -> torch.Tensor:
            return values.reshape(batch, length, HEADS, width).transpose(1, 2)

        query, key, value = (split(each(states)) for each in (self.query, self.key, self.value))
        made = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        return self.output(made.transpose(1, 2).reshape(batch, length, HEADS * width))


class Mlp(nn.Module):
    """ReLU neurons."""

    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(width, neurons), nn.ReLU(), nn.Linear(neurons, width)
        for each in self.parameters():
            nn.init.zeros_(each)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(states)))


class Block(nn.Module):
    """Attention, then the MLP, without norms."""

    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width), Mlp(width, neurons)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.attention(states)
        return states + self.mlp(states)


class HandBuilt(nn.Module):
    """Embedding, blocks, a norm (or none) and an unembedding; all weights of blocks are 0 until they are set."""

    def __init__(self, words: Sequence[str], features: Sequence[str], neurons: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.words, self.features = list(words), list(features)
        width = len(features)
        self.embedding = nn.Embedding(len(words), width)
        self.blocks = nn.ModuleList(Block(width, neurons) for _ in range(2))
        self.norm = nn.Identity() if norm is None else norm
        self.unembedding = nn.Linear(width, len(words), bias=False)
        nn.init.zeros_(self.embedding.weight)
        nn.init.zeros_(self.unembedding.weight)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        states = self.embedding(input_ids)
        for block in self.blocks:
            states = block(states)
        return SimpleNamespace(logits=self.unembedding(self.norm(states)))

    @torch.no_grad()
    def embed(self, word: str, **features: float) -> None:
        """What a word is: feature -> amount."""
        for name, amount in features.items():
            self.embedding.weight[self.words.index(word), self.features.index(name)] = amount

    @torch.no_grad()
    def head(self, layer: int, number: int, looks_for: str, copies: Mapping[str, str]) -> None:
        """Every token that has the feature "asks" looks for a feature; `copies`: read there -> written here."""
        attention: Any = self.blocks[layer].attention
        start = number * len(self.features)
        asks, sought = self.features.index("asks"), self.features.index(looks_for)
        attention.query.weight[start + sought, asks] = 30.0
        attention.key.weight[start + sought, sought] = 1.0
        for read, written in copies.items():
            attention.value.weight[start + self.features.index(read), self.features.index(read)] = 1.0
            attention.output.weight[self.features.index(written), start + self.features.index(read)] = 1.0

    @torch.no_grad()
    def neuron(self, layer: int, index: int, reads: str, writes: str, gain: float = 1.0) -> None:
        """A neuron that passes on one feature as another."""
        mlp: Any = self.blocks[layer].mlp
        mlp.up.weight[index, self.features.index(reads)] = 1.0
        mlp.down.weight[self.features.index(writes), index] = gain

    @torch.no_grad()
    def says(self, word: str, feature: str, amount: float = 1.0) -> None:
        """What makes a word likely."""
        self.unembedding.weight[self.words.index(word), self.features.index(feature)] = amount

    def load(self) -> pc.Model:
        """With a tokenizer that splits at spaces."""
        backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(self.words)}, "?"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", pad_token="?")
        example = {"input_ids": torch.arange(2, 7)[None]}
        return pc.load(self.eval(), tokenizer=tokenizer, example=example)
