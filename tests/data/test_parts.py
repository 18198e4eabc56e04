"""Parts of a corpus: the first texts, a sample, and what is left without near duplicates."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from patchclamp.data import Texts
from patchclamp.data.near_duplicates import NearDuplicates
from patchclamp.errors import DataError

NUMBER = 40


def refuses(message: str):
    return pytest.raises(DataError, match=re.escape(message))


def corpus(number: int = NUMBER, **options: Any) -> Texts:
    return Texts(
        [f"text {index}" for index in range(number)],
        {"parity": [index % 2 for index in range(number)]},
        targets=[f"target {index}" for index in range(number)],
        token_labels={"part": [["word", index] for index in range(number)]},
        name="numbers",
        **options,
    )


def numbers(texts: Texts) -> list[int]:
    """Which texts these are; everything that belongs to a text must be with it."""
    found = []
    for each in texts:
        number = int(each.text.split()[1])
        assert (each.labels["parity"], each.target) == (str(number % 2), f"target {number}")
        assert [tuple(span) for span in each.token_labels["part"]] == [
            (0, 4, "word"),
            (5, 5 + len(str(number)), str(number)),
        ]
        found.append(number)
    return found


def test_take_gives_the_first() -> None:
    part = corpus().take(7)
    assert numbers(part) == list(range(7)) and part.name == "numbers"
    assert numbers(corpus().take(100)) == list(range(NUMBER))


@pytest.mark.parametrize("n", [1, 7, NUMBER])
def test_sample_is_in_order_and_fixed_by_its_seed(n: int) -> None:
    first, again, other = (numbers(corpus().sample(n, seed)) for seed in (3, 3, 4))
    assert first == again == sorted(set(first)) and len(first) == n
    assert first != other or n == NUMBER


def test_every_text_is_as_likely_as_any_other() -> None:
    texts, draws, n = Texts([str(index) for index in range(12)]), 600, 3
    counts = Counter(each.text for seed in range(draws) for each in texts.sample(n, seed))
    expected = draws * n / 12
    chi_square = sum((counts[str(index)] - expected) ** 2 / expected for index in range(12))
    assert chi_square < 31.3, "the 99.9% quantile of 11 degrees of freedom"


def test_a_generator_is_sampled_in_one_pass() -> None:
    assert len(Texts(str(index) for index in range(100)).sample(5)) == 5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda texts: texts.sample(NUMBER + 1), f"cannot draw {NUMBER + 1} examples from numbers, which has {NUMBER}"),
        (lambda texts: texts.sample(0), "n is a whole number from 1 on, not 0"),
        (lambda texts: texts.sample(2.5), "n is a whole number from 1 on, not 2.5"),
        (lambda texts: texts.sample(2, seed=-1), "seed is a whole number from 0 on, not -1"),
        (lambda texts: texts.take(True), "n is a whole number from 1 on, not True"),
        (lambda texts: texts.without_near_duplicates(0), "threshold is a similarity in (0, 1], not 0"),
        (lambda texts: texts.without_near_duplicates(1.5), "threshold is a similarity in (0, 1], not 1.5"),
        (lambda texts: texts.without_near_duplicates("high"), "threshold is a similarity in (0, 1], not 'high'"),
    ],
)
def test_parts_that_cannot_be(make: Any, says: str) -> None:
    with refuses(says):
        make(corpus())


# Near duplicates ----------------------------------------------------------------------------------


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the sets of five words, by the definition."""
    a, b = (
        {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}
        for words in (one.lower().split(), other.lower().split())
    )
    return len(a & b) / len(a | b)


def variations(seed: int, number: int = 60) -> list[str]:
    """Texts of which many repeat an earlier one with some words changed."""
    draw = np.random.default_rng(seed)
    vocabulary = [f"w{index}" for index in range(300)]
    texts: list[list[str]] = []
    for _ in range(number):
        if texts and draw.random() < 0.6:
            words = list(texts[int(draw.integers(len(texts)))])
            for _ in range(int(draw.integers(0, 4))):
                words[int(draw.integers(len(words)))] = str(draw.choice(vocabulary))
        else:
            words = draw.choice(vocabulary, int(draw.integers(5, 80))).tolist()
        texts.append(words)
    return [" ".join(each) for each in texts]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_are_those_of_a_comparison_of_all_pairs(threshold: float, seed: int) -> None:
    given = variations(seed)
    kept: list[int] = []
    dropped: list[tuple[int, int]] = []
    for index, text in enumerate(given):
        of = next((each for each in kept if similarity(text, given[each]) >= threshold), None)
        if of is None:
            kept.append(index)
        else:
            dropped.append((index, of))
    assert len(dropped) > 5 and len(kept) > 20
    part = Texts(given, {"number": range(len(given))}).without_near_duplicates(threshold, seed=seed)
    assert part.dropped == tuple(dropped)
    assert [int(each.labels["number"]) for each in part] == kept


def test_short_texts_repeat_only_as_a_whole() -> None:
    part = Texts(["a dog", "A  dog", "a dog barks", "", " "]).without_near_duplicates()
    assert [each.text for each in part] == ["a dog", "a dog barks", ""]
    assert part.dropped == ((1, 0), (4, 3))


def test_nothing_is_dropped_unasked() -> None:
    texts = Texts(["same"] * 3)
    assert len(list(texts)) == 3 and texts.dropped == ()


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.95])
def test_a_pair_at_the_threshold_is_found(threshold: float) -> None:
    # 400 pairs a little above the threshold: to miss one of them has a probability of at most 4%.
    draw = np.random.default_rng(5)
    length = 120
    common = int(np.ceil(2 * length * threshold / (1 + threshold)))
    for pair in range(400):
        words = [f"{pair} {draw.integers(1 << 40)}".replace(" ", "_") for _ in range(2 * length)]
        one, other = words[:length], [*words[:common], *words[length : 2 * length - common]]
        seen = NearDuplicates(threshold, seed=pair)
        first, second = " ".join(one), " ".join(other)
        assert seen.add(0, first) is None
        found = similarity(first, second)
        assert seen.add(1, second) == (0 if found >= threshold else None)
