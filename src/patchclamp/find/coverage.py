"""Coverage neurons: for each label and layer, the fewest neurons that make nearly all of its firings.

Neurons of a layer are sorted by how often they fire on the label; the shortest beginning of that order that holds the
share `covered` of all firings is the label's set. It need not be selective: what two labels share is the point, and
`coverage_overlap` says how much (intersection over union).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl

from patchclamp.errors import DataError
from patchclamp.find.labelled import Labelled, Labels, labelled, table
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording


@published(
    row="S058",
    title="Neuron Specialization: Leveraging Intrinsic Task Modularity for Multilingual Machine Translation",
    authors="Tan et al.",
    year=2024,
    url="https://arxiv.org/abs/2404.11201",
    part="finder",
)
def coverage(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    covered: float = 0.95,
    threshold: float = 0.0,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """The fewest neurons of each layer that make most firings of a label (Tan et al., 2024), best first.

    Args:
        recording: with `ByLabel` of this label, or `Pooled("fired")`.
        labels: a label of the data, or one value for each example.
        positive: score neurons for this category only; None: for each.
        covered: share of a label's firings in a layer.
        threshold: what a neuron is above when it fires.
        null: "permute" adds `p` and `q`, of the score: whether a neuron is larger for some label than for labels that
            are dealt at random. The sets themselves hold a fixed share, whatever the labels say.
        permutations: how often labels are dealt anew.
        seed: of that.

    Returns:
        All neurons: `score`, the neuron's share of its layer's firings on its best label, times the number of neurons
        of the layer (1 for a neuron like all others); `label`; `score_<label>`; `covers_<label>`, whether it is in that
        label's set; `owners`, the labels in whose set it is, with commas between.

    Raises:
        DataError: fewer than two labels, what is wanted was not recorded, a share that is none, a layer that never
            fires on a label.
        UnknownName: no such label or category.
    """
    if not 0 < covered <= 1:
        raise DataError(f"covered is a share, above 0 and at most 1; not {covered}")
    given = labelled(recording, labels, positive)
    shares = [_shares(given, site, threshold) for site in recording]
    inside = np.concatenate([np.stack([_fewest(each, covered) for each in of_site.T], 1) for of_site in shares])

    def scores(of: Labelled) -> np.ndarray:
        return np.concatenate([(share := _shares(of, site, threshold)) * len(share) for site in recording])[
            :, of.scored
        ]

    columns: dict[str, np.ndarray | list] = {
        f"covers_{category}": inside[:, place] for place, category in enumerate(given.categories)
    }
    columns["owners"] = [", ".join(given.categories[place] for place in np.flatnonzero(each)) for each in inside]
    return table(given, scores(given), columns, null=null, permutations=permutations, seed=seed, again=scores)


def coverage_overlap(found: Neurons) -> pl.DataFrame:
    """How much the sets of two labels share, layer by layer: intersection over union.

    Args:
        found: what `coverage` gave.

    Returns:
        Columns `site`, `label`, `other`, `overlap` (0 to 1), one row for each pair of labels.

    Raises:
        DataError: it is another table.
    """
    names = [each.removeprefix("covers_") for each in found.columns if each.startswith("covers_")]
    if not names:
        raise DataError("coverage_overlap takes what find.coverage gives: there is no column covers_<label>")
    rows: list[Mapping[str, object]] = []
    frame = found.to_polars()
    for site in found.sites:
        here = frame.filter(pl.col("site") == site)
        sets = {name: here[f"covers_{name}"].to_numpy() for name in names}
        for place, name in enumerate(names):
            for other in names[place + 1 :]:
                both, any_of = (sets[name] & sets[other]).sum(), (sets[name] | sets[other]).sum()
                rows.append({"site": site, "label": name, "other": other, "overlap": float(both / max(any_of, 1))})
    return pl.DataFrame(rows)


def _shares(given: Labelled, site: str, threshold: float) -> np.ndarray:
    """`[neurons, categories]`: of each label's firings at this site."""
    rates = given.rates(site, threshold)
    total = rates.sum(0)
    if not total.all():
        silent = given.categories[int(np.flatnonzero(total == 0)[0])]
        raise DataError(f"{site}: no neuron ever fires on {silent!r}, so nothing covers it")
    return rates / total


def _fewest(share: np.ndarray, covered: float) -> np.ndarray:
    """`[neurons]` bool: the fewest whose shares come to `covered`; one that never fires is not among them."""
    order = np.argsort(-share, kind="stable")
    # Rounding must not want one more where the sum is reached exactly.
    number = int(np.searchsorted(share[order].cumsum(), covered - 1e-9)) + 1
    inside = np.zeros(len(share), bool)
    inside[order[:number]] = True
    return inside & (share > 0)
