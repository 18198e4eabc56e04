"""Which weights make and read a neuron: compared with what plain hooks and the modules themselves do.

Setting what reads a neuron to zero is ablating it to zero; deleting all of its slices removes it. What cannot be
said is answered with a reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.architectures import (
    BERT,
    CLASSIFIER,
    GEMMA2,
    GPT2,
    LLAMA,
    MAMBA,
    NEOX,
    OPT,
    OPT_POST,
    SEQUENTIAL,
    T5,
    T5_GATED,
    VOCABULARY,
    WIDTH,
    Architecture,
    deepseek,
    mixtral,
    qwen2_moe,
)
from tests.raw import assert_same, call, hooks_of, watching
from torch import nn
from torch.nn.functional import linear, relu
from torch.nn.utils import parametrizations
from transformers import GptOssConfig, GptOssForCausalLM, Phi3Config, Phi3ForCausalLM

import patchclamp as pc
from patchclamp.errors import UnknownName
from patchclamp.model.blocks import Block, blocks_of
from patchclamp.model.example import Example
from patchclamp.model.inspection import inspect
from patchclamp.model.site import Site

PROJECTED = ("mlp", "gate", "attn", "mixer")


def phi3() -> nn.Module:
    """Its MLPs have gate and up in one projection, one after the other."""
    torch.manual_seed(0)
    made = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
    )
    return made.eval()


def gpt_oss() -> nn.Module:
    """Its experts have biases, are transposed, and alternate gate and up."""
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


FAMILIES = [BERT, GPT2, LLAMA, OPT, OPT_POST, T5, T5_GATED, GEMMA2, NEOX, MAMBA, SEQUENTIAL, CLASSIFIER]
FAMILIES += [replace(LLAMA, name="phi3", new=phi3), replace(LLAMA, name="qwen2-moe", new=qwen2_moe)]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def sites_of(module: nn.Module) -> dict[str, Site]:
    return dict(pc.load(module).sites)


def wired(module: nn.Module) -> Iterator[tuple[Block, Site]]:
    sites = sites_of(module)
    for block in blocks_of(module, sites):
        for name in block.sites:
            yield block, sites[name]


def block_of(module: nn.Module, name: str) -> Block:
    return next(block for block in blocks_of(module, sites_of(module)) if name in block.sites)


@contextmanager
def ablated(module: nn.Module, site: Site, neurons: Sequence[int]) -> Iterator[None]:
    """Neurons of a site that hooks can see are zero, along its axis."""

    def zeroed(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.movedim(site.axis, -1)[..., list(neurons)] = 0
        return changed

    def before(_module: nn.Module, args: tuple) -> tuple:
        return (zeroed(args[0]), *args[1:])

    def after(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        return zeroed(output)

    target = module.get_submodule(site.module)
    handle = target.register_forward_pre_hook(before) if site.tensor == "input" else target.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def without(module: nn.Module, block: Block, site: Site, neurons: Sequence[int]) -> nn.Module:
    """A smaller network: the slices of these neurons deleted from all that makes and reads them."""
    smaller = copy.deepcopy(module)
    doomed: dict[tuple[str, int], set[int]] = {}
    for each in (*block.producers(site), *block.consumers(site)):
        assert not each.index
        doomed.setdefault((each.parameter, each.axis), set()).update(each.position(neuron) for neuron in neurons)
    for (name, axis), positions in doomed.items():
        path, _, last = name.rpartition(".")
        holder: Any = smaller.get_submodule(path)
        old = getattr(holder, last)
        kept = torch.tensor([place for place in range(old.shape[axis]) if place not in positions])
        new = old.detach().index_select(axis, kept)
        setattr(holder, last, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
        if type(holder).__name__ == "Conv1D" and axis == 1:
            holder.nf = len(kept)
        if isinstance(holder, nn.Conv2d) and last == "weight":
            holder.out_channels, holder.in_channels = new.shape[:2]
    return smaller


# Setting consumers to zero -----------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_consumers_set_to_zero_are_the_neuron_ablated(family: Architecture) -> None:
    module = family.build()
    inputs = family.inputs()
    before = call(module, inputs)
    seen = []
    for block, site in wired(module):
        if site.kind not in PROJECTED or not block.consumers(site):
            continue
        assert block.why_inexact(site) == ""
        # Some at once, as a single rectified one may be silent.
        for neurons in (range(0, site.size or 0, 3), range(1, site.size or 0, 5)):
            with ablated(module, site, neurons):
                expected = call(module, inputs)
            slices = [each.of(module, neuron) for each in block.consumers(site) for neuron in neurons]
            kept = [each.clone() for each in slices]
            for each in slices:
                each.zero_()
            got = call(module, inputs)
            for each, old in zip(slices, kept, strict=True):
                each.copy_(old)
            assert_same(got, expected)
            assert not torch.equal(expected, before), f"{site.name} does nothing"
        seen.append(site.name)
    expected_sites = [site.name for _, site in wired(module) if site.kind in PROJECTED]
    assert seen == expected_sites
    assert torch.equal(call(module, inputs), before)


@pytest.mark.parametrize("new", [mixtral, qwen2_moe, deepseek, gpt_oss], ids=lambda each: each.__name__)
@torch.no_grad()
def test_an_experts_slices(new: Callable[[], nn.Module]) -> None:
    """The sum over the experts is computed here from the slices themselves, neuron by neuron."""
    torch.manual_seed(0)
    module = new().eval()
    for parameter in module.parameters():
        parameter.normal_(0, 0.3)
    found = {site.name: (block, site) for block, site in wired(module) if site.kind == "expert"}
    block, site = found["expert.1.2"]
    experts: Any = module.get_submodule(site.module)
    x = torch.randn(5, WIDTH)
    chosen, weight = torch.full((5, 1), 2), torch.rand(5, 1)
    config = experts.config._experts_implementation
    experts.config._experts_implementation = "eager"
    try:
        whole = experts(x, chosen, weight)
        made, (read,) = block.producers(site), block.consumers(site)
        matrices = [each for each in made if "bias" not in each.parameter]
        biases = [each.every(module) for each in made if "bias" in each.parameter] or [0.0] * len(matrices)
        gate, up = (linear(x, each.every(module)) + b for each, b in zip(matrices, biases, strict=True))
        if hasattr(experts, "alpha"):  # GPT-OSS's own
            gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
            neurons = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        else:
            neurons = nn.functional.silu(gate) * up
        bias = experts.down_proj_bias[2] if hasattr(experts, "down_proj_bias") else 0.0
        assert_same(weight * (neurons @ read.every(module) + bias), whole)
        # One neuron without its column is the sum without that neuron.
        read.of(module, 3).zero_()
        neurons[:, 3] = 0
        assert_same(weight * (neurons @ read.every(module) + bias), experts(x, chosen, weight))
    finally:
        experts.config._experts_implementation = config
    assert block.why_incomplete(site) == block.why_inexact(site) == ""
    assert len({each for block, site in found.values() for each in block.consumers(site)}) == len(found)


# Deleting a neuron --------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_a_network_without_a_neuron_is_the_network_with_it_ablated(family: Architecture) -> None:
    module = family.build()
    inputs = family.inputs()
    for block, site in wired(module):
        if site.kind != "mlp" or block.why_incomplete(site):
            assert site.kind != "mlp" or family is CLASSIFIER
            continue
        with ablated(module, site, [1, 4]):
            expected = call(module, inputs)
        smaller = without(module, block, site, [1, 4])
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in module.parameters())
        assert_same(call(smaller, inputs), expected)


@pytest.mark.parametrize("family", [BERT, GPT2, OPT, T5], ids=str)
@torch.no_grad()
def test_producers_of_attention_make_its_neurons(family: Architecture) -> None:
    module = family.build()
    inputs = family.inputs()
    for block, site in wired(module):
        if site.kind != "attn":
            continue
        changed = copy.deepcopy(module)
        for each in block.producers(site):
            each.of(changed, 5).zero_()
        given: list[torch.Tensor] = []
        for network in (module, changed):
            with watching(network, [site.module]) as watched:
                call(network, inputs)
            given.append(watched[site.module][0])
        others = [number for number in range(site.size or 0) if number != 5]
        assert not given[1][..., 5].any()
        assert given[0][..., 5].any()
        # A block before it, changed as well, would change what all neurons are made of; only one is.
        assert_same(given[1][..., others], given[0][..., others])


class Interleaved(nn.Module):
    """An MLP whose one projection alternates gate and up."""

    def __init__(self, order: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.both = nn.Linear(6, 20)
        self.act = nn.SiLU()
        self.down = nn.Linear(10, 6)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.order(self.both(self.norm(x)))
        return x + self.down(self.act(gate) * up)


@pytest.mark.parametrize(
    ("order", "layouts"),
    [
        (lambda both: both.chunk(2, -1), [(0, 1), (10, 1)]),
        (lambda both: (both[..., ::2], both[..., 1::2]), [(0, 2), (1, 2)]),
        (lambda both: (both[..., :10], both[..., 10:].flip(-1)), []),
    ],
    ids=["halves", "alternating", "reversed"],
)
@torch.no_grad()
def test_the_order_of_a_fused_gate_is_tried(order: Any, layouts: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*[Interleaved(order) for _ in range(2)]).eval()
    block = block_of(module, "mlp.1")
    made = [each for each in block.producers("mlp.1") if each.parameter == "1.both.weight"]
    assert [(each.offset, each.stride) for each in made] == layouts
    assert bool(layouts) == (block.why_incomplete("mlp.1") == "")
    x = torch.randn(3, 6)
    site = sites_of(module)["mlp.1"]
    if layouts:
        with ablated(module, site, [2, 9]):
            expected = module(x)
        smaller = without(module, block, site, [2, 9])
        assert smaller[1].both.weight.shape == (16, 6)  # type: ignore[index]
        assert_same(smaller(x), expected)


# Convolutions and recurrent layers ----------------------------------------------------------------------


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Dropout2d()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 2),
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    nn.init.uniform_(module[1].running_mean)  # type: ignore[arg-type]
    return module.eval()


@torch.no_grad()
def test_channels_in_a_sequence_are_deleted_and_ablated() -> None:
    module = convolutions()
    x = torch.randn(2, 3, 16, 16)
    names = []
    for block, site in wired(module):
        if site.kind != "conv":
            continue
        names.append(site.name)
        assert block.why_incomplete(site) == block.why_inexact(site) == ""
        with ablated(module, site, [1, 3]):
            expected = module(x)
        assert_same(without(module, block, site, [1, 3])(x), expected)
        assert not torch.allclose(expected, module(x))
    assert names == ["conv.0", "conv.4.0"]


@torch.no_grad()
def test_what_follows_a_convolution_may_make_its_removal_inexact() -> None:
    # Read where the convolution ends, before norm and nonlinearity: zero there is not zero at the next convolution.
    module = convolutions()
    sites = {site.name: site for site in inspect(module).sites.values() if site.kind == "conv"}
    block = next(each for each in blocks_of(module, sites) if "conv.0" in each.sites)
    assert "1 makes another number of a neuron that is zero" in block.why_inexact("conv.0")
    assert {each.parameter for each in block.consumers("conv.0")} >= {"1.weight", "1.running_var", "4.0.weight"}

    module[1] = nn.Sigmoid()
    block = next(each for each in blocks_of(module, sites) if "conv.0" in each.sites)
    assert "1 makes another number" in block.why_inexact("conv.0")


def test_convolutions_whose_readers_are_not_known() -> None:
    groups = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    assert "1 comes next: it has groups" in block_of(groups, "conv.0").why_incomplete("conv.0")
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    assert "several of each channel" in block_of(wide, "conv.0").why_incomplete("conv.0")
    softmax = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax2d(), nn.Conv2d(4, 2, 3))
    assert "Softmax2d" in block_of(softmax, "conv.0").why_incomplete("conv.0")

    transposed = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 3))
    assert "share the rows" in block_of(transposed, "conv.0").why_incomplete("conv.0")


class Residual(nn.Module):
    """Convolutions as anybody writes them: functions between them, and a sum around two of them."""

    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor], around: bool = True) -> None:
        super().__init__()
        self.around = around
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(4, 2)
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = relu(self.stem(x))
        made = self.second(self.middle(self.norm(self.first(x))))
        x = x + made if self.around else made
        return self.head(relu(x).mean((2, 3)))


@torch.no_grad()
def test_readers_of_channels_are_tried() -> None:
    torch.manual_seed(0)
    module = Residual(relu)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    module.eval()
    x = torch.randn(2, 3, 9, 9)
    sites, hooks = sites_of(module), hooks_of(module)
    site = sites["conv.first"]
    assert "no nn.Sequential" in block_of(module, "conv.first").why_inexact("conv.first")
    blocks = {block.name: block for block in blocks_of(module, sites, Example((x,)))}
    block = blocks["conv.first"]
    assert block.why_incomplete(site) == block.why_inexact(site) == ""
    assert [each.parameter for each in block.consumers(site)] == ["second.weight"]
    with ablated(module, site, [1, 4]):
        expected = module(x)
    assert not torch.allclose(expected, module(x))
    assert_same(without(module, block, site, [1, 4])(x), expected)
    assert hooks_of(module) == hooks

    # The sum around the two reads the stem as well, and the head reads only sums.
    assert "first reads the channels, and something else does too" in blocks["conv.stem"].why_incomplete("conv.stem")
    assert "head reads the channels in one with something else" in blocks["conv.second"].why_incomplete("conv.second")


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (torch.sigmoid, "a channel that is zero is not zero where second reads it"),
        (lambda x: x.flip(1), "second reads the channels mixed"),
        (lambda x: x.softmax(1), "second reads the channels mixed"),
        (lambda x: torch.cat([x, x], -1), ""),
        (lambda x: x + torch.linspace(0, 1, x.shape[-1]), "second reads the channels in one with something else"),
    ],
    ids=["sigmoid", "flipped", "softmax", "side-by-side", "sum"],
)
def test_what_lies_between_channels_and_their_reader(middle: Any, why: str) -> None:
    torch.manual_seed(0)
    module = Residual(middle, around=False).eval()
    blocks = {each.name: each for each in blocks_of(module, sites_of(module), Example((torch.randn(1, 3, 8, 8),)))}
    assert why in blocks["conv.first"].why_inexact("conv.first")
    assert blocks["conv.second"].why_incomplete("conv.second") == ""
    assert bool(why) == bool(blocks["conv.first"].why_inexact("conv.first"))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_producers_of_a_recurrent_layer_make_its_neurons(kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(3, 5, num_layers=2, bidirectional=True)
    x = torch.randn(7, 2, 3)
    untouched = module(x)[0]
    names = []
    for block, site in wired(module):
        changed = copy.deepcopy(module)
        for each in block.producers(site):
            each.of(changed, 2).zero_()
        # tanh(0) gives nothing to the state, which was zero at first.
        state = changed(x)[1]
        state = state[0] if kind is nn.LSTM else state
        assert not state[site.unit][:, 2].any()
        assert state[site.unit][:, [0, 1, 3, 4]].all()
        # Nobody within the layer reads it any more, so the last layer does not notice what made it.
        deaf = copy.deepcopy(module)
        for each in block.consumers(site):
            each.of(deaf, 2).zero_()
        loud = copy.deepcopy(deaf)
        for each in block.producers(site):
            each.of(loud, 2).normal_()
        columns = [column for column in range(10) if site.unit < 2 or column != 2 + 5 * (site.unit % 2)]
        assert torch.equal(deaf(x)[0][..., columns], loud(x)[0][..., columns])
        assert not torch.allclose(deaf(x)[0][..., columns], untouched[..., columns])
        assert "who reads that is not known" in block.why_incomplete(site)
        assert block.why_inexact(site)
        names.append(block.name)
    assert names == ["recurrent.0", "recurrent.0.reverse", "recurrent.1", "recurrent.1.reverse"]


@torch.no_grad()
def test_a_projected_state_and_a_cell() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 6, num_layers=2, proj_size=4)
    block = block_of(module, "recurrent.0")
    (made,) = block.producers("recurrent.0")
    made.of(module, 1).zero_()
    assert not module(torch.randn(5, 2, 3))[1][0][0, :, 1].any()
    assert [(each.parameter, each.size) for each in block.consumers("recurrent.0")] == [
        ("weight_hh_l0", 4),
        ("weight_ih_l1", 4),
    ]

    cell = nn.Sequential(nn.GRUCell(3, 5))
    block = block_of(cell, "recurrent.0")
    for each in block.producers("recurrent.0"):
        each.of(cell, 4).zero_()
    assert cell(torch.randn(2, 3))[:, 4].eq(0).all()
    assert [each.parameter for each in block.consumers("recurrent.0")] == ["0.weight_hh"]


# What cannot be said -------------------------------------------------------------------------------------


def test_reasons() -> None:
    llama = block_of(LLAMA.build(), "attn.1")
    assert llama.name == "1"
    assert "2 neurons share each row of model.layers.1.self_attn.v_proj" in llama.why_incomplete("attn.1")
    assert "query, key and value are one fused" in block_of(NEOX.build(), "attn.0").why_incomplete("attn.0")
    assert "all of its inputs" in block_of(MAMBA.build(), "mixer.0").why_incomplete("mixer.0")
    assert "residual stream" in llama.why_incomplete("resid_post.1")
    assert llama.why_inexact("resid_post.1") == "every block after reads it"
    assert "weigh the values" in llama.why_inexact("pattern.1")
    classifier = block_of(CLASSIFIER.build(), "mlp.0")
    assert "norm (LayerNorm) works on the neurons" in classifier.why_incomplete("mlp.0")
    assert classifier.why_inexact("mlp.0") == ""
    assert block_of(T5.build(), "decoder.cross_attn.1").name == "decoder.1"


def test_tied_weights_are_told() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
    module[4].weight = module[0].weight  # type: ignore[union-attr]
    block = block_of(module, "mlp.0")
    assert "producers: 0.weight is one tensor with 4.weight" in block.why_incomplete("mlp.0")
    assert block.why_inexact("mlp.0") == ""
    block = block_of(module, "mlp.1")
    assert "consumers: 4.weight is one tensor with 0.weight" in block.why_incomplete("mlp.1")
    assert "0.weight" in block.why_inexact("mlp.1")


def test_weights_computed_from_others_are_not_sliced() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 2)))
    block = block_of(module, "mlp.0")
    assert block.consumers("mlp.0") == ()
    assert "2.weight is no parameter of its own" in block.why_inexact("mlp.0")


def test_names_and_neurons_that_do_not_exist() -> None:
    module = SEQUENTIAL.build()
    block = block_of(module, "mlp.1")
    with pytest.raises(UnknownName, match=r"mlp\.0.*mlp\.1"):
        block.producers("mlp.0")
    read = block.consumers(sites_of(module)["mlp.1"])[0]
    with pytest.raises(UnknownName, match="neurons 0 to 7, not 8"):
        read.of(module, 8)
    with pytest.raises(UnknownName, match="not -1"):
        read.of(module, -1)


def test_slices_are_views() -> None:
    module = SEQUENTIAL.build()
    (read,) = block_of(module, "mlp.0").consumers("mlp.0")
    read.every(module)[3].fill_(7.0)
    weight: Any = module.get_submodule("2").weight
    assert weight[:, 3].eq(7).all()
    assert not weight[:, 4].eq(7).any()
    assert read.every(module).shape == (10, 8)
