"""Checkpoints: what a recording has learned so far, written down beside its store, so that nothing is lost.

While `record(..., store=...)` runs, a hidden folder beside the store (`.NAME.partial`) holds its work: from time to
time all that the summaries hold, and how many batches they have seen. The next call with the same store, data and
parameters goes on from there, and ends with the same numbers, bit for bit, as if nothing had happened. The folder
goes when the recording is whole.

A checkpoint is a new file; a small index is renamed into place when that file is on the disk. So a process that is
killed while it writes leaves the checkpoint before. Writing is timed, and the next one waits a hundred times as long.

Where the store is in an object store, the folder is a temporary one, and `mirror.py` keeps the checkpoints there.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from patchclamp.errors import StoreError, warn
from patchclamp.recording.facts import differences
from patchclamp.recording.mirror import Mirror, mirror, working_place
from patchclamp.storage import Remote, sha256_of_file

# The share of the time that checkpoints may take, and the seconds before the first one.
SHARE = 0.01
FIRST_AFTER = 2.0

_INDEX = "checkpoint.json"


@dataclass
class Done:
    """What was done before: how many batches, and what is to be restored."""

    batches: int
    arrays: dict[str, np.ndarray]
    accumulated: dict[str, Any]
    stored: dict[str, Any]


@dataclass
class Checkpoints:
    """The checkpoints of one recording.

    Attributes:
        folder: the hidden folder of the work.
        facts: of the recording, as `facts_of` gives them, and `batch_tokens`: where a batch ends is part of its number.
        mirror: the same in an object store, if that is where the recording will be.
        seconds: what the last one took to write.
    """

    folder: Path
    facts: Mapping[str, Any]
    mirror: Mirror | None = None
    seconds: float = 0.0
    _last: float = field(default_factory=lambda: time.monotonic())
    _number: int = 0

    @property
    def place(self) -> Path | Remote:
        """Where they are found again."""
        return self.folder if self.mirror is None else self.mirror.place

    @property
    def activations(self) -> Path:
        """Folder for every activation, if they are asked for."""
        return self.folder / "activations"

    def found(self) -> Done | None:
        """What a run that did not end has left; None where there is nothing of use.

        Raises:
            StoreError: it is of another model, other data or parameters.
        """
        from safetensors.numpy import load_file

        if self.mirror is not None:
            self.mirror.pull(self.folder)
        try:
            index = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self._anew()
        except (OSError, ValueError) as error:
            return self._anew(f"{_INDEX} cannot be read: {error}")
        if differing := differences(index["facts"], self.facts):
            raise StoreError(
                f"{self.place} holds an unfinished recording of something else. What differs: "
                f"{'; '.join(differing)}. Record that one to its end, or delete the folder"
            )
        file = self.folder / index["file"]
        if not file.is_file():
            return self._anew(f"{file.name} is missing")
        if sha256_of_file(file) != index["sha256"]:
            return self._anew(f"the content of {file.name} is not what was written (checksum differs)")
        self._number = index["batches"]
        return Done(index["batches"], load_file(file), index["accumulated"], index["stored"])

    def due(self) -> bool:
        """Whether it is time to write one."""
        waited = time.monotonic() - self._last
        return waited >= (max(self.seconds / SHARE, 0.0) if self._number else FIRST_AFTER)

    def write(
        self, batches: int, arrays: Mapping[str, np.ndarray], accumulated: Mapping[str, Any], stored: Mapping[str, Any]
    ) -> None:
        """Write one: so many batches are done.

        Raises:
            StoreError: the disk is full, or cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        begun = time.monotonic()
        name = f"checkpoint-{batches}.safetensors"
        try:
            save_file(dict(arrays), self.folder / name)
            _to_disk(self.folder / name)
            index = {
                "batches": batches,
                "file": name,
                "sha256": sha256_of_file(self.folder / name),
                "facts": dict(self.facts),
                "accumulated": accumulated,
                "stored": stored,
            }
            part = self.folder / (_INDEX + ".part")
            part.write_text(json.dumps(index, allow_nan=False), encoding="utf-8")
            _to_disk(part)
            os.replace(part, self.folder / _INDEX)
            _to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise StoreError(f"cannot write a checkpoint in {self.folder}: {why}") from error
        if self.mirror is not None:
            self.mirror.push(self.folder, name)
        for old in self.folder.glob("checkpoint-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)
        self._number = batches
        self._last = time.monotonic()
        self.seconds = self._last - begun

    def check(self) -> None:
        """See that nobody else has taken over, before what others read is written.

        Raises:
            StoreError: somebody may have.
        """
        if self.mirror is not None:
            self.mirror.check()

    @property
    def batches(self) -> int:
        """How many batches the last checkpoint holds; 0 before the first."""
        return self._number

    def _anew(self, why: str = "") -> None:
        if why:
            warn(f"the checkpoint in {self.place} is of no use, and the recording starts anew: {why}")
        for each in self.folder.iterdir():
            if each.name not in (_LOCK, _HOLDER):
                shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)
        if self.mirror is not None:
            self.mirror.clear()


_LOCK, _HOLDER = "lock", "holder.json"


@contextmanager
def checkpoints(target: Path | Remote, facts: Mapping[str, Any], batch_tokens: int) -> Iterator[Checkpoints]:
    """The working folder of a store, held by this process alone while the block runs.

    It is removed when the block ends well, or has written no checkpoint; else it stays, and the error says so.

    Raises:
        StoreError: another process records into this store, or nothing can be written there.
    """
    known = {**facts, "parameters": {**facts["parameters"], "batch_tokens": batch_tokens}}
    with _there(target, known) if isinstance(target, Remote) else _here(target, known) as work:
        try:
            yield work
        except BaseException as error:
            if work.batches:
                error.add_note(
                    f"What was done so far is kept in {work.place}: the same call again goes on after batch "
                    f"{work.batches}"
                )
            raise


def clear(target: Path | Remote) -> None:
    """Remove the work that a process left which was killed between making its store whole and removing it."""
    if isinstance(target, Remote):
        if working_place(target).names():
            with suppress(StoreError), mirror(target) as far:
                far.clear()
    elif _folder_of(target).exists():
        with suppress(StoreError), _held(_folder_of(target), target):
            shutil.rmtree(_folder_of(target), ignore_errors=True)


@contextmanager
def _here(target: Path, facts: Mapping[str, Any]) -> Iterator[Checkpoints]:
    folder = _folder_of(target)
    with _held(folder, target):
        work = Checkpoints(folder, facts)
        try:
            yield work
        except BaseException:
            if not work.batches:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _there(target: Remote, facts: Mapping[str, Any]) -> Iterator[Checkpoints]:
    with tempfile.TemporaryDirectory(prefix="patchclamp-") as folder, mirror(target) as far:
        work = Checkpoints(Path(folder), facts, far)
        yield work
        far.clear()


def _folder_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


@contextmanager
def _held(folder: Path, target: Path) -> Iterator[None]:
    """Lock the folder. The lock is the operating system's: it ends with the process that holds it, however it ends."""
    try:
        made = [each for each in folder.parents if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(
            f"{target} is being recorded by {_holder(folder)}: wait for it, or choose another store"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error} ({folder.parent})") from error
    try:
        said = {"process": os.getpid(), "host": socket.gethostname()}
        with suppress(OSError):
            (folder / _HOLDER).write_text(json.dumps(said), encoding="utf-8")
        yield
    finally:
        lock.release()
        if not folder.exists():
            for each in made:
                with suppress(OSError):
                    each.rmdir()


def _holder(folder: Path) -> str:
    try:
        said = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
        return f"process {said['process']} on {said['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can be asked for it
            os.fsync(handle)
    finally:
        os.close(handle)
