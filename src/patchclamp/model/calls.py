"""`Call`: what one call of a network is given: which tokens are real, and how many came before.

An intervention at some positions only has to know where a text begins and ends: beside padding on either side, and
while a text is generated token by token with a cache.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from patchclamp.model.site import Site

_BESIDE_TEXT = re.compile(r"vision|visual|image|audio|speech")
_OF_OTHER_KINDS = ("pixel_values", "input_features", "input_values")


@dataclass(frozen=True)
class Call:
    """One call of a network, or of one stack of it.

    Attributes:
        examples: rows of the batch; None where that is not known.
        columns: tokens that each row is given, padding included; None where that is not known.
        mask: `[examples, past + columns]` bool, the real tokens, those in the cache included; None where all are.
        past: columns that were given by earlier calls and are in the cache.
        prompt: columns that were given as they are: later ones were generated. None where that is not known.
        grows: the text may go on in a next call, so that a position past its end may still come.
        unclear: why it is not known which of the tokens are real; empty where it is.
        outside: the network was not called, but a part of it by itself.
        start: columns of this call that the site has shown already, of a block that computes in pieces, or of a cell
            that is called for each time step.
        shown: that number for whoever looks; each has a key of its own.
    """

    examples: int | None = None
    columns: int | None = None
    mask: torch.Tensor | None = None
    past: int = 0
    prompt: int | None = None
    grows: bool = False
    unclear: str = ""
    outside: bool = False
    start: int = 0
    shown: dict[int, int] = field(default_factory=dict, compare=False)

    @property
    def end(self) -> int:
        """Columns of the text so far, those of this call included."""
        return self.past + (self.columns or 0)

    def rows(self, part: slice) -> Call:
        """The same call for some of its examples."""
        return replace(self, examples=part.stop - part.start, mask=None if self.mask is None else self.mask[part])


class Calls:
    """The call that is running, by stack. Made by `following`."""

    def __init__(self) -> None:
        self._text, self._encoder, self._beside = Call(outside=True), Call(outside=True), Call(outside=True)
        self._both = False
        self._cache: Any = None
        self._ids: torch.Tensor | None = None

    def at(self, site: Site) -> Call:
        """The call in which a site is seen."""
        if site.stack == "encoder" and not self._encoder.outside:
            return self._encoder
        if self._both and _BESIDE_TEXT.search(f"{site.stack} {site.module}"):
            return self._beside
        return self._text

    def begin(self, given: Mapping[str, Any], two_stacks: bool) -> None:
        """The network is called; `two_stacks`: an encoder and a decoder, and the decoder's is the text that grows."""
        prefix = "decoder_" if two_stacks else ""
        ids = _tokens(given, prefix)
        if ids is None and not two_stacks:  # a network of the user's own names what it is given as it likes
            first = next((each for each in given.values() if isinstance(each, torch.Tensor)), None)
            ids = first if _are_ids(first) else None
        examples, columns = (None, None) if ids is None else ids.shape[:2]
        others = _first(given, *_OF_OTHER_KINDS)
        self._both = ids is not None and others is not None
        self._beside = Call(None if others is None else others.shape[0])
        if ids is None and others is not None:
            examples = others.shape[0]
        if two_stacks and given.get("encoder_outputs") is None:
            self.begin_encoder(given)
        cache = next((given[name] for name in ("past_key_values", "cache_params") if given.get(name) is not None), None)
        before, past = self._text, self._past(cache)
        self._cache = cache
        mask, unclear = _mask(given.get(f"{prefix}attention_mask"), examples, columns, past, cache is not None)
        if mask is None and past and before.mask is not None and before.end == past and before.examples == examples:
            # A state-space model is told of padding only once.
            mask = torch.cat([before.mask, before.mask.new_ones(len(before.mask), columns or 0)], 1)
        called_again = cache is None and given.get("use_cache") is False and given.get("return_dict") is not None
        grows = cache is not None or given.get("use_cache") is True or called_again
        prompt = self._prompt(ids, columns, past, called_again)
        self._text = Call(examples, columns, mask, past, prompt, grows, unclear)

    def begin_encoder(self, given: Mapping[str, Any]) -> None:
        """The encoder is called, by the network or by itself, as `generate` does."""
        ids = _tokens(given, "")
        examples, columns = (None, None) if ids is None else ids.shape[:2]
        mask, unclear = _mask(given.get("attention_mask"), examples, columns, 0, False)
        self._encoder = Call(examples, columns, mask, unclear=unclear)

    def ended(self) -> None:
        """The network has returned; what it knew of the text is kept for the next call."""
        self._text = replace(self._text, outside=True)
        self._encoder, self._beside = Call(outside=True), Call(outside=True)

    def _past(self, cache: Any) -> int:
        """How many columns are in a cache."""
        if cache is None:
            return 0
        try:
            return int(cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[-2])
        except (TypeError, IndexError, AttributeError, KeyError, ValueError):
            pass  # a state-space model keeps no columns, only what came of them
        filled = getattr(cache, "has_previous_state", None)
        goes_on = cache is self._cache and (not callable(filled) or bool(filled()))
        return self._text.end if goes_on else 0

    def _prompt(self, ids: Any, columns: int | None, past: int, called_again: bool) -> int | None:
        """Columns that nobody generated: `generate` gives those it generated one by one."""
        before, self._ids = self._ids, ids if called_again else None
        earlier = self._text.prompt
        if columns is None:
            return None
        if past:
            return earlier if columns == 1 and earlier is not None and self._text.end == past else past + columns
        # Without a cache, generating calls the network with the whole text so far.
        goes_on = before is not None and before.shape == (*ids.shape[:1], columns - 1, *ids.shape[2:])
        if goes_on and earlier is not None and torch.equal(before, ids[:, :-1]):  # type: ignore[arg-type]
            return earlier
        return columns


@contextmanager
def following(root: nn.Module, encoder: nn.Module | None = None) -> Iterator[Calls]:
    """Follow the calls of a network while the block runs; `encoder` may be called by itself, as `generate` does."""
    calls = Calls()
    names, names_of_encoder = _names(root), [] if encoder is None else _names(encoder)
    running = False

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal running
        running = True
        calls.begin(dict(zip(names, args, strict=False)) | kwargs, encoder is not None)

    def after(*_: Any) -> None:
        nonlocal running
        running = False
        calls.ended()

    def before_encoder(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.begin_encoder(dict(zip(names_of_encoder, args, strict=False)) | kwargs)

    def after_encoder(*_: Any) -> None:
        if not running:
            calls.ended()

    with ExitStack() as stack:
        stack.callback(root.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
        stack.callback(root.register_forward_hook(after, always_call=True).remove)
        if encoder is not None and encoder is not root:
            stack.callback(encoder.register_forward_pre_hook(before_encoder, with_kwargs=True, prepend=True).remove)
            stack.callback(encoder.register_forward_hook(after_encoder, always_call=True).remove)
        yield calls


def _names(module: nn.Module) -> list[str]:
    """The names of what a module is given in order, as far as it has such."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    ordered = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name if each.kind in ordered else f"*{each.name}" for each in parameters]


def _first(given: Mapping[str, Any], *names: str) -> torch.Tensor | None:
    return next((given[name] for name in names if isinstance(given.get(name), torch.Tensor)), None)


def _tokens(given: Mapping[str, Any], prefix: str) -> torch.Tensor | None:
    """Token ids `[examples, columns]`, or embeddings `[examples, columns, width]`."""
    ids, embeds = given.get(f"{prefix}input_ids"), given.get(f"{prefix}inputs_embeds")
    if _are_ids(ids):
        return ids
    return embeds if isinstance(embeds, torch.Tensor) and embeds.ndim == 3 else None


def _are_ids(given: Any) -> bool:
    return isinstance(given, torch.Tensor) and given.ndim == 2 and given.dtype in (torch.int64, torch.int32)


def _mask(
    given: Any, examples: int | None, columns: int | None, past: int, cached: bool
) -> tuple[torch.Tensor | None, str]:
    """`[examples, past + columns]` bool, and why it is not known."""
    if isinstance(given, Mapping) and cached:  # made by `generate`, by kind of attention
        given = given.get("full_attention", "for other kinds of attention")
    if given is None:
        return None, ""
    if not isinstance(given, torch.Tensor):
        return None, "the attention mask is no tensor"
    if given.ndim == 4 and cached:
        # What the last token may look at: all real ones before it.
        given = given[:, 0, -1]
        given = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
        given = given if examples is None else given.expand(examples, -1)
    if given.ndim != 2 or (examples is not None and given.shape[0] != examples):
        return None, f"the attention mask is {list(given.shape)}"
    width = given.shape[1] if columns is None else past + columns
    if given.shape[1] < width or (given.shape[1] > width and not cached):
        return None, f"the attention mask is {list(given.shape)}, and there are {width} tokens"
    return given[:, :width].bool(), ""
