"""Every error that patchclamp raises on purpose, and how it warns.

Each names the offending thing and, where there is one, the nearest right one. All are
`PatchclampError`; each is also the built-in exception that a Python user would expect.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class PatchclampError(Exception):
    """Base of all errors that patchclamp raises on purpose."""

    # KeyError prints its message in quotes; ours are sentences.
    def __str__(self) -> str:
        return " ".join(str(part) for part in self.args)


class UnknownName(PatchclampError, KeyError):
    """A site, summary, label, column or neuron that does not exist."""


class DataError(PatchclampError, ValueError):
    """The user's data cannot be used as it is."""


class ModelError(PatchclampError, ValueError):
    """The model cannot be loaded, read or changed as asked."""


class SiteNotReached(ModelError):
    """A forward pass went by without ever calling the module that a site reads."""


class StoreError(PatchclampError, OSError):
    """A folder on disk cannot be written, or is not what it should be."""


class DamagedStore(StoreError):
    """A file of a store is missing, truncated or altered; `path` names it."""


class ClusterError(PatchclampError, RuntimeError):
    """A cluster cannot be reached, or its workers die."""


class MissingExtra(PatchclampError, ImportError):
    """An optional dependency is not installed."""


def unknown(what: str, name: object, known: Iterable[object], hint: str = "") -> UnknownName:
    """Build the error for a name that is not among `known`, listing the nearest ones."""
    names = [str(each) for each in known]
    near = difflib.get_close_matches(str(name), names, n=4, cutoff=0.4)
    if near:
        shown = "The nearest: " + ", ".join(near)
    elif names:
        shown = "There are: " + ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")
    else:
        shown = "There are none"
    return UnknownName(f"no {what} is called {str(name)!r}. {shown}." + (f" {hint}" if hint else ""))


def warn(message: str) -> None:
    """Warn, and blame the user's line: the first one outside this package."""
    frame, level = sys._getframe(1), 3
    while frame.f_back is not None and frame.f_back.f_globals.get("__name__", "").split(".")[0] == "patchclamp":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
