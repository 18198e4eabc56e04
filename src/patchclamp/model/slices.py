"""Slices of weights: which numbers of which parameters belong to a neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from patchclamp.errors import UnknownName
from patchclamp.model.modules import linear_shape
from patchclamp.model.weights import is_quantised


@dataclass(frozen=True)
class WeightSlice:
    """One index of one parameter for each neuron of a site.

    Attributes:
        parameter: dotted name of the parameter, or of the buffer (a running mean).
        axis: dimension that counts the neurons, after `index`.
        size: number of neurons.
        offset: index of neuron 0.
        stride: from one neuron to the next.
        index: where in the parameter to begin: `(3,)` is the fourth expert.
    """

    parameter: str
    axis: int
    size: int
    offset: int = 0
    stride: int = 1
    index: tuple[int, ...] = ()

    def position(self, neuron: int) -> int:
        """Index of a neuron along `axis`.

        Raises:
            UnknownName: the site has no such neuron.
        """
        if not 0 <= neuron < self.size:
            raise UnknownName(f"{self.parameter} serves neurons 0 to {self.size - 1}, not {neuron}")
        return self.offset + self.stride * neuron

    def of(self, root: nn.Module, neuron: int) -> torch.Tensor:
        """The numbers of one neuron: a view, without gradient; writing into it changes the network.

        Raises:
            UnknownName: the site has no such neuron.
        """
        return self._tensor(root).select(self.axis, self.position(neuron))

    def every(self, root: nn.Module) -> torch.Tensor:
        """Those of all neurons, neurons first, `[size, ...]`: a view too."""
        counted = self._tensor(root).movedim(self.axis, 0)
        return counted[self.offset : self.offset + self.stride * (self.size - 1) + 1 : self.stride]

    def _tensor(self, root: nn.Module) -> torch.Tensor:
        path, _, name = self.parameter.rpartition(".")
        tensor = cast(torch.Tensor, getattr(root.get_submodule(path), name)).detach()
        return tensor[self.index] if self.index else tensor


@dataclass(frozen=True)
class Wiring:
    """What makes and what reads the neurons of one site.

    Attributes:
        producers: slices that make each neuron.
        consumers: slices that read it.
        unknown_producers: why `producers` are not all; empty where they are.
        unknown_consumers: the same of `consumers`.
        inexact: why setting the `consumers` of a neuron to zero is something else than ablating it to zero; empty where
            the two are the same.
    """

    producers: tuple[WeightSlice, ...] = ()
    consumers: tuple[WeightSlice, ...] = ()
    unknown_producers: str = ""
    unknown_consumers: str = ""
    inexact: str = ""


def unknown_wiring(producers: str, consumers: str) -> Wiring:
    """Nothing is known, for these reasons."""
    return Wiring(unknown_producers=producers, unknown_consumers=consumers, inexact=consumers)


def projection_slices(
    root: nn.Module, path: str, size: int, reads: bool, offset: int = 0, stride: int = 1
) -> tuple[tuple[WeightSlice, ...], str]:
    """The slices of a linear layer that read each neuron, or that make it (those of its bias too); or why not."""
    module = root.get_submodule(path)
    if why := why_no_parameters(path, module):
        return (), why
    shape = linear_shape(module)
    if shape is None:
        return (), f"{path} is no linear layer"
    if (shape[0] if reads else shape[1]) < offset + stride * (size - 1) + 1:
        return (), f"{path} maps {shape[0]} to {shape[1]}, which is not one to each of {size} neurons"
    axis = int(reads) if type(module).__name__ != "Conv1D" else 1 - int(reads)
    slices = [WeightSlice(join(path, "weight"), axis, size, offset, stride)]
    if not reads and getattr(module, "bias", None) is not None:
        slices.append(WeightSlice(join(path, "bias"), 0, size, offset, stride))
    return tuple(slices), ""


def why_no_parameters(path: str, module: nn.Module) -> str:
    """Why the numbers that a module computes with are no parameters that could be sliced."""
    if why := is_quantised(module):
        return f"{path} is quantised: {why}"
    if "weight" not in module._parameters:
        return f"{path}.weight is no parameter of its own, but computed from others"
    if "bias" not in module._parameters and getattr(module, "bias", None) is not None:
        return f"{path}.bias is no parameter of its own, but computed from others"
    return ""


def channel_norm_slices(path: str, norm: nn.Module, size: int) -> list[WeightSlice]:
    """What a batch or instance norm holds for each channel, running statistics among it."""
    tensors = {name: getattr(norm, name, None) for name in ("weight", "bias", "running_mean", "running_var")}
    return [WeightSlice(join(path, name), 0, size) for name, each in tensors.items() if each is not None]


def join(path: str, name: str) -> str:
    """A dotted path; the network itself has the path `""`."""
    return f"{path}.{name}" if path else name
