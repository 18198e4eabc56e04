"""Arrays in a safetensors file, mapped into memory instead of being read: what is not looked at costs nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "u1"}


def mapped(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name, as `numpy.memmap` with mode "c": changes stay in memory.

    Raises:
        ValueError: it is no such file, or holds an empty array or a dtype that is not mapped here.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    arrays = {}
    for name, said in header.items():
        shape, (start, stop) = tuple(said["shape"]), said["data_offsets"]
        dtype = np.dtype(_DTYPES.get(said["dtype"], "V"))
        if stop - start != math.prod(shape) * dtype.itemsize or stop == start:
            raise ValueError(f"{file.name} holds {name} in {said['dtype']} of shape {list(shape)}: cannot be mapped")
        arrays[name] = np.memmap(file, dtype, "c", 8 + length + start, shape)
    return arrays
