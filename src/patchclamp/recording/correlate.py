"""`correlate`: which neurons of two models do the same, by Pearson's correlation of all pairs of them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.data import as_data
from patchclamp.errors import DataError
from patchclamp.model.load import load
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.progress import progress as progress_bar
from patchclamp.recording.corpus import Reading
from patchclamp.recording.cross_moments import BLOCK_ROWS, CrossMoments
from patchclamp.recording.forward import batch_tokens_for
from patchclamp.recording.model_correlation import ModelCorrelation
from patchclamp.recording.paired_rows import ModelRows, PairedRows, Per, RecordedRows
from patchclamp.recording.positions import Choice, Positions
from patchclamp.recording.record import _corpus
from patchclamp.recording.recording import Recording
from patchclamp.recording.summaries.pairs import Partners, best_of, multiplied_in, pieces
from patchclamp.recording.summaries.summary import whole

_FEWEST_BLOCK_ROWS = 64


def correlate(
    first: Model | nn.Module | Recording,
    second: Model | nn.Module | Recording,
    data: Any = None,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    second_sites: str | Site | Iterable[str | Site] | None = None,
    k: int = 10,
    *,
    per: Per = "token",
    matrix: bool = False,
    memory: int | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    special_tokens: bool = False,
    positions: str | Choice = "all",
    progress: bool = True,
) -> ModelCorrelation:
    """Correlate every neuron of one model with every neuron of another, over the same data; keep the best partners.

    All pairs take 8 bytes each while they are summed. Where that is more than `memory`, the neurons of the first model
    are taken some at a time, with a pass over the data for each part; how many is said before it starts. The second
    model's activations are not kept in either case. r is off by less than 1e-3 whatever the data, in practice by 1e-6.

    Args:
        first: a model; or a recording that kept its activations (`record(..., activations=True)`), which are then read
            from disk in each pass.
        second: another model, or another recording.
        data: what both models read, as for `record`; None for recordings.
        sites: of the first model: names or globs. All of its neurons are correlated with all of the second's.
        second_sites: of the second model; None for the same names.
        k: how many partners each neuron keeps, those with the largest |r|.
        per: "token": rows are tokens (positions), which must be the same for both; "example": rows are means over the
            tokens of an example, for models whose tokenizers differ.
        matrix: also keep r of all pairs, 4 bytes each.
        memory: most bytes for what is summed and kept. Default: half of the machine's, on a GPU four fifths of what
            is free there.
        max_length: longest text in tokens, as for `record`.
        batch_tokens: padded tokens of one forward pass; default: 2,048 on a processor, else 4,096.
        special_tokens: count the tokens that the tokenizer adds too.
        positions: which tokens of a text count, as for `record`.
        progress: draw a progress bar, and say beforehand how many passes and bytes it takes.

    Returns:
        A `ModelCorrelation`; `found.matches()` is the table of neurons with their best partners. A neuron that is the
        same on every row has no correlation (NaN), and is nobody's partner.

    Raises:
        DataError: k below 1; the models do not have the same rows, or the recordings are of other data or kept no
            activations; no row is finite; `memory` is too little.
        UnknownName: no such site.
        ModelError, SiteNotReached: as for `record`.
    """
    k = whole("correlate", "k", k, at_least=1)
    if per not in ("token", "example"):
        raise DataError(f"correlate: per is 'token' or 'example', not {per!r}")
    if memory is not None:
        memory = whole("correlate", "memory", memory, at_least=1)
    chosen = (sites, sites if second_sites is None else second_sites)
    rows: PairedRows
    if isinstance(first, Recording) and isinstance(second, Recording):
        if data is not None:
            raise DataError("correlate: recordings bring their data; leave out data=")
        rows = RecordedRows((first, second), chosen, per)
    elif isinstance(first, Recording) or isinstance(second, Recording):
        raise DataError("correlate: give two models and data, or two recordings")
    else:
        if data is None:
            raise DataError("correlate: two models need data= that both read")
        reading = Reading(max_length, special_tokens, "cut", 0, Positions(positions))
        rows = _model_rows((first, second), data, chosen, reading, batch_tokens, per, progress)
    found = _correlated(rows, k, matrix, memory, progress)
    if found.left_out:
        warnings.warn(
            f"{found.left_out} of {found.left_out + found.count} rows hold a NaN or an infinity and were left out",
            stacklevel=2,
        )
    return found


def _model_rows(
    given: tuple[Any, Any],
    data: Any,
    sites: tuple[Any, Any],
    reading: Reading,
    batch_tokens: int | None,
    per: Per,
    show: bool,
) -> ModelRows:
    first, second = (each if isinstance(each, Model) else load(each) for each in given)
    chosen = (first.select(sites[0]), second.select(sites[1]))
    if not all(chosen):
        raise DataError("no sites are asked for: sites='mlp.*' takes every MLP")
    accepted = as_data(data)
    corpora = (_corpus(first, accepted, reading, show), _corpus(second, accepted, reading, show))
    return ModelRows((first, second), corpora, chosen, batch_tokens_for(first, batch_tokens), per)


# Passes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """How all pairs are gone through: some neurons of the first model in each pass.

    Attributes:
        number: of passes over the data.
        neurons: of the first model in each pass (in the last there may be fewer).
        block_rows: rows that are multiplied at once.
        nbytes: what is held.
    """

    number: int
    neurons: int
    block_rows: int
    nbytes: int


def passes_for(first: int, second: int, rows: int, k: int, matrix: bool, memory: int, itemsize: int) -> Passes:
    """As few passes as `memory` allows.

    Raises:
        DataError: not even one neuron at a time fits; the message says what would.
    """
    kept = 16 * (first + 2 * second) * k + (4 * first * second if matrix else 0)
    block = max(1, min(BLOCK_ROWS, rows))

    def needed(neurons: int) -> int:
        return kept + CrossMoments.bytes_for(neurons, second, block, itemsize)

    # Small blocks cost time, many passes cost more.
    while block > _FEWEST_BLOCK_ROWS and needed(1) - kept > (memory - kept) // 2:
        block //= 2
    if needed(1) > memory:
        hint = "; leave out matrix=True" if matrix else "; take fewer sites"
        raise DataError(
            f"correlate: {first:,} x {second:,} pairs of neurons need at least {needed(1) / 1e6:,.1f} MB, and memory "
            f"is {memory / 1e6:,.1f} MB{hint}"
        )
    low, high = 1, first
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= memory else (low, middle - 1)
    number = -(-first // low)
    neurons = -(-first // number)
    return Passes(-(-first // neurons), neurons, block, needed(neurons))


def _correlated(rows: PairedRows, k: int, matrix: bool, memory: int | None, show: bool) -> ModelCorrelation:
    first, second = (sum(each.values()) for each in rows.sizes)
    dtype = multiplied_in(*rows.dtypes)
    limit = _usual_memory() if memory is None else memory
    passes = passes_for(first, second, rows.rows, k, matrix, limit, dtype.itemsize)
    if show:
        print(
            f"{first:,} x {second:,} pairs of neurons in {passes.number} pass{'es' * (passes.number > 1)} with "
            f"{passes.nbytes / 1e6:,.0f} MB: {rows.pass_in_words}",
            file=sys.stderr,
        )
    best = _Best(first, second, k, matrix)
    count = 0
    with progress_bar("correlating", passes.number * rows.rows, "rows", show) as bar:
        for start in range(0, first, passes.neurons):
            part = slice(start, min(first, start + passes.neurons))
            moments = None
            for here, there in rows.read(part):
                if moments is None:
                    width, device = part.stop - part.start, here[0].device
                    moments = CrossMoments(width, second, dtype=dtype, device=device, block_rows=passes.block_rows)
                moments.add(here, there)
                bar.advance(len(here[0]))
            if moments is not None:
                moments.close()
                count = moments.count
            if moments is None or not count:
                raise DataError("correlate: no row is finite for both models")
            best.take(moments, part)
    sites = {"first": rows.sizes[0], "second": rows.sizes[1]}
    return ModelCorrelation(sites, count, rows.left_out, *best.partners(), best.r, passes.number)


class _Best:
    """The best partners so far, both ways, and r of all pairs if it is kept."""

    def __init__(self, first: int, second: int, k: int, matrix: bool) -> None:
        self._k = (min(k, second), min(k, first))
        self._of_first: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._of_second = (
            torch.zeros(second, 0, dtype=torch.int64),
            torch.zeros(second, 0, dtype=torch.float64),
        )
        self.r = np.empty((first, second), np.float32) if matrix else None

    def take(self, moments: CrossMoments, part: slice) -> None:
        """Take in some neurons of the first model, with all of the second; their order is that of the model."""
        rows, columns = moments.comoment.shape
        for piece in pieces(rows, columns):
            r = moments.r(piece)
            if self.r is not None:
                self.r[part.start + piece.start : part.start + piece.stop] = r.cpu().numpy()
            self._of_first.append(tuple(each.cpu() for each in best_of(r, self._k[0])))  # type: ignore[arg-type]
        merged = []
        for piece in pieces(columns, rows):
            index, score = (each.cpu() for each in best_of(moments.r(slice(None), piece).T.contiguous(), self._k[1]))
            index = torch.where(index < 0, -1, index + part.start)
            index = torch.cat([self._of_second[0][piece], index], dim=1)
            score = torch.cat([self._of_second[1][piece], score], dim=1)
            # What is held has smaller indices, and stands first.
            place, score = best_of(score, self._k[1])
            merged.append((torch.where(place < 0, -1, index.gather(1, place.clamp(min=0))), score))
        self._of_second = tuple(torch.cat(each) for each in zip(*merged, strict=True))  # type: ignore[assignment]

    def partners(self) -> tuple[Partners, Partners]:
        """Those of the first model's neurons, and of the second's."""
        first = (torch.cat(each).numpy() for each in zip(*self._of_first, strict=True))
        return Partners(*first), Partners(*(each.numpy() for each in self._of_second))


def _usual_memory() -> int:
    if torch.cuda.is_available():
        return int(0.8 * torch.cuda.mem_get_info()[0])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return 1 << 62  # not to be found out: no limit
