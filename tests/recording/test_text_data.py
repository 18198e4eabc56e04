"""Labels of tokens, positions and conversations, each against texts that are run one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.text_data import (
    SIDES,
    TEXTS,
    assert_moments,
    in_form,
    label_of_rows,
    model_of,
    refuses,
    rows_alone,
    texts_in_words,
)
from tests.recording.tiny import CASES, Rows, alone, recorded

import patchclamp as pc
from patchclamp.data import Example
from patchclamp.errors import DataError, ModelError, UnknownName
from patchclamp.recording.corpus import Reading, tokenize
from patchclamp.recording.positions import Positions

# Token labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("name", "form", "before"), [("bert", "words", 1), ("gpt2", "split", 0), ("llama", "spans", 1)]
)
def test_by_label_of_tokens_is_that_of_texts_run_alone(name: str, form: str, before: int, side: str) -> None:
    words, tokens, labels = texts_in_words()
    data = in_form(form, words, labels)
    recording = recorded(
        model_of(name, side), data, list(CASES[name].sites), [pc.ByLabel("pos"), pc.Moments()], special_tokens=True
    )
    assert recording.labels["pos"] == ("DET", "NOUN", "VERB", "(none)")
    for site, rows in rows_alone(name, [" ".join(each) for each in words], special=True).items():
        expected = label_of_rows(rows, tokens, labels, before)
        by_label = recording[site].by_label
        for code, category in enumerate(recording.labels["pos"]):
            kept = expected == category
            assert by_label.count("pos")[code] == kept.sum()
            if kept.any():
                mean = rows.values[kept].mean(0)
                np.testing.assert_allclose(by_label.mean("pos")[:, code], mean, rtol=1e-4, atol=1e-5)


def test_labels_of_tokens_beside_labels_of_texts() -> None:
    words, tokens, labels = texts_in_words()
    kinds = ["a" if len(each) > 3 else "b" for each in words]
    data = pc.Texts(words=words, labels={"kind": kinds}, token_labels={"pos": labels})
    recording = recorded(model_of("bert"), data, "mlp.*", None)
    rows = rows_alone("bert", [" ".join(each) for each in words])["mlp.1"]
    of_texts = np.asarray(kinds)[rows.example]
    by_label = recording["mlp.1"].by_label
    assert set(by_label.labels) == {"kind", "pos"}
    assert by_label.count("kind").tolist() == [(of_texts == "a").sum(), (of_texts == "b").sum()]
    expected = label_of_rows(rows, tokens, labels, 1)
    assert by_label.count("pos").tolist() == [(expected == each).sum() for each in recording.labels["pos"]]


def test_decoder_of_an_encoder_decoder_reads_the_labels_shifted() -> None:
    words, tokens, labels = texts_in_words()
    data = pc.Texts(words=words, token_labels={"pos": labels})
    recording = recorded(model_of("t5"), data, ["encoder.mlp.0", "decoder.mlp.0"], [pc.ByLabel("pos")])
    rows = rows_alone("t5", [" ".join(each) for each in words])
    for site, before in (("encoder.mlp.0", 0), ("decoder.mlp.0", 1)):
        expected = label_of_rows(rows[site], tokens, labels, before)
        counts = [(expected == each).sum() for each in recording.labels["pos"]]
        assert recording[site].by_label.count("pos").tolist() == counts


def test_a_token_takes_the_label_of_its_first_character_that_is_no_space() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["▁the", "▁lis", "t", "▁", "s", "<unk>"]
    made = Tokenizer(models.BPE({each: place for place, each in enumerate(pieces)}, [], unk_token="<unk>"))
    made = Tokenizer(models.Unigram([(each, -1.0) for each in pieces], unk_id=5))
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[attr-defined]
    made.decoder = decoders.Metaspace()  # type: ignore[attr-defined]
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", model_max_length=64)
    model = pc.load(tiny.gpt2(), tokenizer=fast)
    corpus = tokenize(
        model, pc.Texts(["the lists  the"], token_labels={"pos": [[(0, 3, "D"), (4, 7, "N"), (7, 9, "S")]]})
    )
    strings = fast.convert_ids_to_tokens(corpus.ids(0)[0].tolist())
    assert strings == ["▁the", "▁lis", "t", "s", "▁", "▁the"]
    read = corpus.forward(np.asarray([0]))
    assert read.rows is not None
    assert [corpus.labels["pos"][code] for code in read.rows.labels["pos"]] == ["D", "N", "S", "S", "(none)", "(none)"]


def test_truncation_keeps_labels_with_their_tokens() -> None:
    words, tokens, labels = texts_in_words()
    data = pc.Texts(words=words, token_labels={"pos": labels})
    corpus = tokenize(model_of("bert"), data, Reading(max_length=5))
    for example in range(corpus.examples):
        rows = corpus.forward(np.asarray([example])).rows
        assert rows is not None
        expected = np.repeat(labels[example], tokens[example])[:3]
        assert [corpus.labels["pos"][code] for code in rows.labels["pos"]] == expected.tolist()


def test_token_labels_that_cannot_be_aligned_name_the_example_and_both_numbers() -> None:
    with refuses("text 1 of texts: token label 'pos' has 2 labels for 3 words"):
        pc.Texts(["a list", "the list loops"], token_labels={"pos": [["D", "N"], ["D", "N"]]})


def test_slow_tokenizers_cannot_tell_and_say_so() -> None:
    class Slow:
        """A tokenizer without offsets."""

        is_fast = False
        all_special_ids: Sequence[int] = ()
        padding_side = "right"
        pad_token_id = 0
        model_max_length = 64

        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            return {"input_ids": [[4]] * len(texts), "special_tokens_mask": [[0]] * len(texts)}

    model = pc.load(tiny.gpt2(), tokenizer=Slow())
    data = pc.Texts(["a list"], token_labels={"pos": [["D", "N"]]})
    with refuses("Slow is a slow tokenizer", ModelError):
        recorded(model, data, "mlp.0")


def test_labels_of_tokens_belong_to_the_hash_of_the_data() -> None:
    words, _, labels = texts_in_words()
    others = [list(each) for each in labels]
    others[3][0] = {"DET": "NOUN"}.get(others[3][0], "DET")
    hashes = {
        tokenize(model_of("bert"), pc.Texts(words=words, token_labels=given)).sha256
        for given in (None, {"pos": labels}, {"pos": others}, {"tag": labels})
    }
    assert len(hashes) == 4


# Positions ----------------------------------------------------------------------------------------


def is_last(rows: Rows) -> np.ndarray:
    return np.asarray(
        [p == rows.position[rows.example == e].max() for e, p in zip(rows.example, rows.position, strict=True)]
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("special", [False, True])
def test_the_last_token_of_each_text(name: str, special: bool, side: str) -> None:
    options: dict[str, Any] = {"positions": "last", "special_tokens": special}
    recording = recorded(model_of(name, side), TEXTS, list(CASES[name].sites), [pc.Moments()], **options)
    expected = rows_alone(name, TEXTS, special=special)
    assert_moments(recording, expected, is_last)
    assert recording.facts["parameters"]["positions"] == "last"
    assert recording.facts["data"]["tokens"] == len(TEXTS)


def test_the_last_token_of_a_document_is_in_its_last_window() -> None:
    recording = recorded(
        model_of("gpt2"), TEXTS, "mlp.0", [pc.TopExamples(99)], positions="last", max_length=4, long_texts="windows"
    )
    assert recording["mlp.0"].count == len(TEXTS)


def every_third(example: Example, tokens: list[str]) -> list[bool]:
    return [place % 3 == 0 for place in range(len(tokens))]


def after_the(example: Example, tokens: list[str]) -> list[int]:
    return [place + 1 for place, token in enumerate(tokens[:-1]) if token.strip() == "the"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_function_chooses_the_positions(name: str, side: str) -> None:
    expected = rows_alone(name, TEXTS)
    recording = recorded(model_of(name, side), TEXTS, list(CASES[name].sites), [pc.Moments()], positions=every_third)
    assert_moments(recording, expected, lambda rows: rows.position % 3 == 0)
    said = recording.facts["parameters"]["positions"]
    assert said["callable"].endswith("every_third") and len(said["source_sha256"]) == 64
    recording = recorded(model_of(name, side), TEXTS, list(CASES[name].sites), [pc.Moments()], positions=after_the)
    before = 1 if name == "bert" else 0

    def follows_the(rows: Rows) -> np.ndarray:
        places = rows.position - before
        pairs = zip(rows.example, places, strict=True)
        return np.asarray([place > 0 and TEXTS[example].split()[place - 1] == "the" for example, place in pairs])

    assert_moments(recording, expected, follows_the)


def test_a_function_is_given_the_example_and_all_its_tokens() -> None:
    seen: list[tuple[str, list[str]]] = []

    def look(example: Example, tokens: list[str]) -> np.ndarray:
        seen.append((example.labels["kind"], tokens))
        return np.asarray([len(tokens) - 2, -2])

    data = pc.Texts(["the list", "a file loop"], {"kind": ["x", "y"]})
    recording = recorded(model_of("bert"), data, "mlp.0", [pc.Moments()], positions=look)
    assert seen == [("x", ["[CLS]", " the", " list", "[SEP]"]), ("y", ["[CLS]", " a", " file", " loop", "[SEP]"])]
    assert recording["mlp.0"].count == 2


def test_special_tokens_do_not_count_because_a_function_says_so() -> None:
    recording = recorded(
        model_of("bert"), TEXTS, "mlp.0", [pc.Moments()], positions=lambda _, tokens: [True] * len(tokens)
    )
    assert recording["mlp.0"].count == sum(len(each.split()) for each in TEXTS)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ("lats", UnknownName, "no choice of positions is called 'lats'. The nearest: last"),
        (7, DataError, "positions is 'all', 'last', 'response' or a function (example, tokens); not 7"),
        ("response", DataError, "only conversations have them: pc.Chats"),
        (lambda _, tokens: [True], DataError, "positions gave 1 bools for text 0 of texts, which has 4 tokens"),
        (lambda _, tokens: [4], DataError, "positions gave the index 4 for text 0 of texts, which has 4 tokens"),
        (lambda _, tokens: [True, 2], DataError, "positions gave True for text 0 of texts"),
        (lambda _, tokens: [1.5], DataError, "positions gave 1.5 for text 0 of texts"),
        (lambda _, tokens: "last", DataError, "positions gave 'last' for text 0 of texts"),
        (lambda _, tokens: None, DataError, "positions gave None for text 0 of texts"),
        (lambda _, tokens: [], DataError, "positions chose no token of texts"),
        (lambda _, tokens: [0], DataError, "positions chose no token of texts"),
    ],
)
def test_positions_that_cannot_be(given: Any, error: type[Exception], says: str) -> None:
    with refuses(says, error):
        recorded(model_of("bert"), ["the list"], "mlp.0", [pc.Moments()], positions=given)


def test_a_function_of_the_text_says_nothing_of_targets() -> None:
    with refuses("the decoder reads targets: which is meant?"):
        recorded(model_of("t5"), pc.Texts(TEXTS, targets=TEXTS), "encoder.mlp.0", positions=every_third)


def test_the_function_is_named_in_the_facts_even_without_its_source() -> None:
    made: dict[str, Any] = {}
    exec("def chosen(example, tokens): return [0]", made)
    assert Positions(made["chosen"]).parameters()["source_sha256"] is None  # type: ignore[index]

    class Chooser:
        def __call__(self, example: Example, tokens: list[str]) -> list[int]:
            return [0]

    assert Positions(Chooser()).parameters()["callable"].endswith("Chooser")  # type: ignore[index]


@pytest.mark.parametrize("option", [{"positions": "last"}, {"packing": True}, {"long_texts": "windows"}])
def test_options_of_texts_are_refused_for_tensors(option: dict[str, Any]) -> None:
    with refuses(f"{next(iter(option))}={next(iter(option.values()))!r} is about the tokens of texts"):
        recorded(pc.load(tiny.mlp()), torch.ones(4, 5), "mlp.0", **option)


# Conversations ------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}( {{ m['role'] }} ) {{ m['content'] | trim }} . {% endfor %}"
MARKED = (
    "{% for m in messages %}( {{ m['role'] }} ) {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} . {% endgeneration %}{% else %}{{ m['content'] }} . {% endif %}{% endfor %}"
)
TALKS = [
    [
        {"role": "system", "content": "the list is a list"},
        {"role": "user", "content": " open the file "},
        {"role": "assistant", "content": "file open"},
        {"role": "user", "content": "list"},
        {"role": "assistant", "content": "items of the list , in a loop"},
    ],
    [{"role": "user", "content": "user"}, {"role": "assistant", "content": "no list"}],
    [{"role": "user", "content": "a name"}],
]


def talking(name: str, template: str, side: str) -> pc.Model:
    words = tiny.tokenizer(CASES[name].template, side=side)
    words.chat_template = template
    return pc.load(CASES[name].build(), tokenizer=words)


def by_hand(talk: list[dict[str, str]], marked: bool) -> tuple[str, list[str]]:
    """The text of a conversation, and the role of each of its tokens."""
    text, roles = "", []
    for message in talk:
        content, role = message["content"].split(), message["role"]
        text += f"( {role} ) {' '.join(content)} . "
        ends = role if marked and role == "assistant" else "template"
        roles += ["template"] * 3 + [role] * len(content) + [ends]
    return text, roles


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("template", [TEMPLATE, MARKED], ids=["contents", "generation"])
def test_each_token_of_a_conversation_knows_its_role(template: str, side: str) -> None:
    model = talking("llama", template, side)
    rendered = [by_hand(talk, template == MARKED) for talk in TALKS]
    # The template writes all special tokens, and the tokenizer adds none: so the reference adds none either.
    case = CASES["llama"]
    rows = alone(case.build(), case.sites, tiny.tokenizer("$A"), [text for text, _ in rendered])
    recording = recorded(model, pc.Chats(TALKS), list(case.sites), [pc.ByLabel("role"), pc.Moments()])
    assert recording.labels["role"] == ("assistant", "system", "user", "template")
    answers = recorded(model, pc.Chats(TALKS), list(case.sites), [pc.Moments()], positions="response")
    for site, found in rows.items():
        role = np.asarray([rendered[e][1][p] for e, p in zip(found.example, found.position, strict=True)])
        by_label = recording[site].by_label
        for code, category in enumerate(recording.labels["role"]):
            kept = role == category
            assert by_label.count("role")[code] == kept.sum() > 0
            mean = found.values[kept].mean(0)
            np.testing.assert_allclose(by_label.mean("role")[:, code], mean, rtol=1e-4, atol=1e-5)
    assert_moments(
        answers,
        rows,
        lambda found: np.asarray(
            [rendered[e][1][p] == "assistant" for e, p in zip(found.example, found.position, strict=True)]
        ),
    )


def test_special_tokens_of_the_template_are_special() -> None:
    model = talking("gpt2", "[CLS]" + TEMPLATE, "right")
    corpus = tokenize(model, pc.Chats(TALKS[1:2]))
    ids, counted = corpus.ids(0)
    assert ids[0] == 2 and not counted[0] and counted[1:].all()


def test_a_tokenizer_without_a_template() -> None:
    with refuses("has no chat template", ModelError):
        recorded(model_of("gpt2"), pc.Chats(TALKS), "mlp.0")


def test_conversations_without_an_answer_have_no_response() -> None:
    with refuses("no message of conversations is of the assistant; there are user"):
        recorded(talking("gpt2", TEMPLATE, "right"), pc.Chats(TALKS[2:]), "mlp.0", positions="response")
