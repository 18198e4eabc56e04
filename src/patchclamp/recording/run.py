"""`Run`: one pass over the data, from the first forward pass to the finished recording."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchclamp.errors import DataError, warn
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.progress import progress as progress_bar
from patchclamp.recording.accumulation import Accumulation, Plan
from patchclamp.recording.activation_store import ActivationWriter, opened_activations
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.checkpoint import Checkpoints, Done
from patchclamp.recording.cluster import RayCluster
from patchclamp.recording.corpus import Corpus, TextCorpus
from patchclamp.recording.fused import available
from patchclamp.recording.heap import give_back
from patchclamp.recording.recording import Recording, SiteRecording
from patchclamp.recording.stream import Read, finite_rows, stream
from patchclamp.recording.summaries import ByLabel, ByToken, Histogram, MinMax, Summary
from patchclamp.recording.windows import Windows

_CALIBRATION_TOKENS = 16_384
# So many batches that it is not felt if the first has to ask anew for what tokenizing and calibrating left behind.
_MANY = 64
# What waits to be written among the arrays of a checkpoint; no site is called so.
_WAITING = "\nwaiting\n"


@dataclass
class Run:
    """One recording on its way: what it will read, and how.

    Attributes:
        model, corpus, sites: what is read.
        templates: the summaries that were asked for, by name.
        plan: what is accumulated; its calibration is there after `calibrate`.
        batch_tokens: padded tokens of one forward pass.
        seed: draws the calibration sample.
        facts: what the recording will say of itself.
        memory: most bytes that the summaries may take; None: 80% of the machine's.
        scratch: folder for what grows with the data and finds no room in memory; None: that for temporary files.
        cluster: where the batches are read; None: in this process.
    """

    model: Model
    corpus: Corpus
    sites: list[Site]
    templates: dict[str, Summary]
    batch_tokens: int
    seed: int
    facts: dict[str, Any]
    memory: int | None = None
    scratch: Path | None = None
    cluster: RayCluster | None = None

    def __post_init__(self) -> None:
        tokens, self.named_tokens = self._slots()
        labels = {name: tuple(each) for name, each in self.corpus.labels.items()}
        self.plan = Plan(self.sites, self.templates, tokens, labels, self.corpus.examples)

    def go(
        self, show: bool, folder: Path | None = None, owner: object = None, checkpoints: Checkpoints | None = None
    ) -> Recording:
        """Run the model over the data and give the recording.

        Args:
            show: draw progress bars.
            folder: write every activation there.
            owner: lives as long as these activations can be read.
            checkpoints: where to go on from, and to write down what was done.
        """
        if any(module.training for module in self.model.module.modules()):
            warn("the model is in training mode; it is recorded in evaluation mode")
        expected = self._expected_bytes()
        if show:
            self._announce(expected)
        self._check_memory(expected)
        done = None if checkpoints is None else checkpoints.found()
        # What a checkpoint brings has its thresholds; a worker of a cluster begins with nothing.
        if (done is None or self.cluster is not None) and any(each.relative for each in self.templates.values()):
            self.calibrate(show)
        held = Accumulation(self.plan, self._limit() - (expected or 0), self.scratch)
        writers: dict[str, ActivationWriter] = {}
        batches, first = self.corpus.batches(self.batch_tokens), 0
        if len(batches) > _MANY:
            give_back()
        if done is not None:
            first, writers = done.batches, _taken_up(done, folder)
            held.restore(done.arrays, done.accumulated)
            if show:
                print(f"going on after batch {first} of {len(batches)}", file=sys.stderr)
        with progress_bar("recording", self.corpus.tokens, show=show) as bar:
            tokens = self.corpus.counted if isinstance(self.corpus, TextCorpus) else self.corpus.lengths
            bar.advance(int(sum(tokens[each].sum() for each in batches[:first])))
            if self.cluster is None:
                steps = self._here(held, batches, first, writers, folder)
            else:
                steps = self._there(held, batches, first, self.cluster)
            for number, tokens_read in steps:
                bar.advance(tokens_read)
                if checkpoints is not None and number < len(batches) and checkpoints.due():
                    _write_down(checkpoints, number, held, writers)
        for writer in writers.values():
            writer.close()
        return self.finish(held, folder, owner)

    def _here(
        self,
        held: Accumulation,
        batches: Sequence[np.ndarray],
        first: int,
        writers: dict[str, ActivationWriter],
        folder: Path | None,
    ) -> Iterator[tuple[int, int]]:
        """Read batch by batch in this process; gives how many are done, and the tokens of the last."""
        # Whoever wants every activation wants them as batches.
        taker = held.take_early if folder is None and available() else None
        reads = stream(self.model, self.corpus, self.sites, batches[first:], taker)
        for number, read in enumerate(reads, start=first + 1):
            held.take(read)
            if folder is not None:
                _write(writers, folder, read)
            if number == first + 1:  # sizes and grids may have become known only now
                self._check_memory(held.held_bytes())
            yield number, read.tokens

    def _there(
        self, held: Accumulation, batches: Sequence[np.ndarray], first: int, cluster: RayCluster
    ) -> Iterator[tuple[int, int]]:
        """The same on a cluster, many batches at a time."""
        for part in cluster.read(self.model, self.corpus, self.plan, batches, first):
            held.merge(part.held)
            self._check_memory(held.held_bytes())
            yield part.batches, part.tokens

    def _slots(self) -> tuple[np.ndarray | None, np.ndarray]:
        """The most frequent tokens, as many as `ByToken` has slots for; and the tokens that it names itself."""
        if not len(self.corpus.counts):
            return None, np.zeros(0, np.int64)
        wanted = [each for name, template in self.templates.items() for each in _by_token(name, template.parameters())]
        most = max((each["most_frequent"] for each in wanted), default=0)
        named = [np.asarray(each["tokens"], np.int64) for each in wanted if each["tokens"] is not None]
        return self.corpus.most_frequent(most), np.concatenate([np.zeros(0, np.int64), *named])

    def calibrate(self, show: bool) -> None:
        """Look at a sample of the data, for the thresholds that are relative to what a neuron does."""
        batches = self.corpus.batches(self.batch_tokens, self.corpus.sample(_CALIBRATION_TOKENS, self.seed))
        total = int(sum(self.corpus.lengths[each].sum() for each in batches))
        seen: dict[str, tuple[MinMax, Histogram, Histogram]] = {}
        with progress_bar("calibrating thresholds", total, show=show) as bar:
            reads = stream(self.model, self.corpus, self.sites, batches)
            for examples, read in zip(batches, reads, strict=True):
                bar.advance(int(self.corpus.lengths[examples].sum()))
                for name, whole in read.batches.items():
                    batch, _ = finite_rows(whole)
                    if name not in seen:
                        setting = Setting(name, batch.size, dtype=batch.values.dtype)
                        seen[name] = (MinMax().start(setting), Histogram().start(setting), Histogram().start(setting))
                    extremes, of_rows, of_examples = seen[name]
                    extremes.update(batch)
                    of_rows.update(batch)
                    ids, _, _ = batch.spans
                    of_examples.update(Batch(batch.maxima[0], ids, torch.zeros_like(ids)))
        for name, (extremes, of_rows, of_examples) in seen.items():
            maximum = np.nan_to_num(extremes.max.astype(np.float32), neginf=0.0)
            self.plan.calibration[name] = Calibration(maximum, _QuantileOrZero(of_rows), _QuantileOrZero(of_examples))

    # Memory -----------------------------------------------------------------------------------------

    def _expected_bytes(self) -> int | None:
        """Bytes of all accumulators, without what grows with the data; None while a site's size is not known."""
        if any(site.size is None for site in self.sites):
            return None
        usable = self.plan.usable(self.plan.tokens is not None)
        return sum(each.nbytes(self.plan.settings()) for each in usable if not each.large)

    def _limit(self) -> int:
        return int(0.8 * _physical_memory()) if self.memory is None else self.memory

    def _check_memory(self, expected: int | None) -> None:
        limit = self._limit()
        if expected is not None and expected > limit:
            raise DataError(
                f"the summaries would take {_megabytes(expected)}; the limit is {_megabytes(limit)}. "
                "Record fewer sites, or fewer or smaller summaries (ByToken(most_frequent=...)), or raise memory="
            )

    def _announce(self, expected: int | None) -> None:
        corpus, neurons = self.corpus, sum(site.size or 0 for site in self.sites)
        size = "an unknown amount of memory" if expected is None else _megabytes(expected)
        if expected is not None and (growing := [each for each in self.templates.values() if each.large]):
            more = _megabytes(sum(each.nbytes(self.plan.settings()) for each in growing))
            size += f", and {more} for each example's own ({growing[0].name}), on disk where memory is short"
        print(
            f"{corpus.examples:,} examples, {corpus.tokens:,} tokens; {neurons:,} neurons at {len(self.sites)} sites; "
            f"the summaries take {size}",
            file=sys.stderr,
        )
        if corpus.truncated:
            print(f"{corpus.truncated:,} texts are longer than the limit and were cut", file=sys.stderr)

    # The recording ----------------------------------------------------------------------------------

    def finish(self, held: Accumulation, folder: Path | None = None, owner: object = None) -> Recording:
        """The recording of what was accumulated; `folder` and `owner` as for `go`."""
        by_site = {}
        for site in self.sites:
            summaries, count = held.summaries[site.name], held.counts[site.name]
            sized = replace(site, size=next(iter(summaries.values())).size)
            kept = None if folder is None else opened_activations(folder, site.name, owner=owner)
            found = held.nonfinite[site.name]
            if found["rows"]:
                warn(
                    f"{site.name}: {found['nan']} activations are NaN and {found['infinite']} infinite; "
                    f"{found['rows']} of {found['rows'] + count} rows were left out of its summaries"
                )
            passed = held.passed[site.name] - found["rows"]
            by_site[site.name] = SiteRecording(sized, count, found, summaries, kept, passed)
        windows = self._windows(by_site)
        labels = self.plan.labels
        of_examples = {
            example: {name: labels[name][codes[example]] for name, codes in self.corpus.codes.items()}
            for example in _shown(by_site)
        }
        if not len(self.corpus.counts):  # how many positions an image has, only the model knows
            rows = [each.count + each.nonfinite["rows"] for each in by_site.values()]
            self.facts["data"]["tokens"] = max(rows)
        vocabulary = self._vocabulary(windows)
        return Recording(
            by_site,
            self.facts,
            labels,
            vocabulary,
            windows,
            of_examples,
            activations_folder=folder,
            folds=self.corpus.folds,
            documents=self.corpus.documents if isinstance(self.corpus, TextCorpus) else None,
            codes=dict(self.corpus.codes),
            positions=self._positions(),
        )

    def _positions(self) -> np.ndarray:
        if not len(self.corpus.counts):  # how many an image has, only the model knows
            return np.zeros(0, np.int64)
        return np.asarray(self.corpus.counted if isinstance(self.corpus, TextCorpus) else self.corpus.lengths, np.int64)

    def _windows(self, by_site: Mapping[str, SiteRecording]) -> dict[str, Windows]:
        if not len(self.corpus.counts):
            return {}
        places: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"": []}
        for each in by_site.values():
            decoder = each.site.stack == "decoder" and self.model.is_encoder_decoder
            shown = [found for summary in each.summaries.values() if len((found := summary.places())[0])]
            if shown:
                places.setdefault("decoder" if decoder else "", []).extend(shown)
        return {stack: Windows.around(self.corpus, each, stack == "decoder") for stack, each in places.items()}

    def _vocabulary(self, windows: Mapping[str, Windows]) -> dict[int, str]:
        if self.plan.tokens is None:
            return {}
        shown = [each.token_ids for each in windows.values()]
        ids = np.unique(np.concatenate([*shown, self.plan.tokens, self.named_tokens]))
        # Without a tokenizer a token is a number.
        reader = self.model.reader
        strings = [f" {each}" for each in ids] if reader is None else reader.strings(ids.tolist())
        return dict(zip(ids.tolist(), strings, strict=True))


@dataclass(frozen=True)
class _QuantileOrZero:
    """As `histogram.quantile`; 0 where the sample had nothing for a site, as for an expert that it never took."""

    histogram: Histogram

    def __call__(self, q: float) -> np.ndarray:
        return np.nan_to_num(self.histogram.quantile(q))


def _write_down(
    checkpoints: Checkpoints, batches: int, held: Accumulation, writers: Mapping[str, ActivationWriter]
) -> None:
    arrays, accumulated = held.state()
    waiting = {
        f"{_WAITING}{site}\n{name}": rows for site, each in writers.items() for name, rows in each.waiting().items()
    }
    checkpoints.write(batches, arrays | waiting, accumulated, {site: each.rows() for site, each in writers.items()})


def _taken_up(done: Done, folder: Path | None) -> dict[str, ActivationWriter]:
    """The writers as they were at a checkpoint; takes what waited out of its arrays."""
    waiting: dict[str, dict[str, np.ndarray]] = {}
    for key in [key for key in done.arrays if key.startswith(_WAITING)]:
        site, name = key.removeprefix(_WAITING).split("\n")
        waiting.setdefault(site, {})[name] = done.arrays.pop(key)
    if folder is None:
        return {}
    return {site: ActivationWriter.taken_up(folder, site, rows, waiting[site]) for site, rows in done.stored.items()}


def _write(writers: dict[str, ActivationWriter], folder: Path, read: Read) -> None:
    for name, batch in read.batches.items():
        if name not in writers:
            writers[name] = ActivationWriter(folder, name, batch.size, batch.values.cpu().numpy().dtype)
        writers[name].write(batch)


def _shown(by_site: Mapping[str, SiteRecording]) -> list[int]:
    """The examples that some summary shows, ascending."""
    summaries = [summary for each in by_site.values() for summary in each.summaries.values()]
    found = [np.unique(each.places()[0]) for each in summaries]
    return [example for example in np.unique(np.concatenate(found)).tolist() if example >= 0] if found else []


def _by_token(name: str, parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parameters of every `ByToken`, also of one that is kept by label."""
    if name == ByToken.name:
        yield parameters
    elif name == ByLabel.name:
        for each in parameters["of"]:
            yield from _by_token(each["summary"], each["parameters"])


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.0f} MB" if number >= 10e6 else f"{number / 1e6:.3g} MB"


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 62  # not to be found out: no limit
