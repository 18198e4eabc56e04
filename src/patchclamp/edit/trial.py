"""Try on a few inputs what the modules do not say: whether a factor, or a vector, arrives as it was sent."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from patchclamp.model.closeness import same
from patchclamp.model.example import Example, example_inputs, run
from patchclamp.model.hooks import first_tensor, hooked, reading
from patchclamp.model.model import Model
from patchclamp.model.site import Site

_UNTRIED = "it could not be tried, as the network does not say what it takes: pc.load(..., example=...)"


def why_not_homogeneous(model: Model, site: Site, reader: str, factor: float) -> str:
    """Why channels that are multiplied by a factor do not reach their reader so multiplied; empty where they do.

    Between a convolution and the next there may be a nonlinearity or a pooling: a ReLU passes on a positive factor, a
    GELU none. The site is given noise once, and the same noise times the factor.
    """
    example = _example(model)
    if example is None:
        return f"whether {reader} reads channels times {factor:g} where {site.name} is, is not known: {_UNTRIED}"
    # A copy, as nobody asked for a forward pass of a plain network.
    root = copy.deepcopy(model.module)
    seen: list[torch.Tensor] = []

    def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().clone())

    for times in (1.0, factor):
        generator = torch.Generator().manual_seed(0)

        def noise(tensor: torch.Tensor, times: float = times, generator: torch.Generator = generator) -> torch.Tensor:
            return times * torch.randn(tensor.shape, generator=generator).to(tensor)

        handle = root.get_submodule(reader).register_forward_pre_hook(see)
        try:
            with hooked(root, [(site, noise)]):
                run(root, example)
        finally:
            handle.remove()
    if same(seen[1], factor * seen[0]):
        return ""
    return f"what comes between {site.name} and {reader} does not pass on a factor of {factor:g}"


def why_not_added(model: Model, edited: nn.Module, site: Site, bias: torch.Tensor) -> str:
    """Why what is added to a bias is not the same as that added at a site; empty where it is.

    Args:
        model: the model, at whose site a vector is added: noise as large as what is there.
        edited: a network that computes the same, into whose bias the vector is written for the trial.
        site: where it is to be added.
        bias: the bias, of `edited`.
    """
    example = _example(model)
    if example is None:
        return _UNTRIED
    vector = torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)).to(bias)

    def shown(root: nn.Module) -> list[torch.Tensor | None]:
        with reading(root, [site]) as captured:
            output = first_tensor(run(root, example))
        return [output, *(seen.tensor for seen in captured[site.name][-1:])]

    def add(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + vector

    vector *= next((each.std() for each in shown(edited)[1:] if each is not None), 1.0)
    with hooked(model.module, [(site, add)]):
        expected = shown(model.module)
    before = bias.clone()
    try:
        bias += vector
        got = shown(edited)
    finally:
        bias.copy_(before)
    for one, other in zip(got, expected, strict=True):
        if one is None or other is None or not same(one, other):
            return "what is added to that bias arrives changed: a norm or a factor comes between, or others read it"
    return ""


def _example(model: Model) -> Example | None:
    # What the model was looked at with: the user's example, or what was made up for it.
    return model._inspected.example or example_inputs(model.module)
