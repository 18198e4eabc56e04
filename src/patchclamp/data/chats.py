"""`Chats`: conversations of a model that answers, rendered as the model's own chat template renders them.

Each token knows whose it is: the token label `role` has a category for every role ("system", "user",
"assistant", ...), and "template" for what the template writes around the messages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patchclamp.data.chat_template import TemplateMismatch, rendered
from patchclamp.data.labelled import Labelled
from patchclamp.data.labels import Unusable, text_of
from patchclamp.data.sources import source_of
from patchclamp.data.texts import Example
from patchclamp.data.token_labels import with_unlabelled
from patchclamp.errors import DataError, ModelError

ROLE = "role"
TEMPLATE = "template"
RESPONSE = "assistant"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation: its messages as they were given, each with `role` and `content`, and its labels."""

    messages: tuple[Mapping[str, Any], ...]
    labels: Mapping[str, str]


class Chats(Labelled[Conversation]):
    """Conversations with labels, in a fixed order; iterate over it to get `Conversation`s.

    Args:
        source: conversations, each a list of messages `{"role": ..., "content": ...}`: in a list or iterable, a
            `.jsonl` or `.parquet` file, or a data set of Hugging Face `datasets`.
        labels: one value per conversation, as for `pc.Texts`.
        column: column that holds the messages.
        variables: what else the template reads, as `{"tools": [...]}` or `{"enable_thinking": False}`.
        name: how reports call these data; by default the file's name, or "conversations".

    Raises:
        DataError: as for `pc.Texts`; a conversation without messages, a message without a role, or
            content that is no `str`.

    Example:
        >>> chats = Chats([[{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]])
        >>> chats.token_labels
        {'role': ('assistant', 'user', 'template')}
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[Sequence[Mapping[str, Any]]] | Any,
        labels: Mapping[str, Iterable[object] | str] | Sequence[str] | str | None = None,
        *,
        column: str = "messages",
        variables: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(source, Labelled):
            raise DataError(f"this is pc.{type(source).__name__} already; use it as it is")
        found = source_of(source, name, kind="conversation", maker="pc.Chats")
        if not found.has_columns and column != "messages":
            raise DataError(f"{name or found.name} has no columns, so column={column!r} means nothing")
        super().__init__(found, labels, column, name)
        if ROLE in self._labels:
            raise DataError(f"{self.name} has a label {ROLE!r}, which is what the tokens' roles are called: rename it")
        self._variables = dict(variables or {})
        self._roles: tuple[str, ...] | None = None
        self._check_start(whole=True)

    @property
    def token_labels(self) -> dict[str, tuple[str, ...]]:
        """`{"role": (roles that occur, sorted, ..., "template")}`. The first use reads the data through once."""
        if self._roles is None:
            roles = {str(each["role"]) for conversation in self for each in conversation.messages}
            self._roles = with_unlabelled(roles, TEMPLATE)
        return {ROLE: self._roles}

    def rendered(self, tokenizer: Any) -> Iterator[Example]:
        """Each conversation as the text that the tokenizer's chat template makes of it, with spans `role`.

        Where the template marks what the model writes (`{% generation %}`), exactly that is the assistant's; else,
        and for every other role, the content of the messages.

        Raises:
            ModelError: the tokenizer has no chat template.
            DataError: the template refuses a conversation, or does not show a message as it is.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"the tokenizer ({type(tokenizer).__name__}) has no chat template, so {self.name} cannot be rendered: "
                "set tokenizer.chat_template, or pass texts that you rendered yourself (pc.Texts)"
            )
        return self._rendered(tokenizer)

    def _rendered(self, tokenizer: Any) -> Iterator[Example]:
        for index, conversation in enumerate(self):
            try:
                text, spans = rendered(tokenizer, conversation.messages, self._variables, RESPONSE)
            except TemplateMismatch as reason:
                raise DataError(f"conversation {index} of {self.name}: {reason}") from reason.__cause__
            yield Example(text, conversation.labels, None, {ROLE: spans})

    def _example(self, index: int, values: Sequence[object]) -> Conversation:
        return Conversation(_messages(values[0]), self._labels_of(index, values))


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, Mapping) and "role" in value:
        raise Unusable("it is a single message; for a single conversation write pc.Chats([messages])")
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise Unusable(f"a conversation is a list of messages, not {type(value).__name__}")
    messages = tuple(value)
    if not messages:
        raise Unusable("the conversation has no messages")
    for number, each in enumerate(messages):
        if not isinstance(each, Mapping):
            raise Unusable(f"message {number} is not a dict with role and content but {type(each).__name__}")
        if not isinstance(each.get("role"), str) or not each["role"]:
            there = ", ".join(map(repr, each)) or "nothing"
            raise Unusable(f"message {number} has no role: it has {there}")
        # A message that calls a tool may have nothing else to say.
        if each.get("content") is not None or len(set(each) - {"role", "content"}) == 0:
            text_of(each.get("content"), f"the content of message {number}")
    return messages
