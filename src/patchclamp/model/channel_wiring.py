"""How the neurons of a convolution, its output channels, are wired."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from patchclamp.model.channel_readers import tried_reader
from patchclamp.model.example import Example
from patchclamp.model.modules import activation_name, is_channel_norm, is_convolution, linear_shape
from patchclamp.model.site import Site
from patchclamp.model.slices import WeightSlice, Wiring, channel_norm_slices, join, projection_slices, why_no_parameters


def convolution_wiring(root: nn.Module, site: Site, example: Example | None = None) -> Wiring:
    """What makes the channels of a convolution, and what reads them.

    An `nn.Sequential` says what comes next. Elsewhere it is tried on the example, and not known without one.
    """
    size, path = cast(int, site.size), site.reads.get("in", site.module)
    module: Any = root.get_submodule(path)
    made, why = (), why_no_parameters(path, module)
    if not why and module.transposed and module.groups > 1:
        why = f"the groups of {path} share the rows of a transposed convolution"
    if not why:
        made = (WeightSlice(join(path, "weight"), int(module.transposed), size),)
        if module.bias is not None:
            made += (WeightSlice(join(path, "bias"), 0, size),)
        if site.norm is not None:
            made += tuple(channel_norm_slices(site.norm, root.get_submodule(site.norm), size))
    found = Wiring(made, unknown_producers=why)
    if _after(root, site.module) or site.tensor != "output":
        return _read_in_sequence(root, site, found)
    if example is None:
        return replace(found, unknown_consumers=f"no nn.Sequential says what reads the output of {site.module}")
    try:
        tried = tried_reader(root, site, example)
    except Exception as error:  # whatever a foreign network raises when its tensors are changed
        tried = f"which layer reads {site.name} could not be tried: {type(error).__name__}: {error}"
    if isinstance(tried, str):
        return replace(found, unknown_consumers=tried)
    path, inexact = tried
    slices, why = _of_reader(root, path, size)
    return replace(found, consumers=slices, unknown_consumers=why, inexact=inexact)


def _of_reader(root: nn.Module, path: str, size: int) -> tuple[tuple[WeightSlice, ...], str]:
    """What a convolution or linear layer has for each of the channels that it reads; or why that is not one to each."""
    module: Any = root.get_submodule(path)
    if not is_convolution(module):
        return projection_slices(root, path, size, reads=True)
    why = why_no_parameters(path, module) or ("it has groups" if module.groups > 1 else "")
    if why or module.in_channels != size:
        return (), f"{path} comes next: {why or 'of another width'}"
    return (WeightSlice(join(path, "weight"), 1 - int(module.transposed), size),), ""


def _read_in_sequence(root: nn.Module, site: Site, found: Wiring) -> Wiring:
    """The next convolution or linear layer, where an `nn.Sequential` says that it is next."""
    size, read, inexact, flat = cast(int, site.size), [], "", False
    for path, module in _after(root, site.module):
        shape = linear_shape(module)
        if shape is not None and (shape[0] != size or not flat):
            return replace(found, unknown_consumers=f"{path} reads {shape[0]} numbers, several of each channel")
        if shape is not None or is_convolution(module):
            slices, why = _of_reader(root, path, size)
            consumers = (*read, *slices) if slices else ()
            return replace(found, consumers=consumers, unknown_consumers=why, inexact=inexact)
        if is_channel_norm(module):
            read += channel_norm_slices(path, module, size)
            inexact = inexact or f"{path} makes another number of a neuron that is zero"
        elif isinstance(module, nn.Flatten):
            flat = module.start_dim == 1
        elif not _is_by_channel(module):
            return replace(
                found, unknown_consumers=f"{path} ({type(module).__name__}) comes next, and may mix channels"
            )
        elif activation_name(module) and bool(module(torch.zeros(1)).ne(0)):
            inexact = inexact or f"{path} makes another number of a neuron that is zero"
    return replace(found, unknown_consumers=f"the nn.Sequential of {site.module} ends, and what reads it is not known")


def _after(root: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """What follows a module in the nested `nn.Sequential` that it is in."""
    top = path
    while top and type(root.get_submodule(top.rpartition(".")[0])).forward is nn.Sequential.forward:
        top = top.rpartition(".")[0]
    members = _members(root.get_submodule(top), top) if top != path or not path else []
    places = [place for place, (name, _) in enumerate(members) if name == path]
    return members[places[0] + 1 :] if len(places) == 1 else []


def _members(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    if type(module).forward is not nn.Sequential.forward:
        return [(path, module)]
    return [each for name, child in module.named_children() for each in _members(child, join(path, name))]


def _is_by_channel(module: nn.Module) -> bool:
    if activation_name(module):
        return not isinstance(module, (nn.GLU, nn.PReLU))
    by_channel: Callable[[str], Any] = re.compile(r"Pool\d?d$|^Dropout|^Identity$|^ZeroPad|^Upsample$").search
    return type(module).__module__.startswith("torch.nn.") and by_channel(type(module).__name__) is not None
