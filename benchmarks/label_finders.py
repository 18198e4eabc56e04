"""Finders for a label on 9,216 neurons, 5 labels and 1,000 examples, after recording.

Counts and moments have a second, ranks five; probes that are fitted have no limit, and are timed on one site of 1,536
neurons, once. The network has MiniLM's number of sites and neurons, and reads random numbers.
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from torch import nn

import patchclamp as pc

SITES, SIZE, WIDTH = 6, 1536, 64
EXAMPLES, LABELS = 1000, 5
RUNS = 3
LIMITS = {
    "lape": 1.0,
    "lape_ternary": 1.0,
    "domains": 1.0,
    "coverage": 1.0,
    "activation_profiles": 1.0,
    "contrast": 1.0,
    "sparse_probe": 1.0,
    "sparse_probe, f": 1.0,
    "expertise": 5.0,
    "sparse_probe, mutual_information": 5.0,
}
PERMUTED = ("lape", "contrast")  # with the others 200 deals take minutes


def main() -> str:
    """Measure and print; gives the section of the page."""
    finders = pc.find.label_finders()
    recordings: dict[str, pc.Recording] = {}
    lines = [
        "## Finders for a label",
        "",
        f"{SITES * SIZE:,} neurons, {LABELS} labels, {EXAMPLES:,} examples, after recording; all labels in one call, "
        f"median of {RUNS} calls. The ratio is to the limit: at most 1 is wanted.",
        "",
        "| finder | seconds | limit | ratio | with 200 permutations |",
        "|---|---:|---:|---:|---:|",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, limit in LIMITS.items():
            recording = _recorded(finders[name], SITES, recordings)
            took = statistics.median(_seconds(finders[name], recording) for _ in range(RUNS))
            dealt = f"{_seconds(finders[name], recording, null='permute'):.0f} s" if name in PERMUTED else ""
            lines.append(f"| `{name}` | {took:.2f} | {limit:g} | {took / limit:.2f} | {dealt} |")
        lines += ["", f"Fitted, on one site of {SIZE:,} neurons:", "", "| finder | seconds |", "|---|---:|"]
        for name in sorted(set(finders) - set(LIMITS)):
            recording = _recorded(finders[name], 1, recordings)
            lines.append(f"| `{name}` | {_seconds(finders[name], recording):.1f} |")
    text = "\n".join(lines)
    print(text, flush=True)
    return text


def _seconds(method: pc.testbed.Method, recording: pc.Recording, **more: object) -> float:
    started = time.perf_counter()
    method.find(recording, "kind", **method.options, **more)
    return time.perf_counter() - started


def _recorded(method: pc.testbed.Method, sites: int, made: dict[str, pc.Recording]) -> pc.Recording:
    key = f"{sites} {[each.parameters() for each in method.summaries]}"
    if key not in made:
        generator = torch.Generator().manual_seed(0)
        layers = [each for _ in range(sites) for each in (nn.Linear(WIDTH, SIZE), nn.ReLU(), nn.Linear(SIZE, WIDTH))]
        data = pc.Tensors(
            torch.randn(EXAMPLES, WIDTH, generator=generator),
            labels={"kind": [str(number % LABELS) for number in range(EXAMPLES)]},
        )
        model = pc.load(nn.Sequential(*layers).eval())
        wide = [name for name, site in model.sites.items() if site.activation == "relu"]
        made[key] = pc.record(model, data, wide, list(method.summaries), progress=False)
        assert sum(int(each.site.size or 0) for each in made[key].by_site.values()) == sites * SIZE
    return made[key]


if __name__ == "__main__":
    main()
