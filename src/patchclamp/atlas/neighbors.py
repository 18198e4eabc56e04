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
from patchclamp.recording.stream import finite_rows, stream

# Pairs of sites are correlated in as many passes over the sample as it takes to stay below this.
_MOST_BYTES = 2 << 30


def neighbors(
    model: Model,
    corpus: Corpus,
    sites: Sequence[Site],
    *,
    number: int = 5,
    tokens: int = 50_000,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool = True,
) -> pl.DataFrame:
    """Pearson correlation on a sample of the data; each neuron's best partners by absolute value are kept.

    Args:
        model: the model.
        corpus: the data it reads.
        sites: sites of known size; the next layer of `mlp.3` is `mlp.4`, of the same kind and stack.
        number: how many partners in its own layer, and how many in the next.
        tokens: at most about so many tokens are looked at, of examples drawn with `seed`.
        batch_tokens: padded tokens of one forward pass.
        seed: draws the sample.
        progress: draw a progress bar.

    Returns:
        Columns `site`, `index`, `rank`, `other_site`, `other_index`, `correlation` (signed, float64) and
        `relation` ("layer" or "next"). A neuron that never changes has no partners.
    """
    sample = corpus.sample(tokens, seed)
    if int(corpus.lengths[sample].sum()) > tokens and len(sample) > 1:
        sample = sample[:-1]
    batches = corpus.batches(batch_tokens, sample)
    frames = []
    groups = _grouped(_pairs(sites))
    total = sum(int(corpus.lengths[each].sum()) for each in batches) * len(groups)
    with progress_bar("correlating", total, show=progress) as bar:
        for group in groups:
            products = [_Product(left, right) for left, right in group]
            needed = [site for site in sites if any(site in pair for pair in group)]
            for read in stream(model, corpus, needed, batches):
                values = {}
                for name, whole in read.batches.items():
                    batch, _ = finite_rows(whole)
                    # Rows that are left out at one site would no longer stand beside those of the other.
                    values[name] = whole.values if len(batch) == len(whole) else torch.nan_to_num(whole.values)
                for product in products:
                    product.update(values[product.left.name], values[product.right.name])
                bar.advance(read.tokens)
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

    def update(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if not len(left):
            return
        if not self._sums:
            self._shift = left.mean(0), right.mean(0)
            sizes = left.shape[1], right.shape[1]
            self._cross = torch.zeros(sizes, device=left.device)
            self._sums = [torch.zeros(n, dtype=torch.float64, device=left.device) for n in (*sizes, *sizes)]
        x, y = left.float() - self._shift[0].float(), right.float() - self._shift[1].float()
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
        scale_x, scale_y = (xx - x * x).clamp(min=0).sqrt(), (yy - y * y).clamp(min=0).sqrt()
        scale = scale_x[:, None] * scale_y[None]
        correlation = (self._cross.double() / self._rows - x[:, None] * y[None]) / scale
        # What does not change, beyond rounding, correlates with nothing.
        constant = scale <= 1e-12 * (1 + xx.sqrt()[:, None] * yy.sqrt()[None])
        correlation = torch.where(constant, torch.nan, correlation).clamp(-1, 1)
        strength = torch.nan_to_num(correlation.abs(), nan=-1.0)
        if same:
            strength.fill_diagonal_(-1.0)
        best = strength.topk(min(number, strength.shape[1]), dim=1)
        index = torch.arange(len(strength), device=strength.device)[:, None].expand_as(best.indices)
        rank = torch.arange(best.indices.shape[1], device=strength.device).expand_as(best.indices)
        found = best.values >= 0
        columns = (index, rank, best.indices, correlation.gather(1, best.indices))
        return _frame(tuple(each[found].cpu().numpy() for each in columns), self.left.name, self.right.name, relation)


def _pairs(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    pairs = []
    for site in sites:
        pairs.append((site, site))
        pairs += [
            (site, other)
            for other in sites
            if (other.stack, other.kind) == (site.stack, site.kind)
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
