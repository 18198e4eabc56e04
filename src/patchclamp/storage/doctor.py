"""`examine`: what of a store is damaged, what is lost by it, and what can still be read. No torch here.

Every file of a store has a SHA-256 in its manifest, and the manifest has one of itself. Opening a store stops at the
first file that is not what was written; here all are looked at.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from patchclamp.errors import DamagedStore, StoreError
from patchclamp.storage.folder import damage_of, listed_files, read_manifest, seal_of
from patchclamp.storage.published import copied
from patchclamp.storage.remote import Remote, local

KINDS = ("recording", "atlas")
_SERIES = "series.json"
_SHARED = {
    "windows": "the text around what is shown",
    "vocabulary": "the strings of the tokens",
    "examples": "labels and folds of the examples",
}


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written."""

    file: str
    what: str  # "is missing", "is altered (checksum differs)", ...
    lost: str  # what cannot be read for it


@dataclass
class Examination:
    """What was found in a store.

    Attributes:
        path: the folder, or the place in an object store.
        kind: "recording", "atlas" or "series"; None where that cannot be read.
        files: how many files the manifests list.
        damaged: those that are not what was written.
        strangers: files that no manifest lists.
        whole: what can be read, in words.
        unfinished: an interrupted recording beside it, which `record` would go on with.
    """

    path: Path | Remote
    kind: str | None = None
    files: int = 0
    damaged: list[Damage] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    unfinished: Path | Remote | None = None


def examine(path: str | os.PathLike[str]) -> Examination:
    """Look at every file of a store; one in an object store is copied into a temporary folder for it.

    Raises:
        StoreError: there is no store, or it cannot be read.
    """
    remote = Remote.of(path)
    if remote is not None:
        return _examined_there(remote)
    folder = local(path)
    found = Examination(folder)
    partial = folder.parent / f".{folder.name}.partial"
    found.unfinished = partial if partial.is_dir() else None
    if not folder.is_dir():
        beside = f", but {partial} holds one that did not end: record again" if found.unfinished else ""
        raise StoreError(f"there is no store at {folder}{beside}")
    _look(found, folder)
    return found


def _examined_there(remote: Remote) -> Examination:
    found = Examination(remote)
    partial = Remote(f"{remote.url}.partial")
    found.unfinished = partial if partial.names() else None
    names = remote.names()
    if not names:
        beside = f", but {partial} holds one that did not end: record again" if found.unfinished else ""
        raise StoreError(f"there is no store at {remote}{beside}")
    with tempfile.TemporaryDirectory(prefix="patchclamp-") as folder:
        copied(remote, Path(folder))
        _look(found, Path(folder))
    return found


def _look(found: Examination, folder: Path) -> None:
    if (folder / _SERIES).exists() or _was_series(folder):
        _series(found, folder)
        return
    if not (folder / "manifest.json").exists() and not any(folder.rglob("*.safetensors")):
        raise StoreError(f"{found.path} is no store of patchclamp: it has no manifest.json")
    _store(found, folder, "")


def _store(found: Examination, folder: Path, prefix: str) -> None:
    """Examine one recording or atlas; `prefix` says where it lies in what is examined."""
    manifest, kind = _manifest(found, folder, prefix)
    if manifest is None or kind is None:
        return
    found.kind = found.kind or kind
    lost: set[str] = set()
    listed = listed_files(manifest, folder)
    inner = {where: name for where, name in zip(listed, manifest["files"], strict=True)}
    found.files += len(listed)
    for name, expected in listed.items():
        what = damage_of(folder, name, expected)
        if what:
            holds = _holds(kind, inner[name])
            lost.add(holds)
            found.damaged.append(Damage(prefix + name, what, holds))
    held = sorted({_holds(kind, name) for name in inner.values()} - lost)
    found.whole += [f"{prefix}{each}" if prefix else each for each in held]
    there = {each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()}
    found.strangers += sorted(prefix + name for name in there - set(listed) - {"manifest.json"})


def _manifest(found: Examination, folder: Path, prefix: str) -> tuple[Mapping[str, Any] | None, str | None]:
    why = ""
    for kind in KINDS:
        try:
            manifest = read_manifest(folder, kind)
        except DamagedStore as error:
            why = str(error).partition(" is damaged: ")[2] or str(error)
            break
        except StoreError as error:
            why = str(error).removeprefix(f"{folder} ")
            continue
        try:
            listed_files(manifest, folder)
        except DamagedStore as error:
            why = str(error).partition("manifest.json ")[2]
            break
        return manifest, kind
    everything = "all of it: without the manifest nobody can say what the files should be"
    found.damaged.append(Damage(f"{prefix}manifest.json", why, everything))
    return None, None


def _series(found: Examination, folder: Path) -> None:
    found.kind, found.files = "series", 1
    index = folder / _SERIES
    try:
        said = json.loads(index.read_bytes())
        names = list(said["checkpoints"])
        if said["series_sha256"] != seal_of(said, "series_sha256"):
            raise ValueError("its content is not what was written (checksum differs)")
    except (OSError, ValueError, KeyError, TypeError) as error:
        found.damaged.append(Damage(_SERIES, f"cannot be read: {error}", "which recording is of which checkpoint"))
        names = None
    folders = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    for each in folders:
        _store(found, each, f"{each.name}/")
    for name in names or ():
        if name not in {unquote(each.name) for each in folders}:
            found.damaged.append(Damage(name, "is missing", f"the recording of {name}"))


def _was_series(folder: Path) -> bool:
    """Whether there are recordings in it, and nothing that a store of another kind has."""
    own = (folder / "manifest.json").exists() or any(folder.glob("*.parquet"))
    return not own and any(folder.glob("*/manifest.json"))


def _holds(kind: str, name: str) -> str:
    """What a file of a store holds, in words."""
    if kind == "atlas" and "/" not in name:
        return f"the table {name.removesuffix('.parquet')}"
    inner = name.removeprefix("recording/") if kind == "atlas" else name
    first, _, rest = inner.partition("/")
    if first == "summaries":
        site = unquote(rest.removesuffix(".safetensors").removesuffix("%large"))
        return f"what each example did at {site}" if "%large" in rest else f"the summaries of {site}"
    if first == "activations":
        return f"the activations of {unquote(rest.partition('/')[0])}"
    return _SHARED.get(first.partition(".")[0], first)
