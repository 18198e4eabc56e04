"""What one block of a network is made of: attention, and a feed-forward pair, fused experts or a state-space mixer.

A feed-forward pair is a projection `d -> n` and, after it, one `n -> d`; whatever enters the second is the neurons.
What lies inside an attention module or a mixer is not part of the pair; the last projection to `d` there is its
output projection.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from patchclamp.model.attention import pattern_refusal
from patchclamp.model.experts import experts_refusal, is_fused_experts, resembles_experts
from patchclamp.model.modules import activation_name, is_attention, is_mixer, is_norm, linear_shape

_GATE = re.compile(r"gate|^wi_0$|^w1$", re.IGNORECASE)
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)


@dataclass
class BlockParts:
    """Paths, relative to the block, of what was recognised in it.

    Attributes:
        width: of the residual stream.
        output: the MLP's output projection, `""` where there is no MLP.
        inputs: role -> projection that feeds the MLP: `in`, or `gate` and `up`, or the fused `gate_up`.
        activation: the module that computes the MLP's nonlinearity.
        experts: the module of fused experts.
        branch: the module that returns what the MLP adds to the residual: the output projection, or the
            module that holds experts.
        attention: `attn` or `cross_attn` -> output projection.
        attending: `attn` or `cross_attn` -> the whole attention module.
        mixer: the output projection of the state-space mixer.
        unlisted: kind of site -> why there is none.
    """

    width: int
    output: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    activation: str | None = None
    experts: str = ""
    branch: str = ""
    attention: dict[str, str] = field(default_factory=dict)
    attending: dict[str, str] = field(default_factory=dict)
    mixer: str = ""
    unlisted: dict[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[object, ...]:
        """What two blocks that are built alike share."""
        return (
            self.output,
            tuple(self.inputs.items()),
            self.activation,
            tuple(self.attention.items()),
            tuple(self.attending.items()),
            self.experts,
            self.mixer,
        )


def block_parts(block: nn.Module) -> BlockParts | None:
    """What a block is made of; None if it is none: it has no MLP, no experts and no mixer."""
    attention, mixers = _outermost(block, is_attention), _outermost(block, is_mixer)
    experts = _outermost(block, is_fused_experts)
    inside = tuple(f"{path}." for path in (*attention, *mixers))
    linears = [
        (path, shape)
        for path, module in block.named_modules()
        if path and path not in attention and not path.startswith(inside) and (shape := linear_shape(module))
    ]
    widths = _residual_widths(block, inside)
    parts = _mlp(block, linears, widths)
    if parts is None:
        width = max(widths, default=0)
        if not width or not (experts or mixers):
            return None
        parts = BlockParts(width)
        if not experts:
            parts.unlisted |= {kind: "the block has no MLP" for kind in ("mlp", "gate")}
    if experts:
        _add_experts(experts, parts)
    elif unlike := _outermost(block, resembles_experts):
        parts.unlisted["expert"] = experts_refusal(block.get_submodule(unlike[0])) or f"{unlike[0]} is not understood"
        parts.branch = unlike[0].rpartition(".")[0] or unlike[0]
    _add_mixer(block, mixers, parts)
    _add_attention(block, attention, parts)
    return parts


def _mlp(block: nn.Module, linears: list[tuple[str, tuple[int, int]]], widths: set[int]) -> BlockParts | None:
    pairs = []
    for output, (size, width) in linears:
        inputs = _feeding(linears, output, (width, size))
        fused = _feeding(linears, output, (width, 2 * size))
        if (inputs or fused) and (not widths or width in widths):
            pairs.append((output, inputs[-2:], fused[-1:], width))
    if not pairs:
        return None
    # A gated pair has two projections in and one out; else the last pair of the block is the MLP.
    output, inputs, fused, width = max(reversed(pairs), key=lambda pair: len(pair[1]))
    parts = BlockParts(width, output, branch=output, activation=_nonlinearity(block, output))
    _set_inputs(parts, inputs, fused)
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


def _residual_widths(block: nn.Module, inside: tuple[str, ...]) -> set[int]:
    """What the block's norms normalise, which tells `d -> n` from `n -> d` where it is known."""
    widths = set()
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        outside = is_norm(module) and not path.startswith(inside)
        if outside and isinstance(weight, torch.Tensor) and weight.ndim == 1:
            widths.add(weight.shape[0])
    return widths


def _nonlinearity(block: nn.Module, output: str) -> str | None:
    """The one nonlinearity beside the output projection, or, if there is none beside it, the one of the block."""
    everywhere = [
        path
        for path, module in block.named_modules()
        if activation_name(module) and not re.search(r"attn|attention", path, re.IGNORECASE)
    ]
    parent = output.rpartition(".")[0]
    beside = [path for path in everywhere if path.rpartition(".")[0] == parent]
    found = beside or everywhere
    return found[0] if len(found) == 1 else None


def _set_inputs(parts: BlockParts, inputs: list[str], fused: list[str]) -> None:
    if not inputs:
        parts.inputs = {"gate_up": fused[0]}
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


def _outermost(block: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """Paths of the modules of a kind that lie in no other of the kind."""
    found: list[str] = []
    for path, module in block.named_modules():
        inside = any(path.startswith(outer + ".") for outer in found)
        if path and not inside and wanted(module):
            found.append(path)
    return found


def _add_experts(experts: list[str], parts: BlockParts) -> None:
    if len(experts) > 1:
        parts.unlisted["expert"] = f"two modules of experts: {' and '.join(experts[:2])}"
        return
    parts.experts = experts[0]
    # What is added to the residual is the sum over the experts, with that of shared ones.
    parts.branch = experts[0].rpartition(".")[0] or experts[0]
    if not parts.output:
        reason = "the MLP of the block is made of experts: see expert.*"
        parts.unlisted |= {"mlp": reason, "gate": reason}


def _add_mixer(block: nn.Module, mixers: list[str], parts: BlockParts) -> None:
    for path in mixers:
        last = _last_linear(block, path, parts.width)
        if last is None or parts.mixer:
            parts.unlisted["mixer"] = f"two mixers: {path}" if parts.mixer else f"{path} has no output projection"
            continue
        parts.mixer = last


def _add_attention(block: nn.Module, attention: list[str], parts: BlockParts) -> None:
    for path in attention:
        module = block.get_submodule(path)
        kind = "cross_attn" if _CROSS.search(f"{path} {type(module).__name__}") else "attn"
        if any(isinstance(each, nn.MultiheadAttention) for each in (module, *module.modules())):
            parts.unlisted[kind] = "nn.MultiheadAttention never calls its output projection as a module"
            if kind not in parts.attending:
                parts.attending[kind] = path
            continue
        last = _last_linear(block, path, parts.width)
        if last is None or kind in parts.attending:
            parts.unlisted[kind] = f"{path} has no output projection" if last is None else f"two modules: {path}"
            continue
        parts.attention[kind] = last
        parts.attending[kind] = path
    for kind, path in parts.attending.items():
        if why := pattern_refusal(block.get_submodule(path)):
            parts.unlisted[kind.replace("attn", "pattern")] = why


def _last_linear(block: nn.Module, path: str, width: int) -> str | None:
    module = block.get_submodule(path)
    shapes = {name: linear_shape(each) for name, each in module.named_modules()}
    fitting = [name for name, shape in shapes.items() if name and shape and shape[1] == width]
    return f"{path}.{fitting[-1]}" if fitting else None
