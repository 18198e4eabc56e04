"""The examples of the docstrings run, and print what they say."""

from __future__ import annotations

import doctest

import pytest

import patchclamp.data.images
import patchclamp.data.tensors
import patchclamp.data.texts


@pytest.mark.parametrize("module", [patchclamp.data.images, patchclamp.data.tensors, patchclamp.data.texts])
def test_examples_of_docstrings(module) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0 and outcome.failed == 0
