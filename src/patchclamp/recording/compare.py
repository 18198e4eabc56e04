"""Compare two recordings of the same data: checkpoints, seeds, a model before and after an edit.

Each neuron gets the columns that the summaries of both recordings allow, and a score: how much it changed, in [0, 1].
The score is the first of these that both recordings hold:

    Histogram     total variation: half the sum over the bins of |share after - share before|
    Moments       2 Phi(|d| / 2) - 1, d being the difference of means in pooled standard deviations: the total
                  variation of two normal distributions that lie so far apart
    FiringRate    |rate after - rate before|
    TopExamples   1 - the Jaccard index of the top examples
    MinMax        |max after - max before| / (|max after| + |max before|)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.neurons import Neurons
from patchclamp.recording.summaries import FiringRate, Histogram, MinMax, Moments, Summary, TopExamples

if TYPE_CHECKING:
    from patchclamp.recording.recording import Recording, SiteRecording


def compare(before: Recording, after: Recording, same_data: bool = True) -> Neurons:
    """Order neurons by how much they changed from one recording to another.

    Args:
        before: a recording.
        after: another of the same sites. A summary counts if both hold it with the same parameters.
        same_data: whether they must be of the same data, read alike. If not, top examples are left out.

    Returns:
        Every neuron, the most changed first; those without a score last. Columns, as far as there are summaries:
        `score`; `mean_before`, `mean_after`, `mean_difference` (after - before, in units of the pooled standard
        deviation, the root of the mean of both variances; infinite where both are 0 and the means differ);
        `firing_rate_before`, `firing_rate_after`, `firing_rate_difference`, of the first threshold, each
        recording above its own if that is relative; `max_before`, `max_after`; `top_overlap` (Jaccard index of
        the places of the top examples); `histogram_distance` (total variation). float64; NaN where a neuron saw
        nothing.

    Raises:
        DataError: sites, sizes or data differ, or the recordings have no summary in common that can be compared.
    """
    _check_sites(before, after)
    if same_data:
        _check_data(before, after)
    frames = [_of_site(name, before[name], after[name], same_data) for name in before]
    frame = pl.concat(frames, how="diagonal_relaxed")
    if "score" not in frame.columns:
        raise DataError(
            f"nothing to compare: the recordings hold {_held(before)} and {_held(after)}; wanted is one of "
            f"{', '.join(each.__name__ for each in _MEASURES)} in both, with the same parameters"
        )
    key = pl.col("score").fill_nan(None)
    return Neurons.from_polars(frame.sort(key, descending=True, nulls_last=True, maintain_order=True))


def _held(recording: Recording) -> str:
    return ", ".join(dict.fromkeys(name for each in recording.by_site.values() for name in each.summaries))


def _check_sites(before: Recording, after: Recording) -> None:
    for here, there, what in ((before, after, "second"), (after, before, "first")):
        if missing := [name for name in here if name not in there.by_site]:
            raise DataError(
                f"the recordings are of different sites: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''} "
                f"{'is' if len(missing) == 1 else 'are'} not in the {what}; record the same sites of both"
            )
    for name in before:
        sizes = before[name].site.size, after[name].site.size
        if sizes[0] != sizes[1]:
            raise DataError(
                f"{name} has {sizes[0]} neurons in the first recording and {sizes[1]} in the second: which is which "
                "cannot be said"
            )


def _check_data(before: Recording, after: Recording) -> None:
    facts = before.facts, after.facts
    names = " and ".join(repr(each["data"].get("name")) for each in facts)
    hint = "compare(other, same_data=False) compares their distributions all the same"
    if _differ(facts, "data", "sha256"):
        raise DataError(f"the recordings are of different data, {names}: {hint}")
    reading = ("special_tokens", "max_length", "positions")
    if _differ(facts, "data", "tokens_sha256") or any(_differ(facts, "parameters", name) for name in reading):
        raise DataError(f"the recordings read their data differently (tokenizer, length or which tokens count): {hint}")


def _differ(facts: tuple[Mapping[str, Any], Mapping[str, Any]], part: str, key: str) -> bool:
    return facts[0].get(part, {}).get(key) != facts[1].get(part, {}).get(key)


def _of_site(name: str, before: SiteRecording, after: SiteRecording, same_data: bool) -> pl.DataFrame:
    size = before.site.size or 0
    columns: dict[str, Any] = {"site": [name] * size, "index": np.arange(size)}
    score: np.ndarray | None = None
    for kind, measure in _MEASURES.items():
        one, other = before.summaries.get(kind.name), after.summaries.get(kind.name)
        alike = one is not None and other is not None and one.parameters() == other.parameters()
        if not alike or (kind is TopExamples and not same_data):
            continue
        found, change = measure(one, other)
        columns |= found
        score = change if score is None else score
    if score is not None:
        columns = columns | {"score": score}
    order = [each for each in _COLUMNS if each in columns]
    return pl.DataFrame(columns, schema_overrides={"index": pl.Int64}).select(["site", "index", *order])


# One function for each summary: its columns, and how much each neuron changed by it, in [0, 1] ---------------


def _by_histogram(before: Histogram, after: Histogram) -> tuple[dict[str, np.ndarray], np.ndarray]:
    distance = np.abs(_shares(after) - _shares(before)).sum(axis=1) / 2
    return {"histogram_distance": distance}, distance


def _by_mean(before: Moments, after: Moments) -> tuple[dict[str, np.ndarray], np.ndarray]:
    from scipy.special import erf

    means = before.mean, after.mean
    spread, difference = np.sqrt((before.variance + after.variance) / 2), means[1] - means[0]
    # Two constants: equal ones did not move, others are infinitely many standard deviations apart.
    still = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    still = np.where(np.isnan(difference), np.nan, still)
    standardized = np.divide(difference, spread, out=still, where=spread > 0)
    columns = {"mean_before": means[0], "mean_after": means[1], "mean_difference": standardized}
    # 2 Phi(x / 2) - 1 = erf(x / sqrt(8))
    return columns, np.asarray(erf(np.abs(standardized) / np.sqrt(8)))


def _by_firing(before: FiringRate, after: FiringRate) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rates = before.rate[:, 0], after.rate[:, 0]
    difference = rates[1] - rates[0]
    columns = {
        "firing_rate_before": rates[0],
        "firing_rate_after": rates[1],
        "firing_rate_difference": difference,
    }
    return columns, np.abs(difference)


def _by_top_examples(before: TopExamples, after: TopExamples) -> tuple[dict[str, np.ndarray], np.ndarray]:
    overlap = np.full(before.size, np.nan)
    of_both = [list(zip(each.example, each.position, strict=True)) for each in (before, after)]
    for neuron, places in enumerate(zip(*of_both, strict=True)):
        one, other = ({(e, p) for e, p in zip(*each, strict=True) if e >= 0} for each in places)
        if one or other:
            overlap[neuron] = len(one & other) / len(one | other)
    return {"top_overlap": overlap}, 1 - overlap


def _by_maximum(before: MinMax, after: MinMax) -> tuple[dict[str, np.ndarray], np.ndarray]:
    largest = before.max.astype(np.float64), after.max.astype(np.float64)
    total = np.abs(largest[0]) + np.abs(largest[1])
    change = np.divide(np.abs(largest[1] - largest[0]), total, out=total * 0.0, where=total > 0)
    return {"max_before": largest[0], "max_after": largest[1]}, change


def _shares(histogram: Histogram) -> np.ndarray:
    """[size, bins] float64: the share of rows in each bin; NaN where nothing was seen."""
    counts = histogram.counts
    total = counts.sum(axis=1, keepdims=True)
    return counts / np.where(total, total, np.nan)


_MEASURES: dict[type[Summary], Callable[[Any, Any], tuple[dict[str, np.ndarray], np.ndarray]]] = {
    Histogram: _by_histogram,
    Moments: _by_mean,
    FiringRate: _by_firing,
    TopExamples: _by_top_examples,
    MinMax: _by_maximum,
}
_COLUMNS = (
    "score",
    "mean_before",
    "mean_after",
    "mean_difference",
    "firing_rate_before",
    "firing_rate_after",
    "firing_rate_difference",
    "max_before",
    "max_after",
    "top_overlap",
    "histogram_distance",
)
