"""`Images`: every kind of source, what is refused, labels, how a model's input is made, and pictures to look at."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from patchclamp.data import Images, Tensors, Texts, as_data
from patchclamp.errors import DataError, MissingExtra, ModelError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)


def refuses(message: str, error: type[Exception] = DataError):
    return pytest.raises(error, match=re.escape(message))


def arrays_of(images: Images) -> np.ndarray:
    """The images as their source holds them, as one array."""
    return np.stack([np.asarray(example.image) for example in images])


def save(folder: Path, *names: str) -> None:
    """Files of `PIXELS`, in order, that need no Pillow."""
    for image, name in zip(PIXELS, names, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            np.save(file, image)


class TorchData(torch.utils.data.Dataset):
    """Pairs of image and label, as data sets of torchvision give them."""

    classes = ("cat", "dog")

    def __init__(self, length: int = 6) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(PIXELS[index]).permute(2, 0, 1), index % 2


class ClassLabel:
    names = ("cat", "dog")


class Image:
    """A feature of the class name that Hugging Face gives a column of images."""


class HubData:
    """A data set of columns, by what Hugging Face's can do; `chosen` is what `select_columns` leaves."""

    def __init__(self, number: int = 6, chosen: tuple[str, ...] = ("image", "kind", "place")) -> None:
        self.number, self.column_names = number, list(chosen)
        self.features = {"image": Image(), "kind": ClassLabel(), "place": None}
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return self.number

    def row(self, index: int) -> dict[str, Any]:
        if "image" in self.column_names:
            self.decoded.append(index)
        whole = {"image": PIXELS[index], "kind": index % 2, "place": f"p{index // 3}"}
        return {name: whole[name] for name in self.column_names}

    def __getitem__(self, key: Any) -> dict[str, Any]:
        if not isinstance(key, slice):
            return self.row(key)
        rows = [self.row(index) for index in range(*key.indices(self.number))]
        return {name: [row[name] for row in rows] for name in self.column_names}

    def select_columns(self, names: list[str]) -> HubData:
        return HubData(self.number, tuple(names))


class HubStream:
    """A streaming data set; `lengths` says how many images each pass gives."""

    def __init__(self, *lengths: int, known: bool = True, breaks: bool = False) -> None:
        self.lengths, self.passes, self.breaks = lengths or (6,), 0, breaks
        self.column_names = ["image", "kind", "place"] if known else None
        self.features = HubData().features if known else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        length = self.lengths[min(self.passes, len(self.lengths) - 1)]
        self.passes += 1
        for index in range(length):
            if self.breaks and index == 3:
                raise OSError("connection lost")
            yield HubData().row(index)


# Sources ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        PIXELS,
        PIXELS.transpose(0, 3, 1, 2),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(0, 3, 1, 2),
        list(PIXELS),
        tuple(torch.from_numpy(PIXELS).permute(0, 3, 1, 2)),
        TorchData(),
        HubData(),
        HubStream(),
    ],
    ids=["last", "first", "tensor last", "tensor first", "list", "tuple of tensors", "torch", "hub", "stream"],
)
def test_every_source_holds_the_same_images(source: Any) -> None:
    images = Images(source, mean=[0] * 3, std=[1] * 3)
    for _ in range(2):
        assert [images.thumbnail(index).tolist() for index in range(6)] == PIXELS.tolist()
    values = images.inputs([0, 3, 5])["pixel_values"]
    plain = torch.tensor(PIXELS[[0, 3, 5]].transpose(0, 3, 1, 2)).float() / 255
    assert values.dtype == torch.float32 and torch.equal(values, plain)


def test_order_and_number_and_labels() -> None:
    images = Images(PIXELS, labels={"class": [3, 1, 3, 2, 1, 1]}, name="pictures")
    assert (len(images), images.name, images.labels) == (6, "pictures", {"class": ("1", "2", "3")})
    assert np.array_equal(arrays_of(images), PIXELS)
    assert [example.labels["class"] for example in images] == ["3", "1", "3", "2", "1", "1"]
    assert repr(images) == "Images('pictures', 6 images, labels: class)"


def test_memory_of_an_array_is_shared() -> None:
    values = PIXELS.copy()
    images = Images(values)
    values[2, 1, 1] = (9, 8, 7)
    assert images.thumbnail(2)[1, 1].tolist() == [9, 8, 7]


def test_folder_of_images(tmp_path: Path) -> None:
    save(tmp_path / "pictures", "b.npy", "a.npy", "sub/.hidden.npy")
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    for source in (tmp_path / "pictures", str(tmp_path / "pictures")):
        images = Images(source)
        assert (images.name, len(images), images.labels) == ("pictures", 2, {})
        assert np.array_equal(arrays_of(images), PIXELS[[1, 0]])


def test_folder_of_classes(tmp_path: Path) -> None:
    save(tmp_path, "dog/2.npy", "cat/1.NPY", "cat/deeper/0.npy", ".cache/3.npy")
    (tmp_path / "empty").mkdir()
    images = Images(tmp_path, labels={"number": [1, 2, 3]})
    assert images.labels == {"folder": ("cat", "dog"), "number": ("1", "2", "3")}
    assert [example.labels["folder"] for example in images] == ["cat", "cat", "dog"]
    assert np.array_equal(arrays_of(images), PIXELS[[1, 2, 0]])
    assert Images(tmp_path, labels={"folder": list("xyz")}).labels == {"folder": ("x", "y", "z")}


def test_list_of_paths(tmp_path: Path) -> None:
    save(tmp_path, "a.npy", "b.npy")
    images = Images([str(tmp_path / "b.npy"), tmp_path / "a.npy"])
    assert np.array_equal(arrays_of(images), PIXELS[[1, 0]])
    assert images.where(1) == f"image 1 of images ({tmp_path / 'a.npy'})"


def test_files_are_opened_when_they_are_needed(tmp_path: Path) -> None:
    save(tmp_path, "a.npy", "b.npy")
    images = Images(tmp_path)
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY, but cut")
    assert np.array_equal(images.thumbnail(0), PIXELS[0])
    with refuses(f"image 1 of {tmp_path.name} ({tmp_path / 'b.npy'}) is damaged"):
        images.scan()
    (tmp_path / "b.npy").unlink()
    with refuses("b.npy) is damaged"):
        list(images)


def test_torch_data_brings_its_label() -> None:
    images = Images(TorchData())
    assert images.labels == {"label": ("cat", "dog")}
    assert [example.labels["label"] for example in images] == ["cat", "dog"] * 3
    assert Images(TorchData(), labels={"label": list("xxxyyy")}).labels == {"label": ("x", "y")}


def test_torch_data_whose_second_part_is_no_label() -> None:
    class Boxes(TorchData):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0], {"boxes": [1, 2]}

    assert Images(Boxes()).labels == {}


def test_columns_of_a_data_set_are_labels_without_decoding_images() -> None:
    data = HubData()
    images = Images(data, labels=["kind", "place"])
    assert images.labels == {"kind": ("cat", "dog"), "place": ("p0", "p1")}
    assert not data.decoded
    assert Images(data, labels={"class": "kind"}).labels == {"class": ("cat", "dog")}
    assert [example.labels["place"] for example in images] == ["p0"] * 3 + ["p1"] * 3
    assert Images(HubData(), labels="place").labels == {"place": ("p0", "p1")}


@pytest.mark.parametrize("known", [True, False])
def test_columns_of_a_stream(known: bool) -> None:
    data = HubStream(known=known)
    images = Images(data, labels={"class": "kind", "extra": list("abcabc")})
    with pytest.raises(TypeError, match="has no length before it is read"):
        len(images)
    kinds = ("cat", "dog") if known else ("0", "1")  # what numbers mean is known from the features
    assert images.labels == {"class": kinds, "extra": ("a", "b", "c")}
    assert len(images) == 6


def test_a_stream_is_read_in_one_pass_and_anew_for_what_went_by() -> None:
    data = HubStream()
    images = Images(data, mean=[0] * 3, std=[1] * 3)
    before = data.passes
    read = [images.inputs(each)["pixel_values"] for each in ([0, 1], [2, 4], [5])]
    assert data.passes == before + 1
    plain = torch.tensor(PIXELS.transpose(0, 3, 1, 2)).float() / 255
    assert torch.equal(torch.cat(read), plain[[0, 1, 2, 4, 5]])
    assert torch.equal(images.inputs([3, 1])["pixel_values"], plain[[3, 1]])


def test_any_iterable_of_images_or_pairs() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter([(image, "x") for image in PIXELS])

    images = Images(Endless())
    assert images.labels == {"label": ("x",)}
    assert np.array_equal(arrays_of(images), PIXELS)


@given(
    arrays.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3, st.sampled_from([1, 3, 4]))),
    st.sampled_from(["list", "first", "tensor", "stream"]),
)
def test_the_hash_is_of_pixels_and_not_of_the_source(values: np.ndarray, form: str) -> None:
    class Streamed:
        def __iter__(self) -> Iterator[Any]:
            return iter(values)

    whole = Images(values, channels="last").scan()
    first = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    other = {
        "list": lambda: Images(list(values), channels="last"),
        "first": lambda: Images(first, channels="first"),
        "tensor": lambda: Images(torch.from_numpy(first), channels="first"),
        "stream": lambda: Images(Streamed(), channels="last"),
    }[form]()
    assert other.scan() == whole
    changed = values.copy()
    changed[-1, -1, -1, -1] ^= 1
    assert Images(changed, channels="last").scan().sha256 != whole.sha256
    assert Images(values, {"a": range(len(values))}, channels="last").scan().sha256 != whole.sha256


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PIXELS[0], "images have the shape [8, 10, 3]: expected [examples, height, width, channels]"),
        (PIXELS[:, :, :, 0], "Grey images have one channel: values[..., None]"),
        (PIXELS[:0], "no images: the shape is [0, 8, 10, 3]"),
        (PIXELS.astype(np.int64), "images hold dtype int64: expected uint8 (0 to 255) or floating numbers"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.bool), "images hold dtype torch.bool"),
        (np.zeros((2, 3, 8, 3), np.uint8), "both of its ends could count the channels (1, 3 or 4). Say which does"),
        (np.zeros((2, 8, 8, 8), np.uint8), "neither of its ends could count the channels"),
        ([], "no images in images"),
        ([PIXELS[0], None], "image 1 of images is of type NoneType: expected an image of Pillow, an array"),
        (["nowhere.png"], "image 0 of images (nowhere.png): no such file"),
        ("nowhere", "cannot read images from"),
        ({"train": HubData()}, "a dict of 'train' is no data set: pass one of its parts"),
        (iter(PIXELS), "images are read more than once"),
        (torch.utils.data.DataLoader(TorchData()), "pass its data set, pc.Images(loader.dataset)"),
        (TorchData(0), "no images in images"),
        (HubStream(0), "no images in images"),
        (HubData(chosen=("kind", "place")), "has no column 'image'. It has: 'kind', 'place'"),
        (3, "cannot read images from int"),
        (None, "cannot read images from NoneType"),
        (b"png", "cannot read images from bytes"),
        (Texts(["a"]), "this is pc.Texts already"),
        (Images(PIXELS), "this is pc.Images already"),
    ],
)
def test_what_holds_no_images(source: Any, message: str) -> None:
    with refuses(message):
        Images(source)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with refuses("it has notes.txt"):
        Images(tmp_path)
    with refuses("a file, not a folder: pass a list of files"):
        Images(tmp_path / "notes.txt")
    with refuses("no such folder"):
        Images(tmp_path / "nowhere")
    save(tmp_path, "a.npy", "cat/b.npy")
    with refuses("holds images (a.npy, ...) and folders of images (cat, ...)"):
        Images(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {"class": [1, 2]}}, "label 'class' has 2 values, but there are 6 examples in images"),
        ({"labels": {"class": [1, 2, 3, 4, 5, None]}}, "example 5 of images: label 'class' has no value"),
        ({"labels": {"class": "abcdef"}}, "takes one value per example, in a list"),
        ({"labels": ["class"]}, "images has no columns to take labels from"),
        ({"column": "picture"}, "images has no columns, so column='picture' means nothing"),
        ({"channels": "middle"}, 'channels= is "first" or "last", not \'middle\''),
        ({"mean": [0.5] * 3}, "mean= and std= belong together"),
        ({"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}, "std above 0"),
        ({"mean": [0.5] * 3, "std": [0.5]}, "one number for each channel"),
        ({"mean": 0.5, "std": 0.5}, "one number for each channel"),
        ({"mean": [0.5], "std": [0.5], "transform": len}, "leave out mean= and std="),
        ({"transform": "resize"}, "transform= is a function from an image to a tensor; str is not one"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with refuses(message):
        Images(PIXELS, **options)


@pytest.mark.parametrize("data", [HubData(), HubStream()], ids=["whole", "stream"])
def test_a_column_that_is_not_there(data: Any) -> None:
    with refuses("images has no column 'colour'. It has: 'image', 'kind', 'place'"):
        Images(data, labels=["colour"])
    with refuses("has no column 'picture'. It has: 'image', 'kind', 'place'"):
        Images(data, column="picture")


def test_streams_that_end_early_break_off_or_do_not_fit_their_labels() -> None:
    images = Images(HubStream(6, 6, 4), name="pictures", mean=[0] * 3, std=[1] * 3)
    assert images.scan().count == 6
    with refuses("pictures ended after 4 images; when it was read before, there were 6"):
        images.inputs([5])
    with refuses("image 3 of images cannot be read: OSError: connection lost"):
        Images(HubStream(breaks=True)).scan()
    for values, message in ((list("abcde"), "label 'a' has 5 values"), (list("abcdefg"), "label 'a' has 7 values")):
        with refuses(message):
            Images(HubStream(), labels={"a": values}).scan()


def test_torch_data_that_fails_is_named() -> None:
    class Faulty(TorchData):
        def __getitem__(self, index: int) -> Any:
            if index == 2:
                raise RuntimeError("no such record")
            return super().__getitem__(index)

    with refuses("image 2 of images cannot be read: RuntimeError: no such record"):
        Images(Faulty()).scan()


def test_an_index_beyond_the_images() -> None:
    with refuses("there is no image 6 in images: it has 6 images, from 0 on"):
        Images(PIXELS).thumbnail(6)
    with refuses("there is no image -1 in images"):
        Images(PIXELS).inputs([-1])
    with refuses("there is no image 9 in images: it ended after 6 images"):
        Images(HubStream()).thumbnail(9)


# What a model reads -------------------------------------------------------------------------------


class Processor:
    """Called as an image processor of Hugging Face; cuts a corner out and says so with a mask."""

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        small = [torch.tensor(np.asarray(image)[:4, :4].astype(np.float32)).permute(2, 0, 1) for image in images]
        return {"pixel_values": torch.stack(small), "pixel_mask": torch.ones(len(small), 4, 4)}


def test_mean_and_std_normalise_each_channel() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    values = Images(PIXELS, mean=mean, std=std).inputs(range(6))["pixel_values"]
    plain = (PIXELS / 255.0 - np.asarray(mean)) / np.asarray(std)
    np.testing.assert_allclose(values.numpy(), plain.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    of_floats = Images(PIXELS.astype(np.float32) / 255, mean=mean, std=std).inputs(range(6))["pixel_values"]
    torch.testing.assert_close(of_floats, values)


def test_transform_is_given_the_image_as_it_is_held() -> None:
    given_to: list[Any] = []

    def transform(image: Any) -> torch.Tensor:
        given_to.append(image)
        return torch.from_numpy(image[:2, :2].transpose(2, 0, 1).astype(np.float64))

    values = Images(PIXELS, transform=transform).inputs([4, 1], Processor())["pixel_values"]
    assert [each.tolist() for each in given_to] == [PIXELS[4].tolist(), PIXELS[1].tolist()]
    assert values.tolist() == PIXELS[[4, 1], :2, :2].transpose(0, 3, 1, 2).tolist()


def test_processor_is_used_where_nothing_else_is_said() -> None:
    made = Images(PIXELS.transpose(0, 3, 1, 2)).inputs([1, 2], Processor())
    assert set(made) == {"pixel_values", "pixel_mask"}
    assert made["pixel_values"].tolist() == PIXELS[1:3, :4, :4].transpose(0, 3, 1, 2).tolist()
    said = Images(PIXELS, mean=[0] * 3, std=[1] * 3).inputs([1, 2], Processor())
    assert said["pixel_values"].shape == (2, 3, 8, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", ["first", "last"])
def test_floating_images_are_taken_as_they_are(dtype: torch.dtype, channels: Any) -> None:
    values = torch.randn(3, 3, 5, 5).to(dtype)
    source = values if channels == "first" else values.permute(0, 2, 3, 1)
    made = Images(source, channels=channels).inputs([0, 2])["pixel_values"]
    assert made.dtype == dtype and torch.equal(made, values[[0, 2]])


@pytest.mark.parametrize(
    ("images", "processor", "message", "error"),
    [
        (Images(PIXELS), None, "this model has no processor that makes them its input. Give it one", ModelError),
        (Images(PIXELS / 255), Processor(), "holds floating numbers, and the model's processor", DataError),
        (Images(PIXELS, mean=[0], std=[1]), None, "image 0 of images has 3 channels, but mean and std", DataError),
        (Images(PIXELS / 1.0, mean=[0] * 3, std=[1] * 3), None, "holds float64 numbers from", DataError),
        (Images(PIXELS, transform=lambda x: x), None, "the transform makes [8, 10, 3] torch.uint8 of", DataError),
        (Images(PIXELS, transform=str), None, "the transform makes str of image 0 of images", DataError),
        (Images(PIXELS, transform=int), None, "the transform fails on image 0 of images: TypeError", DataError),
        (Images(PIXELS), lambda **_: {"ids": 1}, "makes ids of 3 images; expected pixel_values", ModelError),
        (Images(PIXELS), lambda **_: torch.zeros(1, 3, 4, 4), "makes a tensor [1, 3, 4, 4] of 3 images", ModelError),
        (
            Images([*PIXELS[:2], PIXELS[2, :5]], mean=[0] * 3, std=[1] * 3),
            None,
            "image 2 of images is 3 x 5 x 10 (channels x height x width), but image 0 of images is 3 x 8 x 10",
            DataError,
        ),
    ],
)
def test_what_cannot_be_made_input(images: Images, processor: Any, message: str, error: type[Exception]) -> None:
    with refuses(message, error):
        images.inputs([0, 1, 2], processor)


def test_the_image_that_the_processor_cannot_take_is_named() -> None:
    def fails_on_small(images: list[np.ndarray], return_tensors: str) -> dict[str, torch.Tensor]:
        if any(len(image) < 8 for image in images):
            raise ValueError("too small")
        return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}

    with refuses("the processor (function) cannot take image 1 of images: ValueError: too small"):
        Images([PIXELS[0], PIXELS[1, :5], PIXELS[2, :5]]).inputs([0, 1, 2], fails_on_small)


def test_the_first_odd_size_is_named_after_one_pass() -> None:
    images = Images([PIXELS[0], PIXELS[1], PIXELS[2, :, :5], PIXELS[3, :5]], name="pictures")
    assert images.scan().odd == (2, (3, 8, 5))
    with refuses("image 2 of pictures is 3 x 8 x 5 (channels x height x width), but image 0 of pictures is 3 x 8 x 10"):
        images.check_sizes()
    images.check_sizes(Processor())
    Images(list(PIXELS)).check_sizes()


# Pictures to look at ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "colour", "shown"),
    [
        ("uint8", [7], [7, 7, 7]),
        ("uint8", [1, 2, 3], [1, 2, 3]),
        ("uint8", [10, 20, 30, 255], [10, 20, 30]),
        ("uint8", [10, 20, 30, 0], [255, 255, 255]),
        ("float32", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("float32", [-1.0, 0.0, 3.0], [0, 64, 255]),
    ],
)
def test_thumbnails(dtype: str, colour: list[float], shown: list[int]) -> None:
    image = np.asarray([[colour, colour]], dtype)
    found = Images([image], channels="last").thumbnail(0)
    assert found.dtype == np.uint8 and found.shape == (1, 2, 3)
    assert found[0, 0].tolist() == found[0, 1].tolist() == shown


# Files that need Pillow -----------------------------------------------------------------------------


def test_files_are_decoded_by_pillow(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    for number, image in enumerate(PIXELS):
        pillow.fromarray(image).save(tmp_path / f"{number}.png")
    images = Images(tmp_path, mean=[0] * 3, std=[1] * 3)
    assert images.scan().sha256 == Images(PIXELS).scan().sha256
    assert isinstance(next(iter(images)).image, pillow.Image)
    listed = Images([pillow.fromarray(image) for image in PIXELS])
    assert listed.scan().sha256 == images.scan().sha256
    undecoded = [{"bytes": (tmp_path / f"{number}.png").read_bytes(), "path": None} for number in range(6)]
    assert Images(undecoded).scan().sha256 == images.scan().sha256
    assert isinstance(as_data([pillow.fromarray(PIXELS[0])]), Images)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.png", "c.png"):
        pillow.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_bytes(b"no picture")
    images = Images(tmp_path, name="pictures")
    assert images.thumbnail(0).shape == (64, 64, 3)
    with refuses(f"image 1 of pictures ({tmp_path / 'b.png'}) is damaged: "):
        images.thumbnail(1)
    with refuses(f"image 2 of pictures ({tmp_path / 'c.png'}) is damaged: it is no image that Pillow knows"):
        images.thumbnail(2)
    with pillow.open(tmp_path / "b.png") as opened, refuses("image 0 of images is damaged"):
        Images([opened]).scan()


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("P", 3), ("1", 1), ("CMYK", 3), ("I;16", 1), ("F", 1)],
)
def test_modes_of_pillow(mode: str, channels: int) -> None:
    pillow = pytest.importorskip("PIL.Image")
    picture = pillow.new(mode, (5, 4))
    images = Images([picture])
    assert images.scan().shape == (channels, 4, 5)
    assert images.thumbnail(0).shape == (4, 5, 3)


def test_photographs_are_turned_as_their_camera_was_held(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    picture = pillow.fromarray(PIXELS[0])
    exif = pillow.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(Images(tmp_path).thumbnail(0), np.rot90(PIXELS[0], -1))


def test_grey_is_made_colour_only_by_transform_or_processor() -> None:
    pillow = pytest.importorskip("PIL.Image")
    with refuses("image 0 of images has 1 channels, but mean and std have 3 numbers"):
        Images([pillow.new("L", (5, 4))], mean=[0] * 3, std=[1] * 3).inputs([0])


def test_data_sets_of_the_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pillow = pytest.importorskip("PIL.Image")
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"image": [pillow.fromarray(image) for image in PIXELS], "kind": [0, 1] * 3}
    whole = datasets.Dataset.from_dict(columns, features=features)
    for data in (whole, whole.to_iterable_dataset(), whole.with_format("torch"), whole.with_format("numpy")):
        images = Images(data, labels={"class": "kind"}, mean=[0] * 3, std=[1] * 3)
        assert images.labels == {"class": ("cat", "dog")}
        assert images.scan().sha256 == Images(PIXELS, labels={"class": ["cat", "dog"] * 3}).scan().sha256
        assert isinstance(as_data(data), Images)
    with refuses("is no data set: pass one of its parts"):
        Images(datasets.DatasetDict({"train": whole}))


def test_pillow_is_asked_for_where_it_is_needed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # as where it is not installed
    with refuses("pip install 'patchclamp[images]'", MissingExtra):
        Images(tmp_path).thumbnail(0)


# as_data ------------------------------------------------------------------------------------------


def test_images_are_recognised(tmp_path: Path) -> None:
    save(tmp_path, "a.npy")
    images = Images(PIXELS)
    assert as_data(images) is images
    assert isinstance(as_data(tmp_path), Images)
    assert isinstance(as_data(HubData()), Images)
    assert isinstance(as_data(PIXELS), Tensors)


def test_reading_images_loads_neither_torch_nor_pillow() -> None:
    program = (
        "import sys\n"
        "import numpy as np\n"
        "import patchclamp as pc\n"
        "images = pc.Images(np.zeros((2, 8, 8, 3), np.uint8), labels={'a': [1, 2]})\n"
        "assert len(list(images)) == 2 and images.scan().count == 2 and images.thumbnail(1).shape == (8, 8, 3)\n"
        "loaded = {'torch', 'transformers', 'PIL', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
