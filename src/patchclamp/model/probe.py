"""Run a network once on a small input to settle what module names cannot say.

Which tensor is the residual stream between attention and MLP depends on whether the block
normalises before or after adding, and on whether attention and MLP run side by side: it is read
off the arithmetic of one small forward pass, and a write is tried before the site is listed. A site that a
forward pass never reaches is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from patchclamp.errors import ModelError
from patchclamp.model.block import BlockParts
from patchclamp.model.closeness import same
from patchclamp.model.convolutions import settle_convolutions
from patchclamp.model.example import Example, example_inputs, is_uninitialised, run
from patchclamp.model.experts import experts_refusal
from patchclamp.model.hooks import first_tensor, input_tensor, reading
from patchclamp.model.inspection import Inspection, Stack, drop_shared
from patchclamp.model.modules import is_norm, linear_shape
from patchclamp.model.site import Site


def probe(root: nn.Module, found: Inspection, given: Example | None = None) -> None:
    """Add `resid_mid` sites and norms to `found`; drop the sites that a pass never reaches, or reaches as several.

    A network that cannot be run on `given`, or on made-up inputs, keeps the sites that inspection found.
    """
    example = example_inputs(root) if given is None else given
    for stack in found.stacks:
        for layers in stack.alike():
            _probe_layers(root, found, stack, layers, example)
    drop_shared(root, found)
    found.example = settle_convolutions(root, found, example)


def _probe_layers(root: nn.Module, found: Inspection, stack: Stack, layers: list[int], example: Example | None) -> None:
    """Settle the layers that are built like the first of them, by looking at that one."""
    block = _Block(root, stack, layers, example)
    parts = stack.layers[layers[0]]
    if parts.experts and (why := experts_refusal(block.module.get_submodule(parts.experts))):
        found.drop(stack, "expert", layers, why)
    try:
        trace = block.run()
    except Exception as error:  # whatever a foreign model raises on made-up inputs
        found.explain(stack, "resid_mid", layers, f"the model could not be tried: {type(error).__name__}: {error}")
        return
    _drop_unreadable(found, block, parts, trace)
    if trace.order.count("") == 1:
        _drop_patterns(root, found, block, parts)
        _add_resid_mid(found, block, parts, trace)


# One traced forward pass ----------------------------------------------------------------------------


@dataclass
class _Trace:
    """Inputs and outputs of the modules of a block, in the order in which they ran. All [rows, d]."""

    order: list[str] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    shape: list[int] = field(default_factory=list)  # of what the block returns


@dataclass
class _Block:
    """The first of some layers that are built alike, and how to run it: in the whole network, or alone."""

    root: nn.Module
    stack: Stack
    layers: list[int]
    example: Example | None

    @property
    def base(self) -> str:
        return self.stack.block(self.layers[0])

    @property
    def module(self) -> nn.Module:
        return self.root.get_submodule(self.base)

    def call(self) -> None:
        """One forward pass that ought to run the block."""
        if self.example is not None:
            run(self.root, self.example)
        else:
            self.call_alone()

    def call_alone(self) -> None:
        """The block by itself."""
        if is_uninitialised(self.module):
            raise ModelError(f"{self.base} has lazy layers, whose sizes a first call settles")
        # Nothing is known of what the network takes; most blocks take `[examples, positions, width]`.
        weight = next(self.root.parameters())
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, 5, self.stack.layers[self.layers[0]].width, generator=generator)
        run(self.module, Example((states.to(weight.device, weight.dtype),)))

    def run(self, nudge: tuple[str, torch.Tensor] | None = None) -> _Trace:
        trace = _Trace()
        handles = []

        def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.detach().reshape(-1, tensor.shape[-1]).clone()

        def before(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
                tensor = input_tensor(args, kwargs)
                if tensor is not None and nudge is not None and path == nudge[0]:
                    tensor.add_(nudge[1].to(tensor))
                if (kept := rows(tensor)) is not None:
                    trace.order.append(path)
                    trace.inputs[path] = kept

            return hook

        def after(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> None:
                tensor = first_tensor(output)
                if (kept := rows(tensor)) is not None and tensor is not None:
                    trace.outputs[path] = kept
                    trace.shape = list(tensor.shape) if not path else trace.shape

            return hook

        try:
            for path, module in self.module.named_modules():
                handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
                handles.append(module.register_forward_hook(after(path), with_kwargs=True))
            self.call()
            if not trace.order:  # the example takes another way, through another tower
                self.call_alone()
        finally:
            for handle in handles:
                handle.remove()
        return trace

    def sites(self, found: Inspection) -> dict[str, Site]:
        """The sites of this first layer: kind as it stands in the name -> site."""
        of_layer = [s for s in found.sites.values() if s.stack == self.stack.name and s.layer == self.layers[0]]
        return {site.name.removeprefix(self.stack.prefix).partition(".")[0]: site for site in of_layer}


def _drop_unreadable(found: Inspection, block: _Block, parts: BlockParts, trace: _Trace) -> None:
    times = trace.order.count("")
    for kind, site in block.sites(found).items():
        path, why = site.module.removeprefix(block.base + "."), ""
        if times > 1:
            why = f"a forward pass calls {block.base} {times} times: its layers share their weights"
        elif site.kind in ("resid_pre", "resid_post"):
            if not trace.shape or trace.shape[site.axis] != parts.width:
                why = f"{block.base} returns {trace.shape or 'no tensor'}, which has no axis of {parts.width} neurons"
        elif site.through == "module" and path not in trace.order:
            why = f"a forward pass never calls {site.module} as a module"
        elif site.through == "module" and (calls := trace.order.count(path)) > 1:
            why = f"one call of {block.base} calls {site.module} {calls} times: which is meant cannot be said"
        elif site.kind in ("attn", "mixer"):
            module = (parts.attending[kind] if site.kind == "attn" else parts.mixer.rpartition(".")[0]) + "."
            last = [
                each
                for each in trace.order
                if each.startswith(module) and linear_shape(block.module.get_submodule(each))
            ]
            if last[-1] != path:
                why = f"{last[-1]} runs after {path}: which is the output projection cannot be told"
        if why:
            found.drop(block.stack, kind, block.layers, why)


def _drop_patterns(root: nn.Module, found: Inspection, block: _Block, parts: BlockParts) -> None:
    """Try to read the attention probabilities, as only a forward pass shows whether there are any."""
    for kind, site in block.sites(found).items():
        if site.kind != "pattern":
            continue
        try:
            with reading(root, [site]) as captured:
                block.call()
            shown = [list(seen.tensor.shape) for seen in captured[site.name]]
            why = "" if len(shown) == 1 and shown[0][-1] == site.size else f"one forward pass shows {shown}"
        except Exception as error:  # whatever a foreign model raises
            why = f"{type(error).__name__}: {error}"
        if why:
            found.drop(block.stack, kind, block.layers, f"{parts.attending[kind.replace('pattern', 'attn')]}: {why}")


# The residual stream between attention and MLP --------------------------------------------------------


def _add_resid_mid(found: Inspection, block: _Block, parts: BlockParts, trace: _Trace) -> None:
    stack = block.stack
    answer = _middle(block.module, parts, trace)
    if isinstance(answer, str):
        found.explain(stack, "resid_mid", block.layers, answer)
        return
    path, where, norm = answer
    if where == "input" and not _write_is_seen(block, parts, trace, path, norm):
        why = "the residual and the norm's input are two tensors: a write to one misses the other"
        found.explain(stack, "resid_mid", block.layers, why)
        return
    norms = {each: _norm_after(block.module, trace, each, where == "output") for each in parts.attention.values()}
    if parts.output:
        norms[parts.output] = norm
    for layer in block.layers:
        base = stack.block(layer)
        middle = f"{stack.prefix}resid_mid.{layer}"
        found.sites[middle] = Site(
            middle,
            "resid_mid",
            layer,
            trace.outputs[""].shape[-1],
            stack=stack.name,
            module=f"{base}.{path}" if path else base,
            tensor="input" if where == "input" else "output",
            in_place=where == "input",
        )
        for name, site in found.sites.items():
            if site.stack == stack.name and site.layer == layer and site.writes is not None:
                following = norms.get(site.writes.removeprefix(base + "."))
                found.sites[name] = replace(site, norm=following and f"{base}.{following}")


def _middle(block: nn.Module, parts: BlockParts, trace: _Trace) -> tuple[str, str, str | None] | str:
    """(module, "input" or "output", norm after the MLP) of the residual before the MLP; or why there is none."""
    if not parts.branch:
        return "the block has no MLP, so it has no middle"
    feeding = {path for path in (parts.branch, parts.experts, *parts.inputs.values()) if path}
    first = next((path for path in trace.order if path in feeding), None)
    branch_output = parts.branch
    if first is None or branch_output not in trace.outputs or "" not in trace.outputs:
        return "a forward pass never calls the MLP's projections"
    norms = _norms(block, trace)
    before = [path for path in norms if trace.order.index(path) < trace.order.index(first)]
    after = [path for path in norms if trace.order.index(path) > trace.order.index(branch_output)]
    written, block_output = trace.outputs[branch_output], trace.outputs[""]
    if not before or trace.outputs[before[-1]].shape != written.shape:
        return "no norm runs before the MLP"
    last = before[-1]
    branch, branch_norm = written, None
    for path in after:
        if same(trace.inputs[path], written):
            branch, branch_norm = trace.outputs[path], path
            break
    if same(trace.inputs[last] + branch, block_output):
        if "" in trace.inputs and same(trace.inputs[last], trace.inputs[""]):
            return "nothing is added to the residual before the MLP: there is no middle"
        return last, "input", branch_norm
    for path in after:
        if same(trace.inputs[path], trace.outputs[last] + written):
            return last, "output", path
    return "the block does not add the MLP's output to what its norm reads (side by side, or another arithmetic)"


def _norm_after(block: nn.Module, trace: _Trace, projection: str, normalises_sums: bool) -> str | None:
    """The norm of what a projection writes: alone, or, in a block that normalises sums, added to the residual."""
    if projection not in trace.outputs:
        return None
    after = [path for path in _norms(block, trace) if trace.order.index(path) > trace.order.index(projection)]
    written = trace.outputs[projection]
    return next((path for path in after if normalises_sums or same(trace.inputs[path], written)), None)


def _norms(block: nn.Module, trace: _Trace) -> list[str]:
    return [path for path in trace.order if path and is_norm(block.get_submodule(path)) and path in trace.outputs]


def _write_is_seen(block: _Block, parts: BlockParts, trace: _Trace, path: str, norm: str | None) -> bool:
    scale = trace.inputs[path].abs().max()
    nudged = block.run((path, torch.linspace(-1, 1, trace.inputs[path].shape[-1]) * scale))
    branch = nudged.outputs[norm or parts.branch]
    changed = not same(nudged.outputs[""], trace.outputs[""])
    return changed and same(nudged.inputs[path] + branch, nudged.outputs[""])
