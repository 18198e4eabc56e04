"""`Atlas.search`: what is found, why, and in which order."""

from __future__ import annotations

import polars as pl
import pytest

from patchclamp.atlas import Atlas
from patchclamp.errors import DataError


def test_every_neuron_that_holds_the_word_is_found_and_no_other(atlas: Atlas) -> None:
    found = {tuple(neuron) for neuron in atlas.search("returns", limit=1000)}
    assert found == _brute_force(atlas, "returns")
    assert 0 < len(found) < len(atlas)


def test_families_come_before_tokens_before_examples(atlas: Atlas) -> None:
    found = atlas.search("return", limit=1000).to_polars()
    kinds = [match.split()[0] if not match[0].isdigit() else "example" for match in found["match"]]
    order = [kind for place, kind in enumerate(kinds) if not place or kinds[place - 1] != kind]
    assert order[:2] == ["family", "token"] and order[-1] == "example"
    families = found.filter(pl.col("match").str.starts_with("family"))
    assert families["score"].to_list() == sorted(families["score"].to_list(), reverse=True)


def test_a_whole_word_comes_before_a_part_of_one(atlas: Atlas) -> None:
    # "in" is a word, and a part of "string" and "index".
    found = atlas.search("in", limit=1000).to_polars()["match"].to_list()
    kinds = []
    for match in found:
        text = match.partition("“")[2].partition("”")[0]
        whole = "in" in text.split(", ")
        kinds.append(3 if not text else (0 if match.startswith("family") else 1) if whole else 2)
    assert kinds == sorted(kinds) and set(kinds) == {0, 1, 2, 3}


def test_upper_and_lower_case_are_the_same(atlas: Atlas) -> None:
    assert atlas.search("RETURN").names == atlas.search("return").names


def test_a_piece_of_an_example_is_found_across_tokens(atlas: Atlas) -> None:
    tokens = atlas.neuron("mlp.0:7").examples["tokens"][0].to_list()
    phrase = "".join(tokens[3:6])
    found = atlas.search(phrase, limit=1000)
    assert ("mlp.0", 7) in found
    assert found.to_polars().filter(site="mlp.0", index=7)["match"][0].endswith("examples")


def test_the_limit_keeps_the_best(atlas: Atlas) -> None:
    assert atlas.search("return", limit=3).names == atlas.search("return", limit=1000).names[:3]


def test_nothing_found_is_an_empty_table_with_the_columns(atlas: Atlas) -> None:
    found = atlas.search("xylophone")
    assert len(found) == 0 and "match" in found.columns and "score" in found.columns


@pytest.mark.parametrize("word", ["<script>alert(1)</script>", ".*", "(", "%", "line\nbreak", "שלום"])
def test_a_word_is_text_not_a_pattern(atlas: Atlas, word: str) -> None:
    found = {tuple(neuron) for neuron in atlas.search(word, limit=1000)}
    assert found == _brute_force(atlas, " ".join(word.split()))


def test_nothing_to_search_for(atlas: Atlas) -> None:
    with pytest.raises(DataError, match="needs a word"):
        atlas.search("  \n")
    with pytest.raises(DataError, match="limit=0"):
        atlas.search("return", limit=0)


def _brute_force(atlas: Atlas, word: str) -> set[tuple[str, int]]:
    found = set()
    for site, index, family in atlas.neurons.to_polars().select("site", "index", "family").iter_rows():
        if word in family.lower():
            found.add((site, index))
    for site, index, token in atlas.table("tokens").select("site", "index", "token").collect().iter_rows():
        if word in token.lower():
            found.add((site, index))
    for site, index, tokens in atlas.table("examples").select("site", "index", "tokens").collect().iter_rows():
        if word in " ".join("".join(tokens).lower().split()):
            found.add((site, index))
    return found
