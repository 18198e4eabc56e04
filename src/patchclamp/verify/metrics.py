"""Metrics: one number for each example, of what a network does with it.

| name | of each example | data |
|---|---|---|
| `"loss"` | mean cross entropy of its next tokens (of its answer, of its class), in nats | texts, prompts, classes |
| `"accuracy"` | share of next tokens that are predicted (its answer, its class: 0 or 1) | the same |
| `"logit_difference"` | logit of the answer less that of the foil | prompts with answer and foil |
| `"class_score"` | logit of its class | images, tensors, texts with a class |
| `"similarity"` | cosine of the embeddings of a pair | pairs of texts |
| `"kl"` | Kullback-Leibler divergence from the network as it is, in nats per position | texts, prompts, classes |
| `"embedding_shift"` | 1 less the cosine with the embedding of the network as it is | texts |

`"kl"` keeps the log probabilities of the network as it is, of all the data, while it is tested.

Or any callable `(model, batch) -> one value per example`; it runs `batch.run(model)` or whatever it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from patchclamp.attribution.targets import class_logits, logits_at
from patchclamp.errors import DataError, ModelError, unknown
from patchclamp.model.hooks import first_tensor
from patchclamp.model.model import Model
from patchclamp.verify.batches import Batch, need_answers, need_classes, read

Metric = str | Callable[[Model, Batch], Any]
Measured = Callable[[Any, Batch], torch.Tensor]


def per_example(model: Model, metric: Metric, data: Any, batch_tokens: int = 2048) -> np.ndarray:
    """A metric of each example, as the model is now: interventions that are in force count.

    Args:
        model: the model.
        metric: one of the table above, but for those that compare, or `(model, batch) -> one value per example`.
        data: texts, images, tensors, prompts or pairs; see `verify.read`.
        batch_tokens: how many tokens are run at once.

    Returns:
        `[examples]` float64, in the order of the data.

    Raises:
        DataError: the metric needs what the data does not have, or gives something else than one number per example.
        UnknownName: no metric is called so.
    """
    if compares(metric):
        raise DataError(f"{metric!r} compares a network with itself without an intervention: use verify.effect")
    batches = read(model, data, batch_tokens)
    values = np.zeros(sum(len(batch) for batch in batches))
    with model.evaluating(), torch.no_grad():
        for batch in batches:
            values[batch.examples] = measured(model, metric, batch).double().cpu().numpy()
    return values


def measured(model: Model, metric: Metric, batch: Batch, reference: Any = None) -> torch.Tensor:
    """A metric of one batch, `[examples]`.

    Args:
        model: the model, in evaluation mode.
        metric: a name or a callable.
        batch: the batch.
        reference: for a metric that compares: what `reference_of` gave without interventions.
    """
    if callable(metric):
        return checked(metric(model, batch), batch, getattr(metric, "__name__", "the metric"))
    known = {**NAMED, **COMPARING}
    if metric not in known:
        raise unknown("metric", str(metric), known)
    output = batch.run(model)
    if compares(metric):
        return checked(COMPARING[metric][1](output, batch, reference), batch, metric)
    return checked(NAMED[metric](output, batch), batch, metric)


def reference_of(metric: Metric, output: Any, batch: Batch) -> Any:
    """What a metric that compares keeps of the network without interventions; None for the others."""
    return COMPARING[str(metric)][0](output, batch) if compares(metric) else None


def compares(metric: Metric) -> bool:
    """Whether a metric compares the network with itself without interventions."""
    return isinstance(metric, str) and metric in COMPARING


def checked(values: Any, batch: Batch, name: str) -> torch.Tensor:
    """What a metric gave, `[examples]`.

    Raises:
        DataError: one number for the whole batch, or NaN or infinite ones.
    """
    if isinstance(values, np.ndarray) or (isinstance(values, (list, tuple)) and values):
        values = torch.as_tensor(np.asarray(values, np.float64))
    if not isinstance(values, torch.Tensor) or values.ndim != 1 or len(values) != len(batch):
        got = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise DataError(f"a metric gives one number for each of {len(batch)} examples; {name} gave {got}")
    values = values.detach()
    if not values.isfinite().all():
        example = int(batch.examples[int((~values.isfinite()).nonzero()[0])])
        raise DataError(f"{name} of example {example} is not finite")
    return values


def embeddings(output: Any, batch: Batch) -> torch.Tensor:
    """Mean over real tokens of the last hidden state, scaled to length 1. `[rows, d]`.

    Raises:
        ModelError: the output has no hidden states.
    """
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ModelError(f"{type(output).__name__} has no last hidden state: load the model without a head")
    mask = batch.mask
    weight = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
    weight = weight[..., None].to(hidden.dtype)
    return functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


# Helpers --------------------------------------------------------------------------------------------


def _logits(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None else logits
    if logits is None or (getattr(output, "logits", None) is None and hasattr(output, "last_hidden_state")):
        raise ModelError("the network has no head that gives logits")
    return logits


def _next(output: Any, batch: Batch, value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The mean over an example's next tokens of a function of logits `[n, vocabulary]` and tokens `[n]`."""
    logits = _logits(output)
    if logits.ndim != 3 or "input_ids" not in batch.inputs:
        raise ModelError("there are neither classes nor next tokens to be predicted in this data")
    prefix = "decoder_" if "decoder_input_ids" in batch.inputs else ""
    ids, mask = batch.inputs[f"{prefix}input_ids"], batch.inputs.get(f"{prefix}attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    counted = mask[:, 1:] & mask[:, :-1]
    if not bool(counted.any(1).all()):
        raise DataError(f"example {int(batch.examples[int((~counted.any(1)).nonzero()[0])])} has no next token")
    flat = value(logits[:, :-1][counted], ids[:, 1:][counted])
    total = torch.zeros(counted.shape, dtype=flat.dtype, device=flat.device).masked_scatter(counted, flat)
    return total.sum(1) / counted.sum(1)


def _at_choice(output: Any, batch: Batch, metric: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Logits and the right choice, where each example has one choice: an answer, or a class."""
    if batch.answers is not None:
        return logits_at(output, batch.inputs), batch.answers
    if _logits(output).ndim == 2:
        return class_logits(output), need_classes(batch, metric)
    return None


def _loss(output: Any, batch: Batch) -> torch.Tensor:
    choice = _at_choice(output, batch, "loss")
    if choice is not None:
        return functional.cross_entropy(*choice, reduction="none")
    return _next(output, batch, lambda logits, ids: functional.cross_entropy(logits, ids, reduction="none"))


def _accuracy(output: Any, batch: Batch) -> torch.Tensor:
    choice = _at_choice(output, batch, "accuracy")
    if choice is not None:
        return (choice[0].argmax(-1) == choice[1]).double()
    return _next(output, batch, lambda logits, ids: (logits.argmax(-1) == ids).double())


def _logit_difference(output: Any, batch: Batch) -> torch.Tensor:
    answers = need_answers(batch, "logit_difference")
    if batch.foils is None:
        raise DataError("'logit_difference' needs a foil for each prompt: data=[(prompt, answer, foil), ...]")
    logits = logits_at(output, batch.inputs)
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, answers] - logits[rows, batch.foils]


def _class_score(output: Any, batch: Batch) -> torch.Tensor:
    logits, classes = class_logits(output), need_classes(batch, "class_score")
    if int(classes.max()) >= logits.shape[1]:
        raise DataError(f"there is no class {int(classes.max())}: the network has {logits.shape[1]}")
    return logits[torch.arange(len(logits), device=logits.device), classes]


def _similarity(output: Any, batch: Batch) -> torch.Tensor:
    if batch.rows != 2:
        raise DataError("'similarity' needs pairs of texts: data=[(one, other), ...]")
    both = embeddings(output, batch)
    return (both[0::2] * both[1::2]).sum(-1)


def _log_probabilities(output: Any, batch: Batch) -> torch.Tensor:
    if batch.answers is not None:
        return logits_at(output, batch.inputs).log_softmax(-1)
    return _logits(output).log_softmax(-1)


def _kl(output: Any, batch: Batch, reference: torch.Tensor) -> torch.Tensor:
    now = _log_probabilities(output, batch)
    if len(reference) < len(now):
        reference = reference.repeat(len(now) // len(reference), *[1] * (reference.ndim - 1))
    divergence = (reference.exp() * (reference - now)).sum(-1)
    if divergence.ndim == 1 or batch.mask is None:
        return divergence if divergence.ndim == 1 else divergence.mean(1)
    weight = batch.mask.to(divergence.dtype)
    return (divergence * weight).sum(1) / weight.sum(1)


def _shift(output: Any, batch: Batch, reference: torch.Tensor) -> torch.Tensor:
    now = embeddings(output, batch)
    if len(reference) < len(now):
        reference = reference.repeat(len(now) // len(reference), 1)
    shift = 1 - (now * reference).sum(-1)
    return shift.view(-1, batch.rows).mean(1)


NAMED: dict[str, Measured] = {
    "loss": _loss,
    "accuracy": _accuracy,
    "logit_difference": _logit_difference,
    "class_score": _class_score,
    "similarity": _similarity,
}
COMPARING: dict[str, tuple[Measured, Callable[[Any, Batch, Any], torch.Tensor]]] = {
    "kl": (_log_probabilities, _kl),
    "embedding_shift": (embeddings, _shift),
}
