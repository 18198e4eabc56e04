"""Who suffers when neurons are silenced: the loss of a decoder on the texts of each label, as it is and without them.

    increase[set, label] = loss on the label without the set - loss on the label,    nats per predicted token

If each set is needed for one label alone, the matrix has its large numbers on the diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from patchclamp.data import Texts
from patchclamp.errors import DataError
from patchclamp.intervene import ablate
from patchclamp.model import Model
from patchclamp.neurons import Neurons


def loss_increase(
    model: Model,
    data: Texts,
    label: str,
    sets: Sequence[Neurons],
    *,
    to: str = "zero",
) -> np.ndarray:
    """How much the loss on each label rises when each set of neurons is silenced.

    Args:
        model: a decoder with a tokenizer.
        data: texts with that label.
        label: its name.
        sets: of neurons; an empty one changes nothing.
        to: "zero" or "mean", as of `pc.ablate`; for "mean" the tables have the column `mean`.

    Returns:
        `[sets, categories]` float64, nats per token; categories sorted, as in `data.labels`.

    Raises:
        DataError: the data has no such label, or a text has no token that is predicted.
    """
    batches = _batches(model, data, label)
    plain = _losses(model, batches)
    rises = np.zeros((len(sets), len(plain)))
    for row, each in enumerate(sets):
        if len(each):
            with model.intervene(ablate(each, to)):  # type: ignore[arg-type]
                rises[row] = _losses(model, batches) - plain
    return rises


def loss_by_label(model: Model, data: Texts, label: str) -> np.ndarray:
    """Mean loss of the next token on the texts of each category, `[categories]` float64, in nats per token.

    Raises:
        DataError: as `loss_increase`.
    """
    return _losses(model, _batches(model, data, label))


# Helpers --------------------------------------------------------------------------------------------

_AT_ONCE = 64


def _batches(model: Model, data: Texts, label: str) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of each category: ids and mask of some texts."""
    if label not in data.labels:
        raise DataError(f"the data has no label {label!r}; it has {', '.join(data.labels) or 'none'}")
    found = []
    for category in data.labels[label]:
        texts = [each.text for each in data if each.labels[label] == category]
        parts = []
        for start in range(0, len(texts), _AT_ONCE):
            given = model.tokenizer(
                texts[start : start + _AT_ONCE],
                padding=True,
                padding_side="right",
                truncation=True,
                return_tensors="pt",
            )
            parts.append((given["input_ids"].to(model.device), given["attention_mask"].to(model.device)))
        if not any(bool(mask[:, 1:].any()) for _, mask in parts):
            raise DataError(f"no text of {category!r} has a second token: nothing is predicted")
        found.append(parts)
    return found


@torch.no_grad()
def _losses(model: Model, batches: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> np.ndarray:
    losses = []
    with model.evaluating():
        for parts in batches:
            total, count = 0.0, 0
            for ids, mask in parts:
                logits = model.module(input_ids=ids, attention_mask=mask).logits[:, :-1]
                wanted = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
                total += float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
                count += int((wanted != -100).sum())
            losses.append(total / count)
    return np.asarray(losses)
