"""Modular addition, (a + b) mod 113, in one hidden layer: a network that first memorises, then finds the rule.

    logits = W_out relu(W_in (E[a] + E[b]) + bias)

Half of the unordered pairs are trained on; as E[a] + E[b] does not know the order, (b, a) is on the side of (a, b), so
that no held-out pair is a mirrored one that was seen. What such a network ends with is known: each neuron is a sum of
waves over a and b of few frequencies (Gromov, 2023, "Grokking modular arithmetic"; Nanda et al., 2023, "Progress
measures for grokking via mechanistic interpretability").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

P = 113
WIDTH, NEURONS = 128, 512
TRAINED_SHARE = 0.5


class ModularAddition(nn.Module):
    """Embedding of both numbers, one layer of ReLU neurons, unembedding.

    Attributes:
        embedding: `[113, 128]`, one vector for each number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(P, WIDTH)
        self.layer = nn.Sequential(nn.Linear(WIDTH, NEURONS), nn.ReLU(), nn.Linear(NEURONS, P, bias=False))
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """Logits `[examples, 113]` of the sums of `pairs` `[examples, 2]`, whole numbers from 0 to 112."""
        return self.layer(self.embedding(pairs).sum(1))


def all_pairs() -> np.ndarray:
    """Every pair of numbers, `[12769, 2]`, int64; row a * 113 + b is (a, b)."""
    return np.stack(np.meshgrid(np.arange(P), np.arange(P), indexing="ij"), -1).reshape(-1, 2)


def train_mask(seed: int = 0) -> np.ndarray:
    """Which rows of `all_pairs` are trained on: bool `[12769]`, the same for (a, b) and (b, a)."""
    chosen = np.random.default_rng(seed).random((P, P)) < TRAINED_SHARE
    return np.where(np.tri(P, dtype=bool), chosen, chosen.T).reshape(-1)
