"""Concept weights in a small diffusion model: does shutting some weights make a new word mean the subject?

The model is trained here, in the manner of DDPM, on images of 8 x 8 pixels: a square, a cross, a bar or a frame, in
one of four colours, asked for by two words, which it reads by cross attention. A fifth word for a colour was never
used, and gives whatever it happens to. A subject is one colour of one shape. Weights of the keys and values are
searched whose shrinking lowers the loss on the subject, asked for with the unused word; they are set to 0. Do samples
for the unused word show the subject then? Subjects are two for each colour.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from patchclamp.find.concept_weights import Loss, concept_weights

SIZE, SHAPES, COLOURS, WIDTH, HEADS, BLOCKS = 8, 4, 4, 64, 4, 2
NEW = COLOURS  # the word for a colour that was never used
NOISE_STEPS, TRAINING_STEPS, BATCH = 40, 2000, 64
SUBJECTS = [(colour, (colour + each) % SHAPES) for colour in range(COLOURS) for each in (1, 2)]
SAMPLES, RANDOM_SETS, SEARCHED = 32, 2, 30
THRESHOLDS = (0.1, 0.2, 0.4)
PARAMETERS = ("*attn2.to_k.weight", "*attn2.to_v.weight")
_PALETTE = torch.tensor([[1.0, -0.8, -0.8], [-0.8, 1.0, -0.8], [-0.8, -0.8, 1.0], [1.0, 1.0, -0.8]])


def measure(seed: int = 0) -> dict[str, Any]:
    """Train, search, shut, draw.

    Returns:
        `right`: the share of samples for words that were trained which show what was asked for. For each threshold,
        means over subjects: `share` of the weights of keys and values that are shut; `loss` on the subject and
        `subject`, the share of samples for the new word with its shape that show it, of the model as it is (`before`),
        with the weights shut (`after`), and with as many others (`chance`); how many subjects are `drawn_more_often`;
        `right_after`, as `right`; `jaccard` of the weights of two subjects.
    """
    denoiser = _trained(seed)
    searched = sum(each.numel() for name, each in denoiser.named_parameters() if "attn2.to_" in name)
    known = [(colour, shape) for colour in range(COLOURS) for shape in range(SHAPES)] * 3
    plain = [_tried(denoiser, subject, seed) for subject in SUBJECTS]
    found: dict[str, Any] = {"right": _right(denoiser, known, seed), "subjects": len(SUBJECTS), "thresholds": {}}
    for threshold in THRESHOLDS:
        weights = [
            concept_weights(denoiser, _loss_on(each), PARAMETERS, threshold=threshold, steps=SEARCHED, seed=seed)
            for each in SUBJECTS
        ]
        after = [_tried(each.zeroed(denoiser), of, seed) for each, of in zip(weights, SUBJECTS, strict=True)]
        chance = [
            np.mean(
                [_tried(each.sample_like(denoiser, draw).zeroed(denoiser), of, seed) for draw in range(RANDOM_SETS)], 0
            )
            for each, of in zip(weights, SUBJECTS, strict=True)
        ]
        losses, shown = np.asarray([plain, after, chance]).transpose(2, 0, 1)
        found["thresholds"][threshold] = {
            "share": float(np.mean([each.count for each in weights])) / searched,
            "loss": _named_means(losses),
            "subject": _named_means(shown),
            "drawn_more_often": {
                "than_before": int((shown[1] > shown[0]).sum()),
                "than_by_chance": int((shown[1] > shown[2]).sum()),
                "never_lacked": int((shown[0] == 1).sum()),
            },
            "right_after": float(np.mean([_right(each.zeroed(denoiser), known, seed) for each in weights[::4]])),
            "jaccard": float(np.mean([one.jaccard(two) for one, two in pairwise(weights)])),
        }
    return found


def _named_means(values: np.ndarray) -> dict[str, float]:
    return {name: float(each.mean()) for name, each in zip(("before", "after", "chance"), values, strict=True)}


def _loss_on(subject: tuple[int, int]) -> Loss:
    """The denoising loss on a subject, asked for by the new word and its shape."""

    def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        colour, shape = (torch.full((BATCH,), each) for each in subject)
        return _loss(module, draw(colour, shape, generator), torch.full((BATCH,), NEW), shape, generator)

    return loss


def _tried(module: nn.Module, subject: tuple[int, int], seed: int) -> tuple[float, float]:
    """Loss on the subject, and the share of samples for the new word and its shape that show it."""
    generator, loss = torch.Generator().manual_seed(seed + 100), _loss_on(subject)
    with torch.no_grad():
        mean = float(np.mean([float(loss(module, generator)) for _ in range(10)]))
    colour, shape = _named(sampled(module, [(NEW, subject[1])] * SAMPLES, seed))
    return mean, float(((colour == subject[0]) & (shape == subject[1])).float().mean())


# Images ---------------------------------------------------------------------------------------------


def draw(colour: torch.Tensor, shape: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`[images, 3, 8, 8]`, about -1 to 1: a shape of 5 pixels somewhere, on grey."""
    images = torch.zeros(len(colour), 3, SIZE, SIZE)
    corner = 1 + torch.randint(2, (len(colour), 2), generator=generator)
    for number, (down, right) in enumerate(corner.tolist()):
        mask = _MASKS[shape[number]]
        images[number, :, down : down + 5, right : right + 5] = mask * _PALETTE[colour[number]][:, None, None]
    return images + 0.05 * torch.randn(images.shape, generator=generator)


def _masks() -> torch.Tensor:
    masks = torch.zeros(4, 5, 5)
    masks[0] = 1  # a square
    masks[1, 2], masks[1, :, 2] = 1, 1  # a cross
    masks[2, 1:4] = 1  # a bar
    masks[3] = 1
    masks[3, 1:4, 1:4] = 0  # a frame
    return masks


_MASKS = _masks()


def _named(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour and shape of each image: the template at any place that fits best. No network has to be trusted."""
    best = torch.full((len(images),), math.inf)
    colour, shape = (torch.zeros(len(images), dtype=torch.long) for _ in range(2))
    for which in range(COLOURS):
        for form in range(SHAPES):
            for down in (1, 2):
                for right in (1, 2):
                    template = torch.zeros(3, SIZE, SIZE)
                    template[:, down : down + 5, right : right + 5] = _MASKS[form] * _PALETTE[which][:, None, None]
                    distance = ((images - template) ** 2).flatten(1).sum(1)
                    better = distance < best
                    best[better], colour[better], shape[better] = distance[better], which, form
    return colour, shape


# The model ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """`[images, queries, WIDTH]`."""
        heads = (
            each(of).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for each, of in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention among patches, attention to the words, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn1, self.attn2 = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """`[images, patches, WIDTH]`."""
        x = x + self.attn1(self.norm1(x), self.norm1(x))
        x = x + self.attn2(self.norm2(x), words)
        return x + self.mlp(self.norm3(x))


class Denoiser(nn.Module):
    """From a noisy image, how noisy it is, and two words, to the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 12)
        self.place = nn.Parameter(0.1 * torch.randn(16, WIDTH))
        self.moment = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.colour, self.shape = nn.Embedding(COLOURS + 1, WIDTH), nn.Embedding(SHAPES, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])

    def forward(
        self, images: torch.Tensor, moment: torch.Tensor, colour: torch.Tensor, shape: torch.Tensor
    ) -> torch.Tensor:
        """`[images, 3, 8, 8]`."""
        patches = functional.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)
        waves = moment[:, None].float() / NOISE_STEPS * 2.0 ** torch.arange(8)
        x = self.into(patches) + self.place + self.moment(torch.cat([waves.sin(), waves.cos()], 1))[:, None]
        words = torch.stack([self.colour(colour), self.shape(shape)], 1)
        for block in self.blocks:
            x = block(x, words)
        return functional.pixel_shuffle(self.out(x).transpose(1, 2).unflatten(2, (4, 4)), 2)


_KEPT = torch.cos(torch.linspace(0, 0.5 * math.pi * 0.98, NOISE_STEPS)) ** 2  # share of the image, by moment


def _loss(
    module: nn.Module, images: torch.Tensor, colour: torch.Tensor, shape: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    moment = torch.randint(NOISE_STEPS, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    kept = _KEPT[moment][:, None, None, None]
    noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
    return functional.mse_loss(module(noisy, moment, colour, shape), noise)


def _trained(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Denoiser()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    for step in range(TRAINING_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * (1 - step / TRAINING_STEPS)
        colour, shape = (torch.randint(each, (BATCH,), generator=generator) for each in (COLOURS, SHAPES))
        value = _loss(module, draw(colour, shape, generator), colour, shape, generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return module.eval()


@torch.no_grad()
def sampled(module: nn.Module, asked: list[tuple[int, int]], seed: int) -> torch.Tensor:
    """One image for each pair of words, without noise on the way (DDIM)."""
    generator = torch.Generator().manual_seed(seed + 50)
    colour, shape = (torch.tensor(each) for each in zip(*asked, strict=True))
    images = torch.randn(len(asked), 3, SIZE, SIZE, generator=generator)
    for moment in range(NOISE_STEPS - 1, -1, -1):
        noise = module(images, torch.full((len(asked),), moment), colour, shape)
        kept, before = _KEPT[moment], _KEPT[moment - 1] if moment else torch.tensor(1.0)
        clean = ((images - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1.5, 1.5)
        images = before.sqrt() * clean + (1 - before).sqrt() * noise
    return images


def _right(module: nn.Module, asked: list[tuple[int, int]], seed: int) -> float:
    colour, shape = _named(sampled(module, asked, seed))
    wanted = torch.tensor(asked)
    return float(((colour == wanted[:, 0]) & (shape == wanted[:, 1])).float().mean())


if __name__ == "__main__":
    print(measure())
