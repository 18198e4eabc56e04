"""A decoder as a graph: who writes into the residual stream, and who reads what was written there.

    senders    embedding, each attention head, each MLP
    receivers  query, key and value of each head, each MLP, logits

A receiver reads the sum of all senders before it, behind its own norm. So each edge, from one sender to one receiver,
can be given what the sender does on another input while all other edges stay as they are. This holds for decoders
whose blocks have a norm in front of attention and MLP and add what these give to the residual stream: those of the
GPT-2 and Llama families. Whether what the senders write adds up is tried on the inputs that are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from patchclamp.attribution import Target
from patchclamp.attribution.engine import checked_value
from patchclamp.errors import DataError, ModelError
from patchclamp.model import Model, Site
from patchclamp.model.hooks import Edit, hooked
from patchclamp.model.weights import projection_weights

EMBEDDING, LOGITS = "embedding", "logits"


@dataclass(frozen=True)
class Receiver:
    """One place where the residual stream is read.

    Attributes:
        name: `attn.1.0.query`, `mlp.1` or `logits`; where heads share their key and value, `attn.1.0-3.key`.
        nodes: of which nodes it is an input: `attn.1.0`, or several heads, or `mlp.1`, or `logits`.
        norm: dotted path of the norm through which it reads.
        senders: how many senders, in their order, write before it reads.
        projection: dotted path of the projection to queries, keys or values; None for an MLP and logits.
        columns: the columns of that projection which are its own.
    """

    name: str
    nodes: tuple[str, ...]
    norm: str
    senders: int
    projection: str | None = None
    columns: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True, eq=False)
class Written:
    """What one run wrote and read.

    Attributes:
        read: norm -> what enters it, `[examples, tokens, d]`.
        heads: attention site -> what its heads give, `[examples, tokens, size]`.
        mlps: path of an MLP -> what it returns, `[examples, tokens, d]`.
        embedding: `[examples, tokens, d]`.
        value: `[examples]`, the target.
    """

    read: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor]
    mlps: dict[str, torch.Tensor]
    embedding: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True, eq=False)
class ResidualGraph:
    """The senders and receivers of one decoder. Made by `residual_graph`.

    Attributes:
        model: the decoder.
        senders: names, in the order in which they write.
        receivers: in the order in which they read.
        layers: attention site and path of the MLP of each block.
    """

    model: Model
    senders: tuple[str, ...]
    receivers: tuple[Receiver, ...]
    layers: tuple[tuple[Site, str], ...]

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the sender and of the receiver of every edge, `[edges]` each; receivers one after another."""
        receiver = np.repeat(np.arange(len(self.receivers)), [each.senders for each in self.receivers])
        return np.concatenate([np.arange(each.senders) for each in self.receivers]), receiver

    def head_neurons(self, name: str) -> tuple[str, range]:
        """The attention site of the head `attn.1.0` and the indices of its neurons there."""
        layer, head = (int(each) for each in name.split(".")[1:])
        site = self.layers[layer][0]
        return site.name, site.head(head)

    def run(self, call: Mapping[str, Any], target: Target) -> Written:
        """One plain run."""
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Edit:
            def see(tensor: torch.Tensor) -> torch.Tensor:
                kept[name] = tensor.detach().clone()
                return tensor

            return see

        norms = dict.fromkeys(each.norm for each in self.receivers)
        sites = [Site.custom(norm, "input") for norm in norms]
        sites += [site for site, _ in self.layers] + [Site.custom(mlp) for _, mlp in self.layers]
        start = self.model.site("resid_pre.0")
        value = self._value(call, target, [(start, keep(EMBEDDING)), *((site, keep(site.name)) for site in sites)])
        return Written(
            {norm: kept[Site.custom(norm, "input").name] for norm in norms},
            {site.name: kept[site.name] for site, _ in self.layers},
            {mlp: kept[Site.custom(mlp).name] for _, mlp in self.layers},
            kept[EMBEDDING],
            value,
        )

    def differences(self, clean: Written, corrupt: Written) -> torch.Tensor:
        """What each sender writes on the clean inputs less on the corrupt ones, `[senders, examples, tokens, d]`.

        Raises:
            ModelError: they do not add up to the difference of what the receivers read.
        """
        found = [(clean.embedding - corrupt.embedding)[None]]
        for site, mlp in self.layers:
            found.append(self._by_head(site, clean.heads[site.name] - corrupt.heads[site.name]))
            found.append((clean.mlps[mlp] - corrupt.mlps[mlp])[None])
        whole = torch.cat(found)
        for each in {each.norm: each for each in self.receivers}.values():
            wanted = clean.read[each.norm] - corrupt.read[each.norm]
            error = float((whole[: each.senders].sum(0) - wanted).abs().max())
            if error > 1e-3 * float(wanted.abs().max()) + 1e-5:
                raise ModelError(
                    f"what the heads and MLPs of {self.model.name} write does not add up to what {each.norm} reads: "
                    "it is normed, scaled or gated on its way into the residual stream"
                )
        return whole

    def run_circuit(self, call: Mapping[str, Any], target: Target, corrupt: Written, kept: np.ndarray) -> torch.Tensor:
        """The target where only some edges carry what their senders do here, and all others what they do elsewhere.

        Args:
            call: the clean inputs.
            target: of what.
            corrupt: the run on the corrupt inputs.
            kept: `[receivers, senders]` bool, edges that carry what their sender does in this very run.

        Returns:
            `[examples]`.
        """
        there = torch.as_tensor(kept, device=corrupt.embedding.device)
        written: list[torch.Tensor] = []

        def read(numbers: Sequence[int]) -> torch.Tensor:
            """What these receivers of one norm read, `[receivers, examples, tokens, d]`."""
            one = self.receivers[numbers[0]]
            whole = torch.cat(written)[: one.senders]
            weight = there[list(numbers), : one.senders].to(whole.dtype)
            return corrupt.read[one.norm] + torch.einsum("rs,sbtd->rbtd", weight, whole)

        def sent(difference: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
            written.append(difference)
            return tensor

        edits: list[tuple[Site, Edit]] = [
            (self.model.site("resid_pre.0"), lambda tensor: sent((tensor - corrupt.embedding)[None].clone(), tensor))
        ]
        edits += [(Site.custom(path), self._projected(path, read)) for path in self._projections()]
        edits += [
            (Site.custom(each.norm, "input"), lambda _, number=number: read([number])[0])
            for number, each in enumerate(self.receivers)
            if each.projection is None
        ]
        for site, mlp in self.layers:
            foreign = corrupt.heads[site.name]
            edits.append(
                (site, lambda tensor, site=site, foreign=foreign: sent(self._by_head(site, tensor - foreign), tensor))
            )
            given = corrupt.mlps[mlp]
            edits.append((Site.custom(mlp), lambda tensor, given=given: sent((tensor - given)[None], tensor)))
        return self._value(call, target, edits)

    def _projections(self) -> dict[str, list[int]]:
        """Path of a projection -> the receivers that are columns of it."""
        found: dict[str, list[int]] = {}
        for number, each in enumerate(self.receivers):
            if each.projection is not None:
                found.setdefault(each.projection, []).append(number)
        return found

    def _projected(self, path: str, read: Any) -> Edit:
        numbers = self._projections()[path]
        module: Any = self.model.module.get_submodule(path)
        norm = self.model.module.get_submodule(self.receivers[numbers[0]].norm)
        weights = projection_weights(module, path)

        def edit(tensor: torch.Tensor) -> torch.Tensor:
            normed = norm.forward(read(numbers))
            changed = torch.empty_like(tensor)
            for place, number in enumerate(numbers):
                columns = self.receivers[number].columns
                bias = 0 if module.bias is None else module.bias[columns]
                changed[..., columns] = normed[place] @ weights[:, columns] + bias
            return changed

        return edit

    def _by_head(self, site: Site, tensor: torch.Tensor) -> torch.Tensor:
        """What enters the output projection, as what each head writes: `[heads, examples, tokens, d]`."""
        heads = int(site.heads or 1)
        weights = self.model.output_weights(site).detach()
        parts = tensor.unflatten(-1, (heads, -1))
        return torch.einsum("bthc,hcd->hbtd", parts, weights.unflatten(0, (heads, -1)).to(parts))

    def _value(self, call: Mapping[str, Any], target: Target, edits: list[tuple[Site, Edit]]) -> torch.Tensor:
        with self.model.evaluating(), torch.no_grad(), hooked(self.model.module, edits):
            output = self.model.module(**call)
        return checked_value(target(output, call), call).detach()


def residual_graph(model: Model) -> ResidualGraph:
    """The graph of a decoder.

    Raises:
        ModelError: it is not a decoder of the GPT-2 or Llama kind; the reason is given.
    """
    attentions = [site for site in model.sites.values() if site.kind == "attn"]
    if not attentions or any(site.stack for site in attentions) or "resid_pre.0" not in model.sites:
        raise ModelError(f"{model.name} has no single stack of attention blocks beside a residual stream")
    senders, receivers, layers = [EMBEDDING], [], []
    stack = ""
    for layer, site in enumerate(attentions):
        attention = (site.writes or "").rpartition(".")[0]
        block = attention.rpartition(".")[0]
        stack = block.rpartition(".")[0].rpartition(".")[0]
        norms, projections = _kind(model, block, attention)
        heads, size = int(site.heads or 1), int(site.size or 0)
        width = size // heads
        for role, (path, first) in projections.items():
            outputs = size if "c_attn" in path else projection_weights(model.module.get_submodule(path), path).shape[1]
            groups = outputs // width
            for group in range(groups):
                shared = range(group * heads // groups, (group + 1) * heads // groups)
                number = f"{shared[0]}" if len(shared) == 1 else f"{shared[0]}-{shared[-1]}"
                columns = slice(first + group * width, first + (group + 1) * width)
                nodes = tuple(f"attn.{layer}.{head}" for head in shared)
                receivers.append(
                    Receiver(f"attn.{layer}.{number}.{role}", nodes, norms[0], len(senders), path, columns)
                )
        senders += [f"attn.{layer}.{head}" for head in range(heads)]
        receivers.append(Receiver(f"mlp.{layer}", (f"mlp.{layer}",), norms[1], len(senders)))
        senders.append(f"mlp.{layer}")
        layers.append((site, f"{block}.mlp"))
    modules = dict(model.module.named_modules())
    final = next((path for path in (f"{stack}.ln_f", f"{stack}.norm") if path in modules), None)
    if final is None:
        raise ModelError(f"{model.name} has no norm between its last block and the logits")
    receivers.append(Receiver(LOGITS, (LOGITS,), final, len(senders)))
    return ResidualGraph(model, tuple(senders), tuple(receivers), tuple(layers))


def pair_inputs(model: Model, clean: Any, corrupt: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments of the module for pairs of texts or of given arguments.

    Raises:
        DataError: the two of a pair have not equally many tokens, or are the same.
    """
    calls = []
    for given in (clean, corrupt):
        if isinstance(given, torch.Tensor):
            raise DataError('pairs are texts, or keyword arguments of the module: {"input_ids": ids}')
        calls.append(dict(given) if isinstance(given, Mapping) else model.inputs(given))
    one, other = calls
    ids = [each.get("input_ids") for each in calls]
    if any(each is None for each in ids):
        raise DataError("a decoder reads input_ids; the keyword arguments have none")
    if len(ids[0]) != len(ids[1]):
        raise DataError(f"{len(ids[0])} clean and {len(ids[1])} corrupt inputs are no pairs")
    masks = [torch.as_tensor(each.get("attention_mask", torch.ones_like(each["input_ids"]))) for each in calls]
    for number, (first, second) in enumerate(zip(masks[0], masks[1], strict=True)):
        if int(first.sum()) != int(second.sum()):
            raise DataError(
                f"pair {number} has {int(first.sum())} and {int(second.sum())} tokens: edges are patched token by token"
            )
    if masks[0].shape != masks[1].shape or not torch.equal(masks[0], masks[1]):
        raise DataError("the clean and the corrupt inputs are padded in different ways")
    same = ((ids[0] == ids[1]) | (masks[0] == 0)).all(1)
    if bool(same.any()):
        raise DataError(f"the two of pair {int(same.nonzero()[0])} are the same: there is nothing to tell apart")
    return one, other


def _kind(model: Model, block: str, attention: str) -> tuple[list[str], dict[str, tuple[str, int]]]:
    """Paths of a block's two norms, and of its projections with the column at which each begins."""
    modules = dict(model.module.named_modules())
    kinds = {
        ("ln_1", "ln_2", "mlp"): ("c_attn",),
        ("input_layernorm", "post_attention_layernorm", "mlp"): ("q_proj", "k_proj", "v_proj"),
    }
    for parts, projections in kinds.items():
        there = [f"{block}.{each}" in modules for each in parts] + [
            f"{attention}.{each}" in modules for each in projections
        ]
        if not all(there):
            continue
        others = [each for each in modules if each.rpartition(".")[0] == block]
        known = {f"{block}.{each}" for each in parts} | {attention}
        if extra := [each for each in others if each not in known]:
            raise ModelError(f"{model.name}: what {extra[0]} does to the residual stream is not known")
        norms = [f"{block}.{each}" for each in parts[:2]]
        if len(projections) == 3:
            roles = zip(("query", "key", "value"), projections, strict=True)
            return norms, {role: (f"{attention}.{each}", 0) for role, each in roles}
        size = projection_weights(modules[f"{attention}.c_attn"], attention).shape[1] // 3
        return norms, {
            role: (f"{attention}.c_attn", size * place) for place, role in enumerate(("query", "key", "value"))
        }
    raise ModelError(
        f"{model.name}: {block} is no block of the GPT-2 or Llama kind, with a norm before attention, one before the "
        "MLP, and projections to queries, keys and values that lie apart: its edges are not separable here"
    )
