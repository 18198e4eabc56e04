"""Write every activation of a recording to Zarr v3, one group a site, while the pass runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from patchclamp.recording.batch import Batch
from patchclamp.recording.recording import zarr_group

# Whole chunks are written once; what does not fill one waits in memory.
_ROWS = 1024


class ActivationWriter:
    """Collects the rows of one site into chunks of 1,024."""

    def __init__(self, folder: Path, site: str, size: int, dtype: np.dtype) -> None:
        import zarr

        group = zarr.create_group(zarr_group(folder, site))
        self._arrays: dict[str, Any] = {
            "values": group.create_array(
                "values", shape=(0, size), chunks=(_ROWS, size), dtype=dtype, compressors=None
            ),
            **{
                name: group.create_array(name, shape=(0,), chunks=(1 << 16,), dtype="int64")
                for name in ("example", "position", "token")
            },
        }
        self._waiting: list[np.ndarray] = []
        self._rows: dict[str, list[np.ndarray]] = {"example": [], "position": [], "token": []}

    def write(self, batch: Batch) -> None:
        """Add the rows of a batch."""
        # A copy: the tensor belongs to the model and may be written over by the next pass.
        self._waiting.append(batch.values.cpu().numpy().copy())
        self._rows["example"].append(batch.example.cpu().numpy())
        self._rows["position"].append(batch.position.cpu().numpy())
        token = np.full(len(batch), -1) if batch.token is None else batch.token.cpu().numpy()
        self._rows["token"].append(token)
        if sum(len(each) for each in self._waiting) >= _ROWS:
            self._flush(whole=True)

    def close(self) -> None:
        """Write what waits."""
        self._flush(whole=False)
        for name, parts in self._rows.items():
            values = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
            self._arrays[name].append(values)

    def _flush(self, whole: bool) -> None:
        if not self._waiting:
            return
        values = np.concatenate(self._waiting)
        stop = len(values) - len(values) % _ROWS if whole else len(values)
        self._arrays["values"].append(values[:stop])
        self._waiting = [values[stop:]] if stop < len(values) else []
