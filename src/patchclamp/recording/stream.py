"""Run a model over a corpus, batch by batch, and give what each site did on the positions that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from patchclamp.errors import DataError, ModelError
from patchclamp.model.hooks import reading
from patchclamp.model.model import Model, joined
from patchclamp.model.signature import accepts
from patchclamp.model.site import Site
from patchclamp.recording.batch import Batch
from patchclamp.recording.corpus import Corpus, Forward, Rows


@dataclass(frozen=True)
class Read:
    """What one forward pass showed: a batch per site, all rows that count, finite or not."""

    batches: dict[str, Batch]
    tokens: int


def stream(model: Model, corpus: Corpus, sites: Sequence[Site], batches: Sequence[np.ndarray]) -> Iterator[Read]:
    """One `Read` per batch of examples. A batch is given only when all its sites have been read.

    Raises:
        SiteNotReached: a forward pass never called a site's module.
        ModelError: a site's tensor cannot be matched with the positions of the batch.
    """
    quiet = {"use_cache": False} if accepts(model.module, "use_cache") else {}
    with model.evaluating(), torch.no_grad(), reading(model.module, sites) as captured:
        for examples in batches:
            forward = corpus.forward(examples)
            model.module(*forward.arguments, **forward.keywords, **quiet)
            read = {}
            for site in sites:
                tensor = joined(site, captured[site.name])
                captured[site.name].clear()
                read[site.name] = _batch(site, tensor, forward, corpus.codes)
            yield Read(read, forward.tokens)


def finite_rows(batch: Batch) -> tuple[Batch, dict[str, int]]:
    """The batch without the rows that hold a NaN or an infinity, and how many of each there were."""
    # If the sum is finite, all of it is; the other way round a look at each value decides.
    if bool(torch.isfinite(batch.values.sum())):
        return batch, {}
    finite = torch.isfinite(batch.values).all(1)
    if bool(finite.all()):
        return batch, {}
    found = {
        "nan": int(torch.isnan(batch.values).sum()),
        "infinite": int(torch.isinf(batch.values).sum()),
        "rows": int((~finite).sum()),
    }
    return batch.select(finite), found


def _batch(site: Site, tensor: torch.Tensor, forward: Forward, codes: Mapping[str, np.ndarray]) -> Batch:
    if not tensor.is_floating_point():
        tensor = tensor.float()
    number = len(forward.examples)
    rows = _rows_of(site, tensor, forward)
    values = tensor.reshape(-1, tensor.shape[-1])
    if rows is None:
        per_example = values.shape[0] // number
        row = torch.arange(number).repeat_interleave(per_example)
        example = torch.from_numpy(forward.examples.astype(np.int64))[row]
        position, token = torch.arange(per_example).repeat(number), None
    else:
        row, example, position, token = rows.row, rows.example, rows.position, rows.token
        if rows.flat is not None:
            values = values[rows.flat.to(values.device)]
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    device = values.device
    labels = {
        name: torch.from_numpy(each[forward.examples].astype(np.int64))[row].to(device) for name, each in codes.items()
    }
    return Batch(
        values.detach(),
        example.to(device),
        position.to(device),
        None if token is None else token.to(device),
        labels,
    )


def _rows_of(site: Site, tensor: torch.Tensor, forward: Forward) -> Rows | None:
    """The rows of the tokens, or None where each example gives as many rows as the tensor says."""
    number = len(forward.examples)
    rows = forward.decoder_rows if site.stack == "decoder" else forward.rows
    if tensor.ndim < 2 or tensor.ndim > 3:
        raise ModelError(
            f"{site.name} gives a tensor {list(tensor.shape)}; [examples, positions, neurons], [positions, neurons] "
            "or [examples, neurons] can be recorded"
        )
    leading = tensor.numel() // tensor.shape[-1] if tensor.shape[-1] else 0
    if rows is not None and leading == rows.shape[0] * rows.shape[1]:
        return rows
    if leading % number or (tensor.ndim == 3 and tensor.shape[0] != number):
        raise ModelError(
            f"{site.name} gives a tensor {list(tensor.shape)} for {number} examples: which rows are whose?"
        )
    if rows is not None and tensor.ndim == 3 and site.stack not in ("vision", "visual", "image"):
        raise ModelError(
            f"{site.name} gives {tensor.shape[1]} positions where the batch has {rows.shape[1]} tokens: "
            "which is which cannot be said"
        )
    return None


def check_labels(corpus: Corpus) -> None:
    """A corpus whose labels do not cover its examples cannot be recorded."""
    for name, codes in corpus.codes.items():
        if len(codes) != corpus.examples:
            raise DataError(f"label {name!r} has {len(codes)} values for {corpus.examples} examples")
