"""Corners of several finders that mutants showed to be untested (see docs/mutants.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp as pc
from patchclamp.find import activation_coverage, fingerprint, fingerprint_distance, frequency_tagging

# Fingerprints ---------------------------------------------------------------------------------------


def fingerprint_of(values: list[list[float]]) -> pc.find.Fingerprint:
    module = nn.Sequential(nn.Identity())
    return fingerprint(
        pc.record(module, pc.Tensors(torch.tensor(values)), "module:0", [pc.Histogram(), pc.Moments()], progress=False)
    )


def test_the_range_of_a_reference_ends_where_its_bins_end() -> None:
    """What lies beyond +-16,384 does not make the range infinite, or all distances on its scale were 0."""
    far = fingerprint_of([[-1e6, 1.0], [1e6, 2.0]])
    one, other = fingerprint_of([[4.25, 4.25]]), fingerprint_of([[4.75, 4.25]])
    found = fingerprint_distance(one, other, reference=far).neurons
    assert found["score"][0] == pytest.approx(0.5 / (1.2 * 2 * 16384))


def test_a_site_of_one_neuron_has_a_fingerprint() -> None:
    data = pc.Tensors(torch.tensor([[1.0], [2.0]]))
    recording = pc.record(nn.Sequential(nn.Identity()), data, "module:0", [pc.Histogram()], progress=False)
    assert fingerprint(recording).count == {"module:0": 2}


@pytest.mark.parametrize("wrong", [np.inf, np.nan, -1.0])
def test_a_weight_is_a_finite_number(wrong: float) -> None:
    one = fingerprint_of([[1.0, 2.0]])
    with pytest.raises(pc.errors.DataError, match="finite and at least 0"):
        fingerprint_distance(one, one, weights={"module:0": [wrong, 1.0]})


# Activation coverage --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_a_steepness_is_a_finite_number(wrong: float) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(pc.errors.DataError, match="alpha of module:1 is above 0"):
        activation_coverage(net, pc.Tensors(torch.randn(60, 3)), "module:1", alpha=wrong)


# Frequency tagging ----------------------------------------------------------------------------------


def test_amplitude_is_that_of_the_average_series() -> None:
    series = np.random.default_rng(0).standard_normal((5, 160, 4))
    found = frequency_tagging(series, series).to_polars().sort("index")
    spectrum = np.abs(np.fft.rfft(series.mean(0), axis=0))
    np.testing.assert_allclose(found["amplitude_sentence"], spectrum[40])
    np.testing.assert_allclose(found["amplitude_phrase"], spectrum[80])


def test_permutations_beyond_one_block_are_as_many_as_asked_for() -> None:
    """A block holds some thousands of shuffled series: these are one block and a little of the next."""
    units = 4000
    series = np.random.default_rng(0).standard_normal((1, units, 40))
    number = (1 << 22) // (units * 2) + 19
    found = frequency_tagging(series, series, null="permute", permutations=number)
    assert found["p_sentence"].to_numpy().max() <= 1


# Weights --------------------------------------------------------------------------------------------


def test_experts_of_a_model_have_weights_of_their_own() -> None:
    from transformers import MixtralConfig, MixtralModel

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = MixtralConfig(vocab_size=20, num_hidden_layers=1, num_local_experts=3, max_position_embeddings=32, **sizes)
    model = pc.load(MixtralModel(config).eval())
    experts = model.module.get_submodule(model.site("expert.0.1").module)
    assert torch.equal(model.output_weights("expert.0.1"), experts.get_parameter("down_proj")[1].T)
    gate, up = experts.get_parameter("gate_up_proj")[1].chunk(2)
    found = model.input_weights("expert.0.1")
    assert torch.equal(found["gate"], gate) and torch.equal(found["up"], up)
