"""LinEAS: the closed form of two Gaussians, sparsity, and maps that know of each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import patchclamp as pc
from patchclamp.model.hooks import reading
from patchclamp.steer.lineas import LinEAS


def gaussian(seed: int, examples: int, size: int) -> torch.Tensor:
    return torch.randn(examples, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_site() -> nn.Module:
    """No network: the site shows what it is given."""
    return nn.Sequential(nn.Identity())


def chain(size: int, layers: int) -> nn.Module:
    """Layers that hand on what they are given."""
    made = [nn.Linear(size, size, bias=False, dtype=torch.float64) for _ in range(layers)]
    for each in made:
        nn.init.eye_(each.weight)
    return nn.Sequential(*made)


# One site -------------------------------------------------------------------------------------------


def test_two_gaussians_have_the_map_of_the_closed_form() -> None:
    source, target = gaussian(0, 2_000, 1), 3 + 2 * gaussian(1, 2_000, 1)
    found = LinEAS("module:0", steps=120, learning_rate=1.0).fit(one_site(), source, target)
    assert float(found.weights["module:0"]) == pytest.approx(2, abs=0.1)
    assert float(found.biases["module:0"]) == pytest.approx(3, abs=0.1)
    # Of these samples, exactly: the regression of the sorted targets on the sorted source.
    x, y = source[:, 0].sort().values.numpy(), target[:, 0].sort().values.numpy()
    w, b = np.polyfit(x, y, 1)
    assert float(found.weights["module:0"]) == pytest.approx(w, abs=1e-6)
    assert float(found.biases["module:0"]) == pytest.approx(b, abs=1e-6)
    assert found.losses[0] == pytest.approx(np.square(x - y).mean())
    assert found.losses[0] == pytest.approx(3**2 + (2 - 1) ** 2, rel=0.1)
    assert found.losses[-1] == pytest.approx(np.square(w * x + b - y).mean(), abs=1e-6)
    assert (np.diff(found.losses) < 1e-12).all()


def test_equal_sets_leave_the_identity() -> None:
    values = gaussian(0, 64, 8)
    shuffled = values[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    found = LinEAS("module:0", sparsity=1e-3, steps=50).fit(one_site(), values, shuffled)
    changed = (found.weights["module:0"] - 1).abs() + found.biases["module:0"].abs()
    assert changed.max() < 1e-6 and len(found.neurons()) == 0


def test_sparsity_finds_exactly_the_coordinates_that_differ() -> None:
    source, target = gaussian(0, 200, 64), gaussian(1, 200, 64)
    different = [3, 17, 40, 63]
    target[:, different] = 1.5 + 1.5 * target[:, different]
    found = LinEAS("module:0", sparsity=0.01, steps=120, learning_rate=1.0).fit(one_site(), source, target)
    assert sorted(found.neurons()["index"]) == different
    assert len(LinEAS("module:0", steps=5).fit(one_site(), source, target).neurons()) == 64
    at = found.neurons()
    assert (at["bias"] > 0.5).all() and (at["weight"] > 1).all()
    assert len(LinEAS("module:0", sparsity=1.0, steps=5).fit(one_site(), source, target).neurons()) == 0


def test_group_sparsity_finds_the_site_that_differs() -> None:
    """Two sites that do not know of each other: at one there is a shift of 2, at the other noise."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Identity(), nn.Identity()

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.one(values[:, :16]) + self.two(values[:, 16:])

    source, target = gaussian(0, 200, 32), gaussian(1, 200, 32)
    target[:, 16:] += 2.0
    found = LinEAS(["module:one", "module:two"], group_sparsity=0.03, steps=80, learning_rate=1.0).fit(
        Beside(), source, target
    )
    assert set(found.neurons()["site"]) == {"module:two"}
    # Within a site nobody is left out.
    assert len(found.neurons()) == 16


def test_sets_of_two_sizes_are_compared_by_their_quantiles() -> None:
    source, target = gaussian(0, 300, 3), 1 + gaussian(1, 45, 3)
    found = LinEAS("module:0", steps=100, learning_rate=1.0).fit(one_site(), source, target)
    after = source * found.weights["module:0"] + found.biases["module:0"]
    for column in range(3):
        before = wasserstein_distance(source[:, column], target[:, column])
        assert wasserstein_distance(after[:, column], target[:, column]) < 0.25 * before


# Several sites --------------------------------------------------------------------------------------


def test_maps_learned_together_do_not_correct_twice() -> None:
    """A shift of 1 before both layers: the first map takes it away, and leaves nothing to the second."""
    module, sites = chain(4, 2), ["module:0", "module:1"]
    source = gaussian(0, 100, 4)
    target = source.flip(0) + 1.0
    model = pc.load(module)
    joint = LinEAS(sites, sparsity=2e-3, steps=250).fit(model, source, target)
    assert (joint.biases["module:0"] > 0.95).all()
    assert set(joint.neurons()["site"]) == {"module:0"}

    def error(*fitted: Any) -> float:
        with torch.no_grad(), model.intervene(*fitted):
            return float((model(source).mean(0) - target.mean(0)).abs().mean())

    assert error(joint) < 0.1
    alone = [LinEAS(each, steps=100).fit(model, source, target) for each in sites]
    assert error(alone[0]) < 0.01 and error(alone[1]) < 0.01
    # Each was made for what the other had not corrected: together they shift by 2.
    shift = float((source.mean(0) - target.mean(0)).abs().mean())
    assert error(*alone) == pytest.approx(shift, rel=0.1)


def test_steps_that_are_too_long_are_taken_back() -> None:
    """Four sites in a row, each as long a step as it may take alone: together they overshoot."""
    sites = [f"module:{layer}" for layer in range(4)]
    source = gaussian(0, 60, 3)
    found = LinEAS(sites, steps=150, learning_rate=2.0).fit(chain(3, 4), source, 2 * source.flip(0) - 1)
    assert (np.diff(found.losses) <= 1e-9).all() and found.losses[-1] < 1e-3 * found.losses[0]


def test_the_source_runs_with_all_earlier_maps_in_force() -> None:
    """The loss that is reported is that of the model under the intervention, at every site."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    source, target = gaussian(0, 40, 3), 1 - gaussian(1, 40, 3)
    model, sites = pc.load(module), ["module:0", "module:1", "module:2"]
    found = LinEAS(sites, steps=150).fit(model, source, target)
    assert found.losses[-1] < 0.2 * found.losses[0]
    wanted, total = model.activations(target, sites), 0.0
    with model.intervene(found), reading(module, model.select(sites)) as captured, torch.no_grad():
        module(source)
    for name in sites:
        seen = captured[name][0].tensor.sort(0).values
        total += float((seen - wanted[name].sort(0).values).square().mean())
    assert found.losses[-1] == pytest.approx(total, rel=1e-9)


# Language models ------------------------------------------------------------------------------------


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=2)).train()


def test_padding_changes_nothing() -> None:
    module = gpt2()
    short, long = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[9, 10, 11], [12, 13, 14]])
    padded = torch.cat([short, torch.full((2, 4), 29)], 1)
    mask = torch.tensor([[1] * 3 + [0] * 4] * 2)
    for pool in ("mean", "last"):
        method = LinEAS(["resid_post.0", "mlp.1"], steps=20, pool=pool)
        plain = method.fit(module, {"input_ids": short}, {"input_ids": long})
        other = method.fit(module, {"input_ids": padded, "attention_mask": mask}, {"input_ids": long})
        for site in plain.weights:
            torch.testing.assert_close(plain.weights[site], other.weights[site], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(plain.biases[site], other.biases[site], atol=1e-5, rtol=1e-4)
            assert not torch.allclose(plain.biases[site], torch.zeros(()))
    assert module.training and all(each.requires_grad and each.grad is None for each in module.parameters())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


def test_strength_blends_and_results_repeat() -> None:
    model = pc.load(gpt2())
    source, target = {"input_ids": torch.arange(12).reshape(3, 4)}, {"input_ids": torch.arange(12, 24).reshape(3, 4)}
    fits = [LinEAS("resid_post.*", steps=30).fit(model, source, target) for _ in range(2)]
    for site in fits[0].weights:
        assert torch.equal(fits[0].weights[site], fits[1].weights[site])
    assert [each.name for each in fits[0].sites] == ["resid_post.0", "resid_post.1"]

    def last(*interventions: Any) -> torch.Tensor:
        with model.intervene(*interventions), reading(model.module, [model.site("resid_post.1")]) as captured:  # noqa: SIM117
            with torch.no_grad(), model.evaluating():
                model(**source)
        return captured["resid_post.1"][0].tensor

    only = LinEAS("resid_post.1", steps=30).fit(model, source, target)
    torch.testing.assert_close(last(only.strength(0.25)), last().lerp(last(only), 0.25))
    assert torch.equal(last(fits[0].strength(0)), last())
    assert only.shifts()["resid_post.1"].shape == (1, 16) and only.shifts().names == ["shift"]


def test_bad_input_is_said() -> None:
    values = gaussian(0, 8, 3)
    for make, match in [
        (lambda: LinEAS("module:0", sparsity=-1), "sparsity"),
        (lambda: LinEAS("module:0", group_sparsity=math.nan), "group_sparsity"),
        (lambda: LinEAS("module:0", steps=0), "one step or more"),
        (lambda: LinEAS("module:0", learning_rate=3), "learning rate"),
        (lambda: LinEAS("module:0", pool="max"), '"mean" or "last"'),  # type: ignore[arg-type]
        (lambda: LinEAS("module:0").fit(one_site(), values[:1], values), "source: 1 example; at least 2"),
        (lambda: LinEAS("module:0").fit(one_site(), values, values[:0]), "target: 0 examples"),
        (lambda: LinEAS("module:0").fit(one_site(), values / 0, values), "not finite"),
        (lambda: LinEAS("module:0").fit(one_site(), "text", values), "list of texts"),
        (lambda: LinEAS("module:0", steps=1).fit(one_site(), values, values).strength(math.inf), "finite"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            make()
    fitted = LinEAS("module:0", steps=1).fit(chain(3, 1), values, values)
    with pytest.raises(pc.errors.DataError, match="has 4 neurons here"), pc.load(chain(4, 1)).intervene(fitted):
        pass
    with pytest.raises(pc.errors.UnknownName, match="resid_post"):
        LinEAS("resid_post.9").fit(pc.load(gpt2()), values, values)
