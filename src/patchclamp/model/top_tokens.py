"""`TopTokens`: the tokens that neurons promote most, and how they are found for many neurons at a time.

What a neuron writes, through norm and unembedding, is one number for each token of the vocabulary: `[neurons,
vocabulary]` for all of them, which no memory holds (Llama-3.1-8B: 458,752 x 128,256). Some neurons at a time
are multiplied into one buffer, which is used again for the next ones, and only the best k of each row are kept.
The rows of that buffer have a multiple of 64 places, whatever the vocabulary: a product with an odd row stride takes
a third longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from patchclamp.errors import DataError, ModelError, unknown
from patchclamp.model.largest import largest
from patchclamp.model.norms import LinearPart, linear_part
from patchclamp.model.site import Site
from patchclamp.progress import Progress, progress

_STRIDE = 64
# More rows at a time gain nothing: by then a product is as fast as it gets.
_MOST_ROWS = {"cpu": 1024}
_MOST_ROWS_ELSEWHERE = 8192
# Rows of weights that are converted at once.
_ROWS_AT_ONCE = 4096
# Fewer are done before a progress bar is drawn.
_NEURONS_WITHOUT_A_BAR = 20_000


@dataclass(frozen=True, eq=False)
class TopTokens:
    """The tokens that each neuron promotes most, and, if asked for, those that it suppresses most.

    Attributes:
        ids: `[neurons, k]` int64 token ids, the most promoted first; of equal ones the smaller id.
        values: `[neurons, k]` float32, what the neuron adds to the logit for each unit of activation (before the
            division of the final norm, and before a soft cap).
        bottom_ids: as `ids`, the most suppressed first; None where they were not asked for.
        bottom_values: as `values`.
        sizes: site -> number of neurons; the rows of the arrays follow this order. Empty for vectors.
    """

    ids: np.ndarray
    values: np.ndarray
    bottom_ids: np.ndarray | None
    bottom_values: np.ndarray | None
    sizes: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, site: str | Site) -> TopTokens:
        """Those of one site: row i is neuron i."""
        name = site.name if isinstance(site, Site) else site
        if name not in self.sizes:
            raise unknown("site", name, self.sizes, "Only the sites that were asked for are here.")
        start = sum(size for each, size in list(self.sizes.items())[: list(self.sizes).index(name)])
        rows = slice(start, start + self.sizes[name])
        arrays = (self.ids, self.values, self.bottom_ids, self.bottom_values)
        return TopTokens(*(None if each is None else each[rows] for each in arrays), {name: self.sizes[name]})  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"TopTokens({len(self):,} neurons, {self.ids.shape[1]} tokens each)"


@dataclass(frozen=True)
class Written:
    """What the neurons of one site write, `[size, d]`, folded some rows at a time.

    Attributes:
        name: of the site; empty for vectors.
        weights: `[size, d]`, a view of the network's own.
        norm: what follows before the residual stream is reached, or None.
    """

    name: str
    weights: torch.Tensor
    norm: LinearPart | None = None

    def rows(self, part: slice, device: torch.device) -> torch.Tensor:
        """[rows, d], float32 or wider."""
        given = self.weights[part]
        made = given.to(device, torch.promote_types(given.dtype, torch.float32))
        return made if self.norm is None else self.norm(made)


def written_by(model: Any, sites: Any, residual: str) -> list[Written]:
    """What the neurons of the sites of a `Model` add to the residual stream that is read at `residual`.

    Raises:
        UnknownName, ModelError: no such site, or its neurons write nothing of their own.
        DataError: no sites, or one whose neurons write elsewhere.
    """
    chosen: list[Site] = model.select(sites)
    if not chosen:
        raise DataError("no sites are asked for: 'mlp.*' takes every MLP")
    stack = model.site(residual).stack
    found = []
    for site in chosen:
        if site.stack != stack:
            raise DataError(
                f"{site.name} does not write into the residual stream that the unembedding reads, {residual}: "
                f"name the sites of that stack, as {stack + '.' if stack else ''}{site.kind}.*"
            )
        weights = model.output_weights(site)
        norm = None
        if site.norm is not None:
            norm = linear_part(model.module.get_submodule(site.norm), weights.shape[1])
            if norm is None:
                raise ModelError(f"{site.norm}, which follows {site.name}, is no norm that could be folded")
        found.append(Written(site.name, weights, norm))
    return found


def top_tokens(
    written: list[Written],
    fold: Callable[[torch.Tensor], torch.Tensor],
    matrix: torch.Tensor,
    k: int,
    *,
    bottom: bool,
    dtype: torch.dtype,
    memory: int,
    show: bool,
) -> TopTokens:
    """The tokens with the largest `fold(rows) @ matrix.T`, for every row that is written.

    Args:
        written: sites, or vectors.
        fold: `[rows, d]` -> `[rows, width]`, all that comes before the unembedding.
        matrix: the unembedding, `[vocabulary, width]`.
        k: how many tokens.
        bottom: also those with the smallest.
        dtype: what is multiplied.
        memory: bytes of the buffer.
        show: draw a progress bar where there are many.

    Raises:
        DataError: a product is NaN.
    """
    most = _MOST_ROWS.get(matrix.device.type, _MOST_ROWS_ELSEWHERE)
    product = _Product(matrix, dtype, max(1, min(most, memory // _bytes_of_a_row(len(matrix), dtype))))
    total, k = sum(len(each.weights) for each in written), min(k, len(matrix))
    ends = (False, True) if bottom else (False,)
    ids = [np.empty((total, k), np.int64) for _ in ends]
    values = [np.empty((total, k), np.float32) for _ in ends]
    row = 0
    with progress("through the unembedding", total, "neurons", show and total > _NEURONS_WITHOUT_A_BAR) as bar:
        for name, first, logits in _blocks(written, fold, product, bar):
            for end, smallest in enumerate(ends):
                found, index = largest(logits, k, smallest)
                if bool(found.isnan().any()):
                    _refuse(name, first, logits)
                part = slice(row, row + len(logits))
                ids[end][part], values[end][part] = index.cpu().numpy(), found.float().cpu().numpy()
            row += len(logits)
    sizes = {each.name: len(each.weights) for each in written if each.name}
    return TopTokens(ids[0], values[0], ids[1] if bottom else None, values[1] if bottom else None, sizes)


class _Product:
    """Rows times the unembedding, always into the same buffer."""

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype, rows: int) -> None:
        self.vocabulary, self.rows, self.dtype = len(matrix), rows, dtype
        self.matrix = matrix if matrix.dtype == dtype and matrix.stride(1) == 1 else _converted(matrix, dtype)
        self.buffer = torch.empty(rows, _padded(self.vocabulary), dtype=dtype, device=matrix.device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary], to be used before the next call."""
        out = self.buffer[: len(rows), : self.vocabulary]
        with torch.autocast(rows.device.type, enabled=False):
            return torch.mm(rows.to(self.dtype).contiguous(), self.matrix.T, out=out)


def _blocks(
    written: Iterable[Written], fold: Callable[[torch.Tensor], torch.Tensor], product: _Product, bar: Progress
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Site, first neuron and logits `[rows, vocabulary]` of some neurons at a time."""
    for each in written:
        total = len(each.weights)
        pieces = -(-total // product.rows)
        for piece in range(pieces):  # alike, so that no product is much smaller than the others
            start, stop = piece * total // pieces, (piece + 1) * total // pieces
            yield each.name, start, product(fold(each.rows(slice(start, stop), product.matrix.device)))
            bar.advance(stop - start)


def _converted(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy whose rows are contiguous; nothing else is made on the way."""
    made = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for here, there in zip(made.split(_ROWS_AT_ONCE), matrix.split(_ROWS_AT_ONCE), strict=True):
        here.copy_(there)
    return made


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // _STRIDE) * _STRIDE


def _bytes_of_a_row(vocabulary: int, dtype: torch.dtype) -> int:
    return _padded(vocabulary) * dtype.itemsize


def _refuse(name: str, first: int, logits: torch.Tensor) -> None:
    neuron = first + int(logits.isnan().any(1).nonzero()[0])
    which = f"{name}:{neuron}" if name else f"vector {neuron}"
    raise DataError(f"what {which} does to the logits is NaN: its weights, or those of the unembedding, are not finite")
