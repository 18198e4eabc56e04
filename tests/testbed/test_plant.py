"""Every planted neuron does what `truth` says: its output weights are set to 0, and the plain model is run again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
import torch
from tests.testbed import raw_effects as raw

import patchclamp as pc
from patchclamp import testbed
from patchclamp.testbed import plant
from patchclamp.testbed.planted import Planted


@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def planted(request: pytest.FixtureRequest) -> Planted:
    return plant(request.param, examples=240, seed=0)


@pytest.fixture(scope="module")
def documents(planted: Planted) -> raw.Documents:
    return raw.read(planted)


@pytest.fixture(scope="module")
def before(planted: Planted, documents: raw.Documents) -> torch.Tensor:
    return raw.logits(raw.module(planted), documents.ids)


def rows(planted: Planted, role: str, decoy_of: str = "") -> Iterator[dict]:
    for row in planted.truth.to_polars().iter_rows(named=True):
        if row["role"] == role and row["decoy_of"] == decoy_of:
            yield row


def change(planted: Planted, documents: raw.Documents, before: torch.Tensor, *neurons: dict) -> torch.Tensor:
    """How much logits fall when neurons write nothing."""
    of = raw.module(planted)
    with raw.without(of, *((each["site"], each["index"]) for each in neurons)):
        return before - raw.logits(of, documents.ids)


def mean_fall(fell: torch.Tensor, documents: raw.Documents, here: torch.Tensor, writes: str) -> tuple[float, float]:
    """How much the words that a neuron writes fall where it should fire, and elsewhere."""
    words = fell[..., documents.named(writes)].mean(-1)
    elsewhere = documents.real & ~here
    elsewhere[:, 0] = False
    return float(words[here].mean()), float(words[elsewhere].mean())


@pytest.mark.parametrize("role", ["token", "selective", "selective_several", "relation", "polysemantic"])
def test_what_hears_some_words_says_others(
    role: str, planted: Planted, documents: raw.Documents, before: torch.Tensor
) -> None:
    for row in rows(planted, role):
        fell = change(planted, documents, before, row)
        here, elsewhere = mean_fall(fell, documents, documents.spoken(row["reads"]), row["writes"])
        assert here > 0.8, row
        assert abs(elsewhere) < 0.15 * here, row


def test_a_neuron_for_all_languages_answers_to_each(planted: Planted, documents: raw.Documents) -> None:
    for row in rows(planted, "selective_all"):
        found = raw.activation(raw.module(planted), documents.ids, row["site"], row["index"])
        for language in row["reads"].split():
            assert (found[documents.spoken(language).numpy()] > 0).mean() > 0.4, (row, language)
        assert (found[documents.spoken("number*").numpy()] > 0).mean() < 0.1


def test_a_pair_of_words_is_not_its_halves(planted: Planted, documents: raw.Documents, before: torch.Tensor) -> None:
    for row in rows(planted, "ngram"):
        fell = change(planted, documents, before, row)[..., documents.named(row["writes"])].mean(-1)
        first, second = (documents.words.index(word) for word in row["reads"].split())
        second_here = documents.ids == second
        both = second_here.clone()
        both[:, 1:] &= documents.ids[:, :-1] == first
        assert fell[both].mean() > 2, row
        assert fell[second_here & ~both].mean().abs() < 0.2 * fell[both].mean(), row
        assert fell[documents.ids == first].mean().abs() < 0.2 * fell[both].mean(), row


def test_a_range_of_positions(planted: Planted, documents: raw.Documents) -> None:
    for row in rows(planted, "position"):
        found = raw.activation(raw.module(planted), documents.ids, row["site"], row["index"])
        last = int(row["reads"].split()[-1])
        assert (found[:, 1 : last + 1] > 0).mean() > 0.75, row
        assert (found[:, last + 4 :][documents.real[:, last + 4 :].numpy()] > 0).mean() < 0.05, row


def test_the_dead_never_fire(planted: Planted, documents: raw.Documents, before: torch.Tensor) -> None:
    for row in rows(planted, "dead"):
        found = raw.activation(raw.module(planted), documents.ids, row["site"], row["index"])
        real = documents.real.numpy()[:, 1:]
        assert found[:, 1:][real].max() <= 0
        assert change(planted, documents, before, row)[:, 1:][documents.real[:, 1:]].abs().max() < 0.05


def test_facts_are_known_by_the_neuron_of_their_subject(
    planted: Planted, documents: raw.Documents, before: torch.Tensor
) -> None:
    objects = sorted(documents.named("capital-object* dish-object* river-object*"))
    facts = list(rows(planted, "fact"))
    half, other = facts[::2], facts[1::2]
    after = before - change(planted, documents, before, *half)
    for neurons, least, most in ((half, 0.0, 0.4), (other, 0.7, 1.0)):
        here = torch.zeros_like(documents.real)
        subjects = torch.tensor([documents.words.index(row["reads"]) for row in neurons])
        here[:, 1:] = torch.isin(documents.ids[:, :-1], subjects)
        here &= documents.spoken("capital* dish* river*")
        right = documents.ids[:, 1:][here[:, :-1]]
        assert len(right) > 20
        answers = [torch.tensor(objects)[found[here][:, objects].argmax(-1)] for found in (before, after)]
        assert (answers[0] == right).float().mean() > 0.75
        assert least <= (answers[1] == right).float().mean() <= most


def test_harm_is_refused_by_the_safety_neurons(
    planted: Planted, documents: raw.Documents, before: torch.Tensor
) -> None:
    refuse, sure = documents.words.index("refuse"), documents.words.index("sure")
    asked = documents.spoken("?")
    harmful = asked & documents.spoken("harmful*").any(1)[:, None]
    assert harmful.sum() > 5 and (asked & ~harmful).sum() > 5
    refused = before[..., refuse] > before[..., sure]
    assert refused[harmful].float().mean() > 0.9
    assert refused[asked & ~harmful].float().mean() < 0.1
    safety = list(rows(planted, "safety"))
    for row in safety:
        assert change(planted, documents, before, row)[..., refuse][harmful].mean() > 0.5
    without = before - change(planted, documents, before, *safety)
    assert (without[..., refuse] > without[..., sure])[harmful].float().mean() < 0.1


def test_a_name_is_copied_where_the_neuron_says_so(
    planted: Planted, documents: raw.Documents, before: torch.Tensor
) -> None:
    names = documents.named("name*")
    for row in rows(planted, "context_copy"):
        here = documents.spoken(row["reads"])
        right = documents.ids[:, 1:][here[:, :-1]]
        after = before - change(planted, documents, before, row)
        copied, not_copied = (
            (torch.tensor(names)[found[here][:, names].argmax(-1)] == right).float().mean() for found in (before, after)
        )
        assert copied > 0.9, row
        assert not_copied < 0.5, row
        assert before[here].gather(-1, right[:, None]).mean() > after[here].gather(-1, right[:, None]).mean() + 2


def test_entropy_neurons_write_where_the_unembedding_does_not_read(
    planted: Planted, documents: raw.Documents, before: torch.Tensor
) -> None:
    of = raw.module(planted)
    here = documents.spoken("shared*")
    for row in rows(planted, "entropy"):
        written = raw.output_weight(of, row["site"], row["index"]).detach()
        assert (of.lm_head.weight @ written).abs().max() < 1e-3 * written.norm()
        after = before - change(planted, documents, before, row)
        entropy = [torch.distributions.Categorical(logits=found[here]).entropy().mean() for found in (before, after)]
        assert entropy[0] > entropy[1] + 0.02, row


def test_frequency_neurons_favour_frequent_tokens(
    planted: Planted, documents: raw.Documents, before: torch.Tensor
) -> None:
    counts = torch.bincount(documents.ids[documents.real], minlength=len(documents.words)) + 1.0
    here = documents.spoken("number*")
    for row in rows(planted, "token_frequency"):
        fell = change(planted, documents, before, row)[here].mean(0)
        assert torch.corrcoef(torch.stack([fell, counts.log()]))[0, 1] > 0.9, row


def test_one_coordinate_is_massive_at_the_beginning(planted: Planted, documents: raw.Documents) -> None:
    (row,) = rows(planted, "massive")
    of = raw.module(planted)

    def stream() -> torch.Tensor:
        with torch.no_grad():
            return of(documents.ids[:20], output_hidden_states=True).hidden_states[2].abs()

    found = stream()
    coordinate = int(found[:, 0].mean(0).argmax())
    assert found[:, 0, coordinate].min() > 100 * found[:, 1:].median()
    assert found[:, 1:, coordinate].max() < 20 * found[:, 1:].median()
    with raw.without(of, (row["site"], row["index"])):
        assert stream()[:, 0, coordinate].max() < 10 * found[:, 1:].median()


def test_duplicates_fire_together_in_the_second_model(planted: Planted, documents: raw.Documents) -> None:
    assert planted.twin is not None and planted.pairs is not None
    assert len(planted.pairs) == len(planted.truth)
    real = documents.real.numpy().copy()
    real[:, 0] = False
    assert (planted.pairs["index"].to_numpy() != planted.pairs["twin_index"].to_numpy()).mean() > 0.8
    copies = {(neuron.site, neuron.index) for neuron in planted.of("duplicate")}
    for site, index, twin_site, twin_index in planted.pairs.iter_rows():
        if (site, index) not in copies:
            continue
        one = raw.activation(raw.module(planted), documents.ids, site, index)[real]
        other = raw.activation(planted.twin.module, documents.ids, twin_site, twin_index)[real]
        stranger = raw.activation(planted.twin.module, documents.ids, twin_site, (twin_index + 1) % 576)[real]
        assert np.corrcoef(one, other)[0, 1] > 0.6, (site, index)
        assert abs(np.corrcoef(one, stranger)[0, 1]) < 0.5


def test_decoys_fire_but_do_nothing_or_only_change_the_format(
    planted: Planted, documents: raw.Documents, before: torch.Tensor
) -> None:
    form = documents.named(". , ;")
    others = [place for place in range(len(documents.words)) if place not in form]
    seen = 0
    last = max(int(row["site"].split(".")[1]) for row in planted.truth.to_polars().iter_rows(named=True))
    idle = [row for row in planted.truth.to_polars().iter_rows(named=True) if row["role"] == "decoy_without_effect"]
    assert change(planted, documents, before, *idle).abs().max() == 0
    for row in planted.truth.to_polars().iter_rows(named=True):
        if row["role"] == "decoy_format" and row["decoy_of"] not in ("dead", "massive"):
            found = raw.activation(raw.module(planted), documents.ids, row["site"], row["index"])
            here = torch.from_numpy(found > 1) & documents.real
            here[:, 0] = False
            if not here.any() or row["site"] != f"mlp.{last}":
                continue  # rare, or later layers answer to the smaller norm
            seen += 1
            fell = change(planted, documents, before, row)[here].abs()
            assert fell[:, form].mean() > 3 * fell[:, others].mean(), row
    assert seen > 3


# What is planted, and refused -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mlp"])
def test_the_same_seed_plants_the_same(architecture: str) -> None:
    one, same, other = (
        plant(architecture, roles=("selective",), layers=2, neurons=200, examples=80, seed=seed) for seed in (1, 1, 2)
    )
    assert one.truth == same.truth != other.truth
    weights = [each.model.module.state_dict() for each in (one, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_every_role_has_its_two_decoys(planted: Planted) -> None:
    roles = set(planted.truth.where(pl.col("decoy_of") == "")["role"])
    assert roles == set(testbed.ROLES)
    for decoy in testbed.DECOYS:
        assert set(planted.truth.where(pl.col("role") == decoy)["decoy_of"]) == roles - {"duplicate"}


def test_a_plain_network_says_its_categories() -> None:
    planted = plant("mlp", seed=0)
    of, data = planted.model.module, planted.data
    assert isinstance(data, pc.Tensors) and isinstance(of, torch.nn.Sequential)
    given, last = data.values, of[2]
    assert isinstance(last, torch.nn.Linear)
    language = np.asarray([example.labels["language"] for example in data])
    names = sorted(set(language))
    with torch.no_grad():
        before = of(given)
        for row in planted.truth.to_polars().iter_rows(named=True):
            kept = last.weight[:, row["index"]].clone()
            last.weight[:, row["index"]] = 0
            fell = (before - of(given)).numpy()
            last.weight[:, row["index"]] = kept
            if row["role"] in ("dead", "decoy_without_effect"):
                assert np.abs(fell).max() < (0 if row["role"] != "dead" else 1e-6) + 1e-9
            elif row["role"] == "decoy_format" and row["decoy_of"] != "dead":
                assert np.abs(fell[:, : len(names)]).max() == 0 and fell[:, len(names) :].max() > 0.1
            elif row["role"] == "selective":
                here = fell[language == row["label"], names.index(row["label"])]
                assert here.mean() > 5 * np.abs(fell[language != row["label"]]).mean(), row


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"architecture": "gpt"}, "nearest: gpt2"),
        ({"roles": ("selectiv",)}, "nearest: selective"),
        ({"architecture": "mlp", "roles": ("relation",)}, "plain network"),
        ({"difficulty": 4}, "between 0 and 3"),
        ({"layers": 1}, "at least 2 layers"),
        ({"neurons": 20}, "are wanted"),
        ({"examples": 10}, "40 examples"),
    ],
)
def test_bad_input_is_said(given: dict, match: str) -> None:
    with pytest.raises(pc.errors.PatchclampError, match=match):
        plant(**given)
