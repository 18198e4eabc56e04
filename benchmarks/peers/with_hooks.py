"""Hooks of torch, written by hand for these two models: the reference result, and what a library adds to."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from job import Activations, Batch, Case, Enough, Pass, arguments, neuron_modules, plain_model, summarized

PACKAGE = "torch"


def load(case: Case) -> Pass:
    """Forward hooks that keep the tensors of one batch; the last one ends the pass."""
    model = plain_model(case)
    kept: Activations = {}

    def keep(layer: int, tensor: torch.Tensor) -> None:
        kept[layer] = tensor
        if layer == case.layers - 1:
            raise Enough

    for layer, (module, side) in enumerate(neuron_modules(model, case.kind)):

        def before(_module: Any, given: tuple[torch.Tensor, ...], layer: int = layer) -> None:
            keep(layer, given[0])

        def after(_module: Any, _given: Any, output: torch.Tensor, layer: int = layer) -> None:
            keep(layer, output)

        _ = module.register_forward_pre_hook(before) if side == "in" else module.register_forward_hook(after)

    def activations(batch: Batch) -> Activations:
        kept.clear()
        with suppress(Enough):
            model(**arguments(case, batch))
        return kept

    return summarized(activations)
