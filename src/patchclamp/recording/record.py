"""`record`: what a set of neurons does over a data set, in one streaming pass."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchclamp.data import Chats, Images, Tensors, Texts, as_data
from patchclamp.errors import DataError, StoreError
from patchclamp.model.load import load
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.progress import progress as progress_bar
from patchclamp.recording.checkpoint import checkpoints, clear
from patchclamp.recording.cluster import RayCluster
from patchclamp.recording.corpus import Reading, TensorCorpus, TextCorpus, tokenize
from patchclamp.recording.facts import differences, facts_of
from patchclamp.recording.forward import batch_tokens_for
from patchclamp.recording.image_corpus import ImageCorpus
from patchclamp.recording.mirror import check_writable
from patchclamp.recording.packable import pack
from patchclamp.recording.positions import Choice, Positions
from patchclamp.recording.recording import Recording
from patchclamp.recording.run import Run
from patchclamp.recording.summaries import (
    ByLabel,
    ByToken,
    FiringRate,
    Histogram,
    MinMax,
    Moments,
    Summary,
    TopExamples,
)
from patchclamp.recording.thresholds import FractionOfMaximum
from patchclamp.recording.tokenizing import LongTexts
from patchclamp.storage import Remote, exists, place, put_in_place, read_manifest, temporary_folder

# Where a recording is written that is to become a store, inside the folder of the work.
_FINISHED = "finished"


def record(
    model: Model | nn.Module,
    data: Texts | Chats | Tensors | Images | Sequence[str] | Iterable[str] | torch.Tensor | Any,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    summaries: Sequence[Summary | type[Summary]] | None = None,
    *,
    store: str | os.PathLike[str] | None = None,
    activations: bool = False,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
    special_tokens: bool = False,
    positions: str | Choice = "all",
    long_texts: LongTexts = "cut",
    overlap: int = 0,
    packing: bool = False,
    memory: int | None = None,
    cluster: RayCluster | str | None = None,
) -> Recording:
    """Run a model over data once and summarise what its neurons do; memory is bounded, however long the data.

    Args:
        model: a `Model` from `patchclamp.load`, or any module.
        data: texts (`pc.Texts`, `pc.Chats` or any list of `str`), `pc.Images`, or tensors `[examples, ...]` for a
            model without a tokenizer.
        sites: names or globs: `"mlp.*"`, `["mlp.3", "attn.[0-2]"]`, `"module:a.b.c"`; or a `Site`.
        summaries: what to keep. None keeps `Moments`, `FiringRate` (above 0, and above half of the neuron's
            maximum), `MinMax`, `Histogram`, `TopExamples(20)`, `ByToken`, and `ByLabel` for every label of the data.
        store: a folder to save the recording in, or a place in an object store (`s3://bucket/name`). If a recording of
            the same model, data and parameters is there already, it is opened instead; if one was begun and did not
            end, it goes on from its last checkpoint, and the result is the same to the last bit.
        activations: also write every activation to Zarr v3 (in `store`, else in a temporary folder that goes
            with the recording): 4 bytes a neuron and token.
        max_length: longest text in tokens, special ones included; longer ones are cut. Default: the smaller of
            the tokenizer's and the model's own limit.
        batch_tokens: padded tokens of one forward pass; an image counts as its patches, or as 128 tokens where the
            model has none. It does not change the result. Default: 2,048 on a processor, else 4,096.
        seed: draws the sample that relative thresholds are calibrated on.
        progress: draw a progress bar, and say beforehand what memory the summaries take.
        special_tokens: count the tokens that the tokenizer adds too. Padding never counts.
        positions: which tokens of a text count: "all"; "last", the last one; "response", those of the assistant's
            turns (`pc.Chats` only); or a function from the `Example` and the strings of its tokens, special ones
            included, to a bool for each token or to the indices of those that count.
        long_texts: "cut" leaves out what is longer than `max_length`. "windows" reads it in windows of `max_length`
            tokens, each with its own special tokens; then an example is a window, and the recording says of which
            document, and where in it, it begins.
        overlap: of the windows, in tokens, which are context in the later window and count in the earlier alone.
        packing: put several short texts on one line of a batch, none of which sees another: less padding, the same
            result. Before anything is recorded it is tried on texts of the data.
        memory: most bytes that the summaries may take; default: 80% of the machine's. What grows with the data
            (`Pooled`) takes what they leave, then a temporary file that goes with the recording.
        cluster: "ray", the address of a Ray cluster, or a `pc.RayCluster`: the batches are read by its workers. Counts
            are the same as of one process, other numbers to 1e-6. Not for `activations=True`, nor for `Pooled`.

    Returns:
        A `Recording`; `recording["mlp.3"].moments.mean` is `[size]`.

    Raises:
        DataError: no examples, a text without tokens, labels of the wrong length or that do not fit the words,
            windows without room, no position that counts, too little memory.
        UnknownName: no such site.
        ModelError: the model reads no texts, which row of a site's tensor is whose cannot be said, token labels
            with a slow tokenizer, conversations without a chat template, or packing where texts would see each other.
        SiteNotReached: a forward pass never reached a site.
        ClusterError: the cluster cannot be reached, or workers die again and again.
        MissingExtra: a cluster is asked for, and Ray is not installed.
        StoreError: the store cannot be written, another process records into it, or it holds a recording, whole or
            begun, of something else (which is said).
    """
    model = model if isinstance(model, Model) else load(model)
    target = None if store is None else place(store)
    if target is not None:
        _check_writable(target)
    run = prepare(
        model,
        data,
        sites,
        summaries,
        activations=activations,
        max_length=max_length,
        batch_tokens=batch_tokens,
        seed=seed,
        progress=progress,
        special_tokens=special_tokens,
        positions=positions,
        long_texts=long_texts,
        overlap=overlap,
        packing=packing,
        memory=memory,
    )
    run.cluster = RayCluster.of(cluster)
    if run.cluster is not None:
        _refuse_on_a_cluster(run, activations)
    if target is None:
        return _kept_in_memory(run, activations, progress)
    if (found := _found(target, run.facts)) is not None:
        clear(target)
        return found
    for name, each in run.templates.items():
        Summary.from_parameters(name, each.parameters())  # what could not be opened again is refused now
    # Beside the store, because all activations may be more than the folder for temporary files can take.
    with checkpoints(target, run.facts, run.batch_tokens) as work:
        if (found := _found(target, run.facts)) is not None:  # another process may just have ended
            return found
        run.scratch = work.folder
        recording = run.go(progress, work.activations if activations else None, checkpoints=work)
        work.check()
        _save(recording, target, work.folder)
    return Recording.open(target)


def prepare(
    model: Model,
    data: Any,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    summaries: Sequence[Summary | type[Summary]] | None = None,
    *,
    activations: bool = False,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
    special_tokens: bool = False,
    positions: str | Choice = "all",
    long_texts: LongTexts = "cut",
    overlap: int = 0,
    packing: bool = False,
    memory: int | None = None,
) -> Run:
    """All of `record` that comes before the pass: check what was asked for, tokenize, try packing."""
    batch_tokens = batch_tokens_for(model, batch_tokens)
    chosen = model.select(sites)
    if not chosen:
        raise DataError("no sites are asked for: sites='mlp.*' takes every MLP; model.explain_sites() lists the others")
    given = as_data(data)
    labelled = bool(given.labels) or bool(isinstance(given, (Texts, Chats)) and given.token_labels)
    templates = _templates(summaries, labelled, _has_tokens(given))
    reading = Reading(max_length, special_tokens, long_texts, overlap, Positions(positions))
    if not isinstance(given, (Texts, Chats)):
        _refuse_for_texts_only(given, positions=positions, long_texts=long_texts, overlap=overlap, packing=packing)
    corpus = _corpus(model, given, reading, progress)
    if packing and isinstance(corpus, TextCorpus):
        pack(model, corpus, chosen, batch_tokens)
    parameters = {
        "max_length": max_length,
        "seed": seed,
        "special_tokens": special_tokens,
        "positions": reading.positions.parameters(),
        "long_texts": long_texts,
        "overlap": overlap,
        "activations": activations,
    }
    facts = facts_of(model, corpus, chosen, templates, parameters)
    if isinstance(corpus, TextCorpus):
        facts["data"] |= corpus.facts()
    return Run(model, corpus, chosen, templates, batch_tokens, seed, facts, memory)


def default_summaries(labels: bool, tokens: bool) -> list[Summary]:
    """What `record` keeps when it is not told: enough for an atlas, and for the finders that need no more."""
    rates = FiringRate(0.0, FractionOfMaximum(0.5))
    kept: list[Summary] = [Moments(), rates, MinMax(), Histogram(), TopExamples(20, context=12)]
    if tokens:
        kept.append(ByToken())
    if labels:
        kept.append(ByLabel(of=(Moments(), rates)))
    return kept


def _save(recording: Recording, target: Path | Remote, work: Path) -> None:
    """Save into the folder of the work, which is removed whatever happens, and move it: a kill leaves nothing else."""
    if isinstance(target, Remote):
        recording.save(target, replace=False)
        return
    for left in work.glob(f"*{_FINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        recording.save(work / _FINISHED)
    except StoreError as error:
        raise StoreError(str(error).replace(str(work / _FINISHED), str(target))) from error
    put_in_place(work / _FINISHED, target, "recording")


def _kept_in_memory(run: Run, activations: bool, progress: bool) -> Recording:
    if not activations:
        return run.go(progress)
    folder = tempfile.TemporaryDirectory(prefix="patchclamp-")
    try:
        return run.go(progress, Path(folder.name), owner=folder)
    except BaseException:
        folder.cleanup()
        raise


def _refuse_on_a_cluster(run: Run, activations: bool) -> None:
    if activations:
        raise DataError(
            "activations=True writes to a disk of this machine, and a cluster reads on others: leave out cluster="
        )
    if large := [type(each).__name__ for each in run.templates.values() if each.large]:
        raise DataError(
            f"{large[0]} keeps a row for each example, which no worker has all of: record it without cluster="
        )


def _templates(summaries: Sequence[Summary | type[Summary]] | None, labels: bool, tokens: bool) -> dict[str, Summary]:
    given = default_summaries(labels, tokens) if summaries is None else summaries
    templates: dict[str, Summary] = {}
    for each in given if isinstance(given, Iterable) and not isinstance(given, str) else [given]:
        made = each() if isinstance(each, type) and issubclass(each, Summary) else each
        if not isinstance(made, Summary):
            known = ", ".join(sorted(each.__name__ for each in Summary.__subclasses__()))
            raise DataError(f"{each!r} is not a summary; there are {known}")
        if made.name in templates:
            raise DataError(f"the summary {made.name!r} is asked for twice")
        if made.needs_tokens and not tokens:
            raise DataError(f"{type(made).__name__} needs texts (or token ids): this data has no tokens")
        templates[made.name] = made
    if not templates:
        raise DataError("no summaries are asked for: leave out summaries= for the usual ones")
    return templates


def _has_tokens(data: Texts | Chats | Tensors | Images) -> bool:
    if isinstance(data, Tensors):
        return data.values.ndim == 2 and not data.values.is_floating_point()
    return not isinstance(data, Images)


def _refuse_for_texts_only(data: object, **given: Any) -> None:
    usual = {"positions": "all", "long_texts": "cut", "overlap": 0, "packing": False}
    for name, value in given.items():
        if value != usual[name]:
            kind = type(data).__name__
            raise DataError(f"{name}={value!r} is about the tokens of texts, and the data are pc.{kind}: leave it out")


def _corpus(
    model: Model, data: Texts | Chats | Tensors | Images, reading: Reading, show: bool
) -> TextCorpus | TensorCorpus:
    if isinstance(data, Tensors):
        return TensorCorpus(model, data)
    try:
        total = len(data)
    except TypeError:
        total = 0
    if isinstance(data, Images):
        with progress_bar("reading images", total, "images", show=show and total > 5000) as bar:
            return ImageCorpus(model, data, bar)
    with progress_bar("tokenizing", total, "texts", show=show and total > 5000) as bar:
        return tokenize(model, data, reading, bar)


def _check_writable(target: Path | Remote) -> None:
    """Find out before the pass, not after it, whether the store can be written."""
    try:
        there = exists(target) if isinstance(target, Remote) or target.is_dir() else target.exists()
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
    if there:
        read_manifest(target, "recording")  # raises where something else is there
    if isinstance(target, Remote):
        check_writable(target)
    else:
        with temporary_folder(target):
            pass


def _found(target: Path | Remote, facts: Mapping[str, Any]) -> Recording | None:
    """The recording that is in the store already, if it is this very one."""
    if not exists(target):
        return None
    differing = differences(read_manifest(target, "recording"), facts)
    if differing:
        raise StoreError(f"{target} holds another recording. What differs: {'; '.join(differing)}")
    return Recording.open(target)
