"""What a norm does to a direction of the residual stream: its gain, its shift, whether it centres."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from patchclamp.model.closeness import same


class LinearPart(NamedTuple):
    """What a norm does beside dividing by the size of its input: `gain * (x - mean(x)) / size + shift`.

    Attributes:
        gain: `[d]` float32.
        shift: `[d]` float32.
        centres: whether the mean is taken off.
    """

    gain: torch.Tensor
    shift: torch.Tensor
    centres: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., d]` -> what the norm makes of it, but for the division and the shift."""
        centred = x - x.mean(-1, keepdim=True) if self.centres else x
        return centred * self.gain.to(centred)


def linear_part(norm: nn.Module, width: int) -> LinearPart | None:
    """What a norm over the last dimension does beside dividing; None if the module is not such a norm.

    It is found by giving a copy of the module vectors of `width`, and verified on others.
    """
    try:
        tried: nn.Module = copy.deepcopy(norm).float()
        device = next((each.device for each in tried.parameters()), torch.device("cpu"))
        with torch.no_grad():
            # Large numbers, beside which the epsilon in the denominator is nothing.
            signs = torch.ones(width, device=device)
            signs[1::2] = -1
            shift = tried.forward(torch.zeros(1, width, device=device))[0]
            constant = tried.forward(torch.ones(1, width, device=device))[0] - shift
            made = tried.forward(100 * signs[None])[0] - shift
            centres = bool(constant.abs().max() < 1e-3 * made.abs().max())
            centred = signs - signs.mean() if centres else signs
            found = LinearPart(made * centred.pow(2).mean().sqrt() / centred, shift, centres)
            x = 100 * torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(device)
            size = (x - x.mean(-1, keepdim=True) if centres else x).pow(2).mean(-1, keepdim=True).sqrt()
            return found if same(found(x) / size + shift, tried.forward(x)) else None
    except Exception:  # it takes something else than vectors of this width
        return None
