"""`record`: what a set of neurons does over a data set, in one streaming pass."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.data import Tensors, Texts, as_data
from patchclamp.errors import DataError, StoreError
from patchclamp.model.load import load
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.progress import progress as progress_bar
from patchclamp.recording.activation_store import ActivationWriter
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.corpus import Corpus, TensorCorpus, TextCorpus, tokenize
from patchclamp.recording.recording import Recording, SiteRecording, opened_activations
from patchclamp.recording.stream import finite_rows, stream
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
from patchclamp.recording.windows import Windows
from patchclamp.storage import read_manifest

_CALIBRATION_TOKENS = 16_384


def record(
    model: Model | nn.Module,
    data: Texts | Tensors | Sequence[str] | Iterable[str] | torch.Tensor | Any,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    summaries: Sequence[Summary | type[Summary]] | None = None,
    *,
    store: str | os.PathLike[str] | None = None,
    activations: bool = False,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool = True,
    special_tokens: bool = False,
    memory: int | None = None,
) -> Recording:
    """Run a model over data once and summarise what its neurons do; memory does not grow with the data.

    Args:
        model: a `Model` from `patchclamp.load`, or any module.
        data: texts (`pc.Texts` or any list of `str`), or tensors `[examples, ...]` for a model without a tokenizer.
        sites: names or globs: `"mlp.*"`, `["mlp.3", "attn.[0-2]"]`, `"module:a.b.c"`.
        summaries: what to keep. None keeps `Moments`, `FiringRate` (above 0, and above half of the neuron's
            maximum), `MinMax`, `Histogram`, `TopExamples(20)`, `ByToken`, and `ByLabel` for every label of the data.
        store: a folder to save the recording in. If a recording of the same model, data and parameters is
            there already, it is opened instead.
        activations: also write every activation to Zarr v3 (in `store`, else in a temporary folder that goes
            with the recording): 4 bytes a neuron and token.
        max_length: longest text in tokens, special ones included; longer ones are cut. Default: the smaller of
            the tokenizer's and the model's own limit.
        batch_tokens: padded tokens of one forward pass. It does not change the result.
        seed: draws the sample that relative thresholds are calibrated on.
        progress: draw a progress bar, and say beforehand what memory the summaries take.
        special_tokens: count the tokens that the tokenizer adds too. Padding never counts.
        memory: most bytes that the summaries may take; default: 80% of the machine's.

    Returns:
        A `Recording`; `recording["mlp.3"].moments.mean` is `[size]`.

    Raises:
        DataError: no examples, a text without tokens, labels of the wrong length, too little memory.
        UnknownName: no such site.
        SiteNotReached: a forward pass never reached a site.
        StoreError: the store cannot be written, or holds a recording of something else (which is said).
    """
    model = model if isinstance(model, Model) else load(model)
    _check_writable(store)
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
        memory=memory,
    )
    if (found := _found(store, run.facts)) is not None:
        return found
    recording = run.go(progress)
    if store is not None:
        recording.save(store)
    return recording


def prepare(
    model: Model,
    data: Any,
    sites: str | Site | Iterable[str | Site] = "mlp.*",
    summaries: Sequence[Summary | type[Summary]] | None = None,
    *,
    activations: bool = False,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool = True,
    special_tokens: bool = False,
    memory: int | None = None,
) -> Run:
    """All of `record` that comes before the first forward pass: check what was asked for, and tokenize."""
    if batch_tokens < 1:
        raise DataError(f"batch_tokens is a number of tokens, at least 1; not {batch_tokens}")
    chosen = model.select(sites)
    given = as_data(data)
    templates = _templates(summaries, bool(given.labels), _has_tokens(given))
    corpus = _corpus(model, given, max_length, special_tokens, progress)
    facts = _facts(model, corpus, chosen, templates, max_length, seed, special_tokens, activations)
    return Run(model, corpus, chosen, templates, batch_tokens, seed, activations, facts, memory)


def default_summaries(labels: bool, tokens: bool) -> list[Summary]:
    """What `record` keeps when it is not told: enough for an atlas, and for the finders that need no more."""
    rates = FiringRate(0.0, FractionOfMaximum(0.5))
    kept: list[Summary] = [Moments(), rates, MinMax(), Histogram(), TopExamples(20, context=12)]
    if tokens:
        kept.append(ByToken())
    if labels:
        kept.append(ByLabel(of=(Moments(), rates)))
    return kept


# One pass -------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One recording on its way: what it will read, and what it has seen so far."""

    model: Model
    corpus: Corpus
    sites: list[Site]
    templates: dict[str, Summary]
    batch_tokens: int
    seed: int
    activations: bool
    facts: dict[str, Any]
    memory: int | None = None

    def __post_init__(self) -> None:
        self.accumulators: dict[str, dict[str, Summary]] = {}
        self.counts: dict[str, int] = {}
        self.nonfinite: dict[str, dict[str, int]] = {}
        self.writers: dict[str, ActivationWriter] = {}
        self.calibration: dict[str, Calibration] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        by_token = [each for each in self.templates.values() if isinstance(each, ByToken)]
        most = max((each.parameters()["most_frequent"] for each in by_token), default=0)
        self.tokens = self.corpus.most_frequent(most) if by_token and len(self.corpus.counts) else None

    def expected_bytes(self) -> int | None:
        """Bytes of all accumulators; None while a site's size is not known."""
        if any(site.size is None for site in self.sites):
            return None
        settings = [self._setting(site, site.size or 0) for site in self.sites]
        usable = [each for each in self.templates.values() if self._usable(each, self.tokens is not None)]
        return sum(each.nbytes(settings) for each in usable)

    def go(self, show: bool) -> Recording:
        """Run the model over the data and give the recording."""
        if any(module.training for module in self.model.module.modules()):
            warnings.warn("the model is in training mode; it is recorded in evaluation mode", stacklevel=3)
        _check_memory(self.expected_bytes(), self.memory, self.corpus, self.sites, show)
        if any(each.relative for each in self.templates.values()):
            self._calibrate(show)
        if self.activations:
            self.folder = tempfile.TemporaryDirectory(prefix="patchclamp-")
        batches = self.corpus.batches(self.batch_tokens)
        with progress_bar("recording", self.corpus.tokens, show=show) as bar:
            for read in stream(self.model, self.corpus, self.sites, batches):
                for site in self.sites:
                    self._take(site, read.batches[site.name])
                bar.advance(read.tokens)
        for writer in self.writers.values():
            writer.close()
        return self._finish()

    def _finish(self) -> Recording:
        by_site = {}
        for site in self.sites:
            summaries = self.accumulators[site.name]
            sized = replace(site, size=next(iter(summaries.values())).size) if summaries else site
            kept = opened_activations(Path(self.folder.name), site.name) if self.folder else None
            found = self.nonfinite.get(site.name, {"nan": 0, "infinite": 0, "rows": 0})
            if found["rows"]:
                warnings.warn(
                    f"{site.name}: {found['nan']} activations are NaN and {found['infinite']} infinite; "
                    f"{found['rows']} of {found['rows'] + self.counts[site.name]} rows were left out of its summaries",
                    stacklevel=4,
                )
            by_site[site.name] = SiteRecording(sized, self.counts[site.name], found, summaries, kept)
        windows = self._windows(by_site)
        labels = {name: tuple(each) for name, each in self.corpus.labels.items()}
        shown = sorted({example for each in windows.values() for example in each.examples.tolist()})
        of_examples = {
            example: {name: labels[name][codes[example]] for name, codes in self.corpus.codes.items()}
            for example in shown
        }
        vocabulary = self._vocabulary(windows)
        return Recording(by_site, self.facts, labels, vocabulary, windows, of_examples, None, self.folder)

    def _take(self, site: Site, whole: Batch) -> None:
        batch, found = finite_rows(whole)
        for kind, number in found.items():
            counts = self.nonfinite.setdefault(site.name, {"nan": 0, "infinite": 0, "rows": 0})
            counts[kind] += number
        if site.name not in self.accumulators:
            setting = self._setting(site, whole.size, whole.values.dtype)
            has_tokens = whole.token is not None
            usable = {name: each for name, each in self.templates.items() if self._usable(each, has_tokens)}
            self.accumulators[site.name] = {name: each.start(setting) for name, each in usable.items()}
            self.counts[site.name] = 0
            if self.folder is not None:
                dtype = whole.values.cpu().numpy().dtype
                self.writers[site.name] = ActivationWriter(Path(self.folder.name), site.name, whole.size, dtype)
        for accumulator in self.accumulators[site.name].values():
            accumulator.update(batch)
        self.counts[site.name] += len(batch)
        if site.name in self.writers:
            self.writers[site.name].write(whole)

    def _setting(self, site: Site, size: int, dtype: torch.dtype = torch.float32) -> Setting:
        return Setting(
            site.name,
            size,
            tokens=self.tokens,
            labels=dict(self.corpus.labels),
            calibration=self.calibration.get(site.name),
            dtype=dtype,
        )

    def _usable(self, summary: Summary, has_tokens: bool) -> bool:
        return has_tokens or not summary.needs_tokens

    def _calibrate(self, show: bool) -> None:
        batches = self.corpus.batches(self.batch_tokens, self.corpus.sample(_CALIBRATION_TOKENS, self.seed))
        total = int(sum(self.corpus.lengths[each].sum() for each in batches))
        seen: dict[str, tuple[MinMax, Histogram]] = {}
        with progress_bar("calibrating thresholds", total, show=show) as bar:
            for read in stream(self.model, self.corpus, self.sites, batches):
                bar.advance(read.tokens)
                for name, whole in read.batches.items():
                    batch, _ = finite_rows(whole)
                    if name not in seen:
                        setting = Setting(name, batch.size, dtype=batch.values.dtype)
                        seen[name] = (MinMax().start(setting), Histogram().start(setting))
                    for accumulator in seen[name]:
                        accumulator.update(batch)
        for name, (extremes, histogram) in seen.items():
            maximum = np.nan_to_num(extremes.max.astype(np.float32), neginf=0.0)
            self.calibration[name] = Calibration(maximum, histogram.quantile)

    def _windows(self, by_site: Mapping[str, SiteRecording]) -> dict[str, Windows]:
        if not len(self.corpus.counts):
            return {}
        places: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"": []}
        for each in by_site.values():
            top = each.summaries.get("top_examples")
            if isinstance(top, TopExamples):
                decoder = each.site.stack == "decoder" and self.model.is_encoder_decoder
                places.setdefault("decoder" if decoder else "", []).append((top.example, top.position))
        return {stack: Windows.around(self.corpus, each, stack == "decoder") for stack, each in places.items()}

    def _vocabulary(self, windows: Mapping[str, Windows]) -> dict[int, str]:
        reader = self.model.reader
        if reader is None:
            return {}
        chosen = [each.token_ids for each in windows.values()]
        chosen += [] if self.tokens is None else [self.tokens]
        ids = np.unique(np.concatenate(chosen)).tolist() if chosen else []
        return dict(zip(ids, reader.strings(ids), strict=True))


# Before the pass ------------------------------------------------------------------------------------


def _templates(summaries: Sequence[Summary | type[Summary]] | None, labels: bool, tokens: bool) -> dict[str, Summary]:
    given = default_summaries(labels, tokens) if summaries is None else list(summaries)
    templates: dict[str, Summary] = {}
    for each in given:
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


def _has_tokens(data: Texts | Tensors) -> bool:
    return isinstance(data, Texts) or (data.values.ndim == 2 and not data.values.is_floating_point())


def _corpus(
    model: Model, data: Texts | Tensors, max_length: int | None, special_tokens: bool, show: bool
) -> TextCorpus | TensorCorpus:
    if isinstance(data, Tensors):
        return TensorCorpus(model, data)
    try:
        total = len(data)
    except TypeError:
        total = 0
    with progress_bar("tokenizing", total, "texts", show=show and total > 5000) as bar:
        return tokenize(model, data, max_length, special_tokens, bar)


def _facts(
    model: Model,
    corpus: Corpus,
    sites: Sequence[Site],
    templates: Mapping[str, Summary],
    max_length: int | None,
    seed: int,
    special_tokens: bool,
    activations: bool,
) -> dict[str, Any]:
    parameter = next(model.module.parameters(), None)
    return {
        "model": {
            "name": model.name,
            "class": type(model.module).__name__,
            "weights_sha256": model.weights_sha256(),
            "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        },
        "data": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "examples": corpus.examples,
            "tokens": corpus.tokens,
            "truncated": corpus.truncated,
        },
        "parameters": {
            "sites": [site.name for site in sites],
            "summaries": {name: each.parameters() for name, each in templates.items()},
            "max_length": max_length,
            "seed": seed,
            "special_tokens": special_tokens,
            "activations": activations,
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("patchclamp", "torch", "transformers", "numpy")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _check_writable(store: str | os.PathLike[str] | None) -> None:
    """Find out before the pass, not after it, whether the store can be written."""
    if store is None:
        return
    target = Path(store).expanduser().absolute()
    if target.exists():
        if target.is_dir() and not any(target.iterdir()):
            return
        read_manifest(target, "recording")  # raises where something else is there
    ancestor = next(each for each in target.parents if each.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise StoreError(f"cannot write {target}: {ancestor} is not a folder that can be written")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}."):
            pass
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error


def _found(store: str | os.PathLike[str] | None, facts: Mapping[str, Any]) -> Recording | None:
    """The recording that is in the store already, if it is this very one."""
    if store is None or not Path(store).is_dir() or not any(Path(store).iterdir()):
        return None
    manifest = read_manifest(store, "recording")
    differences = []
    for part, keys in {"model": ("weights_sha256", "class"), "data": ("sha256",)}.items():
        if any(manifest.get(part, {}).get(key) != facts[part][key] for key in keys):
            there, here = manifest.get(part, {}).get("name"), facts[part]["name"]
            differences.append(f"the {part} (there {there!r}, here {here!r})")
    for name, value in facts["parameters"].items():
        there = manifest.get("parameters", {}).get(name)
        if there != value:
            differences.append(f"{name} (there {there!r}, here {value!r})")
    if differences:
        raise StoreError(f"{store} holds another recording. What differs: {'; '.join(differences)}")
    return Recording.open(store)


def _check_memory(expected: int | None, memory: int | None, corpus: Corpus, sites: Sequence[Site], show: bool) -> None:
    neurons = sum(site.size or 0 for site in sites)
    if show:
        size = "an unknown amount of memory" if expected is None else f"{expected / 1e6:,.0f} MB"
        print(
            f"{corpus.examples:,} examples, {corpus.tokens:,} tokens; {neurons:,} neurons at {len(sites)} sites; "
            f"the summaries take {size}",
            file=sys.stderr,
        )
        if corpus.truncated:
            print(f"{corpus.truncated:,} texts are longer than the limit and were cut", file=sys.stderr)
    limit = memory if memory is not None else int(0.8 * _physical_memory())
    if expected is not None and expected > limit:
        raise DataError(
            f"the summaries would take {expected / 1e6:,.0f} MB; the limit is {limit / 1e6:,.0f} MB. "
            "Record fewer sites, or fewer or smaller summaries (ByToken(most_frequent=...)), or raise memory="
        )


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 62  # not to be found out: no limit
