"""Run a model over a corpus, batch by batch, and give what each site did on the positions that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from patchclamp.errors import ModelError
from patchclamp.model.activations import several_calls
from patchclamp.model.hooks import kept, tapped
from patchclamp.model.model import Model, joined
from patchclamp.model.signature import accepts
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap
from patchclamp.recording.batch import Batch
from patchclamp.recording.corpus import Corpus, Forward, Rows, TextCorpus
from patchclamp.recording.heap import kept_for_reuse
from patchclamp.recording.image_corpus import ImageCorpus, tower
from patchclamp.recording.pass_rows import PassRows


@dataclass(frozen=True)
class Read:
    """What one forward pass showed: a batch per site, all rows that count, finite or not.

    Attributes:
        batches: site -> batch; without the sites of which a taker has taken all.
        passed: site -> how many positions that count went by; more than the rows of the batch for an expert,
            to which only some are routed.
        tokens: how many tokens of the pass count.
    """

    batches: dict[str, Batch]
    passed: dict[str, int]
    tokens: int


_FEW = 8

# module -> sites -> positions of the longest example of which a whole pass showed that it reaches each site once,
# with all its positions at once.
_reached_once: WeakKeyDictionary[nn.Module, dict[tuple[Site, ...], int]] = WeakKeyDictionary()

# Shown a site, what all positions of a pass did there [positions, size], and which of them count, it says whether it
# has taken all that it wants of them. It is asked while the pass is still running.
Taker = Callable[[Site, torch.Tensor, PassRows], bool]


def stream(
    model: Model,
    corpus: Corpus,
    sites: Sequence[Site],
    batches: Sequence[np.ndarray],
    taker: Taker | None = None,
) -> Iterator[Read]:
    """One `Read` per batch of examples. A batch is given only when all its sites have been read.

    Hooks and evaluation mode last for one forward pass: whatever becomes of the caller, none is left behind. What
    comes after the last of the sites is not computed, if a whole pass of one example shows that each is reached once;
    for the same sites of the same module, and examples that are no longer, it is not made again.

    Args:
        model: the model.
        corpus: the data.
        sites: which sites are read.
        batches: ids of the examples of each pass.
        taker: takes what it can while a pass is running; a `Read` has the rest.

    Raises:
        SiteNotReached: a forward pass never called a site's module.
        ModelError: a site's tensor cannot be matched with the positions of the batch; weights are missing.
    """
    model.check_weights()
    module = _module(model, corpus)
    quiet = {"use_cache": False} if accepts(module, "use_cache") else {}

    def run(examples: np.ndarray, taker: Taker | None, stops: bool) -> _Pass:
        forward = corpus.forward(examples)
        under_way = _Pass(sites, forward, corpus, taker, stops, only_whole)
        with suppress(_Enough), model.evaluating(), torch.no_grad(), tapped(model.module, under_way.taps()):
            module(*forward.arguments, **forward.keywords, **quiet)
        return under_way

    stops = only_whole = False
    with kept_for_reuse() as memory:
        if _worth_a_trial(batches) and _stoppable(module, sites):
            # Of the longest example, as a block that computes its MLP in pieces makes most of them for it.
            known = _reached_once.setdefault(module, {})
            longest = int(corpus.lengths[batches[0][0]])
            stops = known.get(tuple(sites), -1) >= longest
            if not stops:
                trial = run(batches[0][:1], None, False)
                stops = all(calls == 1 for calls in trial.calls.values())
                if stops and trial.whole:
                    known[tuple(sites)] = longest
            only_whole = tuple(sites) in known
        for examples in batches:
            yield run(examples, taker, stops).read()
            memory.batch_done()


class _Enough(Exception):
    """Every site has been read: ends a forward pass."""


class _Pass:
    """One forward pass under way, and what its sites have shown."""

    def __init__(
        self,
        sites: Sequence[Site],
        forward: Forward,
        corpus: Corpus,
        taker: Taker | None,
        stops: bool,
        only_whole: bool,
    ) -> None:
        self._sites, self._forward, self._corpus = sites, forward, corpus
        self._taker, self._missing = taker, {site.name for site in sites} if stops else set()
        self._stops, self._only_whole = stops, only_whole
        self._rows: dict[int, PassRows] = {}
        self._captured: dict[str, list[Seen]] = {site.name: [] for site in sites}
        self.calls = {site.name: 0 for site in sites}
        self.whole = True  # whether each call showed all positions of the batch
        self.taken: set[str] = set()

    def taps(self) -> list[Tap]:
        """What looks at the sites."""
        return [Tap(site, partial(self._see, site), writes=False) for site in self._sites]

    def read(self) -> Read:
        """What the pass showed of every site of which something is left to take."""
        batches, passed = {}, {}
        for site in self._sites:
            if site.name in self.taken:
                passed[site.name] = len(self._rows_of(site) or ())
                continue
            # A batch holds what it needs; the rest of what the pass showed can go.
            batch = _batch(site, self._captured.pop(site.name), self._forward, self._corpus.codes, self._corpus.folds)
            batches[site.name] = batch
            passed[site.name] = self._forward.tokens if site.kind == "expert" else len(batch)
        return Read(batches, passed, self._forward.tokens)

    def _see(self, site: Site, seen: Seen) -> torch.Tensor:
        self.calls[site.name] += 1
        rows = self._rows_of(site)
        if rows is None or seen.place is not None or list(seen.tensor.shape[:-1]) != list(rows.rows.shape):
            self.whole = False
        if site.name in self.taken:
            raise ModelError(several_calls(site, self.calls[site.name]))
        if self._taker is not None and self.calls[site.name] == 1 and self._take(site, seen, self._taker):
            self.taken.add(site.name)
        else:
            self._captured[site.name].append(kept(site, seen))
        if self._stops:
            self._missing.discard(site.name)
            # What an earlier pass showed may no longer be so: pieces of the positions mean that more of them follow.
            if not self._missing and (self.whole or not self._only_whole):
                raise _Enough
        return seen.tensor

    def _take(self, site: Site, seen: Seen, taker: Taker) -> bool:
        rows, tensor = self._rows_of(site), seen.tensor
        if rows is None or seen.place is not None or site.time or site.kind == "pattern":
            return False
        if site.size not in (None, tensor.shape[-1]) or list(tensor.shape[:-1]) != list(rows.rows.shape):
            return False
        # Statistics are of float32 or wider, whatever the weights are.
        tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        return taker(site, tensor.reshape(-1, tensor.shape[-1]), rows)

    def _rows_of(self, site: Site) -> PassRows | None:
        rows = _rows_of_stack(site, self._forward)
        if rows is None:
            return None
        if id(rows) not in self._rows:
            self._rows[id(rows)] = PassRows(rows, self._forward.examples, self._corpus.codes, self._corpus.folds)
        return self._rows[id(rows)]


def _worth_a_trial(batches: Sequence[np.ndarray]) -> bool:
    """Whether there is so much to read that one example more does not matter."""
    return len(batches) > 1 or (len(batches) == 1 and len(batches[0]) > _FEW)


def _stoppable(module: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether nobody would miss the end of a forward pass: no hooks of others, nothing that wraps the call."""
    if any(site.through != "module" for site in sites):
        return False
    return not any(
        each._forward_hooks or each._forward_pre_hooks or hasattr(each, "_hf_hook") or isinstance(each, nn.DataParallel)
        for each in module.modules()
    )


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
    of_stack = _rows_of_stack(site, forward)
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


def _rows_of_stack(site: Site, forward: Forward) -> Rows | None:
    """The positions of a pass that count, where the site is."""
    return forward.decoder_rows if site.stack == "decoder" and forward.decoder_rows is not None else forward.rows


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
