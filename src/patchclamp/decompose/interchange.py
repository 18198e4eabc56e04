"""Interchange: run a base prompt with part of what the network had on a source prompt, and see whose answer comes.

What `das`, `mdas` and `dbm` learn from, and what `verify.disentangle` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from patchclamp.attribution import frozen
from patchclamp.errors import DataError, ModelError, SiteNotReached, unknown
from patchclamp.model import Model, Site
from patchclamp.model.hooks import first_tensor, hooked, reading
from patchclamp.model.tokenize import TokenReader, pad, require_tokenizer

Swap = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the base's state and the source's, `[n, size]` each, to what the base's becomes; differentiable."""


class Interchanges:
    """Pairs that are ready to be run at a site: every source has been run once, and what it had there is kept.

    Args:
        model: the network.
        site: where to swap.
        pairs: objects with these attributes, as `testbed.attribute_world.EntityPair`s or a NamedTuple of your own:
            `base` and `source`, texts or tensors that the module takes (without the batch); `base_position` and
            `source_position`, which of the site's tokens, special ones included (None where it has none);
            `attribute`, what the base prompt asks for; `base_answer` and `source_answer`, the token (or class) that
            should follow the base prompt: an id, several ids, or a text. Where there are `base_entity` and
            `source_entity`, their names, positions in texts are checked against them.

    Attributes:
        attributes: `[pairs]`, what each base prompt asks for.
        states: `[pairs, size]`, what the sources had at the site.
        same: `[pairs]` bool: both answers are alike, so that a swap shows nothing.

    Raises:
        DataError: there are none, or a pair cannot be used; the message names it.
        ModelError: texts for a model without a tokenizer, or with an encoder and a decoder.
    """

    def __init__(self, model: Model, site: str | Site, pairs: Iterable[Any]) -> None:
        listed = list(pairs)
        if not listed:
            raise DataError("there are no pairs of base and source")
        self.model, self.site = model, model.site(site)
        self.attributes = np.asarray([str(each.attribute) for each in listed], object)
        self._base = _Given(model, [each.base for each in listed], [each.base_position for each in listed])
        source = _Given(model, [each.source for each in listed], [each.source_position for each in listed])
        self._answers: dict[str, list[tuple[int, ...]]] = {"base": [], "source": []}
        for number, pair in enumerate(listed):
            for which, found in self._answers.items():
                found.append(_answer(model.reader, getattr(pair, f"{which}_answer"), number))
                entity = getattr(pair, f"{which}_entity", "")
                if entity and self._base.texts:
                    text, position = getattr(pair, which), getattr(pair, f"{which}_position")
                    _check_entity(self._base.reader, text, entity, position, number)
            lengths = [len(found[-1]) for found in self._answers.values()]
            if lengths[0] != lengths[1]:
                raise DataError(
                    f"pair {number}: its answers have {lengths[0]} and {lengths[1]} tokens: cut them to the same number"
                )
        self.same = np.asarray([one == two for one, two in zip(*self._answers.values(), strict=True)])
        self.states = self._states(source)

    @classmethod
    def of(cls, model: Model, site: str | Site, pairs: Iterable[Any] | Interchanges) -> Interchanges:
        """The pairs, made ready unless they are; then model and site must be those."""
        if not isinstance(pairs, Interchanges):
            return cls(model, site, pairs)
        if pairs.model.module is not model.module or pairs.site != model.site(site):
            raise DataError(f"these pairs were made ready for {pairs.site.name} of {pairs.model.name}")
        return pairs

    @property
    def size(self) -> int:
        """Of the site."""
        return self.states.shape[1]

    def cause(self, attribute: str) -> np.ndarray:
        """Places of the pairs that ask for an attribute and differ in it.

        Raises:
            UnknownName: none asks for it.
            DataError: none differs.
        """
        asking = self.attributes == attribute
        if not asking.any():
            raise unknown("attribute that a base prompt asks for", attribute, sorted(set(self.attributes)))
        if not (asking & ~self.same).any():
            raise DataError(f"in no pair that asks for {attribute!r} do base and source differ in it")
        return np.flatnonzero(asking & ~self.same)

    def isolate(self, attribute: str) -> dict[str, np.ndarray]:
        """Other attribute -> places of the pairs that ask for it and differ in it.

        Raises:
            DataError: there is none.
        """
        others = sorted(set(self.attributes) - {attribute})
        found = {each: np.flatnonzero((self.attributes == each) & ~self.same) for each in others}
        found = {each: places for each, places in found.items() if len(places)}
        if not found:
            raise DataError(f"no base prompt asks for anything else than {attribute!r}: what should stay is not known")
        return found

    def losses(self, places: np.ndarray, want: np.ndarray | str, swap: Swap | None) -> torch.Tensor:
        """Cross entropy of the wanted answers, `[places]`, nats, with gradient to what `swap` was made of."""
        return self._run(places, want, swap)[0]

    @torch.no_grad()
    def right(self, places: np.ndarray, want: np.ndarray | str, swap: Swap | None) -> np.ndarray:
        """Whether the wanted answer is the likeliest, `[places]` bool.

        Args:
            places: of the pairs.
            want: "base" or "source": whose answer; or one of these for each place.
            swap: what the base's state becomes; None: it stays.
        """
        parts = np.array_split(np.arange(len(places)), max(1, -(-len(places) // _AT_ONCE)))
        wants = np.broadcast_to(np.asarray(want), len(places))
        with frozen(self.model.module):
            found = [self._run(places[part], wants[part], swap)[1] for part in parts]
        return torch.cat(found).cpu().numpy()

    def _run(self, places: np.ndarray, want: np.ndarray | str, swap: Swap | None) -> tuple[torch.Tensor, torch.Tensor]:
        wants = np.broadcast_to(np.asarray(want), len(places))
        answers = [self._answers[str(which)][place] for which, place in zip(wants, places, strict=True)]
        source = self.states[torch.from_numpy(np.asarray(places))]

        def edit(tensor: torch.Tensor) -> torch.Tensor:
            assert swap is not None
            index, changed = self._base.index(tensor, places, self.site), tensor.clone()
            changed[index] = swap(tensor[index], source.to(tensor)).to(tensor.dtype)
            return changed

        edits = [] if swap is None else [(self.site, edit)]
        with self.model.evaluating(), hooked(self.model.module, edits):
            logits = self._base.logits(places, answers).float()
        width = logits.shape[1]
        wanted = torch.tensor([[*each, *[-100] * (width - len(each))] for each in answers], device=logits.device)
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        there = wanted != -100
        return loss.sum(1) / there.sum(1), ((logits.argmax(-1) == wanted) | ~there).all(1)

    @torch.no_grad()
    def _states(self, source: _Given) -> torch.Tensor:
        found = []
        for part in np.array_split(np.arange(len(self.attributes)), -(-len(self.attributes) // _AT_ONCE)):
            with self.model.evaluating(), reading(self.model.module, [self.site]) as seen:
                source.logits(part, [()] * len(part))
            if not seen[self.site.name]:
                raise SiteNotReached(f"the module of {self.site.name}, {self.site.module}, was never called")
            tensor = seen[self.site.name][-1].tensor
            found.append(tensor[source.index(tensor, part, self.site)])
        return torch.cat(found)


# Helpers --------------------------------------------------------------------------------------------

_AT_ONCE = 256


class _Given:
    """Texts or tensors as the network reads them, and the place in each."""

    def __init__(self, model: Model, inputs: Sequence[Any], positions: Sequence[int | None]) -> None:
        texts = [isinstance(each, str) for each in inputs]
        if any(texts) and not all(texts):
            raise DataError("some pairs are texts and some are not")
        self.model, self.positions = model, list(positions)
        self.inputs: Any = inputs
        self.texts = all(texts)
        if self.texts:
            if model.is_encoder_decoder:
                raise ModelError("pairs of texts are for models without an encoder of their own")
            self.reader = require_tokenizer(model.reader, "a pair of texts")
            self.ids = [each.ids for each in self.reader.encode(inputs)]
            for number, (ids, position) in enumerate(zip(self.ids, positions, strict=True)):
                if position is None or not 0 <= position < len(ids):
                    raise DataError(f"pair {number}: {inputs[number]!r} has tokens 0 to {len(ids) - 1}, not {position}")
        else:
            try:
                self.inputs = torch.stack([torch.as_tensor(each) for each in inputs])
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(f"bases, and sources, are texts or tensors of one shape: {error}") from error

    def logits(self, places: np.ndarray, answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """`[places, answer tokens, vocabulary]`, before each token of the answers (those before it given)."""
        width = max(1, max(len(each) for each in answers))
        if not self.texts:
            given = self.inputs[torch.from_numpy(places)].to(self.model.device)
            found = _logits(self.model.module(given))
            return (found[:, -1] if found.ndim == 3 else found)[:, None]
        # Padded on the right: that is right for every causal network, and positions stay.
        rows = [[*self.ids[place], *answer[:-1]] for place, answer in zip(places, answers, strict=True)]
        found = _logits(self.model.module(**self.model.text_inputs(pad(rows, self.reader.pad_id))))
        first = torch.tensor([len(self.ids[place]) - 1 for place in places])[:, None] + torch.arange(width)
        return found[torch.arange(len(places))[:, None], first.clamp(max=found.shape[1] - 1)]

    def index(self, tensor: torch.Tensor, places: np.ndarray, site: Site) -> Any:
        """Which part of the site's tensor is swapped."""
        wanted = [self.positions[place] for place in places]
        if tensor.ndim == 2 and all(each is None for each in wanted) and len(tensor) == len(places):
            return slice(None)
        if tensor.ndim != 3 or len(tensor) != len(places):
            raise DataError(
                f"{site.name} computes {list(tensor.shape)} for {len(places)} inputs: which rows are theirs?"
            )
        for place, each in zip(places, wanted, strict=True):
            if each is None or not 0 <= each < tensor.shape[1]:
                raise DataError(f"pair {place}: {site.name} has positions 0 to {tensor.shape[1] - 1}, not {each}")
        return torch.arange(len(places), device=tensor.device), torch.tensor(wanted, device=tensor.device)


def _logits(output: Any) -> torch.Tensor:
    found = getattr(output, "logits", None)
    found = first_tensor(output) if found is None else found
    if found is None or found.ndim not in (2, 3):
        raise ModelError("the network returns no logits, [inputs, classes] or [inputs, tokens, vocabulary]")
    return found


def _answer(reader: TokenReader | None, given: Any, number: int) -> tuple[int, ...]:
    if isinstance(given, str):
        ids = require_tokenizer(reader, "an answer in words").encode([given], ready=True)[0].ids
    else:
        ids = [int(each) for each in np.atleast_1d(np.asarray(given))]
    if not ids:
        raise DataError(f"pair {number}: the answer {given!r} has no tokens")
    return tuple(ids)


def _check_entity(reader: TokenReader, text: str, entity: str, position: int, number: int) -> None:
    start = text.rfind(entity)
    if start < 0:
        raise DataError(f"pair {number}: {entity!r} is not in {text!r}")
    offsets = reader.encode([text], offsets=True)[0].offsets or []
    inside = [place for place, (one, two) in enumerate(offsets) if one < start + len(entity) and two > start]
    if inside and position != inside[-1]:
        raise DataError(
            f"pair {number}: the last token of {entity!r} in {text!r} is number {inside[-1]}, not {position}"
        )
