"""Does a neuron mark a concept, or only that something is unusual?

Neurons that tell each of several concepts from a baseline (patients from controls, jargon from plain text) may all say
the same: not the baseline. Two problems are put side by side, for the concepts c = 1 ... K and the baseline 0:

    binary      F1 of c, where a probe tells c from 0 alone
    multiclass  F1 of c, where one probe tells all K + 1 apart
    drop        binary - multiclass: large for a marker that the concepts share

A speaker, an author or a document that is on both sides of a split gives itself away, whatever the concept. Groups are
never divided, and without groups the figures are not to be believed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from patchclamp.errors import DataError, unknown, warn
from patchclamp.find.labelled import Labelled, Labels, labelled
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording
from patchclamp.statistics import roc_auc

_LEAST_GROUPS = 5


@dataclass(frozen=True, eq=False)
class GenericMarkers:
    """What `generic_marker_test` found.

    Attributes:
        baseline: the category that is no concept.
        concepts: one row for each: `label`; `binary_f1`, `multiclass_f1` and `drop`; `binary_chance` and
            `multiclass_chance`, the F1 of guessing, which drops as well: look at what exceeds it; `neurons`, how many
            fire for it; `shared`, the share of these that fire for another concept as well (null where none fires);
            `examples` and `groups`, how many it has.
        neurons: each that was probed: `score`, the smallest of its `auc_<concept>`, so that those that fire for
            whatever is not the baseline come first; `concepts`, those for which it fires, with commas between.
        accuracy: of telling all apart, each example predicted by a probe that saw nothing of its group.
        macro_f1: the same, F1 averaged over the concepts and the baseline.
    """

    baseline: str
    concepts: pl.DataFrame
    neurons: Neurons
    accuracy: float
    macro_f1: float

    def __repr__(self) -> str:
        drops = ", ".join(
            f"{row['label']} {row['binary_f1']:.2f} to {row['multiclass_f1']:.2f}"
            for row in self.concepts.iter_rows(named=True)
        )
        return f"GenericMarkers against {self.baseline!r}, F1 alone and among all: {drops}"


@published(
    row="S144",
    title="Automated speech- and text-based classification of neuropsychiatric conditions in a multidiagnostic setting",
    authors="Hansen et al.",
    year=2023,
    url="https://arxiv.org/abs/2301.06916",
    part="generic markers",
)
def generic_marker_test(
    recording: Recording,
    labels: Labels,
    baseline: str,
    *,
    groups: Labels | None = None,
    neurons: Neurons | None = None,
    fires: float = 0.75,
    folds: int = 5,
    seed: int = 0,
) -> GenericMarkers:
    """Are neurons specific to concepts, or do they mark anything but the baseline (after Hansen et al., 2023)?

    The paper's point is about classifiers of speech; here the probe is a logistic regression on neurons (of unit
    variance in the training part, classes weighted alike), and its predictions of all folds are scored together.

    Args:
        recording: with `Pooled`.
        labels: a label of the data, or one value for each example: two or more concepts, and the baseline.
        baseline: the category that is no concept ("control").
        groups: whose each example is (speaker, document): a label of the data, or one value for each example. None: the
            documents whose windows the examples are; where they are none's, each example by itself, and a warning.
        neurons: probe these only; None: all recorded.
        fires: a neuron fires for a concept if its chance of being larger on an example of it than on one of the
            baseline (the area under the ROC curve) is at least this.
        folds: of groups; each is predicted once.
        seed: of the folds.

    Raises:
        DataError: fewer than two concepts, a class of fewer than 5 groups or fewer than `folds`, no `Pooled`, a label
            of tokens, no neurons.
        UnknownName: no such label, category or site.
    """
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2:
        raise DataError(f"folds is a whole number, at least 2; not {folds}")
    given = labelled(recording, labels)
    concepts = _concepts(given, baseline)
    assert given.codes is not None
    values, named = _values(given, neurons)
    whose, there = _groups(recording, groups, len(values)), ~np.isnan(values).any(1)
    values, kind, whose = values[there], np.asarray(given.categories)[given.codes[there]], whose[there]
    counted = {each: len(np.unique(whose[kind == each])) for each in given.categories}
    _refuse_few(counted, max(_LEAST_GROUPS, folds))

    splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(values, kind, whose))
    among_all = _predicted(values, kind, splits)
    area = np.stack([_area(values, kind, each, baseline) for each in concepts], 1)
    firing = area >= fires
    rows = []
    for place, concept in enumerate(concepts):
        pair = np.isin(kind, [concept, baseline])
        alone = _predicted(values[pair], kind[pair], [tuple(_within(part, pair) for part in each) for each in splits])
        binary = float(f1_score(kind[pair] == concept, alone == concept))
        multiclass = float(f1_score(kind == concept, among_all == concept))
        own = firing[firing[:, place]]
        rows.append(
            {
                "label": concept,
                "binary_f1": binary,
                "multiclass_f1": multiclass,
                "drop": binary - multiclass,
                "binary_chance": _guessing(float((kind[pair] == concept).mean()), 2),
                "multiclass_chance": _guessing(float((kind == concept).mean()), len(given.categories)),
                "neurons": len(own),
                "shared": float((own.sum(1) > 1).mean()) if len(own) else None,
                "examples": int((kind == concept).sum()),
                "groups": counted[concept],
            }
        )
    return GenericMarkers(
        baseline,
        pl.DataFrame(rows, schema_overrides={"shared": pl.Float64}),
        _markers(named, area, firing, concepts),
        float(accuracy_score(kind, among_all)),
        float(f1_score(kind, among_all, average="macro")),
    )


# Helpers --------------------------------------------------------------------------------------------


def _concepts(given: Labelled, baseline: str) -> list[str]:
    if baseline not in given.categories:
        raise unknown("category", baseline, given.categories)
    concepts = [each for each in given.categories if each != baseline]
    if len(concepts) < 2:
        raise DataError(
            f"{concepts[0]!r} is the only concept beside {baseline!r}: at least two can have a marker in common"
        )
    if given.codes is None:
        raise DataError("a label of tokens cannot be split by groups: give one value for each example")
    return concepts


def _values(given: Labelled, neurons: Neurons | None) -> tuple[np.ndarray, pl.DataFrame]:
    """`[examples, neurons]` float32, and the site and index of each column."""
    if neurons is not None and not len(neurons):
        raise DataError("neurons holds none: there is nothing to probe")
    sites = list(given.recording) if neurons is None else neurons.sites
    parts, names = [], []
    for site in sites:
        values = given.pooled(site)
        wanted = np.arange(values.shape[1]) if neurons is None else neurons.indices(site)
        if wanted.max() >= values.shape[1]:
            raise unknown("neuron", f"{site}:{wanted.max()}", [f"{site}:{values.shape[1] - 1}"])
        parts.append(values[:, wanted])
        names.append(pl.DataFrame({"site": [site] * len(wanted), "index": wanted}))
    return np.concatenate(parts, 1), pl.concat(names)


def _groups(recording: Recording, given: Labels | None, examples: int) -> np.ndarray:
    """`[examples]`: whose each is."""
    if isinstance(given, str):
        return recording.categories_of_examples(given)
    if given is not None:
        values = np.asarray([str(each) for each in given])
        if len(values) != examples:
            raise DataError(f"{len(values)} groups were given for {examples} examples: one for each is wanted")
        return values
    if recording.documents is not None:
        return recording.documents.document
    warn(
        "generic_marker_test: no groups were given, so each example is taken to be independent. If several are of one "
        "speaker, author or document, the scores are too high: pass groups="
    )
    return np.arange(examples)


def _refuse_few(counted: dict[str, int], least: int) -> None:
    for category, number in counted.items():
        if number < least:
            raise DataError(f"{category!r} has examples of {number} groups: at least {least} are wanted for a split")


def _within(part: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """The places of a part of all examples among those of a pair of classes."""
    return (np.cumsum(pair) - 1)[part[pair[part]]]


def _predicted(values: np.ndarray, kind: np.ndarray, splits: list) -> np.ndarray:
    """`[examples]`: the class of each, as said by a probe that saw none of its fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    return np.asarray(cross_val_predict(probe, values, kind, cv=splits))


def _guessing(share: float, classes: int) -> float:
    """F1 of a class with this share of the examples, if each of the classes is guessed as often."""
    return 2 * share / (share * classes + 1)


def _area(values: np.ndarray, kind: np.ndarray, concept: str, baseline: str) -> np.ndarray:
    pair = np.isin(kind, [concept, baseline])
    return np.atleast_1d(roc_auc(kind[pair] == concept, values[pair]))


def _markers(named: pl.DataFrame, area: np.ndarray, firing: np.ndarray, concepts: list[str]) -> Neurons:
    frame = named.with_columns(
        pl.Series("score", area.min(1)),
        pl.Series("concepts", [", ".join(concepts[n] for n in np.flatnonzero(each)) for each in firing]),
        *(pl.Series(f"auc_{each}", area[:, place]) for place, each in enumerate(concepts)),
    )
    return Neurons.from_polars(frame.sort("score", descending=True, maintain_order=True))
