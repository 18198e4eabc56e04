"""Images as a model reads them, made batch by batch; and the tower of a model that reads one kind of data alone."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from patchclamp.data.image_inputs import odd_size, sized
from patchclamp.data.images import Images
from patchclamp.errors import DataError, ModelError
from patchclamp.model.model import Model
from patchclamp.model.plainly import plainly
from patchclamp.model.signature import accepts
from patchclamp.progress import Progress
from patchclamp.recording.corpus import Forward, TensorCorpus
from patchclamp.recording.folds import fold_of_content

_PIXELS, _IDS = "pixel_values", "input_ids"
# How many positions an image has is known only when a site has been read; so many are reckoned with.
_POSITIONS = 128
# So many prepared images tell one transform from another.
_HASHED_AS_READ = 32


class ImageCorpus(TensorCorpus):
    """Images, read lazily: a pass holds one batch of them.

    Attributes:
        module: what is called: the model's module, or its vision tower where the whole also wants texts.
        name: of the data.
        labels: label -> categories.
        codes: label -> `[examples]` int32, the category of each example.
        lengths: `[examples]` int64, how many tokens an image is reckoned as: its patches, where that is known.
        sha256: hash of decoded pixels and labels.
        tokens_sha256: hash of these and of how the model is given the images.
    """

    def __init__(self, model: Model, data: Images, bar: Progress | None = None) -> None:
        """Read all images once, and show the model the first.

        Raises:
            DataError: a damaged file, or images of different sizes that nothing brings to one.
            ModelError: there is no processor for pictures, the model cannot run images of this size, or it cannot
                be run at all, because weights are missing.
        """
        model.check_weights()
        self.name, self.model, self.data = data.name, model, data
        self._first: tuple[int, torch.Size] | None = None
        self.module = model.module
        first = self._prepared(np.asarray([0]))  # what is missing is said before all images are read
        scan = data.scan(None if bar is None else bar.advance)
        data.check_sizes(model.processor)
        self.labels = data.labels
        self.codes = {
            label: np.asarray([place[value] for value in scan.labels[label]], np.int32)
            for label, categories in self.labels.items()
            for place in [{category: code for code, category in enumerate(categories)}]
        }
        self.examples = self.tokens = scan.count
        hashes = [scan.hashes[place : place + 8] for place in range(0, len(scan.hashes), 8)]
        self.folds = np.asarray([fold_of_content(each) for each in hashes], np.uint8)
        self.counts = np.zeros(0, np.int64)
        self.module = self._module_that_runs(first)
        self._positions = self._patches() or _POSITIONS
        self.lengths = np.full(self.examples, self._positions, np.int64)
        self.sha256 = scan.sha256
        self.tokens_sha256 = self._hash_as_read()

    def forward(self, examples: np.ndarray) -> Forward:
        """The examples as the model's input, on its device and in the precision of its weights."""
        inputs = self._prepared(examples)
        arguments, keywords = self._call(inputs)
        return Forward(arguments, keywords, examples, None, None, len(examples))

    def ids(self, example: int, decoder: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Images have no token ids."""
        return np.zeros(0, np.int64), np.zeros(0, bool)

    def shell(self) -> Self:
        """All but the model: the images are read by whoever reads them, from where they are."""
        shell = copy.copy(self)
        for name in ("model", "module"):
            shell.__dict__.pop(name)
        return shell

    def part(self, examples: np.ndarray) -> dict[str, Any]:
        """Nothing: the shell knows where the images are."""
        return {}

    def filled(self, part: Mapping[str, Any], model: Model) -> Self:
        """A shell with a model."""
        filled = copy.copy(self)
        filled.model, filled.module = model, model.module
        if accepts(model.module, _PIXELS):
            filled.module = tower(model.module, _PIXELS, filled._prepared(np.asarray([0])))
        return filled

    def _prepared(self, examples: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        inputs = self.data.inputs(examples, self.model.processor)
        shape = inputs[_PIXELS].shape[1:]
        if self._first is None:
            self._first = (int(examples[0]), shape)
        # A processor that pads says so with a mask; other images would be positions of another grid.
        elif shape != self._first[1] and len(inputs) == 1:
            index, wanted = self._first
            raise odd_size(self.data.where(int(examples[0])), shape, self.data.where(index), wanted)
        device, dtype = self.model.device, _precision(self.module)
        return {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _call(self, inputs: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not accepts(self.module, _PIXELS):
            return (inputs[_PIXELS],), {}
        return (), {name: value for name, value in inputs.items() if accepts(self.module, name)}

    def _module_that_runs(self, inputs: Mapping[str, torch.Tensor]) -> nn.Module:
        """The module that runs on images alone, found by running it on the first one."""
        self.module = tower(self.model.module, _PIXELS, inputs)
        arguments, keywords = self._call(inputs)
        failure = _failure(self.module, arguments, keywords)
        if failure is None:
            return self.module
        wanted = _wanted_size(self.module)
        wants = f"; it wants {wanted}" if wanted else ""
        raise ModelError(
            f"{type(self.module).__name__} cannot run {self.data.where(0)}, which it is given as "
            f"{sized(inputs[_PIXELS].shape[1:])}{wants}. It says: {_said(failure)}"
        ) from failure

    def _patches(self) -> int | None:
        """How many patches the model cuts an image into, where its configuration says how large one is."""
        patch = _of_config(self.module, "patch_size")
        if self._first is None or patch is None:
            return None
        *_, height, width = self._first[1]
        return max(1, (height // patch[0]) * (width // patch[-1]))

    def _hash_as_read(self) -> str:
        digest = hashlib.sha256(f"{self.sha256} {self.data.describe(self.model.processor)}".encode())
        for index in range(min(self.examples, _HASHED_AS_READ)):
            for name, value in sorted(self.data.inputs([index], self.model.processor).items()):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def tower(root: nn.Module, wants: str, inputs: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """The part of a model that can be run on texts alone, or on images alone: the model itself if it can.

    A model that takes both kinds is tried with one of them (in evaluation mode, without gradient). Where it fails,
    its outermost part that takes this kind and not the other is given.

    Args:
        root: the model.
        wants: `"pixel_values"` or `"input_ids"`.
        inputs: keyword arguments to try it with; by default one black image of the size that the configuration
            says, or one token.

    Raises:
        ModelError: the model cannot be run on one kind alone, and no part of it takes only this kind.
    """
    if wants not in (_PIXELS, _IDS):
        raise DataError(f"a tower reads {_PIXELS} or {_IDS}, not {wants!r}")
    other = _IDS if wants == _PIXELS else _PIXELS
    if not (accepts(root, wants) and accepts(root, other)):
        return root
    given = {name: value for name, value in (inputs or _smallest(root, wants)).items() if accepts(root, name)}
    failure = _failure(root, (), given)
    if failure is None:
        return root
    parts = [
        (path.count("."), -sum(each.numel() for each in module.parameters()), place, module)
        for place, (path, module) in enumerate(root.named_modules())
        # What only embeds one kind, for blocks that read both, is no tower.
        if path and "embed" not in path and accepts(module, wants) and not accepts(module, other)
    ]
    if not parts:
        raise ModelError(
            f"{type(root).__name__} cannot be run on {wants} alone, and no part of it reads only them. "
            f"It says: {_said(failure)}"
        ) from failure
    return min(parts, key=lambda part: part[:3])[3]


def _failure(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Exception | None:
    """What a module raises when it is called so; None if it runs."""
    try:
        with Model(module).evaluating(), torch.no_grad(), plainly(module):
            module(*arguments, **keywords)
    except Exception as error:  # the model's own code: whatever went wrong
        return error
    return None


def _smallest(root: nn.Module, wants: str) -> dict[str, torch.Tensor]:
    device = Model(root).device
    if wants == _IDS:
        ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        return {_IDS: ids, "attention_mask": torch.ones_like(ids)}
    size = _of_config(root, "image_size") or (224, 224)
    channels = (_of_config(root, "num_channels") or (3,))[0]
    return {_PIXELS: torch.zeros(1, channels, size[0], size[-1], device=device, dtype=_precision(root))}


def _precision(module: nn.Module) -> torch.dtype | None:
    return next((each.dtype for each in module.parameters() if each.is_floating_point()), None)


def _of_config(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """A number or two of a Hugging Face configuration, or of its vision part."""
    config = getattr(module, "config", None)
    for holder in (config, getattr(config, "vision_config", None)):
        value = getattr(holder, name, None)
        given = list(value) if isinstance(value, (list, tuple)) else [value]
        numbers = tuple(each for each in given if isinstance(each, int) and not isinstance(each, bool))
        if numbers and len(numbers) == len(given):
            return numbers
    return None


def _wanted_size(module: nn.Module) -> str:
    size = _of_config(module, "image_size")
    channels = _of_config(module, "num_channels")
    if channels is None:
        entry = next((each for each in module.modules() if isinstance(each, nn.Conv2d)), None)
        channels = None if entry is None else (entry.in_channels,)
    if size is None:
        return "" if channels is None else f"{channels[0]} channels"
    return " x ".join(str(each) for each in (*(channels or ()), size[0], size[-1]))


def _said(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
