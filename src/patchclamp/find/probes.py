"""What probes share: whose example is what, one scale for all neurons, balanced logistic regressions, splits, metrics.

A probe predicts a label from the neurons of a site. Classes weigh the same here, however many examples each has:

    minimise  1/2 |w|^2 + C sum_i s_i log(1 + exp(-y_i (x_i w + b))),     s_i = examples / (2 examples of y_i)

The best `w` is a combination of examples, so that no more than min(examples, neurons) unknowns have to be found; the
result is that of all neurons, not of a part of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from patchclamp.errors import DataError, unknown
from patchclamp.find.labelled import Labelled, Labels
from patchclamp.recording import Recording
from patchclamp.statistics import roc_auc

METRICS = ("f1", "precision", "recall", "mcc", "auroc")


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples that have a number for each neuron.

    Attributes:
        sites: where the neurons of each site lie among all.
        values: `[kept, neurons of all sites]` float32.
        kept: `[examples]` bool; an example without positions that count is left out.
        groups: `[kept]` int64: examples of one group are on one side of any split; None: each is its own.
    """

    sites: dict[str, slice]
    values: np.ndarray
    kept: np.ndarray
    groups: np.ndarray | None

    def right(self, given: Labelled) -> np.ndarray:
        """`[kept, scored categories]` bool: which examples are of the category."""
        assert given.codes is not None
        return given.codes[self.kept][:, None] == np.asarray(given.scored)


def examples(given: Labelled, groups: Labels | None = None) -> Examples:
    """The examples of a recording, for a probe.

    Raises:
        DataError: no `Pooled`; a label of tokens; a category with fewer than two examples that have positions;
            groups of another number.
        UnknownName: groups name no label of the data.
    """
    parts = [given.pooled(site) for site in given.recording]
    if given.codes is None:
        raise DataError("a label of tokens has no value for an example: a probe wants one for each example")
    values = np.concatenate(parts, axis=1)
    kept = np.asarray(np.isfinite(values).all(axis=1))
    for place, category in enumerate(given.categories):
        number = int((given.codes[kept] == place).sum())
        if number < 2:
            raise DataError(
                f"a probe wants at least two examples of each category that have a position that counts; "
                f"{category!r} has {number}"
            )
    edges = np.cumsum([0, *(part.shape[1] for part in parts)])
    sites = {site: slice(edges[place], edges[place + 1]) for place, site in enumerate(given.recording)}
    return Examples(sites, values[kept], kept, _groups(given.recording, groups, kept))


# Scale ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and standard deviation of each neuron, `[neurons]` float32; a neuron that never changes becomes 0."""

    mean: np.ndarray
    deviation: np.ndarray

    @staticmethod
    def of(values: np.ndarray) -> Scale:
        """The scale of `[examples, neurons]`."""
        mean = values.mean(0, dtype=np.float64)
        deviation = np.sqrt(((values - mean.astype(np.float32)) ** 2).mean(0, dtype=np.float64))
        still = deviation <= 1e-6 * np.abs(mean)
        return Scale(mean.astype(np.float32), np.where(still, np.inf, deviation).astype(np.float32))

    def apply(self, values: np.ndarray) -> np.ndarray:
        """`[examples, neurons]` float32, in standard deviations from the mean."""
        return (values - self.mean) / self.deviation


def balance(right: np.ndarray) -> np.ndarray:
    """`[examples, labels]` float64: weights with which both classes of each label count the same, 1 on average."""
    share = right.mean(0)
    return np.where(right, 0.5 / np.where(share > 0, share, 1.0), 0.5 / np.where(share < 1, 1 - share, 1.0))


# A neuron by itself -------------------------------------------------------------------------------------


def mean_difference(scaled: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`[neurons, labels]` float64: mean on the label less the mean elsewhere, of `[examples, neurons]` on one scale."""
    on = (scaled.T @ right.astype(np.float32)).astype(np.float64)
    count = right.sum(0)
    return on / count - (scaled.sum(0, dtype=np.float64)[:, None] - on) / (len(right) - count)


def f_statistic(scaled: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`[neurons, labels]`: F of the analysis of variance of a label against the rest."""
    share = right.mean(0)
    explained = (mean_difference(scaled, right) ** 2 * share * (1 - share)).clip(max=1 - 1e-9)
    return (len(right) - 2) * explained / (1 - explained)


class MutualInformation:
    """Mutual information of neurons and labels, in nats, by bins.

    Each neuron's examples are cut into bins of about equal numbers, never between equal values; some
    sqrt(examples / 5) of them, from 3 to 16. The plug-in estimate is too large by about (cells - bins - labels + 1) /
    (2 examples), counting those that are not empty (Miller and Madow, 1955), which is taken off: a neuron that says
    nothing has about 0, and may have less.

    Args:
        values: `[examples, neurons]`.
    """

    def __init__(self, values: np.ndarray) -> None:
        number = values.shape[0]
        bins = int(np.clip(round(np.sqrt(number / 5)), 3, 16))
        ordered: np.ndarray = np.sort(np.ascontiguousarray(values.T), axis=1)
        self._bin: np.ndarray = np.zeros_like(values, dtype=np.uint8)
        for each in range(1, bins):
            self._bin += values > ordered[:, max(number * each // bins - 1, 0)]
        self._bins = bins

    def of(self, right: np.ndarray) -> np.ndarray:
        """`[neurons, labels]` float64, of `right` `[examples, labels]` bool."""
        number, on = len(right), right.sum(0)
        kinds = np.stack([on, number - on])
        learned = right.astype(np.float32)
        found = np.zeros((self._bin.shape[1], right.shape[1]))
        cells = np.zeros_like(found)
        filled = np.zeros(len(found))
        for each in range(self._bins):
            inside = (self._bin == each).astype(np.float32)
            count, hit = inside.sum(0), (inside.T @ learned).astype(np.float64)
            for kind, both in zip(kinds, (hit, count[:, None] - hit), strict=True):
                expected = count[:, None] * kind / number
                found += np.where(both > 0, both * np.log(np.where(both > 0, both / np.maximum(expected, 1e-9), 1)), 0)
                cells += both > 0
            filled += count > 0
        return found / number - (cells - filled[:, None] - 1) / (2 * number)


# Logistic regression ----------------------------------------------------------------------------------


class Logistic:
    """Logistic regressions on the same examples, for one set of labels after the other.

    Args:
        values: `[examples, neurons]`, on one scale.
        C: weight of the examples against the size of the weights of neurons; as in scikit-learn.
    """

    def __init__(self, values: np.ndarray, C: float = 1.0) -> None:
        if not 0 < C < np.inf:
            raise DataError(f"C is a number above 0; not {C}")
        values = np.asarray(values, np.float64)
        wide = values.shape[0] < values.shape[1]
        square, directions = np.linalg.eigh(values @ values.T if wide else values.T @ values)
        real = square > 1e-10 * max(square[-1], 1e-30)
        size, directions = np.sqrt(square[real]), directions[:, real]
        # Examples in their own coordinates, and what leads from these back to neurons.
        inner = directions * size if wide else values @ directions
        self._back = values.T @ (directions / size) if wide else directions
        self._inner = np.concatenate([inner, np.ones((len(values), 1))], axis=1)
        # The intercept is free, but for what keeps the equations solvable.
        self._penalty = np.append(np.full(int(real.sum()), 1 / C), 1e-9)[:, None]

    def fit(self, right: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The regressions of `right` `[examples, labels]` bool.

        Args:
            right: which examples are of each label.
            weights: `[examples, labels]`; 0 leaves an example out. None: `balance(right)`.

        Returns:
            Weights `[neurons, labels]` and intercepts `[labels]`, float64.
        """
        sign = np.where(right, 1.0, -1.0)
        found = _newton(self._inner, self._penalty, sign, balance(right) if weights is None else weights)
        return self._back @ found[:-1], found[-1]


def lasso(scaled: np.ndarray, right: np.ndarray, C: float, seed: int) -> np.ndarray:
    """A logistic regression with an L1 penalty as scores `[neurons]`, of `right` `[examples]` bool.

    Of a neuron that is kept 1 + |weight|; of another the slope of the loss there, in units of the penalty: below 1, or
    it would be kept.
    """
    from sklearn.linear_model import LogisticRegression

    # The intercept is part of the penalty here; written large it costs next to nothing.
    how = {"solver": "liblinear", "intercept_scaling": 10.0, "max_iter": 5000, "random_state": seed}
    probe = LogisticRegression(l1_ratio=1, C=C, class_weight="balanced", **how).fit(scaled, right)
    weight = np.abs(probe.coef_[0])
    sign = np.where(right, 1.0, -1.0)
    pull = balance(right[:, None])[:, 0] * sign * expit(-sign * probe.decision_function(scaled))
    slope = C * np.abs(pull.astype(np.float32) @ scaled)
    return np.where(weight > 0, 1 + weight, slope.clip(max=1 - 1e-6))


# Splits -----------------------------------------------------------------------------------------------


def split(codes: np.ndarray, share: float, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Which examples are held out, `[examples]` bool: `share` of each category, or of the groups.

    Raises:
        DataError: a share that is none, or no split of the groups leaves every category on both sides.
    """
    if not 0 < share < 1:
        raise DataError(f"test_share is a share between 0 and 1; not {share}")
    out = np.zeros(len(codes), bool)
    if groups is None:
        generator = np.random.default_rng(seed)
        for each in np.unique(codes):
            places = generator.permutation(np.flatnonzero(codes == each))
            out[places[: min(max(round(share * len(places)), 1), len(places) - 1)]] = True
        return out
    from sklearn.model_selection import GroupShuffleSplit

    wanted = np.unique(codes)
    if len(np.unique(groups)) > 1:
        for train, test in GroupShuffleSplit(_TRIES, test_size=share, random_state=seed).split(codes, groups=groups):
            if all(np.array_equal(np.unique(codes[side]), wanted) for side in (train, test)):
                out[test] = True
                return out
    raise DataError(
        "no split by groups leaves examples of every category on both sides: a category lies in too few groups"
    )


def folds(codes: np.ndarray, number: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The fold of each example, `[examples]` int64: categories are spread evenly, a group is in one fold.

    Raises:
        DataError: without some fold a category would have no example.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    parted = np.arange(len(codes)) if groups is None else groups
    number = min(number, *(len(np.unique(parted[codes == each])) for each in np.unique(codes)))
    if number < 2:
        raise DataError("a category lies in one group only: nothing of it can be held out")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    fold = np.zeros(len(codes), np.int64)
    for place, (train, test) in enumerate(kind(number, shuffle=True, random_state=seed).split(codes, codes, groups)):
        fold[test] = place
        if len(np.unique(codes[train])) < len(np.unique(codes)):
            raise DataError("folds by groups leave a category without examples: give fewer or smaller groups")
    return fold


# Metrics ----------------------------------------------------------------------------------------------


def metrics(right: np.ndarray, decision: np.ndarray) -> dict[str, np.ndarray]:
    """What probes are worth, `[probes]` float64 each: F1, precision, recall, MCC, area under the ROC curve.

    Args:
        right: `[examples]` bool, of both kinds.
        decision: `[examples, probes]`, above 0 where the probe says yes. What divides by nothing is 0.
    """
    said, truth = decision > 0, right[:, None]
    hit, false = ((said & truth).sum(0), (said & ~truth).sum(0))
    missed, passed = ((~said & truth).sum(0), (~said & ~truth).sum(0))
    product = np.sqrt((hit + false).astype(float) * (hit + missed) * (passed + false) * (passed + missed))
    return {
        "f1": _ratio(2 * hit, 2 * hit + false + missed),
        "precision": _ratio(hit, hit + false),
        "recall": _ratio(hit, hit + missed),
        "mcc": _ratio(hit * passed - false * missed, product),
        "auroc": np.atleast_1d(roc_auc(right, decision)),
    }


def alone(given: Labelled, found: Examples, best: np.ndarray, seed: int) -> np.ndarray:
    """`[neurons]`: F1 of each neuron for its label, the place of which among those scored is `best`.

    The threshold lies midway between the means of both classes, on 70% of the examples; F1 is that of the others.
    """
    assert given.codes is not None
    out = split(given.codes[found.kept], 0.3, seed, found.groups)
    right, values = found.right(given), found.values
    worth = np.empty(len(best))
    for label in np.unique(best):
        columns, truth = np.flatnonzero(best == label), right[:, label]
        on, off = (values[~out & side][:, columns].mean(0, dtype=np.float64) for side in (truth, ~truth))
        said = (values[out][:, columns] - (on + off) / 2) * np.sign(on - off) > 0
        true = truth[out]
        worth[columns] = 2 * said[true].sum(0) / (said.sum(0) + true.sum())
    return worth


# Helpers --------------------------------------------------------------------------------------------

_TRIES = 100
_EXACT = 200  # unknowns up to which the equations are solved as they are
_STEPS, _PRECISION = 60, 1e-7


def _newton(inner: np.ndarray, penalty: np.ndarray, sign: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`[unknowns, labels]`: Newton's method for all labels at once, each step halved until it helps."""

    def objective(at: np.ndarray) -> np.ndarray:
        margin = sign * (inner @ at)
        return (penalty * at**2).sum(0) / 2 + (weights * np.logaddexp(0, -margin)).sum(0)

    found = np.zeros((inner.shape[1], sign.shape[1]))
    value, first = objective(found), None
    for _ in range(_STEPS):
        wrong = expit(-sign * (inner @ found))
        gradient = penalty * found - inner.T @ (weights * sign * wrong)
        length = np.sqrt((gradient**2).sum(0))
        first = length if first is None else first
        if (length <= _PRECISION * first + 1e-12).all():
            break
        curvature = weights * wrong * (1 - wrong)
        step = _solve(inner, penalty, curvature, gradient)
        size = np.ones(sign.shape[1])
        moved = found - step
        then = objective(moved)
        for _ in range(30):
            worse = then > value + 1e-12 * np.abs(value)
            if not worse.any():
                break
            size[worse] /= 2
            moved = found - size * step
            then = objective(moved)
        found, value = moved, then
    return found


def _solve(inner: np.ndarray, penalty: np.ndarray, curvature: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The Newton step of each label, `[unknowns, labels]`."""
    if inner.shape[1] <= _EXACT:
        matrix = (inner.T[None] * curvature.T[:, None, :]) @ inner
        places = np.arange(inner.shape[1])
        matrix[:, places, places] += penalty[:, 0]
        return np.linalg.solve(matrix, gradient.T[:, :, None])[:, :, 0].T
    # Conjugate gradients. In these coordinates the equations are nearly diagonal, so that few rounds do.
    diagonal = (inner**2).T @ curvature + penalty
    step, left = np.zeros_like(gradient), gradient.copy()
    scaled = left / diagonal
    toward, inward = scaled.copy(), (left * scaled).sum(0)
    enough = np.minimum(0.1, np.sqrt(np.sqrt((gradient**2).sum(0)) / len(inner))) ** 2 * inward
    for _ in range(_EXACT):
        if (inward <= enough).all():
            break
        bent = inner.T @ (curvature * (inner @ toward)) + penalty * toward
        along = inward / np.maximum((toward * bent).sum(0), 1e-300)
        step, left = step + along * toward, left - along * bent
        scaled = left / diagonal
        now = (left * scaled).sum(0)
        toward, inward = scaled + now / np.maximum(inward, 1e-300) * toward, now
    return step


def _groups(recording: Recording, groups: Labels | None, kept: np.ndarray) -> np.ndarray | None:
    if groups is None:
        return None
    if isinstance(groups, str):
        found = recording.codes.get(groups)
        if found is None:
            raise unknown("label of the data", groups, recording.codes, "Or give the group of each example.")
        return np.asarray(found, np.int64)[kept]
    if len(groups) != len(kept):
        raise DataError(f"{len(groups)} groups were given for {len(kept)} examples: one for each is wanted")
    return np.unique([str(each) for each in groups], return_inverse=True)[1].astype(np.int64)[kept]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0.0)
