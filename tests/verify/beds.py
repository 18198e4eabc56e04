"""Networks whose causes are known, for tests of tests: a plain one, in which each answer is one neuron's doing.

Nothing here comes from patchclamp.
"""

from __future__ import annotations

import torch
from torch import nn

FEATURES, HIDDEN, CLASSES = 12, 400, 4


class Planted(nn.Module):
    """One hidden layer. Neurons 0 to 3 decide the class; 4 to 7 do the same and write nothing; half of the rest is loud
    and writes nothing; the others read at random and write a little at random."""

    def __init__(self, seed: int, inert: float = 0.5, hidden: int = HIDDEN) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(FEATURES, hidden)
        self.act = nn.ReLU()
        self.outer = nn.Linear(hidden, CLASSES)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(hidden, FEATURES, generator=made))
            self.inner.bias.copy_(0.3 * torch.randn(hidden, generator=made))
            self.outer.weight.copy_(0.1 * torch.randn(CLASSES, hidden, generator=made))
            self.outer.bias.zero_()
            self.inner.weight[:8] = 0
            self.inner.bias[:8] = 0
            for number in range(CLASSES):
                self.inner.weight[number, number] = self.inner.weight[4 + number, number] = 2.0
            self.outer.weight[:, :8] = 0
            self.outer.weight[:, :CLASSES] = 0.25 * torch.eye(CLASSES)
            silent = 8 + torch.arange(int(inert * (hidden - 8)))
            self.inner.weight[silent] *= 2
            self.outer.weight[:, silent] = 0
        self.inert = silent.tolist()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.act(self.inner(x)))


def examples(seed: int, count: int = 80) -> tuple[torch.Tensor, list[int]]:
    """Inputs in which one of the first features stands out, and which."""
    made = torch.Generator().manual_seed(1000 + seed)
    classes = torch.arange(count) % CLASSES
    values = 0.5 * torch.randn(count, FEATURES, generator=made)
    values[torch.arange(count), classes] += 3.0
    return values, classes.tolist()
