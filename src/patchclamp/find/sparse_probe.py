"""Sparse probes: how few neurons tell a label from the rest, and which.

Neurons of a site are ranked for a label, the best `k` are kept, and a logistic regression on these alone is tried on
examples that it has not seen. Where one neuron does as well as many, the label has a neuron of its own; where the
figure grows slowly with `k`, it is spread over many. A probe is linear: what two neurons say only together (an
exclusive or) no choice of two makes it see.

Scales are those of the neurons themselves, mean removed, in standard deviations; both classes of a label weigh the
same. Ways to rank (`select`), x being a neuron and y the label:

    mean_diff             | mean of x on the label - mean elsewhere |
    f                     F of the analysis of variance; that of scikit-learn
    mutual_information    of x in bins of about equal numbers and y, in nats, less its bias (Miller and Madow)
    l1                    | weight | in a logistic regression with an L1 penalty
    hinge                 | weight | in a linear support vector machine
    adaptive              a logistic regression of the 1,024 best by mean_diff; the half with the larger | weights | is
                          kept and fitted anew, down to k
    exact                 the k neurons with the smallest balanced squared error
    random                by chance, for comparison

"exact" tries all neurons (k = 1) and all pairs (k = 2) of the 512 with the largest difference of means; for more,
neurons are added one by one to each of the 16 best pairs, then exchanged one for one as long as that helps, and the
best set is taken: often the best of all, and not proved to be. The paper solves an integer program for a hinge loss.
The squared error, with a small ridge, is known for each choice without fitting, which is what lets us try them all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from patchclamp.errors import DataError, unknown
from patchclamp.find.labelled import Labelled, Labels, labelled, table
from patchclamp.find.probes import (
    METRICS,
    Logistic,
    MutualInformation,
    Scale,
    alone,
    balance,
    examples,
    f_statistic,
    lasso,
    mean_difference,
    metrics,
    split,
)
from patchclamp.neurons import Neurons
from patchclamp.published import published
from patchclamp.recording import Recording

_PAPER = {
    "row": "S066",
    "title": "Finding Neurons in a Haystack: Case Studies with Sparse Probing",
    "authors": "Gurnee et al.",
    "year": 2023,
    "url": "https://arxiv.org/abs/2305.01610",
}
_FITTED = ("l1", "hinge", "adaptive", "exact")
_WAYS = ("mean_diff", "f", "mutual_information", *_FITTED, "random")


@published(**_PAPER, part="detector")
def sparse_probe(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    select: str = "mean_diff",
    k: int = 1,
    together: bool = False,
    groups: Labels | None = None,
    null: str | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Neurons:
    """Neurons as a sparse probe ranks them, best first (Gurnee et al., 2023).

    Args:
        recording: with `Pooled("max")`, "mean", "last" or "fired".
        labels: a label of the data, or one value for each example.
        positive: score neurons for this category only; None: each against the rest.
        select: how neurons are ranked; see the head of `patchclamp.find.sparse_probe`. Those that are fitted print how
            long it took.
        k: how many neurons the probe of a label keeps.
        together: one probe of all neurons; False: one for each site, as in the paper. The score of "mean_diff", "f"
            and "mutual_information" is the same either way.
        groups: a label of the data, or one value for each example (its document): examples of one group are never on
            both sides when `f1` is measured.
        null: "permute" adds `p` and `q`; labels are dealt over examples, whatever their groups. Fitted ways ("l1",
            "hinge", "adaptive", "exact") are fitted for each deal.
        permutations: how often labels are dealt anew.
        seed: of the deals, of the split, and of "random".

    Returns:
        All neurons: `score`, what it is ranked by, for its best label; `label`; `score_<label>`; `f1`, what it is
        worth alone: on 30% of the examples, held out, with a threshold midway between the means of the two classes
        of the others; `selected`, whether it is among the `k` best of a label (at its site, unless `together`).
        "l1" scores a neuron that was kept by 1 + its | weight |, another one by how near it is to being kept, below 1;
        "adaptive" by its weight in the last round that it took part in, "exact" by the share of the
        variance that is lost without it, or that it would add to the set; scores of neurons that were not kept are
        shrunk where that is needed for them to come after those that were.

    Raises:
        DataError: fewer than two labels, no `Pooled`, fewer than two examples of a category, more neurons asked for
            than there are, or groups that cannot be split.
        UnknownName: no such label, category or way to rank.
    """
    given = labelled(recording, labels, positive)
    found = examples(given, groups)
    blocks = {"all sites": slice(0, found.values.shape[1])} if together else found.sites
    _check(select, [k], blocks)
    scaled = Scale.of(found.values).apply(found.values)
    parts = list(blocks.values()) if select in _FITTED else [slice(0, scaled.shape[1])]
    rankings = [_ranking(select, scaled[:, part], [k], seed) for part in parts]

    def scores(of: Labelled) -> np.ndarray:
        right = found.right(of)
        # Labels dealt anew may leave one to none of the examples that have values: no neuron tells it.
        told = right.any(0) & ~right.all(0)
        made = np.zeros((scaled.shape[1], right.shape[1]))
        if told.any():
            made[:, told] = np.concatenate([ranking(right[:, told]) for ranking in rankings])
        return made

    started = time.perf_counter()
    score = scores(given)
    if select in _FITTED:
        print(f"sparse_probe: {select} fitted in {time.perf_counter() - started:.2g} s", file=sys.stderr)
    selected = np.zeros(len(score), bool)
    for part in blocks.values():
        for column in score[part].T:
            selected[part.start + np.argsort(-column, kind="stable")[:k]] = True
    columns: dict[str, np.ndarray | list] = {"f1": alone(given, found, score.argmax(1), seed), "selected": selected}
    return table(given, score, columns, null=null, permutations=permutations, seed=seed, again=scores)


@dataclass(frozen=True, eq=False)
class SparseProbeCurve:
    """What probes of few neurons are worth on examples that they have not seen.

    Attributes:
        frame: one row for each site, label and k: `site`, `label`, `k`, `f1`, `precision`, `recall`, `mcc`, `auroc`,
            `neurons` (their indices at the site, best first).
        select: how neurons were ranked.
        seconds: wall time that ranking them took.
        train, test: how many examples were learned from and held out.
    """

    frame: pl.DataFrame
    select: str
    seconds: float
    train: int
    test: int

    def best(self, label: str | None = None) -> pl.DataFrame:
        """The site with the largest F1 at each label and k.

        Raises:
            UnknownName: no such label.
        """
        frame = self.frame
        if label is not None:
            if label not in set(frame["label"]):
                raise unknown("label of the curve", label, frame["label"].unique().sort())
            frame = frame.filter(pl.col("label") == label)
        order = frame.sort("f1", descending=True, maintain_order=True)
        return order.unique(["label", "k"], keep="first", maintain_order=True).sort("label", "k")

    def __repr__(self) -> str:
        lines = [
            f"SparseProbeCurve: {self.frame['site'].n_unique()} sites, {self.train:,} examples to learn from, "
            f"{self.test:,} held out; ranked by {self.select} in {self.seconds:.2g} s. F1 at the best site:"
        ]
        for label in self.frame["label"].unique(maintain_order=True):
            rows = self.best(label).iter_rows(named=True)
            lines.append(f"  {label}: " + ", ".join(f"k={row['k']} {row['f1']:.2f} ({row['site']})" for row in rows))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.frame._repr_html_()


@published(**_PAPER, part="curve over k")
def sparse_probe_curve(
    recording: Recording,
    labels: Labels,
    positive: str | None = None,
    *,
    k: Sequence[int] = (1, 2, 4, 8, 16),
    select: str = "mean_diff",
    test_share: float = 0.3,
    C: float = 1.0,
    groups: Labels | None = None,
    seed: int = 0,
) -> SparseProbeCurve:
    """How well the best `k` neurons of each site predict a label, for growing `k` (Gurnee et al., 2023).

    Scales, rankings and fits know the examples that are learned from alone.

    Args:
        recording: with `Pooled`.
        labels: a label of the data, or one value for each example.
        positive: for this category only; None: each against the rest.
        k: numbers of neurons.
        select: as for `sparse_probe`.
        test_share: of each category, or of the groups, that is held out.
        C: weight of the examples against the size of the weights, in the probe that is fitted at last.
        groups: a label of the data, or one value for each example (its document); a group is never on both sides.
        seed: of the split, and of "random".

    Returns:
        A `SparseProbeCurve`.

    Raises:
        DataError, UnknownName: as `sparse_probe`.
    """
    given = labelled(recording, labels, positive)
    found = examples(given, groups)
    wanted = sorted({int(each) for each in k})
    _check(select, wanted, found.sites)
    assert given.codes is not None
    out = split(given.codes[found.kept], test_share, seed, found.groups)
    right = found.right(given)
    scale = Scale.of(found.values[~out])
    scaled = scale.apply(found.values)
    rows, seconds = [], 0.0
    for site, place in found.sites.items():
        values = scaled[:, place]
        started = time.perf_counter()
        chosen = _supports(select, values[~out], right[~out], wanted, seed)
        seconds += time.perf_counter() - started
        for label, category in enumerate(given.scored):
            for number in wanted:
                support = chosen[label, number]
                slope, intercept = Logistic(values[~out][:, support], C).fit(right[~out, label : label + 1])
                worth = metrics(right[out, label], values[out][:, support] @ slope + intercept)
                figures = {name: float(worth[name][0]) for name in METRICS}
                names = {"site": site, "label": given.categories[category], "k": number}
                rows.append({**names, **figures, "neurons": support.tolist()})
    frame = pl.DataFrame(rows, schema_overrides={"neurons": pl.List(pl.Int64)}).sort("label", maintain_order=True)
    return SparseProbeCurve(frame, select, seconds, int((~out).sum()), int(out.sum()))


# Helpers --------------------------------------------------------------------------------------------

Ranking = Callable[[np.ndarray], np.ndarray]  # from labels [examples, labels] bool to scores [neurons, labels]


def _check(select: str, k: Sequence[int], blocks: dict[str, slice]) -> None:
    if select not in _WAYS:
        raise unknown("way to rank neurons", select, _WAYS)
    if not k or min(k) < 1:
        raise DataError(f"k is a number of neurons, at least 1; not {min(k) if k else 'none'}")
    for site, place in blocks.items():
        if max(k) > place.stop - place.start:
            raise DataError(f"k={max(k)} neurons are asked for, and {site} has {place.stop - place.start}")


def _supports(
    select: str, values: np.ndarray, right: np.ndarray, k: Sequence[int], seed: int
) -> dict[tuple[int, int], np.ndarray]:
    """The neurons of each label and k, best first."""
    chosen = {}
    for those in [[each] for each in k] if select == "exact" else [k]:
        order = np.argsort(-_ranking(select, values, those, seed)(right), axis=0, kind="stable")
        chosen |= {(label, number): order[:number, label] for label in range(right.shape[1]) for number in those}
    return chosen


# Rankings -------------------------------------------------------------------------------------------

_FIRST, _BEST, _STARTS, _PENALTY, _RIDGE = 1024, 512, 16, 0.1, 1e-3


def _ranking(select: str, scaled: np.ndarray, k: Sequence[int], seed: int) -> Ranking:
    """How a way to rank scores these neurons, `[examples, neurons]` on one scale."""
    if select == "mean_diff":
        return lambda right: np.abs(mean_difference(scaled, right))
    if select == "f":
        return lambda right: f_statistic(scaled, right)
    if select == "mutual_information":
        return MutualInformation(scaled).of
    if select == "random":
        return lambda right: np.random.default_rng(seed).random((scaled.shape[1], right.shape[1]))
    if select == "adaptive":
        return _each(lambda right: _adaptive(scaled, right, k))
    if select == "exact":
        return _each(lambda right: _exact(scaled, right, max(k)))
    if select == "l1":
        return _each(lambda right: lasso(scaled, right, _PENALTY, seed))
    from sklearn.svm import LinearSVC

    machine = LinearSVC(loss="hinge", C=_PENALTY, class_weight="balanced", random_state=seed, max_iter=5000)
    return _each(lambda right: np.abs(machine.fit(scaled, right).coef_[0]))


def _each(score: Callable[[np.ndarray], np.ndarray]) -> Ranking:
    return lambda right: np.stack([score(column) for column in right.T], axis=1)


def _adaptive(scaled: np.ndarray, right: np.ndarray, k: Sequence[int]) -> np.ndarray:
    """`[neurons]`: the weight of each in the last round that it took part in. Every one of `k` is the size of one."""
    score = np.abs(mean_difference(scaled, right[:, None])[:, 0])
    dropped = []
    left = np.argsort(-score, kind="stable")
    size = min(max(_FIRST, *k, 1), len(score))
    while True:
        dropped.append(left[size:])
        left = left[:size]
        slope, _ = Logistic(scaled[:, left]).fit(right[:, None])
        score[left] = np.abs(slope[:, 0])
        left = left[np.argsort(-score[left], kind="stable")]
        if len(left) <= min(k):
            break
        size = max(len(left) // 2, *(each for each in k if each < len(left)))
    for each in dropped[::-1]:
        _put_below(score, each, left)
        left = np.concatenate([left, each])
    return score


def _put_below(score: np.ndarray, these: np.ndarray, those: np.ndarray) -> None:
    """Shrink the scores of `these` until they are smaller than those of `those`; their order stays."""
    if len(these) and (highest := score[these].max()) >= (least := score[those].min()):
        score[these] *= (1 - 1e-9) * least / highest if highest > 0 else 1.0


def _exact(scaled: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """`[neurons]`: what is lost without it for one of the best `k`, what it would add for another."""
    weight = balance(right)[:, None] / len(right)
    values = np.asarray(scaled, np.float64)
    values = values - (weight * values).sum(0)
    toward = (weight * values * np.where(right, 1.0, -1.0)[:, None]).sum(0)
    best = np.argsort(-np.abs(toward), kind="stable")[: max(_BEST, k)]
    among = values[:, best].T @ (weight * values[:, best]) + _RIDGE * np.eye(len(best))
    chosen = best[_subset(among, toward[best], k)]
    beside = values[:, chosen].T @ (weight * values)
    own = (weight * values**2).sum(0) + _RIDGE
    square = beside[:, chosen] + _RIDGE * np.eye(k)
    score = _gain(square, beside, own, toward[chosen], toward)
    whole = _explained(square, toward[chosen])
    for place, neuron in enumerate(chosen):
        rest = np.delete(np.arange(k), place)
        score[neuron] = whole - _explained(square[np.ix_(rest, rest)], toward[chosen][rest])
    _put_below(score, np.setdiff1d(np.arange(len(score)), chosen), chosen)
    return score


def _subset(among: np.ndarray, toward: np.ndarray, k: int) -> list[int]:
    """The `k` places that explain most: all are tried up to two, then added and exchanged."""
    own = among.diagonal()
    if k == 1 or len(own) == 1:
        return [int((toward**2 / own).argmax())]
    # Of every pair at once; a neuron beside itself explains nothing more.
    product = toward[:, None] * toward
    apart = np.outer(own, own) - among**2
    pairs = toward[:, None] ** 2 * own + toward**2 * own[:, None] - 2 * product * among
    pairs = pairs / np.where(apart > 0, apart, np.inf)
    pairs = np.where(np.tri(len(own), dtype=bool), -1.0, pairs)
    best = np.argsort(-pairs, axis=None, kind="stable")[: _STARTS if k > 2 else 1]
    starts = np.stack(np.unravel_index(best[pairs.flat[best] >= 0], pairs.shape), axis=1).tolist()
    sets = [_exchanged(among, toward, start, k) for start in starts]
    return max(sets, key=lambda each: _explained(among[np.ix_(each, each)], toward[each]))


def _exchanged(among: np.ndarray, toward: np.ndarray, chosen: list[int], k: int) -> list[int]:
    """`chosen` grown to `k` places one by one, then exchanged one for one as long as that helps."""
    own = among.diagonal()

    def added(to: list[int]) -> int:
        gain = _gain(among[np.ix_(to, to)], among[to], own, toward[to], toward)
        gain[to] = -1.0
        return int(gain.argmax())

    while len(chosen) < k:
        chosen = [*chosen, added(chosen)]
    changed = k > 2
    while changed:
        changed = False
        for place in range(k):
            rest = chosen[:place] + chosen[place + 1 :]
            other = [*rest, added(rest)]
            before, after = (_explained(among[np.ix_(each, each)], toward[each]) for each in (chosen, other))
            if after > before + 1e-9:
                chosen, changed = other, True
    return chosen


def _explained(square: np.ndarray, toward: np.ndarray) -> float:
    return float(toward @ np.linalg.solve(square, toward)) if len(toward) else 0.0


def _gain(
    square: np.ndarray, beside: np.ndarray, own: np.ndarray, chosen: np.ndarray, toward: np.ndarray
) -> np.ndarray:
    """`[neurons]`: what each would explain beyond the chosen ones, of which `beside` `[chosen, neurons]` says all."""
    through = np.linalg.solve(square, beside)
    left = (own - (beside * through).sum(0)).clip(min=1e-12)
    return (toward - chosen @ through) ** 2 / left
