"""The four artificial languages: what they share, their grammar, and that their entropy is what it says."""

from __future__ import annotations

import re

import numpy as np
import pytest

import patchclamp as pc
from patchclamp.testbed import languages


@pytest.fixture(scope="module")
def documents() -> pc.Texts:
    return languages.documents(400)


def test_languages_share_exactly_the_stated_words() -> None:
    words = {name: languages.vocabulary(name) for name in languages.NAMES}
    common = set(languages.NUMBERS) | set(languages.PUNCTUATION)
    for one in languages.NAMES:
        assert len(words[one]) == 75
        for other in languages.NAMES:
            if other == one:
                continue
            both = words[one].keys() & words[other].keys()
            related = languages.RELATIVES[one] == other
            assert common <= both and len(both) == len(common) + (17 if related else 0)
            assert all(words[one][word] == words[other][word] for word in both)
    everything = set().union(*words.values())
    assert len(everything) == 4 * 51 + 2 * 17 + 7
    counts = [len(languages.owners(word)) for word in everything]
    assert [counts.count(number) for number in (1, 2, 3, 4)] == [4 * 51, 2 * 17, 0, 7]
    assert languages.owners("house") == ()
    # Words of one group of owners have syllables that no other group has.
    onsets: dict[tuple[str, ...], set[str]] = {}
    for word in everything - common:
        onsets.setdefault(languages.owners(word), set()).update(re.findall("[^aeiou]+", word))
    assert len(onsets) == 6
    assert sum(len(each) for each in onsets.values()) == len(set().union(*onsets.values()))


def test_documents_are_fixed_by_the_seed(documents: pc.Texts) -> None:
    texts = [each.text for each in documents]
    assert [each.text for each in languages.documents(40)] == texts[:40]
    other = [each.text for each in languages.documents(40, seed=1)]
    assert not set(other) & set(texts)
    assert len(set(texts)) == 400


def test_a_document_is_in_its_language_and_no_other(documents: pc.Texts) -> None:
    assert documents.labels["language"] == languages.NAMES
    for each in documents:
        language, words = each.labels["language"], each.text.split()
        assert all(language in languages.owners(word) for word in words)
        possible = [name for name in languages.NAMES if np.isfinite(languages.log_probability(words, name))]
        assert possible == [language]
        roles = [span.label for span in each.token_labels["role"]]
        assert roles == [languages.vocabulary(language)[word] for word in words]


def test_each_language_has_its_word_order(documents: pc.Texts) -> None:
    orders: dict[str, set[str]] = {name: set() for name in languages.NAMES}
    for each in documents:
        roles = [span.label for span in each.token_labels["role"]]
        first = roles[: roles.index("punctuation")]
        letters = "".join({"noun": "N", "verb": "V", "adjective": "A"}.get(role, "") for role in first)
        orders[each.labels["language"]].add(letters)
    assert orders == {
        "ardi": {"NVN", "ANVN", "NVAN", "ANVAN"},
        "bela": {"NVN", "NAVN", "NVNA", "NAVNA"},
        "coth": {"NNV", "ANNV", "NANV", "ANANV"},
        "druk": {"VNN", "VNAN", "VNNA", "VNANA"},
    }


def test_nouns_agree_with_their_determiner(documents: pc.Texts) -> None:
    """Each determiner is followed by nouns of one of three genders, which divide the nouns of a language."""
    nouns: dict[tuple[str, str], set[str]] = {}
    for each in documents:
        language, asked = each.labels["language"], None
        for word, span in zip(each.text.split(), each.token_labels["role"], strict=True):
            if span.label in ("determiner", "number"):
                asked = word
            elif span.label == "noun" and asked not in languages.NUMBERS:
                nouns.setdefault((language, str(asked)), set()).add(word)
    for language in languages.NAMES:
        groups = [each for (of, _), each in nouns.items() if of == language]
        assert len(groups) == 6
        for one in groups:
            assert len(one) <= 10
            assert sum(bool(one & other) for other in groups) == 2


@pytest.mark.parametrize("language", languages.NAMES)
def test_probabilities_of_the_next_word_sum_to_one(language: str) -> None:
    words = next(each.text.split() for each in languages.documents(4) if each.labels["language"] == language)
    for length in range(0, 20):
        before = languages.log_probability(words[:length], language)
        after = [
            languages.log_probability([*words[:length], word], language) for word in languages.vocabulary(language)
        ]
        assert np.logaddexp.reduce(after) == pytest.approx(before, abs=1e-9)


def test_words_come_as_often_as_their_probability_says() -> None:
    """The first word of a document, and the surprise on average, beside what the chain expects of itself."""
    documents = languages.documents(1_600, seed=3)
    first = [each.text.split()[0] for each in documents if each.labels["language"] == "druk"]
    verbs = [word for word, role in languages.vocabulary("druk").items() if role == "verb"]
    expected = np.asarray([np.exp(languages.log_probability([word], "druk")) for word in verbs])
    seen = np.asarray([first.count(word) for word in verbs]) / len(first)
    assert expected.sum() == pytest.approx(1)
    assert (abs(seen - expected) < 4 * np.sqrt(expected * (1 - expected) / len(first)) + 1e-9).all()
    surprise, expectation = _surprise_and_expectation(documents.take(400))
    assert surprise == pytest.approx(expectation, rel=0.01)


def test_entropy_knows_no_language_beforehand(documents: pc.Texts) -> None:
    """It is what the chain of the language loses, and the price of finding out which of the four it is."""
    texts = [each.text for each in documents]
    words = sum(len(text.split()) for text in texts)
    told = -sum(languages.log_probability(each.text.split(), each.labels["language"]) for each in documents)
    assert languages.entropy(texts) * words == pytest.approx(told + len(texts) * np.log(4), rel=1e-9)
    # A clause of three languages begins with one of five numbers a quarter of the time; one begins with its verb.
    assert languages.entropy(["1"]) == pytest.approx(-np.log((3 * 0.25 / 5 + 0) / 4))


def test_the_tokenizer_gives_one_token_a_word(documents: pc.Texts) -> None:
    tokenizer = languages.tokenizer()
    assert len(tokenizer) == 245 + len(languages.SPECIAL)
    text = next(iter(documents)).text
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == ["<start>", *text.split()]
    assert tokenizer.convert_ids_to_tokens(tokenizer("house .")["input_ids"]) == ["<start>", "<unk>", "."]


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(pc.errors.UnknownName, match="bela"):
        languages.vocabulary("belo")
    with pytest.raises(pc.errors.DataError, match="at least one"):
        languages.documents(0)
    with pytest.raises(pc.errors.DataError, match="house"):
        languages.entropy(["the house"])


def _surprise_and_expectation(documents: pc.Texts) -> tuple[float, float]:
    """Mean of -log p of the words that came, and of the entropy of all that could have come there."""
    surprises, expectations = [], []
    for each in documents:
        language = languages._language(each.labels["language"])
        state = language.start
        for word in each.text.split():
            chances = np.asarray(list(language.options(state).probability.values()))
            surprises.append(-np.log(language.options(state).probability[word]))
            expectations.append(-(chances * np.log(chances)).sum())
            state = language.after(state, word)
    return float(np.mean(surprises)), float(np.mean(expectations))
