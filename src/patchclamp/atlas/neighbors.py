"""The nearest neurons of each neuron: best correlated within its layer, and in the next one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.progress import progress as progress_bar
from patchclamp.recording.corpus import Corpus
from patchclamp.recording.forward import batch_tokens_for
from patchclamp.recording.stream import stream

# Pairs of sites are correlated in as many passes over the sample as it takes to stay below this.
_MOST_BYTES = 2 << 30


def neighbors(
    model: Model,
    corpus: Corpus,
    sites: Sequence[Site],
    *,
    number: int = 5,
    tokens: int = 50_000,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pl.DataFrame:
    """Pearson correlation on a sample of the data; each neuron's best partners by absolute value are kept.

    Args:
        model: the model.
        corpus: the data it reads.
        sites: sites of known size; the next layer of `mlp.3` is `mlp.4`, of the same kind and stack. The neurons of
            an expert have partners in that expert only.
        number: how many partners in its own layer, and how many in the next.
        tokens: at most so many tokens are looked at, special ones included, of examples drawn with `seed`.
        batch_tokens: padded tokens of one forward pass; default: 2,048 on a processor, else 4,096.
        seed: draws the sample.
        progress: draw a progress bar.

    Returns:
        Columns `site`, `index`, `rank`, `other_site`, `other_index`, `correlation` (signed, float64) and
        `relation` ("layer" or "next"). A neuron that never changes, but for a rounding, has no partners.
        Rows with a NaN or an infinity at one of two sites are left out for this pair.
    """
    batches = corpus.batches(batch_tokens_for(model, batch_tokens), corpus.sample(tokens, seed))
    frames = []
    groups = _grouped(_pairs(sites))
    total = sum(int(corpus.lengths[each].sum()) for each in batches) * len(groups)
    with progress_bar("correlating", total, show=progress) as bar:
        for group in groups:
            products = [_Product(left, right) for left, right in group]
            needed = [site for site in sites if any(site in pair for pair in group)]
            for examples, read in zip(batches, stream(model, corpus, needed, batches), strict=True):
                values = {name: batch.values for name, batch in read.batches.items()}
                finite = {name: torch.isfinite(each).all(1) for name, each in values.items()}
                for product in products:
                    left, right = product.left.name, product.right.name
                    # Left out at both sites, so that the rows of the two stay side by side.
                    product.update(values[left], values[right], finite[left] & finite[right])
                bar.advance(int(corpus.lengths[examples].sum()))
            frames += [product.best(number) for product in products]
    return pl.concat(frames) if frames else _frame(_EMPTY, "", "", "layer")


class _Product:
    """Correlation of all neurons of one site with all of another, learned batch by batch.

    The first batch's mean is taken off before multiplying, so that large means do not cancel away what is
    wanted; the rest is corrected at the end.
    """

    def __init__(self, left: Site, right: Site) -> None:
        self.left, self.right = left, right
        self._rows = 0
        self._sums: list[torch.Tensor] = []

    def update(self, left: torch.Tensor, right: torch.Tensor, kept: torch.Tensor) -> None:
        """Take in values [rows, size] of the two sites, without the rows that are not `kept` [rows]."""
        if not bool(kept.all()):
            left, right = left[kept], right[kept]
        if not len(left):
            return
        if not self._sums:
            self._shift = left.mean(0), right.mean(0)
            sizes = left.shape[1], right.shape[1]
            self._cross = torch.zeros(sizes, device=left.device)
            self._sums = [torch.zeros(n, dtype=torch.float64, device=left.device) for n in (*sizes, *sizes)]
        x, y = (left - self._shift[0]).float(), (right - self._shift[1]).float()
        self._rows += len(x)
        self._cross += x.T @ y
        for total, part in zip(self._sums, (x, y, x * x, y * y), strict=True):
            total += part.sum(0, dtype=torch.float64)

    def best(self, number: int) -> pl.DataFrame:
        same = self.left.name == self.right.name
        relation = "layer" if same else "next"
        if not self._rows:
            return _frame(_EMPTY, self.left.name, self.right.name, relation)
        x, y, xx, yy = (each / self._rows for each in self._sums)
        scale_x, scale_y = (
            _changing((total - mean * mean).clamp(min=0).sqrt(), shift)
            for total, mean, shift in ((xx, x, self._shift[0]), (yy, y, self._shift[1]))
        )
        covariance = self._cross.double() / self._rows - x[:, None] * y[None]
        correlation = (covariance / (scale_x[:, None] * scale_y[None])).clamp(-1, 1)
        strength = torch.nan_to_num(correlation.abs(), nan=-1.0)
        if same:
            strength.fill_diagonal_(-1.0)
        best = strength.topk(min(number, strength.shape[1]), dim=1)
        index = torch.arange(len(strength), device=strength.device)[:, None].expand_as(best.indices)
        rank = torch.arange(best.indices.shape[1], device=strength.device).expand_as(best.indices)
        found = best.values >= 0
        columns = (index, rank, best.indices, correlation.gather(1, best.indices))
        return _frame(tuple(each[found].cpu().numpy() for each in columns), self.left.name, self.right.name, relation)


def _changing(deviation: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The deviation [size], or NaN where it is only the rounding of values around this mean."""
    rounding = 8 * torch.finfo(mean.dtype).eps * mean.abs()
    return torch.where(deviation <= rounding, torch.nan, deviation)


def _pairs(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    pairs = []
    for site in sites:
        pairs.append((site, site))
        pairs += [
            (site, other)
            for other in sites
            # Two experts of different layers see different tokens.
            if (other.stack, other.kind) == (site.stack, site.kind)
            and site.kind != "expert"
            and site.layer is not None
            and other.layer == site.layer + 1
        ]
    return pairs


def _grouped(pairs: Sequence[tuple[Site, Site]]) -> list[list[tuple[Site, Site]]]:
    groups: list[list[tuple[Site, Site]]] = []
    used = _MOST_BYTES + 1
    for left, right in pairs:
        need = 4 * (left.size or 0) * (right.size or 0)
        if used + need > _MOST_BYTES:
            groups.append([])
            used = 0
        groups[-1].append((left, right))
        used += need
    return groups


_EMPTY = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def _frame(columns: tuple[np.ndarray, ...], site: str, other: str, relation: str) -> pl.DataFrame:
    index, rank, other_index, correlation = columns
    return pl.DataFrame(
        {
            "site": [site] * len(index),
            "index": index,
            "rank": rank,
            "other_site": [other] * len(index),
            "other_index": other_index,
            "correlation": correlation.astype(np.float64),
            "relation": [relation] * len(index),
        },
        schema={
            "site": pl.String,
            "index": pl.Int64,
            "rank": pl.Int64,
            "other_site": pl.String,
            "other_index": pl.Int64,
            "correlation": pl.Float64,
            "relation": pl.String,
        },
    )
