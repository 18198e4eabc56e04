"""Fused mixtures of experts: the neurons of each expert, `expert.<layer>.<expert>`.

The experts of a layer are one module of `transformers`: its parameters are 3-D, one slice for each expert, and it has
no child that computes a projection. The neurons of an expert are what enters its slice of `down_proj`: the tensor
after gate times up, on the tokens that the router gave to that expert. No module is called with it. What the module
computes, though, is looked up by name on each call, in a registry (`config._experts_implementation`: `eager`,
`grouped_mm`, `batched_mm`); so, for as long as a module is tapped, it is given a configuration of its own that names
`_computed`, the same sum computed expert by expert. The user's configuration, which other layers share, is not
written to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from patchclamp.errors import ModelError
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap, installed

_IMPLEMENTATION = "patchclamp_tapped"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module is a fused mixture of experts that looks up in a registry of `transformers` what it computes."""
    said = all(isinstance(getattr(module, name, None), bool) for name in ("has_bias", "is_transposed"))
    return (
        said
        and hasattr(getattr(module, "config", None), "_experts_implementation")
        and _is_stacked(module, "down_proj")
        and _is_stacked(module, "gate_up_proj" if _has_gate(module) else "up_proj")
    )


def resembles_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in 3-D parameters at all, in a class that is understood or not."""
    return _is_stacked(module, "down_proj")


def expert_shape(module: nn.Module) -> tuple[int, int, int]:
    """(experts, neurons of each, width of what they read and write)."""
    number, first, second = _parameter(module, "down_proj").shape
    return (number, first, second) if module.is_transposed else (number, second, first)


def expert_sites(
    module_path: str, module: nn.Module, prefix: str, layer: int, stack: str, activation: str | None = None
) -> Iterator[Site]:
    """One site for each expert of a layer.

    Args:
        module_path: dotted path of the module of experts.
        module: the module of experts.
        prefix: what the names of the stack begin with: `""`, or `decoder.`.
        layer: number of the block.
        stack: name of the stack.
        activation: name of the nonlinearity.
    """
    number, size, _ = expert_shape(module)
    for expert in range(number):
        yield Site(
            f"{prefix}expert.{layer}.{expert}",
            "expert",
            layer,
            size,
            activation,
            stack,
            module=module_path,
            tensor="output",
            through="experts",
            unit=expert,
        )


def expert_output_weights(module: nn.Module, expert: int) -> torch.Tensor:
    """`[size, width]`, a view of the parameter: what each neuron of an expert writes."""
    weight = _parameter(module, "down_proj")[expert]
    return weight if module.is_transposed else weight.T


def expert_input_weights(module: nn.Module, expert: int) -> dict[str, torch.Tensor]:
    """Role -> `[size, width]`, a view of the parameter: what each neuron of an expert reads.

    The roles are `gate` and `up`, or `in` for experts without a gate.
    """
    weight = _parameter(module, "gate_up_proj" if _has_gate(module) else "up_proj")[expert]
    rows = weight.T if module.is_transposed else weight
    if not _has_gate(module):
        return {"in": rows}
    if getattr(module, "is_concatenated", True):
        gate, up = rows.chunk(2)
        return {"gate": gate, "up": up}
    return {"gate": rows[::2], "up": rows[1::2]}


@contextmanager
def tapped(root: nn.Module, taps: Sequence[Tap]) -> Iterator[None]:
    """While the block runs, every tap sees the neurons of its expert on the tokens routed to it.

    A tap is given `[rows, size]` and, as `place`, the index of each row's token among those given to the module,
    ascending. It is called once for each call of the module, with no rows where no token was routed to its expert.

    Raises:
        ModelError: the module is not one of fused experts that are understood, or has no such expert.
    """
    of_module: dict[str, list[Tap]] = {}
    for tap in taps:
        of_module.setdefault(tap.site.module, []).append(tap)
    with ExitStack() as stack:
        for path, there in of_module.items():
            module = root.get_submodule(path)
            if why := _structural_refusal(module):
                raise ModelError(f"{there[0].site.name} cannot be read or written: {why}")
            number, _, _ = expert_shape(module)
            for tap in there:
                if not 0 <= tap.site.unit < number:
                    raise ModelError(f"{tap.site.name}: {path} has experts 0 to {number - 1}, not {tap.site.unit}")
            stack.enter_context(installed(module, "experts", there, _install))
        yield


def experts_refusal(module: nn.Module) -> str | None:
    """Why the neurons of these experts cannot be read and written; None if they can.

    The module is tried on a few tokens drawn from a seed: what it returns must not change when it is tapped. Its hooks
    are not run and the global random state stays as it is.
    """
    if why := _structural_refusal(module):
        return why
    device = _device(module)
    if device.type == "meta":
        return "its weights are on the meta device, so it could not be tried whether they are read rightly"
    inputs = _trial_inputs(module, device)
    calls: list[Seen] = []

    def see(seen: Seen) -> torch.Tensor:
        calls.append(seen)
        return seen.tensor

    first = next(expert_sites("", module, "", 0, ""))
    try:
        with torch.no_grad():
            own = module.forward(*inputs)
            with installed(module, "experts", [Tap(first, see, writes=False)], _install):
                ours = module.forward(*inputs)
    # Whatever an unknown class raises is the reason.
    except Exception as error:
        return f"{type(module).__name__} could not be tried: {type(error).__name__}: {error}"
    if not calls:
        return f"{type(module).__name__} has a forward of its own, which does not look up what it computes"
    if not isinstance(own, torch.Tensor) or own.shape != ours.shape or not _agree(own, ours):
        return f"{type(module).__name__} computes something else than the sum over its experts that its attributes say"
    return None


# Tapping one module ---------------------------------------------------------------------------------

_tapped_modules: list[nn.Module] = []


class _TappedConfig:
    """Stands in for the configuration of one tapped module: it names another implementation, all else is the same."""

    _experts_implementation = _IMPLEMENTATION

    def __init__(self, config: Any, taps: list[Tap]) -> None:
        self.__dict__.update(_patchclamp_config=config, _patchclamp_taps=taps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_patchclamp_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_patchclamp_config"], name, value)

    # A copy of a tapped network, or what is saved of it, is not tapped.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__dict__["_patchclamp_config"], memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__dict__["_patchclamp_config"].__reduce_ex__(protocol)


def _install(module: nn.Module, taps: list[Tap]) -> Callable[[], None]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    config: Any = module.config
    ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION] = _computed
    _tapped_modules.append(module)
    module.config = _TappedConfig(config, taps)  # type: ignore[assignment]

    def undo() -> None:
        module.config = config
        _tapped_modules.remove(module)
        if not _tapped_modules:
            del ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION]

    return undo


def _computed(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What the experts return, computed expert by expert; each tapped one passes its neurons through its taps.

    Args:
        module: the module of experts.
        hidden_states: `[tokens, width]`.
        top_k_index: `[tokens, chosen]`, which experts a token goes to; numbers beyond the experts stand for none.
        top_k_weights: `[tokens, chosen]`, what the router weights them with.
    """
    number, _, width = expert_shape(module)
    tokens, chosen = top_k_index.shape
    taps: dict[int, list[Tap]] = {}
    for tap in module.config._patchclamp_taps:
        taps.setdefault(tap.site.unit, []).append(tap)
    into = _slices(module, "gate_up_proj" if _has_gate(module) else "up_proj")
    out_of = _slices(module, "down_proj")
    slots, outputs = [], []
    for expert, there in enumerate(_slots_of_experts(top_k_index, number)):
        if not len(there) and expert not in taps:
            continue
        place = there // chosen
        neurons = _activated(module, _projected(hidden_states[place], *into[expert], module.is_transposed))
        for tap in taps.get(expert, ()):
            neurons = tap.see(Seen(neurons, place))
        output = _projected(neurons, *out_of[expert], module.is_transposed)
        slots.append(there)
        outputs.append(module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output)
    slot = torch.cat(slots)
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1, 1)[slot]
    # Added up in the wider dtype of the two, as grouped_mm and batched_mm do.
    spread = weighted.new_zeros(tokens * chosen, width).index_copy(0, slot, weighted)
    return spread.view(tokens, chosen, width).sum(1).to(hidden_states.dtype)


def _slots_of_experts(top_k_index: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    """For each expert, the indices into the flattened `top_k_index` at which it is chosen, ascending."""
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    return order.split(torch.bincount(chosen, minlength=number).tolist())[:number]


def _slices(module: nn.Module, name: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    # Unbound all at once: indexing one by one would make autograd fill a tensor as large as all experts for each.
    weights = _parameter(module, name).unbind()
    biases = _parameter(module, f"{name}_bias").unbind() if module.has_bias else [None] * len(weights)
    return list(zip(weights, biases, strict=True))


def _projected(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    # Under autocast a norm hands on float32 to weights of another dtype.
    product = functional.linear(rows.to(weight.dtype), weight.T if transposed else weight)
    return product if bias is None else product + bias


def _activated(module: Any, projected: torch.Tensor) -> torch.Tensor:
    return module._apply_gate(projected) if _has_gate(module) else module.act_fn(projected)


# What a module is -----------------------------------------------------------------------------------


def _structural_refusal(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if not is_fused_experts(module):
        return (
            f"{kind} holds its experts in a way of its own; understood are those of transformers whose "
            "computation can be set by experts_implementation"
        )
    if getattr(module, "_is_expert_parallel", False):
        return f"{kind} is spread over several devices, each of which has only some of the experts"
    dtype = _parameter(module, "down_proj").dtype
    if dtype not in _DTYPES:
        return f"{kind} has quantised weights ({dtype})"
    return None


def _has_gate(module: nn.Module) -> bool:
    return getattr(module, "has_gate", True) is True


def _is_stacked(module: nn.Module, name: str) -> bool:
    parameter = getattr(module, name, None)
    return isinstance(parameter, torch.Tensor) and parameter.ndim == 3


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    # By attribute, not from the table of parameters: an adapter may compute it from others.
    return getattr(module, name)


# The trial ------------------------------------------------------------------------------------------


def _device(module: nn.Module) -> torch.device:
    """Where the module computes: weights that accelerate has offloaded are on the meta device between calls."""
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return torch.device(execution if execution is not None else _parameter(module, "down_proj").device)


def _trial_inputs(module: nn.Module, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    number, _, width = expert_shape(module)
    tokens, chosen = 8, min(2, number)
    dtype = _parameter(module, "down_proj").dtype
    generator = torch.Generator().manual_seed(0)
    # From small to large: a bound on the values shows only at large ones.
    hidden = torch.randn(tokens, width, generator=generator) * torch.logspace(-1, 1.5, tokens)[:, None]
    index = torch.rand(tokens, number, generator=generator).topk(chosen).indices
    weights = 0.1 + torch.rand(tokens, chosen, generator=generator)
    return hidden.to(device, dtype), index.to(device), weights.to(device, dtype)


def _agree(own: torch.Tensor, ours: torch.Tensor) -> bool:
    finite = own.isfinite().all(-1)
    expected, found = own[finite].double(), ours[finite].double()
    scale = expected.abs().amax(-1, keepdim=True)
    return bool(((expected - found).abs() <= max(1e-3, 8 * torch.finfo(own.dtype).eps) * scale).all())
