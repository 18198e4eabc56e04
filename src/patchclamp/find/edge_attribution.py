"""Edges of a circuit: which head or MLP matters to which other one, by integrated gradients (EAP-IG).

    score(u -> v) = sum over positions  (z'_u - z_u)^T  1/m sum_{k=1}^m  dM/d(what v reads)  at  z' + k/m (z - z')

z and z' are what a sender writes on the clean and the corrupt input, and the points lie between the input embeddings
of the two. A score is to first order what the metric M changes if this edge alone carries what its sender does on the
corrupt input. All edges take m forward and backward passes and a product of matrices for each receiver. The gradient
at the query, key or value of one head is that at its columns of the projection, taken back through the projection and
through the norm before it.

Edge attribution patching: Aaquib Syed, Can Rager, Arthur Conmy (2023); the integral: Michael Hanna, Sandro Pezzelle,
Yonatan Belinkov, "Have Faith in Faithfulness" (2024).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch

from patchclamp.attribution import Target, gradients
from patchclamp.attribution.targets import logits_at
from patchclamp.errors import DataError
from patchclamp.find.residual_graph import EMBEDDING, LOGITS, ResidualGraph, Written, pair_inputs, residual_graph
from patchclamp.model import Model, Site
from patchclamp.model.weights import projection_weights
from patchclamp.neurons import Neurons
from patchclamp.published import published


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges that are kept, all of them on a path from the embedding to the logits.

    Attributes:
        edges: `sender`, `receiver`, `score`, largest magnitude first.
        numbers: which edges of the attribution they are, in the same order, int64.
        graph: the decoder as a graph.
    """

    edges: pl.DataFrame
    numbers: np.ndarray
    graph: ResidualGraph

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def heads(self) -> tuple[str, ...]:
        """The attention heads of the circuit, `attn.layer.head`, in the order of the network."""
        senders = set(self.edges["sender"])
        return tuple(each for each in self.graph.senders if each in senders and each.startswith("attn."))

    def neurons(self) -> Neurons:
        """The neurons of the heads, to ablate: columns of the attention sites."""
        return head_neurons(self.graph, self.heads)


@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """Scores of all edges of a decoder on pairs of inputs.

    Attributes:
        scores: `[examples, edges]` float64, in units of the metric; edges in the order of `graph.edges`.
        clean: `[examples]` float64, the metric on the clean inputs.
        corrupt: the same on the corrupt ones.
        graph: the decoder as a graph.
    """

    scores: np.ndarray
    clean: np.ndarray
    corrupt: np.ndarray
    graph: ResidualGraph
    _runs: tuple[tuple[Mapping[str, Any], Target, Written], ...]

    @cached_property
    def edges(self) -> pl.DataFrame:
        """All edges, largest magnitude first: `sender`, `receiver`, `score`, the mean over examples."""
        score = self.scores.mean(0)
        return self._table(np.argsort(-np.abs(score), kind="stable"), score)

    def top(self, n: int, *, greedy: bool = False, examples: np.ndarray | None = None) -> Circuit:
        """The circuit of the n edges of largest magnitude, less those that lie on no path from input to output.

        Args:
            n: edges before pruning; edges of score 0 are never taken.
            greedy: grow from the logits: each time the largest edge into a node that the circuit has.
            examples: numbers of the examples whose mean counts, repeated ones too, as in a bootstrap; None: all.

        Raises:
            DataError: n is below 1.
        """
        if n < 1:
            raise DataError(f"a circuit has 1 edge or more, not {n}")
        score = (self.scores if examples is None else self.scores[examples]).mean(0)
        chosen = _greedy(self.graph, score, n) if greedy else np.argsort(-np.abs(score), kind="stable")[:n]
        kept = _pruned(self.graph, chosen[score[chosen] != 0])
        return Circuit(self._table(kept, score), kept, self.graph)

    def heads(self, n: int, *, greedy: bool = False) -> tuple[str, ...]:
        """The heads of the circuit of n edges."""
        return self.top(n, greedy=greedy).heads

    def faithfulness(self, circuit: Circuit | int, *, greedy: bool = False) -> float:
        """(M(circuit) - M(corrupt)) / (M(clean) - M(corrupt)), all other edges as on the corrupt inputs; exact.

        Args:
            circuit: a circuit of this decoder, or the number of edges.
            greedy: as in `top`, where a number is given.

        Returns:
            1 for a circuit that does all, 0 for one that does nothing.

        Raises:
            DataError: the metric is the same on the clean and the corrupt inputs.
        """
        whole = float((self.clean - self.corrupt).mean())
        if abs(whole) < 1e-12:
            raise DataError("the metric is the same on the clean and on the corrupt inputs: nothing is to be explained")
        value = self.values(self.top(circuit, greedy=greedy) if isinstance(circuit, int) else circuit)
        return float((value - self.corrupt).mean()) / whole

    def values(self, circuit: Circuit | np.ndarray) -> np.ndarray:
        """The metric of each example where only some edges are as on the clean inputs: `[examples]` float64.

        Args:
            circuit: a circuit, or numbers of edges.
        """
        numbers = circuit.numbers if isinstance(circuit, Circuit) else np.asarray(circuit, dtype=np.int64)
        sender, receiver = self.graph.edges
        kept = np.zeros((len(self.graph.receivers), len(self.graph.senders)), bool)
        kept[receiver[numbers], sender[numbers]] = True
        found = [self.graph.run_circuit(call, target, corrupt, kept) for call, target, corrupt in self._runs]
        return torch.cat(found).double().cpu().numpy()

    @classmethod
    def joined(cls, parts: Sequence[EdgeAttribution]) -> EdgeAttribution:
        """Attributions of one decoder on several batches, as one.

        Raises:
            DataError: there are none, or they are of several models.
        """
        if not parts or any(each.graph.model is not parts[0].graph.model for each in parts):
            raise DataError("attributions that are joined are of one and the same model")
        return cls(
            scores=np.concatenate([each.scores for each in parts]),
            clean=np.concatenate([each.clean for each in parts]),
            corrupt=np.concatenate([each.corrupt for each in parts]),
            graph=parts[0].graph,
            _runs=tuple(run for each in parts for run in each._runs),
        )

    def _table(self, numbers: np.ndarray, score: np.ndarray) -> pl.DataFrame:
        sender, receiver = self.graph.edges
        return pl.DataFrame(
            {
                "sender": [self.graph.senders[each] for each in sender[numbers]],
                "receiver": [self.graph.receivers[each].name for each in receiver[numbers]],
                "score": score[numbers],
            },
            schema={"sender": pl.String, "receiver": pl.String, "score": pl.Float64},
        )


@published(
    row="S043",
    title="Thinking Sparks!: Emergent Attention Heads in Reasoning Models During Post Training",
    authors="Park et al.",
    year=2025,
    url="https://arxiv.org/abs/2509.25758",
    part="circuit",
)
def eap_ig(model: Model, clean: Any, corrupt: Any, target: Target | str, *, steps: int = 5) -> EdgeAttribution:
    """Score every edge between embedding, heads, MLPs and logits of a decoder (EAP-IG, as in Park et al., 2025).

    All pairs are run at once: `[senders, examples, tokens, d]` numbers are kept. `EdgeAttribution.joined` puts several
    batches together.

    Args:
        model: a decoder of the GPT-2 or Llama family (Mistral, Qwen, ...): a norm before attention and before the MLP.
            Heads that share their keys and values share these two receivers.
        clean: texts, or the keyword arguments of the module.
        corrupt: as many, each with as many tokens as its partner.
        target: the metric M, `(output, inputs) -> [examples]`, such as `logit_difference(right, wrong)`; or "kl", the
            divergence of the last token's prediction from the clean one, in nats.
        steps: points between the two embeddings, m; 1 is edge attribution patching at the clean input.

    Raises:
        ModelError: another kind of network, or one whose heads and MLPs do not simply add to the residual stream.
        DataError: pairs of unequal length, a pair of twice the same, no steps, another metric.
    """
    if steps < 1:
        raise DataError(f"an integral has 1 step or more, not {steps}")
    graph = residual_graph(model)
    call, other = pair_inputs(model, clean, corrupt)
    metric = _metric(model, call, target)
    here, there = graph.run(call, metric), graph.run(other, metric)
    differences = graph.differences(here, there)
    total = torch.zeros(len(here.value), len(graph.edges[0]), dtype=torch.float64)
    for step in range(1, steps + 1):
        point = there.embedding + step / steps * (here.embedding - there.embedding)
        total += _scores(graph, call, metric, point, differences) / steps
    clean_value, corrupt_value = (each.value.double().cpu().numpy() for each in (here, there))
    return EdgeAttribution(total.numpy(), clean_value, corrupt_value, graph, ((call, metric, there),))


def head_neurons(graph: ResidualGraph, heads: Sequence[str]) -> Neurons:
    """The neurons of heads `attn.layer.head`: what enters the output projection, to ablate or scale."""
    found: dict[str, list[int]] = {}
    for head in heads:
        site, indices = graph.head_neurons(head)
        found.setdefault(site, []).extend(indices)
    return Neurons(found)


# Helpers --------------------------------------------------------------------------------------------


def _metric(model: Model, call: Mapping[str, Any], target: Target | str) -> Target:
    if callable(target):
        return target
    if target != "kl":
        raise DataError(f'the metric is a target such as logit_difference(right, wrong), or "kl", not {target!r}')
    with model.evaluating(), torch.no_grad():
        wanted = logits_at(model.module(**call), call).log_softmax(-1)

    def divergence(output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        given = logits_at(output, inputs).log_softmax(-1)
        return (wanted.exp() * (wanted - given)).sum(-1)

    return divergence


def _scores(
    graph: ResidualGraph, call: Mapping[str, Any], target: Target, point: torch.Tensor, differences: torch.Tensor
) -> torch.Tensor:
    """Scores of all edges at one point of the path, `[examples, edges]`."""
    norms = list(dict.fromkeys(each.norm for each in graph.receivers))
    paths = list(dict.fromkeys(each.projection for each in graph.receivers if each.projection is not None))
    sites = [Site.custom(each, "input") for each in norms] + [Site.custom(each) for each in paths]
    edit = (graph.model.site("resid_pre.0"), lambda _: point)
    seen = gradients(graph.model, call, target, sites, before=[edit])
    found: dict[int, torch.Tensor] = {}
    for norm in norms:
        own = [number for number, each in enumerate(graph.receivers) if each.norm == norm]
        at_norm = Site.custom(norm, "input").name
        if graph.receivers[own[0]].projection is None:
            slopes = seen.gradients[at_norm][None]
        else:
            behind = [_before_projection(graph, number, seen.gradients) for number in own]
            slopes = _before_norm(
                graph.model.module.get_submodule(norm), seen.activations[at_norm], torch.stack(behind)
            )
        senders = graph.receivers[own[0]].senders
        # z' - z is what counts: the negative of what the differences hold.
        scores = -torch.einsum("rbtd,sbtd->brs", slopes, differences[:senders]).double().cpu()
        found |= {number: scores[:, place] for place, number in enumerate(own)}
    return torch.cat([found[number] for number in range(len(graph.receivers))], 1)


def _before_projection(graph: ResidualGraph, number: int, slopes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The gradient at a projection's columns of one receiver, as one at what enters the projection."""
    receiver = graph.receivers[number]
    assert receiver.projection is not None
    weights = projection_weights(graph.model.module.get_submodule(receiver.projection), receiver.projection).detach()
    return slopes[Site.custom(receiver.projection).name][..., receiver.columns] @ weights[:, receiver.columns].T


def _before_norm(norm: torch.nn.Module, given: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Gradients behind a norm `[receivers, examples, tokens, d]` as gradients before it."""
    with torch.enable_grad():
        repeated = given.expand_as(slopes).clone().requires_grad_()
        return torch.autograd.grad(norm.forward(repeated), repeated, slopes)[0]


def _greedy(graph: ResidualGraph, score: np.ndarray, n: int) -> np.ndarray:
    """Edges from the logits backward: each time the largest one into a node that is there already."""
    sender, receiver = graph.edges
    into: dict[str, list[int]] = {}
    for number in range(len(score)):
        for node in graph.receivers[receiver[number]].nodes:
            into.setdefault(node, []).append(number)
    there, chosen, seen = {LOGITS}, [], set()
    queue = [(-abs(score[each]), each) for each in into[LOGITS]]
    heapq.heapify(queue)
    while queue and len(chosen) < n:
        _, number = heapq.heappop(queue)
        if number in seen:
            continue
        seen.add(number)
        chosen.append(number)
        node = graph.senders[sender[number]]
        if node not in there:
            there.add(node)
            for each in into.get(node, []):
                heapq.heappush(queue, (-abs(score[each]), each))
    return np.asarray(chosen, dtype=np.int64)


def _pruned(graph: ResidualGraph, numbers: np.ndarray) -> np.ndarray:
    """The edges that lie on a path from the embedding to the logits."""
    sender, receiver = graph.edges
    order = sorted(numbers.tolist(), key=lambda each: receiver[each])
    reached, useful = {EMBEDDING}, {LOGITS}
    for each in order:
        if graph.senders[sender[each]] in reached:
            reached.update(graph.receivers[receiver[each]].nodes)
    for each in reversed(order):
        if useful.intersection(graph.receivers[receiver[each]].nodes):
            useful.add(graph.senders[sender[each]])
    kept = [
        graph.senders[sender[each]] in reached and bool(useful.intersection(graph.receivers[receiver[each]].nodes))
        for each in numbers
    ]
    return numbers[np.asarray(kept, dtype=bool)]
