"""How the memory of a process grows with the data: from 10,000 tokens to 1,000,000.

A BERT of four layers reads real sentences with MiniLM's tokenizer, all MLP sites, with the summaries that `record`
keeps when it is not told otherwise. What is compared is the largest resident memory of the process after each pass.

What a C library keeps for later of what was given back to it counts too, and the sizes of tensors change from batch
to batch. So there are two rows more: the plain forward pass, and recording while the library gives large blocks back
to the system at once, which shows what is in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from resident import most_resident

SMALL, LARGE = 10_000, 1_000_000
LIMIT = 50.0
_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}


def main() -> str:
    """Measure and print; gives the section of the page."""
    rows = [
        ("recording", _in_a_process("record", {})),
        ("recording, large blocks given back at once", _in_a_process("record", _AT_ONCE)),
        ("the plain forward pass", _in_a_process("plain", {})),
    ]
    said = rows[0][1]
    (small, _), (large, _) = said["memory"]
    lines = [
        "## Memory",
        "",
        f"A BERT of {said['neurons']:,} neurons; the usual summaries take {said['expected'] / 1e6:,.1f} MB by "
        f"`nbytes`, and {said['held'] / 1e6:,.1f} MB in fact.",
        "",
        f"| largest resident memory | after {small:,} tokens | after {large:,} tokens | grown by | limit |",
        "|---|---|---|---|---|",
        *(_row(name, each["memory"], LIMIT if each is said else None) for name, each in rows),
        "",
        "The second row is measured with "
        + " and ".join(f"`{name}={value}`" for name, value in _AT_ONCE.items())
        + " in the environment (glibc): what is more in the first is what the C library keeps for itself.",
    ]
    text = "\n".join(lines)
    print(text)
    return text


def _row(name: str, memory: list[tuple[int, int]], limit: float | None) -> str:
    small, large = (each / 1e6 for _, each in memory)
    end = "" if limit is None else f"{limit:.0f} MB"
    return f"| {name} | {small:,.0f} MB | {large:,.0f} MB | {large - small:,.0f} MB | {end} |"


def _in_a_process(what: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, what]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return json.loads(done.stdout.splitlines()[-1])


def _measure(what: str) -> None:
    import torch
    from transformers import BertConfig, BertModel

    import patchclamp as pc
    from patchclamp.recording.accumulation import Accumulation
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
    memory = []
    for wanted in (SMALL, LARGE):
        taken, tokens = [], 0
        while tokens < wanted:
            place = len(taken) % len(texts)
            taken.append(texts[place])
            tokens += lengths[place]
        if what == "record":
            pc.record(model, taken, "mlp.*", max_length=256, progress=False)
        else:
            corpus = prepare(model, taken, "mlp.*", max_length=256, progress=False).corpus
            with torch.no_grad():
                for examples in corpus.batches(4096):
                    forward = corpus.forward(examples)
                    model.module(*forward.arguments, **forward.keywords)
        memory.append((tokens, most_resident()))
    run = prepare(model, texts[:50], "mlp.*", max_length=256, progress=False)
    expected = run._expected_bytes()
    run.calibrate(False)
    held = Accumulation(run.plan)
    from patchclamp.recording.stream import stream

    for read in stream(model, run.corpus, run.sites, run.corpus.batches(4096)[:1]):
        held.take(read)
    said = {
        "neurons": len(model.neurons()),
        "expected": expected,
        "held": held.held_bytes(),
        "memory": memory,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    _measure(sys.argv[1]) if len(sys.argv) > 1 else main()
