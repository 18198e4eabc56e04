"""A conversation as a chat template renders it, and which characters of the text come from which message."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from patchclamp.data.token_labels import Span

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateMismatch(Exception):
    """Why a conversation cannot be rendered, or its messages not be found in what was rendered."""


def rendered(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], response: str
) -> tuple[str, tuple[Span, ...]]:
    """The text, and its spans by role, in order.

    Raises:
        TemplateMismatch: the template refuses the messages, or shows one of them in another form.
    """
    template = tokenizer.get_chat_template(tools=variables.get("tools"))
    marks_response = bool(_GENERATION.search(template))
    text, generated = _render(tokenizer, template, messages, variables, marks_response)
    sought = [
        number
        for number, each in enumerate(messages)
        if (each.get("content") or "").strip() and not (marks_response and each["role"] == response)
    ]
    places = _places_by_marks(tokenizer, template, messages, variables, sought, text)
    if places is None:
        places = _places_by_search(messages, sought, text)
    spans = [Span(*places[number], messages[number]["role"]) for number in sought]
    spans += [Span(start, end, response) for start, end in generated if start < end]
    return text, tuple(sorted(spans))


def _render(
    tokenizer: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    marks_response: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    # What apply_chat_template calls itself; that one gives the places of what is generated in tokens only, and
    # stops at a place where no token begins.
    from transformers.utils.chat_template_utils import render_jinja_template

    # As it does: a key without a value is no key, because templates write "None" for it.
    given = [{key: value for key, value in each.items() if value is not None} for each in messages]
    try:
        texts, generated = render_jinja_template(
            conversations=[given],
            chat_template=template,
            return_assistant_tokens_mask=marks_response,
            **{**tokenizer.special_tokens_map, **variables},
        )
    except Exception as error:  # a template may raise whatever it likes
        raise TemplateMismatch(f"the chat template refuses it: {type(error).__name__}: {error}") from error
    return texts[0], [(int(start), int(end)) for start, end in generated[0]] if generated else []


def _places_by_marks(
    tokenizer: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    sought: Sequence[int],
    text: str,
) -> dict[int, tuple[int, int]] | None:
    """The place of each content, from a rendering with a mark in its stead; None where that gives another text.

    So a content that also occurs in the template ("user") is not mistaken for it.
    """
    marks = {number: f"\ue000{number}\ue001" for number in sought}
    marked = [{**each, "content": marks[number]} if number in marks else each for number, each in enumerate(messages)]
    try:
        frame, _ = _render(tokenizer, template, marked, variables)
    except TemplateMismatch:
        return None
    pieces = re.split("\ue000(\\d+)\ue001", frame)
    order = [int(each) for each in pieces[1::2]]
    if sorted(order) != sorted(sought):
        return None
    at = len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    found: dict[int, tuple[int, int]] = {}
    for number, piece in zip(order, pieces[2::2], strict=True):
        content = messages[number]["content"]
        # Many templates strip the content.
        for form in (content, content.strip(), content.rstrip(), content.lstrip()):
            if text.startswith(form + piece, at):
                found[number] = (at, at + len(form))
                at += len(form) + len(piece)
                break
        else:
            return None
    return found if at == len(text) else None


def _places_by_search(
    messages: Sequence[Mapping[str, Any]], sought: Sequence[int], text: str
) -> dict[int, tuple[int, int]]:
    """The place of each content where it occurs once after the one before."""
    found: dict[int, tuple[int, int]] = {}
    at = 0
    for number in sought:
        role, content = messages[number]["role"], messages[number]["content"].strip()
        times = text.count(content, at)
        if times != 1:
            how = "does not show it as it is" if times == 0 else "shows it more than once"
            raise TemplateMismatch(
                f"message {number} (of the {role}) cannot be found in what the chat template renders, which {how}: "
                "render the conversations yourself and pass pc.Texts(..., token_labels=...)"
            )
        start = text.index(content, at)
        found[number] = (start, start + len(content))
        at = start + len(content)
    return found
