"""`Replay`: run only the upper part of a network again, from a block upward.

Below the first block that an intervention touches, every run computes the same. What the block below returned is kept,
and while a replay runs the lower blocks return it instead of computing. Whether that gives the network's own numbers is
tried on the first batch; where it does not, the whole network is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchclamp.model.hooks import first_tensor
from patchclamp.model.model import Model
from patchclamp.model.signature import accepts
from patchclamp.model.site import Site
from patchclamp.verify.batches import Batch, repeated


@dataclass(eq=False)
class Replay:
    """The blocks that are not run again.

    Attributes:
        blocks: those below the first that is touched, in order; empty where the whole network is run.
        fraction: the part of the network's blocks that is run again.
    """

    blocks: list[nn.Module] = field(default_factory=list)
    fraction: float = 1.0

    @classmethod
    def below(cls, model: Model, sites: Sequence[Site]) -> Replay:
        """What lies below the sites: nothing, where they are not all in one stack of blocks that is run in order."""
        stacks = [stack for stack in model.stacks if any(site.stack == stack.name for site in sites)]
        known = all(site.layer is not None and site.kind not in ("conv", "recurrent", "module") for site in sites)
        if not known or len(stacks) != 1 or any(site.stack != stacks[0].name for site in sites) or not sites:
            return cls()
        first, stack = min(site.layer for site in sites if site.layer is not None), stacks[0]
        number = max(stack.layers) + 1
        if first == 0 or stack.sharing or sorted(stack.layers) != list(range(number)):
            return cls()
        blocks = [model.module.get_submodule(stack.block(layer)) for layer in range(first)]
        return cls(blocks, (number - first) / number)

    def __bool__(self) -> bool:
        return bool(self.blocks)

    @contextmanager
    def keeping(self) -> Iterator[list[Any]]:
        """While the block runs, what each lower block returns is kept: one entry for each, the newest."""
        kept: list[Any] = [None] * len(self.blocks)

        def keep(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                last = number == len(self.blocks) - 1
                kept[number] = _detached(output) if last else _without_states(output)

            return hook

        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(keep(number)).remove)
            yield kept

    @contextmanager
    def replaying(self, kept: Sequence[Any], batch: Batch, times: int) -> Iterator[None]:
        """While the block runs, lower blocks return what was kept of the batch, so many copies of it."""
        count = len(batch.examples) * batch.rows

        def forward(number: int) -> Callable[..., Any]:
            def instead(*args: Any, **kwargs: Any) -> Any:
                output = _repeated(kept[number], times, count)
                if number == len(self.blocks) - 1:
                    return output
                states = args[0] if args else kwargs["hidden_states"]
                return _with_states(output, states)

            return instead

        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                # Hooks on the block itself go on running; a method of this one object is put in the place of its own.
                before = block.__dict__.get("forward")
                block.forward = forward(number)  # type: ignore[method-assign]
                stack.callback(_put_back, block, before)
            yield


def without_cache(model: Model, batch: Batch) -> Batch:
    """The batch with the cache switched off: a replay fills no cache of the lower blocks."""
    if not isinstance(batch.inputs, Mapping) or not accepts(model.module, "use_cache"):
        return batch
    inputs = {**batch.inputs, "use_cache": False}
    kept = (batch.texts, batch.labels, batch.classes, batch.answers, batch.foils)
    return Batch(inputs, batch.examples, batch.rows, *kept)


def _put_back(block: nn.Module, before: Any) -> None:
    if before is None:
        del block.forward
    else:
        block.forward = before


class _States:
    """Stands for the hidden states in what a block returned."""


def _detached(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(_detached(each) for each in output)
    return output


def _without_states(output: Any) -> Any:
    states = first_tensor(output)
    if isinstance(output, torch.Tensor):
        return _States()
    if isinstance(output, tuple):
        return tuple(_States() if each is states else _detached(each) for each in output)
    return output


def _with_states(output: Any, states: torch.Tensor) -> Any:
    if isinstance(output, _States):
        return states
    if isinstance(output, tuple):
        return tuple(states if isinstance(each, _States) else each for each in output)
    return output


def _repeated(value: Any, times: int, count: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_repeated(each, times, count) for each in value)
    return repeated(value, times, count)
