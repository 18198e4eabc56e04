"""`Recording`: what a set of sites did over a data set. Reading it needs neither the model nor the data."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import polars as pl
import torch

from patchclamp.errors import DamagedStore, DataError, PatchclampError, UnknownName, unknown
from patchclamp.model.site import Site
from patchclamp.neurons import Neurons
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.summaries.summary import Summary
from patchclamp.recording.windows import Window, Windows
from patchclamp.storage import new_folder, read_manifest, verify_files, write_manifest


class StoredActivations(NamedTuple):
    """Every activation of one site, as Zarr arrays on disk, one row per position that counts."""

    values: Any  # [rows, size]
    example: Any  # [rows] int64
    position: Any  # [rows] int64
    token: Any  # [rows] int64; -1 where there are no tokens


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
    """

    site: Site
    count: int
    nonfinite: dict[str, int]
    summaries: dict[str, Summary]
    activations: StoredActivations | None = None

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
        path: the folder it was read from or written to, or None.
    """

    by_site: dict[str, SiteRecording]
    facts: dict[str, Any]
    labels: dict[str, tuple[str, ...]]
    vocabulary: dict[int, str]
    windows: dict[str, Windows]
    labels_of_examples: dict[int, dict[str, str]]
    path: Path | None = None
    # Keeps a temporary folder with activations alive as long as the recording.
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

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

    def text(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The tokens of these ids as they read in a text."""
        return [self.vocabulary.get(int(each), "�") for each in ids]

    def with_tokens_permuted(self, seed: int = 0) -> Recording:
        """The null recording: the same activations, each row paired with the token of another row drawn at random.

        Only summaries that look at tokens change. Needs `activations=True` when recording.

        Raises:
            DataError: the activations were not kept.
        """
        permuted: dict[str, SiteRecording] = {}
        for name, each in self.by_site.items():
            if each.activations is None:
                raise DataError("pairing activations with tokens anew needs them: record(..., activations=True)")
            permuted[name] = _permuted(each, self.labels, seed)
        return Recording(
            permuted,
            self.facts,
            self.labels,
            self.vocabulary,
            self.windows,
            self.labels_of_examples,
            None,
            self._folder,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording into a folder: safetensors, Parquet, Zarr and a manifest with checksums.

        The folder appears only when it is whole. An older recording there is replaced.

        Raises:
            StoreError: the folder cannot be written, or something else is there.
        """
        with new_folder(path, "recording") as folder:
            self._write(folder)
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a recording from a folder.

        Raises:
            StoreError: there is none, or it is of a newer format.
            DamagedStore: a file is missing or altered; the message names it. Zarr chunks are checked by
                presence here, and by Zarr when read.
        """
        folder = Path(path)
        manifest = read_manifest(folder, "recording")
        verify_files(folder, manifest, skip=("activations/",))
        try:
            return _opened(folder, manifest)
        except PatchclampError as error:
            if isinstance(error, DamagedStore):
                raise
            raise DamagedStore(f"{folder} cannot be read: {error}") from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DamagedStore(f"{folder} cannot be read: {type(error).__name__}: {error}") from error

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
            arrays = {
                f"{summary}/{key}": np.asarray(array, order="C")
                for summary, accumulator in each.summaries.items()
                for key, array in accumulator.state().items()
            }
            save_file(arrays, folder / "summaries" / _file_name(name))
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
        if any(each.activations is not None for each in self.by_site.values()):
            shutil.copytree(self.activations_folder, folder / "activations")
        write_manifest(folder, "recording", self._manifest())

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
                    "summaries": list(each.summaries),
                }
                for name, each in self.by_site.items()
            },
            "summaries": {name: each.parameters() for name, each in first.summaries.items()},
            "activations": first.activations is not None,
            "windows": list(self.windows),
        }

    @property
    def activations_folder(self) -> Path:
        """Folder of the Zarr arrays, one group a site.

        Raises:
            DataError: the activations were not kept.
        """
        if self._folder is not None:
            return Path(self._folder.name)
        if self.path is not None and (self.path / "activations").is_dir():
            return self.path / "activations"
        raise DataError("this recording keeps no activations: record(..., activations=True)")


def zarr_group(folder: Path, site: str) -> Path:
    """Where the activations of a site lie inside the folder of all activations."""
    return folder / quote(site, safe=".-_")


def opened_activations(folder: Path, site: str) -> StoredActivations:
    """The Zarr arrays of one site, read only."""
    import zarr

    group = zarr.open_group(zarr_group(folder, site), mode="r")
    return StoredActivations(group["values"], group["example"], group["position"], group["token"])


def _file_name(site: str) -> str:
    return quote(site, safe=".-_") + ".safetensors"


def _opened(folder: Path, manifest: Mapping[str, Any]) -> Recording:
    from safetensors.numpy import load_file

    labels = {name: tuple(each) for name, each in manifest["labels"].items()}
    templates = {name: Summary.from_parameters(name, each) for name, each in manifest["summaries"].items()}
    by_site = {}
    for name, stored in manifest["sites"].items():
        site = Site(**stored["site"])
        arrays = load_file(folder / "summaries" / _file_name(name))
        states: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            summary, _, inner = key.partition("/")
            states.setdefault(summary, {})[inner] = array
        setting = Setting(name, site.size or 0, labels=labels, tokens=states.get("by_token", {}).get("tokens"))
        summaries = {each: templates[each].reopen(setting, states.get(each, {})) for each in stored["summaries"]}
        kept = opened_activations(folder / "activations", name) if manifest["activations"] else None
        by_site[name] = SiteRecording(site, stored["count"], stored["nonfinite"], summaries, kept)
    vocabulary = pl.read_parquet(folder / "vocabulary.parquet")
    shown = pl.read_parquet(folder / "examples.parquet")
    of_examples = {row.pop("example"): row for row in shown.iter_rows(named=True)}
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
        folder,
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
    return pl.DataFrame(columns, schema_overrides={"index": pl.Int64})


def _permuted(each: SiteRecording, labels: Mapping[str, tuple[str, ...]], seed: int) -> SiteRecording:
    stored = each.activations
    assert stored is not None
    tokens = np.asarray(stored.token[:])
    tokens = tokens[np.random.default_rng(seed).permutation(len(tokens))]
    example, position = np.asarray(stored.example[:]), np.asarray(stored.position[:])
    setting = Setting(each.site.name, each.site.size or 0, labels=labels)
    renewed = {
        name: summary.reopen(setting, _emptied(summary.state()))
        for name, summary in each.summaries.items()
        if summary.needs_tokens
    }
    rows = stored.values.chunks[0]
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        values = torch.from_numpy(np.asarray(stored.values[part]))
        finite = torch.isfinite(values).all(1)
        batch = Batch(
            values,
            torch.from_numpy(example[part]),
            torch.from_numpy(position[part]),
            torch.from_numpy(tokens[part]),
        )
        batch = batch if bool(finite.all()) else batch.select(finite)
        for summary in renewed.values():
            summary.update(batch)
    return SiteRecording(each.site, each.count, each.nonfinite, each.summaries | renewed, each.activations)


def _emptied(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    # What a summary was set to stays (which tokens, which thresholds); what it counted starts again.
    fixed = ("tokens", "threshold", "thresholds")
    return {name: array if name in fixed else np.zeros_like(array) for name, array in state.items()}
