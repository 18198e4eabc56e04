"""Turn texts into token ids and padded batches, and token ids into strings that read as text.

The user's tokenizer is never changed: fast tokenizers keep truncation settings inside, so a copy is
used. Padding is done here, under the attention mask, so a tokenizer needs no padding token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from patchclamp.errors import ModelError

# Where a Hugging Face configuration keeps the longest sequence that the model itself can take.
_LENGTH_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_source_positions")


class Encoded(NamedTuple):
    """One text as the model reads it."""

    ids: list[int]
    special: list[bool]  # tokens that the tokenizer added: they are not part of the text
    truncated: bool
    offsets: list[tuple[int, int]] | None = None  # the characters of each token; (0, 0) for one that has none


class TokenReader:
    """A tokenizer's reading side, with its settings fixed."""

    def __init__(self, tokenizer: Any, config: Any = None) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self.padding_side: str = getattr(tokenizer, "padding_side", "right")
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id: int = pad if isinstance(pad, int) else 0
        self.max_length = _max_length(tokenizer, config)

    @property
    def has_offsets(self) -> bool:
        """Whether the tokenizer can say which characters of a text a token is made of (a fast one can)."""
        return bool(getattr(self._tokenizer, "is_fast", False))

    def encode(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        *,
        whole: bool = False,
        ready: bool = False,
        offsets: bool = False,
    ) -> list[Encoded]:
        """Token ids of each text, cut at `max_length` (default: what model and tokenizer can take).

        Args:
            texts: the texts.
            max_length: longest text in tokens.
            whole: cut nothing, however long a text is.
            ready: the texts hold their special tokens already (a rendered conversation): add none, and take those
                that are there for special.
            offsets: also say which characters each token is made of.

        Raises:
            ModelError: offsets are asked for and the tokenizer cannot tell them.
        """
        if offsets and not self.has_offsets:
            raise ModelError(
                f"{type(self._tokenizer).__name__} is a slow tokenizer, which does not say which characters a token is "
                "made of, so labels of words cannot be matched with tokens: load a fast one (a tokenizer.json)"
            )
        limit = None if whole else self.max_length if max_length is None else max_length
        # One token more than the limit would be enough to know of a cut, but a tokenizer that adds special
        # tokens at the end must see the limit itself: so cut texts are those that fill it and change without it.
        batch = self._tokenizer(
            list(texts),
            truncation=limit is not None,
            max_length=limit,
            padding=False,
            add_special_tokens=not ready,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=not whole,
            **({"return_offsets_mapping": True} if offsets else {}),
        )
        ids, special = batch["input_ids"], batch["special_tokens_mask"]
        full = [number for number, each in enumerate(ids) if limit is not None and len(each) >= limit]
        cut = set()
        if full:
            uncut = self._tokenizer(
                [texts[number] for number in full],
                truncation=False,
                padding=False,
                add_special_tokens=not ready,
                verbose=False,
            )
            cut = {n for n, each in zip(full, uncut["input_ids"], strict=True) if len(each) > len(ids[n])}
        if ready:
            known = self._control_ids
            special = [[token in known for token in each] for each in ids]
        places = batch["offset_mapping"] if offsets else [None] * len(ids)
        return [
            Encoded(list(each), [bool(flag) for flag in flags], number in cut, of_text)
            for number, (each, flags, of_text) in enumerate(zip(ids, special, places, strict=True))
        ]

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Each token as it reads in a text; joined, they give the text back (up to the tokenizer's own losses)."""
        special = frozenset(self._tokenizer.all_special_tokens)
        tokens = self._tokenizer.convert_ids_to_tokens([int(each) for each in ids])
        return [token if token in special else self.display(token) for token in tokens]

    def display(self, token: str | None) -> str:
        """One raw token that is not special (`##ing`, `Ġthe`, `▁the`, `<0x0A>`) as text."""
        if token is None:
            return "�"
        if self._is_wordpiece:
            return token[2:] if token.startswith("##") and len(token) > 2 else f" {token}"
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            return bytes([int(token[3:5], 16)]).decode("utf-8", errors="replace")
        if "▁" in token:
            return token.replace("▁", " ")
        if self._is_byte_level:
            return self._tokenizer.convert_tokens_to_string([token])
        # Without a decoder of its own, a tokenizer puts spaces between the tokens.
        return f" {token}" if self._has_no_decoder else token

    @property
    def _is_wordpiece(self) -> bool:
        return self._kind("WordPiece")

    @property
    def _is_byte_level(self) -> bool:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in type(getattr(backend, "decoder", None)).__name__ or backend is None

    @property
    def _has_no_decoder(self) -> bool:
        return getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None) is None

    def _kind(self, name: str) -> bool:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return name in type(getattr(backend, "model", None)).__name__ or name in type(self._tokenizer).__name__

    @property
    def special_ids(self) -> set[int]:
        """Ids of the tokenizer's special tokens."""
        return set(self._tokenizer.all_special_ids)

    @property
    def _control_ids(self) -> set[int]:
        """Special tokens without the one that stands for unknown text, unless it has another use too (GPT-2)."""
        tokenizer = self._tokenizer
        uses = [name for name, token in tokenizer.special_tokens_map.items() if token == tokenizer.unk_token]
        return self.special_ids - ({tokenizer.unk_token_id} if uses == ["unk_token"] else set())


class PaddedBatch(NamedTuple):
    """Token ids of several texts as one rectangle. All `[texts, length]`."""

    ids: torch.Tensor  # int64
    mask: torch.Tensor  # bool: True where there is a token
    position: torch.Tensor  # int64: index of the token in its own text; 0 on padding

    def inputs(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """As keyword arguments of a Hugging Face model."""
        return {
            f"{prefix}input_ids": self.ids,
            f"{prefix}attention_mask": self.mask.long(),
            f"{prefix}position_ids": self.position,
        }


def pad(sequences: Sequence[Sequence[int] | np.ndarray], pad_id: int, side: str = "right") -> PaddedBatch:
    """Put token ids of different lengths into one rectangle, padded on the given side."""
    lengths = torch.tensor([len(each) for each in sequences])
    width = int(lengths.max()) if len(sequences) else 0
    column = torch.arange(width)[None]
    start = width - lengths[:, None] if side == "left" else torch.zeros(len(sequences), 1, dtype=torch.long)
    mask = (column >= start) & (column < start + lengths[:, None])
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    flat = np.concatenate([np.asarray(each, dtype=np.int64) for each in sequences]) if len(sequences) else []
    ids[mask] = torch.as_tensor(flat, dtype=torch.long)
    position = torch.where(mask, column - start, 0)
    return PaddedBatch(ids, mask, position)


def _max_length(tokenizer: Any, config: Any) -> int | None:
    limits = []
    of_tokenizer = getattr(tokenizer, "model_max_length", None)
    if isinstance(of_tokenizer, int) and 0 < of_tokenizer < 10**9:  # an absent limit is stored as 1e30
        limits.append(of_tokenizer)
    for holder in (config, getattr(config, "text_config", None)):
        for name in _LENGTH_LIMITS:
            limit = getattr(holder, name, None)
            if isinstance(limit, int) and limit > 0:
                limits.append(limit)
    return min(limits) if limits else None


def require_tokenizer(reader: TokenReader | None, what: str) -> TokenReader:
    """The reader, or an error that says what to do."""
    if reader is None:
        raise ModelError(
            f"{what} needs a tokenizer and this model has none: pc.load(module, tokenizer=...), or give it tensors"
        )
    return reader
