"""What recording costs over running: `record` with four summaries against the plain forward pass.

Both sides tokenize the same texts, form the same length-bucketed batches and run the same model; only the
plain side keeps nothing. The two alternate in adjacent pairs, in rotated order, and the ratio is taken pair
by pair. Afterwards the recording is compared with brute force on all activations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import patchclamp as pc
from patchclamp.model.tokenize import require_tokenizer
from patchclamp.recording.corpus import tokenize

PAIRS = 7
EXAMPLES = 600
BATCH_TOKENS = 4096
LIMIT = 1.5


def main() -> str:
    """Measure and print; gives the section of the page."""
    model = pc.load("all-MiniLM-L6-v2")
    model.weights_sha256()  # hashed once per loaded model, not once per recording
    corpus = pc.corpora.python_docs(limit=EXAMPLES)
    texts = [example.text for example in corpus]

    def summaries() -> list[pc.Summary]:
        return [pc.Moments(), pc.FiringRate(0.0), pc.MinMax(), pc.TopExamples(20)]

    def plain() -> None:
        corpus = tokenize(model, pc.Texts(texts), None)
        with torch.no_grad():
            for examples in corpus.batches(BATCH_TOKENS):
                forward = corpus.forward(examples)
                model.module(**forward.keywords)

    def recorded() -> pc.Recording:
        return pc.record(model, texts, "mlp.*", summaries(), batch_tokens=BATCH_TOKENS, progress=False)

    plain(), recorded()  # warm up
    walls, cpus, alone = [], [], []
    for pair in range(PAIRS):
        first, second = (plain, recorded) if pair % 2 else (recorded, plain)
        timed = {first: _timed(first), second: _timed(second)}
        walls.append(timed[recorded][0] / timed[plain][0])
        cpus.append(timed[recorded][1] / timed[plain][1])
        alone.append(timed[plain][0])
    difference = _brute_force(model, texts, recorded())
    variation = (max(alone) - min(alone)) / statistics.median(alone)
    recording = recorded()
    lines = [
        "## Recording against the plain forward pass",
        "",
        f"all-MiniLM-L6-v2, {len(texts)} texts of {corpus.name} "
        f"({recording.facts['data']['tokens']:,} tokens), all six MLP sites; `Moments`, `FiringRate(0.0)`, "
        f"`MinMax`, `TopExamples(20)`; batches of {BATCH_TOKENS:,} padded tokens; {PAIRS} adjacent pairs.",
        "",
        "| ratio to the plain pass | median | min | max | limit |",
        "|---|---|---|---|---|",
        _row("wall time", walls),
        _row("processor time", cpus),
        "",
        f"The plain pass took {statistics.median(alone):.2f} s (median)"
        + (f"; it varied by {variation:.0%}, so read these ratios with care." if variation > 0.2 else "."),
        "",
        f"Compared with brute force on all activations: {difference}.",
    ]
    text = "\n".join(lines)
    print(text)
    return text


def _row(name: str, ratios: list[float]) -> str:
    return f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {LIMIT} |"


def _timed(function: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def _brute_force(model: pc.Model, texts: list[str], recording: pc.Recording) -> str:
    """Largest differences to summaries of all activations, each text run alone."""
    reader = require_tokenizer(model.reader, "this benchmark")
    worst = {"mean": 0.0, "variance": 0.0, "rate": 0.0, "extremes": 0.0, "top 20": 0.0}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in recording}
    for text in texts:
        keep = ~np.asarray(reader.encode([text])[0].special)
        for name, tensor in model.activations(text, list(recording)).items():
            rows[name].append(tensor.numpy()[keep])
    for name, parts in rows.items():
        everything = np.concatenate(parts)
        wide, site = everything.astype(np.float64), recording[name]
        scale = np.abs(wide).max()
        top = -np.sort(-wide, axis=0)[:20].T
        for what, found, truth in (
            ("mean", site.moments.mean, wide.mean(0)),
            ("variance", site.moments.variance, wide.var(0)),
            ("rate", site.firing_rate.rate[:, 0], (everything > 0).mean(0)),
            ("extremes", site.min_max.max, wide.max(0)),
            ("top 20", site.top_examples.values, top),
        ):
            size = 1.0 if what == "rate" else scale
            worst[what] = max(worst[what], float(np.abs(found - truth).max() / size))
    listed = ", ".join(f"{what} {value:.1e}" for what, value in worst.items())
    return f"largest difference, as a share of the site's largest activation (of 1 for the rate): {listed}"


if __name__ == "__main__":
    main()
