"""Striking neurons of the real MiniLM exist, and vanish when its activations are paired with tokens at random."""

from __future__ import annotations

import pytest

import patchclamp as pc
from patchclamp.find.striking import family_scores


@pytest.mark.parametrize("examples", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_striking_neurons_exist_and_the_null_has_none(minilm: pc.Model, examples: int) -> None:
    data = pc.corpora.python_docs(limit=examples)
    sites = ["mlp.1", "mlp.3"] if examples < 1000 else "mlp.*"
    recording = pc.record(minilm, data, sites, [pc.ByToken()], activations=True, progress=False)
    found = pc.find.striking(recording)
    assert len(found) >= 10
    assert found.top(1)["score"][0] > 0.5
    assert set(found.sites) == set(recording)

    null = recording.with_tokens_permuted(seed=0)
    assert len(pc.find.striking(null)) == 0
    worst = max(family_scores(null, site)["score"].max() for site in null)  # type: ignore[type-var]
    assert worst < 0.1, "chance scores far below the least score that counts"


def test_a_striking_neuron_is_one_on_new_text(minilm: pc.Model) -> None:
    data = [example.text for example in pc.corpora.python_docs(limit=300)]
    found = pc.find.striking(pc.record(minilm, data[:150], "mlp.1", [pc.ByToken()], progress=False)).top(5)
    fresh = pc.record(minilm, data[150:], "mlp.1", [pc.ByToken()], progress=False)
    scores = family_scores(fresh, "mlp.1")["score"].to_numpy()
    assert (scores[found.indices("mlp.1")] > 0.3).sum() >= 4
