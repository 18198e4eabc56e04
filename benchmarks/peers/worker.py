"""Runs one adapter on one case in this environment: `python worker.py ADAPTER CASE_FOLDER OUT_FOLDER`.

After a warm-up it times the plain pass, the pass of the adapter and the plain pass again, all on the same batches,
then the adapter's end-to-end pass. It writes `result.npz` and `times.json` into OUT_FOLDER.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import with_plain
from job import Result, load_case
from resident import forget, most_resident


def main() -> None:
    """Run, time, write."""
    name, inputs, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    adapter = importlib.import_module(f"with_{name}")
    case = load_case(inputs)
    plain, recorded = with_plain.load(case), adapter.load(case)
    plain(case.batches)  # warm up
    before = forget()
    result = recorded(case.batches)  # warm up
    growth = most_resident() - before
    first, _ = _timed(lambda: plain(case.batches))
    ours, result = _timed(lambda: recorded(case.batches))
    second, _ = _timed(lambda: plain(case.batches))
    whole = getattr(adapter, "load_end_to_end", lambda _: recorded)(case)
    end_to_end, _ = _timed(lambda: whole(case.naive_batches()))
    times = {
        "plain": [(one + two) / 2 for one, two in zip(first, second, strict=True)],
        "recorded": ours,
        "end_to_end": end_to_end,
        "growth": growth,
        "versions": {package: version(package) for package in (adapter.PACKAGE, "torch", "transformers")},
        "python": sys.version.split()[0],
    }
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "result.npz", **result)  # type: ignore[arg-type]
    (out / "times.json").write_text(json.dumps(times), encoding="utf-8")


def _timed(run: Callable[[], Result]) -> tuple[tuple[float, float], Result]:
    """Wall and processor seconds, and what it gave."""
    wall, processor = time.perf_counter(), time.process_time()
    result = run()
    return (time.perf_counter() - wall, time.process_time() - processor), result


if __name__ == "__main__":
    main()
