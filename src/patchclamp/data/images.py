"""`Images`: pictures in arrays, files or data sets, with labels per example.

Files are decoded when they are needed, a batch at a time, so memory does not grow with their number. Neither
torch nor Pillow is imported with this file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchclamp.data.image_inputs import Preparation, odd_size
from patchclamp.data.image_sources import Item, Source, source_of
from patchclamp.data.labels import Unusable, categories, check_length, label_list, label_name, label_of
from patchclamp.data.pixels import Channels, displayed, is_pillow, pixels_of
from patchclamp.data.tensors import Tensors
from patchclamp.data.texts import Texts
from patchclamp.errors import DataError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, eq=False)
class ImageExample:
    """One image as its source holds it (a file decoded by Pillow), and the values of its labels."""

    image: Any
    labels: Mapping[str, str]


class Images:
    """Images with labels, in a fixed order; iterate over it to get `ImageExample`s.

    A model reads what `transform` makes of each image; without it, the image normalised by `mean` and `std`;
    without these, what the model's processor makes of it; without a processor, floating images as they are.

    Args:
        source: one numpy array or tensor `[examples, height, width, channels]` or `[examples, channels, height,
            width]`, uint8 or floating; a list of arrays, tensors, Pillow images or paths of files; a folder with
            images, or with one folder of images per class, which gives the label `folder`; a Hugging Face data set,
            streaming ones too; or a torch data set of images or of (image, label), which gives the label `label`.
        labels: `{"class": [one value per example]}`. Of a Hugging Face data set a label may also be a column:
            `["label"]`, or `{"class": "label"}` for the column `label`. Values become `str`; the numbers of a column
            of classes become their names. A label of the same name as one of the source's own replaces it.
        transform: from one image, as the source holds it (Pillow's for a file), to its floating tensor
            `[channels, height, width]`. It must give the same tensor each time.
        mean: of each channel, for numbers between 0 and 1: the model reads `(uint8 / 255 - mean) / std`.
        std: of each channel.
        channels: `"first"` or `"last"`, where the shape of an array does not say.
        column: of a Hugging Face data set, the one that holds the image.
        name: how reports call these images; by default the folder's name, or "images".

    Raises:
        DataError: at once for no images, a missing file or folder, another dtype, a shape that could be read in two
            ways, a column that is not there, or labels of the wrong length; for a damaged file, with its path, when
            it is reached.
        MissingExtra: a file is to be decoded and Pillow is not installed.

    Example:
        >>> images = Images(np.zeros((2, 8, 8, 3), np.uint8), labels={"digit": [0, 1]})
        >>> len(images), images.labels
        (2, {'digit': ('0', '1')})
    """

    name: str

    def __init__(
        self,
        source: Any,
        labels: Mapping[str, Iterable[object] | str] | Sequence[str] | str | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: Channels | None = None,
        column: str = "image",
        name: str | None = None,
    ) -> None:
        if isinstance(source, (Images, Texts, Tensors)):
            raise DataError(f"this is pc.{type(source).__name__} already")
        if channels not in (None, "first", "last"):
            raise DataError(f'channels= is "first" or "last", not {channels!r}')
        self._source: Source = source_of(source, channels, column)
        self._source.name = self.name = name or self._source.name
        if column != "image" and self._source.columns is None:
            raise DataError(f"{self.name} has no columns, so column={column!r} means nothing")
        if self._source.count() == 0:
            raise DataError(f"no images in {self.name}")
        checked = _check_preparation(transform, mean, std)
        self._preparation = Preparation(transform, *checked, channels or self._source.channels, self.name)
        # Label -> its values, or the column of a row that comes with the image.
        self._labels: dict[str, tuple[str, ...] | str] = {
            **self._source.labels,
            **{each: each for each in self._source.beside},
            **self._read_labels(labels),
        }
        self._check_lengths(self._source.count())
        self._scanned: Scan | None = None

    # What it holds ----------------------------------------------------------------------------------

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Label name -> its categories, sorted; `{}` without labels.

        The first use reads all images once if a label comes only with them (streams, torch data sets).
        """
        return categories(self.label_values)

    @property
    def label_values(self) -> dict[str, tuple[str, ...]]:
        """Label name -> its value of each example."""
        if any(isinstance(values, str) for values in self._labels.values()):
            return self.scan().labels
        return {label: values for label, values in self._labels.items() if isinstance(values, tuple)}

    def __iter__(self) -> Iterator[ImageExample]:
        index = -1
        for index, item in enumerate(self._source.items()):
            yield ImageExample(item.image, self._labels_of(item, index))
        self._check_lengths(index + 1)

    def __len__(self) -> int:
        count = self._source.count()
        if count is None:
            raise TypeError(f"{self.name} has no length before it is read: its source cannot be counted")
        return count

    def __bool__(self) -> bool:
        return True  # without this, `if images:` would count a stream

    def __repr__(self) -> str:
        labels = f", labels: {', '.join(self._labels)}" if self._labels else ""
        count = self._source.count()
        return f"Images({self.name!r}, {'a stream' if count is None else f'{count:,} images'}{labels})"

    def thumbnail(self, index: int) -> np.ndarray:
        """One image as a picture to look at, before any transform: `[height, width, 3]` uint8.

        Floating images whose numbers are not between 0 and 1 are stretched to the whole range.
        """
        self._source.check(index)
        (item,) = self._source.read([index])
        return displayed(pixels_of(item.image, self._preparation.channels, self.where(index)))

    def where(self, index: int) -> str:
        """How errors name an image: its number, and its path where it is a file."""
        return self._source.where(index)

    # What a model reads -----------------------------------------------------------------------------

    def inputs(self, indices: Sequence[int] | np.ndarray, processor: Any = None) -> dict[str, torch.Tensor]:
        """Some images as a model reads them.

        Args:
            indices: which; ascending ones cost a stream one pass.
            processor: the model's image processor, used where neither transform nor mean is given.

        Returns:
            `pixel_values` `[images, channels, height, width]`, and what else the processor makes of them.

        Raises:
            DataError: a damaged file, or images of different sizes (the first odd one is named).
            ModelError: the images are pictures and there is no processor.
        """
        wanted = [int(index) for index in indices]
        for index in wanted:
            self._source.check(index)
        images = [item.image for item in self._source.read(wanted)]
        return self._preparation.inputs(images, [self.where(index) for index in wanted], processor)

    def describe(self, processor: Any = None) -> str:
        """How the images are prepared, in words: for the facts of a recording."""
        return self._preparation.describe(processor)

    def check_sizes(self, processor: Any = None) -> None:
        """Refuse images of different sizes that nothing brings to one.

        Raises:
            DataError: the first odd image is named.
        """
        scan = self.scan()
        if scan.odd is not None and not self._preparation.takes_any_size:
            if processor is not None and self._preparation.mean is None:
                return
            index, shape = scan.odd
            raise odd_size(self.where(index), shape, self.where(0), scan.shape)

    def scan(self, advance: Callable[[int], None] | None = None) -> Scan:
        """Read all images once, one at a time, and remember what is known then.

        Args:
            advance: is told after each image that one more is done.
        """
        if self._scanned is None:
            self._scanned = self._scan(advance)
        return self._scanned

    def _scan(self, advance: Callable[[int], None] | None) -> Scan:
        digest, hashes = hashlib.sha256(), bytearray()
        values: dict[str, list[str]] = {label: [] for label in self._labels}
        strings: dict[str, str] = {}
        first: tuple[int, ...] = ()
        odd: tuple[int, tuple[int, ...]] | None = None
        index = -1
        for index, item in enumerate(self._source.items()):
            pixels = pixels_of(item.image, self._preparation.channels, self.where(index))
            height, width, number = pixels.shape
            first = first or (number, height, width)
            if odd is None and first != (number, height, width):
                odd = (index, (number, height, width))
            data = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("=")).data
            digest.update(f"{pixels.shape} {pixels.dtype.newbyteorder('=')} ".encode())
            digest.update(data)
            hashes += hashlib.blake2b(data, digest_size=8).digest()
            for label, value in sorted(self._labels_of(item, index).items()):
                values[label].append(strings.setdefault(value, value))
                for part in (label, value):
                    encoded = part.encode()
                    digest.update(len(encoded).to_bytes(8, "little") + encoded)
            if advance is not None:
                advance(1)
        self._check_lengths(index + 1)
        listed = {label: tuple(each) for label, each in values.items()}
        return Scan(index + 1, digest.hexdigest(), bytes(hashes), listed, first, odd)

    # Labels -----------------------------------------------------------------------------------------

    def _labels_of(self, item: Item, index: int) -> dict[str, str]:
        found: dict[str, str] = {}
        for label, given in self._labels.items():
            if isinstance(given, tuple):
                if index >= len(given):
                    raise DataError(
                        f"label {label!r} has {len(given):,} values, but there are more images in {self.name}"
                    )
                found[label] = given[index]
                continue
            try:
                found[label] = label_of(item.row.get(given), label)
            except Unusable as reason:
                raise DataError(f"{self.where(index)}: {reason}") from None
        return found

    def _read_labels(self, labels: Any) -> dict[str, tuple[str, ...] | str]:
        if labels is None:
            return {}
        source = self._source
        if isinstance(labels, Mapping):
            return {
                label_name(label): self._column(label, values)
                if isinstance(values, str) and source.columns is not None
                else label_list(label, values, self.name)
                for label, values in labels.items()
            }
        if source.columns is None:
            raise DataError(
                f"{self.name} has no columns to take labels from: give them as "
                '{"class": [one value per example]}, with the name of the label'
            )
        names = [labels] if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)
        return {label_name(each): self._column(each, each) for each in names}

    def _column(self, label: str, column: str) -> tuple[str, ...] | str:
        values = self._source.column(column)
        return column if values is None else label_list(label, values, self.name)

    def _check_lengths(self, number: int | None) -> None:
        for label, values in self._labels.items():
            if isinstance(values, tuple) and number is not None:
                check_length(f"label {label!r}", len(values), number, self.name)


@dataclass(frozen=True, slots=True)
class Scan:
    """What is known of images when all have been read once.

    Attributes:
        count: how many there are.
        sha256: hash of their decoded pixels and labels.
        hashes: a hash of the pixels of each, eight bytes an image.
        labels: label -> its value of each example.
        shape: of the first image, `(channels, height, width)`.
        odd: number and shape of the first image of another shape; None where all are alike.
    """

    count: int
    sha256: str
    hashes: bytes
    labels: dict[str, tuple[str, ...]]
    shape: tuple[int, ...]
    odd: tuple[int, tuple[int, ...]] | None


def is_images(data: Any) -> bool:
    """Whether data that was passed without a word can only be images.

    A list that begins with an image of Pillow, a folder, or a data set with a column of images.
    """
    if isinstance(data, (list, tuple)):
        return bool(data) and is_pillow(data[0])
    if isinstance(data, os.PathLike):
        return os.path.isdir(data)
    features = getattr(data, "features", None)
    if not isinstance(features, Mapping) or "text" in features:  # with both, the user says which
        return False
    return type(features.get("image")).__name__ == "Image"


def _check_preparation(
    transform: object, mean: Any, std: Any
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if transform is not None and not callable(transform):
        raise DataError(f"transform= is a function from an image to a tensor; {type(transform).__name__} is not one")
    if (mean is None) != (std is None):
        raise DataError("mean= and std= belong together, one number for each channel")
    if mean is None:
        return None, None
    if transform is not None:
        raise DataError("transform= does all that is done to an image: leave out mean= and std=, or normalise in it")
    try:
        both = tuple(float(each) for each in mean), tuple(float(each) for each in std)
    except (TypeError, ValueError):
        raise DataError(f"mean= and std= are one number for each channel, not {mean!r} and {std!r}") from None
    if len(both[0]) != len(both[1]) or not both[0] or not np.isfinite(both).all() or min(both[1]) <= 0:
        raise DataError(f"mean= and std= are one number for each channel, std above 0, not {mean!r} and {std!r}")
    return both
