"""Recordings of recurrent networks on batches equal each text read alone; an ablation during one feeds back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from tests.recording import tiny
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import patchclamp as pc

TEXTS = tiny.texts()
SIZE = 6


class Packed(nn.Module):
    """What a careful user writes: the padding never enters the recurrent layer, in neither direction."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(tiny.VOCABULARY, tiny.WIDTH)
        self.rnn = kind(tiny.WIDTH, SIZE, 2, batch_first=True, bidirectional=True)
        self.readout = nn.Linear(2 * SIZE, 3)
        tiny.seeded(self)
        self.double()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        lengths = attention_mask.sum(1).cpu()
        packed = pack_padded_sequence(self.table(input_ids), lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.readout(output)


class Padded(Packed):
    """What others write; one direction, so that what follows a text says nothing about it."""

    def __init__(self, kind: Any) -> None:
        super().__init__(kind)
        self.rnn = kind(tiny.WIDTH, SIZE, 2)
        self.readout = nn.Linear(SIZE, 3)
        tiny.seeded(self)
        self.double()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.readout(self.rnn(self.table(input_ids).transpose(0, 1))[0].transpose(0, 1))


class ByCell(nn.Module):
    """A loop of one's own over the time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(tiny.VOCABULARY, tiny.WIDTH)
        self.cell = nn.GRUCell(tiny.WIDTH, SIZE)
        tiny.seeded(self)
        self.double()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        state, states = None, []
        for now in self.table(input_ids).unbind(1):
            state = self.cell(now, state)
            states.append(state)
        return torch.stack(states, 1)


def layers_alone(model: Any, text: str) -> dict[str, torch.Tensor]:
    """Site -> `[tokens, size]`, by one `nn` module of one layer after the other, on one text."""
    ids = torch.tensor([tiny.WORDS.index(word) + len(tiny.SPECIAL) for word in text.split()])
    values, found = model.table(ids), {}
    for layer in range(model.rnn.num_layers):
        one = type(model.rnn)(values.shape[-1], SIZE, bidirectional=model.rnn.bidirectional).double()
        mine = f"_l{layer}"
        weights = {name: each for name, each in model.rnn.state_dict().items() if mine in name}
        one.load_state_dict({name.replace(mine, "_l0"): each for name, each in weights.items()})
        values, _ = one(values)
        names = [f"recurrent.rnn.{layer}", f"recurrent.rnn.{layer}.reverse"]
        found |= dict(zip(names, values.split(SIZE, dim=-1), strict=False))
    return found


def agrees(site: Any, rows: Iterable[torch.Tensor]) -> None:
    each = [row.detach().numpy() for row in rows]
    values = np.concatenate(each)
    assert site.count == len(values)
    np.testing.assert_allclose(site.moments.mean, values.mean(0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(site.moments.variance, values.var(0), rtol=1e-10, atol=1e-12)
    top = site.top_examples
    np.testing.assert_allclose(top.values, -np.sort(-values, axis=0)[: top.k].T, rtol=1e-10, atol=1e-12)
    for neuron in range(SIZE):
        for value, example, position in zip(top.values[neuron], top.example[neuron], top.position[neuron], strict=True):
            assert value == pytest.approx(each[example][position, neuron], abs=1e-12)


def recorded(model: pc.Model, data: Any) -> pc.Recording:
    return tiny.recorded(model, data, "recurrent.*", [pc.Moments(), pc.TopExamples(4)])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("network", [Packed, Padded])
def test_a_batch_equals_each_text_alone(network: Any, kind: Any) -> None:
    model = pc.load(network(kind), tokenizer=tiny.tokenizer("$A"))
    alone = [layers_alone(model.module, text) for text in TEXTS]
    recording = recorded(model, TEXTS)
    assert len(alone[0]) == (4 if network is Packed else 2)
    for name in alone[0]:
        agrees(recording[name], [each[name] for each in alone])
        shown = model.activations(TEXTS[0], name)
        torch.testing.assert_close(shown.as_subclass(torch.Tensor), alone[0][name].detach(), rtol=0, atol=1e-12)
        assert "".join(shown.tokens).split() == TEXTS[0].split()


def test_the_rows_of_unsorted_texts_come_in_the_order_of_the_batch() -> None:
    model, words = pc.load(Packed(nn.GRU), tokenizer=tiny.tokenizer("$A")), tiny.tokenizer("$A")
    texts = sorted(TEXTS, key=len)[::4]
    assert len({len(text.split()) for text in texts}) > 2
    shown = model.activations(dict(words(texts, padding=True, return_tensors="pt")), "recurrent.rnn.1.reverse")
    expected = torch.cat([layers_alone(model.module, text)["recurrent.rnn.1.reverse"] for text in texts])
    torch.testing.assert_close(shown.as_subclass(torch.Tensor), expected.detach(), rtol=0, atol=1e-12)


def test_a_cell_has_one_row_for_each_token() -> None:
    model = pc.load(ByCell(), tokenizer=tiny.tokenizer("$A"))
    encoded = [model.inputs(text)["input_ids"] for text in TEXTS]
    agrees(recorded(model, TEXTS)["recurrent.cell"], [model.module(ids)[0] for ids in encoded])


def test_sequences_that_are_no_texts() -> None:
    torch.manual_seed(0)
    module, data = nn.GRU(3, SIZE, batch_first=True).double().eval(), torch.randn(9, 5, 3).double()
    agrees(recorded(pc.load(module), data)["recurrent.0"], module(data)[0])


@pytest.mark.parametrize("network", [Packed, Padded])
def test_an_ablated_neuron_is_recorded_as_silent_and_missed_by_the_others(network: Any) -> None:
    module = network(nn.LSTM)
    model = pc.load(module, tokenizer=tiny.tokenizer("$A"))
    site, below = "recurrent.rnn.1", "recurrent.rnn.0"
    before = recorded(model, TEXTS)
    with model.intervene(pc.ablate(pc.Neurons({site: [2]}))):
        during = recorded(model, TEXTS)
    means = during[site].moments.mean
    assert means[2] == during[site].moments.variance[2] == 0
    # Its weights into the hidden state of its layer are all that it says to its neighbours.
    assert (np.abs(means - before[site].moments.mean)[[0, 1, 3, 4, 5]] > 1e-6).all()
    np.testing.assert_array_equal(during[below].moments.mean, before[below].moments.mean)
    with torch.no_grad():
        module.rnn.weight_hh_l1[:, 2] = 0.0
        deaf = recorded(model, TEXTS)
    np.testing.assert_allclose(np.delete(deaf[site].moments.mean, 2), np.delete(means, 2), rtol=1e-9)
    after = recorded(model, TEXTS)
    np.testing.assert_array_equal(after[site].moments.mean, deaf[site].moments.mean)


def test_packed_sequences_that_are_no_texts() -> None:
    class Lengths(nn.Module):
        """Reads how many steps of each sequence are real off the number of steps that are not zero."""

        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, SIZE, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            lengths = x.any(-1).sum(1).cpu()
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.rnn(packed)[1]

    torch.manual_seed(1)
    module, data = Lengths().double().eval(), torch.randn(9, 5, 3).double()
    lengths = [3, 5, 1, 4, 5, 2, 2, 5, 4]
    for number, length in enumerate(lengths):
        data[number, length:] = 0
    each = [module.rnn(data[number : number + 1, :length])[0][0] for number, length in enumerate(lengths)]
    agrees(recorded(pc.load(module), data)["recurrent.rnn.0"], each)
