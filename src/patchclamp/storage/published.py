"""`published`: a store that is written into an object store; `opened`: one that is read, from there or from a folder.

Nothing can be renamed in an object store. So the files of a store are written once, under a prefix that was never used
before, and are never changed; the manifest, which names the prefix, is written last, and only if nobody else has
written one meanwhile. Whoever reads finds the old store or the new one, never half of one.

To be read, what is small is copied into a temporary folder and compared with its checksums; what is large is copied
when it is asked for, and for as long as it is needed.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchclamp.errors import DamagedStore, StoreError
from patchclamp.storage.folder import (
    damage_of,
    listed_files,
    new_folder,
    parsed_manifest,
    read_manifest,
    sealed,
    verify_files,
)
from patchclamp.storage.remote import Conflict, Remote, local

_MANIFEST = "manifest.json"


@contextmanager
def published(path: str | os.PathLike[str], kind: str, replace: bool = True) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well it becomes the store `path`, otherwise it vanishes.

    A store at `path` is replaced only if it is of this `kind` (and `replace`).

    Raises:
        StoreError: the place cannot be written, or something else is there already.
    """
    remote = Remote.of(path)
    if remote is None:
        with new_folder(path, kind, replace) as folder:
            yield folder
        return
    tag, old = _there(remote, kind, replace)
    with tempfile.TemporaryDirectory(prefix="patchclamp-") as folder:
        yield Path(folder)
        _publish(Path(folder), remote, tag)
    if old is not None:
        remote.delete([] if not old.get("prefix") else listed_files(old, remote))


@dataclass(frozen=True)
class OpenedStore:
    """A store that can be read.

    Attributes:
        path: what it is called: a folder, or a place in an object store.
        manifest: what it says of itself.
        folder: where its files lie: all of them, or those of an object store that were fetched.
        owner: lives as long as `folder` can be read.
        root: the folder that stands for `path`; its files may lie under a prefix in it.
    """

    path: Path | Remote
    manifest: dict[str, Any]
    folder: Path
    root: Path
    owner: object = None

    @property
    def is_remote(self) -> bool:
        """Whether only some of its files were fetched."""
        return isinstance(self.path, Remote)

    def verify(self) -> None:
        """Compare all files that are here with what was written.

        Raises:
            DamagedStore: one is not; the message names it.
        """
        if not isinstance(self.path, Remote):
            verify_files(self.path, self.manifest)

    @contextmanager
    def at_hand(self, names: Iterable[str]) -> Iterator[None]:
        """Have these files in `folder` while the block runs, if they are not there anyway.

        Args:
            names: as in the manifest.

        Raises:
            DamagedStore: one is missing or altered; the message names it.
            StoreError: the object store cannot be read.
        """
        if not isinstance(self.path, Remote):
            yield
            return
        listed, start = listed_files(self.manifest, self.path), _before(self.manifest)
        missing = [start + name for name in names if not (self.folder / name).exists()]
        try:
            _fetch(self.path, {each: listed.get(each) for each in missing}, self.root)
            yield
        finally:
            for each in missing:
                (self.root / each).unlink(missing_ok=True)


def opened(
    path: str | os.PathLike[str],
    kind: str,
    later: Callable[[str], bool] = lambda name: False,
    verify: Callable[[str], bool] = lambda name: True,
) -> OpenedStore:
    """Read the manifest of a store, and see that its files are there and are what was written.

    Args:
        path: a folder, or a place in an object store.
        kind: "recording" or "atlas".
        later: which files are large, so that of them only the presence is looked at; from an object store they are
            fetched by `at_hand`.
        verify: of the others, which are compared with their checksums.

    Raises:
        StoreError: nothing is there, it cannot be read, or it is something else or of a newer format.
        DamagedStore: a file is missing or altered; the message names it.
    """
    remote = Remote.of(path)
    if remote is not None:
        return _opened_there(remote, kind, later)
    folder = local(path)
    manifest = read_manifest(folder, kind)
    start = len(_before(manifest))
    verify_files(folder, manifest, skip=lambda name: later(name[start:]) or not verify(name[start:]))
    return OpenedStore(folder, manifest, folder / _before(manifest), folder)


def exists(path: Path | Remote) -> bool:
    """Whether a store is there, whole or not."""
    if isinstance(path, Remote):
        return path.tag(_MANIFEST) is not None
    return path.is_dir() and any(path.iterdir())


def copied(remote: Remote, folder: Path) -> None:
    """Copy all objects of a place into a local folder, as they are."""
    remote.download(remote.names(), folder)


def _opened_there(remote: Remote, kind: str, later: Callable[[str], bool]) -> OpenedStore:
    again = True
    while True:
        tag = remote.tag(_MANIFEST)
        manifest = read_manifest(remote, kind)
        owner = tempfile.TemporaryDirectory(prefix="patchclamp-")
        try:
            return _copy(remote, manifest, Path(owner.name), owner, later)
        except DamagedStore:
            owner.cleanup()
            # Another process may just have put a new store in the place of this one: then it is read anew, once.
            if not again or remote.tag(_MANIFEST) == tag:
                raise
            again = False


def _copy(
    remote: Remote, manifest: dict[str, Any], root: Path, owner: object, later: Callable[[str], bool]
) -> OpenedStore:
    listed, start = listed_files(manifest, remote), _before(manifest)
    absent = listed.keys() - set(remote.names(start.rstrip("/")))
    if absent:
        raise DamagedStore(f"{remote}/{min(absent)} is missing")
    _fetch(remote, {name: expected for name, expected in listed.items() if not later(name[len(start) :])}, root)
    return OpenedStore(remote, manifest, root / start, root, owner)


def _before(manifest: Mapping[str, Any]) -> str:
    """What stands before the names of the files of a store."""
    return f"{manifest['prefix']}/" if manifest.get("prefix") else ""


def _fetch(remote: Remote, wanted: Mapping[str, str | None], root: Path) -> None:
    """Copy objects and compare them with their checksums; what a dropped connection has cut short is copied again."""
    remote.download(wanted, root)
    again = [name for name, expected in wanted.items() if damage_of(root, name, expected)]
    remote.download(again, root)
    for name in again:
        if what := damage_of(root, name, wanted[name]):
            raise DamagedStore(f"{remote}/{name} {what}")


def _there(remote: Remote, kind: str, replace: bool) -> tuple[str | None, dict[str, Any] | None]:
    """The tag and the manifest of the store that is there; (None, None) where there is none."""
    tag = remote.tag(_MANIFEST)
    if tag is None:
        return None, None
    try:
        old = parsed_manifest(remote.read(_MANIFEST), remote, kind)
    except StoreError as error:
        raise StoreError(f"will not overwrite {remote}: {error}") from error
    if not replace:
        raise StoreError(f"cannot write {remote}: a {kind} is there already")
    return tag, old


def _publish(folder: Path, remote: Remote, tag: str | None) -> None:
    prefix = uuid.uuid4().hex
    manifest = json.loads((folder / _MANIFEST).read_bytes())
    written = [f"{prefix}/{name}" for name in manifest["files"]]
    try:
        remote.upload(folder, manifest["files"], prefix)
    except BaseException:
        _give_up(remote, written)
        raise
    try:
        # If this fails for another reason, it may have been written all the same: then nothing must be deleted.
        remote.put(_MANIFEST, sealed({**manifest, "prefix": prefix}), tag)
    except Conflict as error:
        _give_up(remote, written)
        raise StoreError(f"cannot write {remote}: another process has written a store there meanwhile") from error


def _give_up(remote: Remote, names: Iterable[str]) -> None:
    with suppress(StoreError):  # the first error is the one to be seen; `patchclamp doctor` names what is left
        remote.delete(names)
