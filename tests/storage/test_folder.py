"""Folders that are whole or absent: written beside their place, sealed by a manifest, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from patchclamp.errors import DamagedStore, StoreError
from patchclamp.storage import (
    FORMAT_VERSION,
    new_folder,
    read_manifest,
    sha256_of_bytes,
    sha256_of_file,
    temporary_folder,
    verify_files,
    write_manifest,
)


def write(path: Path, content: str = "first", **options: Any) -> Path:
    """A store with two files, one of them in a folder of its own."""
    with new_folder(path, "recording", **options) as folder:
        (folder / "inside").mkdir()
        (folder / "table.txt").write_text(content)
        (folder / "inside" / "numbers.bin").write_bytes(bytes(range(256)) * 9000)
        write_manifest(folder, "recording", {"name": "ħ", "numbers": (1, 2), "by number": {10: "a", 9: "b"}})
    return path


def left(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


# Writing --------------------------------------------------------------------------------------------


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "store"
    with new_folder(target, "recording") as folder:
        assert folder.parent == target.parent  # on the same disk, so that renaming it is one step
        assert not target.exists()
        (folder / "table.txt").write_text("words")
        write_manifest(folder, "recording", {})
        assert not target.exists()
    assert left(tmp_path / "a" / "b") == ["store"] and left(target) == ["manifest.json", "table.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "a" / "b" / "store", "recording") as folder:
        (folder / "table.txt").write_text("half")
        raise error
    assert left(tmp_path) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("words")
    with pytest.raises(error), new_folder(tmp_path / "a" / "b" / "store", "recording"):
        raise error
    assert left(tmp_path / "a") == ["mine"]


def test_an_older_store_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    write(store, "second")
    assert (store / "table.txt").read_text() == "second" and left(tmp_path) == ["store"]
    with pytest.raises(StoreError, match="a recording is there already"):
        write(store, "third", replace=False)
    with pytest.raises(ValueError), new_folder(store, "recording"):
        raise ValueError
    assert (store / "table.txt").read_text() == "second" and left(tmp_path) == ["store"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    verify_files(write(tmp_path / "store"), read_manifest(tmp_path / "store", "recording"))
    assert left(tmp_path) == ["store"]


def test_what_belongs_to_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    (tmp_path / "file").write_text("words")
    with new_folder(tmp_path / "atlas", "atlas") as folder:
        write_manifest(folder, "atlas", {})
    for place, says in (
        ("mine", "will not overwrite .*mine: .* has no manifest"),
        ("file", "a file is there already"),
        ("atlas", "will not overwrite .*atlas: .* says 'patchclamp atlas'"),
    ):
        with pytest.raises(StoreError, match=says):
            write(tmp_path / place)
    assert left(tmp_path) == ["atlas", "file", "mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


def test_what_somebody_else_put_there_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="will not overwrite"), new_folder(tmp_path / "store", "recording"):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "thesis.txt").write_text("words")
    assert left(tmp_path) == ["store"] and left(tmp_path / "store") == ["thesis.txt"]


@pytest.mark.parametrize("place", ["file/below/store", "/proc/nowhere/store", "x" * 300])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("words")
    with pytest.raises(StoreError, match="cannot write"):
        write(tmp_path / place)
    with pytest.raises(StoreError, match="cannot write"), temporary_folder(tmp_path / place):
        pass
    assert left(tmp_path) == ["file"]


def test_a_folder_made_for_a_while(tmp_path: Path) -> None:
    target = tmp_path / "a" / "store"
    with temporary_folder(target) as folder:
        (folder / "large").write_text("words")
        assert folder.parent == target.parent
    assert left(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = write(tmp_path / "store")
        assert os.umask(umask) == umask  # the process keeps its own
    finally:
        os.umask(before)
    for each in (store, *store.rglob("*")):
        assert stat.S_IMODE(each.stat().st_mode) == (0o777 if each.is_dir() else 0o666) & ~umask


# The manifest ---------------------------------------------------------------------------------------


def test_the_manifest_lists_every_other_file_with_its_hash(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path / "store"), "recording")
    assert manifest["format"] == "patchclamp recording" and manifest["format_version"] == FORMAT_VERSION
    assert manifest["name"] == "ħ" and manifest["numbers"] == [1, 2]
    assert manifest["files"] == {
        name: hashlib.sha256((tmp_path / "store" / name).read_bytes()).hexdigest()
        for name in ("inside/numbers.bin", "table.txt")
    }
    assert sha256_of_file(tmp_path / "store" / "table.txt") == manifest["files"]["table.txt"]


def test_bytes_are_hashed_with_their_borders() -> None:
    assert sha256_of_bytes([b"ab", b"c"]) != sha256_of_bytes([b"a", b"bc"]) != sha256_of_bytes([b"abc"])
    assert sha256_of_bytes(iter([b"ab", b"c"])) == sha256_of_bytes([b"ab", b"c"])


def test_a_manifest_that_was_written_otherwise_is_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "store") / "manifest.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(content.items()))))
    assert read_manifest(tmp_path / "store", "recording") == content


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"name": "h"}, DamagedStore, "manifest.json is damaged: its content is not what was written"),
        ({"more": 1}, DamagedStore, "manifest.json is damaged"),
        ({"files": {}}, DamagedStore, "manifest.json is damaged"),
        ({"manifest_sha256": "0" * 64}, DamagedStore, "manifest.json is damaged"),
        ({"manifest_sha256": None}, DamagedStore, "manifest.json is damaged"),
        ({"format": "patchclamp atlas"}, StoreError, "is not a patchclamp recording: .* says 'patchclamp atlas'"),
        ({"format": None}, StoreError, "is not a patchclamp recording: .* says None"),
        ({"format_version": 2}, StoreError, "has format version 2; this patchclamp reads up to 1: update it"),
        ({"format_version": "1"}, StoreError, "has format version '1'"),
    ],
)
def test_a_changed_manifest_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[StoreError], says: str
) -> None:
    file = write(tmp_path / "store") / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(StoreError, match=says) as caught:
        read_manifest(tmp_path / "store", "recording")
    assert type(caught.value) is error


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'"patchclamp recording"'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (write(tmp_path / "store") / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        read_manifest(tmp_path / "store", "recording")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no recording at .*none: the folder does not exist"):
        read_manifest(tmp_path / "none", "recording")
    with pytest.raises(StoreError, match=r"it has no manifest\.json"):
        read_manifest(tmp_path, "recording")


# Checking files -------------------------------------------------------------------------------------


def test_whole_files_pass(tmp_path: Path) -> None:
    store = write(tmp_path / "store")
    verify_files(store, read_manifest(store, "recording"))
    (store / "notes.txt").write_text("what the user adds is no damage")
    verify_files(store, read_manifest(store, "recording"))


@pytest.mark.parametrize("name", ["table.txt", "inside/numbers.bin"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    store = write(tmp_path / "store")
    manifest, file = read_manifest(store, "recording"), store / name
    content = file.read_bytes()
    for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-1] + b"\0", content[:-1], b"", content * 2):
        file.write_bytes(damaged)
        with pytest.raises(DamagedStore, match=f"{name} is damaged"):
            verify_files(store, manifest)
        verify_files(store, manifest, skip=lambda each: each == name)
    file.unlink()
    for skip in (lambda _: False, lambda _: True):
        with pytest.raises(DamagedStore, match=f"{name} is missing"):
            verify_files(store, manifest, skip=skip)
    file.mkdir()
    with pytest.raises(DamagedStore, match=f"{name} is missing"):
        verify_files(store, manifest)


def test_files_outside_the_folder_are_not_touched(tmp_path: Path) -> None:
    store, secret = write(tmp_path / "store"), tmp_path / "secret"
    secret.write_text("words")
    known = sha256_of_file(secret)
    (store / "link").symlink_to(secret)
    for name in ("../secret", str(secret), "inside/../../secret", "link", "/etc/passwd", "."):
        with pytest.raises(DamagedStore, match=r"outside the folder|is missing") as caught:
            verify_files(store, {"files": {name: known}})
        assert name == "." or "names a file outside the folder" in str(caught.value)


def test_a_manifest_without_files_is_damaged(tmp_path: Path) -> None:
    for files in (None, [], "table.txt"):
        with pytest.raises(DamagedStore, match="it lists no files"):
            verify_files(write(tmp_path / "store"), {"files": files})
