"""One image in any form (a Pillow image, an array, a tensor, a file) as an array of pixels.

Pillow is imported when a file has to be decoded, not with this file; NumPy's own `.npy` needs none.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from patchclamp.data.tensors import is_tensor
from patchclamp.errors import DataError, MissingExtra

Channels = Literal["first", "last"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# How many channels a picture has: grey, colour, colour with transparency.
_CHANNELS = (1, 3, 4)
# Modes of Pillow whose numbers are the picture; others are indices into a palette, or another space of colour.
_PLAIN_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "I", "F")


def decoded(image: Any, where: str) -> Any:
    """The image itself where a file of it was given (a path, or what a data set keeps undecoded), else as it is.

    Raises:
        DataError: the file is missing or damaged.
        MissingExtra: Pillow is needed and not installed.
    """
    if isinstance(image, Mapping):
        data, path = image.get("bytes"), image.get("path")
        if isinstance(data, (bytes, bytearray)):
            return _decoded_file(io.BytesIO(data), where)
        if not isinstance(path, (str, os.PathLike)):
            raise DataError(f"{where} is a mapping of {', '.join(map(str, image)) or 'nothing'}, not an image")
        image = path
    if isinstance(image, list):
        return _array_of_list(image, where)
    if not isinstance(image, (str, os.PathLike)):
        return image
    path = Path(image)
    if path.suffix.lower() != ".npy":
        return _decoded_file(path, where)
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{where} is damaged: {error}") from error


def pixels_of(image: Any, channels: Channels | None, where: str) -> np.ndarray:
    """The numbers of an image, `[height, width, channels]`, uint8 (of 16-bit pictures more) or floating.

    Raises:
        DataError: it is not an image, or it cannot be said which dimension counts the channels.
    """
    if is_pillow(image):
        try:
            array = np.asarray(_plain_picture(image))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow reads a file only now, if the user opened it
            raise DataError(f"{where} is damaged: {error}") from error
    elif is_tensor(image):
        array = _array_of(image)
    else:
        array = np.asarray(image)
    wide = is_pillow(image) and array.dtype.kind in "iu"
    if not wide and array.dtype != np.uint8 and array.dtype.kind != "f":
        hint = ": pass the numbers 0 to 255 as uint8" if array.dtype.kind in "iu" else ""
        raise DataError(f"{where} is of type {type(image).__name__} and dtype {array.dtype}, no picture{hint}")
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise DataError(f"{where} has the shape {list(array.shape)}: an image is [height, width, channels]")
    last = is_pillow(image) or channels_at(array.shape, channels, where) == "last"
    return array if last else array.transpose(1, 2, 0)


def channels_at(shape: tuple[int, ...], channels: Channels | None, where: str) -> Channels:
    """Whether the channels of an image of this shape (three numbers) come first or last.

    Raises:
        DataError: the shape does not say, nor does the user.
    """
    if channels is not None:
        return channels
    first, last = shape[0] in _CHANNELS, shape[-1] in _CHANNELS
    if first == last:
        which = "both" if first else "neither"
        raise DataError(
            f"{where} has the shape {list(shape)}: {which} of its ends could count the channels (1, 3 or 4). "
            'Say which does: pc.Images(..., channels="first") or channels="last"'
        )
    return "first" if first else "last"


def displayed(pixels: np.ndarray) -> np.ndarray:
    """Pixels `[height, width, channels]` as a picture to look at, `[height, width, 3]` uint8.

    Floating numbers between 0 and 1 are taken as they are; others are stretched from the smallest to the largest.
    """
    colours = pixels
    if pixels.dtype != np.uint8:
        numbers = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(numbers.min()), float(numbers.max())
        if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        colours = np.rint((numbers - low) / max(high - low, 1e-30) * 255).astype(np.uint8)
    number = colours.shape[2]
    if number in (2, 4):  # the last channel is how opaque the picture is: on white
        opaque = colours[:, :, -1:].astype(np.float64) / 255
        colours = np.rint(colours[:, :, :-1] * opaque + 255 * (1 - opaque)).astype(np.uint8)
    elif number != 3:
        colours = np.rint(colours.mean(2, keepdims=True)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3)))


def is_pillow(image: object) -> bool:
    """Whether the value is an image of Pillow, which is not imported to find out."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def _decoded_file(source: Path | io.BytesIO, where: str) -> Any:
    try:
        pillow, operations = importlib.import_module("PIL.Image"), importlib.import_module("PIL.ImageOps")
    except ImportError as error:
        raise MissingExtra(
            f"{where} is a file, and decoding it needs Pillow: pip install 'patchclamp[images]'"
        ) from error
    if isinstance(source, Path) and not source.is_file():
        raise DataError(f"{where}: no such file")
    try:
        with pillow.open(source) as image:
            # As data sets and processors of Hugging Face do, a photograph is turned as its camera was held.
            return operations.exif_transpose(image) if image.getexif() else image.copy()
    except Exception as error:  # each format of Pillow raises whatever went wrong
        reason = "it is no image that Pillow knows" if "cannot identify" in str(error) else str(error)
        raise DataError(f"{where} is damaged: {reason or type(error).__name__}") from error


def _array_of_list(image: list[Any], where: str) -> np.ndarray:
    """The numbers of an image that a data set keeps as lists within lists."""
    try:
        array = np.asarray(image)
    except ValueError as error:
        raise DataError(f"{where} is a list whose rows differ in length") from error
    whole = array.size > 0 and array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255
    return array.astype(np.uint8) if whole else array


def _plain_picture(image: Any) -> Any:
    if image.mode in _PLAIN_MODES:
        return image
    if image.mode == "1":
        return image.convert("L")
    transparent = image.mode == "PA" or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def _array_of(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
