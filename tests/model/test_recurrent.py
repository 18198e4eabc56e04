"""Recurrent sites: what is read is the recurrence written out here, and what is written feeds back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from patchclamp.errors import ModelError
from patchclamp.model import hooks
from patchclamp.model.recurrent import recurrent_sites, tapped
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap

INPUTS, SIZE, PROJECTED = 3, 4, 2
Change = Callable[[int, bool, torch.Tensor], torch.Tensor]


# The recurrence by hand -----------------------------------------------------------------------------


def unchanged(layer: int, reverse: bool, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def zeroing(layer: int, reverse: bool, unit: int) -> Change:
    def change(at: int, backward: bool, hidden: torch.Tensor) -> torch.Tensor:
        silent = torch.arange(len(hidden)) == unit
        return hidden.masked_fill(silent, 0.0) if (at, backward) == (layer, reverse) else hidden

    return change


def one_step(module: nn.RNNBase, suffix: str, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
    """The equations of the manual of torch, for one sequence: new hidden state and new cell state."""
    weights = dict(module.named_parameters())
    input_part, state_part = weights[f"weight_ih_{suffix}"] @ x, weights[f"weight_hh_{suffix}"] @ h
    if module.bias:
        input_part, state_part = input_part + weights[f"bias_ih_{suffix}"], state_part + weights[f"bias_hh_{suffix}"]
    if module.mode == "LSTM":
        i, f, g, o = (input_part + state_part).view(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (weights[f"weight_hr_{suffix}"] @ h if module.proj_size else h), c
    if module.mode == "GRU":
        (r, z, n), (r_state, z_state, n_state) = input_part.view(3, -1), state_part.view(3, -1)
        n = (n + (r + r_state).sigmoid() * n_state).tanh()
        z = (z + z_state).sigmoid()
        return (1 - z) * n + z * h, c
    return (input_part + state_part).tanh() if module.mode == "RNN_TANH" else (input_part + state_part).relu(), c


def by_hand(
    module: nn.RNNBase, sequence: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, change: Change = unchanged
) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sequence `[time, inputs]`: unit -> hidden states `[time, size]`, the output, last hidden and cell states."""
    hidden, last_h, last_c = {}, [], []
    directions = 1 + module.bidirectional
    for layer in range(module.num_layers):
        for reverse in range(directions):
            h, c = h0[layer * directions + reverse], c0[layer * directions + reverse]
            found = {}
            for time in reversed(range(len(sequence))) if reverse else range(len(sequence)):
                h, c = one_step(module, f"l{layer}" + "_reverse" * reverse, sequence[time], h, c)
                h = found[time] = change(layer, bool(reverse), h)
            hidden[2 * layer + reverse] = torch.stack([found[time] for time in range(len(sequence))])
            last_h.append(h)
            last_c.append(c)
        sequence = torch.cat([hidden[2 * layer + reverse] for reverse in range(directions)], dim=-1)
    return hidden, sequence, torch.stack(last_h), torch.stack(last_c)


# Random configurations ------------------------------------------------------------------------------


@dataclass
class Case:
    """A recurrent module with an input; `lengths` of the sequences, none of them padded in `sequences`."""

    module: nn.RNNBase
    form: str
    lengths: list[int]
    started: bool
    dtype: torch.dtype

    def __post_init__(self) -> None:
        module, examples = self.module, len(self.lengths)
        states = module.num_layers * (1 + module.bidirectional)
        size = module.proj_size or module.hidden_size
        self.sequences = [torch.randn(length, INPUTS, dtype=self.dtype) for length in self.lengths]
        scale = 1.0 if self.started else 0.0
        self.h0 = torch.randn(states, examples, size, dtype=self.dtype) * scale
        self.c0 = torch.randn(states, examples, module.hidden_size, dtype=self.dtype) * scale

    @property
    def tolerance(self) -> float:
        return 1e-12 if self.dtype == torch.float64 else 1e-6

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the module is called with."""
        if self.form == "unbatched":
            x, start = self.sequences[0], (self.h0[:, 0], self.c0[:, 0])
        else:
            padded = nn.utils.rnn.pad_sequence(self.sequences, batch_first=self.module.batch_first)
            x, start = padded, (self.h0, self.c0)
            if self.form == "packed":
                first, lengths = self.module.batch_first, torch.tensor(self.lengths)
                x = pack_padded_sequence(padded, lengths, batch_first=first, enforce_sorted=False)
        if not self.started:
            return (x,)
        return x, start if self.module.mode == "LSTM" else start[0]

    def by_hand(self, change: Change = unchanged) -> list[tuple[dict[int, torch.Tensor], torch.Tensor, Any, Any]]:
        """For each example: hidden states of each unit, output, last hidden and cell state."""
        return [
            by_hand(self.module, sequence, self.h0[:, example], self.c0[:, example], change)
            for example, sequence in enumerate(self.sequences)
        ]

    def each(self, output: Any) -> list[torch.Tensor]:
        """What the module returned for each example, without padding."""
        if self.form == "unbatched":
            return [output]
        if self.form == "packed":
            output, _ = pad_packed_sequence(output, batch_first=self.module.batch_first)
        output = output if self.module.batch_first else output.transpose(0, 1)
        return [row[:length] for row, length in zip(output, self.lengths, strict=True)]

    def seen(self, seen: Seen) -> list[torch.Tensor]:
        """What a tap was shown of each example."""
        if self.form == "unbatched":
            assert seen.place is None
            return [seen.tensor]
        if self.form == "batched":
            assert seen.place is None
            return list(seen.tensor)
        longest = max(self.lengths)
        expected = [e * longest + time for e, length in enumerate(self.lengths) for time in range(length)]
        assert seen.place is not None
        assert seen.place.tolist() == expected
        assert seen.length == longest
        return list(seen.tensor.split(self.lengths))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["LSTM", "LSTM", "GRU", "RNN", "RELU"]))
    form = draw(st.sampled_from(["batched", "packed", "packed", "unbatched"]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dtype": dtype,
    }
    if kind == "LSTM":
        options["proj_size"] = draw(st.sampled_from([0, PROJECTED]))
    if kind == "RELU":
        kind, options["nonlinearity"] = "RNN", "relu"
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=1 if form == "unbatched" else 4))
    if form == "batched":
        lengths = [lengths[0]] * len(lengths)
    started, seed = draw(st.booleans()), draw(st.integers(0, 2**16))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Case(getattr(nn, kind)(INPUTS, SIZE, **options).eval(), form, lengths, started, dtype)


many = settings(max_examples=max(60, settings.default.max_examples if settings.default else 0))


@contextmanager
def read(root: nn.Module) -> Iterator[dict[int, list[Seen]]]:
    """Unit -> what a reading tap at each recurrent site is shown."""
    found: dict[int, list[Seen]] = {site.unit: [] for site in recurrent_sites(root)}

    def see(site: Site) -> Callable[[Seen], torch.Tensor]:
        return lambda seen: found[site.unit].append(seen) or seen.tensor

    with tapped(root, [Tap(site, see(site), writes=False) for site in recurrent_sites(root)]):
        yield found


def writing(site: Site, edit: Callable[[torch.Tensor], torch.Tensor]) -> Tap:
    return Tap(site, lambda seen: edit(seen.tensor))


def silent(unit: int, shapes: list[torch.Size] | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(hidden: torch.Tensor) -> torch.Tensor:
        if shapes is not None:
            shapes.append(hidden.shape)
        changed = hidden.clone()
        changed[..., unit] = 0.0
        return changed

    return edit


def assert_close(got: Any, expected: Any, tolerance: float, name: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance, msg=lambda text: f"{name} {text}")


def assert_returned(got: Any, expected: Any, tolerance: float) -> None:
    """The same output, of the same type with the same fields, and the same last states."""
    assert type(got[0]) is type(expected[0])
    if isinstance(expected[0], PackedSequence):
        for ours, theirs in zip(got[0][1:], expected[0][1:], strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
        got, expected = (got[0].data, got[1]), (expected[0].data, expected[1])
    assert_close(got[0], expected[0], tolerance)
    assert type(got[1]) is type(expected[1])
    assert_close(got[1], expected[1], tolerance)


# Reading and writing ---------------------------------------------------------------------------------


@many
@given(case=cases(), how=st.sampled_from(["read", "written", "some"]), place=st.integers(0, 100))
def test_where_nothing_is_changed_the_module_returns_what_it_returns(case: Case, how: str, place: int) -> None:
    expected = case.module(*case.inputs)
    sites = list(recurrent_sites(case.module))
    written = {"read": [], "written": sites, "some": [sites[place % len(sites)]]}[how]
    with tapped(case.module, [writing(site, torch.clone) for site in written]), read(case.module) as seen:
        got = case.module(*case.inputs)
    assert_returned(got, expected, case.tolerance)
    assert all(len(each) == 1 for each in seen.values())


@many
@given(case=cases())
def test_what_is_read_is_the_hidden_state_of_each_layer_and_direction(case: Case) -> None:
    with torch.no_grad(), read(case.module) as seen:
        case.module(*case.inputs)
        expected = case.by_hand()
    for unit, found in seen.items():
        for example, tensor in enumerate(case.seen(found[0])):
            assert_close(tensor, expected[example][0][unit], case.tolerance)


@many
@given(case=cases(), place=st.integers(0, 100), unit=st.integers(0, PROJECTED - 1))
def test_a_silenced_neuron_is_silent_before_its_state_feeds_back(case: Case, place: int, unit: int) -> None:
    sites = list(recurrent_sites(case.module))
    site = sites[place % len(sites)]
    assert site.layer is not None
    shapes: list[torch.Size] = []
    with torch.no_grad(), tapped(case.module, [writing(site, silent(unit, shapes))]), read(case.module) as seen:
        output, last = case.module(*case.inputs)
        expected = case.by_hand(zeroing(site.layer, site.unit % 2 == 1, unit))
    alive = [sum(length > time for length in case.lengths) for time in range(max(case.lengths))]
    assert shapes == [(count, site.size) for count in (alive[::-1] if site.unit % 2 else alive)]
    last_h, last_c = last if case.module.mode == "LSTM" else (last, None)
    for example, got in enumerate(case.each(output)):
        hidden, expected_output, expected_h, expected_c = expected[example]
        assert_close(got, expected_output, case.tolerance)
        row = (slice(None), example) if case.form != "unbatched" else slice(None)
        assert_close(last_h[row], expected_h, case.tolerance)
        if last_c is not None:
            assert_close(last_c[row], expected_c, case.tolerance)
        for each, found in seen.items():
            assert_close(case.seen(found[0])[example], hidden[each], case.tolerance)


class Classifier(nn.Module):
    """What a user brings: an embedding, a recurrent layer, a readout at the last token of each text."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(7, INPUTS)
        self.rnn = nn.LSTM(INPUTS, SIZE, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.readout = nn.Linear(2 * SIZE, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output, _ = self.rnn(self.table(tokens))
        return self.readout(output[:, -1])


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier().double().eval()


TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 0, 2, 2]])


def test_in_a_classifier_an_edit_reaches_the_logits_and_is_not_the_edit_of_what_the_layer_returns(
    classifier: Classifier,
) -> None:
    site = next(site for site in recurrent_sites(classifier) if site.name == "recurrent.rnn.1")
    zeros = torch.zeros(4, SIZE, dtype=torch.float64)
    expected, only_returned = [], []
    with torch.no_grad():
        for row in classifier.table(TOKENS):
            output = by_hand(classifier.rnn, row, zeros, zeros, zeroing(1, False, 2))[1]
            expected.append(classifier.readout(output[-1]))
            output = by_hand(classifier.rnn, row, zeros, zeros)[1]
            only_returned.append(classifier.readout(output[-1].masked_fill(torch.arange(2 * SIZE) == 2, 0.0)))
        before = classifier(TOKENS)
        with hooks.hooked(classifier, [(site, silent(2))]), hooks.reading(classifier, [site]) as seen:
            got = classifier(TOKENS)
        assert_close(got, torch.stack(expected), 1e-12)
        assert not torch.allclose(got, torch.stack(only_returned), atol=1e-4)
        assert torch.equal(classifier(TOKENS), before)
    [found] = seen[site.name]
    assert found.tensor.shape == (2, 5, SIZE)
    assert (found.tensor[..., 2] == 0).all()


def test_gradients_are_those_of_the_module_and_flow_through_an_edit(classifier: Classifier) -> None:
    names, parameters = zip(*classifier.named_parameters(), strict=True)
    expected = torch.autograd.grad(classifier(TOKENS).square().sum(), parameters)
    sites = list(recurrent_sites(classifier))
    for taps in ([writing(site, torch.clone) for site in sites], []):
        with tapped(classifier, taps), read(classifier) as seen:
            loss = classifier(TOKENS).square().sum()
        got = torch.autograd.grad(loss, parameters, retain_graph=True)
        for name, ours, theirs in zip(names, got, expected, strict=True):
            assert_close(ours, theirs, 1e-10, name)
        assert all(each.tensor.requires_grad for [each] in seen.values())

    zeros = torch.zeros(4, SIZE, dtype=torch.float64)
    outputs = [
        by_hand(classifier.rnn, row, zeros, zeros, zeroing(0, True, 1))[1][-1] for row in classifier.table(TOKENS)
    ]
    expected = torch.autograd.grad(classifier.readout(torch.stack(outputs)).square().sum(), parameters)
    with tapped(classifier, [writing(sites[1], silent(1))]):
        loss = classifier(TOKENS).square().sum()
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert_close(ours, theirs, 1e-10)


@pytest.mark.parametrize("write", [False, True])
def test_dropout_between_the_layers_stays_in_training(write: bool) -> None:
    torch.manual_seed(0)
    model = Classifier(dropout=0.5).double().train()
    sites = list(recurrent_sites(model))
    torch.manual_seed(1)
    expected = model(TOKENS)
    assert not torch.allclose(expected, model(TOKENS))
    torch.manual_seed(1)
    with tapped(model, [writing(site, torch.clone) for site in sites[:2] if write]), read(model):
        assert_close(model(TOKENS), expected, 1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_keeps_its_type(kind: Any, packed: bool) -> None:
    torch.manual_seed(0)
    module = kind(INPUTS, SIZE, 2, bidirectional=True)
    x: Any = torch.randn(4, 2, INPUTS)
    x = pack_padded_sequence(x, torch.tensor([4, 2])) if packed else x
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = module(x)
        with tapped(module, [writing(site, torch.clone) for site in recurrent_sites(module)]):
            got = module(x)
    assert_returned(got, expected, 0.02)


def test_what_was_read_stays_when_the_network_writes_into_what_the_layer_returned() -> None:
    torch.manual_seed(0)
    module = nn.GRU(INPUTS, SIZE)
    x = torch.randn(4, 2, INPUTS)
    with torch.no_grad():
        expected = module(x)[0].clone()
        for taps in ([], [writing(site, torch.clone) for site in recurrent_sites(module)]):
            with tapped(module, taps), read(module) as seen:
                module(x)[0].zero_()
            assert_close(seen[0][0].tensor, expected.transpose(0, 1), 1e-6)


# Contexts --------------------------------------------------------------------------------------------


def test_what_is_entered_later_sees_what_was_entered_earlier(classifier: Classifier) -> None:
    site = next(iter(recurrent_sites(classifier)))
    seen: dict[str, list[torch.Tensor]] = {"before": [], "between": [], "after": []}

    def keep(name: str) -> Tap:
        return Tap(site, lambda each: seen[name].append(each.tensor) or each.tensor, writes=False)

    def add(number: float) -> Tap:
        return writing(site, lambda hidden: hidden + number)

    with torch.no_grad(), ExitStack() as stack:
        for tap in (keep("before"), add(1.0), keep("between")):
            stack.enter_context(tapped(classifier, [tap]))
        with tapped(classifier, [writing(site, lambda hidden: hidden * 2), keep("after")]):
            classifier(TOKENS)
        classifier(TOKENS)
    assert_close(seen["between"][0], seen["before"][0] + 1, 0)
    assert_close(seen["after"][0], seen["between"][0] * 2, 0)
    # The inner context is over: what feeds back is another state now.
    assert_close(seen["between"][1], seen["before"][1] + 1, 0)
    assert not torch.allclose(seen["before"][1][:, 1:], seen["before"][0][:, 1:])
    assert len(seen["after"]) == 1
    assert "forward" not in vars(classifier.rnn)


@pytest.mark.parametrize("own", [False, True])
def test_the_module_is_itself_again_however_the_block_ends(classifier: Classifier, own: bool) -> None:
    before = classifier(TOKENS)
    module: Any = classifier.rnn
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return nn.LSTM.forward(module, *args)

    if own:
        module.forward = counted
    fields = dict(vars(module))

    def failing(hidden: torch.Tensor) -> torch.Tensor:
        raise KeyError("here")

    sites = list(recurrent_sites(classifier))
    with read(classifier), pytest.raises(KeyError, match="here"), tapped(classifier, [writing(sites[0], failing)]):
        classifier(TOKENS)
    assert vars(module) == fields
    with pytest.raises(RuntimeError, match="stop"), tapped(classifier, [writing(sites[1], silent(0))]):
        assert not torch.equal(classifier(TOKENS), before)
        raise RuntimeError("stop")
    assert vars(module) == fields
    assert len(calls) == 2 * own
    assert torch.equal(classifier(TOKENS), before)


def test_a_copy_made_inside_the_block_has_its_own_weights(classifier: Classifier) -> None:
    with torch.no_grad(), tapped(classifier, [writing(next(recurrent_sites(classifier)), silent(0))]):
        copied: Any = copy.deepcopy(classifier)
        for module in (copied, copy.deepcopy(copied)):
            before = module(TOKENS)
            module.rnn.weight_hh_l0.zero_()
            assert not torch.allclose(module(TOKENS), before)
        assert all(weight.count_nonzero() for weight in classifier.rnn.parameters())


def test_keywords_may_come_in_any_order() -> None:
    torch.manual_seed(0)
    module, packed = nn.GRU(INPUTS, SIZE), pack_padded_sequence(torch.randn(4, 2, INPUTS), torch.tensor([4, 2]))
    with torch.no_grad(), read(module) as seen:
        module(hx=torch.zeros(1, 2, SIZE), input=packed)
        module(packed)
    assert torch.equal(seen[0][0].tensor, seen[0][1].tensor)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda hidden: hidden[..., :1],
            r"recurrent\.rnn\.1\.reverse: an edit made \[2, 1\] torch.float64 of \[2, 4\]",
        ),
        (lambda hidden: hidden.float(), r"recurrent\.rnn\.1\.reverse: an edit made \[2, 4\] torch.float32"),
        (lambda hidden: None, r"recurrent\.rnn\.1\.reverse: an edit returned NoneType"),
    ],
)
def test_an_edit_that_returns_something_else_is_named(classifier: Classifier, edit: Any, message: str) -> None:
    site = list(recurrent_sites(classifier))[-1]
    with tapped(classifier, [writing(site, edit)]), pytest.raises(ModelError, match=message):
        classifier(TOKENS)


class Halved(nn.GRU):
    """A forward of its own around that of torch."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        output, last = super().forward(input * 0.5, hx)
        return output + 1, last


LENGTHS = torch.tensor([4, 2])


class Packing(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(pack_padded_sequence(input, LENGTHS), hx)


class ByCell(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        h = input.new_zeros(input.shape[1], self.hidden_size)
        [weights] = self.all_weights
        outputs = [h := torch.gru_cell(x, h, *weights) for x in input]
        return torch.stack(outputs), h[None]


def test_a_subclass_keeps_its_own_forward() -> None:
    torch.manual_seed(0)
    module = Halved(INPUTS, SIZE)
    x, zeros = torch.randn(4, 1, INPUTS), torch.zeros(1, SIZE)
    [site] = recurrent_sites(module)
    with torch.no_grad(), tapped(module, [writing(site, silent(3))]), read(module) as seen:
        output, _ = module(x)
        expected = by_hand(module, x[:, 0] * 0.5, zeros, zeros, zeroing(0, False, 3))[1]
    assert_close(output[:, 0], expected + 1, 1e-6)
    assert_close(seen[0][0].tensor[0], expected, 1e-6)


def test_a_subclass_that_hides_what_is_needed_is_refused() -> None:
    x = torch.randn(4, 2, INPUTS)
    module: Any = Packing(INPUTS, SIZE)
    with read(module), pytest.raises(ModelError, match=r"recurrent\.0 cannot be read: the module packs"):
        module(x)
    with tapped(module, [writing(next(recurrent_sites(module)), silent(1))]):
        assert (module(x)[0].data[:, 1] == 0).all()
    module = ByCell(INPUTS, SIZE)
    refused = pytest.raises(ModelError, match=r"recurrent\.0 cannot be written: the forward of ByCell")
    with tapped(module, [writing(next(recurrent_sites(module)), silent(1))]), refused:
        module(x)


def test_what_torch_refuses_it_still_refuses(classifier: Classifier) -> None:
    site = next(iter(recurrent_sites(classifier)))
    for x, message in ((torch.zeros(2, 0, INPUTS), "sequence length"), (torch.zeros(2, 3, INPUTS + 1), "input_size")):
        with tapped(classifier, [writing(site, silent(0))]), pytest.raises(RuntimeError, match=message):
            classifier.rnn(x.double())


# Sites -----------------------------------------------------------------------------------------------


class Surrogate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).to(x.dtype)


class LIFPopulation(nn.Module):
    """Leaky integrate and fire, with the surrogate gradient as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.surrogate = Surrogate()

    def forward(self, current: torch.Tensor, voltage: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        voltage = 0.9 * voltage + current
        spikes = self.surrogate(voltage - 1)
        return spikes, voltage - spikes


class Leaky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class MyLeakyReLU(Leaky):
    pass


class SpikingNetwork(nn.Module):
    """A spiking loop: what fires at one time step is given back at the next."""

    def __init__(self) -> None:
        super().__init__()
        self.enters, self.feeds_back = nn.Linear(INPUTS, SIZE), nn.Linear(SIZE, SIZE)
        self.population, self.readout = LIFPopulation(), Leaky()
        self.activation = nn.LeakyReLU()
        self.other = MyLeakyReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = voltage = x.new_zeros(x.shape[1], SIZE)
        outputs = []
        for now in x:
            spikes, voltage = self.population(self.enters(now) + self.feeds_back(spikes), voltage)
            outputs.append(self.readout(spikes))
        return torch.stack(outputs)


class Cells(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.cell = kind(INPUTS, SIZE, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, outputs = None, []
        for now in x:
            state = self.cell(now, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


def test_every_layer_and_direction_is_a_site() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.LSTM(INPUTS, SIZE, 2, bidirectional=True, proj_size=PROJECTED),
            "b": nn.ModuleList([nn.RNN(INPUTS, SIZE, nonlinearity="relu")]),
        }
    )
    found = {
        site.name: (site.layer, site.size, site.activation, site.module, site.unit) for site in recurrent_sites(model)
    }
    assert found == {
        "recurrent.a.0": (0, PROJECTED, "tanh", "a", 0),
        "recurrent.a.0.reverse": (0, PROJECTED, "tanh", "a", 1),
        "recurrent.a.1": (1, PROJECTED, "tanh", "a", 2),
        "recurrent.a.1.reverse": (1, PROJECTED, "tanh", "a", 3),
        "recurrent.b.0.0": (0, SIZE, "relu", "b.0", 0),
    }
    assert {(site.kind, site.through, site.tensor, site.time) for site in recurrent_sites(model)} == {
        ("recurrent", "recurrent", "output", False)
    }
    names = [site.name for site in recurrent_sites(nn.GRU(INPUTS, SIZE, bidirectional=True))]
    assert names == ["recurrent.0", "recurrent.0.reverse"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_layer_is_no_site(classifier: Classifier) -> None:
    try:
        quantised = torch.ao.quantization.quantize_dynamic(classifier.float(), {nn.LSTM})
    except RuntimeError as error:
        pytest.skip(f"this build of torch has no quantised kernels: {error}")
    assert type(quantised.rnn) is not nn.LSTM
    assert list(recurrent_sites(quantised)) == []


def test_cells_and_spiking_neurons_are_sites_once_for_each_call() -> None:
    sites = list(recurrent_sites(SpikingNetwork()))
    assert [site.name for site in sites] == ["recurrent.population", "recurrent.readout"]
    assert [site.name for site in recurrent_sites(nn.GRUCell(INPUTS, SIZE))] == ["recurrent.0"]
    [cell] = recurrent_sites(Cells(nn.RNNCell, nonlinearity="relu"))
    assert (cell.name, cell.size, cell.activation) == ("recurrent.cell", SIZE, "relu")
    for site in (*sites, cell):
        assert (site.kind, site.through, site.tensor, site.time, site.layer) == (
            "recurrent", "module", "output", True, None,
        )  # fmt: skip


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_an_edit_of_a_cell_feeds_back(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = Cells(kind).double(), torch.randn(4, 2, INPUTS).double()
    [site] = recurrent_sites(model)
    state: Any = None
    expected = []
    with torch.no_grad():
        for now in x:
            state = model.cell(now, state)
            h = (state[0] if isinstance(state, tuple) else state) * (torch.arange(SIZE) != 1)
            state = (h, state[1]) if isinstance(state, tuple) else h
            expected.append(h)
        before = model(x)
        with hooks.hooked(model, [(site, silent(1))]), hooks.reading(model, [site]) as seen:
            got = model(x)
    assert_close(got, torch.stack(expected), 1e-12)
    assert_close(torch.stack([each.tensor for each in seen[site.name]]), got, 0)
    assert not torch.allclose(got[..., 0], before[..., 0])


def test_a_silenced_spiking_neuron_is_not_heard_at_the_next_time_step() -> None:
    torch.manual_seed(0)
    model, x = SpikingNetwork(), 3 * torch.randn(12, 2, INPUTS)
    site = next(recurrent_sites(model))
    with torch.no_grad():
        model.feeds_back.weight *= 5
        busiest = int(model(x).sum((0, 1)).argmax())
        spikes = voltage = torch.zeros(2, SIZE)
        expected = []
        for now in x:
            voltage = 0.9 * voltage + model.enters(now) + model.feeds_back(spikes)
            fired = (voltage > 1).float()
            voltage = voltage - fired
            spikes = fired * (torch.arange(SIZE) != busiest)
            expected.append(spikes)
        with hooks.hooked(model, [(site, silent(busiest))]):
            got = model(x)
    assert torch.equal(got, torch.stack(expected))
    assert not torch.equal(got, model(x) * (torch.arange(SIZE) != busiest))
