"""Which slices of which parameters make a neuron and read it.

Taken from what the modules are, not from a table of architectures. What they do not say is answered with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from patchclamp.model.channel_wiring import convolution_wiring
from patchclamp.model.example import Example, is_uninitialised, undisturbed
from patchclamp.model.experts import is_fused_experts
from patchclamp.model.hooks import input_tensor
from patchclamp.model.modules import is_channel_norm, is_norm, linear_shape
from patchclamp.model.site import Site
from patchclamp.model.slices import WeightSlice, Wiring, channel_norm_slices, join, projection_slices, unknown_wiring
from patchclamp.model.weights import is_quantised, tied_weights

_VALUES = re.compile(r"^(v|wv|v_?(proj|lin|linear)|to_v|linear_v|value(_proj|_projection)?|values?)$", re.IGNORECASE)
_QUERIES = re.compile(r"^(q|wq|q_?(proj|lin|linear)|to_q|linear_q|query(_proj|_projection)?|queries)$", re.IGNORECASE)
_FUSED_VALUES = re.compile(r"qkv|query_key_value|c_attn|in_proj", re.IGNORECASE)


class Wirings:
    """The wirings of the sites of one network."""

    def __init__(self, root: nn.Module, sites: Mapping[str, Site], example: Example | None = None) -> None:
        self.root = root
        self.sites = sites
        self.example = example
        self._tied = {name: group for group in tied_weights(root) for name in group}

    def of(self, site: Site) -> Wiring:
        """What makes and what reads the neurons of a site."""
        if site.kind.startswith("resid"):
            return unknown_wiring("every block before adds to the residual stream", "every block after reads it")
        if site.kind == "pattern":
            return unknown_wiring("attention probabilities come of queries and keys together", "they weigh the values")
        if site.size is None:
            return unknown_wiring(*[f"the number of neurons of {site.name} is not known before a forward pass"] * 2)
        found = self._of_kind(site)
        # Whoever is tied to a slice is changed with it.
        shared = [f"{each.parameter} is one tensor with {self._others(each)}" for each in self._shared(found.consumers)]
        made = [f"{each.parameter} is one tensor with {self._others(each)}" for each in self._shared(found.producers)]
        return replace(
            found,
            unknown_producers=found.unknown_producers or "; ".join(made),
            unknown_consumers=found.unknown_consumers or "; ".join(shared),
            inexact=found.inexact or found.unknown_consumers or "; ".join(shared),
        )

    def _of_kind(self, site: Site) -> Wiring:
        if site.through == "experts":
            return _of_expert(self.root, site)
        if site.kind == "recurrent":
            return _of_recurrent(self.root, site)
        if site.kind == "conv":
            return convolution_wiring(self.root, site, self.example)
        if site.kind == "gate":
            return self._of_gate(site)
        if site.kind == "attn":
            made, why = _values(self.root, site, self._block(site))
        elif site.kind == "mixer":
            made, why = (), "a mixer makes its neurons of all of its inputs and of its state"
        else:
            made, why = _of_projections(self.root, site)
        return _read_by_projection(self.root, site, Wiring(made, unknown_producers=why))

    def _of_gate(self, site: Site) -> Wiring:
        made, why = _of_projections(self.root, site)
        found = Wiring(made, unknown_producers=why)
        mlp = next((each for each in self.sites.values() if each.kind == "mlp" and _beside(each, site)), None)
        if mlp is None or not {"gate", "up"} <= set(mlp.reads):
            return replace(found, unknown_consumers="the MLP that multiplies it is no site")
        return _read_by_projection(self.root, mlp, found)

    def _block(self, site: Site) -> str | None:
        return next((s.module for s in self.sites.values() if s.kind == "resid_pre" and _beside(s, site)), None)

    def _shared(self, slices: Sequence[WeightSlice]) -> list[WeightSlice]:
        return [each for each in slices if each.parameter in self._tied]

    def _others(self, slice_: WeightSlice) -> str:
        return " and ".join(name for name in self._tied[slice_.parameter] if name != slice_.parameter)


def _beside(site: Site, other: Site) -> bool:
    return (site.stack, site.layer) == (other.stack, other.layer)


# Projections ----------------------------------------------------------------------------------------


def _read_by_projection(root: nn.Module, site: Site, found: Wiring) -> Wiring:
    if site.writes is None:
        return replace(found, unknown_consumers=f"no output projection of {site.name} is known")
    slices, why = projection_slices(root, site.writes, cast(int, site.size), reads=True)
    return replace(found, consumers=slices, unknown_consumers=why)


def _of_projections(root: nn.Module, site: Site) -> tuple[tuple[WeightSlice, ...], str]:
    """What makes the neurons of an MLP or of its gate."""
    size = cast(int, site.size)
    if not site.reads:
        return (), f"no projection that feeds {site.name} is known"
    made: list[WeightSlice] = []
    for role, path in site.reads.items():
        layouts = [(0, 1)]
        if role == "gate_up":
            tried = _fused_layout(root, site)
            if isinstance(tried, str):
                return (), tried
            layouts = tried
        for offset, stride in layouts:
            slices, why = projection_slices(root, path, size, False, offset, stride)
            if why:
                return (), why
            made += slices
    # A norm among the neurons mixes them; a batch norm does not, and has numbers for each neuron.
    for path, module in _between(root, site):
        if not is_channel_norm(module):
            return tuple(made), f"{path} ({type(module).__name__}) works on the neurons before they are read"
        made += channel_norm_slices(path, module, size)
    return tuple(made), ""


def _between(root: nn.Module, site: Site) -> list[tuple[str, nn.Module]]:
    """Modules with a number for each neuron, registered between the site's projections, or beside them."""
    ends = (*site.reads.values(), site.writes or site.module)
    paths = [path for path, _ in root.named_modules()]
    first, last = max(paths.index(path) for path in site.reads.values()), paths.index(ends[-1])
    parents = {path.rpartition(".")[0] for path in ends}
    shape = linear_shape(root.get_submodule(ends[-1]))
    # A module for the MLP alone may register its norm anywhere; the width tells it from one of the residual.
    alone = len(parents) == 1 and shape is not None and shape[0] != shape[1]
    found = []
    for place, (path, module) in enumerate(root.named_modules()):
        if linear_shape(module) or any(path == end or path.startswith(f"{end}.") for end in ends):
            continue
        beside = alone and path.rpartition(".")[0] in parents
        if (first < place < last or beside) and any(site.size in each.shape for each in module.parameters(False)):
            found.append((path, module))
    return found


def _fused_layout(root: nn.Module, site: Site) -> list[tuple[int, int]] | str:
    """(offset, stride) of gate and of up in their fused projection: tried, as shapes do not say; or why not."""
    size, fused, writes = cast(int, site.size), site.reads["gate_up"], site.writes or site.module
    shared = []
    for left, right in zip(fused.split("."), writes.split("."), strict=False):
        if left != right:
            break
        shared.append(left)
    parent = root.get_submodule(".".join(shared))
    projection, output = root.get_submodule(fused), root.get_submodule(writes)
    weight = next(projection.parameters(), None)
    inputs, _ = linear_shape(projection) or (0, 0)
    if weight is None or weight.device.type == "meta" or not weight.is_floating_point():
        return f"gate and up are one fused projection ({fused}), whose order could not be tried"
    if is_uninitialised(parent):
        return f"gate and up are one fused projection ({fused}), and lazy layers wait for a first call"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, inputs, generator=generator).to(weight)

    def neurons(columns: Sequence[int]) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def set_columns(_module: nn.Module, _args: Any, returned: torch.Tensor) -> torch.Tensor:
            changed = returned.clone()
            changed[..., list(columns)] = 2.0
            return changed

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(cast(torch.Tensor, input_tensor(args, kwargs)).detach().clone())

        handles = [
            projection.register_forward_hook(set_columns),
            output.register_forward_pre_hook(keep, with_kwargs=True),
        ]
        try:
            with torch.no_grad(), undisturbed(parent):
                parent(x)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0].reshape(-1, size)

    try:
        usual, last = neurons(()), size - 1
        for layout in ([(0, 1), (size, 1)], [(0, 2), (1, 2)]):
            columns = [offset + stride * last for offset, stride in layout]
            changed = (neurons(columns) != usual).any(0).nonzero().flatten().tolist()
            if changed == [last]:
                return layout
    except Exception as error:  # whatever a foreign module raises when it is called by itself
        return f"gate and up are one fused projection ({fused}), and trying their order failed: {error}"
    return f"gate and up are one fused projection ({fused}) in an order that is not known"


def _values(root: nn.Module, site: Site, block: str | None) -> tuple[tuple[WeightSlice, ...], str]:
    """The rows of the projection of the values that make what attention hands to its output projection."""
    size = cast(int, site.size)
    path = site.module
    found: dict[str, nn.Module] = {}
    linears: dict[str, nn.Module] = {}
    while path and path != block and not found:
        path = path.rpartition(".")[0]
        module = root.get_submodule(path)
        linears = {join(path, name): each for name, each in module.named_modules() if name and linear_shape(each)}
        found = {name: each for name, each in linears.items() if _VALUES.match(name.rpartition(".")[2])}
        found |= {name: each for name, each in linears.items() if _FUSED_VALUES.search(name.rpartition(".")[2])}
    if len(found) != 1:
        return (), f"the projection of the values is not known by its name beside {site.module}"
    values, module = next(iter(found.items()))
    if norm := _norm_within(root, path, values, site.module):
        return (), f"{norm} normalises what attention computes with the values"
    outputs = (linear_shape(module) or (0, 0))[1]
    if _FUSED_VALUES.search(values.rpartition(".")[2]):
        # OpenAI's layer, where query, key and value follow one another; others keep those of a head together.
        if type(module).__name__ == "Conv1D" and outputs == 3 * size:
            return projection_slices(root, values, size, False, 2 * size)
        return (), f"query, key and value are one fused projection ({values}): which rows are the values' is not known"
    queries = [linear_shape(each) for name, each in linears.items() if _QUERIES.match(name.rpartition(".")[2])]
    if any(shape and shape[1] != size for shape in queries):
        return (), f"the queries of {path} are not as many as what enters {site.module}: another factor comes in"
    if outputs < size and size % outputs == 0:
        return (), f"grouped-query attention: {size // outputs} neurons share each row of {values}"
    return projection_slices(root, values, size, False) if outputs == size else ((), f"{values} has {outputs} outputs")


def _norm_within(root: nn.Module, attention: str, values: str, output: str) -> str | None:
    """A norm between the values and the output projection: registered between them, or beside the values."""
    paths = [path for path, _ in root.named_modules()]
    for place, path in enumerate(paths):
        name = path.removeprefix(f"{attention}.")
        if not path.startswith(f"{attention}.") or not is_norm(root.get_submodule(path)):
            continue
        of_queries_or_keys = re.search(r"(^|[._])[qk]|query|key", name)
        beside = path.rpartition(".")[0] == values.rpartition(".")[0]
        if not of_queries_or_keys and (beside or paths.index(values) < place < paths.index(output)):
            return path
    return None


# Experts --------------------------------------------------------------------------------------------


def _of_expert(root: nn.Module, site: Site) -> Wiring:
    module: Any = root.get_submodule(site.module)
    if not is_fused_experts(module):
        return unknown_wiring(*[f"how {site.module} holds its experts is not known"] * 2)
    size, gated = cast(int, site.size), getattr(module, "has_gate", True)
    into, out = ("gate_up_proj" if gated else "up_proj"), "down_proj"
    for name in (into, out):
        if name not in module._parameters or not module._parameters[name].is_floating_point():
            return unknown_wiring(*[f"{site.module}.{name} is packed, or computed from others"] * 2)
    if not gated:
        layouts = [(0, 1)]
    else:
        layouts = [(0, 1), (size, 1)] if getattr(module, "is_concatenated", True) else [(0, 2), (1, 2)]
    rows, index = int(module.is_transposed), (site.unit,)
    made = [WeightSlice(join(site.module, into), rows, size, *layout, index=index) for layout in layouts]
    if module.has_bias:
        made += [WeightSlice(join(site.module, f"{into}_bias"), 0, size, *each, index=index) for each in layouts]
    read = WeightSlice(join(site.module, out), 1 - rows, size, index=index)
    return Wiring(tuple(made), (read,))


# Recurrent layers -----------------------------------------------------------------------------------


def _of_recurrent(root: nn.Module, site: Site) -> Wiring:
    module = root.get_submodule(site.module)
    if isinstance(module, nn.RNNBase):
        layer, reverse = divmod(site.unit, 2)
        suffixes = [f"_l{layer}" + "_reverse" * reverse]
        later = [f"_l{layer + 1}" + "_reverse" * other for other in range(1 + module.bidirectional)]
        later = later if layer + 1 < module.num_layers else []
    elif isinstance(module, nn.RNNCellBase):
        suffixes, later, reverse = [""], [], 0
    else:
        return unknown_wiring(*[f"{type(module).__name__} ({site.module}) does not say which weights are whose"] * 2)
    if why := is_quantised(module) or (
        "" if f"weight_hh{suffixes[0]}" in module._parameters else "its weights are computed"
    ):
        return unknown_wiring(*[f"{site.module}: {why}"] * 2)
    size, suffix = cast(int, site.size), suffixes[0]

    def named(name: str) -> str:
        return join(site.module, name)

    if getattr(module, "proj_size", 0):
        made = [WeightSlice(named(f"weight_hr{suffix}"), 0, size)]
    else:
        gates = cast(torch.Tensor, module._parameters[f"weight_hh{suffix}"]).shape[0] // size
        kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
        made = [WeightSlice(named(kind + suffix), 0, size, gate * size) for kind in kinds for gate in range(gates)]
    read = [WeightSlice(named(f"weight_hh{suffix}"), 1, size)]
    read += [WeightSlice(named(f"weight_ih{each}"), 1, size, reverse * size) for each in later]
    why = "it is returned as the final state (h_n), and who reads that is not known"
    if not later:
        why = f"it is what {site.module or type(module).__name__} returns, and who reads that is not known"
    return Wiring(tuple(made), tuple(read), unknown_consumers=why)
