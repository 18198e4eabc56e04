"""The largest resident memory of this process, as Linux says it.

Not from `getrusage`: that never falls, and counts what the parent process held when this one was forked.
"""

from __future__ import annotations

from pathlib import Path


def most_resident() -> int:
    """Bytes, since the process began or `forget` was called.

    Raises:
        RuntimeError: the system does not say.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory a process has held")


def forget() -> int:
    """Count from what is held now, not from what was held before; gives that in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return most_resident()
