"""Expertise: how well a neuron, taken as a detector, tells one label from the rest.

Each neuron's response to an example is one number; examples are sorted by it, and the average precision says how far
the examples of the label come first: 1 for a perfect detector, the label's share of the examples for a neuron that
does not care. Which pooling the paper used is not said where it could be read; the code that it builds on takes the
largest over tokens, and so does this unless it was recorded otherwise.
"""

from __future__ import annotations

import numpy as np

from patchclamp.errors import DataError
from patchclamp.find.labelled import Labelled, Labels, labelled, table
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording
from patchclamp.statistics import Ranked


@published(
    row="S074",
    title="On Relation-Specific Neurons in Large Language Models",
    authors="Liu et al.",
    year=2025,
    url="https://arxiv.org/abs/2502.17355",
    part="detector",
)
def expertise(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    absence: bool = False,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons that detect a label, by average precision, best first (Liu et al., 2025).

    Args:
        recording: with `Pooled("max")`, "mean", "last" or "fired".
        labels: a label of the data, or one value for each example.
        positive: score neurons for this category only; None: each against the rest.
        absence: score detectors of the absence of a label, those whose response is smallest on it.
        null: "permute" adds `p` and `q`; examples stay sorted, so each deal costs little.
        permutations: how often labels are dealt anew.
        seed: of that.

    Returns:
        All neurons: `score`, the average precision of its best label over that label's share of the examples
        (0 where it is no better than that, 1 where it is perfect); `label`; `score_<label>`;
        `average_precision`, that of the best label as it is.

    Raises:
        DataError: fewer than two labels, no `Pooled`.
        UnknownName: no such label or category.
    """
    given = labelled(recording, labels, positive)
    values = np.concatenate([given.pooled(site) for site in recording], axis=1)
    if given.codes is None:
        raise DataError("a label of tokens has no value for an example: expertise wants one for each example")
    there = ~np.isnan(values).any(1)
    ranked = Ranked(-values[there] if absence else values[there])

    def precisions(of: Labelled) -> np.ndarray:
        assert of.codes is not None
        codes = of.codes[there]
        return np.stack([ranked.average_precision(codes == each) for each in of.scored], axis=1)

    def above_chance(of: Labelled, precision: np.ndarray) -> np.ndarray:
        assert of.codes is not None
        share = np.asarray([(of.codes[there] == each).mean() for each in of.scored])
        return (precision - share) / (1 - share)

    precision = precisions(given)
    found = above_chance(given, precision)
    best = precision[np.arange(len(found)), found.argmax(1)]
    return table(
        given,
        found,
        {"average_precision": best},
        null=null,
        permutations=permutations,
        seed=seed,
        again=lambda of: above_chance(of, precisions(of)),
    )
