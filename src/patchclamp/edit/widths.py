"""Which setting of a configuration says how many neurons there are: found by building the network without memory.

A Hugging Face network is built from its configuration, so a network with fewer neurons can only be loaded where a
setting says so. Each whole number in the configuration that is the width of neurons is changed, the network is built
on the device "meta", and the parameters that come out in another shape tell whose width it was.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# GPT-2 has `n_inner: null`, for four times the width of the residual stream.
_UNSAID = re.compile(r"inner|intermediate|ffn|feed_?forward|d_ff|mlp", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """A setting that says how many neurons some sites have.

    Attributes:
        path: `n_inner`, `text_config.intermediate_size`.
        sites: names of these sites.
    """

    path: str
    sites: tuple[str, ...]


def is_configured(root: nn.Module) -> bool:
    """Whether a network is built from a configuration, and saved with one."""
    return hasattr(root, "save_pretrained") and hasattr(getattr(root, "config", None), "to_dict")


def settings_of(root: nn.Module, sizes: Mapping[str, int], slices: Mapping[str, frozenset[str]]) -> list[Setting]:
    """The settings that say how many neurons sites have.

    Args:
        root: the network.
        sizes: name of a site -> how many neurons it has.
        slices: name of a site -> names of all parameters with numbers for each of its neurons.
    """
    usual = built(root, {})
    found: list[Setting] = []
    for path, value in _numbers(root.config, set(sizes.values())) if usual is not None else ():
        size = value if value is not None else max(sizes.values())
        other = built(root, {path: size - 1})
        if usual is None or other is None or shapes(other).keys() != shapes(usual).keys():
            continue
        before = shapes(usual)
        changed = {name for name, shape in shapes(other).items() if shape != before[name]}
        sites = tuple(site for site, names in slices.items() if names <= changed)
        # A setting that changes more than these parameters is of something else too.
        if sites and changed <= frozenset().union(*(slices[site] for site in sites)):
            found.append(Setting(path, sites))
    return found


def built(root: nn.Module, settings: Mapping[str, Any]) -> nn.Module | None:
    """A network of this class and configuration with other settings, without memory; None if it cannot be built."""
    config: Any = copy.deepcopy(root.config)
    for path, value in settings.items():
        holder, name = _holder(config, path)
        setattr(holder, name, value)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return type(root)(config)
    except Exception:  # whatever a foreign class raises at a number that it cannot be built with
        return None


def shapes(root: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all parameters and buffers."""
    return {name: tuple(each.shape) for name, each in (*root.named_parameters(), *root.named_buffers())}


def take_over_numbers(root: nn.Module, other: nn.Module) -> None:
    """Give modules the whole numbers that those of the same path have in another network: their widths."""
    own = dict(root.named_modules())
    for path, module in other.named_modules():
        for name, value in vars(module).items():
            here = vars(own[path]).get(name) if path in own else None
            if type(value) is int and type(here) is int and here != value:
                setattr(own[path], name, value)


# Helpers ------------------------------------------------------------------------------------------------


def _numbers(config: Any, sizes: set[int], prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Settings that may be one of these widths, by path."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            yield from _numbers(value, sizes, f"{prefix}{name}.")
        elif (type(value) is int and value in sizes) or (value is None and _UNSAID.search(name)):
            yield prefix + name, value


def _holder(config: Any, path: str) -> tuple[Any, str]:
    *parts, name = path.split(".")
    for part in parts:
        config = getattr(config, part)
    return config, name
