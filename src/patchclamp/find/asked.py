"""Which token, or which class, a user means who writes a string or a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patchclamp.errors import DataError, unknown, warn
from patchclamp.model import Model
from patchclamp.model.tokenize import require_tokenizer


def token_id(model: Model, wanted: str | int, what: str = "target") -> int:
    """The id of a token given as a string or as an id. Of a string that is several tokens, the first.

    Args:
        model: a model with a tokenizer, if `wanted` is a string.
        wanted: the string as it stands in a text, with its space (`" Paris"`), or an id.
        what: the name of the argument, for messages.

    Raises:
        DataError: an empty string, one that the vocabulary does not have, or something else.
        UnknownName: no such id.
    """
    if isinstance(wanted, bool) or not isinstance(wanted, (str, int)):
        raise DataError(f"{what} is a token, as a string or an id, not {wanted!r:.60}")
    if isinstance(wanted, int):
        size = vocabulary_size(model)
        if wanted < 0 or (size is not None and wanted >= size):
            raise unknown("token id", wanted, [0, size - 1] if size else [], f"{what} is an id, from 0 on.")
        return wanted
    reader = require_tokenizer(model.reader, f"{what}={wanted!r}")
    if not wanted:
        raise DataError(f"{what} is empty: give a token, as in {what}=' the'")
    ids: list[int] = list(model.tokenizer(wanted, add_special_tokens=False)["input_ids"])
    if len(ids) != 1 and (exact := _reading_as(model, wanted)) is not None:
        # Some tokenizers put a space before every text, so that a token with its space becomes two.
        return exact
    unknown_id = getattr(model.tokenizer, "unk_token_id", None)
    if not ids or (ids[0] == unknown_id and wanted.strip() != model.tokenizer.unk_token):
        raise DataError(f"{what}={wanted!r} is no token of this vocabulary")
    if len(ids) > 1:
        parts = ", ".join(repr(each) for each in reader.strings(ids))
        warn(f"{what}={wanted!r} is not one token: it becomes {parts}; the first is used")
    return ids[0]


def token_ids(model: Model, wanted: str | int | Sequence[str | int], examples: int, what: str = "tokens") -> list[int]:
    """One id for each example; one token is meant for all.

    Raises:
        DataError: not as many as examples; as `token_id`.
    """
    if isinstance(wanted, (str, int)):
        return [token_id(model, wanted, what)] * examples
    listed = [token_id(model, each, what) for each in wanted]
    if len(listed) != examples:
        raise DataError(f"{what} holds {len(listed)} tokens for {examples} examples")
    return listed


def class_number(model: Model, wanted: str | int, classes: int, what: str = "target") -> int:
    """The number of a class given by its name in the configuration, or by its number.

    Raises:
        UnknownName: no such class.
    """
    names: dict[int, str] = class_names(model)
    if isinstance(wanted, str):
        found = [number for number, name in names.items() if name == wanted]
        if not found:
            raise unknown("class", wanted, names.values(), "" if names else f"Give a number from 0 to {classes - 1}.")
        return found[0]
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise DataError(f"{what} is a class, by its name or its number, not {wanted!r:.60}")
    if not 0 <= wanted < classes:
        raise unknown("class", wanted, [f"0 to {classes - 1}"])
    return wanted


def class_names(model: Model) -> dict[int, str]:
    """Number -> name, as the configuration says; empty where it does not."""
    labels = getattr(getattr(model.module, "config", None), "id2label", None) or {}
    return {int(number): str(name) for number, name in labels.items()}


def vocabulary_size(model: Model) -> int | None:
    """How many token ids the unembedding, or else the embedding, or the tokenizer has."""
    module: Any = model.module
    for name in ("get_output_embeddings", "get_input_embeddings"):
        found = getattr(module, name, lambda: None)()
        weight = getattr(found, "weight", None)
        if weight is not None:
            return len(weight)
    return None if model.tokenizer is None else len(model.tokenizer)


def _reading_as(model: Model, wanted: str) -> int | None:
    reader = require_tokenizer(model.reader, "a token")
    size = len(model.tokenizer)
    found = [number for number, each in enumerate(reader.strings(range(size))) if each == wanted]
    return found[0] if found else None
