"""Conversations: what `Chats` takes, how templates render them, and which characters are whose."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from patchclamp.data import Chats, Texts, as_data
from patchclamp.errors import DataError, ModelError

CHATML = "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
TRIMMED = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
GENERATION = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)
FOLDED = (  # the system's words go into the first turn of the user
    "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]"
    "{% if loop.first and messages[0]['role'] == 'system' %}<<{{ messages[0]['content'] }}>>{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }};{% endfor %}"
)
LOUD = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
CUTTING = "{% for m in messages %}{{ m['role'] }}={{ m['content'].split('</think>')[-1] }};{% endfor %}"

TALK = [
    {"role": "system", "content": "Be user friendly."},
    {"role": "user", "content": " user "},
    {"role": "assistant", "content": "user?"},
    {"role": "user", "content": "a"},
]


def refuses(message: str, error: type[Exception] = DataError):
    return pytest.raises(error, match=re.escape(message))


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")
    made.chat_template = template
    return made


def pieces(template: str, talk: Any = TALK, **options: Any) -> tuple[str, list[tuple[str, str]]]:
    """The rendered text, and (role, what of the text is of that role) of each span."""
    (example,) = Chats([talk], **options).rendered(tokenizer(template))
    return example.text, [(span.label, example.text[span.start : span.end]) for span in example.token_labels["role"]]


@pytest.mark.parametrize("template", [CHATML, TRIMMED, GENERATION, FOLDED])
def test_text_is_what_the_tokenizer_renders(template: str) -> None:
    text, _ = pieces(template)
    assert text == tokenizer(template).apply_chat_template(TALK, tokenize=False)


@pytest.mark.parametrize("template", [CHATML, FOLDED])
def test_spans_are_the_contents_and_not_their_like_in_the_template(template: str) -> None:
    _, found = pieces(template)
    assert found == [(each["role"], each["content"]) for each in TALK]


def test_contents_that_the_template_strips() -> None:
    text, found = pieces(TRIMMED)
    assert found == [(each["role"], each["content"].strip()) for each in TALK]
    assert text.startswith("[system]Be user friendly.[user]user[assistant]user?")


def test_what_the_template_marks_as_generated_is_the_assistants() -> None:
    _, found = pieces(GENERATION)
    assert [piece for role, piece in found if role == "assistant"] == ["user?<end>"]
    assert [piece for role, piece in found if role == "user"] == [" user ", "a"]


def test_contents_that_a_template_shortens_are_found_where_they_can_be() -> None:
    talk = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "<think>so</think>yes"}]
    with refuses("conversation 0 of conversations: message 1 (of the assistant) cannot be found"):
        pieces(CUTTING, talk)
    # With nothing to shorten, the mark in its stead shows the place.
    assert pieces(CUTTING, [{"role": "user", "content": "why"}])[1] == [("user", "why")]


def test_variables_of_the_template() -> None:
    template = "{{ date }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tools | length if tools else '' }}"
    text, found = pieces(
        template, [{"role": "user", "content": "Hi"}], variables={"date": "today", "tools": [{"a": 1}]}
    )
    assert (text, found) == ("todayHi1", [("user", "Hi")])


def test_messages_without_content_have_no_span() -> None:
    talk = [{"role": "user", "content": ""}, {"role": "assistant", "content": None, "tool_calls": [{"f": 1}]}]
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if 'content' in m else 'call' }}{% endfor %}"
    assert pieces(template, talk) == ("<user><assistant>call", [])


@pytest.mark.parametrize(
    ("template", "talk", "error", "says"),
    [
        (None, TALK, ModelError, "has no chat template, so conversations cannot be rendered"),
        (
            STRICT,
            TALK,
            DataError,
            "conversation 0 of conversations: the chat template refuses it: TemplateError: roles",
        ),
        (LOUD, TALK, DataError, "message 0 (of the system) cannot be found in what the chat template renders"),
    ],
)
def test_templates_that_will_not_do(template: str | None, talk: Any, error: type[Exception], says: str) -> None:
    with refuses(says, error):
        list(Chats([talk]).rendered(tokenizer(template)))


# What it takes ------------------------------------------------------------------------------------


def test_labels_and_roles() -> None:
    chats = Chats([TALK, TALK[1:3]], labels={"source": ["web", "book"]})
    assert chats.labels == {"source": ("book", "web")}
    assert chats.token_labels == {"role": ("assistant", "system", "user", "template")}
    assert [len(each.messages) for each in chats] == [4, 2] and len(chats) == 2
    assert repr(chats) == "Chats('conversations', labels: source)"
    assert as_data(chats) is chats


def test_a_file_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"talk": TALK, "source": each}) + "\n" for each in ("web", "book")))
    chats = Chats(path, ["source"], column="talk")
    assert [each.labels["source"] for each in chats] == ["web", "book"]
    assert next(iter(chats)).messages == tuple(TALK)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no examples in conversations"),
        (
            TALK,
            "conversation 0 of conversations: it is a single message; for a single conversation write pc.Chats(",
        ),
        ([[]], "conversation 0 of conversations: the conversation has no messages"),
        ([TALK, "hello"], "conversation 1 of conversations: a conversation is a list of messages, not str"),
        ([["hello"]], "message 0 is not a dict with role and content but str"),
        ([[{"content": "hi"}]], "message 0 has no role: it has 'content'"),
        ([[{"role": 3, "content": "hi"}]], "message 0 has no role"),
        ([[{"role": "user"}]], "the content of message 0 is None: expected str"),
        ([[{"role": "user", "content": ["hi"]}]], "the content of message 0 is ['hi']: expected str, got list"),
        (Texts(["a"]), "this is pc.Texts already"),
        ("talk.csv", "'talk.csv' is not a file of conversations"),
        ({"a": TALK}, "a dict is a table, not conversations"),
    ],
)
def test_what_is_no_conversation(given: Any, says: str) -> None:
    with refuses(says):
        Chats(given)


def test_a_label_called_role_and_labels_of_the_wrong_length() -> None:
    with refuses("has a label 'role'"):
        Chats([TALK], labels={"role": ["x"]})
    with refuses("label 'source' has 2 values, but there are 1 examples in conversations"):
        Chats([TALK], labels={"source": ["x", "y"]})


def test_conversations_given_as_texts_are_shown_the_way() -> None:
    with refuses("Conversations go into pc.Chats"):
        Texts([TALK])
