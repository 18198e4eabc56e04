"""Which neurons and heads wrote this? The first question of anybody who looks at what a network returned.

For the next token of a decoder there are two answers, from one forward and one backward pass.

Direct: the logit is read from the residual stream at the last token, and every block has added to it. With the size
that each norm divides by held at what it was, what each neuron and each head wrote there is one number, and these
numbers, the embedding and the biases sum up to the logit.

Through gradients: gradient times activation, over all tokens: what would change to first order if a neuron were silent,
by whatever way it acts.

For the similarity of two texts there are gradients only; for the class of an image the neurons that a linear head
reads have a direct part too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from patchclamp.attribution import gradients, similarity
from patchclamp.attribution.targets import class_logits, logits_at
from patchclamp.errors import DataError, ModelError
from patchclamp.find.asked import class_names, class_number, token_id
from patchclamp.find.explanation import Explanation, Part, assembled
from patchclamp.find.linear_head import LinearHead
from patchclamp.find.stream import Layer, Lens, Watch
from patchclamp.model import Model, Site
from patchclamp.model.hooks import first_tensor, tapped
from patchclamp.model.readout import Readout
from patchclamp.model.taps import Seen, Tap

_NEURONS = ("mlp", "mixer", "expert", "conv", "recurrent")


def explain(
    model: Model, prompt: Any, target: str | int | None = None, foil: str | int | None = None, *, k: int = 10
) -> Explanation:
    """Which neurons and heads wrote this token, chose this class, or made these two texts alike.

    Args:
        model: a decoder, an encoder of texts, or a classifier.
        prompt: a text; for a classifier of images one image: a tensor `[1, ...]`, the keyword arguments of the
            module, or what the model's processor takes.
        target: of a decoder the next token, as a string with its space (`" Paris"`) or an id; of a classifier a class,
            by name or number; None for what the model itself would say. Of an encoder another text, whose
            similarity with the prompt is explained.
        foil: a token or class: what is explained is the logit of the target less that of the foil, so that what
            raises both does not count.
        k: how many neurons and heads the sentence and the picture show; the tables hold all.

    Returns:
        `Explanation`.

    Raises:
        DataError: an empty prompt, a string that is no token, an encoder without another text, or k below 1.
        ModelError: an encoder-decoder, or a network whose output is none of these.
        UnknownName: no such class or id.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise DataError(f"explain: k is a whole number >= 1, not {k!r}")
    if not isinstance(prompt, str):
        return _of_class(model, _one(model, prompt), "", target, foil, k)
    if model.is_encoder_decoder:
        raise ModelError(f"{model.name} is an encoder with a decoder: explain continues or embeds one text")
    inputs = model.inputs(prompt)
    try:
        readout = model.readout
    except ModelError as error:
        return _without_readout(model, inputs, prompt, target, foil, k, str(error))
    return _of_token(model, readout, inputs, prompt, target, foil, k)


# A decoder's next token -----------------------------------------------------------------------------


class _Asked:
    """The target of a pass: a logit or a difference of two. A target of None is settled by the pass itself."""

    def __init__(self, target: int | None, foil: int | None, of_class: bool) -> None:
        self.target, self.foil, self.of_class = target, foil, of_class
        self.logits = torch.zeros(0)

    def __call__(self, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        logits = class_logits(output) if self.of_class else logits_at(output, inputs)
        self.logits = logits.detach()
        if self.target is None:
            self.target = int(self.logits[0].argmax())
        if self.target == self.foil:
            raise DataError("target and foil are the same: there is no difference to explain")
        value = logits[:, self.target]
        return value if self.foil is None else value - logits[:, self.foil]

    @property
    def numbers(self) -> torch.Tensor:
        """Of the target, and of the foil."""
        return torch.tensor([each for each in (self.target, self.foil) if each is not None])

    @property
    def signs(self) -> torch.Tensor:
        """What their logits are multiplied by."""
        return torch.tensor([1.0, -1.0], dtype=torch.float64)[: len(self.numbers)]

    @property
    def probabilities(self) -> list[float]:
        """Of the target, and of the foil."""
        return self.logits[0].double().softmax(-1)[self.numbers.to(self.logits.device)].tolist()


def _of_token(
    model: Model, readout: Readout, inputs: dict[str, Any], prompt: str, target: Any, foil: Any, k: int
) -> Explanation:
    asked = _asked_tokens(model, target, foil)
    stack = model.site(readout.residual).stack
    watch = Watch(model, stack, torch.tensor([inputs["input_ids"].shape[1] - 1]))
    attended: dict[str, torch.Tensor] = {}
    with watch.reading(), tapped(model.module, _patterns(model, stack, attended)):
        seen = gradients(model, inputs, asked, _sites(model, stack))
    layers = watch.layers()
    parts = _direct(Lens.of(model, readout, layers[-1].after), layers, asked)
    return assembled(
        model,
        "token",
        prompt,
        seen,
        tokens=model.tokens(prompt),
        names=_strings(model, asked),
        probabilities=asked.probabilities,
        parts=parts,
        attended=attended,
        k=k,
    )


def _asked_tokens(model: Model, target: Any, foil: Any) -> _Asked:
    wanted = None if target is None else token_id(model, target)
    return _Asked(wanted, None if foil is None else token_id(model, foil, "foil"), False)


def _strings(model: Model, asked: _Asked) -> list[str]:
    numbers = asked.numbers.tolist()
    return [str(each) for each in numbers] if model.reader is None else model.reader.strings(numbers)


def _sites(model: Model, stack: str | None = None) -> list[Site]:
    """The neurons and heads, and the residual stream that the first block is given."""
    there = [site for site in model.sites.values() if stack is None or site.stack == stack]
    first = [site for site in there if site.kind == "resid_pre" and site.axis == -1][:1]
    chosen = [site for site in there if site.kind in (*_NEURONS, "attn") and not site.fixed]
    if not chosen:
        raise ModelError(f"{model.name} has no neurons that could be named: {model.explain_sites()}")
    return [*first, *chosen]


def _patterns(model: Model, stack: str, attended: dict[str, torch.Tensor]) -> list[Tap]:
    """Taps that keep what the last token attends to, `[keys, heads]`, under the name of the heads' site."""

    def tap(site: Site, name: str) -> Tap:
        def see(seen: Seen) -> torch.Tensor:
            attended[name] = seen.tensor[0, -1].detach().clone()
            return seen.tensor

        return Tap(site, see, writes=False)

    sites = [site for site in model.sites.values() if site.kind == "pattern" and site.stack == stack]
    named = {site.name.replace("pattern", "attn"): site for site in sites}
    return [tap(site, name) for name, site in named.items() if name in model.sites]


def _direct(lens: Lens, layers: list[Layer], asked: _Asked) -> list[Part]:
    """What each part wrote into the logit, from the last block to the embedding."""
    numbers, signs = asked.numbers, asked.signs
    following = layers[-1].after
    rows = lens.directions(numbers).to(following)
    direction = (signs[:, None].to(rows) * rows).sum(0, keepdim=True)
    found: list[Part] = []
    for layer in reversed(layers):
        rest, constant = float(((layer.rest + following - layer.after) * direction).sum()), 0.0
        for place in reversed(range(len(layer.branches))):
            if layer.norms:
                constant += float((direction @ layer.norms[place].linear.shift.to(direction)).sum())
                direction = layer.norms[place].back(direction)
            branch = layer.branches[place]
            found.append(Part("site", layer.number, branch.each(direction)[0], branch.site))
            constant += float(branch.constant(direction).sum())
        found += [Part("biases", layer.number, constant), Part("rest", layer.number, rest)]
        following = layer.before
    found.append(Part("embedding", None, float((following * direction).sum())))
    bias = lens.readout.bias
    if bias is not None:
        found.append(Part("biases", None, float((bias.cpu()[numbers].double() * signs).sum())))
    if lens.readout.softcap is not None:
        uncapped = lens.logits(layers[-1].after)[0].cpu()[numbers]
        found.append(Part("soft cap", None, float(((lens.capped(uncapped) - uncapped) * signs).sum())))
    return found


# Texts without a readout, and classes ------------------------------------------------------------------


def _without_readout(
    model: Model, inputs: dict[str, Any], prompt: str, target: Any, foil: Any, k: int, why: str
) -> Explanation:
    """Logits of tokens that are made in another way, logits of classes, or a sentence encoder."""
    with model.evaluating(), torch.no_grad():
        output = model.module(**inputs)
    logits = getattr(output, "logits", None)
    logits = first_tensor(output) if logits is None and not hasattr(output, "last_hidden_state") else logits
    if logits is not None and logits.ndim == 2:
        return _of_class(model, inputs, prompt, target, foil, k)
    given: dict[str, Any] = {"tokens": model.tokens(prompt), "k": k}
    if logits is not None:
        asked = _asked_tokens(model, target, foil)
        seen = gradients(model, inputs, asked, _sites(model))
        given |= {"names": _strings(model, asked), "probabilities": asked.probabilities, "why": why}
        return assembled(model, "token", prompt, seen, **given)
    if not isinstance(target, str) or not target:
        raise DataError(f"{model.name} embeds texts: give another text as target, whose similarity is to be explained")
    if foil is not None:
        raise DataError("a similarity of two texts has no foil")
    seen = gradients(model, inputs, similarity(model, target), _sites(model))
    why = "a similarity of two texts is no sum of what neurons write"
    return assembled(model, "similarity", prompt, seen, names=[target], probabilities=[], why=why, **given)


def _one(model: Model, prompt: Any) -> Any:
    """One example as the module takes it."""
    if isinstance(prompt, torch.Tensor):
        if not len(prompt) or (len(prompt) != 1):
            raise DataError(f"explain takes one example, a tensor [1, ...], not {list(prompt.shape)}")
        return prompt.to(model.device)
    if isinstance(prompt, Mapping):
        return dict(prompt)
    if model.processor is None or isinstance(prompt, (list, tuple)):
        raise DataError(f"explain takes one text, a tensor [1, ...] or keyword arguments, not {type(prompt).__name__}")
    return {name: each.to(model.device) for name, each in model.processor(prompt, return_tensors="pt").items()}


def _of_class(model: Model, inputs: Any, prompt: str, target: Any, foil: Any, k: int) -> Explanation:
    names, head = class_names(model), LinearHead(model)
    with head.reading():
        with model.evaluating(), torch.no_grad():
            output = model.module(**inputs) if isinstance(inputs, Mapping) else model.module(inputs)
        logits = class_logits(output)
    classes = logits.shape[1]
    asked = _Asked(
        None if target is None else class_number(model, target, classes),
        None if foil is None else class_number(model, foil, classes, "foil"),
        True,
    )
    seen = gradients(model, inputs, asked, _sites(model))
    parts = head.parts(seen.activations, logits, asked.numbers, asked.signs)
    return assembled(
        model,
        "class",
        prompt,
        seen,
        tokens=model.tokens(prompt) if prompt else [],
        names=[names.get(each, f"class {each}") for each in asked.numbers.tolist()],
        probabilities=asked.probabilities,
        parts=parts,
        k=k,
        why="" if parts else "the head does not read the neurons of any site linearly",
    )
