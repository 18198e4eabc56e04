"""Read and write the tensors of sites while the network runs.

Nothing is copied or patched for good: what is put onto the user's modules is taken off when its block ends, however
it ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from patchclamp.errors import ModelError
from patchclamp.model import attention, experts, recurrent
from patchclamp.model.plainly import plainly
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap

Edit = Callable[[torch.Tensor], torch.Tensor]

_OTHER_WAYS = {"attention": attention.tapped, "experts": experts.tapped, "recurrent": recurrent.tapped}
# What enters a projection is the very tensor that flows on, and nobody writes into it.
_ENTERING = ("mlp", "attn", "mixer")


@contextmanager
def reading(root: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, list[Seen]]]:
    """Collect what each call shows of each site: name -> list, newest last, neurons on the last axis.

    The caller empties the lists. What enters a projection is the very tensor that flows on; others are
    copied, as the network may go on writing into them (`x += ...`, `ReLU(inplace=True)`).
    """
    captured: dict[str, list[Seen]] = {site.name: [] for site in sites}

    def keep(site: Site) -> Tap:
        def see(seen: Seen) -> torch.Tensor:
            captured[site.name].append(kept(site, seen))
            return seen.tensor

        return Tap(site, see, writes=False)

    with tapped(root, [keep(site) for site in sites]):
        yield captured


def kept(site: Site, seen: Seen) -> Seen:
    """What a site shows, to be kept while the network goes on: a copy, where it may write into the tensor."""
    shared = site.through == "module" and site.kind not in _ENTERING
    return seen._replace(tensor=seen.tensor.clone()) if shared else seen


@contextmanager
def hooked(root: nn.Module, edits: Sequence[tuple[Site, Edit]]) -> Iterator[None]:
    """While the block runs, the tensor of each site `[..., size]` passes through its function, in this order.

    Raises:
        ModelError: a site that can only be read.
    """

    def tap(site: Site, edit: Edit) -> Tap:
        return Tap(site, lambda seen: edit(seen.tensor))

    with writing(root, [tap(site, edit) for site, edit in edits]):
        yield


@contextmanager
def writing(root: nn.Module, taps: Sequence[Tap]) -> Iterator[None]:
    """While the block runs, the taps change their sites, in this order.

    Raises:
        ModelError: a site that can only be read.
    """
    for tap in taps:
        if tap.site.fixed:
            raise ModelError(f"{tap.site.name} can be read but not written: {tap.site.fixed}")
    with tapped(root, taps):
        yield


@contextmanager
def tapped(root: nn.Module, taps: Sequence[Tap]) -> Iterator[None]:
    """While the block runs, every tap sees its site; those of one site in the order given."""
    with ExitStack() as stack:
        if taps:
            # Tapped experts compute in another way than a second forward pass after the block would.
            once = any(tap.writes or tap.site.through == "experts" for tap in taps)
            stack.enter_context(plainly(root, writes=once))
        for tap in taps:
            if tap.site.through == "module":
                stack.callback(_register(root, tap).remove)
        for way, tapped_there in _OTHER_WAYS.items():
            if there := [tap for tap in taps if tap.site.through == way]:
                stack.enter_context(tapped_there(root, there))
        yield


def input_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The hidden states among the arguments of a module: the first tensor, or the keyword of that name."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return kwargs["hidden_states"]
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The hidden states in what a module returns: the tensor itself, or the first one of a tuple or mapping."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((each for each in values if isinstance(each, torch.Tensor)), None)


def seen_by(tap: Tap, tensor: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """What a tap makes of a tensor whose neurons lie along the site's axis; the same object if it changes nothing."""
    axis = tap.site.axis
    if not -tensor.ndim <= axis < tensor.ndim:
        raise ModelError(f"{tap.site.name}: its tensor {list(tensor.shape)} has no axis {axis}")
    given = tensor if axis == -1 else tensor.movedim(axis, -1)
    new = tap.see(Seen(given, place))
    if new is given:
        return tensor
    return new if axis == -1 else new.movedim(-1, axis)


def _register(root: nn.Module, tap: Tap) -> RemovableHandle:
    site = tap.site
    module = root.get_submodule(site.module)
    if site.tensor == "input":

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            old = input_tensor(args, kwargs)
            if old is None:
                raise ModelError(f"{site.name}: the module {site.module} was called without a tensor")
            new = seen_by(tap, old)
            if new is old:
                return None
            if site.in_place:
                old.copy_(new)
                return None
            return _replaced_in_call(args, kwargs, old, new)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        old = first_tensor(output)
        if old is None:
            raise ModelError(f"{site.name}: the module {site.module} returned no tensor, but {type(output).__name__}")
        new = seen_by(tap, old)
        return None if new is old else _replaced_in_output(output, old, new)

    return module.register_forward_hook(after)


def _replaced_in_call(args: tuple, kwargs: dict, old: torch.Tensor, new: torch.Tensor) -> tuple[tuple, dict]:
    return (
        tuple(new if each is old else each for each in args),
        {name: new if each is old else each for name, each in kwargs.items()},
    )


def _replaced_in_output(output: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return new
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        for name, each in output.items():
            if each is old:
                changed[name] = new
                break
        return changed
    values = [new if each is old else each for each in output]
    if hasattr(output, "_fields"):
        return type(output)(*values)
    return type(output)(values)
