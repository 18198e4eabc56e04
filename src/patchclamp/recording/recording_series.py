"""`RecordingSeries`: recordings of several checkpoints of a model on the same data."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from patchclamp.errors import DamagedStore, StoreError, unknown
from patchclamp.neurons import Neurons
from patchclamp.recording.recording import Recording
from patchclamp.storage import Conflict, Remote, exists, place, seal_of

INDEX = "series.json"
FORMAT = "patchclamp series"
FORMAT_VERSION = 1
_SEAL = "series_sha256"


class RecordingSeries(Mapping[str, Recording]):
    """Recordings by the name of their checkpoint, in order. Made by `record_over`, or read by `RecordingSeries.open`.

    `series["step1000"]` is a `Recording`. Those on disk are opened when they are asked for, and are not held.

    Attributes:
        facts: what all recordings have in common: `data`, `parameters`, and `calibration`, which says on what
            relative thresholds were calibrated.
        path: the folder, or the place in an object store, with one recording per checkpoint; or None.
    """

    def __init__(
        self,
        recordings: Mapping[str, Recording | Path | Remote],
        facts: dict[str, Any],
        path: Path | Remote | None = None,
    ) -> None:
        self._recordings = dict(recordings)
        self._opened: weakref.WeakValueDictionary[str, Recording] = weakref.WeakValueDictionary()
        self._tables: dict[str, Neurons] = {}
        self.facts, self.path = facts, path

    @property
    def names(self) -> list[str]:
        """Names of the checkpoints, in order."""
        return list(self._recordings)

    def __getitem__(self, name: str) -> Recording:
        if name not in self._recordings:
            raise unknown("checkpoint", name, self._recordings)
        held = self._recordings[name]
        if isinstance(held, Recording):
            return held
        recording = self._opened.get(name)
        if recording is None:
            recording = self._opened[name] = Recording.open(held)
        return recording

    def __iter__(self) -> Iterator[str]:
        return iter(self._recordings)

    def __len__(self) -> int:
        return len(self._recordings)

    def __contains__(self, name: object) -> bool:
        return name in self._recordings

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def trajectory(self, site: str, measurement: str = "mean") -> np.ndarray:
        """How a simple measurement of each neuron goes over the checkpoints.

        Args:
            site: name of the site.
            measurement: "mean", "std" (of `Moments`), "min", "max" (of `MinMax`), or "firing_rate" (of `FiringRate`,
                its first threshold; each checkpoint above its own if that is relative).

        Returns:
            [checkpoints, size] float64, in the order of `names`.

        Raises:
            UnknownName: no such site or measurement.
        """
        rows = []
        for name in self:
            table = self._table(name).at(site)
            if not len(table):
                raise unknown("site", site, self._table(name).sites, "Only recorded sites can be read.")
            known = [each for each in table.columns if each not in ("site", "index")]
            if measurement not in known:
                raise unknown("measurement", measurement, known, "Its summary must be asked for when recording.")
            rows.append(table[measurement].to_numpy().astype(np.float64))
        return np.stack(rows)

    def compare(self, before: str | None = None, after: str | None = None) -> Neurons:
        """Every neuron, the one that changed most first; see `Recording.compare`.

        Args:
            before: name of a checkpoint; by default the first.
            after: name of another; by default the last.

        Raises:
            UnknownName: no such checkpoint.
            DataError: no summary that can be compared is in both.
        """
        names = self.names
        return self[names[0] if before is None else before].compare(self[names[-1] if after is None else after])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RecordingSeries:
        """Read the series that `record_over` has written, as far as it came.

        Args:
            path: its folder, or its place in an object store.

        Raises:
            StoreError: there is none, it cannot be read, or it is of a newer format.
            DamagedStore: its index is damaged, or a recording is missing.
        """
        folder = place(path)
        index = read_index(folder)
        if index is None:
            raise StoreError(f"there is no series of recordings at {folder}: it has no {INDEX}")
        recordings = {name: folder / folder_name(name) for name in index["checkpoints"]}
        if missing := [name for name, each in recordings.items() if not exists(each)]:
            raise DamagedStore(f"{recordings[missing[0]]} is missing: the recording of checkpoint {missing[0]!r}")
        return cls(recordings, index["facts"], folder)

    def __repr__(self) -> str:
        names = self.names
        shown = ", ".join(names if len(names) < 4 else [*names[:2], "...", names[-1]])
        return f"RecordingSeries({len(names)} checkpoints: {shown})"

    def _table(self, name: str) -> Neurons:
        if name not in self._tables:
            self._tables[name] = self[name].neurons()
        return self._tables[name]


def folder_name(checkpoint: str) -> str:
    """The folder of a checkpoint's recording: its name, with what a path cannot hold quoted."""
    quoted = quote(checkpoint, safe="-_.= ")
    # Names that begin with a dot are those of folders being written.
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def read_index(folder: Path | Remote) -> dict[str, Any] | None:
    """The index of a series; None where there is none.

    Raises:
        StoreError: it is of a newer format, or cannot be read.
        DamagedStore: it is not an index.
    """
    file = folder / INDEX
    try:
        content = folder.read(INDEX) if isinstance(folder, Remote) else (folder / INDEX).read_bytes()
    except FileNotFoundError:
        return None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        index = json.loads(content)
    except ValueError as error:
        raise DamagedStore(f"{file} is damaged: {error}") from error
    said = index.get("format") if isinstance(index, dict) else None
    if said != FORMAT or not _WANTED.keys() <= index.keys():
        raise DamagedStore(f"{file} is not the index of a series of recordings")
    version = index["format_version"]
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(f"{file} has format version {version!r}; this patchclamp reads up to {FORMAT_VERSION}")
    if wrong := [key for key, check in _WANTED.items() if not check(index[key])]:
        raise DamagedStore(f"{file} is damaged: {wrong[0]!r} is not what it should be")
    if index.get(_SEAL) != seal_of(index, _SEAL):
        raise DamagedStore(f"{file} is damaged: its content is not what was written (checksum differs)")
    return index


def write_index(folder: Path | Remote, content: Mapping[str, Any]) -> None:
    """Write the index of a series; it is either the old or the new one, never half of one.

    Raises:
        StoreError: it cannot be written.
    """
    index = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    index[_SEAL] = seal_of(index, _SEAL)
    text = json.dumps(index, indent=1, ensure_ascii=False)
    if isinstance(folder, Remote):
        try:
            folder.put(INDEX, text.encode(), folder.tag(INDEX))
        except Conflict as error:
            raise StoreError(f"cannot write {folder / INDEX}: another process writes it too") from error
        return
    file = folder / INDEX
    part = file.with_name(f".{INDEX}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise StoreError(f"cannot write {file}: {error.strerror or error}") from error


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


_WANTED: dict[str, Callable[[Any], bool]] = {
    "format_version": lambda value: isinstance(value, int),
    "asked": _is_mapping,
    "facts": _is_mapping,
    "checkpoints": _is_mapping,
}
