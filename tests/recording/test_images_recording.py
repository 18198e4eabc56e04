"""Recordings of images: equal to a plain loop, read lazily, refused with a reason; and towers of two-tower models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPConfig, CLIPModel, ViltConfig, ViltModel, ViTConfig, ViTModel

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, StoreError
from patchclamp.recording.image_corpus import ImageCorpus, tower

DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
CLASSES = list("abcabcabcab")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def refuses(message: str, error: type[Exception] = ModelError):
    return pytest.raises(error, match=re.escape(message))


def drawn(network: nn.Module, seed: int = 0) -> Any:
    """In evaluation mode, with weights large enough for the nonlinearities to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return network.eval()


def vit() -> nn.Module:
    return drawn(ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4)))


def clip() -> CLIPModel:
    text = SMALL | {"vocab_size": 30, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    vision = SMALL | {"image_size": 8, "patch_size": 4}
    return drawn(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))


def network() -> nn.Sequential:
    """A small network of convolutions, whose hidden linear layer is the site `mlp.0`."""
    return drawn(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 12), nn.ReLU(), nn.Linear(12, 3)
        )
    )


def plain(pixels: np.ndarray = PIXELS) -> torch.Tensor:
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (MEAN, STD))
    return (torch.tensor(pixels.transpose(0, 3, 1, 2)).float() / 255 - mean) / std


def pictures(**options: Any) -> pc.Images:
    given: dict[str, Any] = {"mean": MEAN, "std": STD} | options
    return pc.Images(PIXELS, {"class": CLASSES}, **given)


def entering(module: nn.Module, path: str, inputs: torch.Tensor) -> np.ndarray:
    """What enters a submodule for each image alone, by a hook made here: `[images, ..., neurons]`."""
    found: list[torch.Tensor] = []
    handle = module.get_submodule(path).register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        for each in inputs.split(1):
            module(each)
    handle.remove()
    return torch.cat(found).double().numpy()


CORPUS = ImageCorpus(pc.load(vit()), pictures(name="pictures"))


# Equal to a plain loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [4, 20, 4096])
def test_a_vision_transformer(batch_tokens: int) -> None:
    model = vit()
    summaries = [pc.Moments(), pc.MinMax(), pc.TopExamples(2), pc.ByLabel("class", of=(pc.Moments(),))]
    found = pc.record(model, pictures(), "mlp.1", summaries, batch_tokens=batch_tokens, progress=False)["mlp.1"]
    values = entering(model, pc.load(model).site("mlp.1").module, plain())
    assert values.shape == (11, 5, 24) and found.count == 55
    np.testing.assert_allclose(found.moments.mean, values.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.min_max.min, values.min((0, 1)), rtol=1e-4, atol=1e-5)
    for neuron in range(24):
        example, position = divmod(int(values[:, :, neuron].argmax()), 5)
        top = found.top_examples
        assert (top.example[neuron, 0], top.position[neuron, 0]) == (example, position)
    for place, category in enumerate("abc"):
        of_class = values[[each == category for each in CLASSES]]
        np.testing.assert_allclose(found.by_label.mean("class")[:, place], of_class.mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_a_network_of_convolutions_that_takes_no_keyword() -> None:
    module = network()
    found = pc.record(module, pictures(), "mlp.*", [pc.Moments()], batch_tokens=128 * 4, progress=False)
    values = entering(module, "5", plain())
    np.testing.assert_allclose(found["mlp.0"].moments.mean, values.mean(0), rtol=1e-4, atol=1e-6)
    assert found["mlp.0"].count == 11 and found.labels == {"class": ("a", "b", "c")}


@given(st.integers(1, 12 * 4), st.integers(0, 10), st.integers(0, 100))
def test_batches_hold_each_image_once_and_samples_are_drawn(batch_tokens: int, first: int, seed: int) -> None:
    batches = CORPUS.batches(batch_tokens)
    assert np.concatenate(batches).tolist() == list(range(11))
    assert all(len(each) <= max(1, batch_tokens // 4) for each in batches)
    of = CORPUS.batches(batch_tokens, of=np.arange(first, 11))
    assert np.concatenate(of).tolist() == list(range(first, 11))
    sample = CORPUS.sample(4 * 3, seed)
    assert len(sample) == 3 and sorted(set(sample.tolist())) == sample.tolist()
    assert sample.tolist() == CORPUS.sample(4 * 3, seed).tolist()


def test_what_a_corpus_says_of_itself() -> None:
    assert (CORPUS.name, CORPUS.examples, CORPUS.tokens, CORPUS.truncated) == ("pictures", 11, 11, 0)
    assert CORPUS.labels == {"class": ("a", "b", "c")}
    assert CORPUS.codes["class"].tolist() == ["abc".index(each) for each in CLASSES]
    assert CORPUS.lengths.tolist() == [4] * 11  # patches of 4 x 4 in 8 x 8
    assert ImageCorpus(pc.load(network()), pictures()).lengths.tolist() == [128] * 11
    assert len(CORPUS.counts) == len(CORPUS.most_frequent(5)) == len(CORPUS.ids(3)[0]) == 0
    forward = CORPUS.forward(np.asarray([7, 2]))
    assert forward.rows is None and forward.tokens == 2 and not forward.arguments
    assert torch.equal(forward.keywords["pixel_values"], plain()[[7, 2]])


def test_every_source_gives_the_same_recording(tmp_path: Path) -> None:
    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 11

        def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
            return PIXELS[index], CLASSES[index]

    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return iter(zip(PIXELS, CLASSES, strict=True))

    for index, (image, name) in enumerate(zip(PIXELS, CLASSES, strict=True)):
        (tmp_path / name).mkdir(exist_ok=True)
        np.save(tmp_path / name / f"{index:02}.npy", image)
    model = vit()
    expected = pc.record(model, pictures(), progress=False, batch_tokens=12)
    for source in (Pairs(), Stream(), tmp_path):
        found = pc.record(model, pc.Images(source, mean=MEAN, std=STD), progress=False, batch_tokens=12)
        (label,) = found.labels
        np.testing.assert_allclose(found["mlp.1"].moments.mean, expected["mlp.1"].moments.mean, atol=1e-6)
        by_label = found["mlp.1"].by_label.mean(label)
        np.testing.assert_allclose(by_label, expected["mlp.1"].by_label.mean("class"), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_come_in_the_precision_of_the_weights(dtype: torch.dtype) -> None:
    module = network().to(dtype)
    found = pc.record(module, pictures(), "mlp.*", [pc.Moments()], progress=False)["mlp.0"]
    values = entering(module, "5", plain().to(dtype))
    np.testing.assert_allclose(found.moments.mean, values.mean(0), rtol=1e-2, atol=1e-3)


# Lazy, and recorded once ----------------------------------------------------------------------------


class Counted(torch.utils.data.Dataset):
    """Says which images have been read, and in what order."""

    def __init__(self, sizes: dict[int, int] | None = None) -> None:
        self.read: list[int] = []
        self.sizes = sizes or {}

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> np.ndarray:
        self.read.append(index)
        return PIXELS[index, : self.sizes.get(index, 8)]


def test_a_batch_reads_its_own_images_only() -> None:
    data = Counted()
    corpus = ImageCorpus(pc.load(vit()), pc.Images(data, mean=MEAN, std=STD))
    data.read.clear()
    for examples in corpus.batches(4 * 3):
        corpus.forward(examples)
        assert data.read == examples.tolist()
        data.read.clear()


def test_a_missing_processor_is_said_before_all_images_are_read() -> None:
    data = Counted()
    with refuses("images are pictures, and this model has no processor that makes them its input"):
        pc.record(vit(), pc.Images(data), progress=False)
    assert set(data.read) == {0}


def test_facts_tell_other_images_and_another_normalisation(tmp_path: Path) -> None:
    model = vit()

    def recorded(images: pc.Images) -> pc.Recording:
        return pc.record(model, images, "mlp.0", [pc.Moments()], store=tmp_path / "store", progress=False)

    first = recorded(pictures())
    assert recorded(pictures()).facts == first.facts
    assert first.facts["data"]["examples"] == 11
    for other in (
        pictures(std=[0.2, 0.3, 0.5]),
        pictures(mean=None, std=None, transform=lambda image: torch.tensor(image.transpose(2, 0, 1) / 255.0)),
        pc.Images(PIXELS[::-1].copy(), {"class": CLASSES}, mean=MEAN, std=STD),
        pc.Images(PIXELS, {"class": CLASSES[::-1]}, mean=MEAN, std=STD),
    ):
        with refuses("holds another recording", StoreError):
            recorded(other)


def test_two_transforms_are_told_apart_by_what_they_make() -> None:
    def transform(factor: float) -> pc.Images:
        return pictures(mean=None, std=None, transform=lambda image: torch.tensor(image.transpose(2, 0, 1) * factor))

    model = pc.load(vit())
    same, again, other = (ImageCorpus(model, transform(factor)) for factor in (0.5, 0.5, 0.25))
    assert same.tokens_sha256 == again.tokens_sha256 != other.tokens_sha256
    assert same.sha256 == other.sha256


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "pixels", "message"),
    [
        (vit(), PIXELS[:, :6], "ViTModel cannot run image 0 of images, which it is given as 3 x 6 x 8 (channels x "
         "height x width); it wants 3 x 8 x 8. It says: ValueError: Input image size (6*8)"),
        (vit(), np.zeros((2, 8, 8, 1), np.uint8), "given as 1 x 8 x 8 (channels x height x width); it wants 3 x 8 x 8"),
        (network(), np.zeros((2, 8, 8, 4), np.uint8), "Sequential cannot run image 0 of images, which it is given as "
         "4 x 8 x 8 (channels x height x width); it wants 3 channels. It says: RuntimeError"),
        (clip(), PIXELS[:, :6], "CLIPVisionModel cannot run image 0 of images, which it is given as 3 x 6 x 8"),
    ],
)  # fmt: skip
def test_images_of_the_wrong_size(module: nn.Module, pixels: np.ndarray, message: str) -> None:
    channels = pixels.shape[-1]
    with refuses(message):
        pc.record(module, pc.Images(pixels, mean=[0] * channels, std=[1] * channels), "mlp.*", progress=False)


def test_a_model_without_weights() -> None:
    with refuses("is on the device 'meta'"):
        ImageCorpus(pc.load(vit().to("meta")), pictures())


def test_images_of_different_sizes() -> None:
    images = pc.Images(Counted({7: 6, 9: 5}), mean=MEAN, std=STD)
    with refuses("image 7 of images is 3 x 6 x 8 (channels x height x width), but image 0 of images is", DataError):
        ImageCorpus(pc.load(vit()), images)  # not only when the batch is reached


def test_a_transform_that_does_not_bring_them_to_one_size() -> None:
    images = pc.Images(Counted({7: 6}), transform=lambda image: torch.tensor(image.transpose(2, 0, 1) / 255.0))
    with refuses("image 7 of images is 3 x 6 x 8 (channels x height x width), but image 0 of images is", DataError):
        pc.record(vit(), images, batch_tokens=4, progress=False)


def test_a_processor_resizes() -> None:
    def processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        padded = [np.pad(np.asarray(each), ((0, 8 - len(each)), (0, 0), (0, 0))) for each in images]
        return {"pixel_values": plain(np.stack(padded)), "unwanted": torch.zeros(len(images))}

    module = vit()
    recording = pc.record(pc.load(module, processor=processor), pc.Images(Counted({7: 6, 3: 5})), progress=False)
    pixels = PIXELS.copy()
    pixels[7, 6:], pixels[3, 5:] = 0, 0
    values = entering(module, pc.load(module).site("mlp.0").module, plain(pixels))
    np.testing.assert_allclose(recording["mlp.0"].moments.mean, values.mean((0, 1)), rtol=1e-4, atol=1e-6)


def test_the_processor_of_a_model() -> None:
    pytest.importorskip("PIL")
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=MEAN, image_std=STD)
    module, images = vit(), pc.Images(PIXELS, {"class": CLASSES})
    recording = pc.record(pc.load(module, processor=processor), images, batch_tokens=16, progress=False)
    values = entering(module, pc.load(module).site("mlp.0").module, plain())
    np.testing.assert_allclose(recording["mlp.0"].moments.mean, values.mean((0, 1)), rtol=1e-3, atol=1e-4)
    # It can be told from another one.
    other = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=STD, image_std=STD)
    facts = [ImageCorpus(pc.load(module, processor=each), images) for each in (processor, processor, other)]
    assert facts[0].tokens_sha256 == facts[1].tokens_sha256 != facts[2].tokens_sha256
    assert facts[0].sha256 == facts[2].sha256


# Two towers -----------------------------------------------------------------------------------------


def test_the_towers_of_a_two_tower_model() -> None:
    model = clip()
    assert tower(model, "pixel_values") is model.vision_model
    assert tower(model, "input_ids") is model.text_model


def test_a_corpus_of_images_runs_the_vision_tower_alone() -> None:
    model = clip()
    corpus = ImageCorpus(pc.load(model), pictures())
    assert corpus.module is model.vision_model
    assert corpus.lengths.tolist() == [4] * 11
    path = "encoder.layers.1.mlp.fc2"
    found: list[torch.Tensor] = []
    handle = corpus.module.get_submodule(path).register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        for examples in corpus.batches(12):
            forward = corpus.forward(examples)
            corpus.module(*forward.arguments, **forward.keywords)
    handle.remove()
    ids = torch.tensor([[1, 5, 2]])
    seen: list[torch.Tensor] = []
    handle = model.vision_model.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(input_ids=ids, pixel_values=plain())
    handle.remove()
    torch.testing.assert_close(torch.cat(found), torch.cat(seen))


def test_a_recording_of_the_vision_tower() -> None:
    model = clip()
    site = next(each for each in pc.load(model).select("mlp.*") if each.module.startswith("vision_model"))
    found = pc.record(model, pictures(), site, [pc.Moments()], progress=False, batch_tokens=12)[site.name]
    values = entering(model.vision_model, site.module.removeprefix("vision_model."), plain())
    np.testing.assert_allclose(found.moments.mean, values.mean((0, 1)), rtol=1e-4, atol=1e-6)
    assert found.count == 11 * 5


class Either(nn.Module):
    """Runs on one kind of input as on both, as a language model that may be shown images does."""

    def __init__(self) -> None:
        super().__init__()
        self.eye, self.ear = Eye(), nn.Embedding(5, 4)

    def forward(self, input_ids: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        if self.training:
            raise RuntimeError("it is tried in evaluation mode")
        return self.ear(input_ids) if pixel_values is None else self.eye(pixel_values)


class Eye(nn.Module):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.mean((1, 2, 3))


class Head(nn.Module):
    """Reads images by a part of it that reads images too."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = Eye()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.eye(pixel_values)


class Both(nn.Module):
    """Runs only on both kinds of input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"head": Head()})

    def forward(self, input_ids: torch.Tensor | None = None, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        if input_ids is None or pixel_values is None:
            raise ValueError("both are needed")
        return self.inner["head"](pixel_values) + input_ids.sum(1)


def test_the_tower_is_the_outermost_part() -> None:
    module = Both()
    assert tower(module, "pixel_values") is module.inner["head"]
    with refuses("Both cannot be run on input_ids alone, and no part of it reads only them. It says: ValueError: both"):
        tower(module, "input_ids")


def test_a_model_that_runs_on_one_kind_alone_is_its_own_tower() -> None:
    module = Either().train()
    assert tower(module, "pixel_values") is module
    assert tower(module, "input_ids") is module
    assert all(each.training for each in module.modules())
    only = vit()
    assert tower(only, "pixel_values") is only and tower(only, "input_ids") is only
    plain_network = network()
    assert tower(plain_network, "pixel_values") is plain_network


def test_a_model_whose_kinds_are_mixed_has_no_towers() -> None:
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "vocab_size": 30, "max_position_embeddings": 12}
    model = drawn(ViltModel(ViltConfig(**SMALL, **sizes)))
    with refuses("ViltModel cannot be run on pixel_values alone, and no part of it reads only them"):
        tower(model, "pixel_values")
    with refuses("a tower reads pixel_values or input_ids, not 'pixels'", DataError):
        tower(model, "pixels")
