"""Channels of convolutions: what is read is what plain torch computes, what is written is what comes next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.raw import assert_same, watching
from torch import nn
from torch.nn import functional
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

import patchclamp as pc
from patchclamp.errors import ModelError

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def drawn(module: nn.Module) -> Any:
    """With weights, and statistics of batch norms, that are all different."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        for each in module.modules():
            if isinstance(each, nn.BatchNorm2d):
                assert each.running_mean is not None and each.running_var is not None
                each.running_mean.copy_(torch.randn(each.num_features, generator=generator))
                each.running_var.copy_(torch.rand(each.num_features, generator=generator) + 0.5)
    return module.eval()


class Network(nn.Module):
    """Convolutions in each of the surroundings that matter; functions for half of the nonlinearities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2, self.act = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv3, self.norm = nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
        self.depthwise, self.drop = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Dropout2d()
        self.gelu = nn.GELU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[examples, 3, height, width] -> [examples, 4]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        y = self.norm(self.conv3(x))
        x = x + self.gelu(self.drop(self.depthwise(y)))
        return self.head(x.mean((2, 3)))


def by_hand(network: Network, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name of a site -> its tensor `[examples, channels, height, width]`, with the weights and nothing else."""

    def convolved(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)  # type: ignore[arg-type]

    def normed(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None
        scale = norm.weight / torch.sqrt(variance + norm.eps)
        return (x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    found = {}
    found["conv.conv1"] = normed(network.bn1, convolved(network.conv1, x))
    x = found["conv.conv1"].clamp(min=0)
    found["conv.conv2"] = x = normed(network.bn2, convolved(network.conv2, x)).clamp(min=0)
    found["conv.conv3"] = convolved(network.conv3, x)
    y = functional.group_norm(found["conv.conv3"], 2, network.norm.weight, network.norm.bias)
    found["conv.depthwise"] = functional.gelu(convolved(network.depthwise, y))
    return found


def test_each_site_is_the_last_tensor_in_which_the_channel_stands_alone() -> None:
    network = drawn(Network())
    model = pc.load(network)
    where = {name: (site.module, site.activation, site.norm) for name, site in model.sites.items()}
    assert where == {
        "conv.conv1": ("bn1", None, "bn1"),  # a function computes the nonlinearity
        "conv.conv2": ("act", "relu", "bn2"),
        "conv.conv3": ("conv3", None, None),  # a group norm mixes channels
        "conv.depthwise": ("gelu", "gelu", None),
    }
    read = model.activations(IMAGES, "conv.*")
    with torch.no_grad():
        expected = by_hand(network, IMAGES)
    for name, tensor in expected.items():
        assert read[name].shape == (*tensor.permute(0, 2, 3, 1).shape,)
        assert_same(read[name], tensor.permute(0, 2, 3, 1).contiguous())
    assert model.input_weights("conv.conv2")["in"].shape == (8, 6 * 9)
    assert torch.equal(model.input_weights("conv.conv2")["in"][5], network.conv2.weight[5].flatten())
    with pytest.raises(ModelError, match="no output projection"):
        model.output_weights("conv.conv1")


@pytest.mark.parametrize(
    ("name", "reader"),
    [("conv.conv1", "conv2"), ("conv.conv2", "conv3"), ("conv.conv3", "norm"), ("conv.depthwise", "")],
)
def test_what_is_written_is_what_the_next_module_receives(name: str, reader: str) -> None:
    network = drawn(Network())
    model = pc.load(network)
    before = model.activations(IMAGES, name)
    with (
        watching(network, [reader] if reader else []) as seen,
        model.intervene(pc.clamp(pc.Neurons({name: [2]}), -0.7)),
    ):
        changed = model.activations(IMAGES, name)
        network(IMAGES)
    assert (changed[..., 2] == -0.7).all()
    others = [index for index in range(before.shape[-1]) if index != 2]
    assert torch.equal(changed[..., others], before[..., others])
    received = changed.permute(0, 3, 1, 2)
    if reader:
        assert_same(seen[reader][0], received.relu() if name == "conv.conv1" else received)
        return
    with torch.no_grad():
        stream = by_hand(network, IMAGES)["conv.conv2"]
        assert_same(
            network(IMAGES) - network.head.bias,
            (stream + before.permute(0, 3, 1, 2)).mean((2, 3)) @ network.head.weight.T,
        )
    with model.intervene(pc.clamp(pc.Neurons({name: [2]}), -0.7)), torch.no_grad():
        got = network(IMAGES)
    assert_same(got, (stream + received).mean((2, 3)) @ network.head.weight.T + network.head.bias)


def test_a_silent_channel_is_one_that_the_nonlinearity_passes_nothing_of() -> None:
    # Zero before the batch norm would leave the norm's own constant behind.
    network = drawn(Network())
    with (
        watching(network, ["conv2"]) as seen,
        pc.load(network).intervene(pc.ablate(pc.Neurons({"conv.conv1": [4]}))),
        torch.no_grad(),
    ):
        network(IMAGES)
    assert not seen["conv2"][0][:, 4].any() and seen["conv2"][0][:, 3].any()


def test_a_network_that_cannot_be_tried_is_read_where_the_convolution_ends_and_says_so() -> None:
    class Odd(Network):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) + time

    network = drawn(Odd())
    model = pc.load(network)
    assert model.site("conv.conv2").module == "conv2"
    assert "could not be tried" in model.explain_sites() and "example=" in model.explain_sites()
    tried = pc.load(network, example=(IMAGES, torch.zeros(())))
    assert tried.site("conv.conv2").module == "act"
    assert tried.site("conv.conv2").name == model.site("conv.conv2").name


def test_trying_leaves_nothing_behind() -> None:
    network = Network().train()
    network.bn1.momentum = 0.5
    before = {name: each.clone() for name, each in network.state_dict().items()}
    assert len(pc.load(network).sites) == 4
    assert network.training and network.bn1.training
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())


def test_a_convolution_that_runs_twice_is_not_listed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.conv(self.conv(x)))

    model = pc.load(Twice())
    assert list(model.sites) == ["conv.last"]
    assert "conv.conv: not listed: a forward pass calls conv 2 times" in model.explain_sites()


class UNetBlock(nn.Module):
    """A block of a diffusion model: group norms before, the time added in the middle, a shortcut, attention behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, 4), nn.Conv2d(4, 8, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(5, 8))
        self.norm2, self.conv2 = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.nonlinearity, self.shortcut = nn.SiLU(), nn.Conv2d(4, 8, 1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """[examples, 4, height, width], [examples, 5] -> [examples, 8, height / 2, width / 2]."""
        hidden = self.conv1(self.nonlinearity(self.norm1(x)))
        hidden = hidden + self.time(embedded)[:, :, None, None]
        hidden = self.conv2(self.nonlinearity(self.norm2(hidden)))
        return self.down(hidden + self.shortcut(x))


def test_a_diffusion_block_in_plain_torch() -> None:
    block = drawn(UNetBlock())
    inputs = torch.randn(2, 4, 6, 6), torch.randn(2, 5)
    model = pc.load(block, example=inputs)
    assert list(model.sites) == ["conv.conv1", "conv.conv2", "conv.shortcut", "conv.down"]
    assert all(site.module == name.removeprefix("conv.") for name, site in model.sites.items())
    read = model.activations({"x": inputs[0], "embedded": inputs[1]}, "conv.*")
    with torch.no_grad():
        x = functional.silu(functional.group_norm(inputs[0], 2, block.norm1.weight, block.norm1.bias))
        first = functional.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1)
        time = functional.silu(inputs[1]) @ block.time[1].weight.T + block.time[1].bias
        x = functional.group_norm(first + time[:, :, None, None], 2, block.norm2.weight, block.norm2.bias)
        second = functional.conv2d(functional.silu(x), block.conv2.weight, block.conv2.bias, padding=1)
        shortcut = functional.conv2d(inputs[0], block.shortcut.weight, block.shortcut.bias)
        assert_same(read["conv.conv1"].permute(0, 3, 1, 2), first)
        assert_same(read["conv.conv2"].permute(0, 3, 1, 2), second)
        assert_same(read["conv.shortcut"].permute(0, 3, 1, 2), shortcut)
        with watching(block, ["down"]) as seen, model.intervene(pc.ablate(pc.Neurons({"conv.conv2": [1, 7]}))):
            block(*inputs)
        second[:, [1, 7]] = 0
        assert_same(seen["down"][0], second + shortcut)


def test_resnet_of_transformers() -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic")
    network = drawn(ResNetModel(config))
    model = pc.load(network)
    names = [name for name in model.sites if "encoder.stages.0.layers.1" in name]
    first, second = (f"encoder.stages.0.layers.1.layer.{number}" for number in (0, 1))
    assert names == [f"conv.{first}.convolution", f"conv.{second}.convolution"]
    assert [model.site(name).activation for name in names] == ["relu", None]
    with watching(network, [first, second, "encoder.stages.0.layers.1"]) as seen:
        read = model.activations({"pixel_values": IMAGES}, names)
    assert_same(read[names[0]].permute(0, 3, 1, 2), seen[second][0])
    block = network.get_submodule("encoder.stages.0.layers.1")
    given, returned = seen["encoder.stages.0.layers.1"]
    parts = block.layer[0]
    with torch.no_grad():
        x = functional.conv2d(given, parts.convolution.weight, padding=1)
        norm = parts.normalization
        x = functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        assert_same(read[names[0]].permute(0, 3, 1, 2), x.relu())
    # The second convolution's channel is alone until the shortcut is added.
    assert_same((read[names[1]].permute(0, 3, 1, 2) + given).relu(), returned)


def test_convnext_has_channels_first_outside_and_last_inside_its_blocks() -> None:
    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[2, 2], image_size=16, patch_size=2, num_stages=2)
    network = drawn(ConvNextModel(config))
    model = pc.load(network)
    assert [site.name for site in model.select("mlp.*")] == [
        *("stages_0.mlp.0", "stages_0.mlp.1", "stages_1.mlp.0", "stages_1.mlp.1")
    ]
    base = "encoder.stages.0.layers.1"
    names = ["stages_0.resid_pre.1", "stages_0.mlp.1", "stages_0.resid_post.1", f"conv.{base}.dwconv"]
    with watching(network, [base, f"{base}.pwconv2", f"{base}.dwconv"]) as seen:
        read = model.activations({"pixel_values": IMAGES}, names)
    given, returned = seen[base]
    block = network.get_submodule(base)
    assert_same(read[names[0]], given.permute(0, 2, 3, 1).contiguous())
    assert_same(read[names[2]], returned.permute(0, 2, 3, 1).contiguous())
    with torch.no_grad():
        depthwise = functional.conv2d(given, block.dwconv.weight, block.dwconv.bias, padding=3, groups=8)
        assert_same(read[names[3]], depthwise.permute(0, 2, 3, 1).contiguous())
        x = functional.layer_norm(
            depthwise.permute(0, 2, 3, 1), (8,), block.layernorm.weight, block.layernorm.bias, 1e-6
        )
        x = functional.gelu(x @ block.pwconv1.weight.T + block.pwconv1.bias)
        assert_same(read[names[1]], x)
        branch = (x @ block.pwconv2.weight.T + block.pwconv2.bias) * block.layer_scale_parameter
        assert_same(returned, given + branch.permute(0, 3, 1, 2))
    with (
        watching(network, [base]) as seen,
        model.intervene(pc.clamp(pc.Neurons({names[0]: [3]}), 1.5)),
        torch.no_grad(),
    ):
        network(pixel_values=IMAGES)
        assert (model.activations({"pixel_values": IMAGES}, names[0])[..., 3] == 1.5).all()
    assert (seen[base][0][:, 3] == 1.5).all() and not (seen[base][0][:, 2] == 1.5).any()


@pytest.mark.parametrize("dimensions", [1, 3])
def test_convolutions_in_one_and_three_dimensions(dimensions: int) -> None:
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d), 3: (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d)}
    convolution, norm, transposed = kinds[dimensions]
    network = nn.Sequential(convolution(2, 4, 3, padding=1), norm(4), nn.ReLU(), transposed(4, 3, 2)).eval()
    model = pc.load(network)
    assert [(name, site.module) for name, site in model.sites.items()] == [("conv.0", "2"), ("conv.3", "3")]
    x = torch.randn(2, 2, *[8] * dimensions)
    read = model.activations(x, "conv.0")
    assert_same(read.movedim(-1, 1), network[:3](x).detach())


def test_a_channel_that_two_modules_read_ends_where_the_convolution_does() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.aside = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.act(x) + self.aside(x)

    # Behind the nonlinearity, a silent channel would still be heard aside.
    model = pc.load(drawn(Forked()))
    assert (model.site("conv.conv").module, model.site("conv.conv").activation) == ("conv", None)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_an_image_without_a_dimension_of_examples(dimensions: int) -> None:
    convolution = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
    network = nn.Sequential(convolution(2, 4, 3), nn.ReLU(), convolution(4, 3, 1)).eval()
    model, x = pc.load(network), torch.randn(2, *[6] * dimensions)
    assert_same(model.activations(x, "conv.0").movedim(-1, 0), network[:2](x).detach())
    with model.intervene(pc.ablate(pc.Neurons({"conv.0": [1]}))), torch.no_grad():
        hidden = network[:2](x)
        assert not hidden[1].any() and hidden[0].any()
