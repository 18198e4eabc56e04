"""One direction of one recurrent layer in plain PyTorch, time step by time step.

The equations of `nn.LSTM`, `nn.GRU` and `nn.RNN`, with a place between the new hidden state and everything
that uses it: the next time step, the next layer, and whoever called the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

_States = tuple[torch.Tensor, ...]


def stepped_direction(
    kernel: Callable,
    rows: torch.Tensor,
    batch_sizes: Sequence[int],
    states: _States,
    weights: Sequence[torch.Tensor],
    reverse: bool,
    passing: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, _States]:
    """Run one direction of one layer.

    Args:
        kernel: which equations: `torch.lstm`, `torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu`.
        rows: `[sum(batch_sizes), inputs]`, all sequences at the first time step, then at the second, and so on.
        batch_sizes: how many sequences there are at each time step; never more than at the one before.
        states: `[batch, size]` the hidden state that the direction starts from; for the LSTM also the cell state.
        weights: the parameters of the direction, in the order of `nn.RNNBase`.
        reverse: from the last time step to the first.
        passing: is given every new hidden state `[sequences at that step, size]`, in the order in which the
            direction runs; what it returns is the hidden state.

    Returns:
        The hidden states `[sum(batch_sizes), size]` in the order of `rows`, and the states `[batch, size]` after the
        last step of each sequence.
    """
    input_weight, state_weight, *others = weights
    has_bias, has_projection = len(others) >= 2, len(others) % 2 == 1
    input_bias, state_bias = others[:2] if has_bias else (None, None)
    step = _STEPS[kernel]
    # What comes in is the same whatever the state: one product for all time steps.
    entering = functional.linear(rows, input_weight, input_bias).split(list(batch_sizes))
    times = range(len(batch_sizes))
    now = tuple(state[:0] for state in states) if reverse else states
    hidden: list[torch.Tensor] = [rows[:0]] * len(batch_sizes)
    ended: list[_States] = []
    for time in reversed(times) if reverse else times:
        here, before = batch_sizes[time], len(now[0])
        if here < before:
            ended.append(tuple(state[here:] for state in now))
            now = tuple(state[:here] for state in now)
        elif here > before:
            now = tuple(torch.cat([state, first[before:here]]) for state, first in zip(now, states, strict=True))
        new, *cell = step(entering[time], now, functional.linear(now[0], state_weight, state_bias))
        if has_projection:
            new = functional.linear(new, others[-1])
        # Under autocast the parts of a step may be wider than what a state is kept in.
        hidden[time] = passing(new.to(states[0].dtype))
        now = (hidden[time], *(each.to(states[0].dtype) for each in cell))
    # The sequences that end last come first.
    final = tuple(torch.cat(parts) for parts in zip(now, *reversed(ended), strict=True))
    return torch.cat(hidden), final


# Each is given what comes in and what the state gives, `[batch, gates * size]`, and returns the new states.


def _lstm(entering: torch.Tensor, states: _States, fed_back: torch.Tensor) -> _States:
    let_in, forget, content, out = (entering + fed_back).chunk(4, dim=-1)
    cell = torch.sigmoid(forget) * states[1] + torch.sigmoid(let_in) * torch.tanh(content)
    return torch.sigmoid(out) * torch.tanh(cell), cell


def _gru(entering: torch.Tensor, states: _States, fed_back: torch.Tensor) -> _States:
    reset_in, update_in, content_in = entering.chunk(3, dim=-1)
    reset_state, update_state, content_state = fed_back.chunk(3, dim=-1)
    content = torch.tanh(content_in + torch.sigmoid(reset_in + reset_state) * content_state)
    return (content + torch.sigmoid(update_in + update_state) * (states[0] - content),)


def _tanh(entering: torch.Tensor, _: _States, fed_back: torch.Tensor) -> _States:
    return (torch.tanh(entering + fed_back),)


def _relu(entering: torch.Tensor, _: _States, fed_back: torch.Tensor) -> _States:
    return (torch.relu(entering + fed_back),)


_STEPS: dict[Callable, Callable[[torch.Tensor, _States, torch.Tensor], _States]] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _tanh,
    torch.rnn_relu: _relu,
}
