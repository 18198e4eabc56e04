"""Conductance of all six MLPs of MiniLM at once, beside 20 forward and backward passes one after the other.

The plain passes are what a user writes who wants one gradient at each of 20 points: the network as it is loaded,
whose weights want gradients, the embeddings that want one too, `backward()`. Beside them, with the weights frozen by
hand; and captum's `LayerConductance`, which has to be called once for each layer, where it is installed. All take
turns, and ratios are of the same turn.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import patchclamp as pc
from patchclamp import attribution

STEPS = 20
TURNS = 7
LIMIT = 0.8
TEXTS = [
    "Return the first item of the list, or None if the list is empty.",
    "It raises an error if the file cannot be opened for reading.",
    "The dog ran home in the rain and slept until the evening.",
    "Numbers are compared by their value, and strings by their characters.",
]
GOAL = "Lists and their items"


def main() -> str:
    """Measure and print; gives the section of the page."""
    model = pc.load("all-MiniLM-L6-v2")
    target = attribution.similarity(model, GOAL)
    call = model.inputs(TEXTS)
    tokens = int(call["attention_mask"].sum())
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: attribution.attribute(model, call, target, "mlp.*", method="conductance", steps=STEPS),
        "plain": lambda: plain(model, call, target, frozen=False),
        "plain, weights frozen by hand": lambda: plain(model, call, target, frozen=True),
    }
    if importlib.util.find_spec("captum") is not None:
        ways["captum, one call for each layer"] = lambda: of_captum(model, call, target)
    for way in ways.values():
        way()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    lines = [
        "## Attribution",
        "",
        f"Conductance of the {sum(model.site(each.name).size or 0 for each in model.select('mlp.*')):,} neurons of all "
        f"six layers of MiniLM, {STEPS} steps ({STEPS + 1} points) from zero embeddings to {len(TEXTS)} texts of "
        f"{tokens} tokens, in one call; beside {STEPS} plain forward and backward passes of the same texts, one after "
        f"the other. Each number is the time of ours over that of the other in the same one of {TURNS} turns.",
        "",
        "| ours, compared with | median | min | max | limit |",
        "|---|---|---|---|---|",
    ]
    for name in list(ways)[1:]:
        ratios = [mine / other for mine, other in zip(seconds["ours"], seconds[name], strict=True)]
        limit = f"{LIMIT}" if name == "plain" else ""
        lines.append(f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {limit} |")
    lines += [
        "",
        "Plain is the network as it is loaded: weights want gradients, and `backward()` computes them, which nobody "
        "needs here. Frozen by hand, a pass still goes back through all layers to the embeddings; ours ends at the "
        f"first MLP. Medians in seconds: {'; '.join(_median(*each) for each in seconds.items())}."
        + ("" if "captum" in list(ways)[-1] else " captum was not installed."),
    ]
    text = "\n".join(lines)
    print(text, flush=True)
    return text


def _median(name: str, seconds: list[float]) -> str:
    return f"{name} {statistics.median(seconds):.2f}"


def plain(model: pc.Model, call: dict[str, torch.Tensor], target: attribution.Target, frozen: bool) -> None:
    """20 forward and backward passes down to the embeddings."""
    module: Any = model.module
    module.requires_grad_(not frozen)
    rest = {name: each for name, each in call.items() if name != "input_ids"}
    embedded = module.get_input_embeddings()(call["input_ids"]).detach()
    for step in range(STEPS):
        point = (embedded * (step / STEPS)).requires_grad_()
        target(module(inputs_embeds=point, **rest), call).sum().backward()
    module.requires_grad_(True)
    module.zero_grad()


def of_captum(model: pc.Model, call: dict[str, torch.Tensor], target: attribution.Target) -> None:
    """`LayerConductance` of each of the six layers."""
    from captum.attr import LayerConductance  # pyright: ignore[reportMissingImports]

    module: Any = model.module
    rest = {name: each for name, each in call.items() if name != "input_ids"}
    embedded = module.get_input_embeddings()(call["input_ids"]).detach()

    def forward(points: torch.Tensor) -> torch.Tensor:
        given = {name: each.repeat(len(points) // len(embedded), 1) for name, each in rest.items()}
        return target(module(inputs_embeds=points, **given), given)

    for layer in module.encoder.layer:
        LayerConductance(forward, layer.output.dense).attribute(embedded, n_steps=STEPS, attribute_to_layer_input=True)


if __name__ == "__main__":
    main()
