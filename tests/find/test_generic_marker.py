"""`generic_marker_test`: a neuron for "not the baseline", neurons for one concept each, and speakers that leak."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from tests.find.planted import of_values
from tests.recording import tiny

import patchclamp as pc

KINDS = ("asd", "control", "mdd", "scz")
CONCEPTS = ("asd", "mdd", "scz")


def planted(seed: int = 0, speakers: int = 80, each: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, classes and speakers. Neuron 0 fires for every concept, 1, 2, 3 for one each, the rest for nothing."""
    made = np.random.default_rng(seed)
    whose = np.repeat(np.arange(speakers), each)
    kind = np.asarray(KINDS)[whose % 4]
    values = made.standard_normal((len(kind), 10)) + 5
    values[:, 0] += 5 * (kind != "control")
    for place, concept in enumerate(CONCEPTS):
        values[:, 1 + place] += 5 * (kind == concept)
    return values, kind, whose


def test_a_marker_that_concepts_share_does_not_tell_them_apart() -> None:
    for seed in range(3):
        values, kind, whose = planted(seed)
        recording = of_values(values, kind.tolist())
        found = pc.find.generic_marker_test(
            recording, "kind", "control", groups=whose, neurons=pc.Neurons({"mlp.0": [0]})
        )
        assert found.concepts["label"].to_list() == list(CONCEPTS)
        assert (found.concepts["binary_f1"] >= 0.95).all()
        assert found.accuracy < 0.5 + 0.06  # the best that "baseline or not" can do with 4 classes
        # The baseline is known, the concepts are guessed: macro F1 of (1 + 3 / 3) / 4.
        assert found.macro_f1 < 0.5 + 0.06
        assert (found.concepts["drop"] > 0.3).all()
        assert found.concepts["shared"].to_list() == [1, 1, 1]


def test_neurons_for_one_concept_do() -> None:
    values, kind, whose = planted()
    recording = of_values(values, kind.tolist())
    neurons = pc.Neurons({"mlp.0": [1, 2, 3]})
    found = pc.find.generic_marker_test(recording, "kind", "control", groups=whose, neurons=neurons)
    assert (found.concepts["binary_f1"] >= 0.95).all() and (found.concepts["multiclass_f1"] >= 0.95).all()
    assert found.macro_f1 > 0.95 and (found.concepts["drop"].abs() < 0.05).all()
    assert found.concepts["neurons"].to_list() == [1, 1, 1] and found.concepts["shared"].to_list() == [0, 0, 0]


def test_who_fires_for_what() -> None:
    values, kind, whose = planted()
    found = pc.find.generic_marker_test(of_values(values, kind.tolist()), "kind", "control", groups=whose)
    assert found.neurons["index"][0] == 0 and found.neurons["score"][0] > 0.98
    concepts = dict(zip(found.neurons["index"], found.neurons["concepts"], strict=True))
    assert [concepts[each] for each in range(5)] == ["asd, mdd, scz", "asd", "mdd", "scz", ""]
    assert found.concepts["neurons"].to_list() == [2, 2, 2] and found.concepts["shared"].to_list() == [0.5] * 3
    assert found.concepts["examples"].to_list() == [80] * 3 and found.concepts["groups"].to_list() == [20] * 3
    assert (found.neurons["score"][1:] < 0.7).all()  # of a neuron for one concept, what it does for the others
    assert "control" in repr(found)


def test_by_chance_f1_drops_as_well() -> None:
    """Labels that mean nothing: what is found is what guessing gives, alone and among all."""
    made = np.random.default_rng(0)
    kind = np.repeat(KINDS, [400, 800, 200, 200])
    recording = of_values(made.standard_normal((1600, 3)) + 5, kind.tolist())
    found = pc.find.generic_marker_test(recording, "kind", "control", groups=np.arange(1600)).concepts
    np.testing.assert_allclose(found["binary_f1"], found["binary_chance"], atol=0.1)
    np.testing.assert_allclose(found["multiclass_f1"], found["multiclass_chance"], atol=0.1)
    assert found["binary_chance"].to_list() == pytest.approx([0.4, 2 * 0.2 * 0.5 / 0.7, 2 * 0.2 * 0.5 / 0.7])
    assert found["multiclass_chance"][0] == pytest.approx(0.25)


def identities(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each speaker has a voice, and no concept has anything."""
    made = np.random.default_rng(seed)
    _, kind, whose = planted(seed, speakers=48, each=6)
    voices = made.standard_normal((48, 60)) * 3
    return voices[whose] + 0.1 * made.standard_normal((len(whose), 60)) + 12, kind, whose


def test_the_voice_of_a_speaker_does_not_leak_across_the_split() -> None:
    values, kind, whose = identities()
    recording = of_values(values, kind.tolist())
    found = pc.find.generic_marker_test(recording, "kind", "control", groups=whose)
    assert (found.concepts["binary_f1"] < 0.75).all() and found.accuracy < 0.4
    with pytest.warns(UserWarning, match="no groups were given"):
        leaking = pc.find.generic_marker_test(recording, "kind", "control")
    assert (leaking.concepts["binary_f1"] > 0.98).all() and leaking.accuracy > 0.98


def test_groups_may_be_a_label_of_the_data_or_documents() -> None:
    values, kind, whose = planted(speakers=40)
    recording = of_values(values, kind.tolist())
    by_value = pc.find.generic_marker_test(recording, kind, "control", groups=whose)
    by_label = pc.find.generic_marker_test(
        of_values(values, [str(each) for each in whose], "who"), kind, "control", groups="who"
    )
    assert by_value.concepts.equals(by_label.concepts)


def test_documents_are_groups() -> None:
    """Windows of one document are never divided, and nothing is warned of."""
    made = np.random.default_rng(0)
    texts = [" ".join(made.choice(tiny.WORDS, 30)) for _ in range(30)]
    data = pc.Texts(texts, labels={"kind": ["a", "b", "none"] * 10})
    model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    how = {"long_texts": "windows", "max_length": 12, "overlap": 0}
    recording = tiny.recorded(model, data, "mlp.*", [pc.Pooled("mean", dtype="float32")], **how)
    assert recording.documents is not None and len(recording.documents) > 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pc.find.generic_marker_test(recording, "kind", "none")
    assert found.concepts["groups"].to_list() == [10, 10]


def test_the_same_seed_gives_the_same() -> None:
    values, kind, whose = planted(speakers=24)
    recording = of_values(values + 3 * np.random.default_rng(0).standard_normal(values.shape) + 15, kind.tolist())
    one, same, other = (
        pc.find.generic_marker_test(recording, "kind", "control", groups=whose, seed=each).concepts
        for each in (1, 1, 2)
    )
    assert one.equals(same) and not one.equals(other)


def test_bad_input_is_said() -> None:
    values, kind, whose = planted(speakers=20)
    recording = of_values(values, kind.tolist())
    two = np.where(kind == "control", "control", "other")
    test = pc.find.generic_marker_test
    few = np.where(kind == "mdd", whose % 16, whose)
    for call, match in [
        (lambda: test(recording, "kind", "controls"), "nearest: control"),
        (lambda: test(recording, two, "control", groups=whose), "only concept"),
        (lambda: test(recording, "kind", "control", groups=few), "'mdd' has examples of 4 groups: at least 5"),
        (lambda: test(recording, "kind", "control", groups=whose, folds=6), "has examples of 5 groups: at least 6"),
        (lambda: test(recording, "kind", "control", groups=whose, folds=1), "folds"),
        (lambda: test(recording, "kind", "control", groups=whose[:5]), "5 groups were given for 80 examples"),
        (lambda: test(recording, "kind", "control", groups=whose, neurons=pc.Neurons()), "holds none"),
        (lambda: test(recording, "kind", "control", groups=whose, neurons=pc.Neurons({"mlp.0": [10]})), "mlp.0:10"),
        (lambda: test(recording, "kind", "control", groups=whose, neurons=pc.Neurons({"mlp.1": [0]})), "mlp.1"),
    ]:
        with pytest.raises(pc.errors.PatchclampError, match=match):
            call()


def test_an_example_without_a_value_is_left_out() -> None:
    values, kind, whose = planted()
    found = pc.find.generic_marker_test(of_values(values, kind.tolist()), "kind", "control", groups=whose)
    more = np.concatenate([values, np.full((4, 10), np.nan)])
    with pytest.warns(UserWarning, match="left out"):
        recording = of_values(more, [*kind.tolist(), *KINDS])
    same = pc.find.generic_marker_test(recording, "kind", "control", groups=[*whose.tolist(), *range(80, 84)])
    assert same.concepts.equals(found.concepts) and same.neurons == found.neurons
