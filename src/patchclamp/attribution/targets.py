"""Targets: one number for each example, of what a network returns; what gradients are taken of.

A target is any `(output, inputs) -> [examples]`, where `inputs` are the keyword arguments of the call. Those here say
at which token: by default at the last real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from patchclamp.errors import DataError, ModelError
from patchclamp.model.hooks import first_tensor
from patchclamp.model.model import Model

Target = Callable[[Any, Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True, eq=False)
class OfExamples:
    """A target that knows which example is which: it can be asked for some of them, or for each several times.

    Attributes:
        measure: `(output, inputs, *given) -> [examples]`.
        given: what it names: one for all examples, or one for each.
    """

    measure: Callable[..., torch.Tensor]
    given: tuple[Any, ...] = ()

    def __call__(self, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """`[examples]`."""
        return self.measure(output, inputs, *self.given)

    def rows(self, examples: Sequence[int], of: int) -> OfExamples:
        """The same target for these examples out of so many, in this order.

        Raises:
            DataError: it names something for each of another number of examples.
        """
        return OfExamples(self.measure, tuple(_rows(each, examples, of) for each in self.given))


def logit(token: int | Sequence[int], position: int = -1) -> Target:
    """The logit of a token id (one for all examples, or one for each) at a position of the text, padding left out."""
    return OfExamples(lambda output, inputs, given: _of(logits_at(output, inputs, position), given), (token,))


def log_probability(token: int | Sequence[int], position: int = -1) -> Target:
    """The logarithm of a token's probability, in nats."""
    return OfExamples(
        lambda output, inputs, given: _of(logits_at(output, inputs, position).log_softmax(-1), given), (token,)
    )


def probability(token: int | Sequence[int], position: int = -1) -> Target:
    """The probability of a token."""
    return OfExamples(
        lambda output, inputs, given: _of(logits_at(output, inputs, position).softmax(-1), given), (token,)
    )


def logit_difference(token: int | Sequence[int], foil: int | Sequence[int], position: int = -1) -> Target:
    """The logit of a token less that of another."""

    def measure(output: Any, inputs: Mapping[str, Any], right: Any, wrong: Any) -> torch.Tensor:
        logits = logits_at(output, inputs, position)
        return _of(logits, right) - _of(logits, wrong)

    return OfExamples(measure, (token, foil))


def class_logit(number: int | Sequence[int]) -> Target:
    """The logit of a class, of a network that returns `[examples, classes]`."""
    return OfExamples(lambda output, _inputs, given: _of(class_logits(output), given), (number,))


def class_probability(number: int | Sequence[int]) -> Target:
    """The probability of a class, of a network that returns `[examples, classes]`."""
    return OfExamples(lambda output, _inputs, given: _of(class_logits(output).softmax(-1), given), (number,))


def next_token_loss() -> Target:
    """The mean cross entropy of each example's next tokens, in nats, padding left out."""
    return OfExamples(_next_token_loss)


def similarity(model: Model, texts: str | Sequence[str]) -> Target:
    """The cosine of each example's embedding with that of a fixed text (one for all examples, or one for each).

    An embedding is the mean over real tokens of the last hidden state, as in `model.embed`.
    """
    fixed = model.embed(texts)
    return OfExamples(_cosine, (fixed[0] if len(fixed) == 1 else fixed,))


def logits_at(output: Any, inputs: Mapping[str, Any], position: int = -1) -> torch.Tensor:
    """The logits `[examples, vocabulary]` at a token of each text; negative positions count from the end of the text.

    Raises:
        ModelError: the output has no logits per token.
        DataError: a text does not have that position.
    """
    logits = getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None else logits
    if logits is None or logits.ndim != 3:
        raise ModelError("the network gives no logits for each token")
    name = "decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask"
    mask = inputs.get(name)
    if mask is None or mask.ndim != 2 or mask.shape[1] != logits.shape[1]:
        mask = torch.ones(logits.shape[:2], dtype=torch.long, device=logits.device)
    number = mask.long().cumsum(1) - 1
    wanted = number[:, -1:] + 1 + position if position < 0 else torch.full_like(number[:, :1], position)
    there = (number == wanted) & mask.bool()
    if not bool(there.any(1).all()):
        short = int((~there.any(1)).nonzero()[0])
        raise DataError(f"example {short} has {int(mask[short].sum())} tokens, and no position {position}")
    return logits[torch.arange(len(logits), device=logits.device), there.long().argmax(1)]


def class_logits(output: Any) -> torch.Tensor:
    """The logits `[examples, classes]` of a classifier.

    Raises:
        ModelError: the output has none.
    """
    logits = getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None else logits
    if logits is None or logits.ndim != 2:
        raise ModelError("the network gives no logits of classes, [examples, classes]")
    return logits


def _of(values: torch.Tensor, number: int | Sequence[int]) -> torch.Tensor:
    index = torch.as_tensor(number, device=values.device, dtype=torch.long)
    if index.ndim == 0:
        index = index.expand(len(values))
    if index.shape != values.shape[:1]:
        raise DataError(f"one token (or class) for each of {len(values)} examples, not {list(index.shape)}")
    wrong = (index < 0) | (index >= values.shape[1])
    if bool(wrong.any()):
        raise DataError(f"there is no token or class {int(index[wrong][0])}; there are {values.shape[1]}")
    return values.gather(1, index[:, None])[:, 0]


def _rows(given: Any, examples: Sequence[int], of: int) -> Any:
    if isinstance(given, torch.Tensor):
        for_all = given.ndim == 0 or (given.ndim == 1 and given.is_floating_point())
    else:
        for_all = not isinstance(given, (list, tuple, range)) and getattr(given, "ndim", 0) == 0
    if for_all:
        return given
    if len(given) != of:
        raise DataError(f"the target names something for each of {len(given)} examples, and there are {of}")
    return torch.as_tensor(given)[list(examples)]


def _next_token_loss(output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    stack = "decoder_" if "decoder_input_ids" in inputs else ""
    logits, ids = getattr(output, "logits", None), inputs.get(f"{stack}input_ids")
    if logits is None or ids is None or logits.shape[:2] != ids.shape:
        raise ModelError(f"{type(output).__name__} has no logits of a next token for each token of the inputs")
    mask = inputs.get(f"{stack}attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    counted = (mask[:, 1:] * mask[:, :-1]).to(losses.dtype)
    return (losses * counted).sum(1) / counted.sum(1).clamp(min=1)


def _cosine(output: Any, inputs: Mapping[str, Any], fixed: torch.Tensor) -> torch.Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ModelError(f"{type(output).__name__} has no last hidden state to embed with")
    mask = inputs.get("attention_mask")
    weight = (torch.ones(hidden.shape[:2]) if mask is None else mask)[..., None].to(hidden)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return (functional.normalize(mean, dim=-1) * fixed.to(hidden)).sum(-1)
