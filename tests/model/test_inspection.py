"""What the inspection makes of networks built in other ways, and what it refuses to list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.architectures import HEADS, LAYERS, NEURONS, OPT, WIDTH, gpt_neox
from tests.raw import assert_same, call, plain_weights, watching
from torch import nn
from transformers import AlbertConfig, AlbertModel, BertConfig, Phi3Config, Phi3Model

import patchclamp as pc
from patchclamp.errors import ModelError, UnknownName

SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


def test_attention_beside_the_mlp_leaves_no_middle() -> None:
    module = gpt_neox(parallel=True).eval()
    model = pc.load(module)
    assert list(model.sites)[:4] == ["resid_pre.0", "pattern.0", "attn.0", "mlp.0"]
    assert "resid_mid.*: not listed: " in model.explain_sites() and "side by side" in model.explain_sites()
    with pytest.raises(UnknownName, match=r"resid_mid\.\* is not listed: .*side by side"):
        model.select("resid_mid.*")
    with pytest.raises(UnknownName, match=r"resid_mid\.\* is not listed"):
        model.site("resid_mid.1")
    assert "resid_mid.1" in pc.load(gpt_neox(parallel=False).eval()).sites


def test_a_block_without_attention_has_no_middle() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = BertConfig(vocab_size=9)
            self.embed = nn.Embedding(9, 4)
            self.blocks = nn.ModuleList([Block("w1", "w2"), Block("w1", "w2")])

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    model = pc.load(Network())
    assert list(model.sites)[:3] == ["resid_pre.0", "mlp.0", "resid_post.0"]
    assert "resid_mid.*: not listed: nothing is added to the residual before the MLP" in model.explain_sites()


def encoder_of_torch() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, NEURONS, batch_first=True, activation=nn.GELU())
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).eval()


def test_attention_of_torch_is_not_listed_because_its_projection_is_never_called() -> None:
    module = encoder_of_torch()
    model = pc.load(module)
    assert not [site for site in model.sites.values() if site.kind == "attn"]
    assert "attn.*: not listed: nn.MultiheadAttention never calls its output projection" in model.explain_sites()
    with pytest.raises(UnknownName, match=r"attn\.\* is not listed: nn\.MultiheadAttention"):
        model.select("attn.0")


def test_the_fused_path_of_torch_is_not_taken_while_a_site_is_read() -> None:
    # In evaluation mode without gradient nn.TransformerEncoderLayer computes its MLP in one fused kernel.
    module = encoder_of_torch()
    model, x = pc.load(module), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    recorded = model.activations(x, "mlp.1")
    with watching(module, ["layers.1.linear2"]) as seen:
        call(module, {"src": x})
    weights, bias = plain_weights(module, "layers.1.linear2")
    assert_same(recorded @ weights + bias, seen["layers.1.linear2"][1])


class Block(nn.Module):
    """A gated block whose projections are registered in an order of one's own (Meta's Llama: w1, w2, w3)."""

    w1: nn.Module
    w2: nn.Module
    w3: nn.Module

    def __init__(self, *order: str, norm: bool = True) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(6, 4) if name == "w2" else nn.Linear(4, 6))
        self.act = nn.SiLU()
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 4] -> [..., 4]."""
        given = self.norm(x)
        hidden = self.act(self.w1(given))
        return x + self.w2(hidden * self.w3(given) if hasattr(self, "w3") else hidden)


@pytest.mark.parametrize(
    ("order", "norm"),
    [(("w1", "w2", "w3"), True), (("w1", "w2", "w3"), False), (("w2", "w1", "w3"), True), (("w2", "w1"), True)],
)
def test_the_order_in_which_projections_are_registered_does_not_matter(order: tuple[str, ...], norm: bool) -> None:
    module = nn.Sequential(Block(*order, norm=norm), Block(*order, norm=norm))
    model, x = pc.load(module), torch.randn(5, 4)
    site = model.site("mlp.1")
    assert (site.size, site.writes) == (6, "1.w2")
    assert dict(site.reads) == ({"gate": "1.w1", "up": "1.w3"} if "w3" in order else {"in": "1.w1"})
    with watching(module, ["1.w2"]) as seen:
        recorded = model.activations(x, "mlp.1")
    weights, bias = plain_weights(module, "1.w2")
    assert_same(recorded @ weights + bias, seen["1.w2"][1])


def test_a_bottleneck_is_read_where_it_is_narrow() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

    site = pc.load(nn.ModuleList([Adapter(), Adapter()])).site("mlp.1")
    assert (site.size, site.writes, dict(site.reads)) == (2, "1.up", {"in": "1.down"})


def test_an_attention_projection_registered_before_the_others() -> None:
    # Phi-3: o_proj comes before qkv_proj.
    config = Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = pc.load(Phi3Model(config).eval())
    assert model.site("attn.1").writes == "layers.1.self_attn.o_proj"
    with pytest.raises(ModelError, match=r"mlp\.0: gate and up are one fused projection, layers\.0\.mlp\.gate_up_proj"):
        model.input_weights("mlp.0")
    assert "gate.*: not listed: gate and up are one fused projection" in model.explain_sites()


def test_an_attention_projection_that_cannot_be_told_is_not_listed() -> None:
    module = OPT.build()
    for layer in range(LAYERS):
        # All four are square: what a forward pass calls last shows that q_proj, now registered last, is not the one.
        attention = module.get_submodule(f"decoder.layers.{layer}.self_attn")
        attention._modules = dict(reversed(attention._modules.items()))
    model = pc.load(module)
    assert not [site for site in model.sites.values() if site.kind == "attn"]
    with pytest.raises(UnknownName, match=r"attn\.\* is not listed: self_attn\.out_proj runs after self_attn\.\w_proj"):
        model.select("attn.*")


def test_blocks_that_share_their_weights_are_not_listed() -> None:
    model = pc.load(AlbertModel(AlbertConfig(**SMALL, embedding_size=8)).eval())
    assert not model.sites
    with pytest.raises(UnknownName, match=r"mlp\.\* is not listed: a forward pass calls .* 2 times: .*share"):
        model.select("mlp.*")


def test_a_layer_that_stands_in_two_places_is_not_listed() -> None:
    twice, once = Block("w1", "w2"), Block("w1", "w2")
    model = pc.load(nn.Sequential(twice, once, twice))
    assert [site.name for site in model.sites.values() if site.layer != 1] == []
    assert [site.name for site in model.select("mlp.*")] == ["mlp.1"]
    for layer in (0, 2):
        with pytest.raises(UnknownName, match=rf"mlp\.{layer} is not listed: layers 0 and 2 share 2\."):
            model.site(f"mlp.{layer}")


def test_layers_that_share_a_part_keep_the_sites_that_are_their_own() -> None:
    blocks = [Block("w1", "w2") for _ in range(3)]
    blocks[2].w2 = blocks[0].w2
    model = pc.load(nn.Sequential(*blocks))
    assert [site.layer for site in model.select("resid_post.*")] == [0, 1, 2]
    assert [site.layer for site in model.select("mlp.*")] == [1]
    assert "mlp.0: not listed: layers 0 and 2 share 2.w2" in model.explain_sites()


def test_a_second_name_of_a_whole_encoder_changes_nothing() -> None:
    encoder = nn.Sequential(Block("w1", "w2"), Block("w1", "w2"))
    wrapper = nn.ModuleDict({"model": nn.ModuleDict({"encoder": encoder}), "encoder": encoder})
    assert [site.layer for site in pc.load(wrapper).select("mlp.*")] == [0, 1]


def test_a_projection_that_one_block_calls_twice_is_not_listed() -> None:
    class Twice(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(super().forward(x))

    model = pc.load(nn.Sequential(Twice("w1", "w2"), Twice("w1", "w2")))
    with pytest.raises(UnknownName, match=r"mlp\.\* is not listed: one call of 0 calls 0\.w2 2 times"):
        model.select("mlp.*")
    assert len(model.select("resid_post.*")) == 2


def test_lazy_layers_wait_for_the_first_call_of_their_owner() -> None:
    module = nn.Sequential(*[Block("w1", "w2") for _ in range(2)])
    lazy = [nn.LazyLinear(6) for _ in module]
    for block, layer in zip(module, lazy, strict=True):
        setattr(block, "act", nn.Sequential(nn.SiLU(), layer))  # noqa: B010, as it is declared to be another class
    model = pc.load(module)
    assert "could not be tried: ModelError: 0 has lazy layers, whose sizes a first call" in model.explain_sites()
    assert all(isinstance(layer.weight, nn.UninitializedParameter) for layer in lazy)
    assert model.activations(torch.randn(3, 4), "mlp.1").shape == (3, 6)


def test_a_block_built_unlike_the_others_has_the_sites_that_it_has() -> None:
    module = nn.ModuleList([Block("w1", "w2", "w3"), Block("w1", "w2"), Block("w1", "w2", "w3")])
    model = pc.load(module)
    assert [site.name for site in model.select("mlp.*")] == ["mlp.0", "mlp.1", "mlp.2"]
    assert [len(model.site(f"mlp.{layer}").reads) for layer in range(3)] == [2, 1, 2]


def test_a_block_without_neurons_among_the_others_is_said() -> None:
    module = nn.Sequential(Block("w1", "w2"), Block("w1"), Block("w1", "w2"))
    model = pc.load(module)
    assert [site.name for site in model.select("mlp.*")] == ["mlp.0", "mlp.2"]
    assert "*.1: not listed: 1 has no MLP, experts or mixer" in model.explain_sites()
    with pytest.raises(UnknownName, match="1 has no MLP, experts or mixer"):
        model.site("mlp.1")


def test_a_residual_that_is_written_in_place_is_read_as_it_was() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.act, self.down = (
                nn.LayerNorm(4),
                nn.Linear(4, 6),
                nn.ReLU(inplace=True),
                nn.Linear(6, 4),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += self.down(self.act(self.up(self.norm(x))))
            return x

    module = nn.Sequential(InPlace(), InPlace())
    x = torch.randn(5, 4)
    read = pc.load(module).activations(x.clone(), ["resid_pre.0", "resid_post.0", "resid_post.1", "module:0.up"])
    with torch.no_grad():
        block: Any = module[0]
        before = block.up(block.norm(x))
        first = module[0](x.clone())
        second = module[1](first.clone())
    assert torch.equal(read["resid_pre.0"], x)
    assert torch.equal(read["resid_post.0"], first) and torch.equal(read["resid_post.1"], second)
    assert torch.equal(read["module:0.up"], before)
