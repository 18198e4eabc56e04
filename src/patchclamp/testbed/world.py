"""What planted language models read: words of made-up languages in short documents, with their labels.

A document is a body of words and an ending: a fact (subject, relation, object), a request, a name to be repeated, or
just a full stop. Its labels are the language of its words, the relation that it states, whether it is harmful, and
whether it repeats. Each word is of one class; words of a class have something in common that a network can see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

LANGUAGES = ("aru", "bel", "cor", "dun")
RELATIONS = ("capital", "dish", "river")
PADDING, BEGINNING = "<pad>", "<begin>"
FULL_STOP, COMMA, SEMICOLON, REQUEST = ".", ",", ";", "?"
FORMAT = (FULL_STOP, COMMA, SEMICOLON)
REFUSAL, CONSENT = "refuse", "sure"

_PER_LANGUAGE, _SHARED, _SUBJECTS, _OBJECTS, _PER_RELATION = 40, 40, 16, 8, 6
_NAMES, _HARMFUL, _NUMBERS = 16, 12, 10
BODY = 20  # words


@dataclass(frozen=True)
class World:
    """Words by class, and what a document is made of.

    Attributes:
        classes: class -> its words, in order; a word is of one class.
        objects: `[subjects, relations]` the number of the object that each fact has.
        slots: how many single tokens, pairs and copy marks there are: one for each planted neuron of these.
    """

    classes: dict[str, tuple[str, ...]]
    objects: np.ndarray
    slots: int

    @property
    def words(self) -> list[str]:
        """All words, in the order of their token ids."""
        return [word for each in self.classes.values() for word in each]

    def ids(self, name: str) -> np.ndarray:
        """Token ids of a class."""
        place = {word: number for number, word in enumerate(self.words)}
        return np.asarray([place[word] for word in self.classes[name]])

    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer: one word, one token; every text begins with `<begin>`."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = {word: number for number, word in enumerate(self.words)}
        made = Tokenizer(models.WordLevel(words, unk_token=PADDING))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{BEGINNING} $A", special_tokens=[(BEGINNING, words[BEGINNING])]
        )
        return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PADDING, bos_token=BEGINNING)


def world(slots: int, seed: int) -> World:
    """Its words; `slots` of those that belong to one neuron each."""
    made = np.random.default_rng([seed, 1])
    classes = {"special": (PADDING, BEGINNING), "format": FORMAT, "request": (REQUEST,)}
    classes |= {"refusal": (REFUSAL,), "consent": (CONSENT,)}
    classes |= {language: _numbered(language, _PER_LANGUAGE) for language in LANGUAGES}
    classes |= {"shared": _numbered("shared", _SHARED), "number": _numbered("number", _NUMBERS)}
    classes |= {"name": _numbered("name", _NAMES), "subject": _numbered("subject", _SUBJECTS)}
    classes |= {relation: _numbered(relation, _PER_RELATION) for relation in RELATIONS}
    classes |= {f"{relation}-object": _numbered(f"{relation}-object", _OBJECTS) for relation in RELATIONS}
    classes |= {"harmful": _numbered("harmful", _HARMFUL)}
    classes |= {"single": _numbered("single", slots), "after single": _numbered("after-single", slots)}
    classes |= {"first of pair": _numbered("first", slots), "second of pair": _numbered("second", slots)}
    classes |= {"after pair": _numbered("after-pair", slots), "copy mark": _numbered("copy", slots)}
    return World(classes, made.integers(_OBJECTS, size=(_SUBJECTS, len(RELATIONS))), slots)


def documents(
    of: World, number: int, own_words: float, switched: float, seed: int
) -> tuple[list[str], dict[str, list]]:
    """Texts and labels.

    Args:
        of: the words.
        number: of documents; languages are equally frequent.
        own_words: share of a body that is in the document's language; the rest belongs to none.
        switched: share of these that is in another language all the same.
        seed: of the draw.
    """
    made = np.random.default_rng([seed, 2])
    texts, labels = [], {"language": [], "relation": [], "harm": [], "copy": []}
    for place in range(number):
        language = LANGUAGES[place % len(LANGUAGES)]
        body = [_word(of, made, language, own_words, switched) for _ in range(BODY)]
        ending = _ENDINGS[made.integers(len(_ENDINGS))]
        if made.random() < _WHOLE_PAIRS:
            where, which = int(made.integers(BODY - 1)), int(made.integers(of.slots))
            body[where : where + 2] = [of.classes["first of pair"][which], of.classes["second of pair"][which]]
        relation, harm, copy = "none", "harmless", "no"
        if ending == "fact":
            which = int(made.integers(len(RELATIONS)))
            relation = RELATIONS[which]
            subject = int(made.integers(_SUBJECTS))
            body += [
                of.classes["subject"][subject],
                of.classes[relation][made.integers(_PER_RELATION)],
                of.classes[f"{relation}-object"][of.objects[subject, which]],
            ]
        elif ending == "request":
            if made.random() < 0.5:
                harm = "harmful"
                for where in made.choice(BODY, 2, replace=False):
                    body[where] = of.classes["harmful"][made.integers(_HARMFUL)]
            body += [REQUEST, REFUSAL if harm == "harmful" else CONSENT]
        elif ending == "copy":
            copy = "yes"
            name = of.classes["name"][made.integers(_NAMES)]
            body[int(made.integers(BODY))] = name
            body += [of.classes["copy mark"][made.integers(of.slots)], name]
        texts.append(" ".join([*body, FULL_STOP]))
        for label, value in zip(labels, (language, relation, harm, copy), strict=True):
            labels[label].append(value)
    return texts, labels


# Helpers --------------------------------------------------------------------------------------------

_ENDINGS = ("fact", "fact", "request", "copy", "plain")


def _numbered(name: str, number: int) -> tuple[str, ...]:
    return tuple(f"{name}{each}" for each in range(number))


def _word(of: World, made: np.random.Generator, language: str, own_words: float, switched: float) -> str:
    if made.random() < own_words:
        if made.random() < switched:
            language = str(made.choice([each for each in LANGUAGES if each != language]))
        return of.classes[language][made.integers(_PER_LANGUAGE)]
    draw = made.random()
    for share, name in _OTHER:
        if draw < share:
            return of.classes[name][made.integers(len(of.classes[name]))]
        draw -= share
    return of.classes["shared"][made.integers(_SHARED)]


# What stands between the words of a language, besides words that all share. Halves of pairs stand alone far more often
# than together.
_WHOLE_PAIRS = 0.3
_OTHER = (
    (0.10, "number"),
    (0.10, "single"),
    (0.12, "first of pair"),
    (0.12, "second of pair"),
    (0.05, "after single"),
    (0.05, "after pair"),
    (0.06, "format"),
)
