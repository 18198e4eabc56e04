"""Explanations of neurons: what is seen and what is caused can differ, and both are counted right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve, precision_recall_fscore_support
from tests.raw import hooks_of
from torch import nn

import patchclamp as pc
from patchclamp.testbed.attribute_world import TrainedWorld, trained_attribute_world
from patchclamp.verify.explanations import interventional, observational

CONCEPT, OTHER, REST = ([f"{name}{number}" for number in range(8)] for name in ("bird", "tree", "word"))
WORDS = ["<pad>", "<start>", *CONCEPT, *OTHER, *REST, "then", "yes", "no"]
SITE, NEURONS = "module:fire", 32


class Planted(nn.Module):
    """Neuron 17 fires on CONCEPT and makes "yes" of "no". 18 does as 17, and nothing reads it. 19: half of each."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(len(WORDS), NEURONS)
        self.fire = nn.ReLU()
        self.read = nn.Linear(NEURONS, len(WORDS))
        with torch.no_grad():
            self.embed.weight.copy_(torch.randn(len(WORDS), NEURONS, generator=generator))
            self.read.weight.copy_(0.02 * torch.randn(len(WORDS), NEURONS, generator=generator))
            self.read.bias.fill_(-9.0)
            self.embed.weight[:, 17:20] = -1.0
            self.embed.weight[ids(CONCEPT), 17] = self.embed.weight[ids(CONCEPT), 18] = 1.0
            self.embed.weight[ids(CONCEPT[:4] + OTHER[:4]), 19] = 1.0
            self.read.weight[:, 17:20] = 0.0
            self.read.weight[WORDS.index("yes"), 17] = 10.0
            self.read.bias[WORDS.index("yes")], self.read.bias[WORDS.index("no")] = 0.0, 5.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.read(self.fire(self.embed(input_ids)).cumsum(1))


def ids(words: list[str]) -> list[int]:
    return [WORDS.index(each) for each in words]


@pytest.fixture(scope="module")
def model() -> pc.Model:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<start> $A", special_tokens=[("<start>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<start>")
    return pc.load(Planted().eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def known() -> TrainedWorld:
    return trained_attribute_world()


POSITIVES = [f"word0 {each} then" for each in CONCEPT]
NEGATIVES = [f"word1 {each} then word2" for each in OTHER]
PAIRS: list[tuple[Any, ...]] = [
    (f"word0 {one} then", f"word0 {two} then", "yes", "no") for one, two in zip(CONCEPT, OTHER, strict=True)
]
PAIRS += [(source, base, "no", "yes") for base, source, _, _ in PAIRS]


def at(*indices: int) -> pc.Neurons:
    return pc.Neurons({SITE: indices})


# Seen from outside ----------------------------------------------------------------------------------


def test_planted_neurons_seen_from_outside(model: pc.Model) -> None:
    for index, expected in ((17, 1.0), (18, 1.0), (19, 0.5)):
        seen = observational(model, f"{SITE}:{index}", POSITIVES, NEGATIVES)
        assert (seen.precision, seen.recall, seen.f1) == (expected, expected, expected)
        assert (seen.type_1, seen.type_2) == (1 - expected, 1 - expected)
    nobody = observational(model, f"{SITE}:17", POSITIVES, NEGATIVES, threshold=2.0)
    assert (nobody.precision, nobody.recall, nobody.f1, nobody.type_2) == (0.0, 0.0, 0.0, 1.0)


def test_an_explanation_of_tokens(model: pc.Model) -> None:
    texts = POSITIVES + NEGATIVES
    for explanation in (set(CONCEPT), lambda tokens: [each.strip() in CONCEPT for each in tokens]):
        seen = observational(model, f"{SITE}:19", explanation=explanation, texts=texts)
        assert len(seen.values) == 8 * 3 + 8 * 4 and seen.refers.sum() == 8
        assert (seen.precision, seen.recall) == (0.5, 0.5)
        assert seen.type_1 == pytest.approx(4 / (56 - 8))
        assert observational(model, f"{SITE}:18", explanation=explanation, texts=texts).f1 == 1.0


def test_only_the_part_that_refers_counts(model: pc.Model) -> None:
    """Every text has a bird in it; only in half of them is it what is looked at."""
    yes = [(f"{each} word3 tree1", each) for each in CONCEPT]
    no = [(f"{each} word3 tree1", "word3") for each in CONCEPT]
    assert observational(model, f"{SITE}:17", yes, no).f1 == 1.0
    whole = observational(model, f"{SITE}:17", [text for text, _ in yes], [text for text, _ in no])
    assert whole.type_1 == 1.0 and whole.precision == 0.5


def test_figures_are_those_of_scikit_learn(model: pc.Model) -> None:
    texts = [f"{one} {two} then" for one in CONCEPT[:6] for two in OTHER[:5] + REST[:4]]
    for index in (3, 8, 19):
        for threshold in (0.0, 0.7):
            seen = observational(model, (SITE, index), texts[::2], texts[1::2], threshold=threshold)
            active = seen.values > threshold
            expected = precision_recall_fscore_support(seen.refers, active, average="binary")
            assert (seen.precision, seen.recall, seen.f1) == pytest.approx(expected[:3])
        precision, recall, thresholds = precision_recall_curve(seen.refers, seen.values)
        np.testing.assert_allclose(seen.curve[::-1], np.stack([thresholds, precision[:-1], recall[:-1]], 1))


def test_a_recording_says_the_same(model: pc.Model) -> None:
    recording = pc.record(model, POSITIVES + NEGATIVES, SITE, [pc.Pooled("max", dtype="float32")], progress=False)
    for index in (17, 19, 4):
        one = observational(model, (SITE, index), POSITIVES, NEGATIVES)
        two = observational(recording, (SITE, index), range(8), range(8, 16))
        np.testing.assert_allclose(one.values, two.values, rtol=1e-6)
        assert (one.f1, one.type_1) == (two.f1, two.type_1)
    with pytest.raises(pc.errors.DataError, match="numbers from 0 to 15"):
        observational(recording, f"{SITE}:17", [16], [0])
    with pytest.raises(pc.errors.DataError, match="one value for each example"):
        observational(recording, f"{SITE}:17", explanation=set(CONCEPT), texts=POSITIVES)


# As a cause -----------------------------------------------------------------------------------------


def test_planted_neurons_as_causes(model: pc.Model) -> None:
    for neurons, expected in ((at(17), 1.0), (at(18), 0.0), (at(19), 0.0), (at(17, 18), 1.0)):
        found = interventional(model, neurons, PAIRS)
        assert found.iia == expected and found.changed.mean() == expected
        assert found.layer == 1.0 and (found.pairs, found.unknown) == (16, 0)
    assert interventional(model, at(17), PAIRS, controls=20).p < 0.2
    assert interventional(model, at(18), PAIRS).p == 1.0
    # A third of all others is drawn, and 17 is among them now and then.
    many = interventional(model, at(*range(8)), PAIRS, controls=40)
    assert set(many.random) == {0.0, 1.0} and many.iia == 0.0


def test_it_is_the_same_again_and_leaves_nothing_behind(model: pc.Model) -> None:
    before = hooks_of(model.module)
    one, two, other = (interventional(model, at(*range(8)), PAIRS, controls=30, seed=seed) for seed in (0, 0, 100))
    assert np.array_equal(one.random, two.random) and not np.array_equal(one.random, other.random)
    assert hooks_of(model.module) == before


def test_places_that_go_together(model: pc.Model) -> None:
    longer = [(base, f"word1 {source}", *answers, [(2, 3)]) for base, source, *answers in PAIRS]
    assert interventional(model, at(17), longer).iia == 1.0
    elsewhere = [(base, f"word1 {source}", *answers, [(1, 2)]) for base, source, *answers in PAIRS]
    assert interventional(model, at(17), elsewhere).iia == 0.0
    with pytest.raises(pc.errors.DataError, match=r"pair 1: .* has 4 tokens and .* has 5"):
        interventional(model, at(17), [PAIRS[0], longer[1][:4]])


def test_unknown_answers_and_answers_among_two(model: pc.Model) -> None:
    wrong = [(base, source, "no", "yes") for base, source, _, _ in PAIRS[:4]]
    found = interventional(model, at(17), [*PAIRS, *wrong])
    assert (found.pairs, found.unknown, found.iia) == (16, 4, 1.0)
    with pytest.raises(pc.errors.DataError, match="none of the 4 pairs"):
        interventional(model, at(17), wrong)
    # "then" never comes first of all, but before "no" where 17 is silent it does not come either.
    rare = [(base, source, "yes", "word7") for base, source, *_ in PAIRS[:8]]
    assert interventional(model, at(17), rare, known=False).iia == 0.0
    two = interventional(model, at(17), [(*each[:2], "yes", "no") for each in rare], among="answers")
    assert two.iia == 1.0


@torch.no_grad()
def test_the_interchange_is_that_of_plain_pytorch(known: TrainedWorld) -> None:
    """Two thirds of the coordinates after a block of a trained decoder, at the token in which two prompts differ."""
    world, module = known.world, known.model.module
    pairs = []
    for one, two in zip(world.entities[:40], world.entities[1:41], strict=True):
        for kind in ("trade", "animal"):
            texts, answers = zip(
                *((world.templates[kind][0].format(each), world.value(each, kind)) for each in (one, two)), strict=True
            )
            if answers[0] != answers[1]:
                pairs.append((*texts, *answers))
    reader, neurons = known.model.tokenizer, [each for each in range(64) if each % 3]
    block = module.get_submodule("transformer.h.0")
    expected = []
    for base, source, _, answer in pairs:
        seen: list[torch.Tensor] = []

        def keep(_module: nn.Module, _args: Any, output: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(first(output).clone())

        handle = block.register_forward_hook(keep)
        module(torch.tensor([reader(source)["input_ids"]]))
        handle.remove()

        def put(_module: nn.Module, _args: Any, output: Any, seen: list[torch.Tensor] = seen) -> None:
            first(output)[0, 1, neurons] = seen[0][0, 1, neurons]

        handle = block.register_forward_hook(put)
        logits = module(torch.tensor([reader(base)["input_ids"]])).logits[0, -1]
        handle.remove()
        expected.append(int(logits.argmax()) == reader.get_vocab()[answer])
    found = interventional(known.model, pc.Neurons({"resid_post.0": neurons}), pairs, controls=0)
    assert found.changed.tolist() == expected and 0 < sum(expected) < len(expected)


def first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_bad_input_is_said(model: pc.Model) -> None:
    neuron, pair = f"{SITE}:17", PAIRS[0]
    seen: list[tuple[dict[str, Any], str]] = [
        ({"positives": [], "negatives": NEGATIVES}, "no example that refers"),
        ({"positives": POSITIVES, "negatives": []}, "no example that does not refer"),
        ({"positives": POSITIVES}, "give positives and negatives"),
        ({}, "give positives and negatives"),
        ({"positives": [("word0", "bird")], "negatives": NEGATIVES}, "'bird' is not in 'word0'"),
        ({"positives": "word0", "negatives": NEGATIVES}, "lists of texts"),
        ({"explanation": {"nothing"}, "texts": POSITIVES}, "no example that refers"),
        ({"explanation": lambda tokens: [True], "texts": POSITIVES}, "1 truth values for 4 tokens"),
    ]
    for given, match in seen:
        with pytest.raises(pc.errors.DataError, match=match):
            observational(model, neuron, **given)
    with pytest.raises(pc.errors.UnknownName, match="neurons 0 to 31"):
        observational(model, f"{SITE}:32", POSITIVES, NEGATIVES)
    caused: list[tuple[list[Any], dict[str, Any], str]] = [
        ([], {}, "no pairs"),
        ([pair, (*pair[:2], "yes", "yes")], {}, "pair 1: base and source have one answer"),
        ([pair, (pair[0], pair[0], "yes", "no")], {}, "pair 1: base and source are the same text"),
        ([(*pair[:3], "word0 word1")], {}, "pair 0: the answer 'word0 word1' has 2 tokens"),
        ([(*pair, [(9, 0)])], {}, "have no places"),
        ([pair[:3]], {}, "pair 0 is"),
        ([pair], {"controls": 2}, "at least 5 sets"),
        ([pair], {"among": "all"}, "among is"),
    ]
    for pairs, given, match in caused:
        with pytest.raises(pc.errors.DataError, match=match):
            interventional(model, at(17), pairs, **given)
    with pytest.raises(pc.errors.DataError, match="no neurons"):
        interventional(model, pc.Neurons(), PAIRS)
    with pytest.raises(pc.errors.UnknownName, match="does not exist"):
        interventional(model, at(99), PAIRS, controls=0)
