"""Labels of words: the neurons that were planted for a class of words are first for that class."""

from __future__ import annotations

import re

import pytest

import patchclamp as pc
from patchclamp.testbed import Planted, plant

LANGUAGES = ("aru", "bel", "cor", "dun")
_OF_A_LANGUAGE = r"\b(aru|bel|cor|dun)\d+"


@pytest.fixture(scope="module")
def planted() -> Planted:
    return plant("gpt2", roles=("selective",), layers=2, neurons=150, examples=100, seed=0)


def recorded(planted: Planted, unlabelled: bool) -> pc.Recording:
    """Each word has the label of its class: a language or, for all others, "other" or none."""
    assert isinstance(planted.data, pc.Texts)
    words = [example.text.split() for example in planted.data]
    if unlabelled:
        texts = [" ".join(text) for text in words]
        spans = [[(at.start(), at.end(), at[1]) for at in re.finditer(_OF_A_LANGUAGE, text)] for text in texts]
        data = pc.Texts(texts, token_labels={"kind": spans})
    else:
        classes = [[at[1] if (at := re.match(_OF_A_LANGUAGE, word)) else "other" for word in text] for text in words]
        data = pc.Texts(words=words, token_labels={"kind": classes})
    return pc.record(planted.model, data, "mlp.*", [pc.ByLabel()], progress=False)


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize("finder", [pc.find.activation_profiles, pc.find.lape, pc.find.coverage])
def test_each_class_of_words_has_its_neurons(planted: Planted, finder, unlabelled: bool) -> None:
    recording = recorded(planted, unlabelled)
    found = finder(recording, "kind").to_polars()
    assert ("score_(none)" in found.columns) == unlabelled
    for language in LANGUAGES:
        best = found.sort(f"score_{language}", descending=True).head(3)
        truth = set(planted.of("selective", language).names)
        hits = sum(f"{site}:{index}" in truth for site, index in best.select("site", "index").iter_rows())
        assert hits >= (3 if finder is pc.find.activation_profiles else 1), (language, best)


def test_labels_of_words_cannot_be_dealt(planted: Planted) -> None:
    with pytest.raises(pc.errors.DataError, match="tokens of one document are not independent"):
        pc.find.lape(recorded(planted, False), "kind", null="permute")
