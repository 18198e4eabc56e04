"""Taylor awareness: what the loss on each label would feel, to first order, if a neuron were taken away.

    awareness[neuron, label] = mean over texts of the label, and over their tokens, of |h dL/dh|

A neuron whose awareness varies over labels is specific to the label on which it is largest; one of the others is
general. Losses of labels have different sizes (a language with long sentences, or one that the model barely knows), so
that the one with the largest would own every neuron: unlike the paper, and by default, the awareness of each label is
divided by its mean over all neurons.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
import torch

from patchclamp.attribution import Target, gradients, next_token_loss
from patchclamp.attribution.batches import batches
from patchclamp.errors import DataError, ModelError, unknown
from patchclamp.find.labelled import Labels
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.statistics import permutation_test


@published(
    row="S092",
    title="LANDeRMT: Detecting and Routing Language-Aware Neurons for Selectively Finetuning LLMs to Machine "
    "Translation",
    authors="Zhu, Pan, Li, Xiong",
    year=2024,
    url="https://arxiv.org/abs/2409.19523",
    part="detector",
)
def taylor(
    model: Model,
    data: Any,
    labels: Labels,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    *,
    target: Target | None = None,
    specific: float = 0.1,
    normalise: bool = True,
    batch: int = 32,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons that are specific to a label, by the first-order effect of removing them on the loss (Zhu et al., 2024).

    Args:
        model: a model whose weights may be frozen: only activations want gradients.
        data: `pc.Texts`, `pc.Tensors`, `pc.Images`, texts, a tensor or keyword arguments.
        labels: a label of the data, or one value for each example.
        sites: sites by name or glob.
        target: the loss of each example; None: the mean cross entropy of the next token.
        specific: share of each site's neurons, those of largest variance over labels, that are called specific.
        normalise: divide the awareness of each label by its mean over all neurons. Without it, as published, labels
            with a larger loss own more.
        batch: how many examples are run at once.
        null: "permute" adds `p` and `q` of the variance: labels are dealt anew over the examples.
        permutations: how often; no example is run again.
        seed: of that.

    Returns:
        All neurons, the most specific first: `score`, the variance over labels; `label`, the one it is most aware of;
        `kind`, "specific" or "general"; `awareness`, the mean over labels; `score_<label>`, the awareness of each.
        With `null`, `p` and `q`.

    Raises:
        DataError: fewer than two labels, a label without examples, a loss that no neuron changes.
        UnknownName: no such label.
    """
    names, codes = _codes(data, labels)
    if not 0 < specific <= 1:
        raise DataError(f"specific is the share of neurons that are called so, between 0 and 1, not {specific}")
    if null not in (None, "permute"):
        raise unknown("null", null, ["permute"])
    felt, sizes = _felt(model, data, target or next_token_loss(), sites, batch)
    if len(felt) != len(codes):
        raise DataError(f"{len(codes)} labels were given for {len(felt)} examples: one for each is wanted")
    aware = _aware(felt, codes, len(names), normalise)
    variance = aware.var(1)
    site = np.repeat(list(sizes), list(sizes.values()))
    kind = np.full(len(aware), "general", dtype=object)
    for each, size in sizes.items():
        here = np.flatnonzero(site == each)
        kind[here[np.argsort(-variance[here], kind="stable")[: max(1, round(specific * size))]]] = "specific"
    frame: dict[str, Any] = {
        "site": site,
        "index": np.concatenate([np.arange(size) for size in sizes.values()]),
        "score": variance,
        "label": [names[each] for each in aware.argmax(1)],
        "kind": kind.tolist(),
        "awareness": aware.mean(1),
        **{f"score_{name}": aware[:, place] for place, name in enumerate(names)},
    }
    if null is not None:
        test = permutation_test(
            lambda dealt: _aware(felt, dealt, len(names), normalise).var(1),
            codes,
            permutations=permutations,
            seed=seed,
        )
        frame |= {"p": test.p, "q": test.q}
    return Neurons.from_polars(pl.DataFrame(frame)[np.argsort(-variance, kind="stable")])


# Helpers --------------------------------------------------------------------------------------------


def _codes(data: Any, labels: Labels) -> tuple[list[str], np.ndarray]:
    """The labels, sorted, and the place of each example's."""
    if isinstance(labels, str):
        known: Any = getattr(data, "labels", {})
        if labels not in known:
            raise unknown("label of the data", labels, known, "Or give one value for each example.")
        values = [each.labels[labels] for each in data]
    else:
        values = [str(each) for each in labels]
    names, codes = np.unique(values, return_inverse=True)
    if len(names) < 2:
        raise DataError(f"at least two labels are wanted, and all examples have {', '.join(map(str, names))!r}")
    return [str(each) for each in names], codes.astype(np.int64)


def _felt(model: Model, data: Any, target: Target, sites: Any, batch: int) -> tuple[np.ndarray, dict[str, int]]:
    """`[examples, neurons]` float64: mean over tokens of |h dL/dh|; and how many neurons each site has."""
    rows: list[np.ndarray] = []
    sizes: dict[str, int] = {}
    for call, goal, _ in batches(model, data, target, batch):
        seen = gradients(model, call, goal, sites)
        parts = []
        for site, slope in seen.gradients.items():
            effect = (seen.activations[site] * slope).abs().double()
            parts.append(_mean_over_tokens(effect, seen.masks.get(site)))
            sizes[site] = effect.shape[-1]
        rows.append(torch.cat(parts, 1).cpu().numpy())
    felt = np.concatenate(rows)
    if not felt.any():
        raise ModelError("no neuron of these sites changes the loss: all gradients are 0")
    return felt, sizes


def _mean_over_tokens(effect: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`[examples, size]`."""
    if mask is None:
        return effect.flatten(1, -2).mean(1) if effect.ndim > 2 else effect
    rows = effect.flatten(2, -2).mean(2) if effect.ndim > 3 else effect
    return (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _aware(felt: np.ndarray, codes: np.ndarray, labels: int, normalise: bool) -> np.ndarray:
    """`[neurons, labels]`."""
    which = np.eye(labels)[codes]
    aware = (felt.T @ which) / which.sum(0)
    return aware / np.maximum(aware.mean(0), np.finfo(np.float64).tiny) if normalise else aware
