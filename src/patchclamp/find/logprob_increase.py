"""Which neurons raise the log probability of a token by being added, one at a time?

At the last position, with r the residual stream just before the MLP of a layer is added and u what one neuron adds,

    increase = lp(r + u) - lp(r),    lp(x) = log softmax(unembedding(g * x / size))[token]

where `size`, what the last norm divides by, is held at what it was for the last layer's output, so that the norm is a
fixed scaling (a LayerNorm still centres, and adds its bias). Nothing of the size [neurons, vocabulary] is held: what
neurons write is taken through the unembedding some at a time, and

    increase = d[token] - log(sum over tokens t of p[t] exp(d[t])),    d = logits(r + u) - logits(r)

with p the softmax of logits(r), needs no difference of two large numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch

from patchclamp.attribution.targets import logits_at
from patchclamp.errors import DataError, ModelError
from patchclamp.find.asked import token_ids
from patchclamp.find.stream import Branch, Layer, Lens, Watch, last_columns
from patchclamp.intervene import ablate
from patchclamp.model import Model, Site
from patchclamp.model.readout import Readout
from patchclamp.neurons import Neurons
from patchclamp.published import published

Tokens = str | int | Sequence[str | int]


@published(
    row="S102",
    title="Interpreting Arithmetic Mechanism in Large Language Models through Comparative Neuron Analysis",
    authors="Zeping Yu, Sophia Ananiadou",
    year=2024,
    url="https://arxiv.org/abs/2409.14144",
    part="log probability increase",
)
def logprob_increase(
    model: Model,
    inputs: str | Sequence[str],
    tokens: Tokens,
    sites: str | Site | Sequence[str | Site] = "mlp.*",
    *,
    memory: int = 1 << 26,
) -> Neurons:
    """Neurons by how much adding what each wrote raises the log probability of a token (Yu and Ananiadou, 2024).

    Args:
        model: a decoder with a readout.
        inputs: texts; what comes after each is asked.
        tokens: the token after each text, by its string (of several tokens the first counts) or id; one for all.
        sites: whose neurons: of an MLP, or of anything else that writes into the residual stream.
        memory: most bytes of what is taken through the unembedding at once.

    Returns:
        All neurons of the sites, best first: `score`, in nats, the mean over texts.

    Raises:
        DataError: no texts, another number of tokens than of texts, a string that is no token.
        ModelError: the model has no readout, or what the neurons add to the residual stream cannot be told from
            the rest of their block.
    """
    return table(Pass.of(model, inputs, tokens, sites).increases(memory))


def head_importance(model: Model, inputs: str | Sequence[str], tokens: Tokens) -> pl.DataFrame:
    """How much the probability of a token falls when one attention head is silenced, at all positions.

    What is set to zero is the head's slice of what enters the output projection of attention, so heads that share keys
    and values are apart too.

    Args:
        model: a decoder with a tokenizer.
        inputs: texts.
        tokens: the token after each text; one for all.

    Returns:
        One row for each head, the largest drop first: `site`, `head`, `drop` of the mean probability, and
        `accuracy_drop`, of the share of texts after which the token is the likeliest.

    Raises:
        DataError: as `logprob_increase`.
        ModelError: the model has no attention heads that can be told apart.
    """
    texts, ids = _asked(model, inputs, tokens)
    heads = [(site, head) for site in model.sites.values() if site.kind == "attn" for head in range(site.heads or 0)]
    if not heads:
        raise ModelError(f"{model.name} has no attention heads that can be told apart: {model.explain_sites()}")
    plain, right = _probability(model, texts, ids)
    rows = []
    for site, head in heads:
        with model.intervene(ablate(Neurons({site.name: site.head(head)}))):
            without, still = _probability(model, texts, ids)
        rows.append((site.name, head, plain - without, right - still))
    schema = {"site": pl.String, "head": pl.Int64, "drop": pl.Float64, "accuracy_drop": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("drop", descending=True, maintain_order=True)


# What `comparative` shares -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass of some texts wrote at their last tokens.

    Attributes:
        lens: the readout with its norm held.
        layers: the blocks.
        names: the sites that are asked about.
        ids: `[examples]`, the tokens.
    """

    lens: Lens
    layers: list[Layer]
    names: list[str]
    ids: torch.Tensor

    @classmethod
    def of(
        cls,
        model: Model,
        inputs: str | Sequence[str],
        tokens: Tokens,
        sites: str | Site | Sequence[str | Site],
        readout: Readout | None = None,
    ) -> Pass:
        """Run the texts, with the interventions that are in force; `readout`: the model's, if it is known already."""
        texts, ids = _asked(model, inputs, tokens)
        readout = model.readout if readout is None else readout
        chosen = model.select(sites)
        stack = model.site(readout.residual).stack
        given = model.inputs(texts)
        watch = Watch(model, stack, last_columns(given))
        writing = {site.name for site in watch.branches}
        if wrong := [site.name for site in chosen if site.name not in writing]:
            raise ModelError(f"{wrong[0]} does not write into the residual stream that is read at {readout.residual}")
        with model.evaluating(), torch.no_grad(), watch.reading():
            model.module(**given)
        layers = watch.layers()
        return cls(Lens.of(model, readout, layers[-1].after), layers, [site.name for site in chosen], torch.tensor(ids))

    def increases(self, memory: int) -> dict[str, np.ndarray]:
        """Site -> `[neurons]` float64, the increase in nats, mean over examples."""
        found = {}
        for layer in self.layers:
            for branch in layer.branches:
                if branch.site.name in self.names:
                    _refuse_unclear(layer, branch)
                    found[branch.site.name] = _increase(self.lens, layer, branch, self.ids, memory)
        for name in self.names:
            if name not in found:
                raise ModelError(f"{name} was given no last token, so that nothing is to be said of its neurons")
        return {name: found[name] for name in self.names}


def table(scores: dict[str, np.ndarray], others: dict[str, dict[str, np.ndarray]] | None = None) -> Neurons:
    """Neurons with `score` and other columns, best first."""
    frames = []
    for site, values in scores.items():
        columns = {name: each[site] for name, each in (others or {}).items()}
        frames.append(pl.DataFrame({"site": site, "index": np.arange(len(values)), "score": values, **columns}))
    return Neurons.from_polars(pl.concat(frames).sort("score", descending=True, maintain_order=True))


# Helpers --------------------------------------------------------------------------------------------

# exp of more than this overflows float32.
_LARGE = 60.0


def _asked(model: Model, inputs: str | Sequence[str], tokens: Tokens) -> tuple[list[str], list[int]]:
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    if not texts:
        raise DataError("there are no texts")
    return texts, token_ids(model, tokens, len(texts))


def _probability(model: Model, texts: list[str], ids: list[int]) -> tuple[float, float]:
    """Mean probability of the tokens, and how often they are the likeliest."""
    given = model.inputs(texts)
    with model.evaluating(), torch.no_grad():
        logits = logits_at(model.module(**given), given)
    wanted = torch.tensor(ids, device=logits.device)
    chance = logits.double().softmax(-1).gather(1, wanted[:, None])
    return float(chance.mean()), float((logits.argmax(-1) == wanted).double().mean())


def _refuse_unclear(layer: Layer, branch: Branch) -> None:
    if not layer.adds:
        why = "normalises its sums" if layer.norms else "does more than add what its projections return"
        raise ModelError(f"{branch.site.name}: block {layer.number} {why}, so there is no residual stream before it")


def _increase(lens: Lens, layer: Layer, branch: Branch, ids: torch.Tensor, memory: int) -> np.ndarray:
    """`[neurons]`, mean over examples."""
    before = lens.logits(layer.after - branch.written)
    chances = lens.capped(before).log_softmax(-1)
    # What a neuron writes for each unit of its activation goes through the unembedding once for all examples.
    factor = branch.factor / lens.size.to(branch.factor)
    if branch.norm is not None:
        factor = factor / branch.norm.size
    times = branch.activations.double() * factor[:, None]
    rows = max(1, memory // (16 * before.shape[1]))
    total = torch.zeros(len(branch.weights), dtype=torch.float64)
    for start in range(0, len(total), rows):
        part = slice(start, start + rows)
        written = branch.weights[part].detach().float()
        written = written if branch.norm is None else branch.norm.linear(written)
        unit = lens.readout.directions(written)
        for example in range(len(ids)):
            change = times[example, part, None].to(unit) * unit
            if lens.readout.softcap is not None:
                base = before[example].to(change)
                change = lens.capped(base + change) - lens.capped(base)
            total[part] += _gain(change, chances[example].to(change), int(ids[example])).double().cpu()
    return (total / len(ids)).numpy()


def _gain(change: torch.Tensor, chances: torch.Tensor, token: int) -> torch.Tensor:
    """`[rows]`: by how much the log probability of a token rises if the logits change by `[rows, vocabulary]`."""
    normaliser = torch.log1p(torch.expm1(change.clamp(max=_LARGE)) @ chances.exp())
    large = change.amax(1) > _LARGE
    if bool(large.any()):
        normaliser[large] = (chances + change[large]).logsumexp(1)
    return change[:, token] - normaliser
