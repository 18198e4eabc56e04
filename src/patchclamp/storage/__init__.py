"""Folders on disk that are whole or absent: manifest, checksums, atomic writes. No torch here."""

from patchclamp.storage.folder import (
    FORMAT_VERSION,
    damage_of,
    new_folder,
    read_manifest,
    seal_of,
    temporary_folder,
    verify_files,
    write_manifest,
)
from patchclamp.storage.hashing import sha256_of_bytes, sha256_of_file

__all__ = [
    "FORMAT_VERSION",
    "damage_of",
    "new_folder",
    "read_manifest",
    "seal_of",
    "sha256_of_bytes",
    "sha256_of_file",
    "temporary_folder",
    "verify_files",
    "write_manifest",
]
