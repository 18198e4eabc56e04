"""Inputs on which a network can be tried: the user's example, or made-up ones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchclamp.errors import DataError
from patchclamp.model.modules import is_convolution
from patchclamp.model.signature import accepts

# A plain network does not say what side its images have; these are common.
_SIDES = (32, 64, 28, 16, 8, 96, 128, 224, 256)
_COPIED_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class Example:
    """What to call a module with."""

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> Example:
        """From what a user gave: a tensor, a tuple of arguments, or a mapping of keywords.

        Raises:
            DataError: it is something else.
        """
        if isinstance(given, torch.Tensor):
            return cls((given,))
        if isinstance(given, Mapping):
            return cls((), dict(given))
        if isinstance(given, Sequence) and not isinstance(given, str):
            return cls(tuple(given))
        kind = type(given).__name__
        raise DataError(f"example= is a tensor, a tuple of arguments or a mapping of keywords, not {kind}")


def run(root: nn.Module, example: Example) -> Any:
    """One forward pass without gradient, in evaluation mode; the modes and the random generators are put back."""
    with torch.no_grad(), undisturbed(root):
        return root(*example.arguments, **example.keywords)


@contextmanager
def undisturbed(root: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; the modes of all modules and the random generators are put back."""
    training = [module for module in root.modules() if module.training]
    with torch.random.fork_rng(devices=[]):
        root.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def is_uninitialised(root: nn.Module) -> bool:
    """Whether lazy layers wait for a first call to learn their sizes: made-up inputs would settle them for good."""
    tensors = itertools.chain(root.parameters(), root.buffers())
    return any(isinstance(each, (nn.UninitializedParameter, nn.UninitializedBuffer)) for each in tensors)


def example_inputs(root: nn.Module) -> Example | None:
    """A few made-up tokens (and an image, where one is wanted) for a Hugging Face model; None for others."""
    config = getattr(root, "config", None)
    parameter, device = next(root.parameters(), None), input_device(root)
    if config is None or parameter is None or device.type == "meta" or is_uninitialised(root):
        return None
    inputs: dict[str, torch.Tensor] = {}
    text = getattr(config, "text_config", config)
    vocabulary = getattr(text, "vocab_size", None)
    if accepts(root, "input_ids") and vocabulary:
        # Any tokens do; the last ones of the vocabulary are seldom special.
        inputs["input_ids"] = torch.arange(vocabulary - 1, vocabulary - 6, -1).clamp(min=0)[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None)
    if accepts(root, "pixel_values"):
        # A network of convolutions takes images of any size, and does not name one.
        side = side if isinstance(side, int) else 64
        generator = torch.Generator().manual_seed(0)
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.rand(1, channels, side, side, generator=generator)
    kept = {name: value for name, value in inputs.items() if accepts(root, name)}
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    placed = {n: (v.to(dtype) if v.is_floating_point() else v).to(device) for n, v in kept.items()}
    return Example((), placed) if placed else None


def input_device(root: nn.Module) -> torch.device:
    """Where a module wants its inputs: where its first weights are, or where accelerate computes with them."""
    devices = [each.device for each in root.parameters()]
    if all(each.type != "meta" for each in devices[:1]):
        return devices[0] if devices else torch.device("cpu")
    # Weights that accelerate has put aside are on "meta"; its hooks know where they are computed with.
    for module in root.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):
            execution = getattr(each, "execution_device", None)
            if execution is not None:
                return torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    return next((each for each in devices if each.type != "meta"), devices[0])


def tried_images(root: nn.Module) -> tuple[nn.Module, Example] | None:
    """A copy of a plain network of convolutions, and made-up images that it takes; None if there are none.

    A copy, because nobody asked for a forward pass: it may leave something behind in the modules.
    """
    first = next((module for module in root.modules() if is_convolution(module)), None)
    if not isinstance(first, nn.modules.conv._ConvNd) or first.weight.device.type == "meta" or is_uninitialised(root):
        return None
    if sum(each.numel() for each in root.parameters()) > _COPIED_PARAMETERS:
        return None
    try:
        copied = copy.deepcopy(root)
    except Exception:  # a module may hold what cannot be copied
        return None
    dimensions = len(first.kernel_size)
    for side in _SIDES if dimensions < 3 else _SIDES[:3]:
        shape = (1, first.in_channels, *[side] * dimensions)
        images = Example((torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(first.weight),))
        try:
            run(copied, images)
        except Exception:  # whatever a foreign network raises on made-up inputs
            continue
        return copied, images
    return None
