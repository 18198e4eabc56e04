"""`Remote`: a place in an object store, such as `s3://bucket/recordings/first`, reached through fsspec.

An object store has no folders, no rename and no locks. What a store of ours asks of it is: read, write and list
objects, and write an object only if nobody else has meanwhile (`put`). On S3 the server itself decides that; where
fsspec offers no such thing, it is looked at first, which leaves a moment in which another process may come between.

A connection that drops is tried again, with growing pauses. Nothing here knows what is stored.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from patchclamp.errors import MissingExtra, StoreError
from patchclamp.storage.hashing import sha256_of_bytes

# Seconds to wait before it is tried again; the libraries have tried a few times themselves by then.
PAUSES = (1.0, 5.0)
_TOGETHER = 64
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
# What a server says when it is of no use to ask again.
_FINAL = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE)

_T = TypeVar("_T")


class Conflict(Exception):
    """Another process has written the object meanwhile."""


@dataclass(frozen=True)
class Remote:
    """A place in an object store; `place / "name"` is one inside it.

    Attributes:
        url: `protocol://bucket/path`. Credentials and endpoint are those that the protocol's own library finds
            (environment, configuration files, `fsspec.config`).
    """

    url: str

    @classmethod
    def of(cls, path: str | os.PathLike[str] | Remote) -> Remote | None:
        """The place that a user named; None for a folder of this machine.

        Raises:
            StoreError: the URL names nothing inside a bucket, or a protocol that nobody knows.
            MissingExtra: the library for this protocol is not installed.
        """
        if isinstance(path, Remote):
            return path
        given = os.fspath(path)
        protocol, separator, rest = given.partition("://")
        if not separator or protocol in ("file", "local"):
            return None
        if not rest.strip("/"):
            raise StoreError(f"{given} names no place for a store: give {protocol}://bucket/name")
        place = cls(given.rstrip("/"))
        place._found  # noqa: B018  a missing library is said now, not after an hour
        return place

    def __fspath__(self) -> str:
        return self.url

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    # Objects ----------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes:
        """The content of an object.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it cannot be read.
        """
        return self._tried(f"read {self.url}/{name}", lambda: self._fs.cat_file(self._at(name)))

    def tag(self, name: str) -> str | None:
        """A mark of what an object holds now, for `put`; None where there is none."""
        try:
            if self._on_s3:
                return self._info(name)["ETag"]
            return sha256_of_bytes([self.read(name)])
        except FileNotFoundError:
            return None

    def put(self, name: str, content: bytes, expecting: str | None) -> str:
        """Write a small object, if what is there is what was expected.

        Args:
            name: of the object.
            content: what to write.
            expecting: the tag of what is there; None: nothing is.

        Returns:
            Its tag now.

        Raises:
            Conflict: something else is there.
            StoreError: it cannot be written.
        """
        write = self._put_on_s3 if self._on_s3 else self._look_and_put
        try:
            return self._tried(f"write {self.url}/{name}", lambda: write(name, content, expecting))
        except (FileExistsError, FileNotFoundError) as error:
            # A connection that dropped after the server had written leaves what we wanted ourselves.
            tag = self.tag(name)
            if tag is not None and self.read(name) == content:
                return tag
            if tag is None and expecting is None:
                raise StoreError(f"cannot write {self.url}/{name}: {error}") from error
            raise Conflict(f"{self.url}/{name}") from error

    def modified(self, name: str) -> datetime:
        """When an object was written, by the clock of the server.

        Raises:
            FileNotFoundError: there is none.
        """
        self._fs.invalidate_cache()
        return self._tried(f"read {self.url}/{name}", lambda: self._fs.modified(self._at(name)))

    def names(self, under: str = "") -> list[str]:
        """Names of all objects in it, or of those under a prefix; sorted."""
        root = self._at(under) if under else self._path
        self._fs.invalidate_cache()
        found = self._tried(f"list {self.url}", lambda: self._fs.find(root))
        start = len(self._path.rstrip("/")) + 1
        return sorted(each[start:] for each in found)

    def upload(self, folder: Path, names: Iterable[str], under: str = "") -> None:
        """Write files of a local folder as objects of the same names."""
        prefix = f"{under}/" if under else ""
        for some in _together(names):
            here, there = [str(folder / each) for each in some], [self._at(prefix + each) for each in some]
            self._tried(f"write {self.url}/{prefix}{some[0]}", lambda here=here, there=there: self._fs.put(here, there))

    def download(self, names: Iterable[str], folder: Path) -> None:
        """Write objects as files of the same names; those that are not there are left out."""
        for some in _together(names):
            try:
                self._download(some, folder)
            except FileNotFoundError:
                for each in some:
                    try:
                        self._download([each], folder)
                    except FileNotFoundError:
                        (folder / each).unlink(missing_ok=True)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects, as far as they are there."""
        for some in _together(names):
            try:
                self._tried(f"delete {self.url}", lambda some=some: self._fs.rm([self._at(each) for each in some]))
            except FileNotFoundError:
                for each in some if len(some) > 1 else ():
                    self.delete([each])

    # The file system --------------------------------------------------------------------------------

    @cached_property
    def _found(self) -> tuple[Any, str]:
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            return fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            extra, package = _EXTRAS.get(protocol), _PACKAGES.get(protocol)
            how = f"pip install 'patchclamp[{extra}]'" if extra else f"pip install {package}" if package else str(error)
            raise MissingExtra(f"{protocol}:// needs another library: {how}") from error
        except ValueError as error:
            known = ", ".join(sorted({"s3", "gs", "hf"}))
            raise StoreError(f"{self.url} cannot be a store: {error}. Among others there are {known}") from error

    @property
    def _fs(self) -> Any:
        return self._found[0]

    @property
    def _path(self) -> str:
        return self._found[1]

    @property
    def _on_s3(self) -> bool:
        protocol = self._fs.protocol
        return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)

    def _at(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"

    def _info(self, name: str) -> dict[str, Any]:
        self._fs.invalidate_cache()
        return self._tried(f"read {self.url}/{name}", lambda: self._fs.info(self._at(name)))

    def _download(self, names: Sequence[str], folder: Path) -> None:
        here = [folder / each for each in names]
        for each in here:
            each.parent.mkdir(parents=True, exist_ok=True)
        there = [self._at(each) for each in names]
        self._tried(f"read {self.url}/{names[0]}", lambda: self._fs.get(there, [str(each) for each in here]))

    def _put_on_s3(self, name: str, content: bytes, expecting: str | None) -> str:
        bucket, key, _ = self._fs.split_path(self._at(name))
        condition = {"IfNoneMatch": "*"} if expecting is None else {"IfMatch": expecting}
        try:
            said = self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
        except OSError as error:
            if _code(error.__cause__) in ("PreconditionFailed", "412"):
                raise FileExistsError(str(error)) from error
            raise
        return said["ETag"]

    def _look_and_put(self, name: str, content: bytes, expecting: str | None) -> str:
        if self.tag(name) != expecting:
            raise FileExistsError(name)
        self._fs.pipe_file(self._at(name), content)
        return sha256_of_bytes([content])

    def _tried(self, what: str, action: Callable[[], _T]) -> _T:
        for pause in (*PAUSES, None):
            try:
                return action()
            except (FileNotFoundError, FileExistsError):
                raise
            except PermissionError as error:
                raise StoreError(f"cannot {what}: {error or 'not permitted'}") from error
            except Exception as error:
                # The libraries have errors of their own for a connection that drops, which are no OSError.
                if pause is None or (isinstance(error, OSError) and error.errno in _FINAL):
                    raise StoreError(f"cannot {what}: {_said(error)}") from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def local(path: str | os.PathLike[str]) -> Path:
    """The folder of this machine that a user named, also as `file://...`."""
    given = os.fspath(path)
    if given.startswith(("file://", "local://")):
        given = unquote(urlsplit(given).path)
    return Path(given).expanduser().absolute()


def place(path: str | os.PathLike[str] | Remote) -> Path | Remote:
    """What a user named: a folder of this machine, or a place in an object store; raises as `Remote.of`."""
    return Remote.of(path) or local(path)


def _together(names: Iterable[str]) -> Iterable[list[str]]:
    left = iter(names)
    while some := list(itertools.islice(left, _TOGETHER)):
        yield some


def _code(error: BaseException | None) -> str:
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _said(error: Exception) -> str:
    return f"{error}" if isinstance(error, OSError) and str(error) else f"{type(error).__name__}: {error}"
