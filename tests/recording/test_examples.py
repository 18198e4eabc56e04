"""What a recording knows of every example: its labels, and how many of its positions count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import recorded

import patchclamp as pc

TEXTS = [" ".join(tiny.WORDS[start : start + 2 + start % 5]) for start in range(12)]
KINDS = ["short" if len(text.split()) < 4 else "long" for text in TEXTS]


def model() -> pc.Model:
    return pc.load(tiny.bert(), tokenizer=tiny.tokenizer())


def test_labels_and_positions_of_every_example_survive_the_disk(tmp_path: Path) -> None:
    data = pc.Texts(TEXTS, labels={"kind": KINDS, "parity": ["even", "odd"] * 6})
    recording = recorded(model(), data, "mlp.*", [pc.Moments()])
    recording.save(tmp_path / "r")
    for each in (recording, pc.Recording.open(tmp_path / "r")):
        assert each.categories_of_examples("kind").tolist() == KINDS
        assert each.categories_of_examples("parity").tolist() == ["even", "odd"] * 6
        assert each.positions.tolist() == [len(text.split()) for text in TEXTS]
        assert each.positions.sum() == each["mlp.0"].count
    with pytest.raises(pc.errors.UnknownName, match="kind"):
        recording.categories_of_examples("kinds")


def test_without_labels_there_are_none() -> None:
    recording = recorded(model(), TEXTS, "mlp.*", [pc.Moments()])
    assert recording.codes == {}
    assert len(recording.positions) == 12


def test_only_what_counts_is_a_position() -> None:
    recording = recorded(model(), TEXTS, "mlp.*", [pc.Moments()], positions="last")
    assert recording.positions.tolist() == [1] * 12


def test_tensors() -> None:
    ids = pc.Tensors(torch.arange(4, 24).reshape(4, 5), labels={"kind": list("abab")})
    recording = recorded(pc.load(tiny.bert()), ids, "mlp.*", [pc.Moments()])
    assert recording.categories_of_examples("kind").tolist() == list("abab")
    assert recording.positions.tolist() == [5] * 4


def test_how_many_positions_an_image_has_is_not_known() -> None:
    recording = pc.record(pc.load(tiny.vit()), torch.rand(3, 3, 8, 8), "mlp.*", [pc.Moments()], progress=False)
    assert recording.positions.tolist() == np.zeros(0).tolist()
