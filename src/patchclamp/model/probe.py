"""Run a Hugging Face model once on a few tokens to settle what module names cannot say.

Which tensor is the residual stream between attention and MLP depends on whether the block
normalises before or after adding, and on whether attention and MLP run side by side: it is read
off the arithmetic of one small forward pass, and a write is tried before the site is listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from patchclamp.model.hooks import first_tensor, input_tensor
from patchclamp.model.inspection import Inspection, Stack, is_norm, linear_shape
from patchclamp.model.site import Site


def probe(root: nn.Module, found: Inspection) -> None:
    """Add `resid_mid` sites and norms to `found`, and drop the sites that a forward pass never reaches.

    A network that cannot be run on made-up inputs keeps the sites that inspection found.
    """
    inputs = example_inputs(root)
    for stack in found.stacks:
        key = f"{stack.name}.resid_mid.*" if stack.name else "resid_mid.*"
        if inputs is None:
            found.unlisted[key] = "the model could not be tried: it does not say what inputs it takes"
            continue
        try:
            trace = _run(root, stack, inputs)
        except Exception as error:  # whatever a foreign model raises on made-up inputs
            found.unlisted[key] = f"the model could not be tried: {type(error).__name__}: {error}"
            continue
        _drop_unreadable(root, found, stack, trace)
        _add_resid_mid(root, found, stack, trace, inputs, key)


def example_inputs(root: nn.Module) -> dict[str, torch.Tensor] | None:
    """A few made-up tokens (and an image, where one is wanted) for a Hugging Face model; None for others."""
    config = getattr(root, "config", None)
    parameter = next(root.parameters(), None)
    if config is None or parameter is None or parameter.device.type == "meta":
        return None
    from patchclamp.model.signature import accepts

    inputs: dict[str, torch.Tensor] = {}
    text = getattr(config, "text_config", config)
    vocabulary = getattr(text, "vocab_size", None)
    if accepts(root, "input_ids") and vocabulary:
        # Any tokens do; the last ones of the vocabulary are seldom special.
        inputs["input_ids"] = torch.arange(vocabulary - 1, vocabulary - 6, -1).clamp(min=0)[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None)
    if accepts(root, "pixel_values") and isinstance(side, int):
        generator = torch.Generator().manual_seed(0)
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.rand(1, channels, side, side, generator=generator).to(parameter.dtype)
    return {name: value.to(parameter.device) for name, value in inputs.items() if accepts(root, name)} or None


# One traced forward pass ----------------------------------------------------------------------------


@dataclass
class _Trace:
    """Inputs and outputs of the modules of the first block, in the order in which they ran. All [rows, d]."""

    order: list[str] = field(default_factory=list)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


def _run(
    root: nn.Module, stack: Stack, inputs: dict[str, Any], nudge: tuple[str, torch.Tensor] | None = None
) -> _Trace:
    base = stack.block(0)
    block = root.get_submodule(base)
    trace = _Trace()
    handles = []

    def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().reshape(-1, tensor.shape[-1]).clone()

    def before(path: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensor = input_tensor(args, kwargs)
            if tensor is not None and nudge is not None and path == nudge[0]:
                tensor.add_(nudge[1].to(tensor))
            if (kept := rows(tensor)) is not None:
                trace.order.append(path)
                trace.inputs[path] = kept

        return hook

    def after(path: str):
        def hook(_module: nn.Module, _args: tuple, _kwargs: dict, output: Any) -> None:
            if (kept := rows(first_tensor(output))) is not None:
                trace.outputs[path] = kept

        return hook

    try:
        for path, module in block.named_modules():
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path), with_kwargs=True))
        with torch.no_grad(), undisturbed(root):
            root(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return trace


@contextmanager
def undisturbed(root: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; the modes of all modules and the random generators are put back."""
    training = [module for module in root.modules() if module.training]
    with torch.random.fork_rng(devices=[]):
        root.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _drop_unreadable(root: nn.Module, found: Inspection, stack: Stack, trace: _Trace) -> None:
    base = stack.block(0) + "."
    block = root.get_submodule(stack.block(0))
    for name, site in list(found.sites.items()):
        if site.stack != stack.name or site.layer != 0:
            continue
        path, why = site.module.removeprefix(base), ""
        if trace.order.count("") > 1:
            why = f"a forward pass calls {stack.block(0)} {trace.order.count('')} times: its layers share their weights"
        elif not site.kind.startswith("resid") and path not in trace.order:
            why = f"a forward pass never calls {site.module} as a module"
        elif site.kind == "attn":
            module = stack.parts.attending[name.split(".")[-2]] + "."
            last = [each for each in trace.order if each.startswith(module) and linear_shape(block.get_submodule(each))]
            if last[-1] != path:
                why = f"{last[-1]} runs after {path}: which is the output projection cannot be told"
        if why:
            kind = name.removesuffix(".0")
            for layer in stack.layers:
                found.sites.pop(f"{kind}.{layer}", None)
            found.unlisted[f"{kind}.*"] = why


# The residual stream between attention and MLP --------------------------------------------------------


def _add_resid_mid(
    root: nn.Module, found: Inspection, stack: Stack, trace: _Trace, inputs: dict[str, Any], key: str
) -> None:
    block = root.get_submodule(stack.block(0))
    answer = _middle(block, stack, trace)
    if isinstance(answer, str):
        found.unlisted[key] = answer
        return
    path, where, norm = answer
    if where == "input" and not _write_is_seen(root, stack, trace, inputs, path, norm):
        found.unlisted[key] = "the residual and the norm's input are two tensors: a write to one misses the other"
        return
    norms = {each: _norm_after(block, trace, each, where == "output") for each in stack.parts.attention.values()}
    norms[stack.parts.output] = norm
    sites: dict[str, Site] = {}
    for name, site in found.sites.items():
        if site.stack == stack.name and site.kind in ("mlp", "gate") and site.layer is not None:
            middle = f"{stack.name}.resid_mid.{site.layer}" if stack.name else f"resid_mid.{site.layer}"
            if middle not in sites:
                sites[middle] = Site(
                    middle,
                    "resid_mid",
                    site.layer,
                    trace.outputs[""].shape[-1],
                    stack=stack.name,
                    module=f"{stack.block(site.layer)}.{path}" if path else stack.block(site.layer),
                    tensor="input" if where == "input" else "output",
                    in_place=where == "input",
                )
        if site.stack == stack.name and site.writes is not None and site.layer is not None:
            base = stack.block(site.layer) + "."
            following = norms.get(site.writes.removeprefix(base))
            site = replace(site, norm=following and base + following)
        sites[name] = site
    found.sites = sites


def _middle(block: nn.Module, stack: Stack, trace: _Trace) -> tuple[str, str, str | None] | str:
    """(module, "input" or "output", norm after the MLP) of the residual before the MLP; or why there is none."""
    first = next((path for path in trace.order if path in stack.parts.inputs.values()), None)
    output = stack.parts.output
    if first is None or output not in trace.outputs or "" not in trace.outputs:
        return "a forward pass never calls the MLP's projections"
    norms = _norms(block, trace)
    before = [path for path in norms if trace.order.index(path) < trace.order.index(first)]
    after = [path for path in norms if trace.order.index(path) > trace.order.index(output)]
    written, block_output = trace.outputs[output], trace.outputs[""]
    if not before or trace.outputs[before[-1]].shape != written.shape:
        return "no norm runs before the MLP"
    last = before[-1]
    branch, branch_norm = written, None
    for path in after:
        if _same(trace.inputs[path], written):
            branch, branch_norm = trace.outputs[path], path
            break
    if _same(trace.inputs[last] + branch, block_output):
        if "" in trace.inputs and _same(trace.inputs[last], trace.inputs[""]):
            return "nothing is added to the residual before the MLP: there is no middle"
        return last, "input", branch_norm
    for path in after:
        if _same(trace.inputs[path], trace.outputs[last] + written):
            return last, "output", path
    return "the block does not add the MLP's output to what its norm reads (side by side, or another arithmetic)"


def _norm_after(block: nn.Module, trace: _Trace, projection: str, normalises_sums: bool) -> str | None:
    """The norm of what a projection writes: alone, or, in a block that normalises sums, added to the residual."""
    if projection not in trace.outputs:
        return None
    after = [path for path in _norms(block, trace) if trace.order.index(path) > trace.order.index(projection)]
    written = trace.outputs[projection]
    return next((path for path in after if normalises_sums or _same(trace.inputs[path], written)), None)


def _norms(block: nn.Module, trace: _Trace) -> list[str]:
    return [path for path in trace.order if path and is_norm(block.get_submodule(path)) and path in trace.outputs]


def _write_is_seen(
    root: nn.Module, stack: Stack, trace: _Trace, inputs: dict[str, Any], path: str, norm: str | None
) -> bool:
    scale = trace.inputs[path].abs().max()
    nudged = _run(root, stack, inputs, (path, torch.linspace(-1, 1, trace.inputs[path].shape[-1]) * scale))
    branch = nudged.outputs[norm or stack.parts.output]
    changed = not _same(nudged.outputs[""], trace.outputs[""])
    return changed and _same(nudged.inputs[path] + branch, nudged.outputs[""])


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or not left.numel():
        return left.shape == right.shape
    # A few roundings of the model's own precision, relative to the largest value.
    tolerance = max(1e-4, 8 * max(torch.finfo(each.dtype).eps for each in (left, right)))
    left, right = left.double(), right.double()
    return bool((left - right).abs().max() <= tolerance * right.abs().max())
