"""Neurons with an outlying weight in a linear probe.

Each site has a probe: a logistic regression that tells examples of a label from the rest by all neurons of the site,
each in standard deviations. A neuron's score is how far its weight lies from the others of the site:

    z = (w - mean of w) / standard deviation of w

and those with a large z name the label, at sites whose probe holds on examples that it has not seen. This is the
finder of the paper alone; what silencing them does to a behaviour is a matter of its own.

A weight is no cause. Neurons that say the same share one weight among them: a label that many neurons carry has many
small weights, and none may stand out. Silence what is found, and look.
"""

from __future__ import annotations

import numpy as np

from patchclamp.errors import DataError, warn
from patchclamp.find.labelled import Labelled, Labels, labelled, table
from patchclamp.find.probes import Examples, Logistic, Scale, balance, examples, folds
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording

_FOLDS, _FEW = 5, 50


@published(
    row="S007",
    title="NeuroStrike: Neuron-Level Attacks on Aligned LLMs",
    authors="Wu et al.",
    year=2025,
    url="https://arxiv.org/abs/2509.11864",
    part="detector",
)
def probe_neurons(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    z: float = 3.0,
    C: float = 1.0,
    least_accuracy: float = 0.7,
    groups: Labels | None = None,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons with an outlying weight in a probe for a label, best first (Wu et al., 2025).

    Args:
        recording: with `Pooled`; the paper's is `Pooled("max")` of the gate of an MLP.
        labels: a label of the data, or one value for each example.
        positive: score neurons for this category only; None: each against the rest.
        z: a neuron is selected above it. The paper's could not be read.
        C: weight of the examples against the size of the weights; as in scikit-learn.
        least_accuracy: of a probe that may name neurons: balanced accuracy, 0.5 by chance. The paper's could not be
            read.
        groups: a label of the data, or one value for each example (its document): examples of one group are never on
            both sides when accuracy is measured.
        null: "permute" adds `p` and `q`; labels are dealt over examples, whatever their groups, and every probe is
            fitted anew for each deal.
        permutations: how often labels are dealt anew.
        seed: of the deals, and of the folds.

    Returns:
        All neurons: `score`, the z of its weight for its best label; `label`; `score_<label>`; `accuracy`, what the
        probe of that label and site is worth on held-out examples (balanced, five folds); `selected`, whether the
        score is above `z` there and the probe accurate.

    Raises:
        DataError: fewer than two labels, no `Pooled`, fewer than two examples of a category.
        UnknownName: no such label or category.
    """
    given = labelled(recording, labels, positive)
    found = examples(given, groups)
    scaled = Scale.of(found.values).apply(found.values)
    probes = {site: Logistic(scaled[:, place], C) for site, place in found.sites.items()}
    _say_few(given, found)

    def scores(of: Labelled) -> np.ndarray:
        right = found.right(of)
        return np.concatenate([_outlying(_weights(probe, right)) for probe in probes.values()])

    score = scores(given)
    accuracy = _accuracy(given, found, scaled, probes, seed)
    best = score.argmax(1)
    sizes = [place.stop - place.start for place in found.sites.values()]
    of_best = np.repeat(accuracy, sizes, axis=0)[np.arange(len(score)), best]
    _say_chance(given, accuracy, least_accuracy)
    selected = (score.max(1) > z) & (of_best >= least_accuracy)
    columns: dict[str, np.ndarray | list] = {"accuracy": of_best, "selected": selected}
    return table(given, score, columns, null=null, permutations=permutations, seed=seed, again=scores)


# Helpers --------------------------------------------------------------------------------------------


def _weights(probe: Logistic, right: np.ndarray) -> np.ndarray:
    """`[neurons, labels]`; the second of two labels is the first with its sign changed."""
    if _mirrored(right):
        weights, _ = probe.fit(right[:, :1])
        return np.concatenate([weights, -weights], axis=1)
    return probe.fit(right)[0]


def _mirrored(right: np.ndarray) -> bool:
    return right.shape[1] == 2 and bool((right[:, 0] != right[:, 1]).all())


def _outlying(weights: np.ndarray) -> np.ndarray:
    centred = weights - weights.mean(0)
    spread = centred.std(0)
    return np.where(spread > 0, centred / np.where(spread > 0, spread, 1.0), 0.0)


def _accuracy(
    given: Labelled, found: Examples, scaled: np.ndarray, probes: dict[str, Logistic], seed: int
) -> np.ndarray:
    """`[sites, labels]`: balanced accuracy on held-out examples.

    The scale is that of all examples, held-out ones too: it knows no label.
    """
    assert given.codes is not None
    fold = folds(given.codes[found.kept], _FOLDS, seed, found.groups)
    right = found.right(given)
    if _mirrored(right):
        right = right[:, :1]  # what one is worth the other is
    number, count = int(fold.max()) + 1, right.shape[1]
    # Every fold of every label is a regression of its own, in which the examples held out weigh nothing.
    weights = np.zeros((len(right), number * count))
    for each in range(number):
        learned = fold != each
        weights[learned, each * count : (each + 1) * count] = balance(right[learned])
    accuracy = np.empty((len(probes), len(given.scored)))
    for row, (site, probe) in enumerate(probes.items()):
        slope, intercept = probe.fit(np.tile(right, number), weights)
        said = (scaled[:, found.sites[site]] @ slope + intercept > 0).reshape(len(right), number, count)
        said = said[np.arange(len(right)), fold]
        accuracy[row] = ((said & right).sum(0) / right.sum(0) + (~said & ~right).sum(0) / (~right).sum(0)) / 2
    return accuracy


def _say_few(given: Labelled, found: Examples) -> None:
    count = np.concatenate([found.right(given).sum(0), (~found.right(given)).sum(0)])
    if count.min() < _FEW:
        warn(
            f"probe_neurons: a class has {int(count.min())} examples; with fewer than about {_FEW} of each the weights "
            "of a probe are mostly chance"
        )


def _say_chance(given: Labelled, accuracy: np.ndarray, least: float) -> None:
    if not 0 <= least <= 1:
        raise DataError(f"least_accuracy is a share from 0 to 1; not {least}")
    for place, best in zip(given.scored, accuracy.max(0), strict=True):
        if best < least:
            warn(
                f"probe_neurons: no probe tells {given.categories[place]!r} from the rest on held-out examples (best "
                f"balanced accuracy {best:.2f}, wanted {least:g}): no neuron is selected for it"
            )
