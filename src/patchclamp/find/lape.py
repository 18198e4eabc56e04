"""Language activation probability entropy: neurons that fire on few labels, and on which.

How often a neuron fires on each label, made a distribution over labels, has little entropy where it fires on one of
them and the most where it does not care. `lape` is as first published; `lape_ternary` does without its hard filter and
sorts neurons into specific, related and general ones.

    q_k = p_k / sum p           p_k: share of the tokens of label k on which the neuron fires
    entropy = - sum q_k ln q_k  in nats, from 0 to ln K

For a gated MLP both papers count the gate, before it is multiplied: record `sites="gate.*"`. For a plain one record
`"mlp.*"`. The authors' code fills up with neurons of infinite entropy where too few pass the filter, and loses the last
languages where they own nothing; this does neither.
"""

from __future__ import annotations

import numpy as np

from patchclamp.errors import DataError, warn
from patchclamp.find.labelled import Labelled, Labels, labelled, table
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording

# Nonlinearities that are silent on one side; elsewhere 0 is no more than a number.
_RECTIFYING = ("relu", "gelu", "silu", "swish", "mish", "elu", "softplus", "quick")
_STEPS, _MOST = 1e-3, 0.2


@published(
    row="S093",
    title="Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language Models",
    authors="Tang et al.",
    year=2024,
    url="https://arxiv.org/abs/2402.16438",
)
def lape(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_rate: float = 0.95,
    threshold: float | None = None,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons whose firing is concentrated on few labels, best first (Tang et al., 2024).

    Args:
        recording: with `ByLabel` of this label, or `Pooled("fired")`.
        labels: a label of the data, or one value for each example.
        positive: score neurons for this category only; None: for each.
        top_rate: share of all neurons that are selected.
        filter_rate: a neuron whose firing rates all are at most this quantile of all rates is not selected.
        bar_rate: a label owns a selected neuron that fires on it more often than this quantile of all rates.
        threshold: what a neuron is above when it fires; None: 0, where the nonlinearity is silent below it.
        null: "permute" adds `p` and `q`.
        permutations: how often labels are dealt anew.
        seed: of that.

    Returns:
        All neurons: `score`, 1 - entropy / ln K (0 for one that the filter drops); `label`, on which it fires most;
        `score_<label>`, the score times its rate there over its largest; `entropy` in nats; `selected`, whether it is
        among those that the paper keeps; `owners`, the labels that own it, with commas between.

    Raises:
        DataError: fewer than two labels, what is wanted was not recorded, or a nonlinearity that is not silent below 0.
        UnknownName: no such label or category.
    """
    given = labelled(recording, labels, positive)
    level = firing_threshold(recording, threshold)

    def scores(of: Labelled) -> np.ndarray:
        return concentration(firing_rates(of, level), filter_rate)[:, of.scored]

    entropy, selected, owned = selection(firing_rates(given, level), "lape", top_rate, filter_rate, bar_rate)
    columns = {"entropy": entropy, "selected": selected, "owners": owner_names(given, owned)}
    return table(
        given,
        scores(given),
        columns,
        null=null,
        permutations=permutations,
        seed=seed,
        again=scores,
    )


@published(
    row="S003",
    title="How does Alignment Enhance LLMs' Multilingual Capabilities? A Language Neurons Perspective",
    authors="Zhang et al.",
    year=2025,
    url="https://arxiv.org/abs/2505.21505",
)
def lape_ternary(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    top_rate: float = 0.01,
    weight: float | str = "auto",
    bar_rate: float = 0.95,
    threshold: float | None = None,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons specific to one label, related to some, or general (Zhang et al., 2025), best first.

    In place of a filter, a neuron's largest firing rate counts for it: entropy / ln K - weight * max p / c, where c is
    the mean of 1/1 ... 1/K; the smallest are selected. The paper counts tokens of the response alone: record with
    `positions="response"`.

    Args:
        recording: as for `lape`.
        labels: the same; at least three categories, or none could be related.
        positive: the same.
        top_rate: share of all neurons that are selected.
        weight: of the firing rate; "auto": the largest in 0 ... 0.2, to 0.001, with which no selected neuron is
            owned by all labels.
        bar_rate: as for `lape`.
        threshold: the same.
        null: the same.
        permutations: the same.
        seed: the same.

    Returns:
        All neurons: `score`, larger is better (the paper's with its sign changed); `label`; `score_<label>`;
        `entropy` in nats; `selected`; `owners`; `kind`: "specific", "related" or "general".

    Raises:
        DataError: as `lape`; fewer than three categories; a weight that is none.
        UnknownName: no such label or category.
    """
    given = labelled(recording, labels, positive)
    number = len(given.categories)
    if number < 3:
        raise DataError(f"lape_ternary wants at least three categories: with {number} no neuron is related to some")
    level = firing_threshold(recording, threshold)
    rates = firing_rates(given, level)
    entropy, _ = _entropy(rates)
    owned = rates > _quantile(rates, bar_rate)
    wanted = round(top_rate * len(rates))
    used = _largest_weight(rates, owned, wanted) if weight == "auto" else _number(weight)
    found = _ternary(rates, used)
    selected = np.zeros(len(rates), bool)
    selected[np.argsort(-found.max(1), kind="stable")[:wanted]] = True
    owners = owned.sum(1)
    kind = np.where(selected & (owners == 1), "specific", "general")
    kind[selected & (owners > 1) & (owners < number)] = "related"
    columns = {
        "entropy": entropy,
        "selected": selected,
        "owners": owner_names(given, owned & selected[:, None]),
        "kind": kind,
        "weight": np.full(len(rates), used),
    }
    return table(
        given,
        found[:, given.scored],
        columns,
        null=null,
        permutations=permutations,
        seed=seed,
        again=lambda of: _ternary(firing_rates(of, level), used)[:, of.scored],
    )


# Helpers, the first of them shared with `domains` ---------------------------------------------------


def selection(
    rates: np.ndarray, who: str, top_rate: float, filter_rate: float, bar_rate: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entropy in nats `[neurons]`, who is selected `[neurons]`, which labels own whom `[neurons, labels]`.

    Args:
        rates: how often each neuron fires on each label, `[neurons, labels]`.
        who: selects, for the warning that too few pass the filter.
        top_rate: as for `lape`.
        filter_rate: the same.
        bar_rate: the same.
    """
    entropy, _ = _entropy(rates)
    passes = rates.max(1) > _quantile(rates, filter_rate)
    wanted = round(top_rate * len(rates))
    order = np.argsort(np.where(passes, entropy, np.inf), kind="stable")[:wanted]
    selected = np.zeros(len(rates), bool)
    selected[order[passes[order]]] = True
    if selected.sum() < wanted:
        warn(f"{who}: {int(selected.sum())} neurons pass the filter where {wanted} are asked for: so many are selected")
    return entropy, selected, (rates > _quantile(rates, bar_rate)) & selected[:, None]


def firing_rates(given: Labelled, threshold: float) -> np.ndarray:
    """`[neurons of all sites, labels]`: share of positions on which each fires."""
    return np.concatenate([given.rates(site, threshold) for site in given.recording])


def _entropy(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nats `[neurons]`, and the distribution over labels `[neurons, labels]`; most where nothing fires."""
    total = rates.sum(1, keepdims=True)
    share = np.where(total > 0, rates / np.where(total > 0, total, 1.0), 1 / rates.shape[1])
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(1), share


def concentration(rates: np.ndarray, filter_rate: float) -> np.ndarray:
    """Scores `[neurons, labels]`, 0 to 1, from firing rates of the same shape."""
    entropy, share = _entropy(rates)
    score = (1 - entropy / np.log(rates.shape[1])).clip(min=0.0)
    score = np.where(rates.max(1) > _quantile(rates, filter_rate), score, 0.0)
    return score[:, None] * share / share.max(1, keepdims=True)


def _ternary(rates: np.ndarray, weight: float) -> np.ndarray:
    """`[neurons, labels]`; the largest of a neuron is the paper's score with its sign changed."""
    number = rates.shape[1]
    entropy, _ = _entropy(rates)
    return weight * rates / (1 / np.arange(1, number + 1)).mean() - (entropy / np.log(number))[:, None]


def _largest_weight(rates: np.ndarray, owned: np.ndarray, wanted: int) -> float:
    by_all = np.asarray(owned.all(axis=1))

    def fine(weight: float) -> bool:
        chosen = np.argsort(-_ternary(rates, weight).max(1), kind="stable")[:wanted]
        return not by_all[chosen].any()

    # A grid as fine as the bisection of the paper, which would want the selection to change in one direction only.
    grid = np.arange(0, _MOST + _STEPS / 2, _STEPS)
    good = [float(each) for each in grid if fine(each)]
    if not good:
        warn("lape_ternary: with every weight some selected neuron is owned by all labels; 0 is taken")
        return 0.0
    return good[-1]


def _quantile(rates: np.ndarray, share: float) -> float:
    """The k-th smallest of all rates, k being this share of their number."""
    if not 0 <= share <= 1:
        raise DataError(f"a rate is a share from 0 to 1; not {share}")
    place = min(max(round(share * rates.size), 1), rates.size) - 1
    return float(np.partition(rates, place, axis=None)[place])


def owner_names(given: Labelled, owned: np.ndarray) -> list[str]:
    """The labels that own each neuron, with commas between."""
    return [", ".join(given.categories[place] for place in np.flatnonzero(each)) for each in owned]


def _number(weight: float | str) -> float:
    if isinstance(weight, str) or not 0 <= weight < np.inf:
        raise DataError(f'weight is a number, at least 0, or "auto"; not {weight!r}')
    return float(weight)


def firing_threshold(recording: Recording, given: float | None) -> float:
    """What was given, or 0 where every site is silent below it.

    Raises:
        DataError: a site whose nonlinearity is not.
    """
    if given is not None:
        return float(given)
    for site in recording.sites:
        activation = (site.activation or "").lower()
        if not any(each in activation for each in _RECTIFYING):
            said = f"the nonlinearity {site.activation}" if site.activation else "no nonlinearity that is known"
            raise DataError(f"{site.name} has {said}: 0 says nothing of when it fires. Pass threshold=")
    return 0.0
