"""`Mirror`: the checkpoints of a recording whose store is in an object store, kept there too.

The work itself is done in a temporary folder of this machine. Each checkpoint is copied beside the store, so that the
next call goes on from it, on this machine or another. A lease says who is at work.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from patchclamp.errors import StoreError
from patchclamp.storage import Conflict, Lease, Remote, leased

_INDEX = "checkpoint.json"
_ACTIVATIONS = "activations"


class Mirror:
    """The working place of a recording in an object store, held by this process.

    Attributes:
        place: where it is.
    """

    def __init__(self, place: Remote, lease: Lease) -> None:
        self.place, self._lease = place, lease
        self._tag: str | None = None
        self._sent: dict[str, tuple[int, int]] = {}

    def pull(self, folder: Path) -> None:
        """Copy what a run that did not end has left into the local folder of the work."""
        self._tag = self.place.tag(_INDEX)
        if self._tag is None:
            return
        content = self.place.read(_INDEX)
        (folder / _INDEX).write_bytes(content)
        with suppress(ValueError, KeyError, TypeError):  # whoever reads it says that it is damaged
            index = json.loads(content)
            self.place.download([_far(index["file"], index["by"])], folder)
            (folder / _far(index["file"], index["by"])).rename(folder / index["file"])
            if index["stored"]:
                self.place.download(self.place.names(_ACTIVATIONS), folder)

    def push(self, folder: Path, name: str) -> None:
        """Copy the checkpoint that has just been written: first its files, then the index.

        Raises:
            StoreError: it cannot be written, or another process has taken over.
        """
        self._lease.check()
        by = self._lease.holder
        (folder / _far(name, by)).hardlink_to(folder / name)
        try:
            self.place.upload(folder, [_far(name, by), *self._changed(folder)])
        finally:
            (folder / _far(name, by)).unlink()
        index = json.loads((folder / _INDEX).read_bytes())
        try:
            self._tag = self.place.put(_INDEX, json.dumps({**index, "by": by}, allow_nan=False).encode(), self._tag)
        except Conflict as error:
            raise StoreError(f"{self.place}: another process has gone on with this recording") from error
        old = [each for each in self.place.names() if each.startswith("checkpoint-") and each != _far(name, by)]
        self.place.delete(old)

    def check(self) -> None:
        """See that this process still holds the place.

        Raises:
            StoreError: another process may have taken over.
        """
        self._lease.check()

    def clear(self) -> None:
        """Remove what was kept: the recording is whole, or begins anew."""
        self.place.delete(each for each in self.place.names() if each.startswith(("checkpoint", f"{_ACTIVATIONS}/")))
        self._tag = None
        self._sent.clear()

    def _changed(self, folder: Path) -> list[str]:
        """Files of activations that were not sent yet as they are now: chunks are written once, the rest often."""
        changed = []
        for each in sorted((folder / _ACTIVATIONS).rglob("*")):
            if each.is_file():
                name, now = each.relative_to(folder).as_posix(), (each.stat().st_size, each.stat().st_mtime_ns)
                if self._sent.get(name) != now:
                    changed.append(name)
                    self._sent[name] = now
        return changed


@contextmanager
def mirror(target: Remote) -> Iterator[Mirror]:
    """Hold the working place of a store while the block runs.

    Raises:
        StoreError: another process records into this store, or it cannot be written.
    """
    place = working_place(target)
    with leased(place, str(target)) as lease:
        yield Mirror(place, lease)


def check_writable(target: Remote) -> None:
    """Write an object beside the store, and remove it.

    Raises:
        StoreError: it cannot be written.
    """
    place, name = working_place(target), f"writable-{uuid.uuid4().hex}"
    place.put(name, b"", None)
    place.delete([name])


def working_place(target: Remote) -> Remote:
    """Where the work on a store lies: beside it."""
    return Remote(f"{target.url}.partial")


def _far(name: str, by: str) -> str:
    # Objects are never written over: who wrote it is part of the name.
    stem, _, end = name.rpartition(".")
    return f"{stem}-{by}.{end}"
