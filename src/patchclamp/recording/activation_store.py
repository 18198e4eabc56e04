"""Every activation of a recording in Zarr v3, one group a site: written while the pass runs, read in parts.

Each chunk carries its own checksum, so that a damaged one is noticed when it is read, however large the rest is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from patchclamp.errors import DamagedStore
from patchclamp.recording.batch import Batch
from patchclamp.storage import OpenedStore

# Whole chunks are written once; what does not fill one waits in memory.
_ROWS = 1024
_INDEX_ROWS = 1 << 16
_INDICES = ("example", "position", "token")


class StoredActivations(NamedTuple):
    """Every activation of one site, as arrays on disk, one row per position that counts."""

    values: StoredArray  # [rows, size]
    example: StoredArray  # [rows] int64
    position: StoredArray  # [rows] int64
    token: StoredArray  # [rows] int64; -1 where there are no tokens


class StoredArray:
    """An array on disk that is read in parts: `array[start:stop]` gives numpy.

    Attributes:
        zarr: the Zarr array itself. Of an array in an object store it has no chunks: these are fetched when a part of
            the array is read, and go again.
        shape, dtype, chunks: as those of the Zarr array.
    """

    def __init__(self, array: Any, name: str, store: OpenedStore | None, owner: object) -> None:
        self.zarr = array
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, array.chunks
        self._name, self._store, self._owner = name, store, owner

    def __getitem__(self, part: Any) -> np.ndarray:
        """A part of the array.

        Raises:
            DamagedStore: a chunk is not what was written; the message names the file.
            StoreError: it is in an object store that cannot be read now.
        """
        if self._store is None or not self._store.is_remote:
            return self._read(part)
        with self._store.at_hand(self._files(part)):
            return self._read(part)

    def _read(self, part: Any) -> np.ndarray:
        try:
            return np.asarray(self.zarr[part])
        except (ValueError, OSError, RuntimeError) as error:
            if self._store is not None:
                self._store.verify()
            raise DamagedStore(f"{self.zarr.store_path} cannot be read: {error}") from error

    def _files(self, part: Any) -> list[str]:
        """The chunks that a part of the array is in: they divide its rows."""
        rows = np.arange(len(self))[part[0] if isinstance(part, tuple) else part]
        end = "/0" * (len(self.shape) - 1)
        return [f"{self._name}/c/{each}{end}" for each in np.unique(rows // self.chunks[0]).tolist()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredArray({list(self.shape)} {self.dtype})"


def opened_activations(
    folder: Path, site: str, store: OpenedStore | None = None, owner: object = None
) -> StoredActivations:
    """The arrays of one site, read only.

    `folder` is that of all activations; `store` has it under `activations`, names the file where a chunk cannot be
    read, and fetches chunks from an object store. `owner` lives as long as the arrays: a temporary folder goes with its
    last reader.
    """
    import zarr

    place = zarr_group(folder, site)
    group: Any = zarr.open_group(place, mode="r")
    arrays = ((name, f"activations/{place.name}/{name}") for name in ("values", *_INDICES))
    return StoredActivations(*(StoredArray(group[name], where, store, owner) for name, where in arrays))


def zarr_group(folder: Path, site: str) -> Path:
    """Where the activations of a site lie inside the folder of all activations."""
    return folder / quote(site, safe=".-_")


class ActivationWriter:
    """Writes the rows of one site, chunk by chunk."""

    def __init__(self, folder: Path, site: str, size: int, dtype: np.dtype) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec

        group = zarr.create_group(zarr_group(folder, site))

        checksum = Crc32cCodec()

        def column(name: str, rows: int, shape: tuple[int, ...] = (), **options: Any) -> _Column:
            # A chunk of zeros is written too, and one that is missing does not read as zeros.
            options["config"] = {"write_empty_chunks": True}
            return _Column(group.create_array(name, shape=(0, *shape), chunks=(rows, *shape), **options), rows)

        # Activations hardly get smaller by compression; indices do.
        self._values = column("values", _ROWS, (size,), dtype=dtype, compressors=[checksum], fill_value=np.nan)
        compressors = [ZstdCodec(), checksum]
        self._indices = {
            name: column(name, _INDEX_ROWS, dtype="int64", compressors=compressors, fill_value=-1) for name in _INDICES
        }

    @classmethod
    def taken_up(
        cls, folder: Path, site: str, rows: Mapping[str, int], waiting: Mapping[str, np.ndarray]
    ) -> ActivationWriter:
        """The writer that had these `rows()` and this `waiting()`; what was written after them is written over."""
        import zarr

        writer = cls.__new__(cls)
        # Zarr writes a chunk beside its place and moves it there: a process that was killed in between leaves that.
        for torn in Path(zarr_group(folder, site)).rglob("*.partial"):
            torn.unlink(missing_ok=True)
        group: Any = zarr.open_group(zarr_group(folder, site), mode="r+")
        columns = {}
        for name in ("values", *_INDICES):
            array = group[name]
            array.resize((rows[name], *array.shape[1:]))
            columns[name] = _Column(array, array.chunks[0], [waiting[name]] if len(waiting[name]) else [])
        writer._values, writer._indices = columns["values"], {name: columns[name] for name in _INDICES}
        return writer

    def rows(self) -> dict[str, int]:
        """Array -> how many of its rows are on disk."""
        return {name: column.rows for name, column in self._columns().items()}

    def waiting(self) -> dict[str, np.ndarray]:
        """Array -> the rows that wait for a chunk to be full."""
        return {name: column.waiting() for name, column in self._columns().items()}

    def write(self, batch: Batch) -> None:
        """Add the rows of a batch."""
        # A copy: the tensor belongs to the model and may be written over by the next pass.
        self._values.add(batch.values.cpu().numpy().copy())
        for name, column in self._indices.items():
            given = getattr(batch, name)
            column.add(np.full(len(batch), -1) if given is None else given.cpu().numpy())

    def close(self) -> None:
        """Write what waits."""
        for column in self._columns().values():
            column.flush(whole=False)

    def _columns(self) -> dict[str, _Column]:
        return {"values": self._values, **self._indices}


class _Column:
    """One array on disk, and the rows that wait until they fill a chunk."""

    def __init__(self, array: Any, chunk: int, waiting: Sequence[np.ndarray] = ()) -> None:
        self._array, self._chunk = array, chunk
        self._waiting = list(waiting)

    @property
    def rows(self) -> int:
        return self._array.shape[0]

    def waiting(self) -> np.ndarray:
        if not self._waiting:
            return np.empty((0, *self._array.shape[1:]), self._array.dtype)
        return np.concatenate(self._waiting)

    def add(self, rows: np.ndarray) -> None:
        self._waiting.append(rows)
        if sum(len(each) for each in self._waiting) >= self._chunk:
            self.flush(whole=True)

    def flush(self, whole: bool) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting)
        stop = len(rows) - len(rows) % self._chunk if whole else len(rows)
        self._array.append(rows[:stop])
        self._waiting = [rows[stop:]] if stop < len(rows) else []
