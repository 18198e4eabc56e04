"""Run a model over a corpus, batch by batch, and give what each site did on the positions that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from patchclamp.errors import ModelError
from patchclamp.model.hooks import reading
from patchclamp.model.model import Model, joined
from patchclamp.model.signature import accepts
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen
from patchclamp.recording.batch import Batch
from patchclamp.recording.corpus import Corpus, Forward, Rows, TextCorpus
from patchclamp.recording.image_corpus import ImageCorpus, tower


@dataclass(frozen=True)
class Read:
    """What one forward pass showed: a batch per site, all rows that count, finite or not.

    Attributes:
        batches: site -> batch.
        passed: site -> how many positions that count went by; more than the rows of the batch for an expert,
            to which only some are routed.
        tokens: how many tokens of the pass count.
    """

    batches: dict[str, Batch]
    passed: dict[str, int]
    tokens: int


def stream(model: Model, corpus: Corpus, sites: Sequence[Site], batches: Sequence[np.ndarray]) -> Iterator[Read]:
    """One `Read` per batch of examples. A batch is given only when all its sites have been read.

    Hooks and evaluation mode last for one forward pass: whatever becomes of the caller, none is left behind.

    Raises:
        SiteNotReached: a forward pass never called a site's module.
        ModelError: a site's tensor cannot be matched with the positions of the batch; weights are missing.
    """
    model.check_weights()
    module = _module(model, corpus)
    quiet = {"use_cache": False} if accepts(module, "use_cache") else {}
    for examples in batches:
        forward = corpus.forward(examples)
        with model.evaluating(), torch.no_grad(), reading(model.module, sites) as captured:
            module(*forward.arguments, **forward.keywords, **quiet)
        read = {site.name: _batch(site, captured.pop(site.name), forward, corpus.codes, corpus.folds) for site in sites}
        passed = {site.name: forward.tokens if site.kind == "expert" else len(read[site.name]) for site in sites}
        yield Read(read, passed, forward.tokens)


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


def _batch(
    site: Site, captured: Sequence[Seen], forward: Forward, codes: Mapping[str, np.ndarray], folds: np.ndarray
) -> Batch:
    of_stack = forward.decoder_rows if site.stack == "decoder" and forward.decoder_rows is not None else forward.rows
    seen = _whole(site, captured, of_stack)
    rows, values, grid = _rows(site, seen, of_stack, forward.examples)
    # Statistics are of float32 or wider, whatever the weights are.
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    device = values.device
    labels = {
        name: torch.from_numpy(each[forward.examples].astype(np.int64))[rows.row].to(device)
        for name, each in codes.items()
    }
    labels |= {name: each.to(device) for name, each in rows.labels.items()}
    return Batch(
        values.detach(),
        rows.example.to(device),
        rows.position.to(device),
        None if rows.token is None else rows.token.to(device),
        labels,
        grid,
        torch.from_numpy(folds[forward.examples].astype(np.int64))[rows.row].to(device),
    )


def _whole(site: Site, captured: Sequence[Seen], rows: Rows | None) -> Seen:
    """What one pass showed; a block that computes its MLP in pieces along the sequence is called several times."""
    whole = joined(site, captured)
    if site.kind == "pattern":
        raise ModelError(
            f"{site.name} cannot be recorded: how many keys a query has depends on the text. "
            "model.activations(text, ...) gives the probabilities of one text"
        )
    if len(captured) > 1 and not site.time:
        tensors = [seen.tensor for seen in captured]
        examples, length = (0, 0) if rows is None else rows.shape
        pieces = all(each.ndim == 3 and each.shape[0] == examples for each in tensors)
        if not pieces or sum(each.shape[1] for each in tensors) != length:
            raise ModelError(
                f"{site.name}: one forward pass calls the module {site.module} {len(captured)} times, and not with "
                "pieces of the sequence: which call is meant cannot be said (if each is a time step: "
                "pc.Site.custom(..., time=True))"
            )
    return whole


def _rows(
    site: Site, seen: Seen, rows: Rows | None, examples: np.ndarray
) -> tuple[Rows, torch.Tensor, tuple[int, ...] | None]:
    """Which positions the site's rows are, the values `[rows, size]` of those that count, and their grid."""
    tensor = seen.tensor
    values = tensor.reshape(-1, tensor.shape[-1])
    if seen.place is not None:
        return (*_placed(site, seen, rows, examples), None)
    if _is_of_tokens(site, tensor, rows, len(examples)):
        assert rows is not None
        return rows, values if rows.flat is None else values[rows.flat.to(values.device)], None
    number = len(examples)
    per_example = values.shape[0] // number
    row = torch.arange(number).repeat_interleave(per_example)
    example = torch.from_numpy(examples.astype(np.int64))[row]
    position = torch.arange(per_example).repeat(number)
    between = tuple(tensor.shape[1:-1])
    return (
        Rows((number, per_example), None, example, position, None, row),
        values,
        between if len(between) > 1 else None,
    )


def _placed(site: Site, seen: Seen, rows: Rows | None, examples: np.ndarray) -> tuple[Rows, torch.Tensor]:
    """The rows of a tensor that has none for some positions: tokens routed elsewhere, the end of a short sequence."""
    assert seen.place is not None
    place = seen.place.cpu()
    if rows is None:
        if seen.length is None:
            raise ModelError(f"{site.name}: this data has no tokens, so which rows are whose cannot be said")
        row = place // seen.length
        example = torch.from_numpy(examples.astype(np.int64))[row]
        return Rows((len(examples), seen.length), place, example, place % seen.length, None, row), seen.tensor
    height, length = rows.shape
    if seen.length not in (None, length):
        raise ModelError(f"{site.name} has sequences of up to {seen.length} steps where the batch has {length} tokens")
    counted = torch.full((height * length,), -1)
    counted[torch.arange(height * length) if rows.flat is None else rows.flat] = torch.arange(len(rows.example))
    which = counted[place]
    kept = which >= 0
    which = which[kept]
    found = Rows(
        rows.shape,
        place[kept],
        rows.example[which],
        rows.position[which],
        None if rows.token is None else rows.token[which],
        rows.row[which],
        {name: each[which] for name, each in rows.labels.items()},
    )
    return found, seen.tensor[kept.to(seen.tensor.device)]


def _is_of_tokens(site: Site, tensor: torch.Tensor, rows: Rows | None, examples: int) -> bool:
    """Whether the tensor has a row for each token; if not, each example has as many rows as the tensor says."""
    shape = list(tensor.shape)
    if tensor.ndim < 2 or not tensor.numel():
        raise ModelError(
            f"{site.name} gives a tensor {shape}; [examples, ..., neurons] or [positions, neurons] can be recorded"
        )
    if rows is not None and shape[:-1] in (list(rows.shape), [rows.shape[0] * rows.shape[1]]):
        return True
    if shape[0] % examples or (tensor.ndim > 2 and shape[0] != examples):
        raise ModelError(f"{site.name} gives a tensor {shape} for {examples} examples: which rows are whose?")
    if rows is not None and shape[:-1] != [examples] and site.stack not in ("vision", "visual", "image"):
        raise ModelError(
            f"{site.name} gives a tensor {shape} where the batch has {examples} examples of {rows.shape[1]} tokens: "
            "which is which cannot be said"
        )
    return False


def _module(model: Model, corpus: Corpus) -> nn.Module:
    """What is called: the whole module, or the tower that reads this kind of data, if the whole wants two kinds."""
    if isinstance(corpus, ImageCorpus):
        return corpus.module
    return tower(model.module, "input_ids") if isinstance(corpus, TextCorpus) else model.module
