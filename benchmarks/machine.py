"""What a benchmark was run on, in words, for the page that shows its figures."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


def described() -> str:
    """Processor, cores, versions and date as one Markdown paragraph."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    return (
        f"Measured on {date.today().isoformat()} on {_processor()}, {os.cpu_count()} cores "
        f"({torch.get_num_threads()} threads), Python {platform.python_version()}, {versions}."
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
