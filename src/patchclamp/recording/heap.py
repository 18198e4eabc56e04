"""What the C library does with memory that was freed, while batch after batch needs much and nearly the same again.

Left to itself, glibc has two habits that cost. Where the end of its heap is free it returns it, and the next batch asks
for the same pages anew. And as nearly every batch has tensors of other sizes than the one before, holes are left that
do not quite fit: over a long recording a process comes to hold much that nobody uses. So nothing is returned by itself,
and all at once where too much has gathered. What it brings is in docs/performance.md.

With another C library, or on another system than Linux, nothing happens here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# Where glibc itself ends up when blocks of this size have been freed; none of its settings can be asked for.
_LARGEST, _USUAL = 32 << 20, 64 << 20
_NEVER = (1 << 31) - 1

_FIRST = 4  # batches until memory is what it will stay
_BETWEEN = 8  # batches at least between two times, as the next one has to ask for all its pages


def give_back() -> None:
    """Return what was freed to the system."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@contextmanager
def kept_for_reuse() -> Iterator[Watch]:
    """Freed memory stays for the next batch; `Watch.batch_done` is to be called after each."""
    library = _glibc()
    if library is None:
        yield Watch(None)
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield Watch(library)
    finally:
        library.mallopt(_TRIM_THRESHOLD, _USUAL)


class Watch:
    """Returns what was freed once the process holds more than it did after its first batches."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._batches, self._next, self._most = 0, 0, 0

    def batch_done(self) -> None:
        """A batch is done, and its tensors are freed."""
        if self._library is None:
            return
        held = _resident()
        self._batches += 1
        if self._batches <= _FIRST:
            self._most = max(self._most, held)
        elif held > self._most and self._batches >= self._next:
            self._library.malloc_trim(0)
            self._next = self._batches + _BETWEEN


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        _resident()
    except (OSError, TypeError, ValueError):
        return None
    needed = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return library if all(hasattr(library, each) for each in needed) else None
