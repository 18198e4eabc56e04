"""patchclamp: `record` with four summaries. It makes its batches itself, from the texts or ids of the case.

Tokenizing is part of its time in both tables. What is done once for a loaded model (the weights are hashed, one example
is run whole) is outside the timed pass in the table on the same batches; end to end includes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from job import Batch, Case, Pass, Result, joined, plain_model

import patchclamp as pc

PACKAGE = "patchclamp"


def load(case: Case) -> Pass:
    """A pass with the weights hashed beforehand."""
    model = _model(case)
    found = model.weights_sha256()
    model.weights_sha256 = lambda: found  # type: ignore[method-assign]
    return _recording(case, model, case.batch_tokens)


def load_end_to_end(case: Case) -> Pass:
    """A pass with all that `record` does, and the batches it makes when it is not told otherwise."""
    return _recording(case, _model(case), None)


def _model(case: Case) -> pc.Model:
    if case.texts:
        return pc.load(case.model)
    return pc.load(plain_model(case))


def _recording(case: Case, model: pc.Model, batch_tokens: int | None) -> Pass:
    def run(_: Iterable[Batch]) -> Result:
        data: Any = case.texts or pc.Tensors(torch.cat([batch.ids for batch in case.batches]))
        summaries = [pc.Moments(), pc.FiringRate(0.0), pc.MinMax(), pc.TopExamples(20)]
        recording = pc.record(model, data, "mlp.*", summaries, batch_tokens=batch_tokens, progress=False)
        return joined({layer: _result(recording[f"mlp.{layer}"]) for layer in range(case.layers)})

    return run


def _result(site: Any) -> Result:
    count, mean = site.moments.count, site.moments.mean
    return {
        "count": np.asarray(count),
        "sum": mean * count,
        "squares": (site.moments.variance + mean**2) * count,
        "max": site.min_max.max,
        "min": site.min_max.min,
        "rate": site.firing_rate.rate[:, 0],
        "top_values": site.top_examples.values,
        "top_examples": site.top_examples.example,
    }
