"""What hidden features have to do with known terms: the one feature that goes with each, and whether that is news.

A feature that is smooth in its inputs correlates with any term that is smooth in them. So a correlation is given with
all other terms held fixed (partial), beside what an untrained network reaches, and what features reach whose rows are
shuffled:

    partial(f, c) = correlation of what is left of f and of c when each is fitted by the other terms
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike

from patchclamp.errors import DataError, warn
from patchclamp.published import published

# What is left of a term that the others explain, as a share of it, no larger than this, is rounding.
_NOTHING = 1e-8


@dataclass(frozen=True, eq=False)
class ConceptMatches:
    """How features go with concepts.

    Attributes:
        pairs: one row for each: `feature` (its column), `concept`, `correlation`, `partial`.
        concepts: one row for each: `concept`; `feature`, that of the largest |correlation|; `correlation`; `control`,
            the largest |correlation| that the control reaches (null without one); `shuffled`, the 95th percentile of
            the largest |correlation| of features whose rows are shuffled; then the same for partial correlations:
            `partial_feature`, `partial`, `partial_control`, `partial_shuffled`; and `matched`, whether |partial| is
            above both of its controls. Without a control it does not say that training had to do with it.
    """

    pairs: pl.DataFrame
    concepts: pl.DataFrame


@published(
    row="S065",
    title="From Neurons to Neutrons: A Case Study in Interpretability",
    authors="Kitouni et al.",
    year=2024,
    url="https://arxiv.org/abs/2405.17425",
    part="concepts",
)
def match_concepts(
    features: torch.Tensor | ArrayLike,
    concepts: Mapping[str, ArrayLike],
    *,
    control: torch.Tensor | ArrayLike | None = None,
    components: int | None = None,
    shuffles: int = 200,
    seed: int = 0,
) -> ConceptMatches:
    """Which hidden features go with which known terms (Kitouni et al., 2024), with the controls that this needs.

    Args:
        features: `[examples, features]`, of the last hidden layer.
        concepts: name -> `[examples]`, the terms.
        control: `[examples, features]` of the same network before training, on the same examples.
        components: use so many principal components of the features (and of the control); None: features as they are.
        shuffles: deals of the rows.
        seed: of these.

    Raises:
        DataError: examples that do not fit or are too few, a value that is not finite, a term that never changes, more
            components than there are.
    """
    given = _columns(features, "features", components)
    terms = _terms(concepts, len(given))
    others = None if control is None else _columns(control, "the control", components)
    if others is not None and len(others) != len(given):
        raise DataError(f"the control has {len(others)} examples, and the features {len(given)}: the same are wanted")
    if shuffles < 19:
        raise DataError(f"with {shuffles} shuffles there is no 95th percentile: at least 19 are needed")
    if len(given) < terms.shape[1] + 3:
        raise DataError(f"{len(given)} examples are too few for {terms.shape[1]} terms")
    generator = np.random.default_rng(seed)
    deals = np.stack([generator.permutation(len(given)) for _ in range(shuffles)])
    rows, pairs = [], []
    for place, name in enumerate(concepts):
        term, rest = terms[:, place], np.delete(terms, place, 1)
        plain = _found(given, term, rest[:, :0], others, deals)
        partial = _found(given, term, rest, others, deals)
        if partial is None:
            warn(f"match_concepts: {name!r} is a sum of the other terms: it has no partial correlation")
            partial = _Found(np.full(given.shape[1], np.nan), None, np.nan)
        assert plain is not None
        rows.append(
            {
                "concept": name,
                "feature": plain.feature,
                "correlation": float(plain.values[plain.feature]),
                "control": plain.control,
                "shuffled": plain.shuffled,
                "partial_feature": partial.feature,
                "partial": float(partial.values[partial.feature]),
                "partial_control": partial.control,
                "partial_shuffled": partial.shuffled,
                "matched": bool(np.abs(partial.values).max() > max(partial.control or 0.0, partial.shuffled)),
            }
        )
        pairs.append(pl.DataFrame({"correlation": plain.values, "partial": partial.values}).with_row_index("feature"))
    listed = pl.concat(
        each.with_columns(pl.lit(name).alias("concept")) for name, each in zip(concepts, pairs, strict=True)
    )
    nullable = {"control": pl.Float64, "partial_control": pl.Float64}
    return ConceptMatches(
        listed.select("feature", "concept", "correlation", "partial"), pl.DataFrame(rows, schema_overrides=nullable)
    )


# Helpers --------------------------------------------------------------------------------------------


def _columns(values: torch.Tensor | ArrayLike, what: str, components: int | None) -> np.ndarray:
    """`[examples, features]` float64."""
    found = (
        values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, np.float64)
    )
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        raise DataError(
            f"{what} are finite numbers, [examples, features]; not {list(found.shape)}, or not all are finite"
        )
    if components is None:
        return found
    most = min(found.shape)
    if not 1 <= components <= most:
        raise DataError(f"{components} components of {what}, {list(found.shape)}: there are {most}")
    from sklearn.decomposition import PCA

    return PCA(components, svd_solver="full").fit_transform(found)


def _terms(concepts: Mapping[str, ArrayLike], examples: int) -> np.ndarray:
    """`[examples, concepts]`, each of mean 0 and deviation 1."""
    if not concepts:
        raise DataError("concepts names none: give {name: values}")
    columns = []
    for name, values in concepts.items():
        column = np.asarray(values, np.float64)
        if column.shape != (examples,) or not np.isfinite(column).all():
            raise DataError(
                f"the term {name!r} is a finite number for each of {examples} examples; not {list(column.shape)}"
            )
        if np.ptp(column) == 0:
            raise DataError(f"the term {name!r} is the same for all examples: nothing goes with it")
        columns.append((column - column.mean()) / column.std())
    return np.stack(columns, 1)


class _Found(NamedTuple):
    """Correlations of all features with one term, `[features]`, and the largest of the controls."""

    values: np.ndarray
    control: float | None
    shuffled: float

    @property
    def feature(self) -> int:
        return int(np.argmax(np.abs(np.nan_to_num(self.values))))


def _found(
    features: np.ndarray, term: np.ndarray, fixed: np.ndarray, control: np.ndarray | None, deals: np.ndarray
) -> _Found | None:
    """With the terms `fixed` held; None where nothing of the term is left."""
    basis = np.linalg.qr(np.column_stack([np.ones(len(term)), fixed]))[0]
    own = _left(term[:, None], basis)[:, 0]
    if not own.any():
        return None
    left = _left(features, basis)
    # Which of the two is shuffled makes no difference, and one column costs less than all.
    dealt = np.abs(own[deals] @ left).max(1)
    against = None if control is None else float(np.abs(own @ _left(control, basis)).max())
    return _Found(own @ left, against, float(np.quantile(dealt, 0.95)))


def _left(columns: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """What the orthonormal `basis` does not explain of each column, of length 1; zeros where that is rounding."""
    left = columns - basis @ (basis.T @ columns)
    size = np.linalg.norm(left, axis=0)
    good = size > _NOTHING * np.linalg.norm(columns, axis=0)
    return np.where(good, left / np.where(good, size, 1.0), 0.0)
