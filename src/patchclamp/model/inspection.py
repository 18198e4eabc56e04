"""Find the sites of a network by looking at its modules: no table of architectures.

A *stack* is a list of blocks of one class, each holding a feed-forward pair: a projection `d -> n`
and, after it, one `n -> d`. Whatever enters the second is the neurons. What lies inside an attention
module is not part of the pair; the last projection to `d` there is the attention output projection.
In a network without stacks, each linear layer that follows another one of fitting width reads neurons.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from patchclamp.model.site import Site


@dataclass
class Inspection:
    """The sites that were found, and why others were not."""

    sites: dict[str, Site] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    stacks: list[Stack] = field(default_factory=list)


@dataclass
class Stack:
    """A list of blocks of one class. `parts` are paths relative to a block."""

    name: str
    path: str
    layers: list[int]  # the blocks that are built like the first
    parts: BlockParts

    def block(self, layer: int) -> str:
        """Dotted path of one block."""
        return f"{self.path}.{layer}" if self.path else str(layer)


@dataclass
class BlockParts:
    """Paths, relative to the block, of what the inspection recognised."""

    output: str
    inputs: dict[str, str]
    size: int
    fused: bool = False
    activation: str | None = None
    attention: dict[str, str] = field(default_factory=dict)  # attn, cross_attn -> output projection
    attending: dict[str, str] = field(default_factory=dict)  # attn, cross_attn -> the whole module
    unlisted: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> tuple:
        """What two blocks that are built alike share."""
        return self.output, self.inputs, self.activation, self.attention


def inspect(root: nn.Module) -> Inspection:
    """Find the sites of `root` without running it. Residual sites in the middle of a block need `probe`."""
    found = Inspection()
    found.stacks = _name_stacks(list(_stacks(root)))
    for stack in found.stacks:
        for layer in stack.layers:
            for site in _sites_of_block(root, stack, layer):
                found.sites[site.name] = site
        for layer in sorted(set(range(len(_children(root, stack)))) - set(stack.layers)):
            found.unlisted[f"{_prefix(stack)}*.{layer}"] = f"{stack.block(layer)} is built unlike {stack.block(0)}"
        for kind, why in stack.parts.unlisted.items():
            found.unlisted[f"{_prefix(stack)}{kind}.*"] = why
    # The heads of a transformer whose blocks are of another kind are no pairs of layers.
    if not found.stacks and not _attention_modules(root):
        for site in _plain_sites(root):
            found.sites[site.name] = site
    if not found.sites:
        found.unlisted["mlp.*"] = (
            "looked for a list of blocks of one class, each with a projection d -> n and later one n -> d, "
            "and for two linear layers of fitting width one after the other: found neither"
        )
    return found


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer (`nn.Linear`, its subclasses, Hugging Face's `Conv1D`), else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight"):
        return int(module.weight.shape[0]), int(module.weight.shape[1])  # type: ignore[union-attr,index]
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: by its class name, as every library writes its own RMSNorm."""
    return "norm" in type(module).__name__.lower()


def activation_name(module: nn.Module) -> str | None:
    """`gelu`, `relu`, `silu`, ... if the module is a nonlinearity, else None."""
    name = type(module).__name__
    if type(module).__module__ == "transformers.activations":
        return _TRANSFORMERS_ACTIVATIONS.get(name, name.removesuffix("Activation").lower())
    if type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
    ):
        return "gelu_new" if isinstance(module, nn.GELU) and module.approximate == "tanh" else name.lower()
    return None


_TRANSFORMERS_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "PytorchGELUTanh": "gelu_new",
    "GELUTanh": "gelu_new",
    "FastGELUActivation": "gelu_fast",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
}


# Stacks and blocks ----------------------------------------------------------------------------------


def _stacks(root: nn.Module) -> Iterator[Stack]:
    candidates = []
    for path, module in root.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        if len({type(child) for child in module}) != 1:
            continue
        parts = [_block_parts(child) for child in module]
        if parts[0] is not None:
            alike = [layer for layer, part in enumerate(parts) if part and part.paths == parts[0].paths]
            candidates.append(Stack("", path, alike, parts[0]))
    for stack in candidates:
        # The innermost list holds the blocks; an outer one (the stages of a vision model) holds lists.
        inner = stack.path + "." if stack.path else ""
        if not any(other.path.startswith(inner) and other is not stack for other in candidates):
            yield stack


def _block_parts(block: nn.Module) -> BlockParts | None:
    attention = _attention_modules(block)
    inside = tuple(path + "." for path in attention)
    linears = [
        (path, shape)
        for path, module in block.named_modules()
        if path and path not in attention and not path.startswith(inside) and (shape := linear_shape(module))
    ]
    widths = _residual_widths(block, inside)
    pairs = []
    for output, (size, width) in linears:
        inputs = _feeding(linears, output, (width, size))
        fused = _feeding(linears, output, (width, 2 * size))
        if (inputs or fused) and (not widths or width in widths):
            pairs.append((output, inputs[-2:], fused[-1:], size, width))
    if not pairs:
        return None
    # A gated pair has two projections in and one out; else the last pair of the block is the MLP.
    output, inputs, fused, size, width = max(reversed(pairs), key=lambda pair: len(pair[1]))
    parts = _parts(block, output, inputs, fused, size)
    _add_attention(block, attention, parts, width)
    return parts


def _feeding(linears: list[tuple[str, tuple[int, int]]], output: str, shape: tuple[int, int]) -> list[str]:
    """Projections of that shape before `output`, or beside it: Meta's Llama has its `w3` after `w2`."""
    position = [path for path, _ in linears].index(output)
    parent = output.rpartition(".")[0]
    return [
        path
        for number, (path, each) in enumerate(linears)
        if each == shape
        and (number < position or (shape[0] != shape[1] and number > position and path.rpartition(".")[0] == parent))
    ]


def _residual_widths(block: nn.Module, inside_attention: tuple[str, ...]) -> set[int]:
    """What the block's norms normalise, which tells `d -> n` from `n -> d` where it is known."""
    widths = set()
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        outside = is_norm(module) and not path.startswith(inside_attention)
        if outside and isinstance(weight, torch.Tensor) and weight.ndim == 1:
            widths.add(weight.shape[0])
    return widths


def _parts(block: nn.Module, output: str, inputs: list[str], fused: list[str], size: int) -> BlockParts:
    parts = BlockParts(output, {}, size)
    nonlinearities = {
        path: module
        for path, module in block.named_modules()
        if activation_name(module) and not re.search(r"attn|attention", path, re.IGNORECASE)
    }
    if len(nonlinearities) == 1:
        parts.activation = next(iter(nonlinearities))
    if not inputs:
        parts.inputs, parts.fused = {"gate_up": fused[0]}, True
        parts.unlisted["gate"] = f"gate and up are one fused projection ({fused[0]})"
    elif len(inputs) == 1:
        parts.inputs = {"in": inputs[0]}
        parts.unlisted["gate"] = "the MLP has no gate: one projection feeds its neurons"
    else:
        gates = [path for path in inputs if _GATE.search(path.rsplit(".", 1)[-1])]
        if len(gates) == 1:
            up = next(path for path in inputs if path != gates[0])
            parts.inputs = {"gate": gates[0], "up": up}
            if parts.activation is None:
                parts.unlisted["gate"] = "no single module computes the gate's nonlinearity"
        else:
            parts.inputs = {f"in_{number}": path for number, path in enumerate(inputs)}
            parts.unlisted["gate"] = f"cannot tell which of {inputs[0]} and {inputs[1]} is the gate"
    return parts


_GATE = re.compile(r"gate|^wi_0$|^w1$", re.IGNORECASE)


def _attention_modules(block: nn.Module) -> list[str]:
    found: list[str] = []
    for path, module in block.named_modules():
        inside = any(path.startswith(outer + ".") for outer in found)
        named = re.search(r"attention|attn", type(module).__name__, re.IGNORECASE)
        if path and named and not inside and not is_norm(module):
            found.append(path)
    return found


def _add_attention(block: nn.Module, attention: list[str], parts: BlockParts, width: int) -> None:
    for path in attention:
        module = block.get_submodule(path)
        cross = bool(re.search(r"cross|enc_?dec|encoder_attn", f"{path} {type(module).__name__}", re.IGNORECASE))
        kind = "cross_attn" if cross else "attn"
        if any(isinstance(each, nn.MultiheadAttention) for each in module.modules()):
            parts.unlisted[kind] = "nn.MultiheadAttention never calls its output projection as a module"
            continue
        shapes = {name: linear_shape(each) for name, each in module.named_modules()}
        linears = [name for name, shape in shapes.items() if shape and shape[1] == width]
        if not linears or kind in parts.attention:
            parts.unlisted[kind] = f"{path} has no output projection" if not linears else f"two modules: {path}"
            continue
        parts.attention[kind] = f"{path}.{linears[-1]}"
        parts.attending[kind] = path


def _head_count(attention: nn.Module) -> int | None:
    for module in attention.modules():
        for holder in (module, getattr(module, "config", None)):
            for name in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
                number = getattr(holder, name, None)
                if isinstance(number, int) and number > 0:
                    return number
    return None


def _sites_of_block(root: nn.Module, stack: Stack, layer: int) -> Iterator[Site]:
    base, parts = stack.block(layer), stack.parts
    prefix, block = _prefix(stack), root.get_submodule(base)
    output = block.get_submodule(parts.output)
    size, width = linear_shape(output) or (parts.size, 0)
    activation = activation_name(block.get_submodule(parts.activation)) if parts.activation else None
    common = {"layer": layer, "stack": stack.name}
    yield Site(f"{prefix}resid_pre.{layer}", "resid_pre", size=width, module=base, **common)
    for kind, path in parts.attention.items():
        inputs, _ = linear_shape(block.get_submodule(path)) or (0, 0)
        heads = _head_count(block.get_submodule(parts.attending[kind]))
        yield Site(
            f"{prefix}{kind}.{layer}",
            "attn",
            size=inputs,
            module=f"{base}.{path}",
            writes=f"{base}.{path}",
            heads=heads if heads and inputs % heads == 0 else None,
            **common,
        )
    if "gate" in parts.inputs and parts.activation:
        yield Site(
            f"{prefix}gate.{layer}",
            "gate",
            size=size,
            activation=activation,
            module=f"{base}.{parts.activation}",
            tensor="output",
            reads={"gate": f"{base}.{parts.inputs['gate']}"},
            **common,
        )
    yield Site(
        f"{prefix}mlp.{layer}",
        "mlp",
        size=size,
        activation=activation,
        module=f"{base}.{parts.output}",
        reads={role: f"{base}.{path}" for role, path in parts.inputs.items()},
        writes=f"{base}.{parts.output}",
        **common,
    )
    yield Site(f"{prefix}resid_post.{layer}", "resid_post", size=width, module=base, tensor="output", **common)


def _name_stacks(stacks: list[Stack]) -> list[Stack]:
    if len(stacks) > 1:
        paths = [stack.path.split(".") for stack in stacks]
        for stack, path in zip(stacks, paths, strict=True):
            others = [other for other in paths if other is not path]
            for part_number, part in enumerate(path):
                if all(len(other) <= part_number or other[part_number] != part for other in others):
                    stack.name = re.sub(r"_(model|tower|stack)$", "", part)
                    break
            else:
                stack.name = "_".join(path)
    return stacks


def _children(root: nn.Module, stack: Stack) -> nn.ModuleList | nn.Sequential:
    return cast(nn.ModuleList, root.get_submodule(stack.path))


def _prefix(stack: Stack) -> str:
    return f"{stack.name}." if stack.name else ""


# Networks without blocks ----------------------------------------------------------------------------


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
