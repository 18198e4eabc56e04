"""S075: the shares of three changed neurons come out exactly, and the parts of a linear network add up."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.find.projection_change import (
    neurons_for_share,
    projection_change,
    projection_groups,
    projection_probe,
)
from patchclamp.testbed import languages

WIDTH, HIDDEN = 6, 20


class Residual(nn.Module):
    """x + MLP(x), without norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


DATA = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(1))
VECTOR = np.arange(1.0, WIDTH + 1)


def changed(shifts: dict[int, float]) -> tuple[pc.Model, pc.Model]:
    """A network and one in which the biases of some neurons are other ones."""
    before = Residual().eval()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for neuron, shift in shifts.items():
            after.up.bias[neuron] += shift
    return pc.load(before), pc.load(after)


def test_the_parts_of_a_linear_residual_add_up() -> None:
    before, after = changed({3: 0.5, 7: -0.8, 11: 0.2})
    with torch.no_grad():
        after.module.down.bias += 0.1  # type: ignore[operator,union-attr]
    found = projection_change(before, after, DATA, VECTOR, "mlp.0")
    unit = torch.as_tensor(VECTOR / np.linalg.norm(VECTOR), dtype=torch.float32)
    with torch.no_grad():
        whole = float(((before.module(DATA) - after.module(DATA)) @ unit).mean())
        bias = float((before.module.down.bias - after.module.down.bias) @ unit)  # type: ignore[operator,union-attr]
    assert found["score"].sum() + bias == pytest.approx(whole, abs=1e-5)


def test_three_changed_neurons_are_found_with_their_shares() -> None:
    before, after = changed({3: 0.5, 7: -0.8, 11: 0.2})
    found = projection_change(before, after, DATA, VECTOR, "mlp.0")
    moved = {int(index): float(score) for index, score in zip(found["index"], found["score"], strict=True) if score}
    assert set(moved) == {3, 7, 11}
    # By hand, neuron by neuron.
    means = [each.activations(DATA, "mlp.0").double().mean(0).numpy() for each in (before, after)]
    writes = before.output_weights("mlp.0").double().numpy() @ (VECTOR / np.linalg.norm(VECTOR))
    for neuron, score in moved.items():
        assert score == pytest.approx((means[0][neuron] - means[1][neuron]) * writes[neuron], abs=1e-6)
    reducing = [score for score in moved.values() if score > 0]
    shares = {int(i): s for i, s in zip(found["index"], found["share"], strict=True)}
    for neuron, score in moved.items():
        total = sum(reducing) if score > 0 else sum(moved.values()) - sum(reducing)
        assert shares[neuron] == pytest.approx(score / total)
    assert neurons_for_share(found)[0.99] == len(reducing)


def test_the_eight_groups_are_a_partition() -> None:
    made = np.random.default_rng(0)
    before, after = changed({neuron: float(made.normal()) for neuron in range(HIDDEN)})
    found = projection_change(before, after, DATA, VECTOR, "mlp.0")
    groups = projection_groups(found)
    assert groups["neurons"].sum() == HIDDEN and len(groups) <= 8
    assert groups["sum"].sum() == pytest.approx(found["score"].sum())
    for site, index, score, b, a, mean_before, mean_after, cosine, group, _ in found.to_polars().rows():
        words = ["along" if cosine > 0 else "against", "active" if mean_before >= 0 else "below zero"]
        words.append("rises" if mean_after > mean_before else "falls")
        assert group == ", ".join(words), (site, index)
        assert (score > 0) == ((cosine > 0) != (mean_after > mean_before)) and score == pytest.approx(b - a)


def test_bad_input() -> None:
    before, after = changed({1: 0.1})
    other = pc.load(nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, WIDTH)))
    for one, two, vector, message in (
        (before, before, VECTOR, "nothing changed between the two models"),
        (before, after, VECTOR[:3], "the direction has 3"),
        (before, after, 0 * VECTOR, "a vector .d. that is not zero"),
        (before, other, VECTOR, "other numbers of neurons"),
        (before, after, pc.Directions({"resid_post.0": np.eye(2)}), "one direction at one site"),
    ):
        with pytest.raises(DataError, match=message):
            projection_change(one, two, DATA, vector, "mlp.0")


def test_a_probe_points_to_its_class_or_is_refused() -> None:
    trained: Any = pc.testbed.trained("four_languages")
    texts = languages.documents(80, seed=5)
    language = texts.labels["language"][0]
    direction, accuracy = projection_probe(trained.model, texts, "language", language)
    assert accuracy > 0.9 and direction.names == [language]
    dealt = np.random.default_rng(0).permutation([each.labels["language"] for each in texts]).tolist()
    shuffled = pc.Texts([each.text for each in texts], labels={"language": dealt})
    with pytest.raises(DataError, match="always saying one class"):
        projection_probe(trained.model, shuffled, "language", language)
    with pytest.raises(DataError, match="has no 'language' called 'xx'"):
        projection_probe(trained.model, texts, "language", "xx")
