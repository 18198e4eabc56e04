"""Frequency tagging: peaks that are planted, and a network that reads sentences word by word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn

import patchclamp as pc
from patchclamp.find.frequency_tagging import _without_neighbours, frequency_tagging, tagged_rates, tagging_signal

UNITS = 400
TIME = np.arange(UNITS)
PLANTED = {
    "first word": (TIME % 4 == 0).astype(float),
    "every other word": (TIME % 2 == 0).astype(float),
    "a wave": np.cos(2 * np.pi * TIME / 4),
}


def noise(neurons: int, seed: int, series: int = 10, units: int = UNITS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((series, units, neurons))


def planted(seed: int, strength: float = 1.0, neurons: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Neurons 0, 1, 2 are planted; the control and all others are noise."""
    signal = noise(neurons, seed)
    signal[:, :, :3] += strength * np.stack(list(PLANTED.values()), 1)
    return signal, noise(neurons, seed + 1000)


def by_index(found: pc.Neurons) -> dict:
    return {row["index"]: row for row in found.to_polars().iter_rows(named=True)}


# Spectra --------------------------------------------------------------------------------------------


def test_amplitudes_by_hand() -> None:
    """A pulse on one word of four has N/4 at 1 Hz, and as much at its harmonic, 2 Hz."""
    signal = np.stack([*PLANTED.values(), (-1.0) ** TIME, np.full(UNITS, 0.1), TIME % 2 * 0.0], 1)[None]
    found = by_index(frequency_tagging(signal, signal, screen="p"))
    permuted = by_index(frequency_tagging(signal, signal, null="permute", permutations=19))
    amplitudes = [(found[n]["amplitude_sentence"], found[n]["amplitude_phrase"]) for n in range(6)]
    expected = [(100, 100), (0, 200), (200, 0), (0, 400), (0, 0), (0, 0)]
    np.testing.assert_allclose(amplitudes, expected, atol=1e-9)
    # Two powers over what is expected of a series of variance 1/2, and of 1 at the Nyquist frequency.
    assert found[2]["p_sentence"] == pytest.approx(np.exp(-(200**2) / (0.5 * UNITS**2 / (UNITS - 1))), rel=1e-6, abs=0)
    assert found[3]["p_phrase"] == pytest.approx(chi2.sf(400**2 / (UNITS**2 / (UNITS - 1)), 1), rel=1e-6, abs=0)
    for n in (4, 5):
        assert found[n]["p_sentence"] == found[n]["p_phrase"] == permuted[n]["p_phrase"] == 1


@pytest.mark.parametrize("null", ["analytic", "permute"])
def test_planted_neurons_are_found_each_with_its_rates(null: str) -> None:
    for seed in range(3):
        found = frequency_tagging(*planted(seed), null=null, permutations=199, screen="p")
        assert set(found.top(3)["index"]) == {0, 1, 2}
        rows = by_index(found)
        assert [rows[n]["kind"] for n in range(3)] == ["both", "phrase only", "sentence only"]
        assert [rows[n]["harmonic"] for n in range(3)] == [True, False, False]
        others = [row["kind"] for n, row in rows.items() if n > 2]
        assert others.count("none") >= 0.995 * len(others)
        assert [name for name in found.columns if name.endswith("_phrase")] == [
            f"{what}_phrase" for what in ("amplitude", "p", "q", "difference", "z")
        ]


@pytest.mark.parametrize("null", ["analytic", "permute"])
def test_in_noise_one_of_twenty_passes_the_screen_and_none_with_q(null: str) -> None:
    arguments = (noise(4000, 0, series=3, units=200), noise(4000, 1, series=3, units=200))
    found = frequency_tagging(*arguments, null=null, permutations=399)
    shares = [(found[f"p_{rate}"] < 0.05).mean() for rate in ("sentence", "phrase")]
    print(f"{null}: {shares} of noise has p < 0.05")
    for share in shares:
        assert share == pytest.approx(0.05, abs=0.015)
    assert (found["kind"] != "none").sum() == 0
    # The paper's rule, where there is nothing to find, calls most of those that pass.
    assert (frequency_tagging(*arguments, screen="p")["kind"] != "none").sum() > 100


def test_both_nulls_agree() -> None:
    signal, control = planted(0, strength=0.06, neurons=300)
    p = [by_index(frequency_tagging(signal, control, null=null, permutations=2000)) for null in ("analytic", "permute")]
    for rate in ("p_sentence", "p_phrase"):
        one, two = (np.asarray([rows[n][rate] for n in range(300)]) for rows in p)
        np.testing.assert_allclose(one, two, atol=0.05)
    again = frequency_tagging(signal, control, null="permute", permutations=2000)
    assert again == frequency_tagging(signal, control, null="permute", permutations=2000)
    assert again != frequency_tagging(signal, control, null="permute", permutations=2000, seed=1)


def test_a_peak_that_the_control_has_too_does_not_count() -> None:
    signal, control = planted(0)
    control[:, :, 0] += PLANTED["first word"]
    found = frequency_tagging(signal, control)
    rows = by_index(found)
    assert rows[0]["q_sentence"] < 1e-6 and rows[0]["kind"] == "none"
    assert [rows[n]["kind"] for n in (1, 2)] == ["phrase only", "sentence only"]


def test_z_is_over_the_neurons_of_all_sites() -> None:
    signal, control = planted(0)
    whole = frequency_tagging(signal, control)
    cuts = {"mlp.0": slice(0, 1), "mlp.1": slice(1, None)}
    one, other = ({name: each[:, :, cut] for name, cut in cuts.items()} for each in (signal, control))
    parts = frequency_tagging(one, other)
    assert parts.sites == ["mlp.1", "mlp.0"] or parts.sites == ["mlp.0", "mlp.1"]
    np.testing.assert_allclose(parts["score"], whole["score"])
    assert parts.at("mlp.0")["kind"].to_list() == ["both"]
    difference = by_index(whole)
    values = np.asarray([difference[n]["difference_sentence"] for n in range(1000)])
    assert difference[2]["z_sentence"] == pytest.approx((values[2] - values.mean()) / values.std())
    amplitudes = [np.abs(np.fft.rfft(each[:, :, 2], axis=1)[:, 100]).mean() for each in (signal, control)]
    assert values[2] == pytest.approx(amplitudes[0] - amplitudes[1])


def test_where_rates_lie() -> None:
    found = {each.name: each for each in tagged_rates(UNITS, {"phrase": 2.0, "sentence": 1.0}, 4.0)}
    assert (found["sentence"].bin, found["sentence"].nyquist, found["sentence"].harmonic_of) == (100, False, ())
    assert (found["phrase"].bin, found["phrase"].nyquist, found["phrase"].harmonic_of) == (200, True, ("sentence",))
    eight = {each.name: each.harmonic_of for each in tagged_rates(240, {"s": 0.5, "k3": 4 / 3, "k4": 1.0}, 4.0)}
    assert eight == {"s": (), "k4": ("s",), "k3": ()}
    three = frequency_tagging(noise(20, 0, units=240), noise(20, 1, units=240), {"s": 0.5, "k3": 4 / 3, "k4": 1.0})
    assert {"z_s", "z_k3", "z_k4"} <= set(three.columns)


# A network that reads -------------------------------------------------------------------------------

WORDS = [f"{place}{which}" for place in "abcd" for which in ("x", "yy", "zzz")]


class Reads(nn.Module):
    """Neurons: a first word; a place that is a multiple of four; a first or third word; how long a token is alone."""

    def __init__(self, tokens: list[str], per_word: bool) -> None:
        super().__init__()
        self.neurons = nn.Identity()
        first = torch.tensor([float(token.strip()[:1] == "a") for token in tokens])
        third = torch.tensor([float(token.strip()[:1] == "c") for token in tokens])
        self.register_buffer("table", torch.stack([first, torch.zeros(len(tokens)), first + third], 1))
        self.per_word = per_word

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        values = self.table[input_ids].clone()  # type: ignore[index]
        place = torch.arange(input_ids.shape[1])
        values[..., 1] = (place % 4 == 0).float() if self.per_word else place.float()
        return self.neurons(values)


def reading_model(by_letter: bool = False, spaces: bool = False) -> pc.Model:
    """By words, by letters, or by words with the space before them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = list("abcdxyz ")
    tokens = ["?", *(letters if by_letter else WORDS), *(f" {word}" for word in WORDS)]
    inner = Tokenizer(models.WordLevel({token: n for n, token in enumerate(tokens)}, unk_token="?"))
    pattern = Regex("." if by_letter else " ?[a-z]+")
    split = pre_tokenizers.Split(pattern, "isolated") if by_letter or spaces else pre_tokenizers.WhitespaceSplit()
    inner.pre_tokenizer = split  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", model_max_length=600)
    return pc.load(Reads(tokens, not by_letter), tokenizer=tokenizer)


def sentences(number: int, seed: int = 0) -> list[str]:
    made = np.random.default_rng(seed)
    return [" ".join(f"{place}{made.choice(['x', 'yy', 'zzz'])}" for place in "abcd") for _ in range(number)]


def test_what_sentences_drive_is_found_and_what_places_drive_is_not() -> None:
    model = reading_model()
    signal, control = (
        tagging_signal(model, sentences(60), "module:neurons", shuffles=20, scrambled=each) for each in (False, True)
    )
    assert {name: each.shape for name, each in signal.items()} == {"module:neurons": (10, 240, 3)}
    made = np.random.default_rng(0)
    for each in (signal, control):  # neurons of which none has a rhythm
        each["others"] = made.standard_normal((10, 240, 200))
    rows = by_index(frequency_tagging(signal, control).at("module:neurons"))
    assert [rows[n]["kind"] for n in range(3)] == ["both", "none", "phrase only"]
    assert rows[1]["q_sentence"] < 1e-6 and rows[1]["difference_sentence"] == pytest.approx(0)


def test_a_unit_is_the_mean_over_its_tokens() -> None:
    model = reading_model(by_letter=True)
    text = ["ax byy czzz dx", "azzz bx cx dyy"]
    found = tagging_signal(model, text, "module:neurons", shuffles=1, groups=1)["module:neurons"][0]
    swapped = found[0, 1] == 1.5  # the second sentence came first
    words = (" ".join(text[::-1] if swapped else text)).split()
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    expected = [start + (len(word) - 1) / 2 for start, word in zip(starts, words, strict=True)]
    np.testing.assert_allclose(found[:, 1], expected)  # places of letters, without the spaces between words
    np.testing.assert_allclose(found[:, 0], [float(word[0] == "a") / len(word) for word in words])


def test_the_space_before_a_word_is_the_words() -> None:
    text = sentences(30)
    plain, spaced = (
        tagging_signal(model, text, "module:neurons", shuffles=2, groups=2)["module:neurons"]
        for model in (reading_model(), reading_model(spaces=True))
    )
    assert plain[:, :, 0].sum() == 60
    np.testing.assert_array_equal(spaced, plain)


def test_orders_are_those_of_the_seed_and_groups_are_averages() -> None:
    model = reading_model()
    text = [f"{a} {b} cx dx" for a in ("ax", "bx", "cx") for b in ("byy", "ayy", "dzzz")]
    one, same, other = (
        tagging_signal(model, text, "module:neurons", shuffles=6, groups=6, seed=seed)["module:neurons"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len({each.tobytes() for each in one}) > 1
    grouped = tagging_signal(model, text, "module:neurons", shuffles=6, groups=2)["module:neurons"]
    np.testing.assert_allclose(grouped, one.reshape(2, 3, *one.shape[1:]).mean(1))


@pytest.mark.parametrize("number", [2, 3, 4, 8])
def test_in_the_control_no_two_words_still_follow_each_other(number: int) -> None:
    ways = _without_neighbours(number)
    assert len(ways) and (np.sort(ways, axis=1) == np.arange(number)).all()
    assert not (np.diff(ways, axis=1) == 1).any()
    if number == 4:
        assert len(ways) == 11


def test_words_are_scrambled_within_their_sentence() -> None:
    model = reading_model()
    found = tagging_signal(model, sentences(40), "module:neurons", shuffles=5, groups=5, scrambled=True)
    first = found["module:neurons"][:, :, 0].reshape(5, 40, 4)
    assert (first.sum(2) == 1).all()  # each sentence keeps its first word, somewhere
    assert (first.mean((0, 1)) > 0.05).all()


# Errors ---------------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    signal, control = noise(5, 0), noise(5, 1)
    broken = signal.copy()
    broken[0, 0, 0] = np.nan
    for arguments, options, match in [
        ((signal[:, :-1], control[:, :-1]), {}, r"399 units at 4 a second are 99\.75 periods of 1 Hz"),
        ((signal, control, {"word": 4.0}), {}, "word: 4 Hz cannot be seen at 4 units a second"),
        ((signal, control, {}), {}, "rates are"),
        ((signal, control), {"null": "zzz"}, "analytic, permute"),
        ((signal, control), {"screen": "zzz"}, "q, p"),
        ((signal, control), {"null": "permute", "permutations": 5}, "at least 19"),
        ((signal[0], control), {}, r"the signal of signal is \[series, units, neurons\]"),
        ((broken, control), {}, "not finite"),
        (({}, {}), {}, "the signal has no site"),
        (({"a": signal}, {"b": control}), {}, "a is not in both"),
        ((signal, control[:, :-4]), {}, "the control of signal has 396 units"),
        (({"a": signal, "b": signal[:, 4:]}, {"a": control, "b": control}), {}, "the signal of b has 396 units"),
    ]:
        with pytest.raises(pc.errors.PatchclampError, match=match):
            frequency_tagging(*arguments, **options)
    with pytest.warns(UserWarning, match="29 periods of the slowest rate are few"):
        frequency_tagging(signal[:, :116], control[:, :116])


def test_bad_sentences_are_said() -> None:
    model = reading_model()
    for given, options, match in [
        (["ax bx cx dx", "ax bx cx"], {}, r"sentence 1 has 3 words \('ax bx cx'\) and the first has 4"),
        (["ax"], {}, "at least two words"),
        ([], {}, "at least two words"),
        ([["ax", " "]], {}, "sentence 0 has a word that is no text"),
        (sentences(151), {}, r"151 sentences are 604 tokens and Reads reads 600 at once: about 150 sentences fit"),
        (sentences(9), {"groups": 7}, "100 orders do not divide into 7 groups"),
        ([["ax"] * 9], {"scrambled": True}, "at most 8"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            tagging_signal(model, given, "module:neurons", **options)
    with pytest.raises(pc.errors.ModelError, match="tokenizer"):
        tagging_signal(pc.load(nn.Sequential(nn.Linear(2, 2))), sentences(3), "module:0")


# Real -----------------------------------------------------------------------------------------------


def template_sentences(number: int) -> list[str]:
    """A noun phrase of two words and a verb phrase of two."""
    made = np.random.default_rng(0)
    parts = [
        ["big", "red", "old", "sad", "new", "fun", "good", "little"],
        ["dogs", "boys", "birds", "girls", "cats", "trees"],
        ["like", "see", "want", "find", "eat", "make"],
        ["food", "cars", "toys", "balls", "books", "water"],
    ]
    return [" ".join(str(made.choice(part)) for part in parts) for _ in range(number)]


def test_sentences_tag_neurons_of_a_real_network_and_scrambled_ones_do_not(data_folder: Path) -> None:
    """An untrained copy has as many, which is printed: each place in these sentences has words of its own."""
    from transformers import AutoModelForCausalLM

    folder = data_folder / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    trained = pc.load(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        empty = AutoModelForCausalLM.from_config(trained.module.config).eval()
    untrained = pc.load(empty, tokenizer=trained.tokenizer)
    text = template_sentences(40)  # about as many as fit into its 512 tokens
    for name, model in (("trained", trained), ("untrained", untrained)):
        signal, control, other = (
            tagging_signal(model, text, "mlp.*", shuffles=10, scrambled=scrambled, seed=seed)
            for scrambled, seed in ((False, 0), (True, 0), (True, 1))
        )
        found, nothing = frequency_tagging(signal, control), frequency_tagging(other, control)
        for what, each in (("sentences", found), ("scrambled", nothing)):
            kinds = {kind: count / len(each) for kind, count in each["kind"].value_counts().sort("kind").iter_rows()}
            passed = [(each[f"q_{rate}"] < 0.05).mean() for rate in ("sentence", "phrase")]
            shown = {kind: f"{share:.1%}" for kind, share in kinds.items()}
            print(f"{name:10} {what}: {shown}, with q < 0.05 {passed[0]:.1%} (sentence), {passed[1]:.1%} (phrase)")
        assert (found["kind"] != "none").mean() > 0.04
        assert (nothing["kind"] != "none").mean() < 0.02
