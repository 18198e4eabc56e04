"""`find.striking` on all-MiniLM-L6-v2 and this Python's documentation: neurons for words exist, chance gives none."""

from __future__ import annotations

import numpy as np
import pytest

import patchclamp as pc
from patchclamp.find.striking import family_scores


def both(model: pc.Model, site: str, examples: int) -> tuple[pc.Recording, pc.Recording]:
    """A recording, and the same activations paired with the tokens of other rows."""
    data = pc.corpora.python_docs(limit=examples, kinds=("topics", "docstring"))
    real = pc.record(model, data, site, [pc.ByToken()], activations=True, max_length=64, progress=False)
    return real, real.with_tokens_permuted(seed=examples)


def holds_up(real: pc.Recording, null: pc.Recording, at_least: int) -> None:
    (site,) = real
    found = pc.find.striking(real)
    assert len(found) >= at_least
    assert len(pc.find.striking(null)) == 0
    best, chance = (family_scores(each, site)["score"].to_numpy() for each in (real, null))
    # Not a matter of where the line is drawn.
    assert best.max() > 5 * chance.max() and chance.max() < 0.05
    firings = real[site].by_token.fired_total
    np.testing.assert_array_equal(null[site].by_token.fired_total, firings)
    dense = firings >= np.quantile(firings, 0.99)
    assert chance[dense].max() < 0.03


def test_words_are_found_and_chance_is_not(minilm: pc.Model) -> None:
    holds_up(*both(minilm, "mlp.1", 200), at_least=5)


@pytest.mark.slow
@pytest.mark.parametrize("site", [f"mlp.{layer}" for layer in range(6)])
def test_every_layer_on_a_larger_corpus(minilm: pc.Model, site: str) -> None:
    real, null = both(minilm, site, 2000)
    holds_up(real, null, at_least=5)
    if site == "mlp.1":
        families = [set(family.split(", ")) for family in pc.find.striking(real)["family"].to_list()]
        assert any({"return", "returns"} <= family for family in families)
