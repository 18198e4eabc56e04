"""A store is a folder with a `manifest.json` that lists every other file with its SHA-256, and has its own.

It is written into a temporary folder beside its final place and renamed when it is whole, so
that a crash leaves either the old store or the new one, never half of one. How that is done where nothing can be
renamed is in `published.py`; a folder that was copied from there has its files under a `prefix`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from patchclamp.errors import DamagedStore, StoreError
from patchclamp.storage.hashing import sha256_of_file
from patchclamp.storage.remote import Remote, local

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"
# Where the files of a store that was published in an object store lie inside it.
_PREFIX = re.compile(r"(?:[0-9a-f]{32})?")


@contextmanager
def new_folder(path: str | os.PathLike[str], kind: str, replace: bool = True) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well it becomes `path`, otherwise it vanishes.

    A folder at `path` is replaced only if it is itself a store of this `kind` (and `replace`).

    Raises:
        StoreError: the place cannot be written, or something else is there already.
    """
    target = local(path)
    _refuse_to_overwrite(target, kind, replace)
    with temporary_folder(target) as work:
        yield work
        _open_to_others(work)
        _swap(work, target, kind, replace)


def put_in_place(folder: Path, target: Path, kind: str) -> None:
    """Make a store that is whole in another folder of the same disk the one at `target`, where none may be.

    Raises:
        StoreError: something is there, or it cannot be written.
    """
    _swap(folder, target, kind, replace=False)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, for as long as the block runs; parents made for it stay if `target` is there then.

    Raises:
        StoreError: nothing can be written there.
    """
    made = []
    try:
        made = [each for each in target.parents if not each.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        _remove_empty(made)
        raise StoreError(f"cannot write {target}: {error.strerror or error} ({target.parent})") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _remove_empty(made)


def write_manifest(folder: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write `manifest.json` last: the content, the format, the time and the SHA-256 of every file in the folder."""
    import patchclamp

    manifest: dict[str, Any] = {
        "format": f"patchclamp {kind}",
        "format_version": FORMAT_VERSION,
        "patchclamp": patchclamp.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **content,
    }
    files = sorted(each for each in folder.rglob("*") if each.is_file() and each != folder / _MANIFEST)
    manifest["files"] = {each.relative_to(folder).as_posix(): sha256_of_file(each) for each in files}
    temporary = folder / (_MANIFEST + ".part")
    temporary.write_bytes(sealed(manifest))
    os.replace(temporary, folder / _MANIFEST)


def read_manifest(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read the manifest of a store of this `kind` ("recording", "atlas").

    Raises:
        StoreError: nothing is there, or it is another kind of folder or of a newer format.
        DamagedStore: the manifest itself cannot be read, or was altered.
    """
    remote = Remote.of(path)
    if remote is not None:
        try:
            return parsed_manifest(remote.read(_MANIFEST), remote, kind)
        except FileNotFoundError:
            raise StoreError(f"there is no {kind} at {remote}: it has no {_MANIFEST}") from None
    folder = local(path)
    if not folder.exists():
        raise StoreError(f"there is no {kind} at {folder}: the folder does not exist")
    file = folder / _MANIFEST
    if not file.is_file():
        raise StoreError(f"{folder} is not a patchclamp {kind}: it has no {_MANIFEST}")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DamagedStore(f"{file} is damaged: {error}") from error
    return parsed_manifest(content, folder, kind)


def parsed_manifest(content: bytes, place: Path | Remote, kind: str) -> dict[str, Any]:
    """The manifest that was read from `place`; raises as `read_manifest`."""
    file = place / _MANIFEST
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise DamagedStore(f"{file} is damaged: {error}") from error
    said = manifest.get("format") if isinstance(manifest, dict) else None
    if said != f"patchclamp {kind}":
        raise StoreError(f"{place} is not a patchclamp {kind}: its {_MANIFEST} says {said!r}")
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(
            f"{place} has format version {version!r}; this patchclamp reads up to {FORMAT_VERSION}: update it"
        )
    if manifest.get(_SEAL) != seal_of(manifest):
        raise DamagedStore(f"{file} is damaged: its content is not what was written (checksum differs)")
    if not _PREFIX.fullmatch(manifest.get("prefix", "")):
        raise DamagedStore(f"{file} names a folder that is not ours: {manifest['prefix']!r}")
    return manifest


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest with its seal, as it is written."""
    content = {**manifest, _SEAL: seal_of(manifest)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()


def listed_files(manifest: Mapping[str, Any], place: Path | Remote) -> dict[str, str]:
    """Every file of a store but the manifest, where it lies in the store -> its SHA-256.

    Raises:
        DamagedStore: the manifest lists none, or one that is not inside the store.
    """
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise DamagedStore(f"{place / _MANIFEST} is damaged: it lists no files")
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise DamagedStore(f"{place / _MANIFEST} names a file outside the folder: {name}")
    prefix = f"{manifest['prefix']}/" if manifest.get("prefix") else ""
    return {prefix + name: expected for name, expected in listed.items()}


def verify_files(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], skip: Callable[[str], bool] = lambda name: False
) -> None:
    """Compare every file that the manifest lists with its SHA-256; those that `skip` names only have to exist.

    Raises:
        DamagedStore: a file is missing, altered, or outside the folder; the message names it.
    """
    folder = local(path).resolve()
    for name, expected in listed_files(manifest, folder).items():
        if not (folder / name).resolve().is_relative_to(folder):  # by a link
            raise DamagedStore(f"{folder / _MANIFEST} names a file outside the folder: {name}")
        if what := damage_of(folder, name, None if skip(name) else expected):
            raise DamagedStore(f"{folder / name} {what}")


def damage_of(folder: Path, name: str, expected: str | None) -> str:
    """What is wrong with a file of a store, as the end of a sentence; empty where it is what was written.

    Args:
        folder: of the store.
        name: of the file in it.
        expected: its SHA-256; None looks only whether it is there.
    """
    folder = folder.resolve()
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):
        return "is outside the folder: the manifest is not ours"
    if not file.is_file():
        return "is missing" + (": a folder is in its place" if file.exists() else "")
    if expected is None:
        return ""
    try:
        found = sha256_of_file(file)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if found == expected else "is damaged: its content is not what was written (checksum differs)"


def seal_of(manifest: Mapping[str, Any], key: str = _SEAL) -> str:
    """SHA-256 of a manifest's content, however it is written, without the seal itself, which stands under `key`."""
    # There and back, because a tuple or a number as a key is another thing after reading.
    content = json.loads(json.dumps({name: value for name, value in manifest.items() if name != key}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _open_to_others(work: Path) -> None:
    # Temporary files are for their owner only; those of a store have the ordinary permissions.
    umask = os.umask(0)
    os.umask(umask)
    for each in (work, *work.rglob("*")):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~umask)


def _refuse_to_overwrite(target: Path, kind: str, replace: bool) -> None:
    try:
        there = target.exists()
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
    if not there:
        return
    if not target.is_dir():
        raise StoreError(f"cannot write {target}: a file is there already")
    if not any(target.iterdir()):
        return
    try:
        read_manifest(target, kind)
    except StoreError as error:
        raise StoreError(f"will not overwrite {target}: {error}") from error
    if not replace:
        raise StoreError(f"cannot write {target}: a {kind} is there already")


def _swap(work: Path, target: Path, kind: str, replace: bool) -> None:
    _refuse_to_overwrite(target, kind, replace)
    try:
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / target.name)
            try:
                os.replace(work, target)
            except OSError:
                os.replace(old / target.name, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(work, target)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
