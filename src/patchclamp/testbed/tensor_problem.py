"""Three parts that are useful only together: the smallest problem whose loss stays flat, and then drops.

    loss = 1/2 mean (a* b* c* - a b c)^2,    outer products of three vectors

Each vector's gradient is as small as the product of the other two, so that from small values nothing moves for long;
with two of them held at their targets the problem is quadratic, and the loss falls exponentially from the first step
(Singh et al., 2024).
"""

from __future__ import annotations

import torch
from torch import nn

from patchclamp.model.site import Site

PARTS = ("a", "b", "c")


class TensorProblem(nn.Module):
    """The outer product of three learned vectors, float64.

    Args:
        dimensions: of each vector.
        scale: standard deviation of the first values.
        seed: of targets and first values.

    Attributes:
        targets: part -> `[dimensions]`, unit vectors times the root of their length: entries around 1.
    """

    def __init__(self, dimensions: int = 10, scale: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.targets = {
            part: nn.functional.normalize(torch.randn(dimensions, generator=made, dtype=torch.float64), dim=0)
            * dimensions**0.5
            for part in PARTS
        }
        self.parts = nn.ModuleDict(
            {part: _Vector(scale * torch.randn(dimensions, generator=made, dtype=torch.float64)) for part in PARTS}
        )

    def forward(self) -> torch.Tensor:
        """The loss, one number."""
        return (_outer(*self.targets.values()) - _outer(*(self.parts[part]() for part in PARTS))).square().mean() / 2

    @staticmethod
    def site(part: str) -> Site:
        """Where a vector can be held: "a", "b" or "c"."""
        return Site.custom(f"parts.{part}")


class _Vector(nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self) -> torch.Tensor:
        return self.values


def _outer(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return a[:, None, None] * b[:, None] * c
