"""Whether texts may share a line: tried on texts of the corpus, before anything is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from patchclamp.errors import ModelError
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.recording.packing import WAYS, Packing, packed_lines
from patchclamp.recording.stream import stream
from patchclamp.recording.text_corpus import TextCorpus

# Largest difference, as a share of the site's largest activation: what the order of sums may change, and no more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
_FLOOR = 1e-30
# So many neurons of a site are compared, evenly spaced: a text that is seen by another shows in nearly all.
_NEURONS = 256


@dataclass(frozen=True)
class _Seen:
    """What some examples showed at a site, in order of example and position."""

    rank: np.ndarray  # [rows] int64
    values: torch.Tensor  # [rows, neurons]


def pack(model: Model, corpus: TextCorpus, sites: Sequence[Site], batch_tokens: int) -> None:
    """Let texts share the lines of a batch from now on, if the model gives the same for them.

    The line with the longest text and the one with the most texts are run, and compared at every site with the
    same texts on lines of their own.

    Raises:
        ModelError: it does not; the message says what differed in each way that was tried.
    """
    if model.is_encoder_decoder:
        raise ModelError(
            f"packing=True: {type(model.module).__name__} has an encoder and a decoder, whose texts cannot share a line"
        )
    longest = int(corpus.lengths.max())
    length = max(longest, min(batch_tokens, corpus.limit or batch_tokens))
    order = np.lexsort((np.arange(corpus.examples), -corpus.lengths))
    lines = packed_lines(order[corpus.counted[order] > 0], corpus.lengths, length)
    fullest = max(range(len(lines)), key=lambda place: len(lines[place]))
    trial = np.concatenate([lines[place] for place in sorted({0, fullest})])
    alone = _read(model, corpus, sites, corpus.batches(batch_tokens, of=trial))
    dtype = next((each.dtype for each in model.module.parameters() if each.is_floating_point()), torch.float32)
    why = []
    for way in WAYS:
        corpus.packing = Packing(length, way)
        try:
            together = _read(model, corpus, sites, [trial])
            reason = _difference(alone, together, _TOLERANCE.get(dtype, 1e-4))
        except Exception as error:  # whatever the model's code makes of an unusual mask
            said = str(error).strip()
            reason = f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"
        if reason is None:
            return
        why.append(reason)
    corpus.packing = None
    raise ModelError(
        f"packing=True: in {type(model.module).__name__}, texts that share a line do not give what they give alone. "
        f"Told by positions that begin anew: {why[0]}. Told by a mask: {why[1]}. Record without packing"
    )


def _read(model: Model, corpus: TextCorpus, sites: Sequence[Site], batches: Sequence[np.ndarray]) -> dict[str, _Seen]:
    found: dict[str, list[_Seen]] = {site.name: [] for site in sites}
    for read in stream(model, corpus, sites, batches):
        for name, batch in read.batches.items():
            values = batch.values[:, :: max(1, batch.size // _NEURONS)].cpu().clone()
            found[name].append(_Seen(batch.rank.cpu().numpy(), values))
    return {name: _in_order(each) for name, each in found.items()}


def _in_order(parts: Sequence[_Seen]) -> _Seen:
    rank = np.concatenate([each.rank for each in parts])
    order = np.argsort(rank, kind="stable")
    return _Seen(rank[order], torch.cat([each.values for each in parts])[torch.from_numpy(order)])


def _difference(alone: dict[str, _Seen], together: dict[str, _Seen], tolerance: float) -> str | None:
    """Where packed texts give something else, in words; None where they do not."""
    for name, one in alone.items():
        other = together[name]
        if not np.array_equal(one.rank, other.rank):
            return f"{name} shows other positions"
        finite = torch.isfinite(one.values)
        if not torch.equal(finite, torch.isfinite(other.values)):
            return f"{name} is not finite where it was"
        if not bool(finite.any()):
            continue
        scale = max(float(one.values[finite].abs().max()), _FLOOR)
        far = float((one.values - other.values)[finite].abs().max()) / scale
        if far > tolerance:
            return f"{name} differs by {far:.2g} of its largest activation"
    return None
