"""Concept weights: single weights whose shrinking lowers the loss on a subject, and which are shut for good.

Scaling a weight by (1 - eps) changes the loss by about -eps * weight * dL/dweight: where that product is large, the
weight stands in the way of the subject. It is summed over steps, each of other noise and other examples; after each
step the weights that are selected so far shrink a little, so that those that only mattered together with others get
their turn. Which weights are shut is all that has to be stored of a subject, and sets of several can be united.

Number of steps, threshold and shrinking are not said in what could be read of the paper, which has no published code:
they are arguments. The sum is a mean here, so that a threshold means the same for any number of steps.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from patchclamp.errors import DataError, ModelError, unknown
from patchclamp.model.model import Model
from patchclamp.published import published
from patchclamp.weights import Weights

# Keys and values of the attention over the text, as `diffusers` calls them.
CROSS_ATTENTION = ("*attn2.to_k.weight", "*attn2.to_v.weight")
Loss = Callable[[nn.Module, torch.Generator], torch.Tensor]


@published(
    row="S095",
    title="Cones: Concept Neurons in Diffusion Models for Customized Generation",
    authors="Liu et al.",
    year=2023,
    url="https://arxiv.org/abs/2303.05125",
)
def concept_weights(
    model: Model | nn.Module,
    loss: Loss,
    parameters: str | Sequence[str] = CROSS_ATTENTION,
    *,
    threshold: float = 0.1,
    relative: bool = True,
    steps: int = 10,
    shrink: float = 0.05,
    seed: int = 0,
) -> Weights:
    """Weights whose shrinking lowers the loss on a subject (Liu et al., 2023); shut them with `Weights.zeroed`.

    Args:
        model: the network, which is left as it was.
        loss: `(module, generator) -> loss` on the subject, a number; what it draws by chance (noise, moments of the
            diffusion, examples) it draws from the generator. Add a loss on the class as it was, to keep that.
        parameters: names of parameters or globs; the keys and values of cross attention in `diffusers`.
        threshold: of weight * dL/dweight, mean over steps: above it a weight is selected.
        relative: the threshold is a share of the largest mean; else a change of the loss.
        steps: backward passes.
        shrink: share by which selected weights shrink after each step; 0: not at all.
        seed: of the generator.

    Returns:
        The selected weights.

    Raises:
        UnknownName: no parameter has such a name.
        DataError: a loss that is not finite or no number, settings out of range.
        ModelError: the loss depends on none of the parameters, no weight stands in its way, or all of them do.
    """
    if steps < 1 or not 0 <= shrink < 1 or threshold <= 0 or (relative and threshold >= 1):
        raise DataError(
            f"steps={steps}, shrink={shrink}, threshold={threshold}: at least 1 step, 0 <= shrink < 1, and a threshold "
            "above 0, which is below 1 if it is a share"
        )
    module = model.module if isinstance(model, Model) else model
    chosen = _matching(module, [parameters] if isinstance(parameters, str) else list(parameters))
    generator = torch.Generator().manual_seed(seed)
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    wanted = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in before.items()}
    selected: dict[str, torch.Tensor] = {}
    try:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in chosen)
        for step in range(steps):
            slopes = _slopes(loss, module, generator, chosen, step)
            for name, parameter in chosen.items():
                sums[name] += (parameter.detach() * slopes[name]).double()
            selected = _above(sums, threshold * (1.0 if relative else step + 1), relative)
            with torch.no_grad():
                for name, parameter in chosen.items():
                    parameter.mul_(1 - shrink * selected[name])
    finally:
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(before[name])
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(wanted[name])
    return _refused_if_all(selected)


# Helpers --------------------------------------------------------------------------------------------


def _matching(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    known = dict(module.named_parameters())
    found = {name: each for name, each in known.items() if any(fnmatch.fnmatchcase(name, every) for every in patterns)}
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
            raise unknown("parameter", pattern, known)
    return found


def _slopes(
    loss: Loss, module: nn.Module, generator: torch.Generator, chosen: dict[str, nn.Parameter], step: int
) -> dict[str, torch.Tensor]:
    with torch.enable_grad():
        value = loss(module, generator)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise DataError(f"the loss is one number, not {list(getattr(value, 'shape', [])) or type(value).__name__}")
        if not bool(value.isfinite()):
            raise DataError(f"the loss is {float(value.detach())} at step {step}")
        if not value.requires_grad:
            raise ModelError(f"the loss depends on none of {', '.join(chosen)}")
        found = torch.autograd.grad(value.reshape(()), list(chosen.values()), allow_unused=True)
    if all(each is None for each in found):
        raise ModelError(f"the loss depends on none of {', '.join(chosen)}")
    return {
        name: torch.zeros_like(parameter) if slope is None else slope
        for (name, parameter), slope in zip(chosen.items(), found, strict=True)
    }


def _above(sums: dict[str, torch.Tensor], threshold: float, relative: bool) -> dict[str, torch.Tensor]:
    largest = max(float(each.max()) for each in sums.values())
    if relative and largest <= 0:
        raise ModelError("shrinking any of the weights raises the loss: none stands in the way of the subject")
    limit = threshold * largest if relative else threshold
    return {name: each > limit for name, each in sums.items()}


def _refused_if_all(selected: dict[str, torch.Tensor]) -> Weights:
    found = Weights({name: np.asarray(each.cpu()) for name, each in selected.items()})
    if found.count == sum(each.numel() for each in selected.values()):
        raise ModelError(f"all {found.count} weights are above the threshold: raise it")
    if not found.count:
        raise ModelError("no weight is above the threshold: lower it, or let it be relative")
    return found
