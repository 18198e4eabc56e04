"""The neurons of fused experts: read and written inside them, against plain PyTorch on the raw parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from patchclamp.errors import ModelError
from patchclamp.model.experts import (
    expert_input_weights,
    expert_output_weights,
    expert_shape,
    expert_sites,
    experts_refusal,
    is_fused_experts,
    resembles_experts,
)
from patchclamp.model.hooks import hooked, reading, tapped
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap

WIDTH, NEURONS, EXPERTS, CHOSEN, WORDS = 16, 24, 6, 2, 20
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]

COMMON: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": CHOSEN,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=NEURONS, num_local_experts=EXPERTS))


def qwen2_moe() -> nn.Module:
    """With an expert that every token shares."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **COMMON,
            intermediate_size=20,
            moe_intermediate_size=NEURONS,
            shared_expert_intermediate_size=10,
            num_experts=EXPERTS,
        )
    )


def deepseek() -> nn.Module:
    """The first layer is dense; the weights of the router are scaled and do not sum to 1."""
    common: dict[str, Any] = COMMON | {"num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **common,
            intermediate_size=20,
            moe_intermediate_size=NEURONS,
            n_routed_experts=EXPERTS,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
        )
    )


def olmoe() -> nn.Module:
    return OlmoeForCausalLM(OlmoeConfig(**COMMON, intermediate_size=NEURONS, num_experts=EXPERTS))


def gpt_oss() -> nn.Module:
    """Transposed weights, gate and up interleaved, biases, a nonlinearity of its own."""
    return GptOssForCausalLM(GptOssConfig(**COMMON, head_dim=4, intermediate_size=NEURONS, num_local_experts=EXPERTS))


def swiglu(projected: torch.Tensor) -> torch.Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return functional.silu(gate) * up


def clamped_swiglu(projected: torch.Tensor) -> torch.Tensor:
    gate, up = projected[..., 0::2].clamp(max=7.0), projected[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@dataclass(frozen=True)
class Family:
    """What a test must know of a family to compute its neurons from the raw parameters."""

    name: str
    new: Callable[[], nn.Module]
    layers: tuple[int, ...] = (0, 1)
    transposed: bool = False
    activated: Callable[[torch.Tensor], torch.Tensor] = swiglu

    def neurons(self, experts: Any, expert: int, states: torch.Tensor) -> torch.Tensor:
        weight = experts.gate_up_proj[expert]
        bias = experts.gate_up_proj_bias[expert] if self.transposed else 0.0
        return self.activated(states @ (weight if self.transposed else weight.T) + bias)

    def written(self, experts: Any, expert: int, neurons: torch.Tensor) -> torch.Tensor:
        weight = experts.down_proj[expert]
        return neurons @ weight + experts.down_proj_bias[expert] if self.transposed else neurons @ weight.T

    def __str__(self) -> str:
        return self.name


FAMILIES = [
    Family("mixtral", mixtral),
    Family("qwen2-moe", qwen2_moe),
    Family("deepseek-v3", deepseek, layers=(1,)),
    Family("olmoe", olmoe),
    Family("gpt-oss", gpt_oss, transposed=True, activated=clamped_swiglu),
]
MIXTRAL, GPT_OSS = FAMILIES[0], FAMILIES[4]

every = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def drawn(module: nn.Module) -> nn.Module:
    """With weights that matter, biases too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + ("norm" in path))
    return module.eval()


@cache
def built(family: Family) -> Any:
    """One network for all tests, which leave it as it is."""
    return drawn(family.new())


@contextmanager
def running(family: Family, implementation: str) -> Iterator[Any]:
    module = built(family)
    before = module.get_experts_implementation()
    module.set_experts_implementation(implementation)
    try:
        yield module
    finally:
        module.set_experts_implementation(before)


def path_of(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts"


def sites_of(module: nn.Module, family: Family) -> list[Site]:
    return [
        site
        for layer in family.layers
        for site in expert_sites(path_of(layer), module.get_submodule(path_of(layer)), "", layer, "", "silu")
    ]


def ids(examples: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(3, WORDS, (examples, length), generator=torch.Generator().manual_seed(length))


@dataclass
class Call:
    """One call of a module of experts, as plain hooks see it."""

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor


@contextmanager
def watched(module: nn.Module, family: Family) -> Iterator[dict[int, Call]]:
    calls: dict[int, Call] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            hidden, index, weights = args
            calls[layer] = Call(hidden, index, weights, output)

        return hook

    handles = [module.get_submodule(path_of(layer)).register_forward_hook(keep(layer)) for layer in family.layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def changed(family: Family, module: nn.Module, site: Site, neuron: int) -> Any:
    """A copy of the network in which one neuron writes nothing."""
    twin = copy.deepcopy(module)
    weight = cast(Any, twin.get_submodule(site.module)).down_proj
    with torch.no_grad():
        if family.transposed:
            weight[site.unit, neuron] = 0.0
        else:
            weight[site.unit, :, neuron] = 0.0
    return twin


def zeroing(neuron: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        new = tensor.clone()
        new[..., neuron] = 0.0
        return new

    return edit


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest)


def busiest(seen: dict[str, list[Seen]], sites: list[Site]) -> Site:
    return max(sites, key=lambda site: seen[site.name][0].tensor.shape[0])


# Reading --------------------------------------------------------------------------------------------


@every
@every_implementation
@torch.no_grad()
def test_what_is_read_times_the_output_weights_is_what_the_experts_return(family: Family, implementation: str) -> None:
    with running(family, implementation) as module:
        with watched(module, family) as calls:
            module(ids())
        sites = sites_of(module, family)
        with reading(module, sites) as captured:
            module(ids())
    for layer in family.layers:
        call, experts = calls[layer], module.get_submodule(path_of(layer))
        total = torch.zeros_like(call.output)
        for site in (each for each in sites if each.layer == layer):
            (seen,) = captured[site.name]
            assert seen.place is not None and seen.place.dtype == torch.int64
            routed = (call.index == site.unit).any(-1).nonzero()[:, 0]
            assert torch.equal(seen.place, routed), "the tokens routed to the expert, ascending"
            assert seen.tensor.shape == (len(routed), NEURONS) and site.size == NEURONS
            close(seen.tensor, family.neurons(experts, site.unit, call.hidden[routed]))
            share = (call.weights * (call.index == site.unit)).sum(-1)[routed]
            total[routed] += share[:, None] * family.written(experts, site.unit, seen.tensor)
            output = expert_output_weights(experts, site.unit)
            assert output.shape == (NEURONS, WIDTH)
            bias = experts.down_proj_bias[site.unit] if family.transposed else 0.0
            assert torch.allclose(seen.tensor @ output + bias, family.written(experts, site.unit, seen.tensor))
        close(total, call.output)


@every
@torch.no_grad()
def test_an_expert_without_a_token_shows_no_rows(family: Family) -> None:
    module = built(family)
    sites = sites_of(module, family)
    with watched(module, family) as calls, reading(module, sites) as captured:
        module(ids(1, 1))
    for layer in family.layers:
        rows = {site.unit: captured[site.name][0] for site in sites if site.layer == layer}
        assert {unit for unit, seen in rows.items() if len(seen.tensor)} == set(calls[layer].index[0].tolist())
        for seen in rows.values():
            assert seen.tensor.shape == (len(seen.tensor), NEURONS) and seen.place is not None
            assert len(seen.place) == len(seen.tensor)


@every
def test_the_input_weights_give_the_neurons(family: Family) -> None:
    experts: Any = built(family).get_submodule(path_of(1))
    states = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    for expert in range(EXPERTS):
        weights = expert_input_weights(experts, expert)
        assert set(weights) == {"gate", "up"} and all(each.shape == (NEURONS, WIDTH) for each in weights.values())
        assert all(each.data_ptr() >= experts.gate_up_proj.data_ptr() for each in weights.values())
        gate, up = states @ weights["gate"].T, states @ weights["up"].T
        if family.transposed:
            bias = experts.gate_up_proj_bias[expert]
            gate, up = gate + bias[0::2], up + bias[1::2]
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
            close(gate * torch.sigmoid(1.702 * gate) * up, family.neurons(experts, expert, states))
        else:
            close(functional.silu(gate) * up, family.neurons(experts, expert, states))


@every
def test_weights_are_views_of_the_parameters(family: Family) -> None:
    experts: Any = copy.deepcopy(built(family).get_submodule(path_of(1)))
    with torch.no_grad():
        expert_output_weights(experts, 2)[3] = 5.0
        expert_input_weights(experts, 2)["up"][3] = 7.0
    down, into = experts.down_proj[2], experts.gate_up_proj[2]
    assert ((down if family.transposed else down.T)[3] == 5.0).all() and (down == 5.0).sum() == WIDTH
    rows = into.T[2 * 3 + 1] if family.transposed else into[NEURONS + 3]
    assert (rows == 7.0).all() and (into == 7.0).sum() == WIDTH


def test_a_site_describes_an_expert() -> None:
    module = built(MIXTRAL)
    sites = list(expert_sites(path_of(1), module.get_submodule(path_of(1)), "decoder.", 1, "decoder", "silu"))
    assert [site.name for site in sites] == [f"decoder.expert.1.{expert}" for expert in range(EXPERTS)]
    assert sites[4] == Site(
        "decoder.expert.1.4",
        "expert",
        1,
        NEURONS,
        "silu",
        "decoder",
        module=path_of(1),
        tensor="output",
        through="experts",
        unit=4,
    )


# Writing --------------------------------------------------------------------------------------------


@every
@every_implementation
@torch.no_grad()
def test_what_is_returned_unchanged_changes_nothing(family: Family, implementation: str) -> None:
    with running(family, implementation) as module:
        plain = module(ids()).logits
        with hooked(module, [(site, lambda tensor: tensor) for site in sites_of(module, family)]):
            close(module(ids()).logits, plain)
        assert torch.equal(module(ids()).logits, plain)


@every
@every_implementation
@torch.no_grad()
def test_zeroing_a_neuron_is_zeroing_its_row_of_the_output_weights(family: Family, implementation: str) -> None:
    with running(family, implementation) as module:
        sites = sites_of(module, family)
        with reading(module, sites) as captured:
            plain = module(ids()).logits
        site = busiest(captured, sites)
        with hooked(module, [(site, zeroing(5))]):
            found = module(ids()).logits
        close(found, changed(family, module, site, 5)(ids()).logits)
        assert (found - plain).abs().max() > 1e-3


@every
@every_implementation
@torch.no_grad()
def test_generation_with_a_cache_under_an_edit(family: Family, implementation: str) -> None:
    with running(family, implementation) as module:
        sites = sites_of(module, family)
        options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        with reading(module, sites) as captured:
            plain = module.generate(ids(), **options)
        assert len(captured[sites[0].name]) == 6, "one call for the prompt, one for each further token"
        site = busiest(captured, sites)
        twin = changed(family, module, site, 5)
        with hooked(module, [(site, zeroing(5))]):
            found = module.generate(ids(), **options)
        expected = twin.generate(ids(), **options)
        assert torch.equal(found.sequences, expected.sequences)
        for one, other in zip(found.logits, expected.logits, strict=True):
            close(one, other)
        pairs = zip(found.logits, plain.logits, strict=True)
        assert any((one - other).abs().max() > 1e-3 for one, other in pairs)
        assert module.get_experts_implementation()[""] == implementation


@every
@every_implementation
def test_gradients_are_those_of_the_untapped_network(family: Family, implementation: str) -> None:
    with running(family, implementation) as module:
        sites = sites_of(module, family)

        def gradients() -> dict[str, torch.Tensor | None]:
            module.zero_grad()
            module(ids()).logits.pow(2).sum().backward()
            found = {name: parameter.grad for name, parameter in module.named_parameters()}
            module.zero_grad()
            return found

        plain = gradients()
        with hooked(module, [(site, lambda tensor: tensor) for site in sites]):
            tapped_gradients = gradients()
        for name, expected in plain.items():
            found = tapped_gradients[name]
            assert (found is None) == (expected is None), name
            if found is not None and expected is not None:
                close(found, expected, 1e-4)
        assert plain[f"{path_of(1)}.down_proj"] is not None


def test_the_gradient_of_a_neuron_is_the_slope_of_the_output() -> None:
    experts = alone("gpt-oss", 3, 8, 4).double()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator).double()
    given_to_all = hidden, torch.arange(3).repeat(5, 1), torch.rand(5, 3, generator=generator).double()
    (_, site, _) = expert_sites("", experts, "", 0, "")
    with reading(experts, [site]) as captured:
        out = experts(*given_to_all).pow(2).sum()
    (gradient,) = torch.autograd.grad(out, captured[site.name][0].tensor)

    def nudged(by: float) -> torch.Tensor:
        def edit(tensor: torch.Tensor) -> torch.Tensor:
            new = tensor.clone()
            new[2, 3] += by
            return new

        with hooked(experts, [(site, edit)]), torch.no_grad():
            return experts(*given_to_all).pow(2).sum()

    close(gradient[2, 3], (nudged(1e-4) - nudged(-1e-4)) / 2e-4)


@torch.no_grad()
def test_edits_of_one_expert_come_one_after_the_other_in_the_order_of_the_contexts() -> None:
    module = built(MIXTRAL)
    sites = sites_of(module, MIXTRAL)
    with reading(module, sites) as captured:
        module(ids())
    site = busiest(captured, sites[:EXPERTS])
    before = captured[site.name][0].tensor
    with (
        hooked(module, [(site, lambda tensor: tensor + 1), (site, lambda tensor: tensor * 3)]),
        hooked(module, [(site, lambda tensor: tensor - 2)]),
        reading(module, [site]) as after,
    ):
        module(ids())
    close(after[site.name][0].tensor, (before + 1) * 3 - 2)


@torch.no_grad()
def test_low_precision_weights_stay_low() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        module = copy.deepcopy(built(MIXTRAL)).to(dtype)
        sites = sites_of(module, MIXTRAL)
        for implementation in IMPLEMENTATIONS:
            module.set_experts_implementation(implementation)
            with watched(module, MIXTRAL) as plain:
                module(ids())
            with watched(module, MIXTRAL) as calls, reading(module, sites) as captured:
                module(ids())
            assert {seen.tensor.dtype for (seen,) in captured.values()} == {dtype}
            assert calls[0].output.dtype == dtype
            close(calls[0].output, plain[0].output, 2 * torch.finfo(dtype).eps)


# All is as before -----------------------------------------------------------------------------------


@dataclass
class State:
    """What tapping might have left behind."""

    config: str
    implementation: dict[str, Any]
    registry: dict[str, Any]
    modules: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, module: Any) -> State:
        assert set(ALL_EXPERTS_FUNCTIONS._local_mapping) == set(), "the library's own are all global"
        held = {path: dict(each.__dict__) for path, each in module.named_modules() if is_fused_experts(each)}
        return cls(
            repr(module.config.to_dict()), module.get_experts_implementation(), dict(ALL_EXPERTS_FUNCTIONS), held
        )


@every_implementation
def test_nothing_is_left_behind(implementation: str) -> None:
    with running(MIXTRAL, implementation) as module, torch.no_grad():
        before, sites = State.of(module), sites_of(module, MIXTRAL)
        with reading(module, sites):
            module(ids())
            with hooked(module, [(sites[0], zeroing(1))]):
                module(ids())
            with reading(module, sites[:1]) as inner:
                module(ids())
            assert len(inner[sites[0].name]) == 1
        assert State.of(module) == before
        with pytest.raises(ZeroDivisionError), reading(module, sites), hooked(module, [(sites[0], zeroing(1))]):
            _ = 1 / 0
        assert State.of(module) == before
        with pytest.raises(IndexError), hooked(module, [(site, zeroing(NEURONS)) for site in sites]):
            module(ids())
        assert State.of(module) == before


@torch.no_grad()
def test_contexts_may_end_in_any_order() -> None:
    module = built(MIXTRAL)
    before, sites = State.of(module), sites_of(module, MIXTRAL)
    first, second = reading(module, sites), reading(module, sites)
    one, other = first.__enter__(), second.__enter__()
    module(ids())
    first.__exit__(None, None, None)
    module(ids())
    second.__exit__(None, None, None)
    assert (len(one[sites[0].name]), len(other[sites[0].name])) == (1, 2)
    assert State.of(module) == before


@torch.no_grad()
def test_a_layer_that_is_not_tapped_goes_on_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []

    def counting(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        calls.append(module)
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](module, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "counting", counting)
    module = copy.deepcopy(built(MIXTRAL))
    module.set_experts_implementation("counting")
    sites = sites_of(module, MIXTRAL)
    with reading(module, sites[:1]):
        module(ids())
        assert calls == [module.get_submodule(path_of(1))]
        assert module.config._experts_implementation == "counting"


@torch.no_grad()
def test_an_implementation_chosen_inside_stands_afterwards() -> None:
    module = copy.deepcopy(built(MIXTRAL))
    with reading(module, sites_of(module, MIXTRAL)) as captured:
        module.set_experts_implementation("eager")
        module(ids())
    assert all(len(seen) == 1 for seen in captured.values())
    assert module.config._experts_implementation == "eager"
    assert all(module.get_submodule(path_of(layer)).config is module.config for layer in (0, 1))


@torch.no_grad()
def test_a_copy_made_inside_is_not_tapped() -> None:
    module = built(MIXTRAL)
    sites = sites_of(module, MIXTRAL)
    with hooked(module, [(site, torch.zeros_like) for site in sites]):
        twin = copy.deepcopy(module)
        assert not torch.allclose(twin(ids()).logits, module(ids()).logits)
    assert twin.get_submodule(path_of(0)).config is twin.config
    close(twin(ids()).logits, module(ids()).logits)


# Experts by themselves: other classes, random shapes ------------------------------------------------


def alone(kind: str, experts: int, neurons: int, width: int, implementation: str = "eager") -> Any:
    """A module of experts by itself."""
    config: Any = SimpleNamespace(
        _experts_implementation=implementation,
        hidden_size=width,
        intermediate_size=neurons,
        moe_intermediate_size=neurons,
        moe_hidden_size=width,
        moe_latent_size=None,
        num_local_experts=experts,
        n_routed_experts=experts,
        moe_num_experts=experts,
        hidden_act="gelu" if kind == "mixtral" else "silu",
        mlp_hidden_act="relu2",
        post_norm_eps=1e-5,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )
    kinds: dict[str, Any] = {
        "mixtral": MixtralExperts,
        "gpt-oss": GptOssExperts,
        "nemotron": NemotronHExperts,
        "aria": AriaExperts,
        "muse": MuseSparkExperts,
    }
    return drawn(kinds[kind](config))


def neurons_alone(kind: str, experts: Any, expert: int, states: torch.Tensor) -> torch.Tensor:
    """The neurons of an expert, from the raw parameters."""
    if kind == "nemotron":
        return torch.relu(states @ experts.up_proj[expert].T) ** 2
    weight = experts.gate_up_proj[expert]
    projected = states @ (weight if kind in ("aria", "gpt-oss") else weight.T)
    if kind == "gpt-oss":
        return clamped_swiglu(projected + experts.gate_up_proj_bias[expert])
    gate, up = projected.chunk(2, dim=-1)
    return (functional.gelu(gate) if kind == "mixtral" else functional.silu(gate)) * up


KINDS = ["mixtral", "gpt-oss", "nemotron", "aria", "muse"]


@given(data=st.data())
@torch.no_grad()
def test_random_experts_are_read_and_written(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    number, neurons, width = (data.draw(st.integers(1, most)) for most in (5, 4, 3))
    # The kernel wants rows of 16 bytes.
    neurons, width = 4 * neurons, 4 * width
    experts = alone(kind, number, neurons, width, data.draw(st.sampled_from(IMPLEMENTATIONS)))
    tokens, chosen = data.draw(st.integers(1, 7)), data.draw(st.integers(1, number))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    hidden = torch.randn(tokens, width, generator=generator)
    weights = torch.rand(tokens, chosen, generator=generator)
    # A hash may route a token to one expert twice.
    index = (
        torch.randint(number, (tokens, chosen), generator=generator)
        if data.draw(st.booleans())
        else torch.rand(tokens, number, generator=generator).topk(chosen).indices
    )
    assert is_fused_experts(experts) and expert_shape(experts) == (number, neurons, width)
    assert experts_refusal(experts) is None
    sites = list(expert_sites("", experts, "", 0, ""))
    plain = experts(hidden, index, weights)
    with reading(experts, sites) as captured:
        close(experts(hidden, index, weights), plain, 1e-4)
    for site in sites:
        (seen,) = captured[site.name]
        rows = (index == site.unit).nonzero()[:, 0]
        assert seen.place is not None and torch.equal(seen.place, rows)
        close(seen.tensor, neurons_alone(kind, experts, site.unit, hidden[rows]), 1e-4)

    site, neuron = data.draw(st.sampled_from(sites)), data.draw(st.integers(0, neurons - 1))
    twin = copy.deepcopy(experts)
    expert_output_weights(twin, site.unit)[neuron] = 0.0
    with hooked(experts, [(site, zeroing(neuron))]):
        close(experts(hidden, index, weights), twin(hidden, index, weights), 1e-4)


def test_experts_without_a_gate_read_through_one_projection() -> None:
    experts = alone("nemotron", 3, 8, 4)
    weights = expert_input_weights(experts, 2)
    assert list(weights) == ["in"] and torch.equal(weights["in"], experts.up_proj[2])


@torch.no_grad()
def test_a_number_beyond_the_experts_stands_for_none_and_no_token_is_no_error() -> None:
    experts = alone("mixtral", 3, 8, 4)
    sites = list(expert_sites("", experts, "", 0, ""))
    hidden, index, weights = torch.randn(3, 4), torch.tensor([[0, 3], [3, 3], [2, 0]]), torch.rand(3, 2)
    plain = experts(hidden, index, weights)
    with reading(experts, sites) as captured:
        close(experts(hidden, index, weights), plain)
        assert experts(hidden[:0], index[:0], weights[:0]).shape == (0, 4)
    assert [[len(seen.tensor) for seen in captured[site.name]] for site in sites] == [[2, 0], [0, 0], [1, 0]]


# Refusals -------------------------------------------------------------------------------------------


class Own(MixtralExperts):
    """Experts with a forward that does not look up what it computes."""

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        return hidden_states * 2


@use_experts_implementation
class Bounded(nn.Module):
    """Says that it has the usual gate, but its own forward bounds the neurons."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        usual: Any = MixtralExperts(config)
        self.num_experts, self.act_fn = usual.num_experts, usual.act_fn
        self.gate_up_proj, self.down_proj = usual.gate_up_proj, usual.down_proj

    def forward(self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden_states)
        for token, row in enumerate(index.tolist()):
            for place, expert in enumerate(row):
                gate, up = (hidden_states[token] @ self.gate_up_proj[expert].T).chunk(2)
                neurons = (functional.silu(gate) * up).clamp(-20.0, 20.0)
                total[token] += weights[token, place] * (neurons @ self.down_proj[expert].T)
        return total


def small_config(implementation: str = "eager") -> Any:
    config = MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=3)
    config._experts_implementation = implementation
    return config


@every
def test_experts_of_a_family_are_not_refused(family: Family) -> None:
    module = built(family)
    before, state = State.of(module), torch.get_rng_state()
    for layer in family.layers:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            experts = copy.deepcopy(module.get_submodule(path_of(layer))).to(dtype)
            assert experts_refusal(experts) is None
    assert State.of(module) == before and torch.equal(torch.get_rng_state(), state)


def test_experts_that_compute_something_else_are_refused() -> None:
    why = experts_refusal(drawn(Own(small_config())))
    assert why is not None and "forward of its own" in why
    bounded = drawn(cast(Any, Bounded)(small_config()))
    assert "something else" in (experts_refusal(bounded) or "")
    cast(Any, bounded).config._experts_implementation = "grouped_mm"
    assert experts_refusal(bounded) is None, "that one does not bound them"
    unknown_name = drawn(MixtralExperts(small_config("nonsense")))
    assert "could not be tried: KeyError" in (experts_refusal(unknown_name) or "")
    assert "patchclamp_tapped" not in ALL_EXPERTS_FUNCTIONS


def test_experts_that_are_not_understood_are_refused() -> None:
    config: Any = SimpleNamespace(num_local_experts=2, intermediate_size=8, hidden_size=4, hidden_act="silu")
    llama4 = Llama4TextExperts(config)
    assert resembles_experts(llama4) and not is_fused_experts(llama4)
    assert "Llama4TextExperts" in (experts_refusal(llama4) or "")
    assert not resembles_experts(nn.Linear(2, 2)) and not is_fused_experts(nn.Linear(2, 2))
    site = Site("expert.0.0", "expert", 0, 8, module="", through="experts")
    with pytest.raises(ModelError, match="Llama4TextExperts"), hooked(llama4, [(site, zeroing(0))]):
        pass


def test_experts_on_several_devices_or_none_are_refused() -> None:
    experts = alone("mixtral", 3, 8, 4)
    experts._is_expert_parallel = True
    assert "several devices" in (experts_refusal(experts) or "")
    (site, *_) = expert_sites("", experts, "", 0, "")
    with pytest.raises(ModelError, match="several devices"), hooked(experts, [(site, zeroing(0))]):
        pass
    assert "meta" in (experts_refusal(alone("mixtral", 3, 8, 4).to("meta")) or "")
    quantised = alone("mixtral", 3, 8, 4)
    quantised.down_proj = nn.Parameter(quantised.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert "quantised" in (experts_refusal(quantised) or "")


@torch.no_grad()
def test_experts_whose_weights_are_offloaded_between_calls() -> None:
    accelerate = pytest.importorskip("accelerate")
    module, sites = copy.deepcopy(built(MIXTRAL)), sites_of(built(MIXTRAL), MIXTRAL)
    with reading(module, sites) as expected:
        module(ids())
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    experts: Any = module.get_submodule(path_of(0))
    assert experts.down_proj.is_meta and experts_refusal(experts) is None and experts.down_proj.is_meta
    with reading(module, sites) as captured:
        module(ids())
    for site in sites:
        assert torch.equal(captured[site.name][0].tensor, expected[site.name][0].tensor)


def test_an_expert_that_is_not_there_is_an_error() -> None:
    module = built(MIXTRAL)
    before = State.of(module)
    absent = Site("expert.1.6", "expert", 1, NEURONS, module=path_of(1), through="experts", unit=EXPERTS)
    taps = [Tap(site, lambda seen: seen.tensor) for site in (*sites_of(module, MIXTRAL)[:1], absent)]
    with pytest.raises(ModelError, match=r"expert\.1\.6: .* has experts 0 to 5, not 6"), tapped(module, taps):
        pass
    assert State.of(module) == before
