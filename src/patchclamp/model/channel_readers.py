"""Try which layer reads the channels of a convolution, where no `nn.Sequential` says what comes next.

The next layer that runs is their only reader if nothing changes when the channels change and that layer is given what
it was given before. It reads each channel by itself if a channel set to zero changes no other of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from patchclamp.model.closeness import same
from patchclamp.model.example import Example, run
from patchclamp.model.hooks import first_tensor
from patchclamp.model.modules import is_convolution, linear_shape
from patchclamp.model.site import Site

Change = Callable[[torch.Tensor], torch.Tensor]


def tried_reader(root: nn.Module, site: Site, example: Example) -> tuple[str, str] | str:
    """The one layer that reads a site of channels, with why a zero there is none here (or `""`); or why there is none.

    Args:
        root: the network; it is run three times on the example.
        site: of kind `conv`, read at what its module returns.
        example: images that the network takes.
    """
    order, given, before = _run(root, site, example, lambda tensor: tensor)
    marks = [place for place, path in enumerate(order) if path == site.module]
    if len(marks) != 1 or before is None:
        return f"{site.module} is called {len(marks)} times"
    path = next(iter(order[marks[0] + 1 :]), "")
    if not path or order.count(path) != 1:
        return f"no other layer than {site.module} runs after it, or several times"
    axis = 1 if is_convolution(root.get_submodule(path)) else -1
    seen = given[path]
    if seen.ndim < 2 or seen.shape[axis] != site.size:
        return f"{path} runs next, and reads {seen.shape[axis]} numbers instead of {site.size} channels"

    generator = torch.Generator().manual_seed(0)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor + drawn * tensor.std()

    _, _, held = _run(root, site, example, noise, (path, seen))
    if held is None or not same(held, before):
        return f"{path} reads the channels, and something else does too"

    def every_second(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.movedim(site.axis, 0)[::2] = 0
        return changed

    _, given, _ = _run(root, site, example, every_second)
    now, then = given[path].movedim(axis, 0), seen.movedim(axis, 0)
    if not same(now[1::2], then[1::2]):
        return f"{path} reads the channels mixed with one another"
    silent = now[::2].flatten(1)
    if not silent.any():
        return path, ""
    if not same(silent, silent[:, :1].expand_as(silent)):
        return f"{path} reads the channels in one with something else"
    return path, f"a channel that is zero is not zero where {path} reads it"


def _run(
    root: nn.Module, site: Site, example: Example, change: Change, hold: tuple[str, torch.Tensor] | None = None
) -> tuple[list[str], dict[str, torch.Tensor], torch.Tensor | None]:
    """(the site and the layers in the order in which they ran, what they were given, what the network returns).

    What the site's module returns is changed, and one layer may be held: it is given another tensor than it would be.
    """
    order: list[str] = []
    given: dict[str, torch.Tensor] = {}

    def at_site(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        order.append(site.module)
        return change(output)

    def at(path: str) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            order.append(path)
            # Only the layer that runs next is of interest, and a network may have many.
            if order[-2:-1] == [site.module]:
                given[path] = args[0].detach().clone()
            return (hold[1], *args[1:]) if hold is not None and path == hold[0] else None

        return before

    handles = [root.get_submodule(site.module).register_forward_hook(at_site)]
    for path, module in root.named_modules():
        if path != site.module and (is_convolution(module) or linear_shape(module)):
            handles.append(module.register_forward_pre_hook(at(path)))
    try:
        return order, given, first_tensor(run(root, example))
    finally:
        for handle in handles:
            handle.remove()
