"""What neurons contributed: closed forms, what adds up and what does not, and captum's conductance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.architectures import GPT2, LLAMA, T5, TEXTS, padded, tokenizer
from torch import nn

import patchclamp as pc
from patchclamp import attribution
from patchclamp.attribution import attribute
from patchclamp.errors import DataError, ModelError, UnknownName

FIRST = attribution.class_logit(0)
METHODS = ("gradient_x_activation", "patching", "conductance", "integrated_gradients")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tanh_network(skip: bool = False, seed: int = 0) -> nn.Module:
    """Three layers of tanh; the last one is passed by if `skip`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh()]
        module = nn.Sequential(*layers, nn.Linear(6, 3))
        with torch.no_grad():
            for each in module.parameters():
                each.mul_(3)
    return Passing(module) if skip else module


class Passing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x[:, :3]


class Saturating(nn.Module):
    """F(x) = 1 - relu(1 - x)."""

    def __init__(self) -> None:
        super().__init__()
        self.y, self.cut = nn.Identity(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 - self.cut(1 - self.y(x))


# Closed forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_conductance_of_a_sum_of_neurons_that_fire(steps: int) -> None:
    """F = sum of w_j relu(u_j x), all on all the way: w_j u_j x, whatever the steps."""
    module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(drawn(5, 4).abs())  # type: ignore[union-attr, operator]
    inputs = drawn(3, 4, seed=1).abs()
    first: Any = module[0]
    last: Any = module[2]
    expected = (last.weight[0] * (inputs @ first.weight.T)).detach()
    for method in ("conductance", "integrated_gradients", "gradient_x_activation"):
        found = attribute(pc.load(module), inputs, FIRST, "mlp.0", method=method, steps=steps)
        torch.testing.assert_close(found.by_site["mlp.0"], expected)


def test_a_saturated_neuron_has_contributed_though_its_gradient_is_0() -> None:
    model = pc.load(Saturating(), example=torch.zeros(1, 1))
    inputs = torch.tensor([[2.0]])
    site = "module:y"
    last = attribute(model, inputs, FIRST, site).by_site[site]
    assert last.abs().max() == 0
    for steps in (2, 10, 40):
        found = attribute(model, inputs, FIRST, site, method="conductance", steps=steps)
        assert abs(float(found.by_site[site]) - 1) <= 1 / steps + 1e-6
        assert float(found.value) == 1 and float(found.baseline_value) == 0  # type: ignore[arg-type]


def test_patching_is_what_a_linear_network_does() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    model, here, there = pc.load(module), drawn(6, 4), drawn(6, 4, seed=1)
    found = attribute(model, here, FIRST, "mlp.0", method="patching", baseline=there)
    assert found.baseline_value is not None
    source = model.activations(there, "mlp.0")
    for neuron in range(5):
        with model.intervene(pc.patch(pc.Neurons({"mlp.0": [neuron]}), source)), torch.no_grad():
            changed = module(here)[:, 0] - found.baseline_value
        torch.testing.assert_close(found.by_site["mlp.0"][:, neuron], changed, rtol=1e-4, atol=1e-5)
    assert found.completeness()["complete"].item()


def test_integrated_gradients_are_the_mean_slope_times_the_change() -> None:
    """Of a square, whose slope grows along the path: y (2 y / 2) = y^2."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.y = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.y(x) ** 2

    model, inputs = pc.load(Square(), example=torch.zeros(1, 1)), torch.tensor([[3.0], [-2.0]])
    for points in ("uniform", "gausslegendre"):
        found = attribute(
            model, inputs, FIRST, "module:y", method="integrated_gradients", baseline=1.0, steps=4, points=points
        )
        assert found.baseline_value is not None
        torch.testing.assert_close(found.by_site["module:y"], inputs**2 - 1)  # (a - 1)(a + 1)
        torch.testing.assert_close(found.value - found.baseline_value, (inputs**2 - 1)[:, 0])


# What adds up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["conductance", "integrated_gradients"])
def test_conductance_adds_up_and_the_error_shrinks(method: str) -> None:
    model, inputs = pc.load(tanh_network()), drawn(20, 6, seed=3)
    sites = ["module:1", "module:3"] if method == "conductance" else ["module:0"]

    def error(steps: int, rule: str = "trapezoid") -> np.ndarray:
        found = attribute(model, inputs, FIRST, sites, method=method, steps=steps, rule=rule)  # type: ignore[arg-type]
        assert found.baseline_value is not None
        wanted = found.value - found.baseline_value
        sums = torch.stack([found.total(site).sum(1) for site in sites])
        return ((sums - wanted).abs().sum(1) / wanted.abs().sum()).numpy()

    at_50 = error(50)
    assert (at_50 < 0.01).all()
    assert (error(12) > 4 * at_50).all() and (at_50 > 4 * error(200)).all()
    assert (error(50, "left") > at_50).all()


def test_completeness_fails_beside_a_skip_connection() -> None:
    inputs = drawn(20, 6, seed=3)
    whole = attribute(pc.load(tanh_network()), inputs, FIRST, ["module:3"], method="conductance", steps=200)
    model = pc.load(tanh_network(skip=True), example=inputs)
    passed = attribute(model, inputs, FIRST, ["module:inner.3"], method="conductance", steps=200)
    assert whole.completeness()["complete"].to_list() == [True]
    assert passed.completeness()["complete"].to_list() == [False]
    assert passed.baseline_value is not None
    row = passed.completeness().row(0, named=True)
    assert row["wanted"] == pytest.approx(float((passed.value - passed.baseline_value).mean()))
    assert row["relative_error"] > 0.05
    with pytest.raises(DataError, match="no baseline"):
        attribute(model, inputs, FIRST, "module:inner.3").completeness()


def test_a_path_of_texts_begins_at_the_baseline() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    target = attribution.logit(5)
    zero = attribute(model, TEXTS, target, "mlp.*", method="conductance", steps=3)
    with torch.no_grad():
        call = padded()
        embedded = model.module.get_input_embeddings()(call["input_ids"])  # type: ignore[operator]
        rest = {name: call[name] for name in ("attention_mask", "position_ids")}
        expected = target(model.module(inputs_embeds=torch.zeros_like(embedded), **rest), call)
        plain = target(model.module(**call), call)
        of_token = model.module.get_input_embeddings()(torch.full_like(call["input_ids"], 7))  # type: ignore[operator]
        at_token = target(model.module(inputs_embeds=of_token, **rest), call)
    torch.testing.assert_close(zero.baseline_value, expected)
    torch.testing.assert_close(zero.value, plain)
    found = attribute(model, TEXTS, target, "mlp.*", method="conductance", steps=3, baseline=7)
    torch.testing.assert_close(found.baseline_value, at_token)
    torch.testing.assert_close(found.value, plain)
    # Everything passes through the first residual stream: there it has to add up.
    stream = attribute(model, TEXTS, target, ["resid_pre.0", "mlp.0"], method="conductance", steps=600)
    assert stream.completeness()["complete"].to_list() == [True, False]
    half = attribute(model, TEXTS, target, "resid_pre.0", method="conductance", steps=300, baseline=7)
    assert half.completeness()["complete"].item()


@pytest.mark.parametrize("method", METHODS)
def test_batches_make_no_difference(method: str) -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    tokens = [5, 9, 3, 12]
    for target in (attribution.logit(tokens), attribution.logit_difference(tokens, 2), attribution.next_token_loss()):
        more: dict[str, Any] = {"method": method, "steps": 4}
        if method == "patching":
            more["baseline"] = [text.replace("a", "the").replace("sat", "ran") for text in TEXTS]
        whole = attribute(model, TEXTS, target, ["mlp.*", "attn.1"], batch=256, **more)
        for batch in (1, 3):
            parts = attribute(model, TEXTS, target, ["mlp.*", "attn.1"], batch=batch, **more)
            assert list(parts.by_site) == list(whole.by_site)
            for site, each in whole.by_site.items():
                torch.testing.assert_close(parts.by_site[site], each, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parts.value, whole.value)
            assert torch.equal(parts.mask, whole.mask)  # type: ignore[arg-type]


def test_each_example_keeps_its_baseline() -> None:
    model, inputs, baseline = pc.load(tanh_network()), drawn(5, 6), drawn(5, 6, seed=1)
    more: dict[str, Any] = {"method": "conductance", "steps": 4, "baseline": baseline}
    whole = attribute(model, inputs, FIRST, "mlp.*", batch=256, **more)
    parts = attribute(model, inputs, FIRST, "mlp.*", batch=2, **more)
    for site, each in whole.by_site.items():
        torch.testing.assert_close(parts.by_site[site], each, rtol=1e-4, atol=1e-6)


def test_a_token_for_each_text() -> None:
    """Along a path examples stand several times: each keeps its own token, in targets of the user too."""
    model = pc.load(LLAMA.build(), tokenizer=tokenizer())
    tokens = [5, 9, 3, 12]

    def own(output: Any, inputs: Any) -> torch.Tensor:
        assert len(output.logits) == 4 == len(inputs["input_ids"])
        last = inputs["attention_mask"].sum(1) - 1
        return output.logits[range(4), last, tokens]

    named = attribute(model, TEXTS, attribution.logit(tokens), "mlp.*", method="conductance", steps=5)
    users = attribute(model, TEXTS, own, "mlp.*", method="conductance", steps=5)
    for number, (text, token) in enumerate(zip(TEXTS, tokens, strict=True)):
        alone = attribute(model, text, attribution.logit(token), "mlp.*", method="conductance", steps=5)
        for site in alone.by_site:
            torch.testing.assert_close(named.by_site[site][number], users.by_site[site][number], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(named.total(site)[number], alone.total(site)[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(DataError, match="each of 3 examples, and there are 4"):
        attribute(model, TEXTS, attribution.logit(tokens[:3]), "mlp.*", method="conductance")


@pytest.mark.parametrize("method", ["gradient_x_activation", "conductance"])
def test_padding_on_either_side_is_the_same(method: str) -> None:
    model = pc.load(GPT2.build())
    left, right = (
        attribute(model, padded(side=side), attribution.logit(5), "*", method=method, steps=4)  # type: ignore[arg-type]
        for side in ("left", "right")
    )
    assert left.mask is not None and right.mask is not None
    for site, each in left.by_site.items():
        if not site.startswith("pattern"):
            torch.testing.assert_close(each[left.mask], right.by_site[site][right.mask], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(left.total(site), right.total(site), rtol=1e-3, atol=1e-5)


def test_a_decoder_has_a_mask_of_its_own() -> None:
    model, call = pc.load(T5.build()), T5.inputs()
    assert call["attention_mask"].shape == call["decoder_attention_mask"].shape
    assert not torch.equal(call["attention_mask"], call["decoder_attention_mask"])
    found = attribute(model, call, attribution.logit(5), ["encoder.mlp.0", "decoder.mlp.0"])
    for stack, name in (("encoder", "attention_mask"), ("decoder", "decoder_attention_mask")):
        site = f"{stack}.mlp.0"
        real = call[name][..., None]
        torch.testing.assert_close(found.total(site), (found.by_site[site] * real).sum(1))


def test_images_are_summed_over_space() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model, inputs = pc.load(module, example=drawn(1, 3, 6, 6)), drawn(5, 3, 6, 6)
    found = attribute(model, inputs, FIRST, "module:1@output,axis=1", method="conductance", steps=20)
    site = "module:1@output,axis=1"
    assert found.by_site[site].shape == (5, 4, 4, 4) and found.total(site).shape == (5, 4)
    assert found.completeness()["complete"].item()
    torch.testing.assert_close(found.total(site), found.by_site[site].sum((1, 2)))


# The table ------------------------------------------------------------------------------------------


def test_neurons_are_ranked_by_the_mean_or_the_mean_of_magnitudes() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(2))  # type: ignore[union-attr, operator]
        module[2].weight.copy_(torch.tensor([[1.0, 1.0]]))  # type: ignore[union-attr, operator]
    inputs = torch.tensor([[3.0, 1.0], [-3.0, 1.0]])  # the first neuron helps and hinders
    found = attribute(pc.load(module), inputs, FIRST, "module:0")
    assert found.neurons().names == ["module:0:1", "module:0:0"]
    assert found.neurons()["score"].to_list() == [1.0, 0.0]
    assert found.neurons(absolute=True)["score"].to_list() == [3.0, 1.0]
    assert found.neurons().to_polars().schema["score"] == pl.Float64
    with pytest.raises(UnknownName, match="module:0"):
        found.total("module:9")


def test_the_same_twice() -> None:
    model = pc.load(tanh_network())
    one, two = (attribute(model, drawn(5, 6), FIRST, "mlp.*", method="conductance").neurons() for _ in range(2))
    assert one == two


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"method": "lime"}, "method is one of"),
        ({"method": "patching"}, "needs baseline="),
        ({"method": "patching", "baseline": torch.zeros(2, 6)}, "5 examples, and 2"),
        ({"method": "conductance", "steps": 0}, "at least 1 step"),
        ({"method": "conductance", "points": "chebyshev"}, "points is"),
        ({"method": "conductance", "rule": "simpson"}, "rule"),
        ({"method": "conductance", "baseline": torch.zeros(4)}, r"the baseline is \[4\]"),
        ({"method": "conductance", "baseline": "blur"}, "is a tensor, not 'blur'"),
        ({"method": "conductance", "baseline": math.nan}, "not finite"),
        ({"batch": 0}, "batch is how many"),
    ],
)
def test_bad_input_is_said(given: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        attribute(pc.load(tanh_network()), drawn(5, 6), FIRST, "mlp.*", **given)


def test_a_path_has_two_ends() -> None:
    model, inputs = pc.load(tanh_network()), drawn(5, 6)
    with pytest.raises(DataError, match="example 3 is equal to the baseline"):
        attribute(model, inputs, FIRST, "mlp.*", method="conductance", baseline=inputs[3])
    texts = pc.load(GPT2.build(), tokenizer=tokenizer())
    target = attribution.logit(5)
    cat = int(padded(["cat"])["input_ids"][0, 0])
    with pytest.raises(DataError, match=f"example 1 is equal to the baseline, token {cat}"):
        attribute(texts, ["the cat", "cat cat"], target, method="conductance", baseline=cat)
    for wrong in (-1, 10_000, True, 0.5, [1]):
        with pytest.raises(DataError, match="the baseline"):
            attribute(texts, TEXTS, target, method="conductance", baseline=wrong)
    with pytest.raises(ModelError, match="no input embeddings"):
        attribute(model, {"x": inputs.long()}, FIRST, "mlp.*", method="conductance")
    with pytest.raises(DataError, match=r"torch\.int64"):
        attribute(model, inputs.long(), FIRST, "mlp.*", method="conductance")


def test_patching_wants_texts_of_the_same_length() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    with pytest.raises(DataError, match="another shape"):
        attribute(model, "the cat sat", attribution.logit(5), method="patching", baseline="the cat")


# captum ---------------------------------------------------------------------------------------------


def test_conductance_is_captums() -> None:
    captum = pytest.importorskip("captum.attr")
    module, inputs = tanh_network(), drawn(7, 6, seed=3)
    baseline = drawn(7, 6, seed=4)
    sites = {"module:1": 1, "module:3": 3, "module:5": 5}
    for steps in (7, 50):
        found = attribute(
            *(pc.load(module), inputs, attribution.class_logit(2), list(sites)),
            **{"method": "conductance", "baseline": baseline, "steps": steps},
            points="gausslegendre",
            rule="left",
        )
        for site, place in sites.items():
            layer = captum.LayerConductance(module, module[place])  # type: ignore[index]
            expected = layer.attribute(inputs, baseline, target=2, n_steps=steps)
            torch.testing.assert_close(found.by_site[site], expected.detach(), rtol=0, atol=1e-5)
    # Wherever captum takes its points: with many steps both are the same.
    many = attribute(pc.load(module), inputs, attribution.class_logit(2), "module:3", method="conductance", steps=300)
    layer = captum.LayerConductance(module, module[3])  # type: ignore[index]
    expected = layer.attribute(inputs, target=2, n_steps=600)
    torch.testing.assert_close(many.by_site["module:3"], expected.detach(), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_conductance_is_captums_on_minilm(minilm: pc.Model) -> None:
    captum = pytest.importorskip("captum.attr")
    texts = ["Return the first item.", "It raises no error if the list is empty.", "A dog barks."]
    goal = attribution.similarity(minilm, "Lists and their items")
    found = attribute(minilm, texts, goal, "mlp.*", method="conductance", steps=10, points="gausslegendre", rule="left")
    call = minilm.inputs(texts)
    module: Any = minilm.module
    embedded = module.get_input_embeddings()(call["input_ids"]).detach()
    rest = {name: each for name, each in call.items() if name != "input_ids"}

    def forward(embeddings: torch.Tensor) -> torch.Tensor:
        times = len(embeddings) // len(embedded)
        given = {name: each.repeat(times, 1) for name, each in rest.items()}
        return goal(module(inputs_embeds=embeddings, **given), given)

    assert len(found.by_site) == 6
    for number, (site, each) in enumerate(found.by_site.items()):
        layer = captum.LayerConductance(forward, module.encoder.layer[number].output.dense)
        expected = layer.attribute(embedded, n_steps=10, attribute_to_layer_input=True)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(each, expected.detach(), rtol=0, atol=1e-5, msg=site)
