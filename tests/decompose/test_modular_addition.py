"""The analysis of S065 on a network that adds modulo 113: what it has found is waves, of many frequencies.

The card expects five frequencies to hold over 80% of an embedding's power (for p = 53). This network, one layer of
ReLU neurons without attention, does not end so: five hold about a third, three times what they hold untrained. Each
*neuron*, though, comes to have one frequency, and the same one in what it reads and in what it writes.
"""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import patchclamp as pc
from patchclamp.testbed import modular, trained


def waves(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each column over the 113 numbers: its strongest frequency, and the share of its power at that."""
    power = np.abs(np.fft.rfft(weights - weights.mean(0), axis=0)) ** 2
    return power.argmax(0), power.max(0) / power.sum(0)


def parts(checkpoint: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedding `[113, width]`, what each neuron reads of a number and writes to a sum `[113, neurons]`."""
    module = trained("modular_addition", checkpoint=checkpoint).model.module
    assert isinstance(module, modular.ModularAddition)
    first, last = layers(module)
    embedding = module.embedding.weight.detach().numpy()
    return embedding, embedding @ first.weight.detach().numpy().T, last.weight.detach().numpy()


def layers(module: modular.ModularAddition) -> tuple[nn.Linear, nn.Linear]:
    first, last = module.layer[0], module.layer[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return first, last


def five(embedding: np.ndarray) -> float:
    return float(np.sort(pc.decompose.fourier_power(embedding).share)[-5:].sum())


def test_power_gathers_in_fewer_frequencies_but_not_in_five() -> None:
    untrained = five(np.random.default_rng(0).standard_normal((modular.P, modular.WIDTH)))
    memorised, found = five(parts("early")[0]), five(parts("last")[0])
    print(f"share of five frequencies: untrained {untrained:.2f}, memorised {memorised:.2f}, generalised {found:.2f}")
    assert untrained == pytest.approx(memorised, abs=0.05)
    assert 2.5 * untrained < found < 0.8


def test_each_neuron_has_one_frequency_and_writes_what_it_reads() -> None:
    for checkpoint, least, most in (("early", 0.0, 0.2), ("last", 0.5, 1.0)):
        _, reads, writes = parts(checkpoint)
        frequency, share = waves(reads)
        assert least < np.median(share) < most
    written, _ = waves(writes)
    assert (frequency == written).mean() > 0.8


def test_the_embedding_needs_the_many_directions_that_it_has() -> None:
    """A few principal components are not enough for the sums, and most of them are."""
    one = trained("modular_addition")
    module = one.model.module
    assert isinstance(module, modular.ModularAddition)
    pairs = modular.all_pairs()

    def wrong(embedding: np.ndarray) -> float:
        first, last = layers(module)
        total = embedding[pairs[:, 0]] + embedding[pairs[:, 1]]
        hidden = np.maximum(total @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
        sums = (hidden @ last.weight.detach().numpy().T).argmax(1)
        return float((sums != pairs.sum(1) % modular.P).mean())

    embedding = module.embedding.weight.detach().numpy().astype(np.float64)
    centred = embedding - embedding.mean(0)
    left, size, right = np.linalg.svd(centred, full_matrices=False)
    errors = [wrong((left[:, :k] * size[:k]) @ right[:k] + embedding.mean(0)) for k in (2, 8, 100)]
    assert errors[0] > 0.9 and errors[1] > 0.5 and errors[2] < 0.05
