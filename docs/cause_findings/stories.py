"""stories260K: neurons that know if a name is of a girl or a boy, and neurons of dialogue; texts before and after.

The relation is between a name and its pronoun. Neurons are ranked by gradient times activation of the difference of
the logits of *She* and *He* on some names, and tested on others. Dialogue neurons are ranked by their expertise
(average precision) at telling spoken sentences from narration; they are tested on the loss of spoken sentences.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import patchclamp as pc
from patchclamp.attribution import attribute, logit_difference
from patchclamp.verify.batches import first_token

GIRLS = ("Lily", "Sue", "Anna", "Mia", "Amy", "Sara", "Jane", "Lucy")
BOYS = ("Tom", "Tim", "Ben", "Max", "Sam", "Jack", "Bob", "Joe")
FRAMES = ("{} went to the park.", "{} saw a big dog.", "{} was very happy.", "One day, {} found a toy.")
NEURONS = 20


def prompts(half: int) -> list[tuple[str, str, str]]:
    """Prompt, right pronoun, wrong pronoun; the halves share no name."""
    found = []
    for frame in FRAMES:
        found += [(frame.format(name), " She", " He") for name in GIRLS[half::2]]
        found += [(frame.format(name), " He", " She") for name in BOYS[half::2]]
    return found


def gender_neurons(model: pc.Model) -> pc.Neurons:
    """Neurons that raise the right pronoun over the wrong one, the first first."""
    listed = prompts(0)
    right = [first_token(model, *each[:2]) for each in listed]
    wrong = [first_token(model, each[0], each[2]) for each in listed]
    batch = pc.verify.read(model, listed, 1 << 20)[0]
    order = batch.examples.tolist()
    target = logit_difference([right[each] for each in order], [wrong[each] for each in order])
    return attribute(model, batch.inputs, target, "mlp.*").neurons()


def measure(controls: int = 100) -> dict[str, Any]:
    """Evidence for both sets, and what the model writes before and after."""
    from label_findings.tasks import dialogue

    folder = Path(os.environ.get("PATCHCLAMP_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (folder / "stories260K").is_dir():
        raise FileNotFoundError("stories260K")
    model = pc.load(folder / "stories260K")
    task = dialogue()
    spoken = [text for text, right in zip(task.texts, task.right, strict=True) if right and len(text) > 20]
    told = [text for text, right in zip(task.texts, task.right, strict=True) if not right and len(text) > 20]
    half = len(spoken) // 2

    gender = gender_neurons(model).top(NEURONS)
    first = pc.verify.effect(
        model,
        pc.ablate(gender),
        "logit_difference",
        prompts(1),
        controls,
        dose=True,
        guard={"loss of narration": ("loss", told[-150:])},
    )
    labels = {"kind": ["spoken"] * half + ["told"] * half}
    texts = pc.Texts(spoken[:half] + told[:half], labels=labels)
    recording = pc.record(model, texts, "mlp.*", [pc.Pooled("max")], progress=False)
    ranked = pc.find.expertise(recording, "kind")
    column = "score_spoken" if "score_spoken" in ranked.columns else "score"
    speech = ranked.top(NEURONS, by=column)
    second = pc.verify.effect(
        model,
        pc.ablate(speech),
        "loss",
        spoken[half : half + 150],
        controls,
        dose=True,
        guard={"loss of narration": ("loss", told[-150:])},
    )
    starts = ("Lily went to the park.", "Tom found a toy.", 'Mom said, "')
    written: list[dict[str, str]] = []
    for start in starts:
        row = {"start": start, "before": model.generate(start, max_new_tokens=40)}
        for name, neurons in (("without the neurons of gender", gender), ("without those of dialogue", speech)):
            with model.intervene(pc.ablate(neurons)):
                row[name] = model.generate(start, max_new_tokens=40)
        written.append(row)
    return {
        "neurons": NEURONS,
        "controls": controls,
        "evidence": {"gender of a name": first, "dialogue": second},
        "written": written,
    }
