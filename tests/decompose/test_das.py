"""Distributed alignment search: planted planes are found, other attributes stay; the swap is that of plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tests.raw import hooks_of
from torch import nn

import patchclamp as pc
from patchclamp.decompose.das import Subspace, das, mdas
from patchclamp.decompose.interchange import Interchanges
from patchclamp.testbed.attribute_world import EntityPair, TrainedWorld, trained_attribute_world

VALUES, WIDTH, NAMES = 5, 12, ("a", "b", "c")
SITE = "module:mixed"
FAST = {"rate": 0.02, "batch": 32, "epochs": 20}


class Planted(nn.Module):
    """h = Q [a; b; c; noise]; each of a, b, c is one of five points of a plane, and one of them is asked for."""

    def __init__(self, seed: int = 0, rotated: bool = True) -> None:
        super().__init__()
        self.mixed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.read = nn.Linear(WIDTH, 3 * VALUES, bias=False)
        turn = (
            np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0] if rotated else np.eye(WIDTH)
        )
        reads = np.zeros((3 * VALUES, WIDTH))
        for number in range(3):
            reads[number * VALUES : (number + 1) * VALUES, 2 * number : 2 * number + 2] = points()
        with torch.no_grad():
            self.mixed.weight.copy_(torch.from_numpy(turn))
            self.read.weight.copy_(torch.from_numpy(reads @ turn.T))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.read(self.mixed(x[:, :WIDTH])).unflatten(1, (3, VALUES))
        return (logits * x[:, WIDTH:, None]).sum(1)

    def plane(self, number: int) -> Subspace:
        return Subspace.spanned_by(self.mixed.weight.detach()[:, 2 * number : 2 * number + 2].T)


def points() -> np.ndarray:
    turn = 2 * np.pi * np.arange(VALUES) / VALUES
    return 2 * np.stack([np.cos(turn), np.sin(turn)], 1)


class Swap(NamedTuple):
    base: Any
    source: Any
    base_position: int | None
    source_position: int | None
    attribute: str
    base_answer: Any
    source_answer: Any


@dataclass
class Entities:
    values: np.ndarray
    states: np.ndarray

    @classmethod
    def drawn(cls, count: int, seed: int, together: float = 0.0) -> Entities:
        made = np.random.default_rng(seed)
        values = made.integers(VALUES, size=(count, 3))
        bound = made.random(count) < together
        values[bound, 1] = values[bound, 0]
        planes = np.concatenate([points()[values[:, number]] for number in range(3)], 1)
        return cls(values, np.concatenate([planes, made.standard_normal((count, WIDTH - 6))], 1))

    def pairs(self, count: int, seed: int = 0) -> list[Swap]:
        made, found = np.random.default_rng(seed), []
        for number, name in enumerate(NAMES):
            asked = np.eye(3)[number]
            for base, source in made.integers(len(self.values), size=(count, 2)):
                one, two = (torch.from_numpy(np.append(self.states[each], asked)).float() for each in (base, source))
                answers = (int(self.values[base, number]), int(self.values[source, number]))
                found.append(Swap(one, two, None, None, name, *answers))
        return found


def rates(runs: Interchanges, feature: Subspace, attribute: str = "a") -> tuple[float, float]:
    """Cause, and the least of the others that stay."""
    cause = runs.right(runs.cause(attribute), "source", feature.swap).mean()
    stays = [runs.right(places, "base", feature.swap).mean() for places in runs.isolate(attribute).values()]
    return float(cause), float(min(stays))


@pytest.fixture(scope="module")
def model() -> pc.Model:
    return pc.load(Planted().eval())


@pytest.fixture(scope="module")
def fit(model: pc.Model) -> Interchanges:
    return Interchanges(model, SITE, Entities.drawn(60, 1).pairs(200))


@pytest.fixture(scope="module")
def held_out(model: pc.Model) -> Interchanges:
    return Interchanges(model, SITE, Entities.drawn(60, 2).pairs(150, seed=1))


@pytest.fixture(scope="module")
def known() -> TrainedWorld:
    return trained_attribute_world()


# Planted planes -------------------------------------------------------------------------------------


def test_mdas_finds_the_planted_plane(model: pc.Model, fit: Interchanges, held_out: Interchanges) -> None:
    for number, name in enumerate(NAMES[:2]):
        found = mdas(model, SITE, fit, name, 2, **FAST)
        assert found.angles(model.module.plane(number)).max() < 5  # type: ignore[operator]
        assert rates(held_out, found, name) == (1.0, 1.0)
        assert found.losses[-10:].mean() < found.losses[:10].mean() / 3


def test_where_attributes_go_together_only_the_multitask_loss_takes_them_apart(model: pc.Model) -> None:
    held_out = Interchanges(model, SITE, Entities.drawn(60, 4).pairs(150))
    apart, bound = (Interchanges(model, SITE, Entities.drawn(60, 3, share).pairs(200)) for share in (0.0, 1.0))
    assert rates(held_out, das(model, SITE, apart, "a", 2, **FAST)) == (1.0, 1.0)
    for seed in range(2):
        alone = rates(held_out, das(model, SITE, bound, "a", 2, **FAST, seed=seed))
        many = mdas(model, SITE, bound, "a", 2, **FAST, seed=seed)
        assert rates(held_out, many) == (1.0, 1.0) and many.angles(model.module.plane(0)).max() < 5  # type: ignore[operator]
        assert alone[1] < 0.9 and alone[0] < 0.9


def test_directions_to_spare_are_kept_off_other_attributes_by_the_multitask_loss_alone(model: pc.Model) -> None:
    fit = Interchanges(model, SITE, Entities.drawn(60, 3).pairs(200))
    held_out = Interchanges(model, SITE, Entities.drawn(60, 4).pairs(150))
    alone, many = (rates(held_out, method(model, SITE, fit, "a", 4, **FAST)) for method in (das, mdas))
    assert alone[0] == many[0] == many[1] == 1.0 and alone[1] < 0.95


def test_answers_that_have_nothing_to_do_with_the_sources_are_not_learned(model: pc.Model) -> None:
    def shuffled(seed: int) -> Interchanges:
        made, given = np.random.default_rng(seed), Entities.drawn(60, seed).pairs(150)
        return Interchanges(model, SITE, [each._replace(source_answer=int(made.integers(VALUES))) for each in given])

    runs = shuffled(6)
    found = mdas(model, SITE, shuffled(5), "a", 2, **FAST)
    assert rates(runs, found)[0] < 0.4 and found.losses[-20:].mean() > 0.5


def test_empty_whole_and_chosen_subspaces(model: pc.Model, held_out: Interchanges) -> None:
    assert rates(held_out, Subspace.empty(WIDTH)) == (0.0, 1.0)
    assert rates(held_out, Subspace.whole(WIDTH)) == (1.0, 0.0)
    plain = pc.load(Planted(rotated=False).eval())
    runs = Interchanges(plain, SITE, Entities.drawn(60, 2).pairs(150, seed=1))
    assert rates(runs, Subspace.of_neurons([0, 1], WIDTH)) == (1.0, 1.0)
    assert rates(runs, Subspace.of_neurons([2, 3], WIDTH), "b") == (1.0, 1.0)
    assert rates(runs, Subspace.of_neurons([6, 7, 8], WIDTH)) == (0.0, 1.0)


def test_it_is_the_same_again_and_leaves_nothing_behind(model: pc.Model, fit: Interchanges) -> None:
    module = model.module
    module.train()
    module.get_submodule("read").requires_grad_(False)
    try:
        before, state = hooks_of(module), torch.random.get_rng_state()
        weights = {name: each.clone() for name, each in module.state_dict().items()}
        one, two, other = (das(model, SITE, fit, "a", 3, rate=0.01, epochs=1, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(one.rows, two.rows) and not torch.equal(one.rows, other.rows)
        assert np.array_equal(one.losses, two.losses)
        assert hooks_of(module) == before and torch.equal(torch.random.get_rng_state(), state)
        assert [each.requires_grad for each in module.parameters()] == [True, False] and module.training
        assert all(torch.equal(each, weights[name]) for name, each in module.state_dict().items())
        assert all(each.grad is None for each in module.parameters())
    finally:
        module.get_submodule("read").requires_grad_(True)
        module.eval()


# Subspaces ------------------------------------------------------------------------------------------


def test_subspaces_by_hand() -> None:
    vectors = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 0.0]])
    plane = Subspace.spanned_by(vectors, "resid_post.0")
    torch.testing.assert_close(plane.rows @ plane.rows.T, torch.eye(2))
    base, source = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[7.0, 8.0, 9.0]])
    torch.testing.assert_close(plane.swap(base, source), torch.tensor([[7.0, 8.0, 3.0]]))
    assert plane.swap(base.half(), source.half()).dtype == torch.float16
    tilted = Subspace(torch.tensor([[np.cos(0.5), 0.0, np.sin(0.5)]], dtype=torch.float32))
    assert tilted.angles(plane) == pytest.approx([np.degrees(0.5)], abs=1e-3)
    assert plane.directions()["resid_post.0"].shape == (2, 3)
    states = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1.0, 0.1]) + 40
    assert Subspace.principal(states, 1).angles(Subspace.of_neurons([0], 3)).max() < 5
    assert plane.only([1]).k == 1 and Subspace.empty(3).k == 0


def test_bad_subspaces_are_said() -> None:
    for make, match in [
        (lambda: Subspace(torch.ones(2, 3)), "orthonormal"),
        (lambda: Subspace.spanned_by(torch.ones(2, 3)), "do not span 2"),
        (lambda: Subspace.of_neurons([1, 1], 3), "different numbers"),
        (lambda: Subspace.of_neurons([3], 3), "from 0 to 2"),
        (lambda: Subspace.principal(torch.randn(5, 3), 4), "1 to 3 principal"),
        (lambda: Subspace.empty(3).directions(), "no directions"),
        (lambda: Subspace.whole(3).directions(), "of which site"),
        (lambda: Subspace.whole(3).swap(torch.ones(1, 4), torch.ones(1, 4)), "3 dimensions, and states of 4"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            make()


# The swap in a language model -----------------------------------------------------------------------


def plain_swap(net: TrainedWorld, pair: EntityPair, rows: torch.Tensor, more: Sequence[int] = ()) -> torch.Tensor:
    """Logits after a base prompt and some tokens more, by plain PyTorch."""
    module, reader = net.model.module, net.model.tokenizer
    block = module.get_submodule("transformer.h.0")
    kept: list[torch.Tensor] = []

    def first(output: Any) -> torch.Tensor:
        return output if isinstance(output, torch.Tensor) else output[0]

    handle = block.register_forward_hook(lambda _m, _i, output: kept.append(first(output).clone()))
    module(torch.tensor([reader(pair.source)["input_ids"]]))
    handle.remove()

    def put(_module: nn.Module, _inputs: Any, output: Any) -> None:
        place = first(output)[0, pair.base_position]
        place += rows.T @ (rows @ (kept[0][0, pair.source_position] - place))

    handle = block.register_forward_hook(put)
    logits = module(torch.tensor([[*reader(pair.base)["input_ids"], *more]])).logits[0]
    handle.remove()
    return logits


@torch.no_grad()
def test_the_swap_is_that_of_plain_pytorch(known: TrainedWorld) -> None:
    pairs = known.world.pairs(6, templates="all")
    assert len({each.base_position for each in pairs}) > 2 and len({len(each.base.split()) for each in pairs}) > 2
    feature = Subspace.spanned_by(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)))
    ids = known.model.tokenizer.get_vocab()
    runs = Interchanges(known.model, known.site, pairs)
    for want in ("base", "source"):
        found = runs.losses(np.arange(len(pairs)), want, feature.swap)
        for number, pair in enumerate(pairs):
            logits = plain_swap(known, pair, feature.rows)[-1]
            assert float(found[number]) == pytest.approx(
                -float(logits.log_softmax(0)[ids[getattr(pair, f"{want}_answer")]]), abs=1e-3
            )


@torch.no_grad()
def test_answers_of_several_tokens(known: TrainedWorld) -> None:
    pairs = [each._replace(source_answer="cat Peru", base_answer=(5, 9)) for each in known.world.pairs(2)]
    ids = known.model.tokenizer.get_vocab()
    runs = Interchanges(known.model, known.site, pairs)
    feature = Subspace.of_neurons(range(30), 64)
    for want, answer in (("source", [ids["cat"], ids["Peru"]]), ("base", [5, 9])):
        found = runs.losses(np.arange(len(pairs)), want, feature.swap)
        for number, pair in enumerate(pairs):
            logits = plain_swap(known, pair, feature.rows, answer[:1])[-2:].log_softmax(1)
            expected = -(logits[0, answer[0]] + logits[1, answer[1]]) / 2
            assert float(found[number]) == pytest.approx(float(expected), abs=1e-3)


def test_bad_pairs_are_said(known: TrainedWorld, model: pc.Model, fit: Interchanges) -> None:
    (pair,) = known.world.pairs(1, attribute="trade")
    other = known.world.pairs(1, attribute="animal")[0]
    for pairs, match in [
        ([], "no pairs"),
        ([pair, pair._replace(source_answer="cat dog")], "pair 1: its answers have 1 and 2 tokens"),
        ([pair, pair._replace(base_position=pair.base_position + 1)], "pair 1: the last token of"),
        ([pair._replace(source_position=99)], "pair 0: .* has tokens 0 to"),
        ([pair._replace(source_entity="nobody")], "'nobody' is not in"),
        ([pair._replace(base_answer=[])], "has no tokens"),
        ([pair, pair._replace(base=torch.ones(3))], "some pairs are texts"),
    ]:
        with pytest.raises(pc.errors.DataError, match=match):
            Interchanges(known.model, known.site, pairs)
    with pytest.raises(pc.errors.UnknownName, match=r"'trad'.*trade"):
        das(known.model, known.site, [pair], "trad", 2)
    with pytest.raises(pc.errors.DataError, match="in no pair"):
        das(known.model, known.site, [pair._replace(source_answer=pair.base_answer)], "trade", 2)
    with pytest.raises(pc.errors.DataError, match="anything else than 'trade'"):
        mdas(known.model, known.site, [pair], "trade", 2)
    with pytest.raises(pc.errors.DataError, match="k lies between 1 and the 64 dimensions"):
        das(known.model, known.site, [pair, other], "trade", 65)
    with pytest.raises(pc.errors.DataError, match="made ready for"):
        das(known.model, known.site, fit, "a", 2)
    with pytest.raises(pc.errors.DataError, match="batch is at least 2"):
        das(model, SITE, fit, "a", 2, batch=1)
    with pytest.raises(pc.errors.ModelError, match="tokenizer"):
        Interchanges(model, SITE, [pair])
