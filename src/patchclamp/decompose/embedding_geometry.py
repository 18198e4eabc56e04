"""The geometry of embeddings of numbers: components, frequencies, and how much of them a network uses.

A network that is given numbers as tokens may lay them out on a line, on circles, or on both (`helix.py` fits that).
Principal components show it; where numbers add modulo p, frequencies do; and the network run with a few components in
place of the embedding says how much of it is used.

An untrained network is the control for all of it: measure that as well. What hidden features have to do with known
terms is in `concepts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from patchclamp.errors import DataError
from patchclamp.published import published

Values = torch.Tensor | ArrayLike

_part = partial(
    published,
    row="S065",
    title="From Neurons to Neutrons: A Case Study in Interpretability",
    authors="Kitouni et al.",
    year=2024,
    url="https://arxiv.org/abs/2405.17425",
)


@dataclass(frozen=True, eq=False)
class EmbeddingPCA:
    """Principal components of an embedding, the largest first.

    Attributes:
        labels: of the rows: the numbers.
        coordinates: `[rows, components]` float64; NaN for a row that was left out.
        directions: `[components, width]`, of length 1.
        mean: `[width]`, of the rows that count.
        explained: `[components]`, each one's share of the variance.
        order: `[components]`, rank correlation (Spearman's) with the labels: 1 or -1 for an ordered line; NaN where
            labels are no numbers.
        tied: `[components]` bool: variances too close to a neighbour's for so many rows (after North et al., 1982).
            Such components can be turned into each other freely: look at their plane, not at either.
    """

    labels: tuple[object, ...]
    coordinates: np.ndarray
    directions: np.ndarray
    mean: np.ndarray
    explained: np.ndarray
    order: np.ndarray
    tied: np.ndarray


@_part(part="embedding PCA")
def embedding_pca(
    embedding: Values,
    labels: Sequence[object] | None = None,
    *,
    components: int | None = None,
    trained: ArrayLike | None = None,
) -> EmbeddingPCA:
    """Principal components of the rows of an embedding (Kitouni et al., 2024).

    Args:
        embedding: `[rows, width]`.
        labels: of the rows; None: 0, 1, 2, ...
        components: how many; None: all there are.
        trained: `[rows]` bool: rows of numbers that training has seen; the others are noise, and left out, as are rows
            that are not finite.

    Raises:
        DataError: fewer than three rows count, more components than there are, labels of another number.
    """
    from scipy.stats import spearmanr
    from sklearn.decomposition import PCA

    values = matrix(embedding, "an embedding")
    names = tuple(range(len(values))) if labels is None else tuple(labels)
    counts = np.isfinite(values).all(1)
    if trained is not None:
        counts = counts & of_rows(trained, len(values), "trained").astype(bool)
    if len(names) != len(values):
        raise DataError(f"{len(names)} labels were given for {len(values)} rows: one for each is wanted")
    if counts.sum() < 3:
        raise DataError(f"{int(counts.sum())} rows of the embedding count: components want at least 3")
    most = min(int(counts.sum()) - 1, values.shape[1])
    number = most if components is None else components
    if not 1 <= number <= most:
        raise DataError(f"{number} components of {int(counts.sum())} rows of width {values.shape[1]}: there are {most}")
    fitted = PCA(most, svd_solver="full").fit(values[counts])
    coordinates = np.full((len(values), number), np.nan)
    coordinates[counts] = fitted.transform(values[counts])[:, :number]
    numeric = all(isinstance(each, (int, float, np.number)) for each in names)
    here = np.asarray(names, np.float64 if numeric else object)[counts]
    order = [float(_first(spearmanr(here, each))) if numeric else np.nan for each in coordinates[counts].T]
    return EmbeddingPCA(
        names,
        coordinates,
        np.asarray(fitted.components_)[:number],
        np.asarray(fitted.mean_),
        np.asarray(fitted.explained_variance_ratio_)[:number],
        np.asarray(order),
        _tied(np.asarray(fitted.explained_variance_), int(counts.sum()))[:number],
    )


@dataclass(frozen=True, eq=False)
class FourierPower:
    """How the rows of an embedding of Z_p vary around the circle.

    Attributes:
        share: `[p // 2 + 1]`, of the power at each frequency (times around the circle); the constant has 0.
    """

    share: np.ndarray

    def top(self, number: int = 5) -> float:
        """Share of the power in the `number` largest frequencies."""
        return float(np.sort(self.share)[::-1][:number].sum())

    @property
    def frequencies(self) -> np.ndarray:
        """All, the one of most power first."""
        return np.argsort(-self.share, kind="stable")[: len(self.share) - 1]


@_part(part="Fourier power")
def fourier_power(embedding: Values) -> FourierPower:
    """Share of the power of an embedding of the numbers 0 ... p - 1 at each frequency (Kitouni et al., 2024).

    A network that adds modulo p by turning around circles has few frequencies; one that is untrained has all alike.

    Args:
        embedding: `[p, width]`, a row for each number, in order.

    Raises:
        DataError: fewer than three rows, a row that is not finite, rows that are all alike.
    """
    values = matrix(embedding, "an embedding")
    if len(values) < 3:
        raise DataError(f"an embedding of {len(values)} numbers has no frequencies: at least 3 are wanted")
    if not np.isfinite(values).all():
        missing = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise DataError(
            f"the row of the number {missing} is not finite: frequencies want all of 0 ... {len(values) - 1}"
        )
    power = (np.abs(np.fft.rfft(values - values.mean(0), axis=0)) ** 2).sum(1)
    power[0] = 0.0
    if len(values) % 2 == 0:
        power[-1] /= 2  # every other frequency stands for its negative as well
    if power.sum() <= 1e-20 * (values**2).sum():
        raise DataError("all rows of the embedding are alike: there is nothing that varies")
    return FourierPower(power / power.sum())


@dataclass(frozen=True, eq=False)
class RankCurve:
    """What a network still does with an embedding of few dimensions.

    Attributes:
        rank: `[ranks]`.
        error: `[ranks]` float64, with the first components.
        random: `[ranks]`, with as many random directions, averaged over draws.
        full: with the embedding as it is.
        needed: the smallest rank tried that closes nearly all of the gap between the error at rank 0 and the full one;
            None where none does.
    """

    rank: np.ndarray
    error: np.ndarray
    random: np.ndarray
    full: float
    needed: int | None


@_part(part="rank")
def rank_needed(
    embedding: torch.Tensor,
    error: Callable[[torch.Tensor], float],
    ranks: Sequence[int] | None = None,
    *,
    closed: float = 0.95,
    draws: int = 3,
    seed: int = 0,
) -> RankCurve:
    """Of how many principal components does a network make use? Its error with an embedding projected on them.

    Args:
        embedding: `[rows, width]`.
        error: runs the network with another embedding, `[rows, width]` of the same dtype and device, in the place of
            its own, and gives a number that is smaller where it is better.
        ranks: how many components to try; None: 0, 1, 2, 4, 8, ... and all. 0, the mean alone, is always tried.
        closed: share of the gap between the error at rank 0 and the full one that `needed` closes.
        draws: of random directions, for each rank.
        seed: of these.

    Raises:
        DataError: a rank that the embedding does not have, a share that is none, an embedding that is not finite.
    """
    values = matrix(embedding, "an embedding")
    if not np.isfinite(values).all() or not 0 < closed <= 1:
        raise DataError(f"the embedding is finite and closed a share above 0; closed is {closed}")
    mean = values.mean(0)
    directions = np.linalg.svd(values - mean, full_matrices=False)[2]
    most, width = directions.shape
    wanted = sorted(
        {0, *([2**n for n in range(most.bit_length()) if 2**n < most] + [most] if ranks is None else ranks)}
    )
    if wanted[0] < 0 or wanted[-1] > most:
        raise DataError(f"ranks lie between 0 and {most}; {wanted[0] if wanted[0] < 0 else wanted[-1]} does not")

    def run(basis: np.ndarray) -> float:
        changed = mean + (values - mean) @ basis.T @ basis
        return float(error(torch.from_numpy(changed).to(embedding)))

    generator = np.random.default_rng(seed)
    with torch.no_grad():
        full = float(error(embedding))
        found = np.asarray([run(directions[:rank]) for rank in wanted])
        other = np.asarray(
            [
                np.mean([run(np.linalg.qr(generator.standard_normal((width, rank)))[0].T) for _ in range(draws)])
                for rank in wanted
            ]
        )
    enough = found <= found[0] - closed * (found[0] - full)
    return RankCurve(np.asarray(wanted), found, other, full, wanted[int(enough.argmax())] if enough.any() else None)


@dataclass(frozen=True, eq=False)
class Topography:
    """What a network gives over the plane of two components.

    Attributes:
        first, second: `[steps]` float64, coordinates on the two components.
        output: `[steps of first, steps of second, ...]` float64.
    """

    first: np.ndarray
    second: np.ndarray
    output: np.ndarray


@_part(part="topography")
def latent_topography(
    pca: EmbeddingPCA,
    run: Callable[[torch.Tensor], torch.Tensor],
    axes: tuple[int, int] = (0, 1),
    *,
    steps: int = 31,
    beyond: float = 0.1,
) -> Topography:
    """The output of a network while two components of its input move, and all others stay at their means.

    Args:
        pca: of the embedding that the network reads.
        run: from `[points, width]` float32, in the place of the embedding, to `[points]` or `[points, outputs]`.
        axes: which two components.
        steps: of each.
        beyond: how far past the smallest and the largest coordinate, as a share of their distance.

    Raises:
        DataError: components that there are not, fewer than two steps, an output of another length.
    """
    first, second = axes
    number = len(pca.directions)
    if first == second or not (0 <= first < number and 0 <= second < number) or steps < 2:
        raise DataError(f"axes are two of {number} components, with at least 2 steps each; not {axes}, {steps} steps")
    ends = []
    for axis in axes:
        low, high = np.nanmin(pca.coordinates[:, axis]), np.nanmax(pca.coordinates[:, axis])
        ends.append(np.linspace(low - beyond * (high - low), high + beyond * (high - low), steps))
    one, two = (each.reshape(-1, 1) for each in np.meshgrid(*ends, indexing="ij"))
    points = pca.mean + one * pca.directions[first] + two * pca.directions[second]
    with torch.no_grad():
        output = np.asarray(run(torch.from_numpy(points).float()).detach().cpu(), np.float64)
    if len(output) != len(points):
        raise DataError(f"run gave {len(output)} outputs for {len(points)} points: one for each is wanted")
    return Topography(ends[0], ends[1], output.reshape(steps, steps, *output.shape[1:]))


# Helpers --------------------------------------------------------------------------------------------


def matrix(values: Values, what: str) -> np.ndarray:
    """`[rows, width]` float64."""
    found = (
        values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, np.float64)
    )
    if found.ndim != 2 or not found.size:
        raise DataError(f"{what} is [rows, width]; not {list(found.shape)}")
    return found


def of_rows(given: ArrayLike, rows: int, what: str) -> np.ndarray:
    """One value for each row, as given."""
    given = np.asarray(given)
    if given.shape != (rows,):
        raise DataError(f"{what} is {list(given.shape)} where there are {rows} rows: one for each is wanted")
    return given


def _first(found: Any) -> Any:
    return found[0]


def _tied(variance: np.ndarray, rows: int) -> np.ndarray:
    """`[components]` bool: no farther from a neighbour than two standard deviations of such a difference."""
    close = -np.diff(variance) < 2 * np.sqrt(2) * variance[:-1] * np.sqrt(2 / rows)
    return np.append(close, False) | np.insert(close, 0, False)
