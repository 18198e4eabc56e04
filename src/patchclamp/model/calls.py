"""`Call`: what one call of a network is given: which tokens are real, and how many came before.

An intervention at some positions only has to know where a text begins and ends: beside padding on either side, and
while a text is generated token by token with a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchclamp.model.site import Site
from patchclamp.model.taps import Seen


@dataclass
class Call:
    """One call of a network, or of one stack of it.

    Attributes:
        mask: `[examples, columns]` bool, the real tokens, those in the cache included; None where all are.
        past: columns that were given by earlier calls and are in the cache.
        prompt: columns of the call that began this text: later ones were generated.
        grows: the text may go on in a next call, so that a position past its end may still come.
        steps: name of a site -> how often its module was called, for cells that are called once a time step.
    """

    mask: torch.Tensor | None = None
    past: int = 0
    prompt: int | None = None
    grows: bool = False
    steps: dict[str, int] = field(default_factory=dict)

    def rows(self, part: slice) -> Call:
        """The same call for some of its examples."""
        return Call(None if self.mask is None else self.mask[part], self.past, self.prompt, self.grows, self.steps)


class Calls:
    """The call that is running, by stack. Made by `following`."""

    def __init__(self) -> None:
        self._now: dict[str, Call] = {}
        self._ids: torch.Tensor | None = None

    def at(self, site: Site) -> Call:
        """The call in which a site is seen; an unknown one has no mask."""
        stack = "encoder" if site.stack == "encoder" and "encoder" in self._now else ""
        return self._now.get(stack, Call())

    def _begin(self, kwargs: Mapping[str, Any], args: tuple[Any, ...]) -> None:
        decoding = isinstance(kwargs.get("decoder_input_ids"), torch.Tensor)
        ids = kwargs.get("decoder_input_ids" if decoding else "input_ids", args[0] if args else None)
        mask = kwargs.get("decoder_attention_mask" if decoding else "attention_mask")
        if decoding and kwargs.get("encoder_outputs") is None:
            self._now["encoder"] = Call(_bool(kwargs.get("attention_mask")))
        cache = kwargs.get("past_key_values")
        past = _length(cache)
        grows = cache is not None or "use_cache" in kwargs
        prompt = self._prompt(ids, past, grows, kwargs)
        self._now[""] = Call(_bool(mask), past, prompt, grows)

    def _prompt(self, ids: Any, past: int, grows: bool, kwargs: Mapping[str, Any]) -> int | None:
        before, self._ids = self._ids, None
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2:
            embeds = kwargs.get("inputs_embeds")
            return embeds.shape[1] if isinstance(embeds, torch.Tensor) and not past else None
        earlier = self._now.get("", Call()).prompt
        if past:
            return earlier if earlier is not None else past
        # Without a cache, generating calls the network with the whole text so far.
        self._ids = ids if grows else None
        goes_on = before is not None and before.shape[0] == ids.shape[0] and before.shape[1] + 1 == ids.shape[1]
        if goes_on and earlier is not None and torch.equal(before, ids[:, :-1]):  # type: ignore[arg-type]
            return earlier
        return ids.shape[1]

    def _begin_encoder(self, kwargs: Mapping[str, Any]) -> None:
        self._now["encoder"] = Call(_bool(kwargs.get("attention_mask")))


@contextmanager
def following(root: nn.Module, encoder: nn.Module | None = None) -> Iterator[Calls]:
    """Follow the calls of a network while the block runs; `encoder` may be called by itself, as `generate` does."""
    calls = Calls()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls._begin(kwargs, args)

    def before_encoder(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls._begin_encoder(kwargs)

    with ExitStack() as stack:
        stack.callback(root.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
        if encoder is not None and encoder is not root:
            stack.callback(encoder.register_forward_pre_hook(before_encoder, with_kwargs=True).remove)
        yield calls


def rectangle(site: Site, seen: Seen, call: Call) -> tuple[int, int]:
    """Examples and positions of what a site shows."""
    if seen.place is not None:
        if seen.examples is not None and seen.length is not None:
            return seen.examples, seen.length
        if call.mask is not None:
            return call.mask.shape[0], call.mask.shape[1] - call.past
        length = seen.length or 1
        return (int(seen.place.max()) // length + 1 if seen.place.numel() else 0), length
    shape = seen.tensor.shape
    if site.time or (site.through == "recurrent" and seen.tensor.ndim == 2):
        return shape[0], 1
    if without_tokens(site) or seen.tensor.ndim < 3:
        return shape[0], 1
    return shape[0], shape[1]


def without_tokens(site: Site) -> bool:
    """Whether a site's positions are places in an image; those of attention probabilities are the queries."""
    return site.axis != -1 and site.through != "attention"


def _bool(mask: Any) -> torch.Tensor | None:
    """A mask `[examples, columns]` as bool; one of another shape says nothing about tokens."""
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def _length(cache: Any) -> int:
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    if length is not None:
        return int(length())
    try:
        return int(cache[0][0].shape[-2])
    except (TypeError, IndexError, AttributeError, KeyError):
        return 0
