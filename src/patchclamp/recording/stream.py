"""Run a model over a corpus, batch by batch, and give what each site did on the positions that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from patchclamp.errors import ModelError
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

    Hooks and evaluation mode last for one forward pass: whatever becomes of the caller, none is left behind.

    Raises:
        SiteNotReached: a forward pass never called a site's module.
        ModelError: a site's tensor cannot be matched with the positions of the batch.
    """
    quiet = {"use_cache": False} if accepts(model.module, "use_cache") else {}
    for examples in batches:
        forward = corpus.forward(examples)
        with model.evaluating(), torch.no_grad(), reading(model.module, sites) as captured:
            model.module(*forward.arguments, **forward.keywords, **quiet)
        read = {site.name: _batch(site, captured.pop(site.name), forward, corpus.codes) for site in sites}
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


def _batch(site: Site, tensors: list[torch.Tensor], forward: Forward, codes: Mapping[str, np.ndarray]) -> Batch:
    of_stack = forward.decoder_rows if site.stack == "decoder" else forward.rows
    tensor = _whole(site, tensors, of_stack)
    rows = of_stack if _is_of_tokens(site, tensor, of_stack, len(forward.examples)) else None
    if not tensor.is_floating_point():
        tensor = tensor.float()
    number = len(forward.examples)
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


def _whole(site: Site, tensors: Sequence[torch.Tensor], rows: Rows | None) -> torch.Tensor:
    """The tensor of one pass; a block that computes its MLP in pieces along the sequence gives several."""
    if len(tensors) > 1:
        examples, length = (0, 0) if rows is None else rows.shape
        pieces = all(each.ndim == 3 and each.shape[0] == examples for each in tensors)
        if not pieces or sum(each.shape[1] for each in tensors) != length:
            raise ModelError(
                f"{site.name}: one forward pass calls the module {site.module} {len(tensors)} times, and not with "
                "pieces of the sequence: which call is meant cannot be said"
            )
    return joined(site, tensors)


def _is_of_tokens(site: Site, tensor: torch.Tensor, rows: Rows | None, examples: int) -> bool:
    """Whether the tensor has a row for each token; if not, each example has as many rows as the tensor says."""
    shape = list(tensor.shape)
    if tensor.ndim not in (2, 3) or not tensor.numel():
        raise ModelError(
            f"{site.name} gives a tensor {shape}; [examples, positions, neurons], [positions, neurons] "
            "or [examples, neurons] can be recorded"
        )
    if rows is not None and shape[:-1] in (list(rows.shape), [rows.shape[0] * rows.shape[1]]):
        return True
    if shape[0] % examples or (tensor.ndim == 3 and shape[0] != examples):
        raise ModelError(f"{site.name} gives a tensor {shape} for {examples} examples: which rows are whose?")
    if rows is not None and shape[:-1] != [examples] and site.stack not in ("vision", "visual", "image"):
        raise ModelError(
            f"{site.name} gives a tensor {shape} where the batch has {examples} examples of {rows.shape[1]} tokens: "
            "which is which cannot be said"
        )
    return False
