"""What a planted model does, by plain PyTorch: no hook, site or finder of patchclamp is used here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import patchclamp as pc
from patchclamp.testbed.planted import Planted


@dataclass(frozen=True, eq=False)
class Documents:
    """All documents in one batch, padded behind."""

    ids: torch.Tensor  # [documents, positions]
    real: torch.Tensor  # the same, bool
    words: list[str]  # by token id

    def of_class(self, name: str) -> list[int]:
        """Ids of the words of one class: the name, and a number behind it."""
        return [place for place, word in enumerate(self.words) if word.rstrip("0123456789") == name]

    def spoken(self, reads: str) -> torch.Tensor:
        """Where a word of those that `reads` names stands: "aru*" or "single2"."""
        wanted: list[int] = []
        for each in reads.split():
            wanted += self.of_class(each[:-1]) if each.endswith("*") else [self.words.index(each)]
        return torch.isin(self.ids, torch.tensor(wanted)) & self.real

    def named(self, writes: str) -> list[int]:
        """Ids of the words that `writes` names."""
        found: list[int] = []
        for each in writes.split():
            found += self.of_class(each[:-1]) if each.endswith("*") else [self.words.index(each)]
        return found


def read(planted: Planted) -> Documents:
    """The documents of a planted model as its tokenizer gives them."""
    tokenizer: Any = planted.model.tokenizer
    texts = planted.data
    assert isinstance(texts, pc.Texts)
    found = tokenizer([example.text for example in texts], padding=True, return_tensors="pt")
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return Documents(found["input_ids"], found["attention_mask"].bool(), words)


def module(planted: Planted) -> Any:
    """The Hugging Face model or the network itself."""
    return planted.model.module


def logits(of: Any, ids: torch.Tensor) -> torch.Tensor:
    """`[documents, positions, tokens]`."""
    with torch.no_grad():
        return of(ids, attention_mask=torch.ones_like(ids)).logits


def output_weight(of: Any, site: str, index: int) -> torch.Tensor:
    """A view of what one neuron writes."""
    layer = int(site.split(".")[1])
    if hasattr(of, "transformer"):
        return of.transformer.h[layer].mlp.c_proj.weight[index]
    return of.model.layers[layer].mlp.down_proj.weight[:, index]


@contextlib.contextmanager
def without(of: Any, *neurons: tuple[str, int]) -> Iterator[None]:
    """Their output weights are 0 meanwhile."""
    with torch.no_grad():
        kept = [output_weight(of, *each).clone() for each in neurons]
        for each in neurons:
            output_weight(of, *each).zero_()
        try:
            yield
        finally:
            for each, weight in zip(neurons, kept, strict=True):
                output_weight(of, *each).copy_(weight)


def activation(of: Any, ids: torch.Tensor, site: str, index: int) -> np.ndarray:
    """`[documents, positions]`: what enters the MLP's output projection, by a plain hook."""
    layer = int(site.split(".")[1])
    projection = (
        of.transformer.h[layer].mlp.c_proj if hasattr(of, "transformer") else of.model.layers[layer].mlp.down_proj
    )
    found: list[torch.Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, given: found.append(given[0][..., index].detach()))
    logits(of, ids)
    handle.remove()
    return found[0].numpy()
