"""Two workers of a cluster against one: how much faster they read.

Workers of one thread each on this machine. What is timed is the streaming phase, as the workers report it: from the
beginning of the first shard to the end of the last. Starting Ray, its workers and sending the model comes on top and is
given beside it.
"""

from __future__ import annotations

import logging
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc

ROUNDS = 5
LIMIT = 0.8
SHARD_BATCHES = 2


def main() -> str:
    """Measure and print; gives the section of the page."""
    try:
        import ray
    except ImportError:
        return "## A cluster\n\nNot measured: Ray is not installed."
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(n_embd=384, n_head=6, n_layer=6)).eval()
    ids = torch.randint(0, 50_257, (320, 128), generator=torch.Generator().manual_seed(0))
    speeds: dict[int, list[float]] = {1: [], 2: []}
    starts: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(ROUNDS):
        for workers in (1, 2) if turn % 2 else (2, 1):
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            try:
                cluster = pc.RayCluster(threads=1, batches=SHARD_BATCHES)
                began = time.time()
                pc.record(pc.load(module), pc.Tensors(ids), "mlp.*", _four(), cluster=cluster, progress=False)
                first = min(each.began for each in cluster.reports)
                last = max(each.began + each.seconds for each in cluster.reports)
                speeds[workers].append(sum(each.tokens for each in cluster.reports) / (last - first))
                starts[workers].append(first - began)
            finally:
                ray.shutdown()
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    share = statistics.median(ratios) / 2
    lines = [
        "## A cluster",
        "",
        f"A GPT-2 shape of width 384 and 6 layers, {ids.numel():,} tokens, the usual four summaries; Ray on this "
        f"machine, workers of one thread; {ROUNDS} rounds, in rotated order.",
        "",
        "| workers | tokens a second while streaming (median) | seconds before the first shard begins (median) |",
        "|---|---|---|",
        *(f"| {n} | {statistics.median(speeds[n]):,.0f} | {statistics.median(starts[n]):.1f} |" for n in (1, 2)),
        "",
        f"Two are {statistics.median(ratios):.2f} times as fast as one ({min(ratios):.2f} to {max(ratios):.2f}): "
        f"{share:.2f} of twice the speed (limit {LIMIT}).",
    ]
    text = "\n".join(lines)
    print(text)
    return text


def _four() -> list[pc.Summary]:
    return [pc.Moments(), pc.FiringRate(0.0), pc.MinMax(), pc.TopExamples(20)]


if __name__ == "__main__":
    main()
