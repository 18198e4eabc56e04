"""All-pairs correlation of two models' neurons, against the matrix-product peak of the same run.

The rows come as they come from two models of MiniLM's shape: six sites of 1,536 neurons each, batch by batch. All is
timed that `pc.correlate` does with them: copying, centring, the product, adding it to float64 sums. Peak and ours
alternate, block by block. What is done once at the end, the choice of each neuron's partners, is given beside it.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from peak import Peak, operations
from resident import forget, most_resident

from patchclamp.recording.correlate import _Best
from patchclamp.recording.cross_moments import BLOCK_ROWS, CrossMoments
from patchclamp.recording.heap import give_back

SITES, SIZE = 6, 1536
BATCH_ROWS = 2048
BLOCKS = 9
K = 10
CHECKED = 128
LIMIT = 0.9
TOKENS = 1_000_000


def main() -> str:
    """Measure and print; gives the section of the page."""
    neurons = SITES * SIZE
    batches = [(_batch(2 * number), _batch(2 * number + 1)) for number in range(2)]
    peak = Peak([(neurons, BLOCK_ROWS, neurons)])
    moments = CrossMoments(neurons, neurons)
    needed = operations((neurons, BLOCK_ROWS, neurons))
    give_back()  # what earlier sections left behind would hide the growth
    held = forget()
    seconds, ratios, speeds, peaks = [], [], [], [peak()]
    for block in range(BLOCKS + 1):
        started = time.perf_counter()
        for first, second in batches:
            moments.add(first, second)
        took = time.perf_counter() - started
        peaks.append(peak())
        if block:  # the first warms up
            seconds.append(took)
            speeds.append(needed / took)
            ratios.append(speeds[-1] / statistics.mean(peaks[-2:]))
    started = time.perf_counter()
    moments.close()
    best = _Best(neurons, neurons, K, False)
    best.take(moments, slice(0, neurons))
    ending = time.perf_counter() - started
    grown = most_resident() - held
    whole = statistics.median(seconds) * TOKENS / BLOCK_ROWS
    lines = [
        "## Every neuron of one model with every neuron of another",
        "",
        f"{neurons:,} x {neurons:,} neurons, rows in batches of {BATCH_ROWS:,} from {SITES} sites on either side; "
        f"{BLOCKS} blocks of {BLOCK_ROWS:,} rows. The peak is that of `torch.mm` of {peak.words}, the fastest of "
        "several shapes, measured before and after each block.",
        "",
        "| share of the float32 peak | median | min | max | limit |",
        "|---|---|---|---|---|",
        f"| streaming | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | {LIMIT} |",
        "",
        f"The peak was {statistics.median(peaks) / 1e9:.0f} GFLOP/s, ours {statistics.median(speeds) / 1e9:.0f}. "
        f"Once, at the end, the best {K} partners both ways take {ending:.1f} s: for {TOKENS:,} tokens, "
        f"{ending / (ending + whole):.1%} of the {ending + whole:,.0f} s, by this arithmetic. The largest memory of "
        f"the process grew by {grown / 1e6:,.0f} MB from when the sums were there (0.7 GB). r of "
        f"{CHECKED * CHECKED:,} pairs differs from that in float64 by at most {_difference(moments, batches):.1e}.",
    ]
    text = "\n".join(lines)
    print(text)
    return text


def _batch(seed: int) -> list[torch.Tensor]:
    """Rows that are correlated, and far from 0, as activations are."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(BATCH_ROWS, 32, generator=torch.Generator().manual_seed(seed // 2))
    return [
        common @ torch.randn(32, SIZE, generator=draw) + torch.randn(BATCH_ROWS, SIZE, generator=draw) + 10.0
        for _ in range(SITES)
    ]


def _difference(moments: CrossMoments, batches: list[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> float:
    first = np.concatenate([each[0][0][:, :CHECKED].double().numpy() for each in batches])
    second = np.concatenate([each[1][0][:, :CHECKED].double().numpy() for each in batches])
    expected = np.corrcoef(first, second, rowvar=False)[:CHECKED, CHECKED:]
    found = moments.r(slice(0, CHECKED), slice(0, CHECKED)).numpy()
    return float(np.abs(found - expected).max())


if __name__ == "__main__":
    main()
