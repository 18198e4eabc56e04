"""Sites of recurrent layers: the hidden state of `nn.LSTM`, `nn.GRU` and `nn.RNN`, of their cells, of spiking neurons.

A neuron is one number of the hidden state: it is what the layer returns and what it is given back at the next
time step. Torch computes all time steps in one call, and what that call returns no longer feeds back. So
that call is caught. Where states are only read, each layer is a call of its own. Where one is written, its layer
runs time step by time step, and what a tap makes of a hidden state is what the network goes on with.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from patchclamp.errors import ModelError
from patchclamp.model.recurrent_steps import stepped_direction
from patchclamp.model.site import Site
from patchclamp.model.taps import Seen, Tap, installed

_KERNELS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_Given = torch.Tensor | PackedSequence | None
_SPIKING = re.compile(r"Spik|LIF|IntegrateAndFire|Izhikevich|Leaky(?!Re[Ll][Uu])")


def recurrent_sites(root: nn.Module) -> Iterator[Site]:
    """The recurrent sites of a network, in the order of its modules.

    - `recurrent.<path>.<layer>` and `recurrent.<path>.<layer>.reverse`: each layer and direction of every
      `nn.LSTM`, `nn.GRU` and `nn.RNN`; `recurrent.<layer>` where the network itself is one.
    - `recurrent.<path>`: every `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell`, and every population of spiking
      neurons in plain torch: a module whose class is named so (`LIF`, `Spiking...`, `Leaky`, ...) and that is
      made of no others but such as have no parameters (a surrogate gradient). They are called once for each time
      step, and the user's own loop hands their state on.
    """
    for path, module in root.named_modules():
        if isinstance(module, nn.RNNBase):
            yield from _layers(path, module)
        elif isinstance(module, nn.RNNCellBase):
            activation = getattr(module, "nonlinearity", "tanh")
            yield _called_each_step(path, module.hidden_size, activation)
        elif _is_spiking(module) and not any(
            _is_spiking(each) or next(each.parameters(), None) is not None for each in module.children()
        ):
            yield _called_each_step(path, None, None)


@contextmanager
def tapped(root: nn.Module, taps: Sequence[Tap]) -> Iterator[None]:
    """While the block runs, every tap sees its layer and direction (`through="recurrent"`).

    A tap that only reads is given the hidden states of the whole sequence, once for each call of the module:
    `[batch, time, size]` whatever `batch_first`, `[time, size]` without a batch, and for a packed sequence
    `[rows, size]` with the place of each row, `example * longest + time`, in order. A tap that writes is given
    `[sequences, size]` at every time step (for a packed sequence, those that are not over); what it returns feeds
    back, enters the next layer and is returned by the module. Each tap sees what those before it made.

    Raises:
        ModelError: inside the block, a tap returned something else than a tensor of the same shape and type; the
            class has a `forward` of its own that does not use torch's recurrent functions, or hides which row
            of a packed sequence is which.
    """
    with ExitStack() as stack:
        for path in dict.fromkeys(tap.site.module for tap in taps):
            there = [tap for tap in taps if tap.site.module == path]
            stack.enter_context(installed(root.get_submodule(path), "recurrent", there, _install))
        yield


def _layers(path: str, module: nn.RNNBase) -> Iterator[Site]:
    for layer in range(module.num_layers):
        for reverse in range(1 + module.bidirectional):
            parts = ["recurrent", path, str(layer), "reverse" if reverse else ""]
            yield Site(
                ".".join(part for part in parts if part),
                "recurrent",
                layer,
                module.proj_size or module.hidden_size,
                activation="relu" if module.mode == "RNN_RELU" else "tanh",
                module=path,
                tensor="output",
                through="recurrent",
                unit=2 * layer + reverse,
            )


def _called_each_step(path: str, size: int | None, activation: str | None) -> Site:
    name = f"recurrent.{path}" if path else "recurrent.0"
    return Site(name, "recurrent", None, size, activation=activation, module=path, tensor="output", time=True)


def _is_spiking(module: nn.Module) -> bool:
    return _SPIKING.search(type(module).__name__) is not None


def _install(module: nn.Module, taps: list[Tap]) -> Callable[[], None]:
    forward = _TappedForward(module, taps)

    def undo() -> None:
        if forward.own is None:
            del module.forward
        else:
            module.forward = forward.own

    module.forward = forward
    return undo


class _TappedForward:
    """Lets the `forward` of a module run as it is, but answers its call of torch's recurrent function."""

    def __init__(self, module: nn.Module, taps: list[Tap]) -> None:
        self.own = module.__dict__.get("forward")
        self._forward = module.forward
        self._module = module
        self._taps = taps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = (kwargs.get("input"), *args, *kwargs.values())
        sequence = next((each for each in given if isinstance(each, (torch.Tensor, PackedSequence))), None)
        with _Catching(self._taps, sequence) as catching:
            returned = self._forward(*args, **kwargs)
        writing = next((tap for tap in self._taps if tap.writes), None)
        if writing is not None and not catching.reached:
            raise ModelError(
                f"{writing.site.name} cannot be written: the forward of {type(self._module).__name__} does not use "
                "torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu"
            )
        return returned


class _Catching(TorchFunctionMode):
    """Answers torch's recurrent functions; everything else goes on as it is."""

    def __init__(self, taps: list[Tap], given: _Given) -> None:
        super().__init__()
        self.reached = False
        self._taps = taps
        self._given = given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _KERNELS:
            return func(*args, **(kwargs or {}))
        self.reached = True
        return _answered(_Call.of(func, args, self._given), list(self._taps))


@dataclass(frozen=True)
class _Call:
    """A call of one of torch's recurrent functions, taken apart. Time comes first in every tensor."""

    kernel: Callable[..., Any]
    args: tuple[Any, ...]
    given: _Given
    """What the module itself was called with."""
    inputs: torch.Tensor
    """`[time, batch, inputs]`, or `[rows, inputs]` of a packed sequence."""
    batch_sizes: torch.Tensor | None
    states: tuple[torch.Tensor, ...]
    """`[layers * directions, batch, size]`: hidden state; for the LSTM also cell state."""
    weights: list[torch.Tensor]
    bias: bool
    layers: int
    dropout: float
    training: bool
    directions: int
    batch_first: bool

    @classmethod
    def of(cls, kernel: Callable[..., Any], args: tuple[Any, ...], given: _Given) -> _Call:
        packed = not isinstance(args[3], bool)
        batch_sizes, rest = (args[1], args[2:]) if packed else (None, args[1:])
        start, weights, bias, layers, dropout, training, bidirectional = rest[:7]
        batch_first = not packed and rest[7]
        return cls(
            kernel,
            args,
            given,
            inputs=args[0].transpose(0, 1) if batch_first else args[0],
            batch_sizes=batch_sizes,
            states=(start,) if isinstance(start, torch.Tensor) else tuple(start),
            weights=list(weights),
            bias=bias,
            layers=layers,
            dropout=dropout,
            training=training,
            directions=1 + bidirectional,
            batch_first=batch_first,
        )

    @cached_property
    def sizes(self) -> list[int]:
        """How many sequences there are at each time step."""
        if self.batch_sizes is None:
            return [self.inputs.shape[1]] * self.inputs.shape[0]
        return self.batch_sizes.tolist()

    def weights_of(self, layer: int) -> list[list[torch.Tensor]]:
        """The parameters of each direction of a layer."""
        each = len(self.weights) // (self.layers * self.directions)
        first = layer * self.directions
        return [self.weights[unit * each : (unit + 1) * each] for unit in range(first, first + self.directions)]

    def states_of(self, layer: int) -> tuple[torch.Tensor, ...]:
        """`[directions, batch, size]` the states that a layer starts from."""
        return tuple(state[layer * self.directions : (layer + 1) * self.directions] for state in self.states)


def _answered(call: _Call, taps: list[Tap]) -> tuple[torch.Tensor, ...]:
    """What the function returns, with what the taps make of it."""
    last = call.layers - 1
    whole = all(tap.site.unit // 2 == last and not tap.writes for tap in taps)
    if whole or not call.sizes:  # torch says what it thinks of a sequence without time steps
        with _without_advice(call):
            result = call.kernel(*call.args)
        if taps and call.sizes:
            _show(call, taps, result[0].transpose(0, 1) if call.batch_first else result[0])
        return result
    values, finals = call.inputs, []
    for layer in range(call.layers):
        there = [tap for tap in taps if tap.site.unit // 2 == layer]
        if any(tap.writes for tap in there):
            values, *final = _stepped(call, layer, values, there)
        else:
            values, *final = _fused(call, layer, values)
            _show(call, there, values)
        finals.append(final)
        if layer < last and call.training and call.dropout > 0:
            values = functional.dropout(values, call.dropout)
    states = (torch.cat(each) for each in zip(*finals, strict=True))
    return (values.transpose(0, 1) if call.batch_first else values, *states)


def _fused(call: _Call, layer: int, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One layer by torch's own function: hidden states of both directions side by side, and the last states."""
    states = call.states_of(layer)
    weights = [weight for direction in call.weights_of(layer) for weight in direction]
    how = (weights, call.bias, 1, 0.0, call.training, call.directions == 2)
    start = states[0] if len(states) == 1 else states
    with _without_advice(call):
        if call.batch_sizes is None:
            return call.kernel(values, start, *how, False)
        return call.kernel(values, call.batch_sizes, start, *how)


@contextmanager
def _without_advice(call: _Call) -> Iterator[None]:
    """Torch says that it could be faster; about a call that the user did not write, it should not."""
    projected = len({state.shape[-1] for state in call.states}) > 1
    if not (projected or call.inputs.is_cuda):
        yield  # to touch the filters lets warnings that were shown once be shown again
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        yield


def _stepped(call: _Call, layer: int, values: torch.Tensor, taps: list[Tap]) -> tuple[torch.Tensor, ...]:
    """One layer time step by time step; returns what `_fused` returns."""
    dtype = _kept_in(call, layer, values)
    rows = values if call.batch_sizes is not None else values.flatten(0, 1)
    hidden, finals, passed = [], [], []
    places = _places_of_steps(call, rows.device)
    for reverse, weights in enumerate(call.weights_of(layer)):
        there = places if places is None or not reverse else places[::-1]
        passing = _Passing([tap for tap in taps if tap.site.unit % 2 == reverse], there, call)
        start = tuple(state[reverse].to(dtype) for state in call.states_of(layer))
        every, final = stepped_direction(call.kernel, rows, call.sizes, start, weights, reverse == 1, passing)
        hidden.append(every)
        finals.append(final)
        passed.append(passing)
    for reverse, passing in enumerate(passed):
        for tap, kept in passing.kept:
            tap.see(_seen(call, torch.cat(kept[::-1] if reverse else kept), tap))
    both = torch.cat(hidden, dim=-1)
    if call.batch_sizes is None:
        both = both.unflatten(0, values.shape[:2])
    return (both, *(torch.stack(each) for each in zip(*finals, strict=True)))


def _kept_in(call: _Call, layer: int, values: torch.Tensor) -> torch.dtype:
    """The type in which torch's function gives hidden states; under autocast only a trial tells."""
    if not torch.is_autocast_enabled(values.device.type):
        return values.dtype
    with torch.no_grad():
        hidden, *_ = _fused(call, layer, values)
    return hidden.dtype


class _Passing:
    """The taps of one direction, in their order, at each time step."""

    def __init__(self, taps: list[Tap], places: list[torch.Tensor] | None, call: _Call) -> None:
        self._places = None if places is None else iter(places)
        lengths = _lengths(call.given) if isinstance(call.given, PackedSequence) else None
        self._rectangle = (len(call.sizes), call.sizes[0], lengths)
        self.kept: list[tuple[Tap, list[torch.Tensor]]] = [(tap, []) for tap in taps if not tap.writes]
        readers = iter(self.kept)
        self._taps = [(tap, None if tap.writes else next(readers)[1]) for tap in taps]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        place = None if self._places is None else next(self._places)
        for tap, kept in self._taps:
            if kept is not None:
                kept.append(hidden)
                continue
            new = tap.see(Seen(hidden, place, *self._rectangle))
            if not isinstance(new, torch.Tensor):
                raise ModelError(f"{tap.site.name}: an edit returned {type(new).__name__}, not a tensor")
            if (new.shape, new.dtype) != (hidden.shape, hidden.dtype):
                was, now = (f"{list(each.shape)} {each.dtype}" for each in (hidden, new))
                raise ModelError(f"{tap.site.name}: an edit made {now} of {was}; shape and type have to stay")
            hidden = new
        return hidden


def _places_of_steps(call: _Call, device: torch.device) -> list[torch.Tensor] | None:
    """For each time step, where its rows are in the rectangle of the batch; None where nobody knows."""
    length = len(call.sizes)
    if call.batch_sizes is None:
        examples = torch.arange(call.sizes[0] if call.sizes else 0, device=device) * length
        return [examples + time for time in range(length)]
    if not isinstance(call.given, PackedSequence):
        return None
    return list(_place(call.given).to(device).split(list(call.sizes)))


def _show(call: _Call, taps: list[Tap], values: torch.Tensor) -> None:
    """Show taps that only read the hidden states of a layer, `[..., directions * size]`."""
    size = values.shape[-1] // call.directions
    for tap in taps:
        reverse = tap.site.unit % 2
        # A copy: whoever called the module may go on writing into what it returned.
        tap.see(_seen(call, values[..., reverse * size : (reverse + 1) * size].clone(), tap))


def _seen(call: _Call, values: torch.Tensor, tap: Tap) -> Seen:
    """Hidden states of one direction, time first, as a tap is given them."""
    given = call.given
    if call.batch_sizes is None:
        batched = values.view(len(call.sizes), call.sizes[0], values.shape[-1]).transpose(0, 1)
        alone = isinstance(given, torch.Tensor) and given.ndim == 2 and given.is_floating_point()
        return Seen(batched[0] if alone else batched)
    if not isinstance(given, PackedSequence):
        raise ModelError(
            f"{tap.site.name} cannot be read: the module packs its sequences itself, so that nobody knows which row "
            "is which; give it a PackedSequence"
        )
    place = _place(given).to(values.device)
    order = place.argsort()
    return Seen(values[order], place[order], len(call.sizes))


def _lengths(packed: PackedSequence) -> torch.Tensor:
    """`[examples]` how long each sequence is."""
    sizes = packed.batch_sizes
    lengths = (sizes[:, None] > torch.arange(int(sizes[0]))).sum(0)
    return lengths if packed.unsorted_indices is None else lengths[packed.unsorted_indices.cpu()]


def _place(packed: PackedSequence) -> torch.Tensor:
    """`[rows]` where each row of a packed sequence is in the rectangle of the batch, `example * longest + time`."""
    longest = len(packed.batch_sizes)
    example = torch.cat([torch.arange(size) for size in packed.batch_sizes.tolist()]).to(packed.data.device)
    time = torch.repeat_interleave(torch.arange(longest), packed.batch_sizes).to(packed.data.device)
    if packed.sorted_indices is not None:
        example = packed.sorted_indices[example]
    return example * longest + time
