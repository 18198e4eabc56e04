"""`find.striking` on neurons that were built to answer to chosen words, through the real recording.

A network of three lines: each neuron reads which token it sees, and a random table of what came before.
So what it fires on is known: on every occurrence of its words, on a share of them, or besides at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from tests.recording import tiny
from torch import nn

import patchclamp as pc
from patchclamp.find.striking import family_scores, word_groups

LONGEST = 32


@dataclass(frozen=True)
class Plant:
    """A neuron that fires on a share `coverage` of the occurrences of `words`, and on a share `noise` of all else."""

    words: str = ""
    coverage: float = 1.0
    noise: float = 0.0


EARLY = {
    "one word in its forms": Plant("return returns returned"),
    "two words in their forms": Plant("error errors value values"),
    "a single word": Plant("loop"),
    "punctuation": Plant(", ."),
    "half pure": Plant("raise raises", noise=0.05),
    "a fifth pure": Plant("file files", noise=0.2),
    "half of all tokens": Plant(noise=0.5),
    "nine tenths of all tokens": Plant(noise=0.9),
    "seldom": Plant(noise=0.01),
    "dead": Plant(),
}
LATE = {
    "three fifths of the occurrences": Plant("key keys", coverage=0.6),
    "a tenth of the occurrences": Plant("open opens", coverage=0.1),
    "the same word again": Plant("return returns returned", coverage=0.9, noise=0.002),
    "half of all tokens, again": Plant(noise=0.5),
}
STRIKING = {
    "early": {"one word in its forms", "two words in their forms", "half pure"},
    "late": {"three fifths of the occurrences", "the same word again"},
}
SITES = {"early": EARLY, "late": LATE}


class Layer(nn.Module):
    """Neurons [tokens] of 0 and 1; the random table makes them fire, or fail, whatever the token."""

    def __init__(self, plants: dict[str, Plant], seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        words, size = tiny.tokenizer("$A"), len(plants)
        drive, fails, fires = torch.zeros(tiny.VOCABULARY, size), torch.zeros(1, size), torch.zeros(1, size)
        for neuron, plant in enumerate(plants.values()):
            for word in plant.words.split():
                drive[words.convert_tokens_to_ids(word), neuron] = 1
            fails[0, neuron], fires[0, neuron] = 1 - plant.coverage, plant.noise
        # Indexed by what came before: in random texts, that has nothing to do with the token.
        chance = torch.rand(tiny.VOCABULARY**2 * LONGEST, size, generator=draw)
        self.drive = nn.Embedding.from_pretrained(drive)
        self.failing = nn.Embedding.from_pretrained((chance < fails).float())
        self.firing = nn.Embedding.from_pretrained((chance > 1 - fires).float())

    def forward(self, ids: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        drive = self.drive(ids)
        return torch.where(drive > 0, drive - self.failing(context), self.firing(context)).clamp(0, 1)


class Planted(nn.Module):
    """Two layers of planted neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = Layer(EARLY, 0), Layer(LATE, 1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        before, earlier = (nn.functional.pad(input_ids, (steps, 0))[:, :-steps] for steps in (1, 2))
        context = (earlier * tiny.VOCABULARY + before) * LONGEST + torch.arange(input_ids.shape[1])
        return self.early(input_ids, context).sum() + self.late(input_ids, context).sum()


@pytest.fixture(scope="module")
def recording() -> pc.Recording:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(tiny.WORDS, draw.integers(10, LONGEST))) for _ in range(600)]
    model = pc.load(Planted().eval(), tokenizer=tiny.tokenizer("$A"))
    return pc.record(model, texts, ["module:early", "module:late"], activations=True, progress=False)


def counted(recording: pc.Recording, site: str, index: int, words: str) -> tuple[int, int, int, int]:
    """By hand, from all activations: tokens, strong firings, occurrences of the words, firings on them."""
    stored = recording[site].activations
    assert stored is not None
    ids = tiny.tokenizer("$A").convert_tokens_to_ids(words.replace(",", " ").split())
    strong, of_word = stored.values[:, index] > 0.5, np.isin(stored.token[:], ids)
    return len(strong), int(strong.sum()), int(of_word.sum()), int((strong & of_word).sum())


def test_exactly_the_planted_neurons_are_found(recording: pc.Recording) -> None:
    found = pc.find.striking(recording).to_polars()
    named = {(row["site"].removeprefix("module:"), row["index"]) for row in found.iter_rows(named=True)}
    assert named == {
        (site, place) for site, plants in SITES.items() for place, name in enumerate(plants) if name in STRIKING[site]
    }
    assert found["score"].to_list() == sorted(found["score"].to_list(), reverse=True)
    for row in found.iter_rows(named=True):
        plant = list(SITES[row["site"].removeprefix("module:")].values())[row["index"]]
        assert set(row["family"].split(", ")) == set(plant.words.split())
        tokens, firings, occurrences, both = counted(recording, row["site"], row["index"], row["family"])
        assert row["firings"] == firings
        assert row["purity"] == pytest.approx(both / firings)
        assert row["coverage"] == pytest.approx(both / occurrences)
        purity = (both / firings - occurrences / tokens) / (1 - occurrences / tokens)
        coverage = (both / occurrences - firings / tokens) / (1 - firings / tokens)
        assert row["score"] == pytest.approx(purity * coverage)
        # What was planted, within five standard errors of a share.
        error = 5 * np.sqrt(plant.coverage * (1 - plant.coverage) / occurrences)
        assert abs(row["coverage"] - plant.coverage) <= error
        elsewhere = (firings - both) / (tokens - occurrences)
        assert abs(elsewhere - plant.noise) <= 5 * np.sqrt(plant.noise * (1 - plant.noise) / tokens)


def test_the_purity_of_a_noisy_neuron_is_what_was_planted(recording: pc.Recording) -> None:
    found = pc.find.striking(recording).to_polars()
    rows = {frozenset(row["family"].split(", ")): row for row in found.iter_rows(named=True)}
    share = 2 / len(tiny.WORDS)
    noisy = rows[frozenset({"raise", "raises"})]
    assert noisy["purity"] == pytest.approx(share / (share + 0.05 * (1 - share)), abs=0.06)
    assert 0.4 < noisy["purity"] < 0.6
    clean = rows[frozenset({"error", "errors", "value", "values"})]
    assert clean["purity"] == clean["coverage"] == clean["score"] == 1.0


def test_every_neuron_has_its_best_family_with_the_rest_at_nothing(recording: pc.Recording) -> None:
    table = family_scores(recording, "module:early")
    assert table["index"].to_list() == list(range(len(EARLY)))
    scores = dict(zip(EARLY, table["score"].to_list(), strict=True))
    assert scores["half of all tokens"] < 0.01 and scores["nine tenths of all tokens"] < 0.01
    assert scores["dead"] == 0.0 and scores["seldom"] < 0.01
    assert scores["punctuation"] < 0.01
    assert 0.1 < scores["a fifth pure"] < 0.3
    dead = table.row(list(EARLY).index("dead"), named=True)
    assert (dead["family"], dead["words"], dead["firings"], dead["purity"], dead["coverage"]) == ("", 0, 0, 0.0, 0.0)


def test_a_single_word_is_found_when_asked_for(recording: pc.Recording) -> None:
    found = pc.find.striking(recording, minimum_words=1).to_polars().filter(pl.col("family") == "loop")
    assert found.select("site", "index", "purity", "coverage").rows() == [
        ("module:early", list(EARLY).index("a single word"), 1.0, 1.0)
    ]


def test_the_minima(recording: pc.Recording) -> None:
    everything = pc.find.striking(recording)
    assert len(pc.find.striking(recording, minimum_score=0.9)) == 2
    assert set(pc.find.striking(recording, minimum_words=3)["family"].str.split(", ").list.len()) == {3, 4}
    assert len(pc.find.striking(recording, minimum_firings=1_000_000)) == 0
    assert len(pc.find.striking(recording, minimum_occurrences=1_000_000)) == 0
    assert len(pc.find.striking(recording, minimum_score=0.0, minimum_words=1)) > len(everything)


def test_by_turns_and_each_family_once(recording: pc.Recording) -> None:
    found = pc.find.striking(recording, spread=True).to_polars()
    names = [list(SITES[row["site"].removeprefix("module:")])[row["index"]] for row in found.iter_rows(named=True)]
    # The best of each site first; "the same word again" shows nothing new.
    assert found["site"].to_list()[:2] == ["module:early", "module:late"]
    assert names[1] == "three fifths of the occurrences"
    assert sorted(names) == sorted(STRIKING["early"] | {"three fifths of the occurrences"})
    assert len(pc.find.striking(recording, spread=True, minimum_score=0.9999, minimum_words=5)) == 0


# The null -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_chance_is_not_striking(recording: pc.Recording, seed: int) -> None:
    """The same activations paired with the tokens of other rows: no neuron is left, and no score."""
    null = recording.with_tokens_permuted(seed)
    for site in null:
        np.testing.assert_array_equal(null[site].by_token.fired_total, recording[site].by_token.fired_total)
        scores = family_scores(null, site)["score"]
        assert scores.max() < 0.01 and scores.mean() < 0.003  # type: ignore[operator]
    assert len(pc.find.striking(null)) == 0
    assert len(pc.find.striking(null, minimum_words=1)) == 0


@pytest.mark.parametrize("rate", [0.003, 0.02, 0.1, 0.5, 0.9, 0.99])
def test_chance_scores_nothing_at_any_rate_of_firing(rate: float) -> None:
    """Two thousand neurons that fire at random, among few tokens: the best of them is still nothing."""
    draw = np.random.default_rng(1)
    module = RandomNeurons(rate, 2000).eval()
    texts = [" ".join(draw.choice(tiny.WORDS, LONGEST)) for _ in range(100)]
    model = pc.load(module, tokenizer=tiny.tokenizer("$A"))
    recording = pc.record(model, texts, "module:layer", [pc.ByToken(threshold=0.5)], progress=False)
    assert recording["module:layer"].by_token.fired_total.mean() == pytest.approx(rate * 3200, rel=0.2)
    assert len(pc.find.striking(recording, minimum_words=1, minimum_firings=5)) == 0
    assert family_scores(recording, "module:layer", minimum_firings=5)["score"].max() < 0.1  # type: ignore[operator]


class RandomNeurons(nn.Module):
    """Neurons that fire by a random table of the token before and the position."""

    def __init__(self, rate: float, size: int) -> None:
        super().__init__()
        chance = torch.rand(tiny.VOCABULARY * LONGEST, size, generator=torch.Generator().manual_seed(0))
        self.layer = nn.Embedding.from_pretrained((chance < rate).float())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        before = nn.functional.pad(input_ids, (1, 0))[:, :-1]
        return self.layer(before * LONGEST + torch.arange(input_ids.shape[1]))


# Words ----------------------------------------------------------------------------------------------


def test_inflected_forms_belong_together() -> None:
    tokens = [" return", ",", " Return", " returns", "ing", " returned", " list", " 12", "list", " a", " lists"]
    groups = {group.words: group.slots.tolist() for group in word_groups(tokens)}
    # Pieces of words, numbers, punctuation and single letters are no words; case is ignored.
    assert groups == {("return", "returns", "returned"): [0, 2, 3, 5], ("list", "lists"): [6, 10]}
    assert word_groups(["return", "returns", ","])[0].slots.tolist() == [0, 1]
    assert word_groups([]) == [] and word_groups([",", "1", "a"]) == []


def test_a_recording_without_tokens_is_refused() -> None:
    model = pc.load(Planted().eval(), tokenizer=tiny.tokenizer("$A"))
    recording = pc.record(model, ["the list"], "module:early", [pc.Moments()], progress=False)
    with pytest.raises(pc.errors.DataError, match=r"module:early was recorded without ByToken"):
        pc.find.striking(recording)
