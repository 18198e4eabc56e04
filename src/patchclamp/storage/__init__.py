"""Files and folders, and places in object stores, that are whole or absent: manifest, checksums. No torch here."""

from patchclamp.storage.files import existing_file, write_file
from patchclamp.storage.folder import (
    FORMAT_VERSION,
    damage_of,
    new_folder,
    put_in_place,
    read_manifest,
    seal_of,
    temporary_folder,
    verify_files,
    write_manifest,
)
from patchclamp.storage.hashing import sha256_of_bytes, sha256_of_file
from patchclamp.storage.lease import Lease, leased
from patchclamp.storage.published import OpenedStore, exists, opened, published
from patchclamp.storage.remote import Conflict, Remote, local, place

__all__ = [
    "FORMAT_VERSION",
    "Conflict",
    "Lease",
    "OpenedStore",
    "Remote",
    "damage_of",
    "existing_file",
    "exists",
    "leased",
    "local",
    "new_folder",
    "opened",
    "place",
    "published",
    "put_in_place",
    "read_manifest",
    "seal_of",
    "sha256_of_bytes",
    "sha256_of_file",
    "temporary_folder",
    "verify_files",
    "write_file",
    "write_manifest",
]
