"""Activation profiles: how each label moves a neuron away from its mean over all labels.

    profile_c = mean of label c - mean over labels of these means
    score     = |profile_c| / standard deviation

Labels weigh the same, however many examples each has. The paper is about images, where a neuron is a feature map
averaged over space; the score of a unit is the same for anything.
"""

from __future__ import annotations

import numpy as np

from patchclamp.find.labelled import Labelled, Labels, labelled, table
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording


@published(
    row="S154",
    title="Exploration of Interpretability Techniques for Deep COVID-19 Classification Using Chest X-ray Images",
    authors="Chatterjee et al.",
    year=2020,
    url="https://arxiv.org/abs/2006.02570",
    part="activation profiles",
)
def activation_profiles(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons that are most characteristic of a label, best first (Chatterjee et al., 2020).

    Args:
        recording: with `ByLabel` of this label, or `Pooled`.
        labels: a label of the data, or one value for each example.
        positive: score neurons for this category only; None: for each.
        null: "permute" adds `p` and `q`.
        permutations: how often labels are dealt anew.
        seed: of that.

    Returns:
        All neurons: `score`, the largest |profile| in standard deviations; `label`; `score_<label>`;
        `profile`, that of the best label with its sign, in units of the activation. A neuron that never changes has 0.

    Raises:
        DataError: fewer than two labels, what is wanted was not recorded.
        UnknownName: no such label or category.
    """
    given = labelled(recording, labels, positive)
    profile, score = _profiles(given)
    best = score.argmax(1)
    return table(
        given,
        score,
        {"profile": profile[np.arange(len(profile)), best]},
        null=null,
        permutations=permutations,
        seed=seed,
        again=lambda of: _profiles(of)[1],
    )


def _profiles(given: Labelled) -> tuple[np.ndarray, np.ndarray]:
    """Profiles and scores, `[neurons, scored categories]` each."""
    profiles, scores = [], []
    for site in given.recording:
        mean, variance, count = given.moments(site)
        centre = mean.mean(1, keepdims=True)
        # Of all rows together: within the categories and between them.
        share = count / count.sum()
        whole = (variance * share).sum(1) + (share * (mean - (mean * share).sum(1, keepdims=True)) ** 2).sum(1)
        spread = np.sqrt(whole)[:, None]
        profile = (mean - centre)[:, given.scored]
        profiles.append(profile)
        scores.append(np.where(spread > 0, np.abs(profile) / np.where(spread > 0, spread, 1.0), 0.0))
    return np.concatenate(profiles), np.concatenate(scores)
