"""Gradients at all sites by one backward pass, beside one backward pass for each site and beside differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.architectures import GPT2, SEQUENTIAL, TEXTS, padded, tokenizer
from tests.zoo import CASES, Case
from torch import nn

import patchclamp as pc
from patchclamp import attribution
from patchclamp.attribution import gradients
from patchclamp.attribution.engine import frozen
from patchclamp.errors import DataError, ModelError, SiteNotReached
from patchclamp.model.hooks import first_tensor, hooked
from patchclamp.model.site import Site

# Fused experts compute in float32 and below.
FLOAT32 = ("Mixtral", "Qwen2-MoE", "DeepSeek-V3")
# Every kind of site is in one of these.
QUICK = ("BERT", "Llama", "Mamba", "Mixtral", "ResNet", "ConvNeXt", "nn.LSTM", "Spiking loop in plain torch")


def everything(output: Any, _inputs: Any) -> torch.Tensor:
    """A number for each example that depends on all that a network returns for it."""
    tensor = next((getattr(output, name) for name in ("logits", "image_embeds") if hasattr(output, name)), None)
    tensor = first_tensor(output) if tensor is None else tensor
    assert tensor is not None
    weight = torch.linspace(-1, 1, tensor[0].numel(), dtype=tensor.dtype).reshape(tensor[0].shape)
    return (tensor * weight).flatten(1).sum(1)


def loaded(case: Case) -> tuple[pc.Model, dict[str, Any], torch.dtype]:
    dtype = torch.float32 if case.title in FLOAT32 else torch.float64
    inputs = {n: v.to(dtype) if v.is_floating_point() else v for n, v in case.inputs("right").items()}
    example = inputs if case.reads == "tensors" else None
    return pc.load(case.build().to(dtype), example=example), inputs, dtype


def one_by_one(model: pc.Model, inputs: dict[str, Any], site: Site) -> list[torch.Tensor]:
    """The gradient at a site alone: of numbers that are 0 and are added to what each call shows."""
    added: list[torch.Tensor] = []

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        added.append(torch.zeros_like(tensor).requires_grad_())
        return tensor + added[-1]

    with hooked(model.module, [(site, edit)]):
        value = everything(model.module(**inputs), inputs).sum()
    found = torch.autograd.grad(value, added, allow_unused=True)
    return [torch.zeros_like(of) if each is None else each for each, of in zip(found, added, strict=True)]


# The gradient is right ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[] if each.title in QUICK else pytest.mark.slow) for each in CASES], ids=str
)
def test_the_gradient_is_that_of_each_site_alone(case: Case) -> None:
    model, inputs, dtype = loaded(case)
    seen = gradients(model, inputs, everything, list(model.sites))
    assert set(seen.gradients) == set(seen.activations) == set(model.sites)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-9}
    with torch.no_grad():
        torch.testing.assert_close(seen.value, everything(model.module(**inputs), inputs), **close)
    activations = model.activations(inputs, list(model.sites))
    for name, site in model.sites.items():
        alone = one_by_one(model, inputs, site)
        found = seen.gradients[name]
        assert found.shape == seen.activations[name].shape and not found.requires_grad
        if len(alone) == 1 and alone[0].shape == found.shape:
            torch.testing.assert_close(found, alone[0], **close)
            expected = activations[name].movedim(1, -1) if site.kind == "pattern" else activations[name]
            torch.testing.assert_close(seen.activations[name], expected.as_subclass(torch.Tensor), **close)
        else:
            # Steps of a recurrent layer, tokens routed to an expert: the same numbers, at other places.
            torch.testing.assert_close(rows_that_are_not_0(found), rows_that_are_not_0(*alone), **close)


def rows_that_are_not_0(*tensors: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([each.flatten(0, -2) for each in tensors])
    rows = rows[rows.abs().sum(1) > 0]
    return rows[rows.sum(1).argsort()]


@pytest.mark.parametrize("title", ["BERT", "GPT-2", "CNN in plain torch", "nn.GRU", "ResNet"])
def test_the_gradient_says_what_a_small_change_does(title: str) -> None:
    """No autograd in the reference: the target of two runs in which a site is moved a little.

    Not of networks whose norms compute in float32, which small changes do not survive.
    """
    model, inputs, _ = loaded(next(case for case in CASES if case.title == title))
    names = list(model.sites)
    seen = gradients(model, inputs, everything, names)
    size = 1e-5
    for name in names:
        found = seen.gradients[name]
        way = torch.randn(found.shape[-1], dtype=found.dtype, generator=torch.Generator().manual_seed(0))
        ends = []
        for step in (-size, size):
            with torch.no_grad(), hooked(model.module, [(model.site(name), lambda t, by=step * way: t + by)]):
                ends.append(everything(model.module(**inputs), inputs))
        expected = (ends[1] - ends[0]) / (2 * size)
        torch.testing.assert_close((found * way).flatten(1).sum(1), expected, rtol=1e-4, atol=1e-5)


def test_experts_are_rectangles_with_zeros_where_no_token_was_routed() -> None:
    case = next(case for case in CASES if case.title == "Mixtral")
    model, inputs, _ = loaded(case)
    names = [name for name, site in model.sites.items() if site.kind == "expert" and site.layer == 0]
    assert len(names) == 4
    seen = gradients(model, inputs, everything, names)
    length = inputs["input_ids"].shape[1]
    chosen = torch.stack([seen.activations[name].abs().sum(-1) > 0 for name in names])
    assert all(seen.gradients[name].shape == (len(TEXTS), length, 24) for name in names)
    assert (chosen.sum(0) == 2).all()  # two experts for each token
    for name, routed in zip(names, chosen, strict=True):
        assert not seen.gradients[name][~routed].any() and seen.gradients[name][routed].any()


def test_recurrent_states_are_rectangles_in_order_of_time() -> None:
    case = next(case for case in CASES if case.title == "nn.LSTM")
    model, inputs, _ = loaded(case)
    found = gradients(model, inputs, everything, "recurrent.recurrent.1").gradients["recurrent.recurrent.1"]
    assert found.shape == (len(TEXTS), inputs["input_ids"].shape[1], 6)
    padding = inputs["attention_mask"] == 0
    assert not found[padding].any() and found[~padding].abs().sum(1).all()


def test_closed_form() -> None:
    """F = w2 relu(w1 x): dF/dh = w2 where it fires or not, at the neurons, which are behind the nonlinearity."""
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    seen = gradients(pc.load(module), inputs, attribution.class_logit(1), "mlp.0")
    last: Any = module[2]
    torch.testing.assert_close(seen.gradients["mlp.0"], last.weight[1].detach().expand(5, 4))
    torch.testing.assert_close(seen.activations["mlp.0"], module[:2](inputs).detach())


class Skipping(nn.Module):
    """The hidden layer goes on beside its projection too, and the nonlinearity works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.relu(self.first(x))
        return self.second(hidden) + 10 * hidden


def test_only_what_passes_through_the_site_counts() -> None:
    module, inputs = Skipping(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = pc.load(module, example=inputs)
    site = Site.custom("second", "input")
    entering = Site("mlp.0", "mlp", 0, 3, module="second")
    for of in (site, entering):
        for sites in ([of], [of, "module:first"]):  # behind another site, or where the graph begins
            found = gradients(model, inputs, attribution.class_logit(0), sites).gradients[of.name]
            torch.testing.assert_close(found, module.second.weight[0].detach().expand(4, 3))


def test_an_in_place_nonlinearity_after_the_site() -> None:
    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for in_place in (False, True):
        module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(inplace=in_place), nn.Linear(6, 2, bias=False))
        with torch.no_grad():
            module[0].weight.copy_(weights)  # type: ignore[union-attr, operator]
            module[2].weight.copy_(weights.T[:2])  # type: ignore[union-attr, operator]
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        found.append(gradients(pc.load(module), inputs, attribution.class_logit(0), ["module:0", "mlp.0"]))
    plain, in_place = found
    assert (plain.activations["module:0"] < 0).any()
    for name in ("module:0", "mlp.0"):
        assert torch.equal(plain.gradients[name], in_place.gradients[name])
        assert torch.equal(plain.activations[name], in_place.activations[name])


# Padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", ["GPT-2", "Llama", "Mixtral"])
def test_padding_on_either_side_is_the_same(title: str) -> None:
    case = next(case for case in CASES if case.title == title)
    model, _, dtype = loaded(case)
    target = attribution.logit_difference(5, 7)
    found = []
    for side in ("left", "right"):
        made = padded(side=side)
        found.append(gradients(model, made, target, list(model.sites)))
    left, right = found
    torch.testing.assert_close(left.value, right.value, rtol=1e-5, atol=1e-5)
    assert left.mask is not None and right.mask is not None and not torch.equal(left.mask, right.mask)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-8}
    for name, site in model.sites.items():
        if site.kind == "pattern":
            continue  # keys are padded too
        torch.testing.assert_close(left.gradients[name][left.mask], right.gradients[name][right.mask], **close)
        assert not right.gradients[name][~right.mask].any()


# What it costs, and what it leaves behind -----------------------------------------------------------


@pytest.mark.parametrize("sites", ["mlp.0", "*"])
def test_one_forward_and_one_backward_pass_for_all_sites(sites: str) -> None:
    model = pc.load(GPT2.build())
    forwards: list[int] = []
    backwards: list[int] = []
    handle = model.module.register_forward_hook(lambda *_: forwards.append(1))

    def target(output: Any, inputs: Any) -> torch.Tensor:
        output.logits.register_hook(lambda _: backwards.append(1))
        return output.logits[:, -1, 3]

    list(model.sites)
    forwards.clear()
    found = gradients(model, GPT2.inputs(), target, sites)
    handle.remove()
    assert len(found.gradients) == (1 if sites == "mlp.0" else 12)
    assert len(forwards) == len(backwards) == 1


def test_the_module_is_left_as_it_was() -> None:
    module = GPT2.build()
    module.train()
    module.get_submodule("transformer.h.0").eval()
    module.get_parameter("transformer.wte.weight").requires_grad_(False)
    other = module.get_parameter("transformer.wpe.weight")
    other.grad = torch.ones_like(other)
    modes = {path: each.training for path, each in module.named_modules()}
    wanted = {path: each.requires_grad for path, each in module.named_parameters()}
    hooks = sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())
    model = pc.load(module)
    dropped: list[bool] = []
    watched: Any = module.get_submodule("transformer.h.1").register_forward_hook(
        lambda each, *_: dropped.append(each.training)
    )
    inputs = GPT2.inputs()
    gradients(model, inputs, attribution.logit(3), "*")
    with pytest.raises(DataError):
        gradients(model, inputs, lambda output, _: output.logits.sum(), "*")
    watched.remove()
    assert dropped and not any(dropped)  # no dropout meanwhile
    assert {path: each.training for path, each in module.named_modules()} == modes
    assert {path: each.requires_grad for path, each in module.named_parameters()} == wanted
    assert all(each.grad is None for each in module.parameters() if each is not other)
    assert torch.equal(other.grad, torch.ones_like(other))
    assert sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules()) == hooks


def test_a_frozen_model_and_no_grad_make_no_difference() -> None:
    plain = gradients(pc.load(GPT2.build()), GPT2.inputs(), attribution.logit(3), "*")
    module = GPT2.build().requires_grad_(False)
    with torch.no_grad():
        again = gradients(pc.load(module), GPT2.inputs(), attribution.logit(3), "*")
    assert not any(each.requires_grad for each in module.parameters())
    assert any(each.any() for each in again.gradients.values())
    for name, each in plain.gradients.items():
        assert torch.equal(each, again.gradients[name])


def test_weights_want_their_gradients_again_after_an_error() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), frozen(module):
        assert not module.weight.requires_grad
        raise ZeroDivisionError
    assert module.weight.requires_grad and module.bias.requires_grad


def test_interventions_in_force_count() -> None:
    model, inputs = pc.load(GPT2.build()), GPT2.inputs()
    target = attribution.logit(3)
    plain = gradients(model, inputs, target, "mlp.*")
    neurons = pc.Neurons({"mlp.0": [2, 5]})
    with model.intervene(pc.ablate(neurons), pc.scale(pc.Neurons({"mlp.1": [4]}), 3.0)):
        changed = gradients(model, inputs, target, "mlp.*")
        with torch.no_grad():
            expected = target(model.module(**inputs), inputs)
    torch.testing.assert_close(changed.value, expected)
    assert not torch.allclose(changed.value, plain.value)
    assert not changed.activations["mlp.0"][..., [2, 5]].any()
    assert not torch.allclose(changed.gradients["mlp.0"][..., 0], plain.gradients["mlp.0"][..., 0])
    # Through an intervention: what enters the block of a site upstream of it.
    before = gradients(model, inputs, target, "resid_pre.1").gradients["resid_pre.1"]
    with model.intervene(pc.ablate(pc.Neurons({"mlp.1": range(24)}))):
        without = gradients(model, inputs, target, "resid_pre.1").gradients["resid_pre.1"]
    assert not torch.allclose(before, without)


def test_what_is_put_before_is_seen() -> None:
    model, inputs = pc.load(GPT2.build()), GPT2.inputs()
    seen = gradients(
        model, inputs, attribution.logit(3), "mlp.0", before=[("mlp.0", lambda tensor: torch.ones_like(tensor))]
    )
    assert (seen.activations["mlp.0"] == 1).all() and seen.gradients["mlp.0"].any()


def test_texts_are_tokenized() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    one = gradients(model, TEXTS, attribution.logit(3), "mlp.0")
    two = gradients(model, padded(), attribution.logit(3), "mlp.0")
    assert torch.equal(one.gradients["mlp.0"], two.gradients["mlp.0"])
    assert gradients(model, TEXTS[0], attribution.logit(3), "mlp.0").value.shape == (1,)


# Refusals -------------------------------------------------------------------------------------------


class Unused(nn.Module):
    """Has a layer that nobody calls, one that is called twice, and one that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.twice, self.unused, self.aside = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aside(x)
        return self.twice(torch.relu(self.twice(self.one(x))))


def test_what_cannot_be_answered_is_said() -> None:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    model = pc.load(Unused(), example=inputs)
    target = attribution.class_logit(0)
    with pytest.raises(SiteNotReached, match="unused"):
        gradients(model, inputs, target, "module:unused")
    with pytest.raises(ModelError, match="2 times"):
        gradients(model, inputs, target, "module:twice")
    with pytest.raises(pc.errors.UnknownName):
        gradients(model, inputs, target, "module:nothing")
    assert not gradients(model, inputs, target, "module:aside").gradients["module:aside"].any()
    with pytest.raises(DataError, match=r"no examples"):
        gradients(model, inputs[:0], target, "module:one")


class ReadsTwice(nn.Module):
    """A recurrent layer that is called twice in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x)[0])[0].sum(1)


def test_a_recurrent_layer_that_is_called_twice_is_refused() -> None:
    inputs = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    site = "recurrent.layer.0"
    with pytest.raises(ModelError, match="10 times"):
        gradients(pc.load(ReadsTwice(), example=inputs), inputs, attribution.class_logit(0), site)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda output, _: output.sum(), r"each of 5 examples, not \[\]"),
        (lambda output, _: output, r"each of 5 examples, not \[5, 3\]"),
        (lambda output, _: output[:2, 0], "each of 5 examples, not 2"),
        (lambda output, _: 3.0, "each of 5 examples, not float"),
        (lambda output, _: output[:, 0] / torch.tensor([1.0, 1, 0, 1, 1]), "the target of example 2 is not finite"),
    ],
)
def test_a_target_is_one_finite_number_per_example(wrong: Callable[..., Any], match: str) -> None:
    model = pc.load(SEQUENTIAL.build())
    with pytest.raises(DataError, match=match):
        gradients(model, SEQUENTIAL.inputs()["input"], wrong, "mlp.0")
