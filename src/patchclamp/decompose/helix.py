"""A helix: numbers that lie on a line and turn around it.

    x(n) = a + b n + c cos(2 pi n / T) + s sin(2 pi n / T)

by least squares for the period T that explains most. A wave of the right period explains some of any coordinates: so
the p of dealing what the line leaves anew over the numbers. It says that neighbours resemble each other in some
period, no more: a bent line has a small p as well, with a period as long as the line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from patchclamp.decompose.embedding_geometry import Values, matrix, of_rows
from patchclamp.errors import DataError
from patchclamp.published import published

# The sine of a period of two steps is 0 at all whole numbers, and next to it small: it is left out, or a circle of any
# size would fit.
_SLIGHT = 0.05


@dataclass(frozen=True, eq=False)
class Helix:
    """A line and a circle around it, fitted to coordinates.

    Attributes:
        period: in numbers.
        r2: share of the variance that line and circle explain.
        r2_line: that the line explains alone.
        r2_circle: share of what the line leaves that the circle explains.
        p: the chance that numbers dealt anew leave a circle, of any period, that explains as much.
        rise: length of the line per number.
        radii: the half axes of the ellipse, the larger first: alike for a circle, the second 0 for a plain wave.
        tilt: degrees between the line and the plane of the circle: 90 for a helix that is not slanted.
    """

    period: float
    r2: float
    r2_line: float
    r2_circle: float
    p: float
    rise: float
    radii: tuple[float, float]
    tilt: float


@published(
    row="S065",
    title="From Neurons to Neutrons: A Case Study in Interpretability",
    authors="Kitouni et al.",
    year=2024,
    url="https://arxiv.org/abs/2405.17425",
    part="helix",
)
def fit_helix(
    coordinates: Values,
    numbers: ArrayLike | None = None,
    periods: tuple[float, float] | None = None,
    *,
    permutations: int = 199,
    seed: int = 0,
) -> Helix:
    """The helix that fits coordinates best (Kitouni et al., 2024); they may be rotated in any way.

    The paper's axis is the first component and its circle lies in the next two. Here neither is given: all
    coordinates are fitted at once, in as many dimensions as there are.

    Args:
        coordinates: `[numbers, dimensions]`, two dimensions or more: the first components of an embedding. Rows that
            are not finite are left out.
        numbers: `[numbers]`, which they are, in any steps; None: 0, 1, 2, ...
        periods: the shortest and the longest that is tried; None: from two steps to the whole range.
        permutations: deals of what the line leaves, for `p`.
        seed: of these.

    Raises:
        DataError: fewer than 8 numbers, fewer than two dimensions, periods that are none, nothing that varies.
    """
    values = matrix(coordinates, "coordinates")
    at = of_rows(np.arange(len(values)) if numbers is None else numbers, len(values), "numbers").astype(np.float64)
    there = np.isfinite(values).all(1) & np.isfinite(at)
    values, at = values[there], at[there]
    if len(values) < 8 or values.shape[1] < 2:
        raise DataError(f"a helix wants 8 numbers in 2 dimensions; there are {len(values)} in {values.shape[1]}")
    grid = _frequencies(at, periods)
    line = np.linalg.qr(np.stack([np.ones_like(at), at - at.mean()], 1))[0]
    centred = values - values.mean(0)
    left = centred - line @ (line.T @ centred)
    if not (whole := float((centred**2).sum())) or (rest := float((left**2).sum())) <= 1e-12 * whole:
        raise DataError("the coordinates lie on a line, or in one point: there is no circle to fit")

    waves = np.stack([_wave(each, at, line) for each in grid])
    found = _explained(waves, left)
    frequency, most = _refined(grid, found, lambda each: float(_explained(_wave(each, at, line)[None], left)[0]))
    circle = most / rest
    generator = np.random.default_rng(seed)
    dealt = [_explained(waves, left[generator.permutation(len(left))]).max() for _ in range(permutations)]
    rise, radii, tilt = _shape(frequency, at, values)
    return Helix(
        1 / frequency,
        1 - rest / whole * (1 - circle),
        1 - rest / whole,
        circle,
        float((1 + (np.asarray(dealt) >= found.max()).sum()) / (permutations + 1)),
        rise,
        radii,
        tilt,
    )


# Helpers --------------------------------------------------------------------------------------------


def _frequencies(at: np.ndarray, periods: tuple[float, float] | None) -> np.ndarray:
    """Ascending, eight to a peak of the spectrum of such a range of numbers."""
    steps, span = np.diff(np.unique(at)), float(np.ptp(at))
    shortest, longest = (2 * float(steps.min(initial=span)), span) if periods is None else periods
    if not 0 < shortest < longest:
        raise DataError(f"periods are the shortest and the longest, above 0; not {shortest:g} and {longest:g}")
    return np.linspace(1 / longest, 1 / shortest, max(16, int(8 * span * (1 / shortest - 1 / longest))))


def _refined(grid: np.ndarray, found: np.ndarray, explained: Callable[[float], float]) -> tuple[float, float]:
    """The frequency that explains most, and how much, from what the grid explains."""
    from scipy.optimize import minimize_scalar

    best, step = float(grid[found.argmax()]), float(grid[1] - grid[0])
    bounds = max(grid[0], best - step), min(grid[-1], best + step)
    exact: Any = minimize_scalar(
        lambda each: -explained(each), bounds=bounds, method="bounded", options={"xatol": 1e-6 * step}
    )
    return (float(exact.x), float(-exact.fun)) if -exact.fun > found.max() else (best, float(found.max()))


def _wave(frequency: float, at: np.ndarray, line: np.ndarray) -> np.ndarray:
    """`[numbers, 2]`: orthonormal directions of the cosine and the sine, less what the line explains of them."""
    turn = 2 * np.pi * frequency * (at - at.mean())
    waves = np.stack([np.cos(turn), np.sin(turn)], 1)
    waves -= line @ (line.T @ waves)
    basis, size, _ = np.linalg.svd(waves, full_matrices=False)
    return basis * (size > _SLIGHT * np.sqrt(len(at)))


def _explained(waves: np.ndarray, left: np.ndarray) -> np.ndarray:
    """`[periods]`: how much of the squares of `left` the waves `[periods, numbers, 2]` hold."""
    return ((waves.transpose(0, 2, 1) @ left) ** 2).sum((1, 2))


def _shape(frequency: float, at: np.ndarray, values: np.ndarray) -> tuple[float, tuple[float, float], float]:
    """Rise, radii, tilt."""
    turn, wide = 2 * np.pi * frequency * (at - at.mean()), float(at.std())
    design = np.stack([np.ones_like(at), (at - at.mean()) / wide, np.cos(turn), np.sin(turn)], 1)
    rise, *ellipse = np.linalg.lstsq(design, values, rcond=_SLIGHT)[0][1:]
    rise = rise / wide
    _, radii, plane = np.linalg.svd(np.stack(ellipse), full_matrices=False)
    across = plane[radii > _SLIGHT * radii[0]]
    length = float(np.linalg.norm(rise))
    above = float(np.linalg.norm(rise - across.T @ (across @ rise)))
    tilt = float(np.degrees(np.arcsin(min(1.0, above / length)))) if length > 0 else 90.0
    return length, (float(radii[0]), float(radii[1])), tilt
