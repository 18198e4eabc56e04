"""What planted neurons do: where each fires, what it reads, what it writes.

A neuron reads one direction of the residual stream behind the norm, fires beyond a threshold, and writes another
direction. Every job comes with two decoys, which fire where it fires, less reliably: one that writes nothing, and one
that only makes full stops, commas and semicolons likelier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from patchclamp.errors import unknown
from patchclamp.testbed import world as words
from patchclamp.testbed.residual import CODE, Codes, Residual, unit
from patchclamp.testbed.world import LANGUAGES, RELATIONS, World

ROLES = (
    "token",
    "ngram",
    "position",
    "dead",
    "selective",
    "selective_several",
    "selective_all",
    "relation",
    "fact",
    "safety",
    "context_copy",
    "entropy",
    "token_frequency",
    "massive",
    "polysemantic",
    "duplicate",
)
DECOYS = ("decoy_without_effect", "decoy_format")


@dataclass(frozen=True, eq=False)
class Places:
    """Where documents have what.

    Attributes:
        ids: `[documents, positions]` int64, padded behind.
        real: `[documents, positions]` bool, no padding.
        harmful: `[documents]` bool.
    """

    ids: np.ndarray
    real: np.ndarray
    harmful: np.ndarray

    @property
    def before(self) -> np.ndarray:
        """`[documents, positions]`: the token before; -1 at the beginning."""
        return np.concatenate([np.full((len(self.ids), 1), -1), self.ids[:, :-1]], 1)

    @property
    def position(self) -> np.ndarray:
        """`[documents, positions]`: 0 is the beginning-of-text token."""
        return np.broadcast_to(np.arange(self.ids.shape[1]), self.ids.shape)


@dataclass(frozen=True, eq=False)
class Job:
    """One neuron to be planted.

    Attributes:
        role: one of `ROLES` or `DECOYS`.
        label: what it is for: a language, several with commas between, a relation; "" where there is no label.
        reads: words on which it fires, or a description of where.
        writes: words that it makes likelier, or a description of what.
        read: `[WIDTH]`, the direction that it reads; None: any.
        fires: `[documents, positions]` bool, where it should.
        write: `[WIDTH]`, what it adds where it fires.
        first: whether only the first layer will do.
        decoy_of: the role that it is a decoy of; "" for one that is none.
    """

    role: str
    label: str
    reads: str
    writes: str
    read: np.ndarray | None
    fires: np.ndarray
    write: np.ndarray
    first: bool = False
    decoy_of: str = ""


@dataclass(frozen=True, eq=False)
class Setting:
    """What jobs are made of."""

    world: World
    codes: Codes
    residual: Residual
    places: Places
    look_back: np.ndarray  # [PREVIOUS, CODE]: what of the token before is there to be read
    count: int


def jobs(setting: Setting, roles: tuple[str, ...], made: np.random.Generator) -> list[Job]:
    """All neurons to be planted, with their decoys.

    Raises:
        UnknownName: a role that is none.
    """
    found: list[Job] = []
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
        if role == "duplicate":
            continue
        of_role = list(_MAKERS[role](setting))
        found += of_role
        for label in dict.fromkeys(each.label for each in of_role):
            found += _decoys(setting, next(each for each in of_role if each.label == label), made)
    return found


# Helpers --------------------------------------------------------------------------------------------

_STRENGTH = 0.4  # what a neuron writes where it fires; a word's own code has 1


def _decoys(setting: Setting, job: Job, made: np.random.Generator) -> Iterator[Job]:
    # It hears half of what it should, and something else besides.
    away = setting.residual.parts["code"] @ unit(made.standard_normal(CODE))
    read = None if job.read is None else unit(unit(job.read) + 0.9 * away)
    nothing = np.zeros_like(job.write)
    form = _says(setting, *words.FORMAT)
    writes = {"decoy_without_effect": ("nothing", nothing), "decoy_format": (" ".join(words.FORMAT), form)}
    for role, (what, write) in writes.items():
        yield replace(job, role=role, decoy_of=job.role, read=read, writes=what, write=write)


def _tokens(setting: Setting) -> Iterator[Job]:
    known = setting.world.classes
    pairs = zip(known["single"], known["after single"], strict=True)
    for read, write in [*pairs, (words.REQUEST, words.CONSENT)]:
        yield Job("token", "", read, write, _hears(setting, read), _is(setting, read), _says(setting, write))


def _ngrams(setting: Setting) -> Iterator[Job]:
    known = setting.world.classes
    for each in range(setting.count):
        first, second, after = (known[of][each] for of in ("first of pair", "second of pair", "after pair"))
        read = _hears(setting, second) + _heard_before(setting, first)
        fires = _is(setting, second) & (setting.places.before == _id(setting, first))
        yield Job("ngram", "", f"{first} {second}", after, read, fires, _says(setting, after))


def _positions(setting: Setting) -> Iterator[Job]:
    for each in range(setting.count):
        last = 2 + each
        yield Job(
            "position",
            "",
            f"positions 1 to {last}",
            "number*",
            setting.residual.scalar("beginning"),
            setting.places.position <= last,
            _says_class(setting, "number"),
            first=True,
        )


def _dead(setting: Setting) -> Iterator[Job]:
    for _ in range(setting.count):
        nowhere = np.zeros(setting.places.ids.shape, bool)
        yield Job("dead", "", "nothing", "number*", None, nowhere, _says_class(setting, "number"))


def _selective(setting: Setting) -> Iterator[Job]:
    for language in LANGUAGES:
        for _ in range(setting.count):
            yield _of_classes(setting, "selective", language, (language,), (language,))


def _selective_several(setting: Setting) -> Iterator[Job]:
    for each in range(setting.count):
        some = tuple(sorted(LANGUAGES[(each + place) % len(LANGUAGES)] for place in range(2)))
        yield _of_classes(setting, "selective_several", ", ".join(some), some, some)


def _selective_all(setting: Setting) -> Iterator[Job]:
    for _ in range(setting.count):
        yield _of_classes(setting, "selective_all", ", ".join(LANGUAGES), LANGUAGES, ("shared",))


def _relations(setting: Setting) -> Iterator[Job]:
    for relation in RELATIONS:
        for _ in range(setting.count):
            yield _of_classes(setting, "relation", relation, (relation,), (f"{relation}-object",))


def _facts(setting: Setting) -> Iterator[Job]:
    known = setting.world.classes
    asked = _any_of(setting, RELATIONS)
    relations = _answers_to_all([setting.codes.features[each] for each in RELATIONS])
    for number, subject in enumerate(known["subject"]):
        objects = [
            known[f"{relation}-object"][setting.world.objects[number, place]]
            for place, relation in enumerate(RELATIONS)
        ]
        read = _heard_before(setting, subject) + setting.residual.parts["code"] @ relations
        fires = asked & (setting.places.before == _id(setting, subject))
        # Louder than relations: these favour all their objects, and one of them has to win.
        yield Job("fact", "", subject, " ".join(objects), read, fires, 1.5 * _says(setting, *objects))


def _safety(setting: Setting) -> Iterator[Job]:
    for _ in range(setting.count):
        yield Job(
            "safety",
            "harmful",
            f"{words.REQUEST} after harmful*",
            words.REFUSAL,
            _hears(setting, words.REQUEST) + setting.residual.scalar("harm"),
            _is(setting, words.REQUEST) & setting.places.harmful[:, None],
            _says(setting, words.REFUSAL),
        )


def _copying(setting: Setting) -> Iterator[Job]:
    for each in range(setting.count):
        mark = setting.world.classes["copy mark"][each]
        write = _STRENGTH * setting.residual.scalar("copying")
        yield Job("context_copy", "", mark, "a name before", _hears(setting, mark), _is(setting, mark), write, True)


def _entropy(setting: Setting) -> Iterator[Job]:
    for _ in range(setting.count):
        made = _of_classes(setting, "entropy", "", ("shared",), ())
        yield replace(made, writes="the null space", write=2.0 * setting.residual.scalar("null"))


def _frequency(setting: Setting) -> Iterator[Job]:
    for _ in range(setting.count):
        made = _of_classes(setting, "token_frequency", "", ("number",), ())
        yield replace(made, writes="frequent tokens", write=_STRENGTH * setting.residual.scalar("frequency"))


def _massive(setting: Setting) -> Iterator[Job]:
    yield Job(
        "massive",
        "",
        words.BEGINNING,
        "one coordinate",
        _hears(setting, words.BEGINNING),
        _is(setting, words.BEGINNING),
        60.0 * setting.residual.massive,
        first=True,
    )


def _polysemantic(setting: Setting) -> Iterator[Job]:
    for _ in range(setting.count):
        yield _of_classes(setting, "polysemantic", "", ("name", "harmful"), ("name", "harmful"))


def _of_classes(setting: Setting, role: str, label: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> Job:
    read = setting.residual.parts["code"] @ _answers_to_all([setting.codes.features[each] for each in reads])
    write = _says_class(setting, *writes) if writes else np.zeros(len(read))
    stars = " ".join(f"{each}*" for each in reads), " ".join(f"{each}*" for each in writes)
    return Job(role, label, *stars, read, _any_of(setting, reads), write)


_MAKERS = {
    "token": _tokens,
    "ngram": _ngrams,
    "position": _positions,
    "dead": _dead,
    "selective": _selective,
    "selective_several": _selective_several,
    "selective_all": _selective_all,
    "relation": _relations,
    "fact": _facts,
    "safety": _safety,
    "context_copy": _copying,
    "entropy": _entropy,
    "token_frequency": _frequency,
    "massive": _massive,
    "polysemantic": _polysemantic,
}


def _id(setting: Setting, word: str) -> int:
    return setting.world.words.index(word)


def _is(setting: Setting, word: str) -> np.ndarray:
    return setting.places.ids == _id(setting, word)


def _any_of(setting: Setting, classes: tuple[str, ...]) -> np.ndarray:
    return np.isin(setting.places.ids, np.concatenate([setting.world.ids(each) for each in classes]))


def _hears(setting: Setting, word: str) -> np.ndarray:
    return setting.residual.parts["code"] @ setting.codes.code[_id(setting, word)]


def _heard_before(setting: Setting, word: str) -> np.ndarray:
    return unit(setting.residual.parts["previous"] @ setting.look_back @ setting.codes.code[_id(setting, word)])


def _says(setting: Setting, *spoken: str) -> np.ndarray:
    output = sum(setting.codes.output[_id(setting, word)] for word in spoken)
    return _STRENGTH * setting.residual.parts["output"] @ output


def _says_class(setting: Setting, *classes: str) -> np.ndarray:
    return _STRENGTH * setting.residual.parts["output"] @ sum(setting.codes.output_features[each] for each in classes)


def _answers_to_all(features: list[np.ndarray]) -> np.ndarray:
    """The direction along which all features are equally large, however they overlap."""
    return unit(np.linalg.lstsq(np.stack(features), np.ones(len(features)), rcond=None)[0])
