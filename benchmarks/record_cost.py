"""What recording costs over running: `record` against the plain forward pass, on a real encoder and a GPT-2 shape.

Both sides read the same data, form the same length-bucketed batches and run the same model as far as the last
recorded site; only the plain side keeps nothing. The two alternate in adjacent pairs, in rotated order, and the
ratio is taken pair by pair. What is done once for a loaded model happens outside the timed loop: the weights are
hashed, and one example is run whole to see that each site is reached once. Afterwards the summaries are compared with
brute force on all activations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.model.tokenize import require_tokenizer
from patchclamp.recording import run
from patchclamp.recording.corpus import TensorCorpus, TextCorpus, tokenize

PAIRS, FEWER_PAIRS = 15, 3
BATCH_TOKENS = 2048
LIMIT, LIMIT_WITH_GROUPS = 1.05, 1.15


def main() -> str:
    """Measure and print; gives the section of the page."""
    parts = [
        "## Recording against the plain forward pass",
        "",
        "The plain pass reads the same batches and stops at the last recorded site, as recording does. All MLP sites; "
        f"batches of {BATCH_TOKENS:,} padded tokens. The usual four are `Moments`, `FiringRate(0.0)`, `MinMax`, "
        f"`TopExamples(20)`; {PAIRS} adjacent pairs, {FEWER_PAIRS} for the other rows. "
        "Once for a loaded model, and not timed: its weights are hashed, and one example is run whole, to see that "
        "each site is reached once.",
    ]
    for case in (_sentences(), _gpt2_shape()):
        parts += ["", *_measured(case)]
    text = "\n".join(parts)
    print(text)
    return text


@dataclass
class _Case:
    """A model, data, how to make its batches, and how to get its activations another way."""

    title: str
    model: pc.Model
    data: Any
    corpus: Callable[[], TextCorpus | TensorCorpus]
    everything: Callable[[list[str]], dict[str, np.ndarray]]


@dataclass
class _Ratios:
    walls: list[float] = field(default_factory=list)
    processors: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)


def _sentences() -> _Case:
    model = pc.load("all-MiniLM-L6-v2")
    data = pc.corpora.python_docs(limit=600)

    def everything(sites: list[str]) -> dict[str, np.ndarray]:
        reader = require_tokenizer(model.reader, "this benchmark")
        rows: dict[str, list[np.ndarray]] = {name: [] for name in sites}
        for example in data:
            keep = ~np.asarray(reader.encode([example.text])[0].special)
            for name, tensor in model.activations(example.text, sites).items():
                rows[name].append(tensor.numpy()[keep])
        return {name: np.concatenate(parts) for name, parts in rows.items()}

    return _Case(
        f"all-MiniLM-L6-v2 on 600 texts of {data.name}",
        model,
        data,
        lambda: tokenize(model, data, None),
        everything,
    )


def _gpt2_shape() -> _Case:
    torch.manual_seed(0)
    model = pc.load(GPT2LMHeadModel(GPT2Config()).eval())
    ids = torch.randint(0, 50_257, (64, 128), generator=torch.Generator().manual_seed(0))
    data = pc.Tensors(ids, labels={"half": ["first", "second"] * 32})

    def everything(sites: list[str]) -> dict[str, np.ndarray]:
        rows: dict[str, list[np.ndarray]] = {name: [] for name in sites}
        for each in ids:
            for name, tensor in model.activations(each[None], sites).items():
                rows[name].append(tensor[0].numpy())
        return {name: np.concatenate(parts) for name, parts in rows.items()}

    return _Case(
        "GPT-2-small shape (random weights) on 64 sequences of 128 random tokens",
        model,
        data,
        lambda: TensorCorpus(model, data),
        everything,
    )


def _measured(case: _Case) -> list[str]:
    with _hashed_once(case.model):
        rows = [
            ("the usual four, compiled loops", _pairs(case, _four, PAIRS, True), LIMIT),
            ("the usual four, torch only", _pairs(case, _four, FEWER_PAIRS, False), None),
            ("with `ByLabel` and `ByToken`", _pairs(case, _six, FEWER_PAIRS, True), LIMIT_WITH_GROUPS),
        ]
        recording = _record(case, _four())
    plain = [each for _, ratios, _ in rows for each in ratios.plain]
    variation = (max(plain) - min(plain)) / statistics.median(plain)
    lines = [
        f"### {case.title}, {recording.facts['data']['tokens']:,} tokens",
        "",
        "| ratio to the plain pass | wall time | processor time | limit |",
        "|---|---|---|---|",
    ]
    for name, ratios, limit in rows:
        lines.append(f"| {name} | {_spread(ratios.walls)} | {_spread(ratios.processors)} | {limit or ''} |")
    warning = f"; it varied by {variation:.0%}, so read these ratios with care" if variation > 0.2 else ""
    return [
        *lines,
        "",
        f"The plain pass took {statistics.median(plain):.2f} s (median of {len(plain)}){warning}. "
        f"Compared with brute force on all activations: {_brute_force(case, recording)}.",
    ]


def _four() -> list[pc.Summary]:
    return [pc.Moments(), pc.FiringRate(0.0), pc.MinMax(), pc.TopExamples(20)]


def _six() -> list[pc.Summary]:
    return [*_four(), pc.ByToken(threshold=0.0), pc.ByLabel()]


def _record(case: _Case, summaries: list[pc.Summary]) -> pc.Recording:
    return pc.record(case.model, case.data, "mlp.*", summaries, batch_tokens=BATCH_TOKENS, progress=False)


class _Enough(Exception):
    """Ends a plain pass where recording ends it."""


def _plain(case: _Case) -> None:
    last = case.model.module.get_submodule(case.model.select("mlp.*")[-1].module)

    def stop(_module: object, _arguments: object) -> None:
        raise _Enough

    handle = last.register_forward_pre_hook(stop)
    try:
        corpus = case.corpus()
        quiet = {} if isinstance(corpus, TextCorpus) else {"use_cache": False}
        with torch.no_grad():
            for examples in corpus.batches(BATCH_TOKENS):
                forward = corpus.forward(examples)
                try:
                    case.model.module(*forward.arguments, **forward.keywords, **quiet)
                except _Enough:
                    continue
    finally:
        handle.remove()


def _pairs(case: _Case, summaries: Callable[[], list[pc.Summary]], number: int, compiled: bool) -> _Ratios:
    def recorded() -> None:
        _record(case, summaries())

    def plain() -> None:
        _plain(case)

    found = _Ratios()
    with _loops(compiled):
        recorded(), plain()  # warm up
        for pair in range(number):
            order = (plain, recorded) if pair % 2 else (recorded, plain)
            timed = {each: _timed(each) for each in order}
            found.walls.append(timed[recorded][0] / timed[plain][0])
            found.processors.append(timed[recorded][1] / timed[plain][1])
            found.plain.append(timed[plain][0])
    return found


@contextmanager
def _loops(compiled: bool) -> Iterator[None]:
    usual = run.available
    run.available = lambda: compiled and usual()  # type: ignore[assignment]
    try:
        yield
    finally:
        run.available = usual


@contextmanager
def _hashed_once(model: pc.Model) -> Iterator[None]:
    found = model.weights_sha256()
    model.weights_sha256 = lambda: found  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.weights_sha256  # type: ignore[misc]


def _timed(function: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _brute_force(case: _Case, recording: pc.Recording) -> str:
    """Largest differences to summaries of all activations, each example run alone."""
    worst = {"mean": 0.0, "variance": 0.0, "rate": 0.0, "extremes": 0.0, "top 20": 0.0}
    for name, everything in case.everything(list(recording)).items():
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
