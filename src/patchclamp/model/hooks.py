"""Read and write the tensor of a site while the network runs, by PyTorch's own module hooks.

Nothing is copied or replaced: a hook is registered on the module, and removed when its block ends,
however it ends.
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
from patchclamp.model.site import Site

Edit = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def reading(root: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect the tensor of each site at each call of its module: name -> list of tensors, newest last.

    The caller empties the lists. What enters a projection is the very tensor that flows on; others are
    copied, as the network may go on writing into them (`x += ...`, `ReLU(inplace=True)`).
    """
    captured: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}

    def keep(site: Site) -> Edit:
        def observe(tensor: torch.Tensor) -> torch.Tensor:
            captured[site.name].append(tensor if site.kind in ("mlp", "attn") else tensor.clone())
            return tensor

        return observe

    with hooked(root, [(site, keep(site)) for site in sites]):
        yield captured


@contextmanager
def hooked(root: nn.Module, edits: Sequence[tuple[Site, Edit]]) -> Iterator[None]:
    """While the block runs, the tensor of each site passes through its function. Hooks on one site act in order."""
    with ExitStack() as stack:
        for site, edit in edits:
            handle = _register(root, site, edit)
            stack.callback(handle.remove)
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


def _register(root: nn.Module, site: Site, edit: Edit) -> RemovableHandle:
    module = root.get_submodule(site.module)
    if site.tensor == "input":

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            old = input_tensor(args, kwargs)
            if old is None:
                raise ModelError(f"{site.name}: the module {site.module} was called without a tensor")
            new = edit(old)
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
        new = edit(old)
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
