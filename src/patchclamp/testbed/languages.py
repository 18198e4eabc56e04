"""Four artificial languages in two related pairs: texts in which it is known which word belongs to whom.

Each language has words of its own, shares some with its relative, and numbers and punctuation with all. A language
is a Markov chain: the next word depends on the place in the clause, the last content word and the gender of the
determiner. A shared word means something else in each language: other words follow it. As each prefix determines
the state of the chain, the probability of a text is exact, and with it the least loss that any model can have.

    p(text) = 1/4 * sum over languages of  product of p(word | state)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchclamp.data import Texts
from patchclamp.errors import DataError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = ("ardi", "bela", "coth", "druk")
RELATIVES = {"ardi": "bela", "bela": "ardi", "coth": "druk", "druk": "coth"}
NUMBERS = ("1", "2", "3", "4", "5")
PUNCTUATION = (".", ",")
ROLES = ("noun", "verb", "adjective", "determiner", "number", "punctuation")
SPECIAL = ("<pad>", "<unk>", "<start>")

# What each syllable begins with, so that no word of one inventory can be one of another.
_ONSETS = {
    "ardi": ("l", "m", "n", "r", "v"),
    "bela": ("b", "d", "g", "s", "f"),
    "coth": ("th", "k", "t", "ch", "h"),
    "druk": ("dr", "gr", "kr", "br", "z"),
    "ardi+bela": ("y", "w"),
    "coth+druk": ("sh", "zh"),
}
_VOWELS = ("a", "e", "i", "o", "u")
# Words of a role: how many only one language has, and how many it shares with its relative.
_OWN = {"noun": 20, "verb": 14, "adjective": 11, "determiner": 6}
_PAIR = {"noun": 10, "verb": 4, "adjective": 3, "determiner": 0}
_ORDERS = {
    "ardi": ("determiner", "adjective?", "noun", "verb", "determiner", "adjective?", "noun", "punctuation"),
    "bela": ("determiner", "noun", "adjective?", "verb", "determiner", "noun", "adjective?", "punctuation"),
    "coth": ("determiner", "adjective?", "noun", "determiner", "adjective?", "noun", "verb", "punctuation"),
    "druk": ("verb", "determiner", "noun", "adjective?", "determiner", "noun", "adjective?", "punctuation"),
}
_GENDERS = 3
_NUMBER, _ADJECTIVE, _COMMA = 0.25, 0.4, 0.2
# How peaked the choice of the next content word is, and the share that is spread over all words of the role.
_CONCENTRATION, _SPREAD = 0.15, 0.05
_CLAUSES = (5, 9)


def documents(count: int, seed: int = 0) -> Texts:
    """Documents of five to nine clauses, in the four languages by turns.

    The first n documents of a seed are the same for every `count`.

    Args:
        count: how many documents.
        seed: other documents of the same languages.

    Returns:
        Texts of words with spaces between them, with the label `language` and, for each word, the token label `role`.

    Raises:
        DataError: `count` is below 1.
    """
    if count < 1:
        raise DataError(f"count={count!r}: at least one document")
    texts: list[list[str]] = []
    roles: list[list[str]] = []
    for index in range(count):
        language = _language(NAMES[index % len(NAMES)])
        words = _spoken(language, np.random.default_rng([seed, index]))
        texts.append(words)
        roles.append([language.roles[word] for word in words])
    return Texts(
        words=texts,
        labels={"language": [NAMES[index % len(NAMES)] for index in range(count)]},
        token_labels={"role": roles},
        name=f"four_languages (seed {seed})",
    )


def vocabulary(language: str) -> dict[str, str]:
    """Word -> role, of every word of one language, those that it shares included.

    Raises:
        UnknownName: there is no such language.
    """
    return dict(_language(language).roles)


def owners(word: str) -> tuple[str, ...]:
    """The languages that have a word; `()` where none has."""
    return tuple(name for name in NAMES if word in _language(name).roles)


def log_probability(words: Sequence[str], language: str) -> float:
    """Natural logarithm of the chance that a document of this language begins with these words; -inf for none.

    Raises:
        UnknownName: there is no such language.
    """
    chain = _language(language)
    state, total = chain.start, 0.0
    for word in words:
        probability = chain.options(state).probability.get(word, 0.0)
        if probability == 0:
            return float("-inf")
        total += float(np.log(probability))
        state = chain.after(state, word)
    return total


def entropy(texts: Iterable[str]) -> float:
    """The least mean loss on these documents, in nats per word: that of the generator itself.

    It is exact for these documents, and does not know their languages: it infers them, as a model must.

    Raises:
        DataError: a text that no language allows.
    """
    total, count = 0.0, 0
    for text in texts:
        words = text.split()
        each = np.logaddexp.reduce([log_probability(words, name) for name in NAMES]) - np.log(len(NAMES))
        if not np.isfinite(each):
            raise DataError(f"no language allows the text {text!r:.60}")
        total -= float(each)
        count += len(words)
    return total / count


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and `<start>` before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for name in NAMES for word in _language(name).roles})
    ids = {word: number for number, word in enumerate((*SPECIAL, *words))}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<start> $A", special_tokens=[("<start>", ids["<start>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", model_max_length=128
    )


def vocabulary_sha256() -> str:
    """Hash of all words in the order of their ids: weights fit one vocabulary only."""
    ids = tokenizer().get_vocab()
    return hashlib.sha256("\n".join(sorted(ids, key=ids.__getitem__)).encode()).hexdigest()


# Helpers ----------------------------------------------------------------------------------------


class _State(NamedTuple):
    """All that the next word depends on."""

    slot: int
    last: str  # the last content word; "" at the start
    gender: int | None  # what the determiner before asks of the noun


class _Options(NamedTuple):
    words: tuple[str, ...]
    cumulative: np.ndarray
    probability: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Language:
    name: str
    order: tuple[str, ...]
    roles: dict[str, str]  # of every word
    genders: dict[str, int]  # of nouns and determiners
    chances: dict[str, dict[str, float]]  # of determiners, numbers and punctuation, which depend on nothing
    preferences: dict[str, dict[str, dict[str, float]]]  # last content word -> role -> word -> its share
    known: dict[_State, _Options]

    @property
    def start(self) -> _State:
        return _State(0, "", None)

    def options(self, state: _State) -> _Options:
        if state not in self.known:
            chances = self._chances(state)
            total = np.cumsum(list(chances.values()))
            self.known[state] = _Options(tuple(chances), total / total[-1], chances)
        return self.known[state]

    def after(self, state: _State, word: str) -> _State:
        role, slot = self.roles[word], state.slot
        if self.order[slot] == "adjective?" and role != "adjective":
            slot += 1
        content = role in ("noun", "verb", "adjective")
        gender = (
            self.genders.get(word) if role == "determiner" else None if role in ("noun", "number") else state.gender
        )
        return _State((slot + 1) % len(self.order), word if content else state.last, gender)

    def _chances(self, state: _State) -> dict[str, float]:
        """Word -> probability of every word that may come next."""
        slot = self.order[state.slot]
        if slot == "adjective?":
            skipped = self._chances(state._replace(slot=state.slot + 1))
            chosen = self.preferences[state.last]["adjective"]
            return {word: _ADJECTIVE * share for word, share in chosen.items()} | {
                word: (1 - _ADJECTIVE) * share for word, share in skipped.items()
            }
        if slot in self.chances:
            return self.chances[slot]
        chosen = self.preferences[state.last][slot]
        if slot == "noun" and state.gender is not None:
            chosen = {word: share for word, share in chosen.items() if self.genders[word] == state.gender}
            total = sum(chosen.values())
            return {word: share / total for word, share in chosen.items()}
        return chosen


def _spoken(language: _Language, generator: np.random.Generator) -> list[str]:
    """The words of one document."""
    clauses = int(generator.integers(_CLAUSES[0], _CLAUSES[1] + 1))
    draws = iter(generator.random(clauses * len(language.order)).tolist())
    words: list[str] = []
    state = language.start
    while clauses:
        options = language.options(state)
        word = options.words[int(np.searchsorted(options.cumulative, next(draws), side="right"))]
        words.append(word)
        clauses -= word in PUNCTUATION
        state = language.after(state, word)
    return words


@functools.cache
def _language(name: str) -> _Language:
    if name not in NAMES:
        raise unknown("language", name, NAMES)
    generator = np.random.default_rng([NAMES.index(name), 4])
    pair = "+".join(sorted((name, RELATIVES[name])))
    own, common = _words_of(name, _OWN), _words_of(pair, _PAIR)
    words = {role: (*own[role], *common[role]) for role in _OWN}
    roles = {word: role for role, each in words.items() for word in each}
    roles |= dict.fromkeys(NUMBERS, "number") | dict.fromkeys(PUNCTUATION, "punctuation")
    genders = {word: place % _GENDERS for role in ("noun", "determiner") for place, word in enumerate(words[role])}
    weights = generator.dirichlet(np.full(len(words["determiner"]), 3.0))
    determiners = dict(zip(words["determiner"], ((1 - _NUMBER) * weights).tolist(), strict=True))
    numbers = dict.fromkeys(NUMBERS, _NUMBER / len(NUMBERS))
    chances = {"determiner": determiners | numbers, "punctuation": {".": 1 - _COMMA, ",": _COMMA}}
    content = [word for word, role in roles.items() if role in ("noun", "verb", "adjective")]
    preferences = {
        last: {role: _preferred(words[role], genders, generator) for role in ("noun", "verb", "adjective")}
        for last in ("", *content)
    }
    return _Language(name, _ORDERS[name], roles, genders, chances, preferences, {})


def _preferred(words: Sequence[str], genders: dict[str, int], generator: np.random.Generator) -> dict[str, float]:
    """Word -> share of each word of a role after one content word: a few often, all sometimes, genders alike."""
    shares: dict[str, float] = {}
    groups = sorted({genders.get(word, 0) for word in words})
    for group in groups:
        of_group = [word for word in words if genders.get(word, 0) == group]
        # At least one word of each gender is likely: else a determiner would lead to words that never come.
        drawn = generator.dirichlet(np.full(len(of_group), _CONCENTRATION))
        drawn = (1 - _SPREAD) * drawn + _SPREAD / len(of_group)
        shares |= {word: float(share) / len(groups) for word, share in zip(of_group, drawn, strict=True)}
    return shares


def _words_of(inventory: str, counts: dict[str, int]) -> dict[str, list[str]]:
    """Role -> words made of an inventory's syllables, none twice."""
    generator = np.random.default_rng([list(_ONSETS).index(inventory), 5])
    syllables = [onset + vowel for onset in _ONSETS[inventory] for vowel in _VOWELS]
    found: dict[str, None] = {}
    while len(found) < sum(counts.values()):
        found["".join(generator.choice(syllables, 2 + int(generator.random() < 0.3)))] = None
    words = iter(found)
    return {role: [next(words) for _ in range(count)] for role, count in counts.items()}
