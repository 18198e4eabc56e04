"""How images become what a model reads: by a transform, a normalisation, the model's processor, or as they are.

torch is imported when images are prepared, not with this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchclamp.data.pixels import Channels, channels_at, is_pillow, pixels_of
from patchclamp.data.tensors import is_tensor
from patchclamp.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Preparation:
    """What the user said about it.

    Attributes:
        transform: from one image to its tensor `[channels, height, width]`.
        mean, std: of each channel, for numbers between 0 and 1.
        channels: which dimension of an array counts the channels.
        owner: name of the images.
    """

    transform: Callable[[Any], Any] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    channels: Channels | None
    owner: str

    @property
    def takes_any_size(self) -> bool:
        """Whether the user's transform may bring images of different sizes to one."""
        return self.transform is not None

    def describe(self, processor: Any) -> str:
        """In words, for the facts of a recording: the same for the same preparation, run after run."""
        if self.transform is not None:
            return "transform"
        if self.mean is not None:
            return f"mean {list(self.mean)} std {list(self.std or ())}"
        if processor is None:
            return "as it is"
        return processor.to_json_string() if hasattr(processor, "to_json_string") else type(processor).__name__

    def inputs(self, images: Sequence[Any], where: Sequence[str], processor: Any) -> dict[str, torch.Tensor]:
        """Keyword arguments for a model: `pixel_values` `[images, channels, height, width]`, and what a processor adds.

        Raises:
            DataError: an image that the preparation cannot take, or that comes out in another size than the first.
            ModelError: the images are pictures, and there is no processor to make them the model's input.
        """
        if self.transform is not None:
            prepared = [self._transformed(image, place) for image, place in zip(images, where, strict=True)]
        elif self.mean is not None:
            prepared = [self._normalised(image, place) for image, place in zip(images, where, strict=True)]
        elif processor is not None:
            pictures = [self._picture(image, place) for image, place in zip(images, where, strict=True)]
            return _processed(processor, pictures, where)
        else:
            prepared = [self._as_is(image, place) for image, place in zip(images, where, strict=True)]
        return {"pixel_values": _stacked(prepared, where)}

    def _transformed(self, image: Any, where: str) -> torch.Tensor:
        import torch

        assert self.transform is not None
        try:
            made = self.transform(image)
        except Exception as error:  # the user's code: whatever went wrong
            raise DataError(f"the transform fails on {where}: {type(error).__name__}: {error}") from error
        if isinstance(made, np.ndarray):
            made = torch.from_numpy(np.ascontiguousarray(made))
        if not isinstance(made, torch.Tensor) or made.ndim != 3 or not made.is_floating_point():
            tensor = f"{list(made.shape)} {made.dtype}" if isinstance(made, torch.Tensor) else type(made).__name__
            raise DataError(
                f"the transform makes {tensor} of {where}: expected a floating tensor [channels, height, width]"
            )
        return made.detach()

    def _normalised(self, image: Any, where: str) -> torch.Tensor:
        import torch

        pixels = pixels_of(image, self.channels, where)
        if len(self.mean or ()) != pixels.shape[2]:
            raise DataError(
                f"{where} has {pixels.shape[2]} channels, but mean and std have {len(self.mean or ())} numbers: "
                "bring the images to one number of channels with transform="
            )
        if pixels.dtype == np.uint8:
            values = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255
        elif pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
            values = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))
        else:
            raise DataError(
                f"{where} holds {pixels.dtype} numbers from {pixels.min()} to {pixels.max()}: mean and std are for "
                "uint8 (0 to 255) or floating numbers between 0 and 1; for others pass transform="
            )
        mean, std = (torch.tensor(each, dtype=torch.float32)[:, None, None] for each in (self.mean, self.std))
        return (values - mean) / std

    def _picture(self, image: Any, where: str) -> Any:
        if is_pillow(image):
            return image
        pixels = pixels_of(image, self.channels, where)
        if pixels.dtype.kind == "f":
            raise DataError(
                f"{where} holds floating numbers, and the model's processor makes its input of pictures (uint8, 0 to "
                "255). If they are its input already, say so: pc.Images(..., transform=lambda image: image)"
            )
        return np.ascontiguousarray(pixels)

    def _as_is(self, image: Any, where: str) -> torch.Tensor:
        import torch

        pixels = pixels_of(image, self.channels, where)
        floating = image.is_floating_point() if is_tensor(image) else pixels.dtype.kind == "f"
        if not floating or is_pillow(image):
            raise ModelError(
                f"{self.owner} are pictures, and this model has no processor that makes them its input. Give it one: "
                "pc.load(..., processor=...); or say how here: pc.Images(..., mean=[...], std=[...]) for numbers "
                "between 0 and 1, or pc.Images(..., transform=...)"
            )
        if not is_tensor(image):
            return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), pixels.dtype.newbyteorder("=")))
        if image.ndim == 2:
            return image.detach()[None]
        # Of the tensor and not of `pixels`: NumPy knows no bfloat16.
        first = channels_at(tuple(image.shape), self.channels, where) == "first"
        return image.detach() if first else image.detach().permute(2, 0, 1)


def _processed(processor: Any, pictures: list[Any], where: Sequence[str]) -> dict[str, torch.Tensor]:
    import torch

    try:
        made = processor(images=pictures, return_tensors="pt")
    except Exception as error:  # code of the processor: whatever went wrong
        if len(pictures) > 1:
            for picture, place in zip(pictures, where, strict=True):
                _processed(processor, [picture], [place])  # raises at the one that is to blame, if one alone is
        blamed = where[0] if len(pictures) == 1 else f"{where[0]} and {len(pictures) - 1} more together"
        name = type(processor).__name__
        raise DataError(f"the processor ({name}) cannot take {blamed}: {type(error).__name__}: {error}") from error
    given = {"pixel_values": made} if isinstance(made, torch.Tensor) else dict(made) if _is_mapping(made) else {}
    found = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    values = found.get("pixel_values")
    if values is None or values.ndim < 4 or len(values) != len(pictures):
        what = f"{', '.join(map(str, given)) or 'nothing'}" if values is None else f"a tensor {list(values.shape)}"
        raise ModelError(
            f"the processor ({type(processor).__name__}) makes {what} of {len(pictures)} images; expected pixel_values "
            "[images, channels, height, width]"
        )
    return found


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__"))


def _stacked(prepared: list[torch.Tensor], where: Sequence[str]) -> torch.Tensor:
    import torch

    for tensor, place in zip(prepared, where, strict=True):
        if tensor.shape != prepared[0].shape:
            raise odd_size(place, tensor.shape, where[0], prepared[0].shape)
    return torch.stack([tensor.to(prepared[0].dtype) for tensor in prepared])


def odd_size(where: str, shape: Sequence[int], first: str, wanted: Sequence[int]) -> DataError:
    """The error for an image `[channels, height, width]` of another size than the first."""
    return DataError(
        f"{where} is {sized(shape)}, but {first} is {sized(wanted)}: a batch takes one size. "
        "Bring them to one with a processor or a transform that resizes"
    )


def sized(shape: Sequence[int]) -> str:
    """A size in words: `3 x 32 x 32`, channels x height x width."""
    return " x ".join(str(each) for each in shape) + " (channels x height x width)"
