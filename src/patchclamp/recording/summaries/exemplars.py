"""`Exemplars`: for every neuron, examples to look at: its strongest, some of middling strength, and some at random.

An example is as strong as its largest activation, and that is the place that is shown. Examples of the middle and
random ones are drawn by a hash of the example's id: those with the largest hash are kept. So a draw is uniform, the
same whatever the order of the data, and two draws merge into the draw from both parts.

A text is shown as a window around the place. A map of a channel is shown as the mask of where it is above the neuron's
own high quantile, as in network dissection (Bau et al., 2017) and MILAN (Hernandez et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.nn import functional

from patchclamp.errors import DataError
from patchclamp.recording.batch import Batch, Setting, example_of, unpack_rank
from patchclamp.recording.folds import FOLDS, hashed
from patchclamp.recording.summaries.best import NO_RANK, best_places, keep_best, windows_around
from patchclamp.recording.summaries.summary import Summary, whole
from patchclamp.recording.thresholds import OwnQuantile, resolve

MOST_CELLS = 64 * 64
_KINDS = ("top", "middle", "random")
_PIXELS_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class ExemplarSet:
    """Up to k examples of every neuron of a site, from one fold.

    Attributes:
        values: [size, k], the largest activation of the neuron in each example; NaN where there are fewer than k.
        example: [size, k] int64, ids of the examples, each once; -1 where there are fewer.
        position: [size, k] int64, where in the example that activation is, the first place of equal ones; or -1.
            In a map it counts the pixels, along the last dimension first.
    """

    values: np.ndarray
    example: np.ndarray
    position: np.ndarray
    _shown: np.ndarray | None
    _cells: tuple[int, ...] | None

    @property
    def window(self) -> np.ndarray:
        """[size, k, 2 * context + 1] float16: the neuron's values around each place, as in `TopExamples.window`.

        Raises:
            DataError: these are maps, which have masks; or no context was asked for.
        """
        if self._shown is None or self._cells is not None:
            reason = "these are maps: see .mask" if self._cells else "ask for Exemplars(context=...)"
            raise DataError(f"no windows were kept: {reason}")
        return self._shown

    @property
    def mask(self) -> np.ndarray:
        """[size, k, height, width] bool: where the map is above the neuron's threshold; False where there is none.

        A grid of more than 64 x 64 cells (4096 in one dimension, 16 x 16 x 16 in three) is made coarser: a cell
        then stands for several pixels in each direction, and is True if any of them is above.

        Raises:
            DataError: the positions of this site lie on no grid.
        """
        if self._shown is None or self._cells is None:
            raise DataError("no masks were kept: the positions of this site lie on no grid, see .window")
        bits = np.unpackbits(self._shown, axis=-1, count=math.prod(self._cells))
        return bits.reshape(*self.example.shape, *self._cells).astype(bool)


class Exemplars(Summary):
    """Examples of every neuron for each of two folds: the k strongest, k of middling strength, and k at random.

    `top(fold)`, `middle(fold)` and `random(fold)` give them. Fold 0 is for describing a neuron, fold 1 for scoring the
    description (`recording.folds`). An example must not be split over two batches.

    Args:
        k: how many to keep of each sort, neuron and fold.
        quantile: the mask of a map is where it is above this quantile of the neuron's own activations, and above 0.
        context: positions of a text to keep the neuron's values at, before and after the place.
        middle: an example is of middling strength if its largest activation lies between these two quantiles (both
            included) of what the examples of the calibration sample reach.
        seed: draws the random examples and those of the middle. The random ones are the same for all neurons.

    Raises:
        DataError: k, context or seed is not a whole number, or out of range; quantiles are not in [0, 1].
    """

    name = "exemplars"
    agree = ("grid", "threshold", "low", "high")

    def __init__(
        self,
        k: int = 20,
        quantile: float = 0.99,
        context: int = 16,
        middle: tuple[float, float] = (0.25, 0.75),
        seed: int = 0,
    ) -> None:
        self.k = whole("Exemplars", "k", k, at_least=1)
        self.quantile = OwnQuantile(quantile).quantile
        self.context = whole("Exemplars", "context", context, at_least=0)
        self._middle = _band(middle)
        self.seed = whole("Exemplars", "seed", seed, at_least=0)

    @property
    def threshold(self) -> np.ndarray:
        """[size] float32: what a map is above in a mask."""
        return self.array("threshold").astype(np.float32)

    @property
    def band(self) -> np.ndarray:
        """[size, 2] float32: the smallest and the largest activation of an example of middling strength."""
        return np.stack([self.array("low"), self.array("high")], axis=1).astype(np.float32)

    @property
    def grid(self) -> tuple[int, ...] | None:
        """The shape of the maps; None where positions lie on no grid."""
        return self._grid

    def top(self, fold: int = 0) -> ExemplarSet:
        """The examples with the largest activations, strongest first; of equal ones, the smaller id first."""
        return self._set("top", fold)

    def middle(self, fold: int = 0) -> ExemplarSet:
        """Examples drawn from those of middling strength, in random order."""
        return self._set("middle", fold)

    def random(self, fold: int = 0) -> ExemplarSet:
        """Examples drawn from all, in random order."""
        return self._set("random", fold)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Example and position of all of them, [3 * 2 * size, k] each."""
        rank = np.concatenate([self.array(f"{kind}_rank") for kind in _KINDS]).reshape(-1, self.k)
        return _unpacked(rank)

    @property
    def relative(self) -> bool:
        return True

    def parameters(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "quantile": self.quantile,
            "context": self.context,
            "middle": list(self._middle),
            "seed": self.seed,
        }

    def empty(self, setting: Setting) -> dict[str, torch.Tensor]:
        self._dtype = setting.dtype
        low, high = (_quantile_of_examples(setting, each) for each in self._middle)
        fixed = {"threshold": resolve(OwnQuantile(self.quantile), setting), "low": low, "high": high}
        return self._shelves(setting.grid) | {name: torch.from_numpy(each) for name, each in fixed.items()}

    def add(self, batch: Batch) -> None:
        self._fit_grid(batch)
        ids, first, _ = batch.spans
        maximum, row = batch.maxima
        shelf = batch.folds[first][:, None] * self.size + torch.arange(self.size, device=ids.device)
        rank = batch.rank[row]
        for kind in _KINDS:
            key = maximum if kind == "top" else _drawn(ids, self._salt(kind))[:, None].expand_as(rank)
            last, last_rank = self._key(kind)[:, -1], self.tensors[f"{kind}_rank"][..., -1].flatten()
            enters = (key > last[shelf]) | ((key == last[shelf]) & (rank < last_rank[shelf]))
            if kind == "middle":
                low, high = (self.tensors[name].to(maximum.dtype) for name in ("low", "high"))
                enters &= (maximum >= low) & (maximum <= high)
            example, neuron = enters.nonzero(as_tuple=True)
            if not len(example):
                continue
            # At most k of a batch for each neuron and fold: what is shown of the others need not be looked up.
            _, place, there = best_places(shelf[enters], key[enters], rank[enters], self.k)
            example, neuron = example[place[there]], neuron[place[there]]
            new = {"values": maximum[example, neuron], "rank": rank[example, neuron]}
            if self._grid is not None:
                new["mask"] = self._masks(batch, example, neuron)
            elif self.context:
                new["window"] = windows_around(batch, row[example, neuron], neuron, self.context)
            self._insert(kind, shelf[example, neuron], new)

    def combine(self, other: Self) -> None:
        for kind in _KINDS:
            there = other._held(kind)
            shelf, place = (there["rank"] != NO_RANK).nonzero(as_tuple=True)
            self._insert(kind, shelf, {name: each[shelf, place] for name, each in there.items()})

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        before, grid = self.tensors, self._grid
        if "grid" in state:  # a state brings its own grid
            fixed = {name: before[name] for name in ("threshold", "low", "high")}
            self.tensors = self._shelves(_grid_of(state["grid"])) | fixed
        try:
            super().restore(state)
        except DataError:
            self.tensors, self._grid = before, grid
            raise

    def _shelves(self, grid: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        if grid is not None and len(grid) > 3:
            raise DataError(f"Exemplars shows maps of one, two or three dimensions; those of {self.site} are {grid}")
        self._grid = grid
        shape = (FOLDS, self.size, self.k)
        tensors = {"grid": torch.from_numpy(np.asarray(grid or (), dtype=np.int64))}
        for kind in _KINDS:
            tensors[f"{kind}_values"] = torch.full(shape, -torch.inf, dtype=self._dtype)
            tensors[f"{kind}_rank"] = torch.full(shape, NO_RANK, dtype=torch.int64)
            if grid is not None:
                width = math.ceil(math.prod(_cells(grid)) / 8)
                tensors[f"{kind}_mask"] = torch.zeros(*shape, width, dtype=torch.uint8)
            elif self.context:
                width = 2 * self.context + 1
                tensors[f"{kind}_window"] = torch.full((*shape, width), torch.nan, dtype=torch.float16)
        return tensors

    def _fit_grid(self, batch: Batch) -> None:
        if batch.grid == self._grid:
            return
        if self._grid is None and bool((self.tensors["random_rank"] == NO_RANK).all()):
            device = batch.values.device
            self.tensors |= {name: each.to(device) for name, each in self._shelves(batch.grid).items()}
            self.tensors = {name: each for name, each in self.tensors.items() if not name.endswith("_window")}
            return
        raise DataError(f"the maps of {self.site} are {self._grid}; those of this batch are {batch.grid}")

    def _held(self, kind: str) -> dict[str, torch.Tensor]:
        """The shelves [2 * size, k, ...] of one sort by name, sharing memory with `tensors`."""
        names = [name for name in self.tensors if name.startswith(f"{kind}_")]
        return {name.removeprefix(f"{kind}_"): self.tensors[name].flatten(0, 1) for name in names}

    def _key(self, kind: str) -> torch.Tensor:
        """[2 * size, k]: what the shelves are sorted by."""
        held = self._held(kind)
        return held["values"] if kind == "top" else _priority(held["rank"], self._salt(kind))

    def _salt(self, kind: str) -> int:
        return 2 * self.seed + _KINDS.index(kind)

    def _insert(self, kind: str, shelf: torch.Tensor, new: dict[str, torch.Tensor]) -> None:
        values = f"{kind}_values"
        if new["values"].dtype != self.tensors[values].dtype:
            self.tensors[values], new["values"] = self.tensors[values].double(), new["values"].double()
        key = new["values"] if kind == "top" else _priority(new["rank"], self._salt(kind))
        keep_best(self._held(kind), self._key(kind), shelf, new, key)

    def _masks(self, batch: Batch, example: torch.Tensor, neuron: torch.Tensor) -> torch.Tensor:
        """[candidates, bytes] uint8: where the map of each candidate is above the neuron's threshold, eight a byte."""
        grid, device = self._grid, batch.values.device
        assert grid is not None
        _, _, count = batch.spans
        # Rows with a NaN are left out, so a map may lack pixels.
        row_of = torch.full((len(count), math.prod(grid)), -1, device=device)
        of_row = torch.arange(len(count), device=device).repeat_interleave(count)
        row_of[of_row, batch.position] = torch.arange(len(batch), device=device)
        threshold = self.tensors["threshold"].to(batch.values.dtype)
        at_once = max(1, _PIXELS_AT_ONCE // math.prod(grid))
        packed = []
        for examples, neurons in zip(example.split(at_once), neuron.split(at_once), strict=True):
            rows = row_of[examples]
            values = batch.values[rows.clamp(min=0), neurons[:, None]]
            maps = torch.where(rows < 0, -torch.inf, values).view(-1, 1, *grid)
            packed.append(_packed(_coarser(maps, grid).flatten(1) > threshold[neurons][:, None]))
        return torch.cat(packed)

    def _set(self, kind: str, fold: int) -> ExemplarSet:
        if fold not in range(FOLDS):
            raise DataError(f"Exemplars keeps the folds 0 and 1, not {fold!r}")
        held = {name.removeprefix(f"{kind}_"): self.array(name)[fold] for name in self.tensors if name.startswith(kind)}
        example, position = _unpacked(held["rank"])
        values = np.where(example < 0, np.array(np.nan, dtype=held["values"].dtype), held["values"])
        cells = None if self._grid is None else _cells(self._grid)
        shown = held.get("window") if cells is None else held["mask"]
        return ExemplarSet(values, example, position, shown, cells)


def _drawn(example: torch.Tensor, salt: int) -> torch.Tensor:
    """A random number for each example; the largest are drawn."""
    # Halved, so that no example has the number that stands for none.
    return hashed(example, salt) >> 1


def _priority(rank: torch.Tensor, salt: int) -> torch.Tensor:
    """The random number of the example of each rank; the smallest of all where there is none."""
    return torch.where(rank == NO_RANK, torch.iinfo(torch.int64).min, _drawn(example_of(rank), salt))


def _unpacked(rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The example ids and positions of ranks; -1 where nothing is held."""
    example, position = unpack_rank(rank)
    return np.where(rank == NO_RANK, -1, example), np.where(rank == NO_RANK, -1, position)


def _grid_of(array: np.ndarray) -> tuple[int, ...] | None:
    """The grid that an array names; None where it names none, or is no such array (which is then refused)."""
    given = np.asarray(array)
    if given.ndim != 1 or given.dtype.kind not in "iu" or not (given > 0).all():
        return None
    return tuple(given.tolist()) or None


def _cells(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the mask of a map."""
    return tuple(math.ceil(length / factor) for length, factor in zip(grid, _factors(grid), strict=True))


def _factors(grid: tuple[int, ...]) -> tuple[int, ...]:
    """How many pixels a cell of the mask is long in each dimension."""
    longest = round(MOST_CELLS ** (1 / len(grid)))
    return tuple(math.ceil(length / longest) for length in grid)


def _coarser(maps: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    factors = _factors(grid)
    if all(factor == 1 for factor in factors):
        return maps
    pools = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
    return pools[len(grid)](maps, factors, stride=factors, ceil_mode=True)


def _packed(bits: torch.Tensor) -> torch.Tensor:
    """[rows, bytes] uint8 of [rows, bits] bool, as `numpy.packbits` does it."""
    padded = functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    weight = 1 << torch.arange(7, -1, -1, device=bits.device)
    return (padded * weight).sum(2).to(torch.uint8)


def _quantile_of_examples(setting: Setting, q: float) -> np.ndarray:
    """[size] float64."""
    if setting.calibration is None or setting.calibration.quantile_of_examples is None:
        raise DataError(
            f"Exemplars needs to know how strong the examples of a sample are, and {setting.site} has not been "
            "calibrated on one"
        )
    found = np.asarray(setting.calibration.quantile_of_examples(q))
    if found.shape != (setting.size,) or not np.isfinite(found).all():
        raise DataError(f"the calibration of {setting.site} does not give one finite number for each neuron")
    return found.astype(np.float32).astype(np.float64)


def _band(middle: Any) -> tuple[float, float]:
    try:
        low, high = (OwnQuantile(each).quantile for each in middle)
    except (TypeError, ValueError) as error:
        raise DataError(f"Exemplars: middle is two quantiles, as (0.25, 0.75), not {middle!r}") from error
    if low > high:
        raise DataError(f"Exemplars: middle begins at its lower quantile, not {middle!r}")
    return float(low), float(high)
