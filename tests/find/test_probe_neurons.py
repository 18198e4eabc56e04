"""Weights of probes: a planted unit, a label that many carry, a probe at chance, and the regressions themselves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from tests.find.planted import of_values
from torch import nn

import patchclamp as pc
from patchclamp.find.probes import Logistic, Scale, balance, folds, metrics, split


def gaussian(seed: int, examples: int, neurons: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((examples, neurons))


def probed(values: np.ndarray, yes: np.ndarray) -> pc.Recording:
    """Far from 0, where the network cuts."""
    return of_values(values + 8, np.where(yes, "yes", "no").tolist(), summaries=[pc.Pooled("max", dtype="float32")])


@pytest.fixture(autouse=True)
def no_warning(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """A test that expects none gets none."""
    yield
    assert not [str(each.message) for each in recwarn if "probe_neurons" in str(each.message)]


# What is found --------------------------------------------------------------------------------------


def test_a_planted_unit_comes_first_and_is_selected() -> None:
    yes = np.arange(240) % 2 == 0
    values = gaussian(0, 240, 120)
    values[:, 33] += 3 * yes
    values[:, 34] -= 3 * yes
    found = pc.find.probe_neurons(probed(values, yes), "kind", "yes")
    assert found["index"][0] == 33 and found["index"][-1] == 34
    assert found["selected"].to_list() == [True] + [False] * 119
    assert found["score"][0] > 5 > 3 > found["score"][1] and found["accuracy"].min() > 0.85
    # For the other label it is the one that is low there.
    both = pc.find.probe_neurons(probed(values, yes), "kind")
    np.testing.assert_allclose(both["score_no"], -both["score_yes"])
    assert set(both["accuracy"]) == set(found["accuracy"])
    assert dict(zip(both.top(2)["index"], both.top(2)["label"], strict=True)) == {33: "yes", 34: "no"}
    assert pc.find.probe_neurons(probed(values, yes), "kind", "yes", z=20.0)["selected"].sum() == 0


def test_a_label_that_many_units_carry_makes_none_of_them_stand_out() -> None:
    """Collinear units share the weight: what the probe reads is as clear, and no unit is named for it."""
    yes = np.arange(400) % 2 == 0
    one, many = gaussian(0, 400, 80), gaussian(0, 400, 80)
    said = 3 * yes + gaussian(1, 400, 1)[:, 0]
    one[:, 0] = said
    many[:, :40] = said[:, None] + 0.3 * gaussian(2, 400, 40)
    alone, shared = (pc.find.probe_neurons(probed(each, yes), "kind", "yes") for each in (one, many))
    assert alone["accuracy"][0] > 0.85 and shared["accuracy"][0] > 0.85
    assert alone["selected"].sum() == 1 and shared["selected"].sum() == 0
    assert shared["score"].max() < alone["score"].max() / 2


def test_a_probe_at_chance_names_no_unit() -> None:
    recording = probed(gaussian(0, 200, 400), np.arange(200) % 2 == 0)
    with pytest.warns(UserWarning, match="no probe tells 'yes' from the rest on held-out examples"):
        found = pc.find.probe_neurons(recording, "kind", "yes", z=1.0)
    assert found["score"].max() > 2 and not found["selected"].any() and found["accuracy"].max() < 0.62
    assert pc.find.probe_neurons(recording, "kind", "yes", z=1.0, least_accuracy=0.0)["selected"].any()


def test_only_a_site_whose_probe_holds_names_units() -> None:
    """The second site sees noise alone; its weights are as outlying as any."""
    yes = np.arange(300) % 2 == 0
    values = gaussian(0, 300, 40)
    values[:, 5] += 4 * yes
    first, second = nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(40))
        second.weight.copy_(torch.eye(40))
        second.weight[5, 5] = 0
    module = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(40, 2)).eval()
    data = pc.Tensors(
        torch.from_numpy((values + 8).astype(np.float32)), labels={"kind": np.where(yes, "y", "n").tolist()}
    )
    recording = pc.record(module, data, "mlp.*", [pc.Pooled("max", dtype="float32")], progress=False)
    found = pc.find.probe_neurons(recording, "kind", "y", z=1.2)
    assert found.at("mlp.0")["selected"].any() and not found.at("mlp.1")["selected"].any()
    assert found.at("mlp.1")["score"].max() > 1.2
    assert found.at("mlp.0")["accuracy"].min() > 0.9 > 0.65 > found.at("mlp.1")["accuracy"].max()


def test_each_label_has_its_own_probe_and_accuracy() -> None:
    labels = np.asarray(["a", "b", "c"])[np.random.default_rng(0).integers(3, size=300)]
    values = gaussian(1, 300, 40)
    values[:, 7] += 4 * (labels == "a")
    recording = of_values(values + 8, labels.tolist(), summaries=[pc.Pooled("max", dtype="float32")])
    with pytest.warns(UserWarning, match="no probe tells") as said:
        found = pc.find.probe_neurons(recording, "kind")
    assert [str(each.message).split("'")[1] for each in said] == ["b", "c"]
    by_label = {label: set(found.to_polars().filter(label=label)["accuracy"]) for label in "abc"}
    assert all(len(each) == 1 for each in by_label.values())
    assert by_label["a"].pop() > 0.85 and max(by_label["b"] | by_label["c"]) < 0.7
    for label in "abc":
        assert found[f"score_{label}"].mean() == pytest.approx(0, abs=1e-6)
        assert found[f"score_{label}"].std(ddof=0) == pytest.approx(1, abs=1e-6)


def test_few_examples_are_said() -> None:
    values = gaussian(0, 90, 10)
    yes = np.arange(90) % 2 == 0
    values[:, 3] += 4 * yes
    with pytest.warns(UserWarning, match="a class has 45 examples"):
        found = pc.find.probe_neurons(probed(values, yes), "kind", "yes", z=2.0)
    assert found["selected"].to_list() == [True] + [False] * 9


def test_accuracy_is_of_examples_that_were_not_seen() -> None:
    yes = np.random.default_rng(0).random(260) < 0.35
    values = gaussian(1, 260, 60)
    values[:, 3] += 2 * yes
    found = pc.find.probe_neurons(probed(values, yes), "kind", "yes", seed=4)
    scaled, said = Scale.of(values).apply(values), np.zeros(260, bool)
    # Categories are sorted: "no" is 0.
    fold = folds(yes.astype(np.int64), 5, 4)
    for each in range(5):
        fit = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=1000).fit(
            scaled[fold != each], yes[fold != each]
        )
        said[fold == each] = fit.predict(scaled[fold == each])
    assert found["accuracy"][0] == pytest.approx(balanced_accuracy_score(yes, said))


def test_a_document_is_never_learned_from_and_tried() -> None:
    document = np.repeat(np.arange(30), 10)
    values = gaussian(0, 30, 80)[document] + 0.1 * gaussian(1, 300, 80)
    recording = probed(values, (np.arange(30) % 2 == 0)[document])
    leaking = pc.find.probe_neurons(recording, "kind", "yes")
    with pytest.warns(UserWarning, match="no probe tells"):
        whole = pc.find.probe_neurons(recording, "kind", "yes", groups=document.tolist())
    assert leaking["accuracy"][0] > 0.95 and whole["accuracy"][0] < 0.68
    np.testing.assert_allclose(leaking["score"], whole["score"])


def test_bad_input_is_said() -> None:
    values = gaussian(0, 120, 10)
    recording = probed(values, values[:, 0] > 0)
    for given, match in [
        ({"C": 0.0}, "C is a number above 0"),
        ({"least_accuracy": 1.5}, "least_accuracy is a share"),
        ({"labels": ["rare"] + ["b"] * 119}, "'rare' has 1"),
        ({"groups": "kind"}, "lies in one group only"),
        ({"groups": ["d"] * 3}, "3 groups"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            pc.find.probe_neurons(recording, **{"labels": "kind", **given})


# The regressions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "neurons"), [(80, 15), (60, 200), (700, 250), (260, 320)])
@pytest.mark.parametrize("C", [0.1, 10.0])
def test_regressions_are_those_of_scikit_learn(examples: int, neurons: int, C: float) -> None:
    """More examples than neurons and fewer; few unknowns, solved as they are, and many, by conjugate gradients."""
    values = gaussian(0, examples, neurons)
    values[:, 1] = values[:, 0] + 0.05 * values[:, 1]
    right = np.stack([values[:, 0] > 0.9, values[:, 2] + gaussian(1, examples, 1)[:, 0] > 0], axis=1)
    weights, intercept = Logistic(values, C).fit(right)
    for label in range(2):
        fit = LogisticRegression(C=C, class_weight="balanced", tol=1e-9, max_iter=5000).fit(values, right[:, label])
        np.testing.assert_allclose(weights[:, label], fit.coef_[0], atol=2e-4)
        assert intercept[label] == pytest.approx(fit.intercept_[0], abs=2e-4)


def test_examples_of_weight_0_are_left_out() -> None:
    values, right = gaussian(0, 90, 30), gaussian(1, 90, 1) > 0.3
    weights = np.zeros((90, 1))
    weights[:70] = balance(right[:70])
    some, all_there = Logistic(values).fit(right, weights), Logistic(values[:70]).fit(right[:70])
    for one, two in zip(some, all_there, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_splits_keep_categories_on_both_sides() -> None:
    codes = np.repeat([0, 1, 2], [100, 10, 2])
    out = split(codes, 0.3, 0)
    assert [int(out[codes == each].sum()) for each in range(3)] == [30, 3, 1]
    assert not np.array_equal(out, split(codes, 0.3, 1))
    groups = np.arange(112) // 2
    for seed in range(5):
        of_groups = split(codes, 0.3, seed, np.where(codes == 2, np.arange(112), groups))
        assert (np.bincount(codes[of_groups], minlength=3) > 0).all()
        assert all(len(set(of_groups[(groups == each) & (codes < 2)])) == 1 for each in groups[codes < 2])


def test_no_more_folds_than_groups_of_a_category() -> None:
    codes = np.repeat([0, 1], [30, 6])
    assert folds(codes, 5, 0, np.arange(36) // 2).max() + 1 == 3
    assert folds(codes, 5, 0).max() + 1 == 5


def test_metrics_by_hand() -> None:
    right = np.asarray([True, True, True, False, False, False, False, False])
    decision = np.asarray([[2, 1, -1, 3, -1, -2, -3, -4.0], [-1] * 8]).T
    worth = metrics(right, decision)
    assert worth["precision"].tolist() == pytest.approx([2 / 3, 0])
    assert worth["recall"].tolist() == pytest.approx([2 / 3, 0])
    assert worth["f1"].tolist() == pytest.approx([2 / 3, 0])
    assert worth["mcc"].tolist() == pytest.approx([(2 * 4 - 1 * 1) / 15, 0])
    assert worth["auroc"].tolist() == pytest.approx([(4 + 4 + 3.5) / 15, 0.5])
