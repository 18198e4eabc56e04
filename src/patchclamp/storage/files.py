"""Single files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

from patchclamp.errors import StoreError


def write_file(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file beside its place and move it there; what stood there before stays until then.

    Raises:
        StoreError: it cannot be written.
    """
    file = Path(path)
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StoreError(f"cannot write {file}: {error.strerror or error}") from error
    return file


def existing_file(path: str | os.PathLike[str]) -> Path:
    """The file.

    Raises:
        StoreError: there is none.
    """
    file = Path(path)
    if not file.is_file():
        raise StoreError(f"there is no file {file}")
    return file
