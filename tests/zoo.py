"""Every architecture of the table in the docs: how to build a tiny one, and what to call it with.

The families of `architectures.py`, and those that are built in other ways: experts, convolutions, recurrence, spikes,
plain torch. Nothing here comes from patchclamp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests.architectures import (
    BERT,
    BLOOM,
    CLIP,
    GEMMA2,
    GPT2,
    HEADS,
    LAYERS,
    LLAMA,
    MAMBA,
    MISTRAL,
    NEOX,
    NEURONS,
    OPT,
    PHI,
    QWEN3,
    SEQUENTIAL,
    T5,
    T5_GATED,
    TEXTS,
    VIT,
    VOCABULARY,
    WIDTH,
    Architecture,
    deepseek,
    mixtral,
    padded,
    qwen2_moe,
)
from torch import nn
from transformers import ConvNextConfig, ConvNextModel, ResNetConfig, ResNetModel

Inputs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table.

    Attributes:
        title: as the docs call it.
        build: makes the network, always with the same weights, in evaluation mode.
        inputs: padding side -> keyword arguments.
        reads: `"texts"`, `"images"` or `"tensors"`.
        generates: whether it continues texts.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[str], Inputs]
    reads: str = "texts"
    generates: bool = False

    def __str__(self) -> str:
        return self.title


def drawn(new: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same network with weights drawn anew; norms around 1, so that signals live through many layers."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = new()
            with torch.no_grad():
                for path, parameter in module.named_parameters():
                    norm = "norm" in path.lower() or ".ln_" in path or ".bn" in path
                    parameter.normal_(1.0 if norm else 0.0, 0.3)
        return module.eval()

    return build


def texts(side: str) -> Inputs:
    made = padded(side=side)
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def images(side: str) -> Inputs:
    return {"x": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(len(side)))}


class TextEncoder(nn.Module):
    """`nn.TransformerEncoder` as people use it: padding masked, a head on top."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, NEURONS, batch_first=True)
        self.embed, self.encoder = nn.Embedding(len(VOCABULARY), WIDTH), nn.TransformerEncoder(layer, LAYERS)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[examples, tokens] -> [examples, tokens, 3]."""
        padding = None if attention_mask is None else attention_mask == 0
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=padding)
        if padding is None:
            return self.out(hidden)
        # What stands at padding depends on whether torch takes its fast path, which also leaves off a common end.
        hidden = nn.functional.pad(hidden, (0, 0, 0, padding.shape[1] - hidden.shape[1]))
        return self.out(hidden).masked_fill(padding[..., None], 0.0)


class Tagger(nn.Module):
    """A recurrent network over tokens, two layers in both directions, packed so that padding is never read."""

    def __init__(self, kind: Callable[..., nn.Module], packed: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(VOCABULARY), WIDTH)
        self.recurrent = kind(WIDTH, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.out, self.packed = nn.Linear(12, 3), packed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[examples, tokens] -> [examples, tokens, 3]."""
        x = self.embed(input_ids)
        if attention_mask is None or not self.packed:
            return self.out(self.recurrent(x)[0])
        lengths = attention_mask.sum(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0], True, total_length=x.shape[1])
        return self.out(states)


class Threshold(torch.autograd.Function):
    """A step forwards; backwards the slope of a sigmoid."""

    @staticmethod
    def forward(ctx: Any, voltage: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(voltage)
        return (voltage > 0).to(voltage.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (voltage,) = ctx.saved_tensors
        slope = torch.sigmoid(4 * voltage)
        return gradients[0] * 4 * slope * (1 - slope)


class SpikingNeurons(nn.Module):
    """One time step of a population: what it is given, above threshold or not."""

    def forward(self, voltage: torch.Tensor) -> torch.Tensor:
        """[examples, neurons] -> spikes, 0 or 1, of the same shape."""
        return Threshold.apply(voltage - 1.0)  # type: ignore[no-any-return]


class SpikingNetwork(nn.Module):
    """Leaky integrate-and-fire neurons with recurrence, as a loop over time in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back, self.out = nn.Linear(5, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 2)
        self.population = SpikingNeurons()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[examples, time, 5] -> [examples, 2]."""
        voltage = spikes = x.new_zeros(len(x), 7)
        total = x.new_zeros(len(x), 2)
        for step in range(x.shape[1]):
            voltage = 0.8 * voltage * (1 - spikes) + 2 * self.into(x[:, step]) + self.back(spikes)
            spikes = self.population(voltage)
            total = total + self.out(spikes)
        return total


class ConvolutionalNetwork(nn.Module):
    """Convolutions and batch norms, functions for the nonlinearities, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 20), nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[examples, 3, 8, 8] -> [examples, 3]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class DiffusionBlock(nn.Module):
    """A block of a U-Net: the time is added in the middle, a shortcut around it. The image tells the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(1, 3), nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(3, 10), nn.SiLU(), nn.Linear(10, 8))
        self.norm2, self.conv2 = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.nonlinearity, self.shortcut = nn.SiLU(), nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[examples, 3, height, width] -> [examples, 8, height, width]."""
        hidden = self.conv1(self.nonlinearity(self.norm1(x))) + self.time(x.mean((2, 3)))[:, :, None, None]
        return self.conv2(self.nonlinearity(self.norm2(hidden))) + self.shortcut(x)


def _family(title: str, architecture: Architecture, reads: str = "texts", generates: bool = False) -> Case:
    return Case(title, architecture.build, architecture.inputs, reads, generates)


def _pixels(side: str) -> Inputs:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(len(side)))}


def _convnext() -> nn.Module:
    return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 12], depths=[2, 2], image_size=16, patch_size=2, num_stages=2))


def _resnet() -> nn.Module:
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic"))


def _series(side: str) -> Inputs:
    return {"x": torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(len(side)))}


CASES = [
    _family("BERT", BERT),
    _family("GPT-2", GPT2, generates=True),
    _family("GPT-NeoX", NEOX, generates=True),
    _family("Llama", LLAMA, generates=True),
    _family("Mistral", MISTRAL, generates=True),
    _family("Qwen3", QWEN3, generates=True),
    _family("Gemma 2", GEMMA2, generates=True),
    _family("Phi", PHI, generates=True),
    _family("BLOOM", BLOOM, generates=True),
    _family("OPT", OPT),
    _family("T5", T5, generates=True),
    _family("T5, gated", T5_GATED, generates=True),
    _family("Mamba", MAMBA, generates=True),
    Case("Mixtral", drawn(mixtral), texts, generates=True),
    Case("Qwen2-MoE", drawn(qwen2_moe), texts, generates=True),
    Case("DeepSeek-V3", drawn(deepseek), texts, generates=True),
    _family("ViT", VIT, "images"),
    _family("CLIP", CLIP, "both"),
    Case("ResNet", drawn(_resnet), _pixels, "images"),
    Case("ConvNeXt", drawn(_convnext), _pixels, "images"),
    Case("CNN in plain torch", drawn(ConvolutionalNetwork), images, "tensors"),
    Case("Diffusion U-Net block in plain torch", drawn(DiffusionBlock), images, "tensors"),
    Case("nn.TransformerEncoder", drawn(TextEncoder), texts),
    Case("nn.LSTM", drawn(lambda: Tagger(nn.LSTM)), texts),
    Case("nn.GRU", drawn(lambda: Tagger(nn.GRU)), texts),
    Case("nn.RNN", drawn(lambda: Tagger(nn.RNN)), texts),
    Case("Spiking loop in plain torch", drawn(SpikingNetwork), _series, "tensors"),
    Case("MLP in plain torch", SEQUENTIAL.build, lambda side: SEQUENTIAL.inputs(side), "tensors"),
]
assert len({case.title for case in CASES}) == len(CASES)
SENTENCES = TEXTS


def by_title(title: str) -> Case:
    """The case of that title."""
    return next(case for case in CASES if case.title == title)


__all__ = ["CASES", "SENTENCES", "Case", "Inputs", "SpikingNetwork", "Tagger", "TextEncoder", "by_title", "drawn"]
