"""`Run`: one pass over the data, from the first forward pass to the finished recording."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchclamp.errors import DataError
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.progress import progress as progress_bar
from patchclamp.recording.activation_store import ActivationWriter, opened_activations
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.corpus import Corpus
from patchclamp.recording.recording import Recording, SiteRecording
from patchclamp.recording.stream import finite_rows, stream
from patchclamp.recording.summaries import ByLabel, ByToken, Histogram, MinMax, Summary, TopExamples
from patchclamp.recording.windows import Windows

_CALIBRATION_TOKENS = 16_384


@dataclass
class Run:
    """One recording on its way: what it will read, and what it has seen so far.

    Attributes:
        model, corpus, sites: what is read.
        templates: the summaries that were asked for, by name.
        batch_tokens: padded tokens of one forward pass.
        seed: draws the calibration sample.
        facts: what the recording will say of itself.
        memory: most bytes that the summaries may take; None: 80% of the machine's.
    """

    model: Model
    corpus: Corpus
    sites: list[Site]
    templates: dict[str, Summary]
    batch_tokens: int
    seed: int
    facts: dict[str, Any]
    memory: int | None = None

    def __post_init__(self) -> None:
        self.accumulators: dict[str, dict[str, Summary]] = {}
        self.counts: dict[str, int] = {}
        self.nonfinite: dict[str, dict[str, int]] = {}
        self.writers: dict[str, ActivationWriter] = {}
        self.calibration: dict[str, Calibration] = {}
        self.tokens, self.named_tokens = self._slots()

    def go(self, show: bool, folder: Path | None = None, owner: object = None) -> Recording:
        """Run the model over the data and give the recording.

        Args:
            show: draw progress bars.
            folder: write every activation there.
            owner: lives as long as these activations can be read.
        """
        if any(module.training for module in self.model.module.modules()):
            _warn("the model is in training mode; it is recorded in evaluation mode")
        expected = self._expected_bytes()
        if show:
            self._announce(expected)
        self._check_memory(expected)
        if any(each.relative for each in self.templates.values()):
            self._calibrate(show)
        batches = self.corpus.batches(self.batch_tokens)
        with progress_bar("recording", self.corpus.tokens, show=show) as bar:
            for read in stream(self.model, self.corpus, self.sites, batches):
                for site in self.sites:
                    self._take(site, read.batches[site.name], folder)
                if expected is None:
                    expected = self._held_bytes()
                    self._check_memory(expected)
                bar.advance(read.tokens)
        for writer in self.writers.values():
            writer.close()
        return self._finish(folder, owner)

    # While it runs ----------------------------------------------------------------------------------

    def _take(self, site: Site, whole: Batch, folder: Path | None) -> None:
        batch, found = finite_rows(whole)
        for kind, number in found.items():
            counts = self.nonfinite.setdefault(site.name, {"nan": 0, "infinite": 0, "rows": 0})
            counts[kind] += number
        if site.name not in self.accumulators:
            self._start(site, whole, folder)
        for accumulator in self.accumulators[site.name].values():
            accumulator.update(batch)
        self.counts[site.name] += len(batch)
        if site.name in self.writers:
            self.writers[site.name].write(whole)

    def _start(self, site: Site, first: Batch, folder: Path | None) -> None:
        setting = self._setting(site, first.size, first.values.dtype)
        usable = self._usable(first.token is not None)
        if not usable:
            names = ", ".join(type(each).__name__ for each in self.templates.values())
            raise DataError(
                f"{site.name} gives a row for each example, not for each token: {names} cannot be kept there"
            )
        self.accumulators[site.name] = {each.name: each.start(setting) for each in usable}
        self.counts[site.name] = 0
        if folder is not None:
            dtype = first.values.cpu().numpy().dtype
            self.writers[site.name] = ActivationWriter(folder, site.name, first.size, dtype)

    def _setting(self, site: Site, size: int, dtype: torch.dtype = torch.float32) -> Setting:
        return Setting(
            site.name,
            size,
            tokens=self.tokens,
            labels=dict(self.corpus.labels),
            calibration=self.calibration.get(site.name),
            dtype=dtype,
        )

    def _usable(self, has_tokens: bool) -> list[Summary]:
        return [each for each in self.templates.values() if has_tokens or not each.needs_tokens]

    def _slots(self) -> tuple[np.ndarray | None, np.ndarray]:
        """The most frequent tokens, as many as `ByToken` has slots for; and the tokens that it names itself."""
        if not len(self.corpus.counts):
            return None, np.zeros(0, np.int64)
        wanted = [each for name, template in self.templates.items() for each in _by_token(name, template.parameters())]
        most = max((each["most_frequent"] for each in wanted), default=0)
        named = [np.asarray(each["tokens"], np.int64) for each in wanted if each["tokens"] is not None]
        return self.corpus.most_frequent(most), np.concatenate([np.zeros(0, np.int64), *named])

    def _calibrate(self, show: bool) -> None:
        batches = self.corpus.batches(self.batch_tokens, self.corpus.sample(_CALIBRATION_TOKENS, self.seed))
        total = int(sum(self.corpus.lengths[each].sum() for each in batches))
        seen: dict[str, tuple[MinMax, Histogram]] = {}
        with progress_bar("calibrating thresholds", total, show=show) as bar:
            reads = stream(self.model, self.corpus, self.sites, batches)
            for examples, read in zip(batches, reads, strict=True):
                bar.advance(int(self.corpus.lengths[examples].sum()))
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

    # Memory -----------------------------------------------------------------------------------------

    def _expected_bytes(self) -> int | None:
        """Bytes of all accumulators; None while a site's size is not known."""
        if any(site.size is None for site in self.sites):
            return None
        settings = [self._setting(site, site.size or 0) for site in self.sites]
        return sum(each.nbytes(settings) for each in self._usable(self.tokens is not None))

    def _held_bytes(self) -> int:
        return sum(each.held_bytes() for of_site in self.accumulators.values() for each in of_site.values())

    def _check_memory(self, expected: int | None) -> None:
        limit = int(0.8 * _physical_memory()) if self.memory is None else self.memory
        if expected is not None and expected > limit:
            raise DataError(
                f"the summaries would take {_megabytes(expected)}; the limit is {_megabytes(limit)}. "
                "Record fewer sites, or fewer or smaller summaries (ByToken(most_frequent=...)), or raise memory="
            )

    def _announce(self, expected: int | None) -> None:
        corpus, neurons = self.corpus, sum(site.size or 0 for site in self.sites)
        size = "an unknown amount of memory" if expected is None else _megabytes(expected)
        print(
            f"{corpus.examples:,} examples, {corpus.tokens:,} tokens; {neurons:,} neurons at {len(self.sites)} sites; "
            f"the summaries take {size}",
            file=sys.stderr,
        )
        if corpus.truncated:
            print(f"{corpus.truncated:,} texts are longer than the limit and were cut", file=sys.stderr)

    # The recording ----------------------------------------------------------------------------------

    def _finish(self, folder: Path | None, owner: object) -> Recording:
        by_site = {}
        for site in self.sites:
            summaries, count = self.accumulators[site.name], self.counts[site.name]
            sized = replace(site, size=next(iter(summaries.values())).size)
            kept = None if folder is None else opened_activations(folder, site.name, owner=owner)
            found = self.nonfinite.get(site.name, {"nan": 0, "infinite": 0, "rows": 0})
            if found["rows"]:
                _warn(
                    f"{site.name}: {found['nan']} activations are NaN and {found['infinite']} infinite; "
                    f"{found['rows']} of {found['rows'] + count} rows were left out of its summaries"
                )
            by_site[site.name] = SiteRecording(sized, count, found, summaries, kept)
        windows = self._windows(by_site)
        labels = {name: tuple(each) for name, each in self.corpus.labels.items()}
        of_examples = {
            example: {name: labels[name][codes[example]] for name, codes in self.corpus.codes.items()}
            for example in _shown(by_site)
        }
        if not len(self.corpus.counts):  # how many positions an image has, only the model knows
            rows = [each.count + each.nonfinite["rows"] for each in by_site.values()]
            self.facts["data"]["tokens"] = max(rows)
        vocabulary = self._vocabulary(windows)
        return Recording(by_site, self.facts, labels, vocabulary, windows, of_examples, activations_folder=folder)

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
        if self.tokens is None:
            return {}
        shown = [each.token_ids for each in windows.values()]
        ids = np.unique(np.concatenate([*shown, self.tokens, self.named_tokens]))
        # Without a tokenizer a token is a number.
        reader = self.model.reader
        strings = [f" {each}" for each in ids] if reader is None else reader.strings(ids.tolist())
        return dict(zip(ids.tolist(), strings, strict=True))


def _shown(by_site: Mapping[str, SiteRecording]) -> list[int]:
    """The examples that are among the strongest of some neuron, ascending."""
    tops = [each.summaries.get("top_examples") for each in by_site.values()]
    found = [np.unique(top.example) for top in tops if isinstance(top, TopExamples)]
    return [example for example in np.unique(np.concatenate(found)).tolist() if example >= 0] if found else []


def _by_token(name: str, parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parameters of every `ByToken`, also of one that is kept by label."""
    if name == ByToken.name:
        yield parameters
    elif name == ByLabel.name:
        for each in parameters["of"]:
            yield from _by_token(each["summary"], each["parameters"])


def _warn(message: str) -> None:
    """Warn, and blame the user's line: the first one outside this package."""
    frame, level = sys._getframe(1), 3
    while frame.f_back is not None and frame.f_back.f_globals.get("__name__", "").split(".")[0] == "patchclamp":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.0f} MB" if number >= 10e6 else f"{number / 1e6:.3g} MB"


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 1 << 62  # not to be found out: no limit
