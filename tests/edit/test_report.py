"""The report of an edit says what changed, says so where nothing was resolvable, and lets no text out of its page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.architectures import GPT2, TEXTS, tokenizer
from torch import nn

import patchclamp as pc
from patchclamp.edit.bake import bake
from patchclamp.edit.prune import prune
from patchclamp.edit.report import Change, report
from patchclamp.edit.spectral import damp_components
from patchclamp.errors import DataError, StoreError, UnknownName

EVIL = "<script>alert(1)</script> \"&' </pre>"


class Two(nn.Module):
    """Two classes: for one the first neuron speaks, for the other the second; a third says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.act, self.out = nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)
        with torch.no_grad():
            self.into.weight.copy_(torch.eye(3))
            self.out.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
            self.out.bias.copy_(torch.tensor([0.0, 0.05]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.act(self.into(x)))


def classes(kind: int, count: int = 200, wrong: int = 0) -> pc.Tensors:
    """Examples of one class, of which the first few are labelled as the other."""
    values = np.abs(np.random.default_rng(kind).standard_normal((count, 3))).astype(np.float32) * 0.1
    values[:, kind] += 1
    labels = [str(1 - kind if number < wrong else kind) for number in range(count)]
    return pc.Tensors(torch.from_numpy(values), labels={"class": labels})


def model() -> pc.Model:
    return pc.load(Two().eval())


def decoder() -> pc.Model:
    return pc.load(GPT2.build(), tokenizer=tokenizer())


# What is said -----------------------------------------------------------------------------------------------


def test_what_fell_and_what_did_not_change_is_told_apart() -> None:
    before = model()
    after = bake(before, pc.ablate(pc.Neurons({"mlp.0": [0]})))
    found = report(
        before,
        after,
        {"first": ("accuracy", classes(0, wrong=38))},
        {"second": ("accuracy", classes(1)), "its score": ("class_score", classes(1))},
    )
    fell, still, score = found.changes
    # Of 200 examples the network was right on 162, and is now on the 38 whose label is wrong.
    assert (fell.before, fell.after, fell.difference) == (0.81, 0.19, pytest.approx(-0.62))
    assert fell.resolvable and fell.low < -0.62 < fell.high < 0
    assert fell.sentence == (
        f"accuracy on first fell from 0.81 to 0.19 (difference -0.62, 95% interval {fell.low:.2f} to {fell.high:.2f}, "
        "200 examples)"
    )
    assert not still.resolvable and not score.resolvable
    assert still.sentence == (
        "accuracy on second: no change was resolvable: 1.00 before and after, alike on all 200 examples"
    )
    assert "class score on its score: no change was resolvable" in score.sentence
    assert [each.role for each in found.changes] == ["target", "guard", "guard"]
    assert found.sentences[:3] == [each.sentence for each in found.changes]
    assert found.steps == [step["words"] for step in after.provenance["interventions"]]
    assert str(found).splitlines()[1:] == found.sentences


def test_the_interval_is_paired() -> None:
    """Each example changes by -0.5 or so, and examples differ by much more: unpaired it could not be told."""
    before, data = model(), classes(0, 60)
    noise = np.random.default_rng(0).standard_normal(60) * 50

    def metric(asked: pc.Model, batch: Any) -> np.ndarray:
        lowered = asked is not before
        return noise[batch.examples] - 0.5 * lowered - 0.1 * lowered * np.sin(batch.examples)

    after = bake(before, pc.ablate(pc.Neurons({"mlp.0": [0]})))
    (change,) = report(before, after, (metric, data)).changes
    assert (change.name, change.metric) == ("target", "metric")
    assert -0.53 < change.low < change.difference < change.high < -0.47
    assert change.sentence.startswith("metric on target fell from ")


def test_a_change_without_direction_is_not_resolvable() -> None:
    before = model()
    after = bake(before, pc.ablate(pc.Neurons({"mlp.0": [2]})))
    generator = np.random.default_rng(4)
    values = {id(before): generator.standard_normal(80), id(after): generator.standard_normal(80)}

    def noise(asked: pc.Model, batch: Any) -> np.ndarray:
        return values[id(asked)][batch.examples]

    rounds = [report(before, after, (noise, classes(0, 80)), seed=seed).changes[0] for seed in (0, 0, 1)]
    assert rounds[0] == rounds[1] != rounds[2]
    assert not rounds[0].resolvable and rounds[0].changed == 80
    assert "no change was resolvable: " in rounds[0].sentence and "95% interval -" in rounds[0].sentence


@pytest.mark.parametrize(
    ("difference", "low", "high", "said"),
    [
        (
            -0.00031,
            -0.0004,
            -0.0002,
            "fell from 2.00000 to 1.99969 (difference -0.00031, 99% interval -0.00040 to -0.00020",
        ),
        (1234.5, 1200.0, 1300.0, "rose from 2 to 1,236 (difference 1,234, 99% interval 1,200 to 1,300"),
        (
            0.001,
            -0.4,
            0.5,
            "no change was resolvable: 2.00 before, 2.00 after (difference 0.00, 99% interval -0.40 to 0.50",
        ),
        (0.5, 0.5, 0.5, "rose from 2.00 to 2.50 (difference 0.50, 99% interval 0.50 to 0.50"),
    ],
)
def test_numbers_are_as_fine_as_the_difference(difference: float, low: float, high: float, said: str) -> None:
    change = Change("guard", "d", "loss", 2.0, 2.0 + difference, difference, low, high, 0.99, 9, 9)
    assert said in change.sentence and change.sentence.startswith("loss on d")


def test_named_metrics_on_texts_and_texts_of_both() -> None:
    before = decoder()
    neurons = pc.Neurons({"mlp.0": range(12), "mlp.1": range(12)})
    after = bake(before, pc.ablate(neurons))
    found = report(before, after, {"lines": ("loss", iter(TEXTS[:1] + TEXTS[2:]))}, prompts=TEXTS, max_new_tokens=4)
    (change,) = found.changes
    assert change.examples == 3 and change.changed == 3
    with before.intervene(pc.ablate(neurons)):
        expected = pc.load(before.module, tokenizer=tokenizer()).generate(TEXTS[0], max_new_tokens=4)
    assert [each.prompt for each in found.continuations] == list(TEXTS)
    assert found.continuations[0].before == before.generate(TEXTS[0], max_new_tokens=4)
    assert found.continuations[0].after == expected
    other = sum(each.before != each.after for each in found.continuations)
    assert found.sentences[-1] == f"{other} of 4 prompts are continued otherwise"


# Weights ------------------------------------------------------------------------------------------------------


def test_changed_weights_are_counted() -> None:
    before = decoder()
    baked = bake(before, pc.ablate(pc.Neurons({"mlp.0": [3, 4]})))
    data = ("loss", list(TEXTS[2:]) + list(TEXTS[:1]))
    found = report(before, baked, data)
    (row,) = found.diff()
    assert (row.parameter, row.shape, row.changed) == ("transformer.h.0.mlp.c_proj.weight", (24, 16), 2 * 16)
    weight = before.module.get_parameter(row.parameter).detach()
    assert row.largest_change == pytest.approx(float(weight[[3, 4]].abs().max()))
    size = sum(each.numel() for each in before.module.parameters())
    assert (
        f"1 of {len(list(before.module.parameters()))} weight tensors changed: 32 of {size:,} parameters"
        in found.sentences
    )
    # Only what was done since: the model before has been edited too.
    later = report(baked, prune(baked, pc.Neurons({"mlp.0": [3], "mlp.1": [3]})), data)
    assert later.changes[0].before == found.changes[0].after
    assert f"{size:,} parameters became {size - 2 * (2 * 16 + 1):,}" in " ".join(later.sentences)
    assert {each.shape for each in later.diff()} == {(16, 23), (23, 16), (23,)}
    assert all(each.changed is None for each in later.diff())
    untied = report(before, damp_components(before, [2], 0.5), data)
    (row,) = untied.diff()
    # It was there before, as another name of the embedding.
    assert row.parameter == "lm_head.weight" and row.shape_before == row.shape and row.changed
    assert report(before, before, data).sentences[-1] == f"no weight changed: all {size:,} are as they were"


def test_only_the_last_edit_is_told_where_the_model_before_was_edited() -> None:
    before = model()
    first = bake(before, pc.ablate(pc.Neurons({"mlp.0": [1]})))
    second = bake(first, pc.scale(pc.Neurons({"mlp.0": [0]}), 3.0))
    told = [report(each, second, ("accuracy", classes(0, 20))).steps for each in (before, first, second)]
    assert [len(each) for each in told] == [2, 1, 0] and told[1] == told[0][1:]


# Leaving ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would see: tags, and texts between them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_lets_no_text_be_more_than_text(tmp_path: Path) -> None:
    before, after = decoder(), bake(decoder(), pc.ablate(pc.Neurons({"mlp.0": [3]})))
    before.name = after.name = f"model {EVIL}"

    def loud(asked: pc.Model, batch: Any) -> np.ndarray:
        return batch.examples + 0.5

    loud.__name__ = EVIL
    data = (loud, list(TEXTS))
    found = report(
        before, after, {EVIL: data}, {f"guard {EVIL}": data}, prompts=["<script>"], title=EVIL, max_new_tokens=2
    )
    found.continuations[0].__dict__["after"] = EVIL  # what a network says is not ours either
    found.steps.append(EVIL)
    found.save(tmp_path / "report")
    for text in ((tmp_path / "report" / "report.html").read_text(encoding="utf-8"), found._repr_html_()):
        page = Page(text)
        assert "<script" not in text and "script" not in page.tags
        assert {"h1", "table", "svg", "pre"} <= set(page.tags)
        assert sum(EVIL in each for each in page.texts) >= 6
        assert not {"src", "href", "onload", "onerror", "onclick"} & {name for name, _ in page.attributes}
        assert "@import" not in text and "url(" not in text and "http" not in text
        assert "prefers-color-scheme: dark" in text
    kept = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert kept["title"] == EVIL and kept["changes"][0]["name"] == EVIL
    assert kept["sentences"] == found.sentences and kept["weights_sha256"] == list(found.weights_sha256)
    assert sorted(each.name for each in (tmp_path / "report").iterdir()) == ["report.html", "report.json"]
    found.save(tmp_path / "report")  # again, in its place
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot write"):
        found.save(tmp_path / "file")


def test_each_sentence_is_on_the_page() -> None:
    before = model()
    after = prune(before, pc.Neurons({"mlp.0": [0]}))
    found = report(before, after, {"first": ("accuracy", classes(0))}, {"second": ("accuracy", classes(1))})
    seen = " ".join(" ".join(Page(found.to_html()).texts).split()).lower()
    for sentence in [*found.sentences, *found.steps, found.title, "what was to stay as it was"]:
        assert sentence.lower() in seen


def test_bad_input_is_said() -> None:
    one, two = model(), decoder()
    for act, error, match in [
        (lambda: report(one, one, {}), DataError, "given no target"),
        (lambda: report(one, one, {"x": "accuracy"}), DataError, r"target 'x' is a pair \(metric, data\), not str"),  # type: ignore[dict-item]
        (lambda: report(one, one, ("accuracy", classes(0, 1))), DataError, "'target' has 1 example"),
        (lambda: report(one, one, ("acuracy", classes(0))), UnknownName, "no metric is called 'acuracy'"),
        (lambda: report(one, one, (lambda m, b: 1.0, classes(0))), DataError, "one number for each of"),
        (lambda: report(two, two, ("loss", list(TEXTS[:1] * 2)), draws=3), DataError, "too few"),
    ]:
        with pytest.raises(error, match=match):
            act()
    with pytest.raises(pc.errors.ModelError, match="cannot generate"):
        report(one, one, ("accuracy", classes(0)), prompts=["it"])
