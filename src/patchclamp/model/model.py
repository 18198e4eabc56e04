"""`Model`: any torch module seen as named sites of neurons.

It wraps the very object it is given: hooks go onto that object and are always taken off again, so
inside `with model.intervene(...)` the user's own calls of the module are changed too.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn

from patchclamp.errors import DataError, ModelError, SiteNotReached, unknown
from patchclamp.model.activations import joined, labelled
from patchclamp.model.aliases import unalias
from patchclamp.model.applying import taps_of
from patchclamp.model.blocks import Block, blocks_of
from patchclamp.model.calls import following
from patchclamp.model.example import Example, input_device
from patchclamp.model.experts import expert_input_weights, expert_output_weights
from patchclamp.model.hooks import Edit, reading, writing
from patchclamp.model.inspection import Inspection, Stack, inspect
from patchclamp.model.kinds import Kind, groups_of, kinds_of
from patchclamp.model.modules import linear_shape
from patchclamp.model.probe import probe
from patchclamp.model.readout import Readout, readout_of
from patchclamp.model.signature import accepts, parameters
from patchclamp.model.site import Site
from patchclamp.model.tokenize import PaddedBatch, TokenReader, pad, require_tokenizer
from patchclamp.model.weights import check_devices, kernels, projection_weights, tied_weights, weights_sha256
from patchclamp.neurons import Neurons


class Intervention(Protocol):
    """What `Model.intervene` needs of an intervention: for each site it acts on, a function of the tensor."""

    def edits(self, model: Model) -> Mapping[str, Edit]:
        """Name of a site -> function from its tensor `[..., size]` to the changed one. Raises on a wrong neuron."""
        ...


class Model:
    """Any torch module seen as named sites of neurons, with its tokenizer or image processor.

    Make one with `patchclamp.load`.

    Attributes:
        module: the wrapped module itself (of what `torch.compile` returned, the module that was compiled).
        tokenizer: the tokenizer it was loaded with, or None.
        processor: the image processor it was loaded with, or None.
        name: what it was loaded from.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any = None, processor: Any = None, name: str = "", example: Any = None
    ) -> None:
        # What was compiled shares all its modules, and inside a recording it runs uncompiled anyway.
        module = getattr(module, "_orig_mod", module)
        self.module = module
        self._example = None if example is None else Example.of(example)
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name or type(module).__name__
        self.reader = None if tokenizer is None else TokenReader(tokenizer, getattr(module, "config", None))
        self._inspection: Inspection | None = None

    # Sites ----------------------------------------------------------------------------------------

    @property
    def sites(self) -> Mapping[str, Site]:
        """All sites by name, in the order in which a forward pass reaches them."""
        return self._inspected.sites

    def select(self, sites: str | Site | Iterable[str | Site]) -> list[Site]:
        """Sites by name or glob (`mlp.3`, `mlp.*`, `mlp.[2-4]`), each once, in the order of `sites`.

        `mlp.*` matches the MLPs of every stack (`encoder.mlp.0`, `vision.mlp.0`). `module:a.b.c` names
        the output of any module.

        Raises:
            UnknownName: a name or glob matches nothing; the nearest names are listed.
        """
        if not isinstance(sites, (str, Site, Iterable)):
            raise _not_a_site(sites)
        wanted = [sites] if isinstance(sites, (str, Site)) else list(sites)
        chosen: dict[str, Site] = {}
        for each in wanted:
            for site in self._matching(each):
                if chosen.setdefault(site.name, site) != site:
                    raise DataError(
                        f"two different sites are called {site.name}: {chosen[site.name].module} and {site.module}"
                    )
        order = {name: position for position, name in enumerate(self.sites)}
        return sorted(chosen.values(), key=lambda site: order.get(site.name, len(order)))

    def site(self, name: str | Site) -> Site:
        """The one site of that name.

        Raises:
            UnknownName: there is none.
        """
        if isinstance(name, Site):
            return self._checked(name)
        name = self._unalias(name)
        if name.startswith("module:"):
            return self._checked(Site.from_name(name))
        if name not in self.sites:
            raise unknown("site", name, self.sites, self._why_not(name))
        return self.sites[name]

    def neurons(self, sites: str | Iterable[str] = "mlp.*") -> Neurons:
        """Every neuron of the sites, as a table: what controls are drawn from."""
        return Neurons({site.name: range(self._size(site)) for site in self.select(sites)})

    def explain_sites(self) -> str:
        """Which kinds of site are listed, and why others are not."""
        lines = []
        for name, members in groups_of(self.sites).items():
            sizes = sorted({str(site.size) for site in members})
            lines.append(f"{name}: {len(members)} sites of {'/'.join(sizes)} neurons, read at {members[0].module}")
            if members[0].fixed:
                lines.append(f"{name}: cannot be written: {members[0].fixed}")
        lines += [f"{name}: {note}" for name, note in self._inspected.notes.items()]
        lines += [f"{name}: not listed: {why}" for name, why in self._inspected.unlisted.items()]
        lines.append("Any module's output can be named by hand: module:" + self._some_module())
        return "\n".join(lines)

    def kinds(self) -> list[Kind]:
        """For each kind of site: whether it is read, written and baked, and why not. `patchclamp sites` shows it."""
        return kinds_of(self._inspected, self.blocks)

    # Weights --------------------------------------------------------------------------------------

    def output_weights(self, site: str | Site) -> torch.Tensor:
        """What each neuron writes: `[size, d]`, before any norm that follows. A view of the model's weights.

        Raises:
            ModelError: neurons of this kind have no output projection of their own.
        """
        found = self.site(site)
        if found.kind == "expert":
            return expert_output_weights(self.module.get_submodule(found.module), found.unit)
        if found.writes is None:
            hint = f"; see {found.name.replace('gate', 'mlp')}" if found.kind == "gate" else ""
            raise ModelError(f"{found.name} is of kind {found.kind!r}: it has no output projection of its own{hint}")
        return projection_weights(self.module.get_submodule(found.writes), found.writes)

    def input_weights(self, site: str | Site) -> dict[str, torch.Tensor]:
        """What each neuron reads: `{"in": [size, d]}`, or `{"gate": ..., "up": ...}`. Views of the model's weights.

        Raises:
            ModelError: no single projection feeds neurons of this kind.
        """
        found = self.site(site)
        if found.kind == "expert":
            return expert_input_weights(self.module.get_submodule(found.module), found.unit)
        if found.kind == "conv":
            return {"in": kernels(self.module.get_submodule(found.reads["in"]), found.name)}
        if not found.reads:
            raise ModelError(f"{found.name} is of kind {found.kind!r}: no projection feeds its neurons one by one")
        if "gate_up" in found.reads:
            raise ModelError(f"{found.name}: gate and up are one fused projection, {found.reads['gate_up']}")
        return {role: projection_weights(self.module.get_submodule(path), path).T for role, path in found.reads.items()}

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the network, and which weights make and read each of their neurons.

        A network of convolutions that is no `nn.Sequential` is run some times to find out who reads a channel.
        """
        example = self._inspected.example
        # Nobody asked for a forward pass of a plain network: it may leave something behind in the modules.
        made_up = example is not None and self._example is None and not hasattr(self.module, "config")
        root = copy.deepcopy(self.module) if made_up else self.module
        return blocks_of(root, self.sites, example)

    @property
    def readout(self) -> Readout:
        """How the residual stream after the last block becomes logits; found by running the model once on a few tokens.

        Keep it in a variable: each use of `model.readout` looks anew, as the weights may have changed.

        Raises:
            ModelError: the model has no unembedding, or its logits are made in another way; the reason is given.
        """
        found = readout_of(self.module, self.sites, self._example)
        if isinstance(found, str):
            raise ModelError(f"{self.name} ({type(self.module).__name__}) has no readout: {found}")
        return replace(found, _model=self)

    @property
    def tied_weights(self) -> list[tuple[str, ...]]:
        """Groups of weights that are one tensor under several names, as an embedding and an unembedding may be."""
        return tied_weights(self.module)

    def weights_sha256(self) -> str:
        """SHA-256 over the names, shapes, types and bytes of all weights, as they are now."""
        # Never remembered: PyTorch does not say of every change (`weight.data.zero_()`) that there was one.
        return weights_sha256(self.module)

    # Running --------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module and return its own output.

        Tensors and keywords are passed through. A text or a list of texts is tokenized first, and padded on
        `safe_padding_side`; keywords may be added.

        Raises:
            DataError: the list is empty or holds something else than texts, or a text has no tokens.
        """
        first = args[0] if args else None
        if _is_text(first):
            if len(args) > 1:
                raise DataError("give texts as one list: model([first, second])")
            return self.module(**self.inputs(first), **kwargs)
        return self.module(*args, **kwargs)

    def inputs(self, texts: str | Sequence[str]) -> dict[str, torch.Tensor]:
        """The keyword arguments with which the module reads these texts, without those it does not take."""
        reader = require_tokenizer(self.reader, "a text")
        listed = _checked_texts(texts)
        ids = [each.ids for each in reader.encode(listed)]
        if not all(ids):
            raise DataError(f"the text {listed[[len(each) for each in ids].index(0)]!r} has no tokens")
        return self.text_inputs(pad(ids, reader.pad_id, self.safe_padding_side))

    def text_inputs(self, batch: PaddedBatch, decoder: PaddedBatch | None = None) -> dict[str, torch.Tensor]:
        """Keyword arguments for a padded batch of token ids; `decoder` is what an encoder-decoder's decoder reads."""
        inputs = batch.inputs()
        if self.is_encoder_decoder:
            inputs |= (decoder or self.shifted(batch)).inputs("decoder_")
        # Models count positions themselves, some in ways of their own (RoBERTa from the ids, OPT from the mask).
        # Only under left padding the common way, 0 at the left edge, would be wrong.
        if not _is_left_padded(batch) or self._positions_from_ids:
            inputs.pop("position_ids")
        taken = parameters(self.module)
        return {name: value.to(self.device) for name, value in inputs.items() if name in taken}

    def shifted(self, batch: PaddedBatch) -> PaddedBatch:
        """What a decoder is given to write this batch: the start token, then the batch without its last token."""
        config = self.module.config
        start = getattr(config, "decoder_start_token_id", None)
        start = start if isinstance(start, int) else getattr(config, "bos_token_id", None) or 0
        rows = [row[mask].tolist() for row, mask in zip(batch.ids, batch.mask, strict=True)]
        reader = self.reader
        return pad([[start, *row[:-1]] for row in rows], reader.pad_id if reader else 0)

    def tokens(self, text: str) -> list[str]:
        """The tokens of a text as the model reads it, special tokens included; joined they read as the text."""
        reader = require_tokenizer(self.reader, "tokens()")
        return reader.strings(reader.encode([text])[0].ids)

    def activations(self, x: Any, sites: str | Site | Iterable[str | Site] = "mlp.*") -> Any:
        """Activations of one input, without gradient.

        Args:
            x: a text, a list of texts, a tensor, or a mapping of keyword arguments.
            sites: one site, or several by glob or list.

        Returns:
            For a text at one site: `Activations` `[tokens, size]` with the token strings (of an expert: those of the
            tokens routed to it). Several sites give a dict by site, several texts a list. For a tensor: the
            site's tensor, neurons last, `[examples, ..., size]`. Attention probabilities, of heads, are
            `[heads, queries, keys]` for a text and `[examples, heads, queries, keys]` for a tensor.

        Raises:
            SiteNotReached: the forward pass never called the site's module.
        """
        if _is_text(x) and not isinstance(x, str):
            return [self.activations(text, sites) for text in _checked_texts(x)]
        chosen = self.select(sites)
        named = isinstance(sites, Site) or (isinstance(sites, str) and not set("*?[") & set(sites))
        single = named and len(chosen) == 1
        tokens: dict[str, list[str]] = {}
        with self.evaluating(), torch.no_grad(), reading(self.module, chosen) as captured:
            if isinstance(x, str):
                inputs = self.inputs(x)
                self.module(**inputs)
                tokens = self._token_strings(inputs)
            elif isinstance(x, Mapping):
                self.module(**x)
            else:
                self.module(x)
        result = {}
        for site in chosen:
            seen = joined(site, captured[site.name])
            strings = tokens.get("decoder" if site.stack == "decoder" else "") if tokens else None
            result[site.name] = labelled(site, seen, strings)
        return result[chosen[0].name] if single else result

    def logits(self, text: str) -> torch.Tensor:
        """Logits of one text, `[tokens, vocabulary]` (a classifier: `[classes]`), without gradient."""
        with self.evaluating(), torch.no_grad():
            output = self(text)
        if getattr(output, "logits", None) is None:
            raise ModelError(f"{type(self.module).__name__} has no head that gives logits")
        return output.logits[0]

    def embed(self, texts: str | Sequence[str]) -> torch.Tensor:
        """One vector per text: the mean over its tokens of the last hidden state, scaled to length 1. `[texts, d]`.

        The hidden state is the encoder's where there is an encoder and a decoder.
        """
        listed = _checked_texts(texts)
        vectors = []
        with self.evaluating(), torch.no_grad():
            for start in range(0, len(listed), 32):
                inputs = self.inputs(listed[start : start + 32])
                wants_states = {"output_hidden_states": True} if not self._returns_states else {}
                output = self.module(**inputs, **wants_states)
                hidden = getattr(output, "encoder_last_hidden_state", None)
                if hidden is None:
                    hidden = getattr(output, "last_hidden_state", None)
                if hidden is None:
                    states = getattr(output, "hidden_states", None)
                    if not states:
                        raise ModelError(f"{type(self.module).__name__} gives no hidden states to average")
                    hidden = states[-1]
                mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device))
                weight = mask[..., None].to(hidden.dtype)
                vectors.append((hidden * weight).sum(1) / weight.sum(1))
        return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)

    def generate(self, text: str, max_new_tokens: int = 40, **options: Any) -> str:
        """Continue a text; returns what was added. Greedy unless `options` (those of `transformers`) say otherwise."""
        if not hasattr(self.module, "generate"):
            raise ModelError(f"{type(self.module).__name__} cannot generate")
        inputs = {n: v for n, v in self.inputs(text).items() if not n.startswith("decoder_") and n != "position_ids"}
        options = {"do_sample": False} | options
        with self.evaluating(), torch.no_grad():
            out = self.module.generate(**inputs, max_new_tokens=max_new_tokens, **options)  # type: ignore[operator]
        start = 0 if self.is_encoder_decoder else inputs["input_ids"].shape[1]
        return self.tokenizer.decode(out[0, start:], skip_special_tokens=True)

    # Intervening ----------------------------------------------------------------------------------

    @contextmanager
    def intervene(self, *interventions: Intervention) -> Iterator[Model]:
        """Apply interventions, in order, to every call of the module while the block runs; then take them off.

        They are taken off on an exception, on Ctrl-C and in nested blocks too; afterwards the module is as before.

        Raises:
            UnknownName: a site or neuron that the model does not have.
            SiteNotReached: the module was called, but a site of the intervention was never reached,
                so it had no effect.
        """
        reached: set[str] = set()
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        with following(self.module, self._encoder) as running:
            taps = taps_of(self, interventions, running, reached)
            with writing(self.module, taps):
                handle = self.module.register_forward_hook(count)
                try:
                    yield self
                finally:
                    handle.remove()
        missed = [tap.site.name for tap in taps if tap.site.name not in reached]
        if calls and missed:
            raise SiteNotReached(
                f"the intervention had no effect at {missed[0]}: in {calls} forward passes its module "
                f"({self.site(missed[0]).module}) was never called"
            )

    # What the rooms above need ----------------------------------------------------------------------

    @property
    def stacks(self) -> list[Stack]:
        """The lists of blocks that were recognised."""
        return self._inspected.stacks

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first weight, or the one that accelerate computes on."""
        return input_device(self.module)

    def check_weights(self) -> None:
        """Refuse a module that cannot be run because weights are missing or lie on several devices.

        Raises:
            ModelError: weights on "meta" that nobody brings when they are needed, or on two devices with nobody who
                moves the data between them; the message names one on each.
        """
        check_devices(self.module)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a Hugging Face model with an encoder and a decoder."""
        return bool(getattr(getattr(self.module, "config", None), "is_encoder_decoder", False)) and accepts(
            self.module, "decoder_input_ids"
        )

    @property
    def _encoder(self) -> nn.Module | None:
        # `generate` calls the encoder of two stacks by itself.
        find: Any = getattr(self.module, "get_encoder", None)
        return find() if self.is_encoder_decoder and find is not None else None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module in evaluation mode (no dropout) while the block runs; its own mode is put back."""
        training = [module for module in self.module.modules() if module.training]
        if not training:
            yield
            return
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True

    def __repr__(self) -> str:
        kinds: dict[str, int] = {}
        for site in self.sites.values():
            kinds[site.kind] = kinds.get(site.kind, 0) + 1
        listed = ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "no sites"
        return f"Model({self.name!r}, {type(self.module).__name__}: {listed})"

    @property
    def _inspected(self) -> Inspection:
        if self._inspection is None:
            found = inspect(self.module)
            probe(self.module, found, self._example)
            stacks = [stack.name for stack in found.stacks]
            found.sites = dict(
                sorted(
                    found.sites.items(),
                    key=lambda item: (
                        stacks.index(item[1].stack) if item[1].stack in stacks else -1,
                        -1 if item[1].kind in ("conv", "recurrent") else item[1].layer or 0,
                        _place_in_block(item[1]),
                    ),
                )
            )
            self._inspection = found
        return self._inspection

    def _matching(self, wanted: str | Site) -> list[Site]:
        if isinstance(wanted, Site):
            return [self._checked(wanted)]
        if not isinstance(wanted, str):
            raise _not_a_site(wanted)
        pattern = self._unalias(wanted)
        if pattern.startswith("module:"):
            return [self._checked(Site.from_name(pattern))]
        found = [site for name, site in self.sites.items() if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            found = [site for name, site in self.sites.items() if fnmatch.fnmatchcase(name, f"*.{pattern}")]
        if not found:
            raise unknown("site", wanted, self.sites, self._why_not(pattern))
        return found

    def _unalias(self, name: str) -> str:
        return unalias(name, self.sites)

    def _checked(self, site: Site) -> Site:
        """The site with its size, where the module says it; the module must exist."""
        modules = dict(self.module.named_modules())
        if site.module not in modules:
            raise unknown("module", site.module, [each for each in modules if each])
        shape = linear_shape(modules[site.module])
        if site.kind != "module" or site.size is not None or shape is None:
            return site
        return replace(site, size=shape[1 if site.tensor == "output" else 0])

    def _why_not(self, name: str) -> str:
        if not self.sites:
            why = " ".join(f"{kind} is not listed: {why}." for kind, why in self._inspected.unlisted.items())
            return f"{why} Any module's output can be named by hand: module:{self._some_module()}"
        for pattern, why in self._inspected.unlisted.items():
            if fnmatch.fnmatchcase(name, pattern) or name == pattern.removesuffix(".*") or name == pattern:
                return f"{pattern} is not listed: {why}."
        return ""

    def _some_module(self) -> str:
        return next((path for path, module in reversed(list(self.module.named_modules())) if path), "a.b.c")

    def _size(self, site: Site) -> int:
        if site.size is None:
            raise ModelError(f"the number of neurons of {site.name} is not known before a forward pass")
        return site.size

    def _token_strings(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
        reader = require_tokenizer(self.reader, "token strings")
        strings = {"": reader.strings(inputs["input_ids"][0].tolist())}
        if "decoder_input_ids" in inputs:
            strings["decoder"] = reader.strings(inputs["decoder_input_ids"][0].tolist())
        return strings

    @property
    def safe_padding_side(self) -> str:
        """The tokenizer's padding side if the module can be told the positions, else right, which is always right."""
        side = "right" if self.reader is None else self.reader.padding_side
        return side if accepts(self.module, "position_ids") and not self._positions_from_ids else "right"

    @property
    def _positions_from_ids(self) -> bool:
        # RoBERTa's family: the table of positions has a padding row, and positions start after it.
        return any(
            isinstance(each, nn.Embedding) and each.padding_idx is not None and "position" in path
            for path, each in self.module.named_modules()
        )

    @property
    def _returns_states(self) -> bool:
        return not any(hasattr(self.module, head) for head in ("lm_head", "classifier", "score", "cls", "qa_outputs"))


_IN_BLOCK = (
    *("resid_pre", "pattern", "attn", "cross_pattern", "cross_attn", "mixer"),
    *("resid_mid", "expert", "gate", "mlp", "resid_post"),
)


def _place_in_block(site: Site) -> int:
    named = site.name.removeprefix(f"{site.stack}.").partition(".")[0]
    return _IN_BLOCK.index(named) if named in _IN_BLOCK else -1


def _is_left_padded(batch: PaddedBatch) -> bool:
    return batch.mask.numel() > 0 and not bool(batch.mask[:, 0].all())


def _is_text(x: Any) -> TypeGuard[str | Sequence[str]]:
    return isinstance(x, str) or (isinstance(x, (list, tuple)) and (not x or any(isinstance(e, str) for e in x)))


def _checked_texts(texts: str | Sequence[str]) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed:
        raise DataError("there are no texts: the list is empty")
    for number, each in enumerate(listed):
        if not isinstance(each, str):
            raise DataError(f"text {number} is not a text but {type(each).__name__}: {each!r:.60}")
    return listed


def _not_a_site(given: object) -> DataError:
    return DataError(f"a site is named by a text such as 'mlp.3' or 'mlp.*', not by {given!r}")
