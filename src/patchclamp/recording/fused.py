"""The usual summaries of a site in one walk over its activations, by compiled loops, while the pass still runs.

Each summary by itself reads every activation once or more; together they cost more than the network's own
arithmetic allows. What they need of a column is little, so one walk learns it for all: `Moments`, `FiringRate`,
`MinMax`, `TopExamples` without context, `ByToken`, and `ByLabel` of the first two. The rest take a `Batch` as ever.

The loops (`kernel.py`) want numba, which the extra `fast` brings; without it, or on a GPU, the summaries go their
own way and the results are the same.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from patchclamp.errors import warn
from patchclamp.recording.folds import FOLDS
from patchclamp.recording.pass_rows import PassRows
from patchclamp.recording.summaries import ByLabel, ByToken, FiringRate, MinMax, Moments, Summary, TopExamples

# A thread's share of the columns: too few and handing them out costs more than it brings.
_COLUMNS_AT_LEAST = 256


@cache
def available() -> bool:
    """Whether the loops can be had; says once where they cannot."""
    if importlib.util.find_spec("numba") is not None:
        return True
    warn("recording is slower than it could be: its compiled loops need numba (pip install 'patchclamp[fast]')")
    return False


class Fused:
    """The summaries of one site that are learned together.

    Args:
        summaries: the accumulators of the site, by name.

    Attributes:
        names: which of them are.
    """

    def __init__(self, summaries: Mapping[str, Summary]) -> None:
        self.names = frozenset(name for name, each in summaries.items() if _fits(each))
        self._summaries: dict[str, Any] = {name: summaries[name] for name in self.names}
        self._before: list[np.ndarray] = []

    def take(self, values: torch.Tensor, rows: PassRows) -> bool:
        """Take in what a pass shows.

        Args:
            values: [positions, size], all positions of the pass.
            rows: which of them count.

        Returns:
            False where a value is not finite, or the tensor is not one for these loops: then nothing was taken.
        """
        dtype = values.dtype
        if values.device.type != "cpu" or dtype not in (torch.float32, torch.float64) or not values.is_contiguous():
            return False
        held = self._summaries
        top, extremes = held.get("top_examples"), held.get("min_max")
        if any(each and each.tensors[key].dtype != dtype for each, key in ((top, "values"), (extremes, "min"))):
            return False
        if not len(rows):
            return True
        array = values.detach().numpy()
        if not self._sweep(array, rows):
            return False
        for name, each in held.items():
            if isinstance(each, ByLabel):
                _by_label(each, array, rows)
            elif name == "by_token":
                _by_token(each, array, rows)
        return True

    def _sweep(self, values: np.ndarray, rows: PassRows) -> bool:
        from patchclamp.recording.kernel import sweep

        size, held = values.shape[1], self._summaries
        moments, rate, extremes, top = (
            held.get(each) for each in ("moments", "firing_rate", "min_max", "top_examples")
        )
        thresholds = _thresholds(rate, values)
        # Near the mean squares do not cancel: what is held is near, and before that any row is nearer than zero.
        shift = values[rows.flat[0]].astype(np.float64)
        if moments is not None and int(moments.tensors["count"]):
            shift = moments.tensors["mean"].numpy()
        if not np.isfinite(shift).all():
            return False
        sums, squares = np.zeros(size), np.zeros(size)
        low, high = np.full(size, np.inf, values.dtype), np.full(size, -np.inf, values.dtype)
        fired = np.zeros((len(thresholds), size), np.int64)
        kept = [np.empty((size, 0), values.dtype), np.empty((size, 0), np.int64)]
        if top is not None:
            kept = [top.tensors["values"].numpy(), top.tensors["rank"].numpy()]
        self._remember(kept)
        arguments = (shift, sums, squares, low, high, thresholds, fired, *kept)
        if not all(_in_threads(size, sweep, (values, rows.flat, rows.rank), arguments)):
            for each, before in zip(kept, self._before, strict=True):
                each[:] = before
            return False
        if moments is not None:
            _join(moments, len(rows), shift, sums, squares)
        if rate is not None:
            rate.count_up(len(rows), torch.from_numpy(fired.T))
        if extremes is not None:
            extremes.join(torch.from_numpy(low), torch.from_numpy(high))
        return True

    def _remember(self, kept: list[np.ndarray]) -> None:
        """Keep what is written in place: a later row may be no number, and then nothing is to be taken."""
        if [each.shape for each in self._before] != [each.shape for each in kept]:
            self._before = [np.empty_like(each) for each in kept]
        for before, each in zip(self._before, kept, strict=True):
            before[:] = each


def _fits(summary: Summary) -> bool:
    """Whether the loops know this summary. A class of the user's own that is derived from one is another."""
    if type(summary) is ByLabel:
        return all(type(each) in (Moments, FiringRate) for each in summary.templates.values())
    if type(summary) is TopExamples:
        return not summary.context
    return type(summary) in (Moments, FiringRate, MinMax, ByToken)


def _by_label(summary: ByLabel, values: np.ndarray, rows: PassRows) -> None:
    from patchclamp.recording.kernel import sweep_groups

    size = values.shape[1]
    for label in summary.labels:
        codes, order, starts = rows.groups(label)
        groups = summary.groups(label)
        rate = groups[0].get("firing_rate") if groups else None
        thresholds = _thresholds(rate, values)
        shift = values[rows.flat[0]].astype(np.float64)
        sums, squares = np.zeros((len(codes), size)), np.zeros((len(codes), size))
        fired = np.zeros((len(codes), len(thresholds), size), np.int64)
        arguments = (shift, sums, squares, thresholds, fired)
        _in_threads(size, sweep_groups, (values, order, starts), arguments)
        for place, code in enumerate(codes.tolist()):
            number = int(starts[place + 1] - starts[place])
            if (moments := groups[code].get("moments")) is not None:
                _join(moments, number, shift, sums[place], squares[place])
            if rate is not None:
                groups[code]["firing_rate"].count_up(number, torch.from_numpy(fired[place].T))
        summary.count_up(label, torch.from_numpy(codes), torch.from_numpy(np.diff(starts)))


def _by_token(summary: Any, values: np.ndarray, rows: PassRows) -> None:
    from patchclamp.recording.kernel import count_groups

    groups, order, starts = rows.token_groups(summary.tensors["tokens"])
    slots = len(summary.tensors["tokens"])
    fired, total = summary.count_up(torch.from_numpy(groups), torch.from_numpy(np.diff(starts)))
    threshold = summary.tensors["threshold"].numpy().astype(values.dtype)
    for fold in range(FOLDS):
        begin, end = np.searchsorted(groups, [fold * (slots + 1), (fold + 1) * (slots + 1)])
        place = groups[begin:end] - fold * (slots + 1)
        place[place == slots] = -1
        arguments = (threshold, fired[fold].numpy(), total[fold].numpy())
        _in_threads(values.shape[1], count_groups, (values, order, starts[begin : end + 1], place), arguments)


def _thresholds(rate: Any, values: np.ndarray) -> np.ndarray:
    """[thresholds, size] in the dtype of the values."""
    if rate is None:
        return np.empty((0, values.shape[1]), values.dtype)
    return np.ascontiguousarray(rate.tensors["thresholds"].numpy().T.astype(values.dtype))


def _join(moments: Any, number: int, shift: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> None:
    """Take in rows of which these sums of what exceeds the shift are known."""
    from patchclamp.recording.kernel import join_moments

    held = (moments.tensors[name].numpy().reshape(-1) for name in ("count", "mean", "deviation"))
    join_moments(number, shift, sums, squares, *held)


def _in_threads(size: int, loop: Callable[..., Any], before: tuple, after: tuple) -> list[Any]:
    """Call `loop(*before, first, last, *after)` for ranges that make up all columns, each in a thread of its own."""
    number = max(1, min(torch.get_num_threads(), size // _COLUMNS_AT_LEAST))
    bounds = [size * each // number // 16 * 16 for each in range(number)] + [size]
    (first, last), *ranges = itertools.pairwise(bounds)
    others = [_threads().submit(loop, *before, start, stop, *after) for start, stop in ranges]
    return [loop(*before, first, last, *after), *(each.result() for each in others)]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads()), thread_name_prefix="patchclamp")
