"""`as_data`: whatever a user passes as data becomes `Texts`, `Chats`, `Images` or `Tensors`."""

from __future__ import annotations

import os

import numpy as np

from patchclamp.data.chats import Chats
from patchclamp.data.images import Images, is_images
from patchclamp.data.tensors import Tensors, is_tensor
from patchclamp.data.texts import Texts
from patchclamp.errors import DataError

_NUMBERS = "biufc"


def as_data(data: object) -> Texts | Chats | Images | Tensors:
    """Make `Texts`, `Images` or `Tensors` of what a user passed as data.

    Args:
        data: `Texts`, `Chats`, `Images` or `Tensors` (returned as they are), a list or any other iterable of
            `str`, a `pathlib.Path` to a file of texts, a data set of Hugging Face `datasets` whose column "text"
            holds texts, what can only be images (see `pc.Images`), or a tensor or numpy array `[examples, ...]`.

    Raises:
        DataError: `data` is none of these. A single `str` is refused, because it could be one text as
            well as a path: say which with `pc.Texts([text])` or `pc.Texts(path)`.
    """
    if isinstance(data, (Texts, Chats, Images, Tensors)):
        return data
    if isinstance(data, str):
        begin = data if len(data) <= 40 else data[:40] + "..."
        raise DataError(
            f"one str is not a data set: {begin!r}. "
            "For a single text write pc.Texts([text]), for a file pc.Texts(path)."
        )
    if is_images(data):
        return Images(data)
    if is_tensor(data):
        return Tensors(data)
    if isinstance(data, np.ndarray) and data.dtype.kind in _NUMBERS:
        return Tensors(data)
    if isinstance(data, os.PathLike) or hasattr(type(data), "__iter__") or hasattr(type(data), "__getitem__"):
        return Texts(data)
    kind = type(data).__name__
    raise DataError(f"cannot read data from {kind}: pass a list of texts, pc.Texts, pc.Images or pc.Tensors")
