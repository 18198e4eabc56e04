"""How the memory of a process grows with the data: from 10,000 tokens to 1,000,000.

A BERT of four layers reads real sentences with MiniLM's tokenizer, all MLP sites, with the summaries that `record`
keeps when it is not told otherwise. What is compared is the largest resident memory of two processes, during the pass.

What a C library keeps for later of what was given back to it counts too, and the sizes of tensors change from batch
to batch. So there is a row more: the plain forward pass over the same batches.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from resident import forget, most_resident

SMALL, LARGE = 10_000, 1_000_000
LIMIT = 50.0
BATCH_TOKENS = 2048


def main() -> str:
    """Measure and print; gives the section of the page."""
    rows = [
        (name, *(_in_a_process(what, wanted) for wanted in (SMALL, LARGE)))
        for name, what in (("recording", "record"), ("the plain forward pass", "plain"))
    ]
    said = rows[0][2]
    small, large = (each["tokens"] for each in rows[0][1:])
    lines = [
        "## Memory",
        "",
        f"A BERT of {said['neurons']:,} neurons; the usual summaries take {said['expected'] / 1e6:,.1f} MB by "
        f"`nbytes`, and {said['held'] / 1e6:,.1f} MB in fact.",
        "",
        f"| largest resident memory | in {small:,} tokens | in {large:,} tokens | grown by | limit |",
        "|---|---|---|---|---|",
        *(_row(name, *few, LIMIT if name == "recording" else None) for name, *few in rows),
    ]
    text = "\n".join(lines)
    print(text)
    return text


def _row(name: str, few: dict[str, Any], many: dict[str, Any], limit: float | None) -> str:
    small, large = (each["memory"] / 1e6 for each in (few, many))
    end = "" if limit is None else f"{limit:.0f} MB"
    return f"| {name} | {small:,.0f} MB | {large:,.0f} MB | {large - small:,.0f} MB | {end} |"


def _in_a_process(what: str, wanted: int) -> dict[str, Any]:
    command = [sys.executable, __file__, what, str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(what: str, wanted: int) -> None:
    import torch
    from transformers import BertConfig, BertModel

    import patchclamp as pc
    from patchclamp.recording.accumulation import Accumulation
    from patchclamp.recording.heap import give_back
    from patchclamp.recording.record import prepare

    torch.manual_seed(0)
    tokenizer = pc.load("all-MiniLM-L6-v2").tokenizer
    module = BertModel(
        BertConfig(
            vocab_size=30_522, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
        )
    )
    model = pc.load(module.eval(), tokenizer=tokenizer)
    texts = [each.text for each in pc.corpora.python_docs()]
    lengths = [len(each) - 2 for each in tokenizer(texts, truncation=True, max_length=256)["input_ids"]]
    taken, tokens = [], 0
    while tokens < wanted:
        place = len(taken) % len(texts)
        taken.append(texts[place])
        tokens += lengths[place]
    give_back()  # what loading left behind would hide the growth
    forget()
    if what == "record":
        pc.record(model, taken, "mlp.*", max_length=256, batch_tokens=BATCH_TOKENS, progress=False)
    else:
        corpus = prepare(model, taken, "mlp.*", max_length=256, progress=False).corpus
        with torch.no_grad():
            for examples in corpus.batches(BATCH_TOKENS):
                forward = corpus.forward(examples)
                model.module(*forward.arguments, **forward.keywords)
    memory = most_resident()
    run = prepare(model, texts[:50], "mlp.*", max_length=256, progress=False)
    expected = run._expected_bytes()
    run.calibrate(False)
    held = Accumulation(run.plan)
    from patchclamp.recording.stream import stream

    for read in stream(model, run.corpus, run.sites, run.corpus.batches(BATCH_TOKENS)[:1]):
        held.take(read)
    said = {
        "neurons": len(model.neurons()),
        "expected": expected,
        "held": held.held_bytes(),
        "memory": memory,
        "tokens": tokens,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    _measure(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
