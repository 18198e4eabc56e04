"""Edits of some rows by plain PyTorch hooks: what interventions at positions are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from patchclamp.model.site import Site

Edit = Callable[[torch.Tensor], torch.Tensor]


def clamped(indices: Sequence[int], value: float) -> Edit:
    """Neurons, on the last axis, held at a value."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[..., list(indices)] = value
        return changed

    return edit


def numbered(mask: torch.Tensor) -> list[list[int]]:
    """For each row of a mask `[examples, columns]`, the columns of its tokens in order."""
    return [[column for column, real in enumerate(row) if real] for row in mask.tolist()]


def chosen(
    mask: torch.Tensor, positions: Sequence[int] | None = None, examples: Sequence[int] | None = None
) -> torch.Tensor:
    """`[examples, columns]` bool, written out token by token: these positions of each text, in these examples."""
    wanted = torch.zeros(mask.shape, dtype=torch.bool)
    for row, columns in enumerate(numbered(mask)):
        if examples is not None and row not in examples:
            continue
        if positions is None:
            wanted[row] = True
        for position in positions or ():
            wanted[row, columns[position]] = True
    return wanted


@contextmanager
def changing(
    module: nn.Module, changes: Mapping[Site, Edit], rows: Callable[[Site], torch.Tensor]
) -> Iterator[dict[str, int]]:
    """While the block runs, plain hooks edit the rows `[examples, positions]` of each site; counts the calls."""
    calls: dict[str, int] = {}

    def edited(site: Site, edit: Edit, tensor: torch.Tensor) -> torch.Tensor:
        calls[site.name] = calls.get(site.name, 0) + 1
        given = tensor.movedim(site.axis, -1)
        where = rows(site)
        if given.ndim == 2 and where.shape[1] > 1:  # the tokens of all examples one after the other
            where = where.flatten()
        elif where.shape[1] == 1:
            where = where[:, 0]
        new = given.clone()
        new[where] = edit(given[where])
        if site.in_place:
            given.copy_(new)
            return tensor
        return new.movedim(-1, site.axis)

    def before(site: Site, edit: Edit) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if args:
                return (edited(site, edit, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": edited(site, edit, kwargs["hidden_states"])}

        return hook

    def after(site: Site, edit: Edit) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return edited(site, edit, output)
            if isinstance(output, tuple):
                return (edited(site, edit, output[0]), *output[1:])
            output[next(iter(output))] = edited(site, edit, next(iter(output.values())))
            return output

        return hook

    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no module
        for site, edit in changes.items():
            target = module.get_submodule(site.module)
            if site.through == "experts":
                handle = target.register_forward_hook(_of_expert(site, edit, rows, calls))
            elif site.tensor == "input":
                handle = target.register_forward_pre_hook(before(site, edit), with_kwargs=True)
            else:
                handle = target.register_forward_hook(after(site, edit))
            stack.callback(handle.remove)
        yield calls


def _of_expert(site: Site, edit: Edit, rows: Callable[[Site], torch.Tensor], calls: dict[str, int]) -> Callable:
    """Adds what another activation of an expert's neurons changes in the sum over experts."""

    def hook(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        calls[site.name] = calls.get(site.name, 0) + 1
        hidden, index, weights = args
        where = rows(site).flatten()
        gate, up = nn.functional.linear(hidden, module.gate_up_proj[site.unit]).chunk(2, dim=-1)
        activations = module.act_fn(gate) * up
        changed = nn.functional.linear(edit(activations) - activations, module.down_proj[site.unit])
        share = ((index == site.unit) * weights).sum(-1) * where
        return output + share[:, None].to(output.dtype) * changed

    return hook
