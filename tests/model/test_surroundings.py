"""Models as users have them: compiled, spread over devices, checkpointed, quantised, in training, on `meta`."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.architectures import BERT, GPT2, LLAMA, T5, TEXTS, padded, tokenizer
from tests.raw import assert_same, hooks_of, watching
from tests.zoo import TextEncoder, by_title
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, SiteNotReached, UnknownName

NEURONS = pc.Neurons({"mlp.0": [1, 5], "mlp.1": [0]})


def logits(module: Any, **inputs: Any) -> torch.Tensor:
    output = module(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


# torch.compile --------------------------------------------------------------------------------------


def test_a_model_that_compiles_itself_is_changed_too() -> None:
    module: Any = GPT2.build()
    inputs = GPT2.inputs()
    with torch.no_grad():
        with pc.load(module).intervene(pc.ablate(NEURONS)):
            expected = logits(module, **inputs)
        module.compile(backend="eager")
        logits(module, **inputs)
        model = pc.load(module)
        with model.intervene(pc.ablate(NEURONS)):
            changed = logits(module, **inputs)
        after = logits(module, **inputs)
    assert_same(changed, expected)
    assert not torch.allclose(after, expected)


def test_the_stance_of_the_compiler_is_put_back() -> None:
    compiled: Any = torch.compile(BERT.build(), backend="eager")
    ran = []

    def counting(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        ran.append(graph)
        return graph

    model = pc.load(compiled)
    with pytest.raises(RuntimeError, match="stop"), model.intervene(pc.ablate(NEURONS)):
        raise RuntimeError("stop")
    torch.compile(nn.Linear(2, 2), backend=counting)(torch.ones(1, 2))
    assert ran  # it compiles again


def test_blocks_that_end_in_any_order_put_everything_back() -> None:
    module: Any = LLAMA.build()
    module.train()
    module.gradient_checkpointing_enable()
    encoder = by_title("nn.TransformerEncoder").build()
    ran: list[torch.fx.GraphModule] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [pc.load(each).intervene(pc.ablate(NEURONS)) for each in (module, encoder, module, encoder)]
        for each in pairs:
            each.__enter__()
        for each in pairs:  # first in, first out
            each.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(block.gradient_checkpointing for block in module.model.layers)

    def counting(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        ran.append(graph)
        return graph

    torch.compile(nn.Linear(3, 2), backend=counting)(torch.ones(1, 3))
    assert ran


# accelerate -----------------------------------------------------------------------------------------


@pytest.fixture
def accelerate() -> Any:
    return pytest.importorskip("accelerate")


def test_weights_that_accelerate_keeps_elsewhere(accelerate: Any) -> None:
    plain, moved = GPT2.build(), GPT2.build()
    accelerate.cpu_offload(moved, execution_device=torch.device("cpu"))
    assert next(moved.parameters()).device.type == "meta"
    inputs = GPT2.inputs()
    model, reference = pc.load(moved, tokenizer=tokenizer()), pc.load(plain, tokenizer=tokenizer())
    assert list(model.sites) == list(reference.sites)
    assert model.weights_sha256() == reference.weights_sha256()
    sites = ["mlp.*", "attn.*", "resid_mid.*"]
    one = pc.record(model, TEXTS, sites, [pc.Moments], progress=False)
    other = pc.record(reference, TEXTS, sites, [pc.Moments], progress=False)
    for name in one:
        assert (one[name].moments.mean == other[name].moments.mean).all()
    with torch.no_grad(), model.intervene(pc.ablate(NEURONS)), reference.intervene(pc.ablate(NEURONS)):
        assert_same(logits(moved, **inputs), logits(plain, **inputs))


def test_a_device_map_of_one_device(accelerate: Any) -> None:
    module = LLAMA.build()
    accelerate.dispatch_model(module, {"": "cpu"}, force_hooks=True)
    model = pc.load(module, tokenizer=tokenizer())
    assert len(pc.record(model, TEXTS, "mlp.*", [pc.Moments], progress=False)) == 2


def test_weights_on_several_devices_with_nobody_who_moves_the_data() -> None:
    module: Any = GPT2.build()
    module.transformer.h[1].to("meta")
    model = pc.load(module, tokenizer=tokenizer())
    with pytest.raises(ModelError, match=r"the weight transformer\.h\.1\..* is on the device 'meta'"):
        pc.record(model, TEXTS, "module:transformer.h.0", [pc.Moments], progress=False)


# Gradients ------------------------------------------------------------------------------------------


def test_gradient_checkpointing_does_not_miss_the_intervention() -> None:
    plain, checkpointed = (LLAMA.build() for _ in range(2))
    checkpointed.train()
    checkpointed.gradient_checkpointing_enable()  # type: ignore[operator]
    inputs = LLAMA.inputs()
    with pc.load(plain).intervene(pc.scale(NEURONS, 3.0)):
        logits(plain, **inputs).square().sum().backward()
    with (
        pytest.warns(UserWarning, match="gradient checkpointing is off inside intervene"),
        pc.load(checkpointed).intervene(pc.scale(NEURONS, 3.0)),
    ):
        output = logits(checkpointed, **inputs)
    output.square().sum().backward()  # after the block
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert_same(other.grad, one.grad)
    assert checkpointed.is_gradient_checkpointing
    assert all(block.gradient_checkpointing for block in checkpointed.model.layers)  # type: ignore[union-attr]


def test_recording_leaves_checkpointing_and_the_training_mode_as_they_were() -> None:
    module: Any = LLAMA.build()
    expected = pc.record(pc.load(module, tokenizer=tokenizer()), TEXTS, summaries=[pc.Moments], progress=False)
    module.train()
    module.gradient_checkpointing_enable()
    module.config.attention_dropout = 0.5
    with pytest.warns(UserWarning, match="in training mode; it is recorded in evaluation mode"):
        got = pc.record(pc.load(module, tokenizer=tokenizer()), TEXTS, summaries=[pc.Moments], progress=False)
    assert all((got[name].moments.mean == expected[name].moments.mean).all() for name in got)
    assert module.training and module.model.layers[0].mlp.training and module.is_gradient_checkpointing


# Quantised weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says where it is moving to
        return torch.ao.quantization.quantize_dynamic(BERT.build(), {nn.Linear}, dtype=torch.qint8)


def test_a_quantised_model_is_recorded_and_changed_but_its_weights_are_not_read(quantised: nn.Module) -> None:
    model, exact = pc.load(quantised, tokenizer=tokenizer()), pc.load(BERT.build(), tokenizer=tokenizer())
    assert list(model.sites) == list(exact.sites)
    path = model.site("mlp.1").module
    recording = pc.record(model, TEXTS, ["mlp.*", "attn.*"], [pc.Moments], progress=False, batch_tokens=1)
    rows = []
    for text in TEXTS:
        with watching(quantised, [path]) as seen, torch.no_grad():
            quantised(**{name: value for name, value in padded([text]).items() if name != "position_ids"})
        rows.append(seen[path][0][0])
    expected = torch.cat(rows).double().mean(0)
    assert_same(torch.from_numpy(recording["mlp.1"].moments.mean), expected)
    with model.intervene(pc.clamp(pc.Neurons({"mlp.1": [3]}), 9.0)), watching(quantised, [path]) as seen:
        model(TEXTS)
    assert (model.activations(TEXTS[0], "mlp.1")[:, 3] != 9.0).all()
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense .* is quantised.*cannot be read or edited"):
        model.output_weights("mlp.1")
    with pytest.raises(ModelError, match="is quantised"):
        model.input_weights("mlp.1")
    kinds = {kind.name: kind for kind in model.kinds()}
    assert kinds["mlp.*"].written and not kinds["mlp.*"].baked and "quantised" in kinds["mlp.*"].why_not


def test_quantised_models_are_told_apart_by_their_weights(quantised: nn.Module) -> None:
    other = copy.deepcopy(quantised)
    assert pc.load(other).weights_sha256() == pc.load(quantised).weights_sha256()
    layer: Any = other.get_submodule("encoder.layer.0.output.dense")
    weight = layer.weight()
    values = weight.int_repr().clone()
    values[0, 0] += 1
    wrap: Any = vars(torch)["_make_per_tensor_quantized_tensor"]
    changed = wrap(values, weight.q_scale(), weight.q_zero_point())
    layer.set_weight_bias(changed, layer.bias())
    assert pc.load(other).weights_sha256() != pc.load(quantised).weights_sha256()


# nn.TransformerEncoder ------------------------------------------------------------------------------


def test_the_fast_path_is_off_only_while_somebody_looks() -> None:
    module = by_title("nn.TransformerEncoder").build()
    model = pc.load(module, tokenizer=tokenizer())
    assert torch.backends.mha.get_fastpath_enabled()
    inputs = {name: each for name, each in padded(TEXTS).items() if name != "position_ids"}
    with torch.no_grad():
        plain = module(**inputs)
        read = model.activations(inputs, "mlp.0")
        assert read.shape[:2] == inputs["input_ids"].shape  # no nested tensor
        with pytest.raises(RuntimeError, match="stop"), model.intervene(pc.ablate(NEURONS)):
            assert not torch.allclose(module(**inputs), plain)
            raise RuntimeError("stop")
        assert torch.equal(module(**inputs), plain)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_probabilities_of_multihead_attention() -> None:
    module = TextEncoder().eval()
    model = pc.load(module, tokenizer=tokenizer())
    assert "attn.*" not in {kind.name for kind in model.kinds() if kind.number}
    assert "never calls its output projection" in model.explain_sites()
    inputs = {name: each for name, each in padded(TEXTS).items() if name != "position_ids"}
    layer: Any = module.encoder.layers[0]
    with torch.no_grad():
        read = model.activations(inputs, "pattern.0")
        x = module.embed(inputs["input_ids"])
        _, expected = layer.self_attn(
            x, x, x, key_padding_mask=inputs["attention_mask"] == 0, average_attn_weights=False
        )
    assert_same(read, expected)
    silent = pc.Neurons({"pattern.0": [2]})
    with model.intervene(pc.ablate(silent)):
        assert not model.activations(inputs, "pattern.0")[:, 2].any()


# Sites that users name ------------------------------------------------------------------------------


def test_a_site_of_ones_own() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    path = "transformer.h.1.mlp.c_fc"
    for tensor, place in (("input", 0), ("output", 1)):
        site = pc.Site.custom(path, tensor)  # type: ignore[arg-type]
        with watching(model.module, [path]) as seen:
            read = model.activations("the cat sat", site)
        assert_same(read, seen[path][place][0])
        # The name says it all: a table of neurons needs nothing else.
        assert model.site(site.name) == model.site(site) and pc.Site.from_name(site.name) == site
        recording = pc.record(model, TEXTS, site, [pc.Moments], progress=False)
        assert list(recording) == [site.name]
        with model.intervene(pc.clamp(pc.Neurons({site.name: [2]}), 0.25)):
            assert (model.activations("the cat", site)[:, 2] == 0.25).all()
    network = by_title("CNN in plain torch").build()
    channels = pc.Site.custom("conv1", axis=1)
    assert channels.name == "module:conv1@output,axis=1"
    images = by_title("CNN in plain torch").inputs("left")["x"]
    read = pc.load(network).activations(images, channels)
    assert_same(read.movedim(-1, 1), network.get_submodule("conv1")(images).detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"module": "a", "tensor": "both"}, '"input" or "output", not \'both\''),
        ({"module": "a", "axis": 0}, "the dimension that counts the neurons, not 0"),
    ],
)
def test_a_wrong_site_of_ones_own(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pc.Site.custom(**arguments)


def test_names_of_sites_that_are_none() -> None:
    model = pc.load(GPT2.build())
    for name in ("module:", "module:lm_head@both", "module:lm_head@input,axis=x"):
        with pytest.raises(DataError, match="names no site"):
            model.site(name)
    with pytest.raises(UnknownName, match=r"no module is called 'lm_heat'\. The nearest: lm_head"):
        model.site(pc.Site.custom("lm_heat"))


def test_a_site_that_exists_twice() -> None:
    model = pc.load(GPT2.build())
    site = model.site("mlp.0")
    assert len(model.select([site, "mlp.0", site])) == 1
    impostor = pc.Site("mlp.0", "mlp", 0, 24, module="transformer.h.1.mlp.c_proj")
    with pytest.raises(DataError, match=r"two different sites are called mlp\.0: .*h\.0.* and .*h\.1"):
        model.select(["mlp.0", impostor])


def test_one_module_in_two_places_is_not_taken_for_two_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.layers = nn.ModuleList([layer, layer])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = pc.load(Shared().eval(), example=torch.randn(1, 3, 8))
    assert not model.sites and "share their weights" in model.explain_sites()


def test_a_site_that_a_batch_never_reaches_is_an_error() -> None:
    # As in a fused kernel: the weights are used, the module is not called.
    module: Any = by_title("Mamba").build()
    model = pc.load(module, tokenizer=tokenizer())
    assert "mixer.1" in model.sites
    mixer = module.backbone.layers[1].mixer
    mixer.out_proj.forward = None
    mixer.forward = lambda hidden_states, *_, **__: hidden_states @ (mixer.out_proj.weight @ mixer.out_proj.weight.T)
    with pytest.raises(
        SiteNotReached, match=r"never reached mixer\.1: the module backbone\.layers\.1\.mixer\.out_proj"
    ):
        pc.record(model, TEXTS, "mixer.*", [pc.Moments], progress=False)
    with (
        pytest.raises(SiteNotReached, match=r"no effect at mixer\.1"),
        model.intervene(pc.ablate(pc.Neurons({"mixer.1": [0]}))),
    ):
        model(TEXTS)


def test_two_stacks_have_the_blocks_of_both() -> None:
    model = pc.load(T5.build())
    assert [block.name for block in model.blocks] == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight") in {
        tuple(name for name in group if "lm_head" not in name) for group in model.tied_weights
    }
    assert not any(hooks_of(model.module).values())
