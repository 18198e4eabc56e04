"""Positions of what runs step by step: beside the recurrence written out with torch's cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.raw import assert_same
from tests.zoo import SpikingNetwork, by_title, drawn
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import patchclamp as pc
from patchclamp.errors import DataError
from patchclamp.intervene import SideBySide

SIZE, INPUTS, LENGTHS = 4, 3, [5, 3, 4]
kinds = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
Change = Callable[[int, int, torch.Tensor], torch.Tensor]
"""Of an example, a time and a hidden state `[size]`, another hidden state."""


class Network(nn.Module):
    """Two layers in both directions and a readout; sequences packed where their lengths are given."""

    def __init__(self, kind: Callable[..., nn.Module], batch_first: bool) -> None:
        super().__init__()
        self.rnn = kind(INPUTS, SIZE, num_layers=2, bidirectional=True, batch_first=batch_first)
        self.out = nn.Linear(2 * SIZE, 2)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        first = self.rnn.batch_first
        if lengths is None:
            return self.out(self.rnn(x)[0])
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)  # type: ignore[arg-type]
        return self.out(pad_packed_sequence(self.rnn(packed)[0], batch_first=first)[0])  # type: ignore[arg-type]


def cell_of(rnn: Any, layer: int, reverse: int) -> nn.Module:
    """torch's cell with the weights of one layer and direction."""
    cell = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}.get(rnn.mode, nn.RNNCell)(rnn.input_size, rnn.hidden_size)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(rnn, f"{name}_l{layer}" + "_reverse" * reverse))
    return cell


def by_hand(network: Any, example: int, sequence: torch.Tensor, changes: Mapping[str, Change]) -> torch.Tensor:
    """The output `[time, 2]` for one sequence `[time, inputs]`."""
    for layer in range(2):
        directions = []
        for reverse in range(2):
            cell = cell_of(network.rnn, layer, reverse)
            change = changes.get(
                f"recurrent.rnn.{layer}" + ".reverse" * reverse, lambda _example, _time, hidden: hidden
            )
            found, state = {}, None
            for time in reversed(range(len(sequence))) if reverse else range(len(sequence)):
                state = cell(sequence[time][None], state)
                hidden = state[0] if isinstance(state, tuple) else state
                hidden = found[time] = change(example, time, hidden[0])
                state = (hidden[None], state[1]) if isinstance(state, tuple) else hidden[None]
            directions.append(torch.stack([found[time] for time in range(len(sequence))]))
        sequence = torch.cat(directions, 1)
    return network.out(sequence)


def holding(lengths: Sequence[int], positions: Sequence[int] | None, examples: Sequence[int] | None) -> Change:
    """Neuron 2 at 0.9, at these positions of these examples."""

    def change(example: int, time: int, hidden: torch.Tensor) -> torch.Tensor:
        there = positions is None or time in [each % lengths[example] for each in positions]
        if not there or (examples is not None and example not in examples):
            return hidden
        return torch.where(torch.arange(SIZE) == 2, 0.9, hidden)

    return change


def given(batch_first: bool) -> torch.Tensor:
    x = torch.randn(len(LENGTHS), max(LENGTHS), INPUTS, generator=torch.Generator().manual_seed(3))
    return x if batch_first else x.transpose(0, 1).contiguous()


@kinds
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
def test_time_steps_of_each_layer_and_direction(kind: Any, batch_first: bool, packed: bool) -> None:
    network = drawn(lambda: Network(kind, batch_first))()
    model, x = pc.load(network), given(batch_first)
    lengths = LENGTHS if packed else [max(LENGTHS)] * len(LENGTHS)
    options = {"lengths": torch.tensor(LENGTHS)} if packed else {}
    wheres = (([0, -1], None), ([2], [1]), (None, [0, 2]), ([-2, 1], [1, 2]))
    assert len(model.sites) == len(wheres)
    for site, (positions, examples) in zip(model.sites, wheres[:: 1 if packed else -1], strict=True):
        where = pc.clamp(pc.Neurons({site: [2]}), 0.9, positions=positions, examples=examples)
        with torch.no_grad(), model.intervene(where):
            got = network(x, **options)
        got = got if batch_first else got.transpose(0, 1)
        change = {site: holding(lengths, positions, examples)}
        for example, length in enumerate(lengths):
            sequence = (x[example] if batch_first else x[:, example])[:length]
            with torch.no_grad():
                assert_same(got[example, :length], by_hand(network, example, sequence, change))
    with (
        pytest.raises(DataError, match=r"there is no position 3 at recurrent\.rnn\.0; there are 3"),
        model.intervene(pc.clamp(pc.Neurons({"recurrent.rnn.0": [2]}), 0.9, positions=[3])),
    ):
        network(given(batch_first), lengths=torch.tensor(LENGTHS))


@kinds
def test_gradients_are_those_of_the_recurrence_written_out(kind: Any) -> None:
    network = drawn(lambda: Network(kind, True))()
    model, x = pc.load(network), given(True)
    sites = ["recurrent.rnn.0", "recurrent.rnn.1.reverse"]
    with model.intervene(pc.clamp(pc.Neurons({site: [2] for site in sites}), 0.9, positions=[1, -1])):
        output = network(x, torch.tensor(LENGTHS))
    change = {site: holding(LENGTHS, [1, -1], None) for site in sites}
    expected = [by_hand(network, row, x[row, :length], change) for row, length in enumerate(LENGTHS)]
    loss = sum(output[row, :length].square().sum() for row, length in enumerate(LENGTHS))
    for got, wanted in zip(
        torch.autograd.grad(loss, list(network.parameters())),  # type: ignore[arg-type]
        torch.autograd.grad(sum(each.square().sum() for each in expected), list(network.parameters())),  # type: ignore[arg-type]
        strict=True,
    ):
        assert_same(got, wanted)


@kinds
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
def test_states_of_another_run_step_by_step(kind: Any, batch_first: bool) -> None:
    network = drawn(lambda: Network(kind, batch_first))()
    model, x = pc.load(network), given(batch_first)
    other = x.flip(0).flip(1)
    source = model.activations({"x": other}, "recurrent.*")
    assert source["recurrent.rnn.1"].shape == (3, 5, SIZE)
    with torch.no_grad():
        with model.intervene(pc.patch(list(source), source)):
            assert_same(network(x), network(other))
        neurons = pc.Neurons({"recurrent.rnn.0": [2, 0]})
        with model.intervene(pc.patch(neurons, source, [1, 3], examples=[2])):
            got = network(x) if batch_first else network(x).transpose(0, 1)

    def change(example: int, time: int, hidden: torch.Tensor) -> torch.Tensor:
        there = example == 2 and time in (1, 3)
        kept = ~torch.isin(torch.arange(SIZE), torch.tensor([2, 0]))
        return torch.where(kept, hidden, source["recurrent.rnn.0"][example, time]) if there else hidden

    for example in range(3):
        sequence = x[example] if batch_first else x[:, example]
        with torch.no_grad():
            assert_same(got[example], by_hand(network, example, sequence, {"recurrent.rnn.0": change}))
    with (
        pytest.raises(DataError, match=r"are \[3, 4, 4\], and it runs over 3 examples for 5 steps: give them as"),
        model.intervene(pc.patch("recurrent.rnn.0", source["recurrent.rnn.0"][:, :4])),
    ):
        network(x)


def test_a_tagger_of_padded_texts() -> None:
    case = by_title("nn.LSTM")
    model, inputs = pc.load(case.build()), case.inputs("right")
    where = pc.clamp(pc.Neurons({site: [1] for site in model.sites}), 0.8, positions=[0, -1])
    lengths = inputs["attention_mask"].sum(1).tolist()
    with torch.no_grad(), model.intervene(where):
        together = model.module(**inputs)
        for row, length in enumerate(lengths):
            alone = model.module(inputs["input_ids"][row : row + 1, :length])
            assert_same(together[row, :length], alone[0])


def test_a_module_that_packs_by_itself_does_not_say_which_row_is_which() -> None:
    class Packing(nn.LSTM):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(pack_padded_sequence(x, torch.tensor([2, 4, 3]), True, enforce_sorted=False))

    network = nn.Sequential(Packing(INPUTS, SIZE, batch_first=True))
    model, x = pc.load(network), torch.randn(3, 4, INPUTS)
    name = next(iter(model.sites))
    cases: list[dict[str, Any]] = [{"positions": [0]}, {"examples": [0]}]
    for where in cases:
        with (
            pytest.raises(DataError, match="packs its sequences itself, and which row is which is not known"),
            model.intervene(pc.clamp(pc.Neurons({name: [0]}), 0.9, **where)),
        ):
            network(x)


# Called once for each time step ------------------------------------------------------------------------


class Loop(nn.Module):
    """A cell that the network calls itself, on tokens or on series."""

    def __init__(self, kind: Callable[..., nn.Module], tokens: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, INPUTS) if tokens else nn.Identity()
        self.cell, self.out = kind(INPUTS, SIZE), nn.Linear(SIZE, 2)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, change: Change | None = None
    ) -> torch.Tensor:
        steps, state, found = self.table(x), None, []
        for time in range(steps.shape[1]):
            state = self.cell(steps[:, time], state)
            hidden = state[0] if isinstance(state, tuple) else state
            if change is not None:
                hidden = torch.stack([change(row, time, each) for row, each in enumerate(hidden)])
                state = (hidden, state[1]) if isinstance(state, tuple) else hidden
            found.append(self.out(hidden))
        return torch.stack(found, 1)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("custom", [True, False], ids=["custom", "listed"])
def test_a_cell_that_is_called_for_each_time_step(kind: Any, custom: bool) -> None:
    network = drawn(lambda: Loop(kind, tokens=False))()
    model, x = pc.load(network), given(True)
    name = pc.Site.custom("cell", time=True).name if custom else "recurrent.cell"
    neurons = pc.Neurons({name: [2]})
    cases: list[Any] = [([0, 3], None), ([4, 1], [2]), (None, [0])]
    for positions, examples in cases:
        with torch.no_grad(), model.intervene(pc.clamp(neurons, 0.9, positions=positions, examples=examples)):
            network(x)
            got = network(x)  # each call counts anew
        with torch.no_grad():
            assert_same(got, network(x, change=holding([5, 5, 5], positions, examples)))
    # Two at one site, each of which counts for itself.
    first, second = pc.clamp(neurons, 0.9, positions=[1]), pc.scale(pc.Neurons({name: [0]}), 0.0, positions=[3])

    def both(example: int, time: int, hidden: torch.Tensor) -> torch.Tensor:
        hidden = holding([5] * 3, [1], None)(example, time, hidden)
        return hidden * (torch.arange(SIZE) != 0) if time == 3 else hidden

    with torch.no_grad(), model.intervene(first, second):
        assert_same(network(x), network(x, change=both))
    with torch.no_grad(), model.intervene(SideBySide([first, None, second])):
        parts = network(torch.cat([x, x, x])).chunk(3)
    for part, alone in zip(parts, ([first], [], [second]), strict=True):
        with torch.no_grad(), model.intervene(*alone):
            assert_same(part, network(x))
    with (
        pytest.raises(DataError, match=r"position -1 counts from the end, and how long .* runs is not known"),
        model.intervene(pc.clamp(neurons, 0.9, positions=[-1])),
    ):
        network(x)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cell_that_reads_tokens_knows_their_number(side: str) -> None:
    network = drawn(lambda: Loop(nn.GRUCell, tokens=True))()
    model = pc.load(network)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]])
    columns = {0: [0, 3], 1: [2, 3] if side == "left" else [0, 1]}  # the first and the last token of each

    def change(example: int, time: int, hidden: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(SIZE) == 2, 0.9, hidden) if time in columns[example] else hidden

    where = pc.clamp(pc.Neurons({"recurrent.cell": [2]}), 0.9, positions=[0, -1])
    with torch.no_grad():
        expected = network(ids, change=change)
        with model.intervene(where):
            assert_same(network(ids, mask), expected)
            assert_same(network(x=ids, attention_mask=mask), expected)
        with model.intervene(where):
            assert_same(network(ids), network(ids, change=holding([4, 4], [0, -1], None)))
    with (
        pytest.raises(DataError, match=r"there is no position 2 at recurrent\.cell; there are 2"),
        model.intervene(pc.clamp(pc.Neurons({"recurrent.cell": [2]}), 0.9, positions=[2])),
    ):
        network(ids, mask)


def test_spikes_of_another_run_and_at_some_steps() -> None:
    network: Any = drawn(SpikingNetwork)()
    model = pc.load(network)
    x = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1)) * 2
    source = model.activations({"x": x.flip(0)}, "recurrent.population")
    assert source.shape == (3, 6, 7) and 0 < source.mean() < 1
    calls = 0

    def fire(_module: nn.Module, _args: Any, spikes: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        changed = spikes.clone()
        if calls in (2, 6):
            changed[1:] = source[1:, calls - 1]
        return changed

    with torch.no_grad():
        with network.population.register_forward_hook(fire):
            expected = network(x)
        with model.intervene(pc.patch("recurrent.population", source, [1, 5], examples=[1, 2])):
            assert torch.equal(network(x), expected)
        assert not torch.equal(network(x), expected)
    with (
        pytest.raises(DataError, match=r"are \[3, 4, 7\], and it runs over 3 examples for more steps"),
        model.intervene(pc.patch("recurrent.population", source[:, :4])),
    ):
        network(x)
