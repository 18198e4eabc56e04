"""Does a feature hold one attribute and nothing else? Swap it between entities and ask (RAVEL).

    cause     the answer about the attribute becomes that of the entity from which the feature was taken
    isolate   the answer about another attribute stays that of the entity to which it was given
    score     (cause + mean of isolate over the other attributes) / 2

An empty feature has 0, 1 and 0.5; swapping the whole state has about 1, 0 and 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from patchclamp.decompose.das import Subspace
from patchclamp.decompose.interchange import Interchanges
from patchclamp.errors import DataError
from patchclamp.model import Model, Site
from patchclamp.published import published
from patchclamp.testbed.attribute_world import AttributeWorld


class Featurizer(Protocol):
    """What is tested: `decompose.das.Subspace` is one."""

    def swap(self, base: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """What the base's state `[n, size]` becomes when the feature is that of the source's state `[n, size]`."""
        ...


@dataclass(frozen=True)
class Disentanglement:
    """How well one feature holds one attribute. All are shares between 0 and 1, not rounded.

    Attributes:
        attribute: which.
        cause: answers about it that become the source's.
        isolate: other attribute -> answers about it that stay the base's.
        pairs: attribute -> how many pairs its share is of.
        alike: pairs left out because both entities have the same value: they cannot tell one from the other.
        unknown: pairs left out because the network does not know the base's answer.
    """

    attribute: str
    cause: float
    isolate: Mapping[str, float]
    pairs: Mapping[str, int]
    alike: int
    unknown: int

    @property
    def isolation(self) -> float:
        """Mean over the other attributes, each counting alike."""
        return float(np.mean(list(self.isolate.values())))

    @property
    def score(self) -> float:
        """Mean of `cause` and `isolation`."""
        return (self.cause + self.isolation) / 2


@published(
    row="S141",
    title="RAVEL: Evaluating Interpretability Methods on Disentangling Language Model Representations",
    authors="Huang et al.",
    year=2024,
    url="https://arxiv.org/abs/2402.17700",
    part="benchmark",
)
def disentangle(
    model: Model,
    site: str | Site,
    featurizer: Featurizer,
    pairs: Iterable[Any] | Interchanges | AttributeWorld,
    attribute: str,
) -> Disentanglement:
    """Swap a feature between entities: does it change one attribute, and leave all others?

    Args:
        model: the network; it should know the attributes. Base prompts that it answers wrongly are left out.
        site: where the feature lives; usually `resid_post.<layer>`, at the last token of the entity.
        featurizer: the feature of that attribute: a `Subspace` (of `das`, `mdas`, `dbm`, principal components, single
            neurons), or any object with its `swap`.
        pairs: base and source that ask for this attribute and for others (`Interchanges` says what a pair is); those
            made ready; or a world, of which the held-out entities and templates are taken.
        attribute: what the feature should hold.

    Raises:
        UnknownName: no pair asks for the attribute.
        DataError: a pair cannot be used, or none is left that asks for the attribute, or for another.
    """
    if isinstance(pairs, AttributeWorld):
        pairs = pairs.pairs(entities="held_out", templates="held_out")
    runs = Interchanges.of(model, site, pairs)
    known = runs.right(np.arange(len(runs.attributes)), "base", None)
    cause = _known(runs.cause(attribute), known, attribute)
    others = {name: _known(places, known, name) for name, places in runs.isolate(attribute).items()}
    right = {attribute: runs.right(cause, "source", featurizer.swap)}
    right |= {name: runs.right(places, "base", featurizer.swap) for name, places in others.items()}
    shares = {name: float(each.mean()) for name, each in right.items()}
    return Disentanglement(
        attribute,
        shares.pop(attribute),
        shares,
        {name: len(each) for name, each in right.items()},
        int(runs.same.sum()),
        int((~known & ~runs.same).sum()),
    )


def select_features(
    basis: Subspace, states: torch.Tensor, values: Iterable[Any], *, strength: float = 0.1, seed: int = 0
) -> Subspace:
    """The directions of a basis that a sparse linear classifier needs to tell an attribute's values apart.

    The paper chooses principal components and latents of autoencoders like this, with strengths from 0.1 to 1000.

    Args:
        basis: for instance `Subspace.principal(states)`.
        states: `[examples, size]`, as `Interchanges.states`.
        values: the attribute of each example.
        strength: of the fit against the sum of absolute weights (C of scikit-learn's LinearSVC, with L1).
        seed: of the order in which it goes through the weights.

    Returns:
        Those whose weight is not 0 for any of the values.

    Raises:
        DataError: values that do not fit the states, or are all alike.
    """
    from sklearn.svm import LinearSVC

    labels = np.asarray([str(each) for each in values])
    if len(labels) != len(states) or len(set(labels)) < 2:
        raise DataError(f"{len(states)} states have as many values, at least two of them different; not {len(labels)}")
    given = (states.detach().cpu().double() @ basis.rows.double().T).numpy()
    scale = given.std(0)
    given = (given - given.mean(0)) / np.where(scale > 0, scale, 1.0)
    settings: Any = {"penalty": "l1", "dual": False, "C": strength, "tol": 1e-3, "max_iter": 2_000}
    weights = np.asarray(LinearSVC(**settings, random_state=seed).fit(given, labels).coef_)
    return basis.only(np.flatnonzero((np.abs(weights) > 1e-5).any(0)))


def _known(places: np.ndarray, known: np.ndarray, attribute: str) -> np.ndarray:
    left = places[known[places]]
    if not len(left):
        raise DataError(f"the network answers no base prompt about {attribute!r} rightly: there is nothing to change")
    return left
