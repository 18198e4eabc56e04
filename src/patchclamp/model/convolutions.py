"""Where the neurons of a convolution are: its output channels, behind what treats each channel by itself.

A batch norm that follows moves the point at which a channel is silent, and a nonlinearity says where it fires. So
the neurons are what comes out of the norm and the nonlinearity that are modules of their own and get the
convolution's output and nothing else: the last tensor in which the channel stands alone. Where something is
added first, or a function computes the nonlinearity, the neurons are what comes before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from patchclamp.model.example import Example, run, tried_images
from patchclamp.model.inspection import Inspection
from patchclamp.model.modules import activation_name, is_channel_norm

_UNTRIED = (
    "read where the convolution itself ends: the network could not be tried, to see which norm and nonlinearity "
    "follow (pc.load(..., example=...) gives it something to try)"
)


def settle_convolutions(root: nn.Module, found: Inspection, example: Example | None) -> Example | None:
    """Move the sites of convolutions behind the channel's own norm and nonlinearity; drop those never reached.

    Returns:
        What the network was tried on: the example that was given, or, without one, images that it takes.
    """
    sites = {name: site for name, site in found.sites.items() if site.kind == "conv"}
    if not sites:
        return example
    tried = tried_images(root) if example is None else (root, example)
    if tried is None:
        found.notes["conv.*"] = _UNTRIED
        return None
    try:
        calls = _calls(*tried)
    except Exception as error:  # whatever a foreign model raises on made-up inputs
        found.notes["conv.*"] = f"{_UNTRIED}: {type(error).__name__}: {error}"
        return example
    for name, site in sites.items():
        number = sum(call.path == site.module for call in calls)
        if number != 1:
            del found.sites[name]
            found.unlisted[name] = (
                f"a forward pass calls {site.module} {number} times: which call is meant cannot be said"
                if number
                else f"a forward pass never calls {site.module} as a module"
            )
            continue
        path, activation, norm = _end_of_channel(root, site.module, calls)
        found.sites[name] = replace(site, module=path, activation=activation, norm=norm)
    return tried[1]


class _Call(NamedTuple):
    """One call of a module that has no children; the very tensors, so that which is whose can be told."""

    path: str
    given: Any
    before: int  # how often the tensor that was given had been written into
    returned: Any
    after: int  # the same of what was returned, at that time


def _calls(root: nn.Module, example: Example) -> list[_Call]:
    """All of them in one forward pass, in order."""
    calls: list[_Call] = []
    handles = []

    versions: dict[str, int] = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            versions[path] = _version(args[0] if args else None)

        return hook

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls.append(_Call(path, args[0] if args else None, versions[path], output, _version(output)))

        return hook

    try:
        for path, module in root.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(note(path)))
                handles.append(module.register_forward_hook(keep(path)))
        run(root, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _version(tensor: Any) -> int:
    return tensor._version if isinstance(tensor, torch.Tensor) else -1


def _end_of_channel(root: nn.Module, path: str, calls: Sequence[_Call]) -> tuple[str, str | None, str | None]:
    """(module whose output the neurons are, nonlinearity, norm) of a convolution that is called once."""
    norm = None
    now = next(place for place, call in enumerate(calls) if call.path == path)
    while True:
        tensor = calls[now].returned
        takers = [place for place in range(now + 1, len(calls)) if calls[place].given is tensor]
        # A shortcut may be added into the very tensor.
        if not takers or calls[takers[0]].before != calls[now].after:
            return path, None, norm
        then = calls[takers[0]]
        module = root.get_submodule(then.path)
        # What works in place hands the same tensor on; otherwise nobody else may take it.
        shared = len(takers) > 1 and then.returned is not tensor
        if shared or sum(call.path == then.path for call in calls) != 1:
            return path, None, norm
        activation = activation_name(module)
        if activation is not None:
            return then.path, activation, norm
        if is_channel_norm(module) and norm is None:
            norm = then.path
        elif not isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            return path, None, norm
        path, now = then.path, takers[0]
