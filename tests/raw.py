"""Look into a network with plain PyTorch: what the tests compare patchclamp with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def call(module: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The first tensor that the network returns: last hidden states, or logits."""
    output = module(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def watching(module: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Path of a submodule -> (what it was given, what it returned) at its last call, by plain PyTorch."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            returned = output if isinstance(output, torch.Tensor) else output[0]
            seen[path] = given.detach().clone(), returned.detach().clone()

        return keep

    handles = [module.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def plain_weights(module: nn.Module, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [inputs, outputs], bias [outputs]) of a projection."""
    linear: Any = module.get_submodule(path)
    weight, bias = linear.weight.detach(), getattr(linear, "bias", None)
    weight = weight.T if isinstance(linear, nn.Linear) else weight
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()


def hooks_of(module: nn.Module) -> dict[str, int]:
    """How many hooks of each kind there are, over all modules."""
    kinds = [name for name in vars(module) if name.endswith(("_hooks", "_with_kwargs", "_always_called"))]
    return {kind: sum(len(getattr(each, kind, ())) for each in module.modules()) for kind in kinds}


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """To `rtol=1e-4` and `atol=1e-5` of the scale in float32, to 1e-10 in float64."""
    exact = expected.dtype == torch.float64
    relative, absolute = (1e-10, 1e-10) if exact else (1e-4, 1e-5)
    scale = max(float(expected.abs().max()), 1e-30)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(
        torch.as_tensor(got.clone()), expected, rtol=relative, atol=absolute * (1.0 if exact else scale)
    )
