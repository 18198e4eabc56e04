"""pyvene: an `IntervenableModel` with a `CollectIntervention` at the activation function of each layer."""

from __future__ import annotations

import pyvene
from job import Activations, Batch, Case, Pass, arguments, plain_model, summarized
from pyvene.models.intervenable_modelcard import type_to_dimension_mapping, type_to_module_mapping

PACKAGE = "pyvene"


def load(case: Case) -> Pass:
    """Sites by the path of their module, of all positions; BERT, which pyvene has no card of, gets an empty one."""
    model = plain_model(case)

    for mapping in (type_to_module_mapping, type_to_dimension_mapping):
        mapping.setdefault(type(model), {})

    path = "h[{}].mlp.act.output" if case.kind == "gpt2" else "encoder.layer[{}].intermediate.output"

    def site(layer: int) -> dict[str, object]:
        return {"component": path.format(layer), "intervention_type": pyvene.CollectIntervention}

    intervenable = pyvene.IntervenableModel([site(layer) for layer in range(case.layers)], model=model)

    def activations(batch: Batch) -> Activations:
        given = arguments(case, batch)
        given.pop("use_cache", None)
        collected = intervenable(base=given, unit_locations={"base": list(range(batch.ids.shape[1]))})[0][-1]
        return dict(enumerate(collected))

    return summarized(activations)
