"""`Run`: one pass over the data, from the first forward pass to the finished recording."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchclamp.errors import DataError, unknown
from patchclamp.model.model import Model
from patchclamp.model.site import Site
from patchclamp.progress import progress as progress_bar
from patchclamp.recording.activation_store import ActivationWriter, opened_activations
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.corpus import Corpus, TextCorpus
from patchclamp.recording.recording import Recording, SiteRecording
from patchclamp.recording.stream import finite_rows, stream
from patchclamp.recording.summaries import ByLabel, ByToken, Histogram, MinMax, Summary
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
        scratch: folder for what grows with the data and finds no room in memory; None: that for temporary files.
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

    def __post_init__(self) -> None:
        self.accumulators: dict[str, dict[str, Summary]] = {}
        self.counts: dict[str, int] = {}
        self.passed: dict[str, int] = {}
        self.nonfinite: dict[str, dict[str, int]] = {}
        self.writers: dict[str, ActivationWriter] = {}
        self.calibration: dict[str, Calibration] = {}
        self.tokens, self.named_tokens = self._slots()
        self.wanted = _wanted(self.templates, self.sites)

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
        self._room = self._limit() - (expected or 0)
        if any(each.relative for each in self.templates.values()):
            self._calibrate(show)
        batches, held = self.corpus.batches(self.batch_tokens), None
        with progress_bar("recording", self.corpus.tokens, show=show) as bar:
            for read in stream(self.model, self.corpus, self.sites, batches):
                for site in self.sites:
                    self._take(site, self._with_others(site, read.batches), folder)
                    self.passed[site.name] = self.passed.get(site.name, 0) + read.passed[site.name]
                if held is None:  # sizes and grids may have become known only now
                    held = self._held_bytes()
                    self._check_memory(held)
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

    def _with_others(self, site: Site, batches: Mapping[str, Batch]) -> Batch:
        """The batch of a site, with what the sites that some summary pairs it with did on the same rows."""
        whole = batches[site.name]
        for name in self.wanted:
            same = [torch.equal(a, b.to(a.device)) for a, b in zip(_places(whole), _places(batches[name]), strict=True)]
            if not all(same):
                raise DataError(
                    f"{site.name} has {len(whole)} rows where {name} has {len(batches[name])}, or others: two sites "
                    "can be paired only if they have the same rows (examples and positions)"
                )
        return replace(whole, others={name: batches[name].values for name in self.wanted}) if self.wanted else whole

    def _start(self, site: Site, first: Batch, folder: Path | None) -> None:
        setting = self._setting(site, first.size, first.values.dtype)
        sizes = {**setting.sizes, **{name: values.shape[1] for name, values in first.others.items()}}
        setting = replace(setting, grid=first.grid, sizes=sizes)
        usable = self._usable(first.token is not None)
        if not usable:
            names = ", ".join(type(each).__name__ for each in self.templates.values())
            raise DataError(
                f"{site.name} gives a row for each example, not for each token: {names} cannot be kept there"
            )
        self.accumulators[site.name] = {
            each.name: each.start(replace(setting, scratch=self._scratch_of(each, setting))) for each in usable
        }
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
            examples=self.corpus.examples,
            sizes={each.name: each.size for each in self.sites if each.size is not None},
        )

    def _scratch_of(self, template: Summary, setting: Setting) -> str | None:
        """The folder for what grows with the data; None for memory, as long as there is room."""
        needed = template.nbytes([setting]) if template.large else 0
        if needed <= self._room:
            self._room -= needed
            return None
        return str(self.scratch or tempfile.gettempdir())

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
            self.calibration[name] = Calibration(maximum, _quantile_or_zero(of_rows), _quantile_or_zero(of_examples))

    # Memory -----------------------------------------------------------------------------------------

    def _expected_bytes(self) -> int | None:
        """Bytes of all accumulators, without what grows with the data; None while a site's size is not known."""
        if any(site.size is None for site in self.sites):
            return None
        settings = [self._setting(site, site.size or 0) for site in self.sites]
        return sum(each.nbytes(settings) for each in self._usable(self.tokens is not None) if not each.large)

    def _held_bytes(self) -> int:
        of_sites = self.accumulators.values()
        return sum(each.held_bytes() for summaries in of_sites for each in summaries.values() if not each.large)

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
            settings = [self._setting(site, site.size or 0) for site in self.sites]
            more = _megabytes(sum(each.nbytes(settings) for each in growing))
            size += f", and {more} for each example's own ({growing[0].name}), on disk where memory is short"
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
            passed = self.passed[site.name] - found["rows"]
            by_site[site.name] = SiteRecording(sized, count, found, summaries, kept, passed)
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
        )

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
        if self.tokens is None:
            return {}
        shown = [each.token_ids for each in windows.values()]
        ids = np.unique(np.concatenate([*shown, self.tokens, self.named_tokens]))
        # Without a tokenizer a token is a number.
        reader = self.model.reader
        strings = [f" {each}" for each in ids] if reader is None else reader.strings(ids.tolist())
        return dict(zip(ids.tolist(), strings, strict=True))


def _quantile_or_zero(histogram: Histogram) -> Callable[[float], np.ndarray]:
    """As `histogram.quantile`; 0 where the sample had nothing for a site, as for an expert that it never took."""
    return lambda q: np.nan_to_num(histogram.quantile(q))


def _shown(by_site: Mapping[str, SiteRecording]) -> list[int]:
    """The examples that some summary shows, ascending."""
    summaries = [summary for each in by_site.values() for summary in each.summaries.values()]
    found = [np.unique(each.places()[0]) for each in summaries]
    return [example for example in np.unique(np.concatenate(found)).tolist() if example >= 0] if found else []


def _wanted(templates: Mapping[str, Summary], sites: Sequence[Site]) -> list[str]:
    """The sites whose values some summary of another site asks for."""
    names, wanted = [site.name for site in sites], []
    for each in templates.values():
        for name in getattr(each, "wants_sites", ()):
            if name not in names:
                raise unknown("recorded site", name, names, f"{each!r} pairs it with others: name it in sites= too.")
            wanted.append(name)
    return list(dict.fromkeys(wanted))


def _places(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.example, batch.position


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
