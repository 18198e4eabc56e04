"""Folders on disk that are whole or absent: manifest, checksums, atomic writes. No torch here."""

from patchclamp.storage.folder import (
    FORMAT_VERSION,
    new_folder,
    read_manifest,
    temporary_folder,
    verify_files,
    write_manifest,
)
from patchclamp.storage.hashing import sha256_of_bytes, sha256_of_file

__all__ = [
    "FORMAT_VERSION",
    "new_folder",
    "read_manifest",
    "sha256_of_bytes",
    "sha256_of_file",
    "temporary_folder",
    "verify_files",
    "write_manifest",
]
