"""Where a constant can go: the bias of an output projection, and which flag of a configuration gives it one.

Some architectures leave out biases and can be told to have them (Llama: `mlp_bias`). Which flag that is, is found by
building the network twice without memory, with and without it: all that it may add are biases of linear layers, which
compute the same while they are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from patchclamp.model.slices import join


@dataclass(frozen=True)
class Bias:
    """A bias to which a constant can be added.

    Attributes:
        parameter: dotted name of it.
        index: where in it: `(3,)` is that of the fourth expert.
        flag: the flag of the configuration that it needs, `mlp_bias` or `text_config.mlp_bias`; empty where it exists.
        added: with that flag, dotted names of all biases that it adds.
    """

    parameter: str
    index: tuple[int, ...] = ()
    flag: str = ""
    added: tuple[str, ...] = ()


class Biases:
    """The biases of one network."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._flags: list[tuple[str, tuple[str, ...]]] | None = None

    def of_projection(self, path: str) -> Bias | str:
        """The bias of a linear layer, or one that it can be given; or why there is none."""
        name = join(path, "bias")
        if getattr(self.root.get_submodule(path), "bias", None) is not None:
            return Bias(name)
        if self._flags is None:
            self._flags = list(_flags(self.root))
        able = [(flag, added) for flag, added in self._flags if name in added]
        if able:
            flag, added = min(able, key=lambda each: len(each[1]))
            return Bias(name, flag=flag, added=added)
        if not _is_configured(self.root):
            return f"{path} has no bias"
        return f"{path} has no bias, and no flag of {type(self.root.config).__name__} gives it one"

    def of_expert(self, path: str, expert: int) -> Bias | str:
        """That of the second projection of one of several fused experts; or why there is none."""
        module: Any = self.root.get_submodule(path)
        if getattr(module, "has_bias", False) and "down_proj_bias" in module._parameters:
            return Bias(join(path, "down_proj_bias"), (expert,))
        return f"the experts of {path} have no bias"


def _flags(root: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each flag that is off and, switched on, adds biases of linear layers and nothing else; with their names."""
    if not _is_configured(root):
        return
    own = dict(root.named_modules())
    without = _built(root, "")
    for flag in _switched_off(root.config) if without is not None else ():
        having = _built(root, flag)
        if without is None or having is None or having.modules != without.modules:
            continue
        if not without.tensors.items() <= having.tensors.items():
            continue
        # A network may have been built with less than its class builds by itself.
        new = [name.rpartition(".") for name in having.tensors if name not in without.tensors]
        new = [(path, kind) for path, _, kind in new if path in own]
        if new and all(
            kind == "bias" and type(own[path]) is nn.Linear and own[path].bias is None for path, kind in new
        ):
            yield flag, tuple(join(path, kind) for path, kind in new)


def _is_configured(root: nn.Module) -> bool:
    return hasattr(root, "save_pretrained") and hasattr(getattr(root, "config", None), "to_dict")


def _switched_off(config: Any, prefix: str = "") -> Iterator[str]:
    for name, value in vars(config).items():
        if "bias" in name and value in (False, None):
            yield prefix + name
        elif hasattr(value, "to_dict") and not name.startswith("_"):
            yield from _switched_off(value, f"{prefix}{name}.")


class _Built(NamedTuple):
    modules: dict[str, type]
    tensors: dict[str, tuple[int, ...]]  # parameters and buffers -> their shapes


def _built(root: nn.Module, flag: str) -> _Built | None:
    """What a network of this class and configuration consists of, with a flag; None if it cannot be built."""
    config: Any = copy.deepcopy(root.config)
    *parts, name = flag.split(".")
    inner = config
    for part in parts:
        inner = getattr(inner, part)
    if name:
        setattr(inner, name, True)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made: nn.Module = type(root)(config)
    except Exception:  # whatever a foreign class raises when a flag is set that it does not know
        return None
    modules = {path: type(module) for path, module in made.named_modules()}
    tensors = {name: tuple(each.shape) for name, each in (*made.named_parameters(), *made.named_buffers())}
    return _Built(modules, tensors)
