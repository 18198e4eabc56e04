"""Neurons for parts of speech: labels of tokens."""

from __future__ import annotations

import zipfile
from collections.abc import Callable

import numpy as np

import patchclamp as pc
from label_findings.markdown import table
from label_findings.search import outside
from label_findings.tasks import SEED, data_folder, minilm

Finder = Callable[..., pc.Neurons]

COARSE = {"NN": "noun", "VB": "verb", "JJ": "adjective", "RB": "adverb", "IN": "preposition", "DT": "determiner"}
COARSE |= {"PR": "pronoun", "CD": "number", "MD": "verb", "WP": "pronoun", ".": "punctuation", ",": "punctuation"}
SHOWN = ("noun", "verb", "adjective", "adverb", "preposition", "determiner", "pronoun", "number", "punctuation")


def parts_of_speech() -> str:
    """Labels of tokens: finders that read `ByLabel`."""
    held = zipfile.ZipFile(data_folder() / "text_open" / "masc_tagged.zip")
    genres = ("newspaper", "essays", "fiction", "travel-guides", "non-fiction", "journal", "technical")
    listed = [each.split() for each in held.read("masc_tagged/categories.txt").decode().splitlines()]
    files = sorted(
        f"masc_tagged/{name}" for name, genre in (each for each in listed if len(each) == 2) if genre in genres
    )
    lines, tags, documents = [], [], []
    for number, file in enumerate(files):
        for line in held.read(file).decode("utf-8", "replace").splitlines()[:120]:
            pairs = [each.rpartition("_") for each in line.split()]
            pairs = [(word, tag) for word, _, tag in pairs if word and tag]
            if 5 <= len(pairs) <= 50:
                lines.append([word for word, _ in pairs])
                tags.append([COARSE.get(tag[:2]) for _, tag in pairs])
                documents.append(number)
    kept = np.sort(np.random.default_rng(SEED).permutation(len(lines))[:700])
    held_out = outside(np.asarray(documents))
    model, parts = minilm(), {}
    for out in (False, True):
        which = [each for each in kept if held_out[each] == out]
        spans = [spans_of(lines[each], tags[each]) for each in which]
        data = pc.Texts([" ".join(lines[each]) for each in which], token_labels={"pos": spans}, name="masc")
        summary = pc.ByLabel(of=(pc.Moments(), pc.FiringRate(0.0)))
        parts[out] = pc.record(model, data, "mlp.*", [summary], max_length=64, progress=False)
    rows = []
    for finder in (pc.find.lape, pc.find.coverage, pc.find.contrast):
        rows += [of_label(finder, label, parts[False], parts[True]) for label in SHOWN]
    tokens = {out: part[next(iter(part))].count for out, part in parts.items()}
    return "\n\n".join(
        [
            "## Parts of speech: MiniLM",
            f"{len(kept):,} sentences of {len(files)} files of MASC (written genres; `masc_tagged` of NLTK), "
            f"{tokens[False]:,} tokens to find in and {tokens[True]:,} of other files. A word's tag, made coarse, is "
            "the label of each of its tokens. Labels of tokens cannot be dealt anew (tokens of one sentence are not "
            "independent), so there is no q here, and only finders that read `ByLabel` run. d: the difference of the "
            "means on the label and elsewhere, in standard deviations; for comparison the largest of 20 neurons "
            "drawn by chance. Held out: on the other files.",
            table(
                ["label", "finder", "neuron", "d", "d held out", "fires on it", "elsewhere", "20 by chance: d"], rows
            ),
            "A part of speech is also a set of words: a neuron for *the*, *a* and *this* is a neuron for determiners. "
            "Nothing here tells the two apart.",
        ]
    )


def spans_of(words: list[str], tags: list[str | None]) -> list[tuple[int, int, str]]:
    """Where the words with a tag are in the text; tokens of the others have the label "(none)"."""
    starts = np.cumsum([0, *(len(word) + 1 for word in words)]).tolist()
    return [
        (start, start + len(word), tag)
        for start, word, tag in zip(starts, words, tags, strict=False)
        if tag is not None
    ]


def of_label(finder: Finder, label: str, known: pc.Recording, new: pc.Recording) -> list[str]:
    """How the best neuron of a finder does on files that it has not seen."""
    best = finder(known, "pos", label).top(1)
    before, after = ((pc.find.contrast(each, "pos", label) & best)["cohens_d"][0] for each in (known, new))
    drawn = pc.find.contrast(new, "pos", label).sample(20, seed=SEED)["cohens_d"].max()
    site = best.sites[0]
    by_label, index = new[site].by_label, best.indices(site)[0]
    rate, count = by_label.rate("pos")[index, :, 0], by_label.count("pos")
    place = by_label.categories("pos").index(label)
    rest = np.arange(len(count)) != place
    elsewhere = float((rate * count)[rest].sum() / count[rest].sum())
    name = finder.__name__
    return [
        label, name, f"`{best.names[0]}`", f"{before:.2f}", f"{after:.2f}", f"{rate[place]:.0%}", f"{elsewhere:.0%}",
        f"{drawn:.2f}",
    ]  # fmt: skip
