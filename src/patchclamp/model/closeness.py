"""Whether two tensors that a network computed are the same but for rounding."""

from __future__ import annotations

import torch


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Of one shape, and apart by no more than a few roundings of their precision, relative to the largest value."""
    if left.shape != right.shape:
        return False
    if not left.numel():
        return True
    rounding = max(tolerance(left), tolerance(right))
    return bool((left.double() - right.double()).abs().max() <= rounding * right.double().abs().max())


def tolerance(tensor: torch.Tensor) -> float:
    """A few roundings of the tensor's own precision."""
    return max(1e-4, 8 * torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else 0.0
