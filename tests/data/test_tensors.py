"""`Tensors`, and `as_data`, which sorts what a user passes into the two kinds of data."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from patchclamp.data import Tensors, Texts, as_data
from patchclamp.errors import DataError


def refuses(message: str):
    return pytest.raises(DataError, match=re.escape(message))


# Tensors ------------------------------------------------------------------------------------------


def test_tensor_keeps_values_dtype_and_order() -> None:
    values = torch.arange(24, dtype=torch.float64).reshape(4, 3, 2)
    data = Tensors(values, labels={"digit": [3, 1, 3, 2]})
    assert (len(data), data.name, data.labels) == (4, "tensors", {"digit": ("1", "2", "3")})
    assert data.values.dtype == torch.float64 and torch.equal(data.values, values)
    for _ in range(2):
        examples = list(data)
        assert all(torch.equal(each.values, values[index]) for index, each in enumerate(examples))
        assert [each.labels["digit"] for each in examples] == ["3", "1", "3", "2"]
    assert repr(data) == "Tensors('tensors', [4, 3, 2] torch.float64, labels: digit)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8])
def test_floating_and_integer_dtypes(dtype: torch.dtype) -> None:
    assert Tensors(torch.zeros(2, 3, dtype=dtype)).values.dtype == dtype


def test_gradients_stay_behind_memory_is_shared() -> None:
    values = torch.zeros(2, 3, requires_grad=True)
    data = Tensors(values)
    assert not data.values.requires_grad
    assert data.values.data_ptr() == values.data_ptr()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "form",
    [
        lambda array: array,
        lambda array: array[::-1],
        lambda array: np.asfortranarray(array),
        lambda array: array.astype(">f4"),
        lambda array: np.broadcast_to(array, array.shape),
    ],
    ids=["plain", "reversed", "fortran", "big endian", "read-only"],
)
def test_numpy_arrays_in_any_form(form) -> None:
    array = form(np.arange(6, dtype=np.float32).reshape(3, 2))
    data = Tensors(array)
    assert data.values.dtype == torch.float32
    assert data.values.tolist() == array.tolist()


def test_numpy_memory_is_shared_where_possible() -> None:
    array = np.zeros((3, 2), dtype=np.float32)
    data = Tensors(array)
    array[1, 1] = 7
    assert data.values[1, 1] == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(0, 3), "no examples in pixels: the shape is [0, 3]"),
        (np.zeros((0, 3)), "no examples in pixels: the shape is [0, 3]"),
        (torch.tensor(1.0), "pixels are a single number"),
        (torch.zeros(2, dtype=torch.bool), "pixels hold dtype torch.bool: expected floating or integer"),
        (torch.zeros(2, dtype=torch.complex64), "pixels hold dtype torch.complex64"),
        (torch.eye(3).to_sparse(), "pass values.to_dense()"),
        (np.zeros(2, dtype=bool), "pixels hold dtype bool"),
        (np.array(["a", "b"]), "pixels hold dtype <U1"),
        (np.array([None, 1]), "pixels hold dtype object"),
        (np.zeros(2, dtype=np.longdouble), "torch does not know the dtype"),
        ([[1.0, 2.0]], "pixels are of type list: pass one tensor or numpy array [examples, ...]"),
        ([torch.zeros(2)], "torch.stack makes one of a list"),
        (None, "pixels are of type NoneType"),
    ],
)
def test_what_is_no_tensor_of_examples(values, message: str) -> None:
    with refuses(message):
        Tensors(values, name="pixels")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"digit": [1, 2]}, "label 'digit' has 2 values, but there are 3 examples in tensors"),
        ({"digit": [1, 2, 3, 4]}, "label 'digit' has 4 values, but there are 3 examples in tensors"),
        ({"digit": [1, None, 3]}, "example 1 of tensors: label 'digit' has no value"),
        ({"digit": "abc"}, "takes one value per example, in a list"),
        ([1, 2, 3], 'labels of tensors are given as {"digit": [one value per example]}'),
    ],
)
def test_labels_of_tensors_are_checked(labels, message: str) -> None:
    with refuses(message):
        Tensors(torch.zeros(3, 2), labels=labels)


def test_labels_may_be_a_tensor() -> None:
    assert Tensors(torch.zeros(3, 2), labels={"digit": torch.tensor([5, 6, 5])}).labels == {"digit": ("5", "6")}


# as_data ------------------------------------------------------------------------------------------


def test_data_passes_as_it_is() -> None:
    texts, tensors = Texts(["a"]), Tensors(torch.zeros(1, 2))
    assert as_data(texts) is texts
    assert as_data(tensors) is tensors


class Numbered:
    """Iterable by its numbers only, as a torch Dataset is."""

    def __getitem__(self, index: int) -> str:
        return ["a", "b"][index]


@pytest.mark.parametrize(
    "data",
    [["a", "b"], ("a", "b"), iter(["a", "b"]), np.array(["a", "b"]), pd.Series(["a", "b"]), Numbered()],
    ids=["list", "tuple", "iterator", "numpy", "pandas", "numbered"],
)
def test_texts_are_recognised(data) -> None:
    found = as_data(data)
    assert isinstance(found, Texts)
    assert [example.text for example in found] == ["a", "b"]


def test_path_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\nb\n")
    found = as_data(tmp_path / "a.txt")
    assert isinstance(found, Texts) and len(found) == 2


@pytest.mark.parametrize("data", [torch.zeros(2, 3), np.zeros((2, 3)), np.zeros((2, 3), dtype=np.int32)])
def test_tensors_are_recognised(data) -> None:
    found = as_data(data)
    assert isinstance(found, Tensors)
    assert found.values.shape == (2, 3)


@pytest.mark.parametrize("text", ["one text", "corpus.jsonl", "", "x" * 5000])
def test_one_str_must_be_said_what_it_is(text: str) -> None:
    with refuses("For a single text write pc.Texts([text]), for a file pc.Texts(path)") as caught:
        as_data(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot read data from NoneType"),
        (3, "cannot read data from int"),
        (len, "cannot read data from builtin_function_or_method"),
        (str, "cannot read data from type"),
        ([], "no examples in texts"),
        ([[1.0, 2.0]], "text 0 of texts: the text is [1.0, 2.0]: expected str, got list"),
        ([list(range(1000))], "text 0 of texts: the text is [0, 1, 2"),
        ([torch.zeros(2)], "Tensors go into pc.Tensors"),
        (["a", None], "text 1 of texts"),
        ({"input_ids": [1]}, "a dict is a table, not texts"),
        (torch.zeros(0, 2), "no examples in tensors"),
        (np.zeros(2, dtype=bool), "dtype bool"),
        (np.array(3.0), "tensors are a single number"),
    ],
)
def test_what_is_no_data(data, message: str) -> None:
    with refuses(message) as caught:
        as_data(data)
    assert len(str(caught.value)) < 200


def test_reading_texts_loads_neither_torch_nor_pyarrow() -> None:
    program = (
        "import sys\n"
        "from patchclamp.data import Tensors, Texts, as_data, corpora\n"
        "assert len(list(as_data(['a', 'b']))) == 2\n"
        "assert len(corpora.python_docs(limit=3)) == 3\n"
        "loaded = {'torch', 'transformers', 'pyarrow', 'polars', 'pandas'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
