"""ResNet-20 and -32 on 5,000 CIFAR-10 images: the accuracy says that loading and normalising are right.

The images are strongly compressed, so .810 and .829 are what these weights reach on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import patchclamp as pc
from patchclamp.model import Site
from patchclamp.recording.image_corpus import ImageCorpus

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FILES = {3: "resnet20-12fca82f.th", 5: "resnet32-d509ac18.th"}


class Block(nn.Module):
    """Two convolutions and a shortcut without weights (option A): every other pixel, new channels zero."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.widens = outputs != inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.widens:
            new = out.shape[1] // 4
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new, new))
        return torch.relu(out + x)


class ResNet(nn.Module):
    """The network of `blocks` blocks a stage for images of 32 x 32."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(blocks)])
        self.layer2 = nn.Sequential(Block(16, 32, 2), *[Block(32, 32, 1) for _ in range(blocks - 1)])
        self.layer3 = nn.Sequential(Block(32, 64, 2), *[Block(64, 64, 1) for _ in range(blocks - 1)])
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module")
def cifar(data_folder: Path) -> dict[str, np.ndarray]:
    file = data_folder / "cifar10" / "cifar10_test5000.npz"
    if not file.is_file():
        pytest.skip(f"{file} does not exist")
    with np.load(file, allow_pickle=False) as held:
        return {name: held[name] for name in ("x", "y", "classes")}


def resnet(data_folder: Path, blocks: int) -> ResNet:
    file = data_folder / "resnet_cifar10" / FILES[blocks]
    if not file.is_file():
        pytest.skip(f"{file} does not exist")
    held: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    network = ResNet(blocks)
    network.load_state_dict({name.removeprefix("module."): value for name, value in held["state_dict"].items()})
    return network.eval()


def images_of(cifar: dict[str, np.ndarray]) -> pc.Images:
    return pc.Images(cifar["x"], {"class": cifar["classes"][cifar["y"]]}, mean=MEAN, std=STD, name="cifar10")


def plain_input(x: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (MEAN, STD))
    return (torch.tensor(np.moveaxis(x, 3, 1)).float() / 255 - mean) / std


def logits_of(network: ResNet, images: pc.Images) -> torch.Tensor:
    """What the network says of the images, which it reads as it does in a recording."""
    corpus = ImageCorpus(pc.load(network), images)
    said = []
    with torch.no_grad():
        for examples in corpus.batches(128 * 250):
            forward = corpus.forward(examples)
            said.append(network(*forward.arguments, **forward.keywords))
    return torch.cat(said)


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "accuracy"), [(3, 0.810), (5, 0.829)], ids=["ResNet-20", "ResNet-32"])
def test_accuracy_on_all_images(data_folder: Path, cifar, blocks: int, accuracy: float) -> None:
    right = logits_of(resnet(data_folder, blocks), images_of(cifar)).argmax(1).numpy() == cifar["y"]
    assert len(right) == 5000
    assert right.mean() == pytest.approx(accuracy, abs=0.002)


@pytest.mark.parametrize(("blocks", "accuracy"), [(3, 0.810), (5, 0.829)], ids=["ResNet-20", "ResNet-32"])
def test_accuracy_on_some_images(data_folder: Path, cifar, blocks: int, accuracy: float) -> None:
    some = {"x": cifar["x"][::10], "y": cifar["y"][::10], "classes": cifar["classes"]}
    right = logits_of(resnet(data_folder, blocks), images_of(some)).argmax(1).numpy() == some["y"]
    # Of 500 images the share that is right is off by 0.018 (one standard deviation).
    assert right.mean() == pytest.approx(accuracy, abs=0.055)


def test_the_model_is_given_what_a_plain_loop_gives_it(data_folder: Path, cifar) -> None:
    corpus = ImageCorpus(pc.load(resnet(data_folder, 3)), images_of(cifar))
    plain = plain_input(cifar["x"])
    batches = corpus.batches(128 * 250)
    assert [len(each) for each in batches] == [250] * 20
    for examples in batches:
        forward = corpus.forward(examples)
        assert not forward.keywords
        assert torch.equal(forward.arguments[0], plain[examples])


def test_the_network_has_the_channels_it_should(data_folder: Path) -> None:
    model = pc.load(resnet(data_folder, 3))
    assert [site.size for site in model.select("conv.*")] == [16] * 7 + [32] * 6 + [64] * 6
    assert {site.norm for site in model.select("conv.layer3.*")} == {
        f"layer3.{block}.bn{number}" for block in range(3) for number in (1, 2)
    }


@pytest.mark.parametrize("where", ["conv1", "bn1"])
def test_a_recording_of_channels_equals_a_plain_loop(data_folder: Path, cifar, where: str) -> None:
    some = {"x": cifar["x"][::50], "y": cifar["y"][::50], "classes": cifar["classes"]}
    network = resnet(data_folder, 3)
    # The site of a convolution is what comes out of its batch norm; the convolution itself can be named by hand.
    site = pc.load(network).site("conv.layer1.0.conv1") if where == "bn1" else Site.custom("layer1.0.conv1", axis=1)
    assert site.module == f"layer1.0.{where}"
    summaries = [pc.Moments(), pc.MinMax(), pc.TopExamples(3), pc.ByLabel("class", of=(pc.Moments(),))]
    found = pc.record(network, images_of(some), site, summaries, progress=False)[site.name]

    seen = []
    handle = network.layer1[0].get_submodule(where).register_forward_hook(lambda *given: seen.append(given[-1]))  # type: ignore[union-attr]
    with torch.no_grad():
        for part in plain_input(some["x"]).split(7):
            network(part)
    handle.remove()
    maps = torch.cat(seen).double()  # [images, channels, 32, 32]

    assert found.count == 100 * 32 * 32 and maps.shape == (100, 16, 32, 32)
    np.testing.assert_allclose(found.moments.mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.min_max.max, maps.amax((0, 2, 3)), rtol=1e-4)
    for channel in range(16):
        flat = maps[:, channel].reshape(100, -1)
        top = found.top_examples
        example, position = int(top.example[channel, 0]), int(top.position[channel, 0])
        assert top.values[channel, 0] == pytest.approx(float(flat.max()), rel=1e-4)
        assert float(flat[example, position]) == pytest.approx(float(flat.max()), rel=1e-4)
    by_class = found.by_label.mean("class")
    for place, name in enumerate(found.by_label.categories("class")):
        of_class = maps[some["classes"][some["y"]] == name]
        assert len(of_class) == 10
        np.testing.assert_allclose(by_class[:, place], of_class.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
