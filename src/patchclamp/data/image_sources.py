"""Where images come from: an array, a list, a folder, a data set or a stream. Each reads one image at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from patchclamp.data.files import no_column
from patchclamp.data.labels import Unusable, label_of
from patchclamp.data.pixels import SUFFIXES, Channels, channels_at, decoded, is_pillow
from patchclamp.data.tensors import is_tensor
from patchclamp.errors import DataError

_ROWS_AT_ONCE = 1000


class Item(NamedTuple):
    """One image as its source holds it (files decoded), and what the source says beside it, by column."""

    image: Any
    row: Mapping[str, Any]


class Source:
    """Images in a fixed order. A subclass says how many there are and how one is read.

    Attributes:
        name: how reports call it by default.
        columns: names of the columns beside the image; None where the source has none.
        labels: labels that the source has by itself, one value per example.
        beside: labels that it gives only with the image itself.
        channels: which dimension of an array counts the channels, where that is known of all images.
    """

    name = "images"
    columns: Sequence[str] | None = None
    channels: Channels | None = None

    def __init__(self) -> None:
        self.labels: dict[str, tuple[str, ...]] = {}
        self.beside: tuple[str, ...] = ()

    def count(self) -> int | None:
        """Number of images; None where it is not known before all are read."""
        raise NotImplementedError

    def item(self, index: int) -> Item:
        """One image; only for sources that know their number."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """How an error names an image."""
        return f"image {index} of {self.name}"

    def items(self) -> Iterator[Item]:
        """All images, one pass."""
        return self.read(range(self.count() or 0))

    def read(self, indices: Iterable[int]) -> Iterator[Item]:
        """The images of these indices, in this order."""
        for index in indices:
            yield self.item(index)

    def column(self, name: str) -> list[Any] | None:
        """All values of one column; None where they come only with the images."""
        return None

    def check(self, index: int) -> None:
        """Refuse an index that is beyond the images."""
        number = self.count()
        if index < 0 or (number is not None and index >= number):
            raise DataError(f"there is no image {index} in {self.name}: it has {number} images, from 0 on")


class Arrays(Source):
    """One array or tensor `[examples, height, width, channels]` or `[examples, channels, height, width]`."""

    def __init__(self, values: Any, channels: Channels | None) -> None:
        super().__init__()
        shape = tuple(int(each) for each in values.shape)
        if len(shape) != 4:
            hint = ". Grey images have one channel: values[..., None]" if len(shape) == 3 else ""
            raise DataError(
                f"images have the shape {list(shape)}: expected [examples, height, width, channels] or "
                f"[examples, channels, height, width]{hint}"
            )
        if 0 in shape:
            raise DataError(f"no images: the shape is {list(shape)}")
        floating = values.is_floating_point() if is_tensor(values) else values.dtype.kind == "f"
        if not floating and str(values.dtype).removeprefix("torch.") != "uint8":
            raise DataError(f"images hold dtype {values.dtype}: expected uint8 (0 to 255) or floating numbers")
        self.channels = channels_at(shape[1:], channels, "each image")
        self.values = values.detach() if is_tensor(values) else values

    def count(self) -> int:
        return int(self.values.shape[0])

    def item(self, index: int) -> Item:
        return Item(self.values[index], {})


class Listed(Source):
    """Images, or paths of files, in a list."""

    def __init__(self, images: Sequence[Any]) -> None:
        super().__init__()
        self.images = tuple(images)
        for index, image in enumerate(self.images):
            if isinstance(image, (str, os.PathLike)):
                path = Path(image).expanduser()
                if not path.is_file():
                    raise DataError(f"{self.where(index)}: no such file")
            elif not (is_pillow(image) or is_tensor(image) or isinstance(image, (np.ndarray, Mapping))):
                raise DataError(
                    f"{self.where(index)} is of type {type(image).__name__}: expected an image of Pillow, an array, "
                    "a tensor or the path of a file"
                )

    def count(self) -> int:
        return len(self.images)

    def item(self, index: int) -> Item:
        image = self.images[index]
        if isinstance(image, (str, os.PathLike)):
            image = Path(image).expanduser()
        return Item(decoded(image, self.where(index)), {})

    def where(self, index: int) -> str:
        image = self.images[index]
        named = f" ({image})" if isinstance(image, (str, os.PathLike)) else ""
        return super().where(index) + named


class Folder(Listed):
    """Image files of a folder; one subfolder per class gives the label `folder`."""

    def __init__(self, folder: Path) -> None:
        # Absolute, so that a change of folder between two passes does not change the data.
        folder = folder.expanduser().absolute()
        if not folder.is_dir():
            what = "a file, not a folder: pass a list of files" if folder.is_file() else "no such folder"
            raise DataError(f"cannot read images from {str(folder)!r}: {what}")
        here = _image_files(folder, deep=False)
        inside = {
            each.name: _image_files(each, deep=True)
            for each in sorted(folder.iterdir())
            if each.is_dir() and not each.name.startswith(".")
        }
        if here and any(inside.values()):
            within = next(name for name, files in inside.items() if files)
            raise DataError(
                f"{folder} holds images ({here[0].name}, ...) and folders of images ({within}, ...): "
                "put all into folders, one per class, or pass a list of the files that you mean"
            )
        files = here or [file for each in inside.values() for file in each]
        if not files:
            there = ", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "nothing"
            raise DataError(f"no images in {folder} (files that end in {', '.join(SUFFIXES)}): it has {there}")
        super().__init__(files)
        self.name = folder.name or str(folder)
        if not here:
            self.labels["folder"] = tuple(name for name, each in inside.items() for _ in each)


class _DataSet(Source):
    """What data sets have in common: a row is an image, (image, label), or a mapping with the image in a column."""

    def __init__(self, data: Any, column: str) -> None:
        super().__init__()
        self.data, self.image_column = data, column
        names = getattr(data, "column_names", None)
        if isinstance(names, (list, tuple)):
            self.columns = tuple(names)
            if column not in self.columns:
                raise no_column("the data set of images (see column=)", column, self.columns)
        elif hasattr(data, "features"):
            self.columns = ()  # a stream that does not say
        self._classes = getattr(data, "classes", None)

    def names_of(self, column: str) -> Sequence[str] | None:
        """What the numbers in a column of classes mean."""
        features = getattr(self.data, "features", None)
        feature = features.get(column) if isinstance(features, Mapping) else None
        names = getattr(feature, "names", None)
        return names if isinstance(names, (list, tuple)) else None

    def _item(self, row: Any, index: int) -> Item:
        if isinstance(row, (tuple, list)) and len(row) > 0 and not isinstance(row[0], (int, float, list)):
            beside = {"label": _class_name(row[1], self._classes)} if len(row) > 1 else {}
            return Item(decoded(row[0], self.where(index)), beside)
        # An undecoded file is a mapping as well.
        if isinstance(row, Mapping) and (self.columns is not None or self.image_column in row):
            if self.image_column not in row:
                raise no_column(self.where(index), self.image_column, list(row))
            columns = {name: _class_name(value, self.names_of(name)) for name, value in row.items()}
            return Item(decoded(columns.pop(self.image_column), self.where(index)), columns)
        return Item(decoded(row, self.where(index)), {})

    def _find_label(self, first: Item) -> None:
        """A label that every row brings along, found in the first one."""
        if self.columns is None and "label" in first.row:
            try:
                label_of(first.row["label"], "label")
            except Unusable:
                return  # boxes or masks
            self.beside = ("label",)


class DataSet(_DataSet):
    """A data set with `len()` and numbers: of Hugging Face `datasets` (with columns) or of torch."""

    def __init__(self, data: Any, column: str) -> None:
        super().__init__(data, column)
        self._length = len(data)
        self._images = data.select_columns([column]) if hasattr(data, "select_columns") else data
        if self._length and self.columns is None:
            self._find_label(self.item(0))

    def count(self) -> int:
        return self._length

    def item(self, index: int) -> Item:
        try:
            row = self._images[index]
        except Exception as error:  # code of the data set: whatever went wrong
            raise DataError(f"{self.where(index)} cannot be read: {type(error).__name__}: {error}") from error
        return self._item(row, index)

    def column(self, name: str) -> list[Any] | None:
        if self.columns is None:
            return None
        if name not in self.columns:
            raise no_column(self.name, name, self.columns)
        names = self.names_of(name)
        data = self.data.select_columns([name]) if hasattr(self.data, "select_columns") else self.data
        found: list[Any] = []
        for start in range(0, self._length, _ROWS_AT_ONCE):
            stop = min(self._length, start + _ROWS_AT_ONCE)
            values = data[start:stop][name] if data is not self.data else [data[i][name] for i in range(start, stop)]
            found += [_class_name(value, names) for value in values]
        return found


class Stream(_DataSet):
    """A data set that can only be read from its beginning: streaming ones, and any iterable.

    A place is kept in it, so that reading batch after batch costs one pass.
    """

    def __init__(self, data: Any, column: str) -> None:
        super().__init__(data, column)
        if isinstance(data, Iterator):
            kind = type(data).__name__
            raise DataError(f"images are read more than once, and a {kind} cannot be: pass a list or a data set")
        self._number: int | None = None
        self._rows: Iterator[Item] | None = None
        self._next = 0
        # One row is looked at, to know what the others bring along.
        first = next(iter(self.items()), None)
        if first is None:
            raise DataError(f"no images in {self.name}")
        if self.columns == ():
            self.columns = (*first.row, column)
        self._find_label(first)

    def count(self) -> int | None:
        return self._number

    def column(self, name: str) -> list[Any] | None:
        if self.columns is not None and name not in self.columns:
            raise no_column(self.name, name, self.columns)
        return None

    def items(self) -> Iterator[Item]:
        index = -1
        rows = iter(self.data)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except Exception as error:  # code of the data set: whatever went wrong
                reason = f"{type(error).__name__}: {error}"
                raise DataError(f"{self.where(index + 1)} cannot be read: {reason}") from error
            index += 1
            yield self._item(row, index)
        number = index + 1
        if self._number is not None and number != self._number:
            raise DataError(
                f"{self.name} ended after {number:,} images; when it was read before, there were {self._number:,}"
            )
        self._number = number

    def read(self, indices: Iterable[int]) -> Iterator[Item]:
        for index in indices:
            if self._rows is None or index < self._next:
                self._rows, self._next = self.items(), 0
            for item in self._rows:
                self._next += 1
                if self._next == index + 1:
                    yield item
                    break
            else:
                self._rows = None
                raise DataError(f"there is no image {index} in {self.name}: it ended after {self._number} images")


def source_of(source: Any, channels: Channels | None, column: str) -> Source:
    """The source behind what a user passed.

    Raises:
        DataError: it is nothing that holds images; the message says what does.
    """
    if isinstance(source, (str, os.PathLike)):
        return Folder(Path(source))
    if isinstance(source, np.ndarray) and source.dtype != object:
        return Arrays(source, channels)
    if is_tensor(source):
        return Arrays(source, channels)
    if isinstance(source, (list, tuple, np.ndarray)):
        return Listed(list(source))
    kind = type(source).__name__
    if is_pillow(source):
        raise DataError("one image is not a data set: pass pc.Images([image])")
    if isinstance(source, Mapping):
        raise DataError(f"a {kind} of {', '.join(map(repr, list(source)[:6]))} is no data set: pass one of its parts")
    if isinstance(source, (bytes, bytearray, set, frozenset, type)):
        raise DataError(f"cannot read images from {kind}: pass an array, a list of images or files, or a folder")
    if kind == "DataLoader":
        raise DataError("a DataLoader gives batches: pass its data set, pc.Images(loader.dataset)")
    if hasattr(type(source), "__getitem__") and hasattr(type(source), "__len__") and not _is_iterable_only(source):
        return DataSet(source, column)
    if hasattr(type(source), "__iter__"):
        return Stream(source, column)
    raise DataError(f"cannot read images from {kind}: pass an array, a list of images or files, a folder or a data set")


def _image_files(folder: Path, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    inside = (each for each in found if each.suffix.lower() in SUFFIXES and each.is_file())
    return sorted(each for each in inside if not any(p.startswith(".") for p in each.relative_to(folder).parts))


def _is_iterable_only(source: Any) -> bool:
    # torch's IterableDataset inherits a __getitem__ that only raises.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.utils.data.IterableDataset)


def _class_name(value: Any, names: Sequence[str] | None) -> Any:
    """The name of a class for its number; any other value as it is."""
    if not isinstance(names, (list, tuple)):
        return value
    item = getattr(value, "item", None)
    number = item() if callable(item) and getattr(value, "ndim", None) == 0 else value
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(names):
        return names[number]
    return value
