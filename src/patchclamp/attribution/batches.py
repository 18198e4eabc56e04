"""`batches`: many examples, a few at a time, each batch with the target of its own examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from patchclamp.attribution.engine import examples_of, prepared, rows_of
from patchclamp.attribution.targets import OfExamples, Target
from patchclamp.data import Images, Tensors, Texts
from patchclamp.errors import DataError
from patchclamp.model.model import Model


def batches(model: Model, data: Any, target: Target, batch: int) -> Iterator[tuple[Any, Target, list[int]]]:
    """Arguments of the module, the target and the numbers of the examples of each batch, in order.

    Texts are padded to the longest of their batch. A target that is a function of one's own is given one batch at a
    time: it must not know examples by their number.

    Args:
        model: the model.
        data: `pc.Texts`, `pc.Tensors`, `pc.Images`, or what `gradients` takes: texts, a tensor, keyword arguments.
        target: of the examples.
        batch: how many at once.

    Raises:
        DataError: no examples; the target names something for each of another number of examples.
    """
    if batch < 1:
        raise DataError(f"batch is how many examples are run at once, not {batch}")
    examples, part = _examples(model, data)
    if not examples:
        raise DataError("there are no examples")
    for start in range(0, examples, batch):
        which = list(range(start, min(start + batch, examples)))
        yield part(which), target.rows(which, examples) if isinstance(target, OfExamples) else target, which


def _examples(model: Model, data: Any) -> tuple[int, Any]:
    """How many there are, and what makes the arguments of the module from the numbers of some."""
    if isinstance(data, Images):
        return len(data), lambda which: data.inputs(which, model.processor)
    if isinstance(data, Texts):
        texts = [each.text for each in data]
        return len(texts), lambda which: model.inputs([texts[number] for number in which])
    if isinstance(data, Tensors):
        data = data.values
    if isinstance(data, (torch.Tensor, Mapping)):
        call = prepared(model, data)
        of = examples_of(call)
        return of, lambda which: rows_of(call, which, of)
    texts = [data] if isinstance(data, str) else list(data) if isinstance(data, Sequence) else [data]
    return len(texts), lambda which: model.inputs([texts[number] for number in which])
