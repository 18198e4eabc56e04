"""Find the sites of a network by looking at its modules: no table of architectures.

A *stack* is a list of blocks (see `block.py`). In a network without stacks, each linear layer that follows
another one of fitting width reads neurons. Convolutions and recurrent layers are found wherever they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from patchclamp.model.block import BlockParts, block_parts
from patchclamp.model.example import Example
from patchclamp.model.experts import expert_sites
from patchclamp.model.modules import activation_name, is_attention, is_convolution, linear_shape
from patchclamp.model.recurrent import recurrent_sites
from patchclamp.model.site import Site


@dataclass
class Inspection:
    """The sites that were found, why others were not, what is to be said of some, and what the network was tried on."""

    sites: dict[str, Site] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    example: Example | None = None
    stacks: list[Stack] = field(default_factory=list)

    def drop(self, stack: Stack, kind: str, layers: list[int], why: str) -> None:
        """Take the sites of a kind off some layers, and say why."""
        for layer in layers:
            for name in [
                name for name in self.sites if re.fullmatch(f"{kind}\\.{layer}(\\..*)?", _unprefixed(name, stack))
            ]:
                del self.sites[name]
        self.explain(stack, kind, layers, why)

    def explain(self, stack: Stack, kind: str, layers: list[int], why: str) -> None:
        """Say why some layers of a stack have no site of a kind."""
        if sorted(layers) == sorted(stack.layers):
            self.unlisted[f"{stack.prefix}{kind}.*"] = why
        else:
            self.unlisted |= {f"{stack.prefix}{kind}.{layer}": why for layer in layers}


@dataclass
class Stack:
    """A list of blocks. Each of `layers` has its parts, as paths relative to the block.

    Attributes:
        sharing: id of a module that stands in several layers -> these layers.
    """

    name: str
    path: str
    layers: dict[int, BlockParts]
    sharing: dict[int, list[int]] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """What the names of its sites begin with: `encoder.`, or nothing."""
        return f"{self.name}." if self.name else ""

    def block(self, layer: int) -> str:
        """Dotted path of one block."""
        return f"{self.path}.{layer}" if self.path else str(layer)

    def alike(self) -> list[list[int]]:
        """The layers, grouped by how they are built; those that share a module are by themselves."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for layer, parts in self.layers.items():
            shares = [layers for layers in self.sharing.values() if layer in layers]
            groups.setdefault((parts.paths, str(shares)), []).append(layer)
        return list(groups.values())


def inspect(root: nn.Module) -> Inspection:
    """Find the sites of `root` without running it. `probe` then settles what only a forward pass can say."""
    found = Inspection()
    found.stacks = _name_stacks(list(_stacks(root)))
    for site in (*recurrent_sites(root), *_convolution_sites(root, found)):
        found.sites[site.name] = site
    for stack in found.stacks:
        for layer, parts in stack.layers.items():
            for site in _sites_of_block(root, stack, layer, parts):
                found.sites[site.name] = site
        for layer in sorted(set(range(len(_children(root, stack)))) - set(stack.layers)):
            found.unlisted[f"{stack.prefix}*.{layer}"] = f"{stack.block(layer)} has no MLP, experts or mixer"
        for kind in dict.fromkeys(kind for parts in stack.layers.values() for kind in parts.unlisted):
            reasons: dict[str, list[int]] = {}
            for layer, parts in stack.layers.items():
                if kind in parts.unlisted:
                    reasons.setdefault(parts.unlisted[kind], []).append(layer)
            for why, layers in reasons.items():
                found.explain(stack, kind, layers, why)
    # The heads of a transformer whose blocks are of another kind are no pairs of layers, nor are those of a loop.
    attends = any(path and is_attention(module) for path, module in root.named_modules())
    if not found.stacks and not attends and not any(site.time for site in found.sites.values()):
        for site in _plain_sites(root):
            found.sites[site.name] = site
    if not found.stacks and not any(site.kind == "mlp" for site in found.sites.values()):
        found.unlisted["mlp.*"] = (
            "looked for a list of blocks, each with a projection d -> n and later one n -> d, "
            "and for two linear layers of fitting width one after the other: found neither"
        )
    return found


def drop_shared(root: nn.Module, found: Inspection) -> None:
    """Drop the sites of modules that stand in several layers: a hook on such a module sees the calls of all."""
    for stack in found.stacks:
        shared: dict[tuple[str, tuple[int, ...]], str] = {}
        for name, site in found.sites.items():
            if site.stack == stack.name and site.layer in stack.layers:
                layers = stack.sharing.get(id(root.get_submodule(site.module)), [])
                if layers:
                    shared[name.removeprefix(stack.prefix).partition(".")[0], tuple(layers)] = site.module
        for (kind, layers), path in shared.items():
            which = " and ".join(map(str, layers))
            why = f"layers {which} share {path}: a call of it does not say which is meant"
            found.drop(stack, kind, list(layers), why)


# Stacks and blocks ----------------------------------------------------------------------------------


def _stacks(root: nn.Module) -> Iterator[Stack]:
    candidates = []
    for path, module in root.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        if re.search(r"(^|\.)\w*experts?$", path):
            continue  # each expert is an MLP, but they are beside each other, not one after the other
        parts = [block_parts(child) for child in module]
        # Blocks are of one class, but for hybrids, all of whose blocks are blocks.
        one_class = len({type(child) for child in module}) == 1
        if any(parts) if one_class else all(parts) and isinstance(module, nn.ModuleList):
            layers = {layer: part for layer, part in enumerate(parts) if part}
            candidates.append(Stack("", path, layers, _sharing(module, layers)))
    for stack in candidates:
        # The innermost list holds the blocks; an outer one (the stages of a vision model) holds lists.
        inner = stack.path + "." if stack.path else ""
        if not any(other.path.startswith(inner) and other is not stack for other in candidates):
            yield stack


def _sharing(blocks: nn.ModuleList | nn.Sequential, layers: Iterable[int]) -> dict[int, list[int]]:
    standing: dict[int, list[int]] = {}
    for layer in layers:
        for module in blocks[layer].modules():
            standing.setdefault(id(module), []).append(layer)
    return {module: layers for module, layers in standing.items() if len(layers) > 1}


def _name_stacks(stacks: list[Stack]) -> list[Stack]:
    if len(stacks) > 1:
        paths = [stack.path.split(".") for stack in stacks]
        for stack, path in zip(stacks, paths, strict=True):
            others = [other for other in paths if other is not path]
            for number, part in enumerate(path):
                if all(len(other) <= number or other[number] != part for other in others):
                    # A bare number is named after the list that it counts.
                    named = f"{path[number - 1]}_{part}" if part.isdigit() and number else part
                    stack.name = re.sub(r"_(model|tower|stack)$", "", named)
                    break
            else:
                stack.name = "_".join(path)
    return stacks


def _sites_of_block(root: nn.Module, stack: Stack, layer: int, parts: BlockParts) -> Iterator[Site]:
    base, block = stack.block(layer), root.get_submodule(stack.block(layer))
    common: dict[str, Any] = {"layer": layer, "stack": stack.name}
    # A block with convolutions passes channels first; inside, an MLP may put them last.
    convolution = next(filter(is_convolution, block.modules()), None)
    axis = -1 if convolution is None or parts.mixer or parts.attention else _channel_axis(convolution)
    residual: dict[str, Any] = {"size": parts.width, "module": base, "axis": axis, **common}
    yield Site(f"{stack.prefix}resid_pre.{layer}", "resid_pre", **residual)
    for kind, path in parts.attending.items():
        yield from _attention_sites(block, stack, layer, kind, path, parts)
    if parts.mixer:
        yield from _projected(block, stack, layer, "mixer", parts.mixer, {})
    if parts.experts:
        module = block.get_submodule(parts.experts)
        activation = next(filter(None, map(activation_name, module.children())), None)
        path = f"{base}.{parts.experts}"
        yield from expert_sites(path, module, stack.prefix, layer, stack.name, activation)
    if parts.output:
        yield from _mlp_sites(block, stack, layer, parts)
    yield Site(f"{stack.prefix}resid_post.{layer}", "resid_post", tensor="output", **residual)


def _mlp_sites(block: nn.Module, stack: Stack, layer: int, parts: BlockParts) -> Iterator[Site]:
    base = stack.block(layer)
    activation = activation_name(block.get_submodule(parts.activation)) if parts.activation else None
    reads = {role: f"{base}.{path}" for role, path in parts.inputs.items()}
    mlp = next(_projected(block, stack, layer, "mlp", parts.output, reads))
    if "gate" in parts.inputs and parts.activation:
        yield Site(
            f"{stack.prefix}gate.{layer}",
            "gate",
            layer,
            mlp.size,
            activation,
            stack.name,
            module=f"{base}.{parts.activation}",
            tensor="output",
            reads={"gate": reads["gate"]},
        )
    yield replace(mlp, activation=activation)


def _attention_sites(
    block: nn.Module, stack: Stack, layer: int, kind: str, path: str, parts: BlockParts
) -> Iterator[Site]:
    module = block.get_submodule(path)
    heads = _head_count(module)
    if kind in parts.attention:
        attn = next(_projected(block, stack, layer, kind, parts.attention[kind], {}))
        yield replace(attn, kind="attn", heads=heads if heads and (attn.size or 0) % heads == 0 else None)
    pattern = kind.replace("attn", "pattern")
    if heads and pattern not in parts.unlisted:
        yield Site(
            f"{stack.prefix}{pattern}.{layer}",
            "pattern",
            layer,
            heads,
            stack=stack.name,
            module=f"{stack.block(layer)}.{path}",
            tensor="output",
            axis=1,
            through="attention",
        )


def _projected(
    block: nn.Module, stack: Stack, layer: int, kind: str, path: str, reads: dict[str, str]
) -> Iterator[Site]:
    """The site of what enters a projection."""
    size, _ = linear_shape(block.get_submodule(path)) or (None, 0)
    module = f"{stack.block(layer)}.{path}"
    yield Site(
        f"{stack.prefix}{kind}.{layer}", kind, layer, size, stack=stack.name, module=module, reads=reads, writes=module
    )


def _head_count(attention: nn.Module) -> int | None:
    for module in attention.modules():
        for holder in (module, getattr(module, "config", None)):
            for name in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
                number = getattr(holder, name, None)
                if isinstance(number, int) and number > 0:
                    return number
    return None


def _children(root: nn.Module, stack: Stack) -> nn.ModuleList | nn.Sequential:
    return cast(nn.ModuleList, root.get_submodule(stack.path))


def _unprefixed(name: str, stack: Stack) -> str:
    return name.removeprefix(stack.prefix) if name.startswith(stack.prefix) else ""


# Convolutions, and networks without blocks ------------------------------------------------------------


def _convolution_sites(root: nn.Module, found: Inspection) -> Iterator[Site]:
    """The output channels of each convolution; `probe` moves a site behind the channel's own norm and nonlinearity."""
    mixers = [
        f"{stack.block(layer)}.{parts.mixer.rpartition('.')[0]}."
        for stack in found.stacks
        for layer, parts in stack.layers.items()
        if parts.mixer
    ]
    for path, module in root.named_modules():
        if not is_convolution(module) or any(path.startswith(mixer) for mixer in mixers):
            continue
        name = f"conv.{path}" if path else "conv"
        yield Site(
            name,
            "conv",
            None,
            cast(int, module.out_channels),
            module=path,
            tensor="output",
            axis=_channel_axis(module),
            reads={"in": path},
        )


def _channel_axis(module: nn.Module) -> int:
    """-3 for images: counted from the end, it is right without a dimension of examples too."""
    return -1 - len(cast(nn.Conv2d, module).kernel_size)


def _plain_sites(root: nn.Module) -> Iterator[Site]:
    previous: tuple[str, tuple[int, int]] | None = None
    activation: str | None = None
    layer = 0
    for path, module in root.named_modules():
        if name := activation_name(module):
            activation = name
        shape = linear_shape(module)
        if shape is None or not path:
            continue
        if previous is not None and previous[1][1] == shape[0]:
            yield Site(
                f"mlp.{layer}",
                "mlp",
                layer,
                shape[0],
                activation,
                module=path,
                reads={"in": previous[0]},
                writes=path,
            )
            layer += 1
        previous, activation = (path, shape), None
