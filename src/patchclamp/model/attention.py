"""Attention probabilities: what comes out of the softmax, before it is multiplied with the values.

No module of a network returns them as they are used, so they are taken where they arise. While the attention module
runs, a `TorchFunctionMode` looks for the one softmax over keys, or for `scaled_dot_product_attention`, which holds
a softmax of its own: that one is computed step by step where somebody writes, and a second time beside it where
somebody only reads. Attention that is written in any other way (flash, flex, a kernel of the hub) is switched to
the eager code of its own model for as long as the block runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchclamp.errors import ModelError
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap, installed


@contextmanager
def tapped(root: nn.Module, taps: Sequence[Tap]) -> Iterator[None]:
    """While the block runs, every tap sees the attention probabilities of its site.

    A tap is given `[batch, queries, keys, heads]`, in the type of the scores; what it returns is multiplied with the
    values, after the model's own dropout where it trains. A row sums to 1; in a query that may look at no key (padding
    on the left) it is what the attention makes of it, zeros for `scaled_dot_product_attention`.

    Raises:
        ModelError: the module's probabilities cannot be reached, by `pattern_refusal`, or, during a call, because it
            computes none or several.
    """
    by_module: dict[str, list[Tap]] = {}
    for tap in taps:
        by_module.setdefault(tap.site.module, []).append(tap)
    with ExitStack() as stack:
        for path, there in by_module.items():
            module = root.get_submodule(path)
            if why := pattern_refusal(module):
                raise ModelError(f"{there[0].site.name} cannot be reached: {why}")
            stack.enter_context(_eager(root, path))
            stack.enter_context(installed(module, "attention", there, _install))
        yield


def pattern_refusal(module: nn.Module) -> str | None:
    """Why the probabilities of an attention module cannot be reached, as far as can be told without a call."""
    for each in module.modules():
        if isinstance(each, torch.jit.ScriptModule):
            return "the attention is TorchScript, which nothing can look into while it runs"
        if isinstance(getattr(each, "sinks", None), torch.Tensor):
            return "its softmax runs over the keys and an attention sink, which is no key"
    return None


def _install(module: nn.Module, live: list[Tap]) -> Callable[[], None]:
    own = vars(module).get("forward")  # accelerate puts one there
    forward = module.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Watching(live) as watching:
            output = forward(*args, **kwargs)
        if not watching.found:
            raise ModelError(_not_found(module, live[0].site))
        return output

    module.forward = watched

    def undo() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    return undo


class _Watching(TorchFunctionMode):
    """Shows the attention probabilities that are computed while it is entered."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.taps = taps
        self.site = taps[0].site
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAX:
            return self._softmax(func, *args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._dot_product(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:
                return _body(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _softmax(self, func: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = func(input, *args, **kwargs)
        axis = args[0] if args else kwargs.get("dim")
        if axis not in (-1, input.ndim - 1) or (shape := _shape(given, self.site.size)) is None:
            return given
        # Many models compute the softmax in float32 and go on in the type of the scores.
        new = self._shown(given.to(input.dtype).reshape(shape))
        return given if new is None else new.reshape(given.shape).to(given.dtype).contiguous()

    def _dot_product(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        spread = key
        if enable_gqa:
            spread = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        weights = _probabilities(query, spread, attn_mask, is_causal, scale)
        shape = _shape(weights, self.site.size)
        new = None if shape is None else self._shown(weights.reshape(shape))
        if new is None:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        return functional.dropout(new.reshape(weights.shape), dropout_p) @ value

    def _shown(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What the taps make of `[batch, heads, queries, keys]`; None where all of them only read."""
        if self.found:
            raise ModelError(
                f"{self.site.name}: {self.site.module} computes several softmaxes over {self.site.size} heads in one "
                "call; which of them are its attention probabilities cannot be told"
            )
        self.found = True
        written = False
        for tap in self.taps:
            heads_last = tensor.movedim(1, -1)
            if tap.writes:
                tensor, written = tap.see(Seen(heads_last)).movedim(-1, 1), True
            else:
                tap.see(Seen(heads_last.clone()))  # the model may go on writing into its own
        return tensor if written else None


_SOFTMAX = (functional.softmax, torch.softmax, torch.Tensor.softmax)


def _body(function: FunctionType) -> FunctionType:
    """The same Python function, which runs under a mode instead of being handed to it as a whole."""
    names = {**function.__globals__, "has_torch_function": lambda _tensors: False}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _shape(tensor: torch.Tensor, heads: int | None) -> tuple[int, int, int, int] | None:
    """`[batch, heads, queries, keys]` of a tensor that may hold batch and heads, or heads and queries, in one axis.

    None where the tensor cannot be attention probabilities of so many heads.
    """
    sizes, keys = tensor.shape[:-1], tensor.shape[-1]
    if len(sizes) == 3 and heads in (None, sizes[1]):
        return sizes[0], sizes[1], sizes[2], keys
    if heads is None:
        return None
    # One query at a time, the heads that share a key are handed to the kernel as if they were its queries.
    if len(sizes) == 3 and sizes[1] * sizes[2] == heads:
        return sizes[0], heads, 1, keys
    if len(sizes) == 4 and sizes[1] * sizes[2] == heads:
        return sizes[0], heads, sizes[3], keys
    if len(sizes) == 2 and sizes[0] % heads == 0:
        return sizes[0] // heads, heads, sizes[1], keys
    return None


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """The softmax inside `scaled_dot_product_attention`, as its documentation writes it, in the type of `query`."""
    # The fused kernels sum in float32 whatever the type.
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.to(wide) @ key.to(wide).transpose(-2, -1) * scale
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    # A query that may look at no key has no probabilities; the kernels return zeros, with gradients of zero.
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return weights.to(query.dtype)


# The implementation that a configuration names -----------------------------------------------------------

# id of a configuration -> itself, what it said, how many contexts need it eager
_switched: dict[int, tuple[Any, str, int]] = {}


@contextmanager
def _eager(root: nn.Module, path: str) -> Iterator[None]:
    """While the block runs, the module at `path` computes attention in Python, if it was to use a fused kernel.

    The masks are made further out, by what the configurations of the modules around it say; so these are switched too.
    Layers share a configuration, and contexts may overlap: the last one that needs it eager puts it back.
    """
    changed = [config for config in _configs(root, path) if id(config) in _switched or _is_fused(config)]
    for config in changed:
        _, said, count = _switched.get(id(config), (config, config._attn_implementation, 0))
        _switched[id(config)] = config, said, count + 1
        _set(config, "eager")
    try:
        yield
    finally:
        for config in changed:
            _, said, count = _switched.pop(id(config))
            if count > 1:
                _switched[id(config)] = config, said, count - 1
            else:
                _set(config, said)


def _configs(root: nn.Module, path: str) -> list[Any]:
    """The configurations of a module, of those inside it and of those around it, each once."""
    parts = path.split(".") if path else []
    around = [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    modules = [*around, *root.get_submodule(path).modules()]
    found = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    return [config for config in found.values() if isinstance(getattr(config, "_attn_implementation", None), str)]


def _is_fused(config: Any) -> bool:
    name = config._attn_implementation
    return any(part in name for part in ("flash", "flex", "paged", "/"))  # a slash: a kernel of the hub


def _set(config: Any, implementation: str) -> None:
    # A text would go to the configurations inside it too, which have values of their own.
    config._attn_implementation = {"": implementation}


def _not_found(module: nn.Module, site: Site) -> str:
    names = {config._attn_implementation for config in _configs(module, "")}
    implementation = f" (attention implementation {', '.join(sorted(names))})" if names else ""
    heads = "" if site.size is None else f" over {site.size} heads"
    return (
        f"{site.name}: {site.module}{implementation} was called but computed no softmax{heads}: its probabilities "
        "are inside a fused kernel, or it is attention of another kind"
    )
