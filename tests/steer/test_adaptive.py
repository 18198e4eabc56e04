"""Adaptive steering: opposite shifts for two kinds of input, which no single direction can make."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.steer.adaptive import AdaptiveSteering

SIZE = 12
# At right angles to the shift.
MARKER = torch.nn.functional.normalize(torch.tensor([2.0, -1.0] + [0.0] * (SIZE - 2)), dim=0)
SHIFT = torch.nn.functional.normalize(torch.arange(1.0, SIZE + 1), dim=0) * 3


class Toy(nn.Module):
    """A site that shows the input, and a classifier that reads it along the shift: 1 above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.site(values) @ SHIFT


def drawn(seed: int, prompts: int, mixed: bool = False) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Prompts without, with, and which kind each is: kind 1 carries a marker and wants +u, kind 0 another and wants -u.

    Args:
        seed: of all.
        prompts: how many.
        mixed: deal the markers anew, so that they say nothing about the shift.
    """
    made = torch.Generator().manual_seed(seed)
    kind = torch.arange(prompts) % 2
    values = torch.randn(prompts, SIZE, generator=made) * 0.5
    values -= (values @ SHIFT)[:, None] * SHIFT / SHIFT.square().sum()
    sign = 2.0 * kind - 1
    shown = sign[torch.randperm(prompts, generator=made)] if mixed else sign
    values = values + 3 * shown[:, None] * MARKER
    # Before it is steered, each is on the wrong side.
    values = values - sign[:, None] * SHIFT / 3
    return values, values + sign[:, None] * SHIFT + 0.1 * torch.randn(prompts, SIZE, generator=made), kind.numpy()


def right_side(model: pc.Model, values: torch.Tensor, kind: np.ndarray, *interventions: Any) -> float:
    with torch.no_grad(), model.intervene(*interventions):
        return float(((model(values).numpy() > 0) == (kind == 1)).mean())


def test_each_kind_of_input_is_moved_its_own_way() -> None:
    model = pc.load(Toy())
    without, with_, _ = drawn(0, 100)
    single = (with_ - without).mean(0)
    assert single.norm() < 0.05
    found = AdaptiveSteering.fit(model, with_, without, "module:site")
    assert found.directions.names == ["cluster 0", "cluster 1"]
    assert max(found.silhouettes, key=found.silhouettes.__getitem__) == 2 and set(found.silhouettes) == {2, 3, 4, 5}
    cosine = nn.functional.cosine_similarity(torch.tensor(found.directions["module:site"]), SHIFT[None])
    assert sorted(np.sign(cosine.numpy())) == [-1, 1] and (cosine.abs() > 0.999).all()
    fresh, _, kind = drawn(1, 400)
    assert right_side(model, fresh, kind) == 0
    assert right_side(model, fresh, kind, found) >= 0.98
    assert right_side(model, fresh, kind, found.strength(0.2)) < 0.1
    assert found.accuracy["module:site"] == 1
    # The mean of both, weighed by a probe that is sure, is the same; relative to length it still turns each its way.
    for options in ({"mixture": True}, {"relative": True}):
        other = AdaptiveSteering.fit(model, with_, without, "module:site", **options)
        assert right_side(model, fresh, kind, other) >= 0.98


def test_where_the_input_does_not_say_which_way_the_probe_is_at_chance() -> None:
    model = pc.load(Toy())

    def hidden(seed: int, prompts: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        without, with_, kind = drawn(seed, prompts, mixed=True)
        sign = torch.from_numpy(2.0 * kind - 1).float()
        # Without the offset along the shift, too, nothing tells the kinds apart.
        back = sign[:, None] * SHIFT / 3
        return without + back, with_ + back, kind

    without, with_, _ = hidden(0, 400)
    found = AdaptiveSteering.fit(model, with_, without, "module:site", clusters=2)
    fresh, _, kind = hidden(1, 1_000)
    assert right_side(model, fresh, kind, found) == pytest.approx(0.5, abs=0.06)
    # Few prompts are learned by heart: what the probe tells of those it has seen would be far above a half.
    told = [
        AdaptiveSteering.fit(model, with_[:60], without[:60], "module:site", clusters=2, seed=seed).accuracy
        for seed in range(8)
    ]
    assert np.mean([each["module:site"] for each in told]) == pytest.approx(0.5, abs=0.15)


def test_shuffled_pairs_of_prompt_and_cluster_bring_it_to_half() -> None:
    """The probe that was trained on labels dealt anew picks at random."""
    without, with_, _ = drawn(0, 200)
    found = AdaptiveSteering.fit(Toy(), with_, without, "module:site", clusters=2)
    fresh, _, kind = drawn(1, 1_000)
    clusters = found.probes["module:site"].pick(fresh.numpy())
    plus = int(found.directions["module:site"][1] @ SHIFT.numpy() > 0)
    assert ((clusters == plus) == (kind == 1)).mean() > 0.98
    rates = []
    for seed in range(8):
        dealt = np.random.default_rng(seed).permutation(found.labels)
        probe = type(found.probes["module:site"]).fit(without.numpy(), dealt, 2)
        rates.append(((probe.pick(fresh.numpy()) == plus) == (kind == 1)).mean())
    assert np.mean(rates) == pytest.approx(0.5, abs=0.15)


def test_probes_can_go_on_learning() -> None:
    """New prompts carry the marker of the other kind: what the probe knew is wrong of them."""
    model = pc.load(Toy())
    without, with_, _ = drawn(0, 60)
    found = AdaptiveSteering.fit(model, with_, without, "module:site", clusters=2)

    def moved(seed: int, prompts: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        without, with_, kind = drawn(seed, prompts)
        # Nor do they lie on either side of the classifier, which would give them away.
        turned = torch.from_numpy(2.0 * kind - 1).float()[:, None] * (SHIFT / 3 - 6 * MARKER)
        return without + turned, with_ + turned, kind

    new, new_with, _ = moved(1, 100)
    fresh, _, kind = moved(2, 400)
    refined = found.refined(model, new_with, new, steps=100)
    assert refined.directions == found.directions
    before, after = right_side(model, fresh, kind, found), right_side(model, fresh, kind, refined)
    assert after >= 0.98 and before < 0.1


def test_texts_are_read_at_their_last_real_token() -> None:
    torch.manual_seed(0)
    module: Any = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2)).train()
    model = pc.load(module)
    made = torch.Generator().manual_seed(0)
    ids, other = (torch.randint(0, 29, (20, 4), generator=made) for _ in range(2))
    mask = torch.cat([torch.ones(20, 4), torch.zeros(20, 2)], 1).long()
    padded = {"input_ids": torch.cat([ids, torch.full((20, 2), 29)], 1), "attention_mask": mask}
    options: Any = {"sites": "resid_post.*", "clusters": 2}
    plain = AdaptiveSteering.fit(model, {"input_ids": ids}, {"input_ids": other}, **options)
    again = AdaptiveSteering.fit(model, padded, {"input_ids": other}, **options)
    for site in ("resid_post.0", "resid_post.1"):
        np.testing.assert_allclose(plain.directions[site], again.directions[site], atol=1e-5)
        shown = model.activations(ids, site)[:, -1] - model.activations(other, site)[:, -1]
        for cluster in range(2):
            wanted = shown[torch.from_numpy(plain.labels == cluster)].mean(0)
            np.testing.assert_allclose(plain.directions[site][cluster], wanted, atol=1e-5)
    with model.intervene(plain), torch.no_grad():
        assert torch.isfinite(module(input_ids=ids).logits).all()
    assert module.training and not any(each._forward_hooks for each in module.modules())


def test_bad_input_is_said() -> None:
    module = Toy()
    without, with_, _ = drawn(0, 40)
    fit = AdaptiveSteering.fit
    for make, match in [
        (lambda: fit(module, with_[:30], without, "module:site"), "paired: 30 with .* 40 without"),
        (lambda: fit(module, without, without, "module:site"), "differ alike .not at all"),
        (lambda: fit(module, without + SHIFT, without, "module:site"), "differ alike .by one vector"),
        (lambda: fit(module, with_, without, "module:site", clusters=30), "of 30 clusters one has"),
        (lambda: fit(module, with_[:8], without[:8], "module:site"), "each needs 5"),
        (lambda: fit(module, with_, without, "module:site", clusters=0), "at least one"),
        (lambda: fit(module, with_, without, "module:site", strength=math.inf), "finite"),
        (lambda: fit(module, with_ / 0, without, "module:site"), "not finite"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            make()
