"""Planted truth for `striking`: a network whose neurons answer to known words, recorded the ordinary way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.recording import tiny
from torch import nn

import patchclamp as pc
from patchclamp.find.striking import family_scores, word_groups

RETURN, ERROR = ("return", "returns", "returned"), ("error", "errors")
TWO = ("raise", "raises", "value", "values")
FORMS, PLURAL, BOTH, SINGLE, COMMA, NOISY, DENSE, DEAD, DENSE_FORMS = range(9)
WORDS_OF = {FORMS: RETURN, PLURAL: ERROR, BOTH: TWO, SINGLE: ("the",), COMMA: (",",), NOISY: RETURN, DENSE_FORMS: RETURN}
# How often a neuron fires where nothing asks it to.
CHANCE = {NOISY: 0.07, DENSE: 0.5, DENSE_FORMS: 0.4}
LENGTH, TEXTS = 24, 900


class Planted(nn.Module):
    """Neuron i is 1 on its words, 0.9 at the places drawn for it, and a faint murmur elsewhere."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        identifier = {word: place for place, word in enumerate((*tiny.SPECIAL, *tiny.WORDS))}
        self.fc1 = nn.Linear(tiny.VOCABULARY, 9, bias=False)
        self.fc2 = nn.Linear(9, 4)
        weight = torch.zeros(9, tiny.VOCABULARY)
        for neuron, words in WORDS_OF.items():
            weight[neuron, [identifier[word] for word in words]] = 1.0
        self.fc1.weight = nn.Parameter(weight)
        self.seed = seed

    def noise(self, ids: torch.Tensor) -> torch.Tensor:
        """Random firings that depend on the whole text, and so on no word."""
        rows = []
        for row in ids.tolist():
            draw = np.random.default_rng([self.seed, *row])
            fires = np.stack([draw.random(len(row)) < CHANCE.get(neuron, 0.0) for neuron in range(9)], axis=1)
            murmur = draw.random((len(row), 9)) * 0.3
            murmur[:, DEAD] = 0.0
            rows.append(np.where(fires, 0.9, murmur))
        return torch.tensor(np.stack(rows), dtype=torch.float32)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        onehot = nn.functional.one_hot(input_ids, tiny.VOCABULARY).float()
        hidden = torch.maximum(torch.relu(self.fc1(onehot)), self.noise(input_ids))
        return self.fc2(hidden)


def recorded(seed: int) -> tuple[pc.Recording, np.ndarray, np.ndarray]:
    """The recording, and by brute force the words [tokens] and what fires strongly [tokens, neurons]."""
    # One length, so that a text draws the same noise in a batch and alone.
    draw = np.random.default_rng(seed)
    texts = [" ".join(draw.choice(tiny.WORDS, LENGTH)) for _ in range(TEXTS)]
    module = Planted(seed).eval()
    model = pc.load(module, tokenizer=tiny.tokenizer(template="$A"))
    recording = pc.record(model, texts, "mlp.0", activations=True, progress=False)
    assert model.reader is not None
    ids = torch.tensor([each.ids for each in model.reader.encode(texts)])
    with torch.no_grad():
        onehot = nn.functional.one_hot(ids, tiny.VOCABULARY).float()
        hidden = torch.maximum(torch.relu(module.fc1(onehot)), module.noise(ids))
    words = np.asarray([word for text in texts for word in text.split()])
    return recording, words, (hidden > 0.5).reshape(-1, 9).numpy()


@pytest.fixture(scope="module")
def planted() -> tuple[pc.Recording, np.ndarray, np.ndarray]:
    return recorded(0)


def test_finds_exactly_the_planted_neurons_with_their_families(planted) -> None:
    found = pc.find.striking(planted[0]).to_polars()
    families = {row["index"]: set(row["family"].split(", ")) for row in found.iter_rows(named=True)}
    assert families == {FORMS: set(RETURN), PLURAL: set(ERROR), BOTH: set(TWO), NOISY: set(RETURN)}
    # Neurons without any noise come first, and are perfect.
    assert found["score"].to_list() == sorted(found["score"].to_list(), reverse=True)
    assert set(found["index"][:3]) == {FORMS, PLURAL, BOTH}
    assert found["score"][:3].to_list() == pytest.approx([1.0, 1.0, 1.0], abs=1e-9)


def test_a_single_word_counts_when_asked_for(planted) -> None:
    assert SINGLE not in pc.find.striking(planted[0]).indices("mlp.0")
    assert SINGLE in pc.find.striking(planted[0], minimum_words=1).indices("mlp.0")
    assert COMMA not in pc.find.striking(planted[0], minimum_words=1, minimum_score=0.01).indices("mlp.0")


def test_purity_coverage_and_score_are_those_of_brute_force(planted) -> None:
    recording, words, strong = planted
    table = family_scores(recording, "mlp.0")
    for neuron in (FORMS, PLURAL, BOTH, NOISY):
        row = table.row(neuron, named=True)
        inside = np.isin(words, WORDS_OF[neuron])
        purity, coverage = inside[strong[:, neuron]].mean(), strong[inside, neuron].mean()
        share, rate = inside.mean(), strong[:, neuron].mean()
        assert row["purity"] == pytest.approx(purity, abs=1e-12)
        assert row["coverage"] == pytest.approx(coverage, abs=1e-12)
        assert row["firings"] == strong[:, neuron].sum()
        expected = (purity - share) / (1 - share) * (coverage - rate) / (1 - rate)
        assert row["score"] == pytest.approx(expected, abs=1e-12)
    assert 0.4 < table["purity"][NOISY] < 0.65  # the noise makes about half of its firings
    assert table["score"][DEAD] == 0 and table["family"][DEAD] == ""


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_null_no_neuron_is_striking_when_tokens_are_paired_at_random(planted, seed: int) -> None:
    null = planted[0].with_tokens_permuted(seed)
    assert len(pc.find.striking(null)) == 0
    assert len(pc.find.striking(null, minimum_words=1, minimum_score=0.05)) == 0
    # Dense firing alone scores nothing: it is corrected for chance.
    assert family_scores(null, "mlp.0")["score"].max() < 0.03
    assert family_scores(planted[0], "mlp.0")["score"][DENSE] < 0.03


def test_the_minima_hold(planted) -> None:
    recording, words, strong = planted
    assert len(pc.find.striking(recording, minimum_firings=int(strong[:, PLURAL].sum()) + 1).where(_is(PLURAL))) == 0
    occurrences = int(np.isin(words, ERROR).sum())
    assert PLURAL not in pc.find.striking(recording, minimum_occurrences=occurrences + 1).indices("mlp.0")
    assert PLURAL in pc.find.striking(recording, minimum_occurrences=occurrences).indices("mlp.0")
    assert len(pc.find.striking(recording, minimum_score=1.1)) == 0


def test_spread_leaves_out_a_second_neuron_for_the_same_family(planted) -> None:
    found = pc.find.striking(planted[0], spread=True)
    assert NOISY not in found.indices("mlp.0") and FORMS in found.indices("mlp.0")


def test_needs_by_token() -> None:
    model = pc.load(Planted(0).eval(), tokenizer=tiny.tokenizer(template="$A"))
    recording = pc.record(model, ["the error"], "mlp.0", [pc.Moments()], progress=False)
    with pytest.raises(pc.errors.DataError, match="ByToken"):
        pc.find.striking(recording)


def test_word_groups() -> None:
    groups = word_groups([" return", "ing", " Returns", ".", " a", " to", " returned"])
    assert [group.words for group in groups] == [("return", "returns", "returned"), ("to",)]
    assert groups[0].slots.tolist() == [0, 2, 6]


def _is(neuron: int):
    import polars as pl

    return pl.col("index") == neuron
