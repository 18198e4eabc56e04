"""Data as a test reads it: batches of a network's own inputs, with what the answer should be.

A list of texts, `Texts`, `Images` or `Tensors`; prompts with an answer; or pairs of texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from patchclamp.data import Chats, Images, Tensors, Texts, as_data
from patchclamp.errors import DataError, ModelError, unknown
from patchclamp.model.model import Model
from patchclamp.model.signature import accepts
from patchclamp.model.tokenize import pad, require_tokenizer


@dataclass(frozen=True)
class Prompt:
    """A text, the token that should come next, and one that should not.

    Attributes:
        text: the beginning.
        answer: the continuation; its first token counts.
        foil: another continuation, for `"logit_difference"`.
    """

    text: str
    answer: str
    foil: str | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples as the network reads them.

    Attributes:
        inputs: keyword arguments of the module, or one tensor.
        examples: `[examples]` int64, which of the data.
        rows: how many rows of the inputs an example has: 2 for pairs of texts.
        texts: the texts of the rows, or None.
        labels: name of a label -> value of each example.
        classes: `[examples]` int64, the number of each example's class, or None.
        answers: `[examples]` int64, the token that should come next, or None.
        foils: the same of one that should not.
    """

    inputs: Any
    examples: np.ndarray
    rows: int = 1
    texts: list[str] | None = None
    labels: Mapping[str, list[str]] = field(default_factory=dict)
    classes: torch.Tensor | None = None
    answers: torch.Tensor | None = None
    foils: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def mask(self) -> torch.Tensor | None:
        """`[rows, tokens]` bool, or None without tokens."""
        mask = self.inputs.get("attention_mask") if isinstance(self.inputs, Mapping) else None
        return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    @property
    def tokens(self) -> int:
        """Positions of the rectangle, padding included."""
        first = next(iter(self.inputs.values())) if isinstance(self.inputs, Mapping) else self.inputs
        return first.shape[0] * (first.shape[1] if self.mask is not None else 1)

    def run(self, model: Model) -> Any:
        """The network's output."""
        return model.module(**self.inputs) if isinstance(self.inputs, Mapping) else model.module(self.inputs)

    def repeated(self, times: int) -> Batch:
        """The same examples so many times, one copy after another."""
        if times == 1:
            return self
        count = len(self.examples) * self.rows
        if isinstance(self.inputs, Mapping):
            inputs: Any = {name: repeated(each, times, count) for name, each in self.inputs.items()}
        else:
            inputs = repeated(self.inputs, times, count)
        return Batch(
            inputs,
            np.tile(self.examples, times),
            self.rows,
            None if self.texts is None else self.texts * times,
            {name: values * times for name, values in self.labels.items()},
            *(None if each is None else each.repeat(times) for each in (self.classes, self.answers, self.foils)),
        )


def repeated(value: Any, times: int, count: int) -> Any:
    """A tensor with one row for each of `count` repeated so often; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


def read(model: Model, data: Any, batch_tokens: int = 2048, label: str | None = None) -> list[Batch]:
    """The batches of a data set; texts of like length together.

    Args:
        model: who reads them.
        data: texts, images, tensors, `Prompt`s (or `(text, answer, foil)`), or pairs `(text, text)`.
        batch_tokens: how many tokens (of images and tensors: examples times 128) a batch holds at most.
        label: which label says the class, where there are several.

    Raises:
        DataError: no examples, or data of another kind.
    """
    listed = list(data) if isinstance(data, (list, tuple)) else None
    if listed and all(isinstance(each, Prompt) or _is_triple(each) for each in listed):
        prompts = [each if isinstance(each, Prompt) else Prompt(*each) for each in listed]
        return _prompts(model, prompts, batch_tokens)
    if listed and all(isinstance(each, (tuple, list)) and len(each) == 2 and _texts(each) for each in listed):
        return _pairs(model, [tuple(each) for each in listed], batch_tokens)
    if isinstance(data, (list, tuple)) and len(data) == 2 and isinstance(data[0], (torch.Tensor, np.ndarray)):
        data = Tensors(data[0], labels={"class": np.asarray(data[1]).tolist()})
    if isinstance(data, str):
        data = [data]
    given = as_data(data)
    if isinstance(given, Chats):
        raise DataError("tests read texts: render the conversations first, with the model's chat template")
    if isinstance(given, Texts):
        return _of_texts(model, given, batch_tokens, label)
    if not len(given):
        raise DataError(f"there are no examples in {given.name}")
    return _of_arrays(model, given, max(1, batch_tokens // 128), label)


def _of_texts(model: Model, data: Texts, batch_tokens: int, label: str | None) -> list[Batch]:
    examples = list(data)
    if not examples:
        raise DataError(f"there are no examples in {data.name}")
    labels = {name: [each.labels[name] for each in examples] for name in data.labels}
    classes = _classes(model, labels, label)
    ids = _ids(model, [each.text for each in examples])
    found = []
    for rows in _of_like_length(ids, batch_tokens):
        found.append(
            Batch(
                _inputs(model, [ids[row] for row in rows]),
                rows,
                texts=[examples[row].text for row in rows],
                labels={name: [values[row] for row in rows] for name, values in labels.items()},
                classes=None if classes is None else classes[rows],
            )
        )
    return found


def _prompts(model: Model, prompts: list[Prompt], batch_tokens: int) -> list[Batch]:
    for each in prompts:
        if each.foil is not None and each.foil == each.answer:
            raise DataError(f"answer and foil of {each.text!r:.60} are the same: {each.answer!r}")
    ids = _ids(model, [each.text for each in prompts], end=False)
    answers = torch.tensor([first_token(model, each.text, each.answer) for each in prompts])
    foils = None
    if all(each.foil is not None for each in prompts):
        foils = torch.tensor([first_token(model, each.text, each.foil or "") for each in prompts])
        same = (answers == foils).nonzero()
        if len(same):
            prompt = prompts[int(same[0])]
            raise DataError(f"{prompt.answer!r} and {prompt.foil!r} begin with the same token")
    return [
        Batch(
            _inputs(model, [ids[row] for row in rows]),
            rows,
            texts=[prompts[row].text for row in rows],
            answers=answers[rows].to(model.device),
            foils=None if foils is None else foils[rows].to(model.device),
        )
        for rows in _of_like_length(ids, batch_tokens)
    ]


def _pairs(model: Model, pairs: list[tuple[str, ...]], batch_tokens: int) -> list[Batch]:
    ids = _ids(model, [text for pair in pairs for text in pair])
    longest = [max(ids[2 * row], ids[2 * row + 1], key=len) for row in range(len(pairs))]
    found = []
    for rows in _of_like_length(longest, batch_tokens // 2):
        both = [ids[2 * row + side] for row in rows for side in (0, 1)]
        found.append(Batch(_inputs(model, both), rows, 2, [text for row in rows for text in pairs[row]]))
    return found


def _of_arrays(model: Model, data: Images | Tensors, together: int, label: str | None) -> list[Batch]:
    if isinstance(data, Images):
        values = data.label_values
        labels = {name: list(values[name]) for name in data.labels}
    else:
        labels = {name: [each.labels[name] for each in data] for name in data.labels}
    classes = _classes(model, labels, label)
    found = []
    for start in range(0, len(data), together):
        rows = np.arange(start, min(start + together, len(data)))
        inputs: Any = _pixels(model, data, rows) if isinstance(data, Images) else data.values[rows].to(model.device)
        found.append(
            Batch(
                inputs,
                rows,
                labels={name: [values[row] for row in rows] for name, values in labels.items()},
                classes=None if classes is None else classes[rows],
            )
        )
    return found


def _pixels(model: Model, data: Images, rows: np.ndarray) -> Any:
    inputs = data.inputs(rows, model.processor)
    weight = next((each for each in model.module.parameters() if each.is_floating_point()), None)
    dtype = torch.float32 if weight is None else weight.dtype
    found = {
        name: each.to(model.device, dtype) if each.is_floating_point() else each.to(model.device)
        for name, each in inputs.items()
    }
    return found if accepts(model.module, "pixel_values") else found["pixel_values"]


def _classes(model: Model, labels: Mapping[str, list[str]], label: str | None) -> torch.Tensor | None:
    """The number of each example's class; None where no label says it."""
    if label is not None and label not in labels:
        raise unknown("label of the data", label, labels)
    if label is None and len(labels) != 1:
        return None
    values = labels[label if label is not None else next(iter(labels))]
    names = {str(name): int(number) for name, number in (_config(model, "label2id") or {}).items()}
    if all(value in names for value in values):
        return torch.tensor([names[value] for value in values]).to(model.device)
    if all(value.isascii() and value.isdigit() for value in values):
        return torch.tensor([int(value) for value in values]).to(model.device)
    return None


def _config(model: Model, name: str) -> Any:
    return getattr(getattr(model.module, "config", None), name, None)


def _ids(model: Model, texts: Sequence[str], end: bool = True) -> list[list[int]]:
    reader = require_tokenizer(model.reader, "a text")
    encoded = reader.encode(texts)
    ids = []
    for text, each in zip(texts, encoded, strict=True):
        kept = list(each.ids)
        # A token that marks the end of a text would stand between a prompt and its answer.
        while not end and len(kept) > 1 and each.special[len(kept) - 1]:
            kept.pop()
        if not kept:
            raise DataError(f"the text {text!r} has no tokens")
        ids.append(kept)
    return ids


def _inputs(model: Model, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    reader = require_tokenizer(model.reader, "a text")
    return model.text_inputs(pad(ids, reader.pad_id, model.safe_padding_side))


def first_token(model: Model, text: str, answer: str) -> int:
    """The first token of a continuation, as the tokenizer splits it after the text.

    Raises:
        DataError: the continuation has no tokens.
    """
    before, after = _ids(model, [text, text + answer], end=False)
    # Where a token spans both, the continuation by itself says which token it begins with.
    same = before == after[: len(before)] and len(after) > len(before)
    if same:
        return after[len(before)]
    tokenizer = model.tokenizer
    alone = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not alone:
        raise DataError(f"the answer {answer!r} has no tokens")
    return int(alone[0])


def _of_like_length(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterable[np.ndarray]:
    order = np.argsort([len(each) for each in ids], kind="stable")
    rows: list[int] = []
    for row in order[::-1]:
        if rows and (len(rows) + 1) * len(ids[rows[0]]) > batch_tokens:
            yield np.asarray(rows)
            rows = []
        rows.append(int(row))
    if rows:
        yield np.asarray(rows)


def _is_triple(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 3 and _texts(value)


def _texts(values: Iterable[Any]) -> bool:
    return all(isinstance(each, str) for each in values)


def need_answers(batch: Batch, metric: str) -> torch.Tensor:
    """The answers of a batch.

    Raises:
        DataError: the data has none.
    """
    if batch.answers is None:
        raise DataError(f"{metric!r} needs prompts with answers: data=[(prompt, answer, foil), ...]")
    return batch.answers


def need_classes(batch: Batch, metric: str) -> torch.Tensor:
    """The classes of a batch.

    Raises:
        ModelError: the data does not say them.
    """
    if batch.classes is None:
        raise ModelError(
            f"{metric!r} needs the class of each example: one label whose values are class numbers, or names that the "
            "model's config knows"
        )
    return batch.classes
