"""Is an example like those that a classifier knows? What every score of that shares, and three that are simple.

All scores are high for what is known and low for what is strange. Activation coverage (S060) is in a file of its own.

    maximum softmax  max_c p_c                                     (Hendrycks and Gimpel, 2017)
    energy           T logsumexp(logits / T)                       (Liu et al., 2020)
    Mahalanobis      -min_c (x - mean_c)' S^-1 (x - mean_c)        (Lee et al., 2018), S shared by all classes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from patchclamp.data.accept import as_data
from patchclamp.data.images import Images
from patchclamp.data.tensors import Tensors
from patchclamp.errors import DataError, ModelError, SiteNotReached, unknown
from patchclamp.model import Model, Site, load
from patchclamp.model.activations import several_calls
from patchclamp.model.hooks import hooked
from patchclamp.recording.corpus import Forward, TensorCorpus, TextCorpus, tokenize
from patchclamp.recording.forward import batch_tokens_for
from patchclamp.recording.image_corpus import ImageCorpus
from patchclamp.statistics import roc_auc

_EXAMPLES_AT_ONCE = 128  # images and tensors of one pass; texts are counted in tokens, as in a recording
_POOLS = ("mean", "sum", "first")


class Pass(NamedTuple):
    """What one forward pass showed of some examples."""

    examples: np.ndarray  # [batch] int64, their places in the data
    logits: np.ndarray  # [batch, classes] float64
    values: dict[str, np.ndarray]  # site -> [batch, neurons] float64, one number an example
    slopes: dict[str, np.ndarray]  # site -> the same of the loss's gradient; empty without one


def classify(model: Model | torch.nn.Module, data: Any, sites: Any = (), pool: str = "mean") -> Pass:
    """What a classifier says of every example, and what its neurons do on it.

    Args:
        model: gives logits `[examples, classes]`, by itself or as `.logits`.
        data: whatever `pc.record` takes.
        sites: names or globs of sites to read; none by default.
        pool: "mean" or "sum" over an example's tokens or pixels, or the "first" of them (in some models a class token).

    Returns:
        `logits` `[examples, classes]` and `values` site -> `[examples, neurons]`, float64, in the order of the data.

    Raises:
        UnknownName: no such site, or no such pool.
        ModelError: there are no logits of examples, or a site cannot be read.
    """
    model = model if isinstance(model, Model) else load(model)
    passes = list(passes_over(model, data, model.select(sites) if sites else [], pool=pool, slopes=False))
    order = np.argsort(np.concatenate([each.examples for each in passes]), kind="stable")
    values = {name: np.concatenate([each.values[name] for each in passes])[order] for name in passes[0].values}
    return Pass(np.arange(len(order)), np.concatenate([each.logits for each in passes])[order], values, {})


def maximum_softmax(logits: np.ndarray) -> np.ndarray:
    """The largest of the class probabilities (Hendrycks and Gimpel, 2017). `[examples, classes]` -> `[examples]`."""
    from scipy.special import softmax

    return softmax(_checked(logits), axis=1).max(1)


def energy(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Minus the free energy (Liu et al., 2020). `[examples, classes]` -> `[examples]`, higher for what is known.

    Raises:
        DataError: logits of another shape, or a temperature that is not above 0.
    """
    from scipy.special import logsumexp

    if not temperature > 0:
        raise DataError(f"a temperature is above 0; not {temperature}")
    return temperature * np.asarray(logsumexp(_checked(logits) / temperature, axis=1))


@dataclass(frozen=True, eq=False)
class Mahalanobis:
    """Distance to the nearest class, in standard deviations of what classes have in common (Lee et al., 2018).

    Made by `Mahalanobis.fit(features, labels)`, whose features are activations of the layer before the logits.

    Attributes:
        means: `[classes, neurons]` float64.
        precision: `[neurons, neurons]` float64, the inverse of the shared covariance (a pseudo-inverse where neurons
            never change or copy each other).
    """

    means: np.ndarray
    precision: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, labels: Sequence[object] | np.ndarray) -> Mahalanobis:
        """Means and shared covariance of features `[examples, neurons]` with one label each.

        Raises:
            DataError: another number of labels than examples.
        """
        features = np.asarray(features, np.float64)
        _, codes = np.unique(np.asarray(labels), return_inverse=True)
        if features.ndim != 2 or codes.shape != features.shape[:1]:
            raise DataError(
                f"features are {list(features.shape)}, and there are {codes.size} labels: one each is wanted"
            )
        which = np.eye(codes.max() + 1)[codes]
        means = which.T @ features / which.sum(0)[:, None]
        within = features - means[codes]
        return cls(means, np.linalg.pinv(within.T @ within / len(features), rcond=1e-10, hermitian=True))

    def score(self, features: np.ndarray) -> np.ndarray:
        """Minus the squared distance to the nearest class; `[examples, neurons]` -> `[examples]` float64."""
        away = np.asarray(features, np.float64)[:, None] - self.means
        return -np.einsum("ecn,nm,ecm->ec", away, self.precision, away, optimize=True).min(1)


def detection_auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The chance that an example of the known kind scores higher than a strange one; of equal scores, half.

    Args:
        inside: `[examples]`, scores of held-out examples of the known kind, never of those that a score was fitted to.
        outside: `[examples]`, scores of the strange ones.

    Raises:
        DataError: one of them is empty, or a score is not finite.
    """
    right = np.repeat([True, False], [len(inside), len(outside)])
    return float(roc_auc(right, np.concatenate([inside, outside])))


# What activation coverage needs too -----------------------------------------------------------------


def passes_over(
    model: Model,
    data: Any,
    sites: Sequence[Site],
    *,
    pool: str = "mean",
    slopes: bool = True,
    examples: int | None = None,
    seed: int = 0,
) -> Iterator[Pass]:
    """Run a classifier over data, in passes of several examples.

    Sites are read with gradients by `hooked`, a hook that PyTorch itself offers: what flows on is a copy of the
    tensor that is kept, so that no layer writes into it. The loss is the divergence of the class probabilities
    from uniform ones, KL(uniform || p), of every example by itself.

    Args:
        model: the classifier.
        data: whatever `pc.record` takes.
        sites: what is read.
        pool: as in `classify`.
        slopes: also the gradient of the loss, pooled as the activations are.
        examples: read so many, drawn at random; None: all.
        seed: of that draw.

    Raises:
        DataError: more examples are to be drawn than there are.
        UnknownName: no such pool.
        ModelError: there are no logits of examples, there is but one logit, a site cannot be read, or the logits do not
            depend on it.
        SiteNotReached: a site's module was not called.
    """
    if pool not in _POOLS:
        raise unknown("pool", pool, _POOLS)
    for site in sites:
        if site.through != "module":
            raise ModelError(f"{site.name} is inside of a module ({site.through}): name the output of a module instead")
    corpus = _corpus(model, data)
    chosen = np.arange(corpus.examples)
    if examples is not None:
        if not 1 <= examples <= corpus.examples:
            raise DataError(f"{examples} examples cannot be drawn: there are {corpus.examples}")
        chosen = np.sort(np.random.default_rng(seed).choice(corpus.examples, examples, replace=False))
    if isinstance(corpus, TextCorpus):
        groups: Iterable[np.ndarray] = corpus.batches(batch_tokens_for(model, None), chosen)
    else:
        groups = np.split(chosen, range(_EXAMPLES_AT_ONCE, len(chosen), _EXAMPLES_AT_ONCE))
    for group in groups:
        yield _pass(model, corpus, corpus.forward(group), sites, pool, slopes)


def _pass(
    model: Model, corpus: TextCorpus | TensorCorpus, forward: Forward, sites: Sequence[Site], pool: str, slopes: bool
) -> Pass:
    kept: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    values: dict[str, torch.Tensor] = {}

    def keeping(site: Site) -> Any:
        def see(tensor: torch.Tensor) -> torch.Tensor:
            # Of a network that is frozen up to here, the graph begins here.
            held = tensor if tensor.requires_grad or not slopes else tensor.detach().requires_grad_()
            kept[site.name].append(held)
            values[site.name] = held.detach().clone()  # where a write goes into the tensor itself, it goes on changing
            return held.clone()

        return see

    module = getattr(corpus, "module", model.module)
    with model.evaluating(), torch.set_grad_enabled(slopes), hooked(module, [(site, keeping(site)) for site in sites]):
        output = module(*forward.arguments, **forward.keywords)
        logits = _logits_of(output, len(forward.examples))
        for site in sites:
            if not kept[site.name]:
                raise SiteNotReached(f"the forward pass never reached {site.name} ({site.module})")
            if len(kept[site.name]) > 1:
                raise ModelError(several_calls(site, len(kept[site.name])))
        found = _slopes(logits, {name: each[0] for name, each in kept.items()}) if slopes else {}
    pooled, sloped = (
        {name: _pooled(each, name, forward, pool) for name, each in tensors.items()} for tensors in (values, found)
    )
    return Pass(forward.examples, logits.detach().double().cpu().numpy(), pooled, sloped)


def _slopes(logits: torch.Tensor, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if logits.shape[1] < 2:
        raise ModelError("the model gives one logit: how far its answer is from uniform is the same for all examples")
    # What is left out, log(classes), is the same for all. Examples do not see each other, so one sum serves all.
    loss = -logits.log_softmax(1).mean(1).sum()
    found = (
        torch.autograd.grad(loss, list(kept.values()), allow_unused=True) if loss.requires_grad else [None] * len(kept)
    )
    for name, slope in zip(kept, found, strict=True):
        if slope is None:
            raise ModelError(f"{name} is not on the way to the logits: they do not change with it")
    return {name: slope for name, slope in zip(kept, found, strict=True) if slope is not None}


def _pooled(tensor: torch.Tensor, site: str, forward: Forward, pool: str) -> np.ndarray:
    """`[examples, neurons]` float64 of a site's tensor, neurons last."""
    tensor = tensor.double()
    number = len(forward.examples)
    rows = forward.rows
    if rows is not None and tuple(tensor.shape[:2]) == rows.shape:
        flat = tensor.flatten(0, 1)
        flat = flat if rows.flat is None else flat[rows.flat.to(tensor.device)]
        row = rows.row.to(tensor.device)
        if pool == "first":
            first = torch.searchsorted(row, torch.arange(number, device=tensor.device))
            return flat[first].cpu().numpy()
        summed = torch.zeros(number, tensor.shape[-1], dtype=tensor.dtype, device=tensor.device).index_add_(
            0, row, flat
        )
        count = torch.bincount(row, minlength=number)[:, None] if pool == "mean" else 1
        return (summed / count).cpu().numpy()
    if tensor.ndim < 2 or len(tensor) != number:
        raise ModelError(f"{site} shows a tensor {list(tensor.shape)} for {number} examples: which row is whose?")
    if tensor.ndim > 2:
        tensor = tensor.flatten(1, -2)
        tensor = tensor[:, 0] if pool == "first" else tensor.mean(1) if pool == "mean" else tensor.sum(1)
    return tensor.cpu().numpy()


def _logits_of(output: Any, examples: int) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != examples:
        said = f"{list(logits.shape)}" if isinstance(logits, torch.Tensor) else type(output).__name__
        raise ModelError(
            f"a classifier gives logits [examples, classes]; of {examples} examples this model gives {said}"
        )
    return logits.float()


def _corpus(model: Model, data: Any) -> TextCorpus | TensorCorpus:
    given = as_data(data)
    if isinstance(given, Tensors):
        return TensorCorpus(model, given)
    return ImageCorpus(model, given) if isinstance(given, Images) else tokenize(model, given)


def _checked(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise DataError(f"logits are [examples, classes], two classes at least; not {list(logits.shape)}")
    return logits
