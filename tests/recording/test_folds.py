"""The two folds: by what an example is, whatever its place, so that nothing that is scored has been described."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.text_data import TEXTS, model_of
from torch import nn

import patchclamp as pc
from patchclamp.recording.folds import fold_of_content

KEPT = [pc.ByToken(threshold=0.0), pc.Exemplars(3, context=2), pc.Moments]


def test_the_same_text_is_in_the_same_fold_wherever_it_stands(tmp_path: Path) -> None:
    model = model_of("bert")
    texts = [*TEXTS, *reversed(TEXTS)]
    recording = pc.record(model, texts, "mlp.0", KEPT, store=tmp_path / "one", progress=False)
    folds = recording.folds
    assert folds.dtype == np.uint8 and len(folds) == len(texts)
    assert (folds == folds[::-1]).all() and set(folds.tolist()) == {0, 1}
    assert folds.tolist() == [fold_of_content(text.encode()) for text in texts]
    assert (pc.Recording.open(tmp_path / "one").folds == folds).all()
    for fold in (0, 1):
        shown = recording["mlp.0"].exemplars.top(fold).example
        assert (folds[shown[shown >= 0]] == fold).all() and (shown >= 0).any()
        # What is scored holds no text that was described.
        other = recording["mlp.0"].exemplars.top(1 - fold).example
        assert not {texts[each] for each in shown.flat if each >= 0} & {texts[each] for each in other.flat if each >= 0}


def test_the_counts_of_a_fold_are_those_of_its_texts_alone() -> None:
    model = model_of("gpt2")
    whole = pc.record(model, TEXTS, "mlp.0", KEPT, progress=False)
    for fold in (0, 1):
        mine = [text for text, each in zip(TEXTS, whole.folds, strict=True) if each == fold]
        alone = pc.record(
            model, mine, "mlp.0", [pc.ByToken(whole["mlp.0"].by_token.tokens, threshold=0.0)], progress=False
        )
        view, total = whole["mlp.0"].by_token.fold(fold), alone["mlp.0"].by_token
        assert view.count == total.count
        np.testing.assert_array_equal(view.occurrences, total.occurrences)
        np.testing.assert_array_equal(view.fired, total.fired)


def test_windows_of_a_document_are_in_one_fold_and_say_where_they_are_from(tmp_path: Path) -> None:
    model = model_of("gpt2")
    documents = [" ".join(TEXTS[start : start + 4]) for start in range(0, 12, 2)]
    options = {"max_length": 8, "long_texts": "windows", "overlap": 2, "progress": False}
    recording = pc.record(model, documents, "mlp.0", KEPT, store=tmp_path / "windows", **options)
    for found in (recording, pc.Recording.open(tmp_path / "windows")):
        assert found.documents is not None and found.documents.count == len(documents)
        for number, document in enumerate(documents):
            examples = found.documents.examples(number)
            assert len(examples) > 1
            assert set(found.folds[examples].tolist()) == {fold_of_content(document.encode())}
            ids = tiny.tokenizer("$A")(document)["input_ids"]
            for example in examples.tolist():
                place = found.documents.place(example)
                assert place.document == number
                shown = found["mlp.0"].exemplars.top(int(found.folds[example]))
                for neuron, at in zip(*np.nonzero(shown.example == example), strict=True):
                    position = int(shown.position[neuron, at])
                    window = found.window("mlp.0", example, position, context=0)
                    assert window.ids.tolist() == [ids[place.start + position]]
    assert pc.record(model, TEXTS, "mlp.0", [pc.Moments], progress=False).documents is None


@pytest.mark.parametrize("kind", ["tensors", "images"])
def test_tensors_and_images(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    values = torch.rand(20, 3, 8, 8)
    both = torch.cat([values, values.flip(0)])
    data = pc.Tensors(both) if kind == "tensors" else pc.Images(both)
    recording = pc.record(network, data, "conv.0", [pc.Exemplars(2), pc.Moments], progress=False)
    assert (recording.folds == recording.folds[::-1]).all() and set(recording.folds.tolist()) == {0, 1}
    top = recording["conv.0"].exemplars.top(1).example
    assert (recording.folds[top] == 1).all()


def test_the_null_recording_keeps_the_folds() -> None:
    recording = pc.record(model_of("bert"), TEXTS, "mlp.0", KEPT, activations=True, progress=False)
    null = recording.with_tokens_permuted(seed=1)
    assert (null.folds == recording.folds).all()
    for fold in (0, 1):
        assert null["mlp.0"].by_token.fold(fold).count == recording["mlp.0"].by_token.fold(fold).count
