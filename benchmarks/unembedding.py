"""Every neuron through the unembedding, against the matrix-product peak of the same run.

A network of GPT-2-small shape with random weights. All is timed that `readout.top_tokens` does: weights, folding the
norm, the product, the exact choice of the ten best tokens, copying them out. Peak and ours alternate, and each is
compared with the mean of the peaks just before and just after it.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from peak import Peak, operations
from resident import forget, most_resident
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.recording.heap import give_back

SWEEPS = 3
SITES_AT_ONCE = 4
K = 10
CHECKED = 256  # neurons of each site that are compared with a full sort
LIMIT = 0.85
# Llama-3.1-8B: layers, neurons of a layer, width, tokens.
LARGE = (32, 14_336, 4_096, 128_256)
PUBLISHED_SECONDS = 15 * 60


def main() -> str:
    """Measure and print; gives the section of the page."""
    torch.manual_seed(0)
    model = pc.load(GPT2LMHeadModel(GPT2Config()).eval())
    readout = model.readout
    sites = [site.name for site in model.select("mlp.*")]
    width, vocabulary = readout.linear_part.gain.numel(), model.module.config.vocab_size
    neurons = len(model.neurons())
    peak = Peak([(1024, width, vocabulary + -vocabulary % 64)])
    groups = [sites[start : start + SITES_AT_ONCE] for start in range(0, len(sites), SITES_AT_ONCE)] * SWEEPS
    of_group = operations((neurons // len(sites) * SITES_AT_ONCE, width, vocabulary))
    readout.top_tokens(sites[0], K, progress=False)  # warm up
    # From here on: what a call takes more than the model and the peak's own matrices.
    give_back()  # what earlier sections left behind would hide the growth
    held = forget()
    ratios, both_ends, speeds, peaks = [], [], [], [peak()]
    for group in groups:
        started = time.perf_counter()
        readout.top_tokens(group, K, progress=False)
        speeds.append(of_group / (time.perf_counter() - started))
        peaks.append(peak())
        ratios.append(speeds[-1] / statistics.mean(peaks[-2:]))
    grown = most_resident() - held
    for group in groups[: len(groups) // SWEEPS]:
        started = time.perf_counter()
        readout.top_tokens(group, K, bottom=True, progress=False)
        speed = of_group / (time.perf_counter() - started)
        peaks.append(peak())
        both_ends.append(speed / statistics.mean(peaks[-2:]))
    differing = sum(_differing(model, readout, site) for site in sites)
    rate = statistics.median(ratios) * statistics.median(peaks)
    seconds = operations((neurons, width, vocabulary)) / rate
    lines = [
        "## Every neuron through the unembedding",
        "",
        f"A network of GPT-2-small shape, random weights: {neurons:,} neurons of width {width}, {vocabulary:,} tokens, "
        f"the {K} largest of each exactly. The peak is that of `torch.mm` of {peak.words}, the fastest of several "
        f"shapes, measured before and after each of {len(ratios)} parts of the work.",
        "",
        "| share of the float32 peak | median | min | max | limit |",
        "|---|---|---|---|---|",
        _row("all included", ratios, f"{LIMIT}"),
        _row("with the smallest ten too", both_ends, ""),
        "",
        f"The peak was {_gigaflops(peaks)}, ours {_gigaflops(speeds)}: {seconds:.1f} s for all neurons at the median "
        f"share and peak. The largest memory of the process grew by {grown / 1e6:,.0f} MB during this (the buffer "
        "is made anew by each call).",
        "",
        f"Compared with a stable sort of `readout.directions` for {CHECKED * len(sites):,} neurons: "
        f"{differing:,} of their {CHECKED * len(sites) * K:,} tokens differ, where two logits are closer than the "
        "rounding of two products.",
        "",
        *_arithmetic(rate),
    ]
    text = "\n".join(lines)
    print(text)
    return text


def _arithmetic(rate: float) -> list[str]:
    layers, per_layer, width, vocabulary = LARGE
    neurons = layers * per_layer
    needed = operations((neurons, width, vocabulary))
    seconds = needed / rate
    stride = vocabulary + -vocabulary % 64
    rows = (1 << 28) // (4 * stride)
    faster = needed / PUBLISHED_SECONDS
    return [
        f"For a model of Llama-3.1-8B shape ({neurons:,} neurons, width {width:,}, {vocabulary:,} tokens) that is "
        f"2 x {neurons:,} x {width:,} x {vocabulary:,} = {needed:.3g} operations: {seconds / 60:,.0f} minutes at the "
        "rate that was measured here, by this arithmetic. A published method takes up to "
        f"{PUBLISHED_SECONDS // 60} minutes, for which {faster / 1e12:.2f} TFLOP/s are enough. "
        f"Memory: {4 * vocabulary * width / 1e9:.1f} GB for the "
        f"unembedding in float32, {4 * rows * stride / 1e9:.2f} GB for {rows} rows of products, "
        f"{neurons * K * 12 / 1e6:.0f} MB for the result; all products at once would be "
        f"{4 * neurons * vocabulary / 1e9:,.0f} GB. It was not run here.",
    ]


@torch.no_grad()
def _differing(model: pc.Model, readout: object, site: str) -> int:
    """Tokens that are not those of a full sort, though their logits are further apart than rounding."""
    weights = model.output_weights(site)[:CHECKED]
    directions = readout.directions(weights).numpy()  # type: ignore[attr-defined]
    found = readout.top_tokens(weights, K, progress=False)  # type: ignore[attr-defined]
    order = np.argsort(-directions, axis=1, kind="stable")[:, :K]
    values = np.take_along_axis(directions, order, 1)
    np.testing.assert_allclose(found.values, values, rtol=0, atol=1e-5 * np.abs(directions).max())
    return int((found.ids != order).sum())


def _row(name: str, ratios: list[float], limit: str) -> str:
    return f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | {limit} |"


def _gigaflops(speeds: list[float]) -> str:
    low, middle, high = (each / 1e9 for each in (min(speeds), statistics.median(speeds), max(speeds)))
    return f"{middle:.0f} GFLOP/s ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main()
