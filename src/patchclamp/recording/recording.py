"""`Recording`: what a set of sites did over a data set. Reading it needs neither the model nor the data."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
import torch

from patchclamp.errors import DamagedStore, DataError, PatchclampError, StoreError, UnknownName, unknown
from patchclamp.model.site import Site
from patchclamp.neurons import Neurons
from patchclamp.recording.activation_store import StoredActivations, opened_activations
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.compare import compare
from patchclamp.recording.documents import Documents
from patchclamp.recording.mapped import mapped
from patchclamp.recording.summaries import ByLabel, Summary
from patchclamp.recording.windows import Window, Windows
from patchclamp.storage import OpenedStore, Remote, opened, place, published, write_manifest


class UnknownSummary(UnknownName, AttributeError):
    """A summary that was not recorded."""


@dataclass
class SiteRecording:
    """What one site did. Each summary is an attribute under its name: `.moments`, `.firing_rate`, `.top_examples`.

    Attributes:
        site: the site.
        count: rows (tokens that count; examples, for a site with one row an example) that the summaries hold.
        nonfinite: how many activations were NaN, how many infinite, and how many rows were left out for it.
        summaries: the accumulators by name.
        activations: every activation on disk, if the recording was asked for them, else None.
        passed: positions that count and went by; more than `count` for an expert, to which only some are routed.
    """

    site: Site
    count: int
    nonfinite: dict[str, int]
    summaries: dict[str, Summary]
    activations: StoredActivations | None = None
    passed: int | None = None

    @property
    def routing_rate(self) -> float:
        """Share of the tokens that were routed to this expert; 1 for a site that sees every token."""
        return 1.0 if self.passed is None else self.count / self.passed if self.passed else float("nan")

    @property
    def firing_rate_per_token(self) -> np.ndarray:
        """[size, thresholds] float64: share of all tokens on which a neuron fires; one not routed here does not.

        `firing_rate.rate` is the share of the tokens that were routed to the expert.
        """
        rate = np.nan_to_num(self.firing_rate.rate)  # of an expert to which nothing was routed: it never fired
        return rate * self.routing_rate

    def __getattr__(self, name: str) -> Any:
        summaries = self.__dict__.get("summaries", {})
        if name in summaries:
            return summaries[name]
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnknownSummary(str(unknown("summary", name, summaries, "It must be asked for when recording.")))

    def __repr__(self) -> str:
        return f"SiteRecording({self.site.name}: {self.site.size} neurons, {self.count:,} rows, {list(self.summaries)})"


@dataclass
class Recording:
    """What a set of sites did over a data set. Made by `patchclamp.record`, or read by `Recording.open`.

    `recording["mlp.3"]` is what one site did. Attributes:
        facts: model, data, parameters and versions, as in the manifest of a saved recording.
        labels: label -> categories of the data.
        vocabulary: token id -> its text, for the tokens that the recording shows.
        windows: the text around every position that the recording shows; what a decoder read is under "decoder".
        labels_of_examples: example -> label -> category, for the examples that the recording shows.
        path: the folder it was read from or written to, or the place in an object store; or None.
        activations_folder: the folder of the Zarr arrays, one group a site; None where they were not kept.
        folds: `[examples]` uint8, the fold of each example: 0 for describing, 1 for scoring.
        codes: label of the examples -> `[examples]` int32, the place of each one's category in `labels`; without the
            labels of tokens.
        positions: `[examples]` int64, how many positions of each count; empty where only the model knows.
        documents: of which document each example is a window, and where in it; None where examples are whole texts.
            `recording.documents.place(example)` and `.examples(document)` answer.
        store: what it was read from, or None: it keeps what was fetched from an object store.
    """

    by_site: dict[str, SiteRecording]
    facts: dict[str, Any]
    labels: dict[str, tuple[str, ...]]
    vocabulary: dict[int, str]
    windows: dict[str, Windows]
    labels_of_examples: dict[int, dict[str, str]]
    path: Path | Remote | None = None
    activations_folder: Path | None = None
    folds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    documents: Documents | None = None
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    store: OpenedStore | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, site: str | Site) -> SiteRecording:
        name = site.name if isinstance(site, Site) else site
        if name not in self.by_site:
            raise unknown("site", name, self.by_site, "Only recorded sites can be read.")
        return self.by_site[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    @property
    def sites(self) -> list[Site]:
        """The recorded sites."""
        return [each.site for each in self.by_site.values()]

    def neurons(self) -> Neurons:
        """Every recorded neuron, with what the simple summaries say: `mean`, `std`, `min`, `max`, `firing_rate`."""
        frames = [_simple_columns(name, each) for name, each in self.by_site.items()]
        return Neurons.from_polars(pl.concat(frames, how="diagonal_relaxed"))

    def compare(self, other: Recording, same_data: bool = True) -> Neurons:
        """Every neuron, the one that changed most from this recording to `other` first; see `recording.compare`.

        Args:
            other: a recording of the same sites and data: another checkpoint or seed, or after an edit.
            same_data: False compares distributions over different data.

        Raises:
            DataError: sites, sizes or data differ, or no summary that can be compared is in both.
        """
        return compare(self, other, same_data)

    def window(self, site: str, example: int, position: int, context: int = 12) -> Window:
        """The tokens around a position that the recording shows at a site, at most `context` on each side.

        Raises:
            UnknownName: the recording does not keep that place.
        """
        stack = "decoder" if self[site].site.stack == "decoder" and "decoder" in self.windows else ""
        if stack not in self.windows:
            raise UnknownName("the recording keeps no text: its data has no tokens")
        return self.windows[stack].at(example, position, context)

    def labels_of(self, example: int) -> dict[str, str]:
        """Label -> category of an example that the recording shows; `{}` for another."""
        return self.labels_of_examples.get(int(example), {})

    def categories_of_examples(self, label: str) -> np.ndarray:
        """`[examples]` of `str`: the category of every example, whether the recording shows it or not.

        Raises:
            UnknownName: no such label of the examples (labels of tokens are in `ByLabel` only).
        """
        if label not in self.codes:
            raise unknown("label of the examples", label, self.codes)
        return np.asarray(self.labels[label])[self.codes[label]]

    def text(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The tokens of these ids as they read in a text."""
        return [self.vocabulary.get(int(each), "�") for each in ids]

    def with_tokens_permuted(self, seed: int = 0) -> Recording:
        """The null recording: the same activations, each row paired with the token of another row drawn at random.

        Only summaries that look at tokens change. Needs `activations=True` when recording; the null recording
        keeps no activations itself, and says `tokens_permuted` among the parameters in `facts`.

        Raises:
            DataError: the activations were not kept, or a summary wants tokens and labels together.
        """
        permuted: dict[str, SiteRecording] = {}
        for name, each in self.by_site.items():
            if each.activations is None:
                raise DataError("pairing activations with tokens anew needs them: record(..., activations=True)")
            permuted[name] = _permuted(each, each.activations, self.folds, seed)
        parameters = self.facts["parameters"] | {"activations": False, "tokens_permuted": seed}
        return Recording(
            permuted,
            self.facts | {"parameters": parameters},
            self.labels,
            self.vocabulary,
            self.windows,
            self.labels_of_examples,
            folds=self.folds,
            documents=self.documents,
            codes=self.codes,
            positions=self.positions,
        )

    def save(self, path: str | os.PathLike[str], replace: bool = True) -> None:
        """Write the recording into a folder: safetensors, Parquet, Zarr and a manifest with checksums.

        What `Pooled` keeps is in files of its own, and is mapped into memory, not read, when it is opened.

        Args:
            path: the folder, or a place in an object store (`s3://bucket/name`). It appears only when it is whole.
            replace: an older recording that is there. False refuses.

        Raises:
            StoreError: it cannot be written, or something else is there.
            MissingExtra: the library for this object store is not installed.
        """
        from safetensors import SafetensorError

        with published(path, "recording", replace) as folder:
            try:
                self._write(folder)
            except StoreError:
                raise
            except (OSError, SafetensorError) as error:
                raise StoreError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
        self.path = place(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a recording.

        Args:
            path: its folder, or its place in an object store (`s3://bucket/name`). From there it is copied into a
                temporary folder, but for the activations: they are fetched in parts, when they are read.

        Raises:
            StoreError: there is none, it cannot be read, or it is of a newer format.
            DamagedStore: a file is missing or altered; the message names it. Of the chunks of activations,
                which may be many, only the presence is checked here, and the content when it is read.
            UnknownName: it holds a summary of the user's own, whose class has not been imported.
            MissingExtra: the library for this object store is not installed.
        """
        store = opened(path, "recording", later=_is_chunk)
        try:
            return _opened(store)
        except (DamagedStore, UnknownName):
            raise
        except (PatchclampError, KeyError, TypeError, ValueError, OSError) as error:
            raise DamagedStore(f"{store.path} cannot be read: {type(error).__name__}: {error}") from error

    def __repr__(self) -> str:
        data = self.facts.get("data", {})
        return (
            f"Recording({self.facts.get('model', {}).get('name', '?')!r} on {data.get('name', '?')!r}: "
            f"{len(self.by_site)} sites, {data.get('examples', 0):,} examples, {data.get('tokens', 0):,} tokens)"
        )

    # Writing and reading ----------------------------------------------------------------------------

    def _write(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        (folder / "summaries").mkdir()
        for name, each in self.by_site.items():
            arrays: dict[bool, dict[str, np.ndarray]] = {False: {}, True: {}}
            for summary, accumulator in each.summaries.items():
                for key, array in accumulator.state().items():
                    arrays[key in accumulator.large][f"{summary}/{key}"] = np.asarray(array, order="C")
            save_file(arrays[False], folder / "summaries" / _file_name(name))
            if arrays[True]:
                save_file(arrays[True], folder / "summaries" / _file_name(name, large=True))
        for stack, windows in self.windows.items():
            file = folder / f"windows{'.' if stack else ''}{stack}.safetensors"
            save_file({key: np.asarray(each, order="C") for key, each in windows.state().items()}, file)
        pl.DataFrame(
            {"id": list(self.vocabulary), "text": list(self.vocabulary.values())},
            schema={"id": pl.Int64, "text": pl.String},
        ).write_parquet(folder / "vocabulary.parquet")
        shown = list(self.labels_of_examples.items())
        pl.DataFrame(
            {"example": [example for example, _ in shown]}
            | {name: [labels[name] for _, labels in shown] for name in self.labels},
            schema={"example": pl.Int64} | dict.fromkeys(self.labels, pl.String),
        ).write_parquet(folder / "examples.parquet")
        of_examples = {"fold": self.folds, "positions": self.positions}
        of_examples |= {_CODE + name: codes for name, codes in self.codes.items()}
        of_examples |= self.documents.state() if self.documents is not None else {}
        save_file(of_examples, folder / _EXAMPLES)
        if self.activations_folder is not None:
            self._copy_activations(self.activations_folder, folder / "activations")
        write_manifest(folder, "recording", self._manifest())

    def _copy_activations(self, source: Path, target: Path) -> None:
        if self.store is None:
            shutil.copytree(source, target)
            return
        with self.store.at_hand(each for each in self.store.manifest["files"] if _is_chunk(each)):
            shutil.copytree(source, target)

    def _manifest(self) -> dict[str, Any]:
        first = next(iter(self.by_site.values()))
        return {
            **self.facts,
            "labels": {name: list(each) for name, each in self.labels.items()},
            "sites": {
                name: {
                    "site": asdict(each.site),
                    "count": each.count,
                    "nonfinite": each.nonfinite,
                    "passed": each.passed,
                    "summaries": list(each.summaries),
                }
                for name, each in self.by_site.items()
            },
            "summaries": {name: each.parameters() for name, each in first.summaries.items()},
            "activations": self.activations_folder is not None,
            "windows": list(self.windows),
            "documents": self.documents is not None,
        }


_EXAMPLES, _CODE = "examples.safetensors", "code/"


def _file_name(site: str, large: bool = False) -> str:
    # "%" stands in no name: it is always quoted.
    return quote(site, safe=".-_") + ("%large" if large else "") + ".safetensors"


def _is_chunk(file: str) -> bool:
    return file.startswith("activations/") and not file.endswith("zarr.json")


def _opened(store: OpenedStore) -> Recording:
    from safetensors.numpy import load_file

    folder, manifest = store.folder, store.manifest
    labels = {name: tuple(each) for name, each in manifest["labels"].items()}
    templates = {name: Summary.from_parameters(name, each) for name, each in manifest["summaries"].items()}
    by_site = {}
    sizes = {name: stored["site"]["size"] or 0 for name, stored in manifest["sites"].items()}
    for name, stored in manifest["sites"].items():
        site = Site(**stored["site"])
        arrays = load_file(folder / "summaries" / _file_name(name))
        if any(templates[each].large for each in stored["summaries"]):
            arrays |= mapped(folder / "summaries" / _file_name(name, large=True))
        states: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            summary, _, inner = key.partition("/")
            states.setdefault(summary, {})[inner] = array
        tokens = states.get("by_token", {}).get("tokens")
        setting = Setting(name, site.size or 0, labels=labels, tokens=tokens, sizes=sizes)
        summaries = {each: templates[each].reopen(setting, states.get(each, {})) for each in stored["summaries"]}
        kept = None
        if manifest["activations"]:
            kept = opened_activations(folder / "activations", name, store, store.owner)
        passed = stored.get("passed")
        by_site[name] = SiteRecording(site, stored["count"], stored["nonfinite"], summaries, kept, passed)
    vocabulary = pl.read_parquet(folder / "vocabulary.parquet")
    shown = pl.read_parquet(folder / "examples.parquet")
    of_examples = {row.pop("example"): row for row in shown.iter_rows(named=True)}
    arrays_of_examples = load_file(folder / _EXAMPLES)
    facts = {key: manifest[key] for key in ("model", "data", "parameters", "versions")}
    return Recording(
        by_site,
        facts,
        labels,
        dict(zip(vocabulary["id"].to_list(), vocabulary["text"].to_list(), strict=True)),
        {
            stack: Windows.restored(load_file(folder / f"windows{'.' if stack else ''}{stack}.safetensors"))
            for stack in manifest["windows"]
        },
        of_examples,
        store.path,
        folder / "activations" if manifest["activations"] else None,
        arrays_of_examples["fold"],
        Documents.restored(arrays_of_examples) if manifest["documents"] else None,
        {name[len(_CODE) :]: each for name, each in arrays_of_examples.items() if name.startswith(_CODE)},
        arrays_of_examples.get("positions", np.zeros(0, np.int64)),
        store,
    )


def _simple_columns(name: str, each: SiteRecording) -> pl.DataFrame:
    size = each.site.size or 0
    columns: dict[str, Any] = {"site": [name] * size, "index": np.arange(size)}
    summaries: dict[str, Any] = dict(each.summaries)
    if "moments" in summaries:
        columns |= {"mean": summaries["moments"].mean, "std": summaries["moments"].std}
    if "min_max" in summaries:
        columns |= {"min": summaries["min_max"].min, "max": summaries["min_max"].max}
    if "firing_rate" in summaries:
        columns["firing_rate"] = summaries["firing_rate"].rate[:, 0]
    if each.site.kind == "expert":
        columns["routing_rate"] = [each.routing_rate] * size
    return pl.DataFrame(columns, schema_overrides={"index": pl.Int64})


def _permuted(each: SiteRecording, stored: StoredActivations, folds: np.ndarray, seed: int) -> SiteRecording:
    tokens = stored.token[:]
    tokens = tokens[np.random.default_rng(seed).permutation(len(tokens))]
    example, position = stored.example[:], stored.position[:]
    renewed = {name: _emptied(summary) for name, summary in each.summaries.items() if summary.needs_tokens}
    for part in _parts(example, stored.values.chunks[0]) if renewed else ():
        values = torch.from_numpy(stored.values[part])
        batch = Batch(
            values,
            torch.from_numpy(example[part]),
            torch.from_numpy(position[part]),
            torch.from_numpy(tokens[part]),
            fold=torch.from_numpy(folds[example[part]].astype(np.int64)),
        )
        finite = torch.isfinite(values).all(1)
        batch = batch if bool(finite.all()) else batch.select(finite)
        for summary in renewed.values():
            summary.update(batch)
    return SiteRecording(each.site, each.count, each.nonfinite, each.summaries | renewed, passed=each.passed)


def _parts(example: np.ndarray, rows: int) -> list[slice]:
    """The rows [rows] in parts of about so many; no example is in two of them."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(example)) + 1, [len(example)]])
    places = np.searchsorted(starts, np.arange(0, len(example) + rows, rows))
    cuts = np.unique(starts[places.clip(max=len(starts) - 1)]).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]


def _emptied(summary: Summary) -> Summary:
    """A fresh accumulator with the tokens and thresholds of this one."""
    if isinstance(summary, ByLabel):
        raise DataError(
            f"{summary!r} cannot be paired with tokens anew: that would take tokens and labels of all examples together"
        )
    state = summary.state()
    zeros = np.zeros(summary.size, np.float32)
    setting = Setting(
        summary.site, summary.size, tokens=state.get("tokens"), calibration=Calibration(zeros, lambda _: zeros)
    )
    fixed = {name: state[name] for name in summary.agree}
    return summary.reopen(setting, summary.start(setting).state() | fixed)
