"""The small trained networks: each is there, is loaded as it was saved, and does better than stated baselines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import patchclamp as pc
from patchclamp.testbed import languages, modular, shapes, training
from patchclamp.testbed.trained import NAMES, WEIGHTS, Trained, trained

KEPT = [(facts.parent.parent.name, int(facts.parent.name[5:])) for facts in sorted(WEIGHTS.glob("*/seed-*/facts.json"))]
SITES = {
    "python_docs": {f"mlp.{layer}": 256 for layer in range(3)},
    "four_languages": {f"{kind}.{layer}": 160 for kind in ("mlp", "gate") for layer in range(3)},
    "shapes": {"conv.features.0": 16, "conv.features.3": 32, "conv.features.6": 48, "conv.features.9": 64},
    "modular_addition": {"mlp.0": modular.NEURONS},
    "digits": {"mlp.0": 64, "mlp.1": 32},
}


@pytest.fixture(scope="module")
def docs() -> Trained:
    return trained("python_docs")


@pytest.fixture(scope="module")
def held_out_docs(docs: Trained) -> pc.Texts:
    assert isinstance(docs.held_out, pc.Texts)
    return docs.held_out.take(300)


@pytest.fixture(scope="module")
def four() -> Trained:
    return trained("four_languages")


# All of them ------------------------------------------------------------------------------------


def test_what_is_there() -> None:
    assert {name for name, _ in KEPT} == set(NAMES)
    assert {("python_docs", 0), ("python_docs", 1)} <= set(KEPT)
    assert trained("python_docs").checkpoints == ("early", "middle", "last")
    assert trained("python_docs", seed=1).checkpoints == ("middle", "last")


def test_all_files_are_small() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 4_600_000


def test_weights_are_stored_as_float16_and_run_as_float32() -> None:
    for file in WEIGHTS.rglob("*.safetensors"):
        assert {each.dtype for each in load_file(file).values()} <= {torch.float16, torch.int64}
    for name, seed in KEPT:
        module = trained(name, seed=seed).model.module
        assert not module.training
        assert {each.dtype for each in module.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "seed"), KEPT)
def test_sites_are_found(name: str, seed: int) -> None:
    model = trained(name, seed=seed).model
    found = {site: model.site(site).size for site in model.sites if site.split(".")[0] in ("mlp", "gate", "conv")}
    assert found == SITES[name]
    assert model.name == f"testbed {name}, seed {seed}, last"


@pytest.mark.parametrize("name", ["digits", "modular_addition", "shapes", "four_languages"])
def test_facts_are_what_is_measured(name: str) -> None:
    one = trained(name)
    measured = one.score()
    assert not one.model.module.training
    for key in ("loss", "accuracy"):
        assert measured[key] == pytest.approx(one.facts[key], rel=1e-3, abs=1e-5)
    assert training.data_sha256(one.held_out) == one.facts["held_out_sha256"]
    assert one.facts["parameters"] == sum(each.numel() for each in one.model.module.parameters())
    assert {"seconds", "threads", "python", "versions", "step"} <= one.facts.keys()
    first = trained(name, checkpoint=one.checkpoints[0])
    assert first.facts["loss"] >= one.facts["loss"] and first.facts["step"] <= one.facts["step"]


def test_every_network_can_be_recorded(held_out_docs: pc.Texts) -> None:
    for name in NAMES:
        one = trained(name)
        data = one.held_out if name in ("digits", "modular_addition") else None
        if name == "python_docs":
            data = held_out_docs.take(20)
        elif name == "four_languages":
            data = languages.documents(20)
        elif name == "shapes":
            data = shapes.draw(20, seed=2).to_images()
        sites = [each for each in SITES[name] if not each.startswith("gate")]
        recording = pc.record(one.model, data, sites, [pc.FiringRate()], progress=False)
        for site in sites:
            rate = recording[site].firing_rate.rate
            assert 0.01 < np.mean(rate) < 0.9, f"{name} {site}"


def test_weights_are_refused_where_numpy_makes_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "vocabulary_sha256", lambda: "other")
    with pytest.raises(pc.errors.DataError, match="trained with numpy"):
        trained("four_languages")


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(pc.errors.UnknownName, match="python_docs"):
        trained("python_doc")
    with pytest.raises(pc.errors.UnknownName, match="seed of shapes"):
        trained("shapes", seed=7)
    with pytest.raises(pc.errors.UnknownName, match="middle"):
        trained("python_docs", checkpoint="midle")


# Each against a baseline ------------------------------------------------------------------------


def test_digits_and_shapes_are_told() -> None:
    """By their facts, which another test measures again."""
    for seed in (0, 1):
        assert trained("digits", seed=seed).facts["accuracy"] > 0.95
    found = trained("shapes").facts
    assert min(found[f"accuracy_{head}"] for head in ("shape", "colour", "texture")) > 0.9


def test_modular_addition_found_the_rule() -> None:
    """Right on pairs that it never saw in either order, where after memorising alone it was wrong."""
    one, early = trained("modular_addition"), trained("modular_addition", checkpoint="early")
    assert isinstance(one.held_out, pc.Tensors) and isinstance(one.data, pc.Tensors)
    seen = {tuple(pair) for pair in one.data.values.tolist()}
    assert not any((a, b) in seen or (b, a) in seen for a, b in one.held_out.values.tolist())
    assert len(one.data) + len(one.held_out) == 113**2
    assert one.score()["accuracy"] > 0.98
    assert early.score(early.data)["accuracy"] > 0.98 and early.score()["accuracy"] < 0.1
    assert _wave_share(one) > 0.5 > 0.25 > _wave_share(early)


def test_four_languages_comes_near_the_entropy_and_knows_the_language(four: Trained) -> None:
    texts = languages.documents(200, seed=2)
    entropy = languages.entropy(each.text for each in texts)
    assert entropy < four.score(texts)["loss"] < 1.08 * entropy
    assert four.facts["vocabulary_sha256"] == languages.vocabulary_sha256()
    tokenizer = four.model.tokenizer
    for name in languages.NAMES:
        own = [tokenizer.convert_tokens_to_ids(word) for word in languages.vocabulary(name)]
        of_language = [each.text for each in texts if each.labels["language"] == name]
        ids = torch.tensor([tokenizer(text)["input_ids"][:30] for text in of_language])
        with torch.no_grad():
            chances = four.model.module(input_ids=ids).logits.softmax(-1)[:, 4:]
        assert chances[..., own].sum(-1).mean() > 0.995


def test_a_shared_word_is_followed_by_words_of_the_language_it_is_in(four: Trained) -> None:
    tokenizer, word = four.model.tokenizer, None
    shared = [word for word in languages.vocabulary("ardi") if languages.owners(word) == ("ardi", "bela")]
    for name in ("ardi", "bela"):
        own = {each for each in languages.vocabulary(name) if languages.owners(each) == (name,)}
        start = next(each.text for each in languages.documents(4, seed=2) if each.labels["language"] == name).split()
        place = start.index("." if "." in start else ",")
        for word in [each for each in shared if languages.vocabulary(name)[each] == "noun"][:3]:
            article = next(each for each in own if languages.vocabulary(name)[each] == "determiner")
            ids = torch.tensor([tokenizer(" ".join([*start[: place + 1], article, word]))["input_ids"]])
            with torch.no_grad():
                following = tokenizer.convert_ids_to_tokens(
                    int(four.model.module(input_ids=ids).logits[0, -1].argmax())
                )
            assert name in languages.owners(following)


def test_four_languages_needs_its_neurons(four: Trained) -> None:
    texts = languages.documents(80, seed=2)
    before = four.score(texts)["loss"]
    with four.model.intervene(pc.ablate(four.model.neurons("mlp.*"))):
        assert four.score(texts)["loss"] > before + 1
    assert four.score(texts)["loss"] == before


def test_python_docs_is_better_than_counting_and_learns(docs: Trained, held_out_docs: pc.Texts) -> None:
    tokenizer = docs.model.tokenizer
    ids = np.concatenate([tokenizer(each.text)["input_ids"][1:] for each in held_out_docs])
    share = np.bincount(ids) / len(ids)
    unigram = -float((share[share > 0] * np.log(share[share > 0])).sum())
    losses = [trained("python_docs", checkpoint=each).score(held_out_docs)["loss"] for each in docs.checkpoints]
    assert unigram > losses[0] > losses[1] + 0.2 and losses[1] > losses[2] + 0.1
    assert losses[2] < 0.6 * unigram
    assert losses[2] == pytest.approx(docs.facts["loss"], rel=0.05)
    other = trained("python_docs", seed=1)
    assert other.score(held_out_docs)["loss"] == pytest.approx(losses[2], abs=0.1)
    one, two = (each.model.module.get_parameter("transformer.wte.weight") for each in (docs, other))
    assert not torch.allclose(one, two, atol=0.1)


def test_python_docs_holds_out_what_it_never_read(docs: Trained) -> None:
    assert isinstance(docs.data, pc.Texts) and isinstance(docs.held_out, pc.Texts)
    seen, held_out = ({each.text for each in data} for data in (docs.data, docs.held_out))
    assert not seen & held_out
    assert 0.08 < len(held_out) / (len(seen) + len(held_out)) < 0.12
    assert docs.held_out.labels == {"kind": ("code", "docstring", "topics")}


def _wave_share(of: Trained) -> float:
    """How much of what a neuron is given, as a function of one number, is a wave of a single frequency; the mean."""
    module = of.model.module
    given = module.get_parameter("layer.0.weight") @ module.get_parameter("embedding.weight").T
    power = torch.fft.rfft(given.detach() - given.detach().mean(1, keepdim=True)).abs() ** 2
    return float((power.max(1).values / power.sum(1)).mean())


# The scripts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LANGUAGE_DOCUMENTS", 64)
    monkeypatch.setattr(training, "IMAGES", 500)
    if name == "python_docs":
        monkeypatch.setattr(training, "training_data", lambda *_args, **_how: languages.documents(80))
    few = shapes.draw(50).to_images() if name == "shapes" else languages.documents(8)
    if name in ("python_docs", "four_languages", "shapes"):
        monkeypatch.setattr(training, "held_out_data", lambda *_args, **_how: few)
    made = []
    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        facts = training.train(name, seed, steps=2, weights=tmp_path / folder)
        kept = tmp_path / folder / name / f"seed-{seed}"
        assert json.loads((kept / "facts.json").read_text()) == facts
        assert facts["checkpoints"]["last"]["step"] == 2
        file = kept / "last" / "model.safetensors"
        assert {each.dtype for each in load_file(file).values()} <= {torch.float16, torch.int64}
        made.append(file.read_bytes())
    assert made[0] == made[1] and made[0] != made[2]
