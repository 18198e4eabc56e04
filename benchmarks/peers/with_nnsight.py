"""nnsight: `with model.trace(...)`, the values of each layer saved, the pass stopped after the last of them."""

from __future__ import annotations

import nnsight
from job import Activations, Batch, Case, Pass, arguments, neuron_modules, plain_model, summarized

PACKAGE = "nnsight"


def load(case: Case) -> Pass:
    """`NNsight` wraps the model without a head."""
    model = nnsight.NNsight(plain_model(case))
    sites = neuron_modules(model, case.kind)

    def activations(batch: Batch) -> Activations:
        given = arguments(case, batch)
        with model.trace(**given) as tracer:
            kept = nnsight.save({})
            for layer, (module, side) in enumerate(sites):
                kept[layer] = module.input if side == "in" else module.output
            tracer.stop()
        return dict(kept)

    return summarized(activations)
