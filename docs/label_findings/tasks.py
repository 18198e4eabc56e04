"""The texts and their labels: what finders are given, in the order of documents."""

from __future__ import annotations

import os
import re
import textwrap
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import patchclamp as pc
from patchclamp.data import corpora

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
REVIEWS, SENTENCES, STORIES = 400, 400, 120  # the second for each side


@dataclass(frozen=True)
class Task:
    """Texts in the order of their documents, and which are of the label."""

    title: str
    about: str
    model: pc.Model
    sites: str
    name: str
    texts: Sequence[str]
    right: np.ndarray  # [texts] bool
    positive: str
    documents: np.ndarray  # [texts] int64
    max_length: int
    claim: bool = False


def minilm() -> pc.Model:
    return pc.load("all-MiniLM-L6-v2")


def code() -> Task:
    data = corpora.python_docs(800, kinds=("docstring", "code"))
    # Which module a text is from; one that several have counts to the first.
    module: dict[str, int] = {}
    for number, path in enumerate(corpora._source_files()):
        for text, _ in corpora._read(path):
            module.setdefault(textwrap.dedent(text).strip(), number)
    examples = sorted(data, key=lambda each: module[each.text])
    return Task(
        title="Code against documentation: MiniLM",
        about=(
            "Docstrings and functions of the standard library (`pc.corpora.python_docs`), cut at 64 tokens. A document "
            "is a module."
        ),
        model=minilm(),
        sites="mlp.*",
        name=data.name,
        texts=[each.text for each in examples],
        right=np.asarray([each.labels["kind"] == "code" for each in examples]),
        positive="code",
        documents=np.asarray([module[each.text] for each in examples]),
        max_length=64,
        claim=True,
    )


def reviews() -> Task:
    held = zipfile.ZipFile(data_folder() / "text_open" / "movie_reviews.zip")
    names = sorted(each for each in held.namelist() if each.endswith(".txt") and "/cv" in each)
    names = [names[each] for each in np.random.default_rng(SEED).permutation(len(names))[:REVIEWS]]
    return Task(
        title="Sentiment of film reviews: MiniLM",
        about=(
            f"{REVIEWS} reviews (`movie_reviews` of NLTK), cut at 96 tokens: the verdict, which often comes last, is "
            "not read. A document is a review; other reviews of the same film may be on the other side of the split."
        ),
        model=minilm(),
        sites="mlp.*",
        name="movie_reviews",
        texts=[held.read(each).decode("utf-8", "replace") for each in names],
        right=np.asarray(["/pos/" in each for each in names]),
        positive="positive",
        documents=np.arange(len(names)),
        max_length=96,
    )


def subjectivity() -> Task:
    held = zipfile.ZipFile(data_folder() / "text_open" / "subjectivity.zip")
    texts, right = [], []
    for file, subjective in (("quote", True), ("plot", False)):
        lines = held.read(f"subjectivity/{file}.tok.gt9.5000").decode("latin-1").splitlines()
        texts += [each.strip() for each in lines[:SENTENCES]]
        right += [subjective] * SENTENCES
    order = np.random.default_rng(SEED).permutation(len(texts))
    return Task(
        title="Opinion against plot: MiniLM",
        about=(
            f"{2 * SENTENCES:,} sentences about films (`subjectivity` of NLTK): snippets of reviews, called "
            "subjective, and of plot summaries. The data does not say which belong together, so each is a "
            "document of its own; the label was given by the source, and a neuron may know the source by anything."
        ),
        model=minilm(),
        sites="mlp.*",
        name="subjectivity",
        texts=[texts[each] for each in order],
        right=np.asarray(right)[order],
        positive="subjective",
        documents=np.arange(len(texts)),
        max_length=64,
    )


def dialogue() -> Task:
    folder = data_folder() / "stories260K"
    if not folder.is_dir():
        raise FileNotFoundError(folder.name)
    model = pc.load(folder)
    texts, right, documents = [], [], []
    for number, story in enumerate(stories(model, STORIES)):
        for sentence, spoken in sentences(story):
            texts.append(sentence)
            right.append(spoken)
            documents.append(number)
    return Task(
        title="Dialogue against narration: stories260K",
        about=(
            f"{len(texts):,} sentences of {STORIES} stories that the model wrote itself (seed {SEED}, temperature "
            "0.8), each shown alone. A sentence is dialogue if a part of it lies between quotation marks; the marks "
            "are taken out before the model sees it, so that a neuron for the mark itself is not what is found. "
            "Words such as *said* are left in. A document is a story. The sites are the gates."
        ),
        model=model,
        sites="gate.*",
        name="stories260K, stories of its own",
        texts=texts,
        right=np.asarray(right),
        positive="dialogue",
        documents=np.asarray(documents),
        max_length=64,
    )


def stories(model: pc.Model, count: int) -> list[str]:
    module: Any = model.module
    torch.manual_seed(SEED)
    start = torch.full((count, 1), module.config.bos_token_id)
    with torch.no_grad():
        written = module.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=200,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            pad_token_id=0,
        )
    return model.tokenizer.batch_decode(written, skip_special_tokens=True)


def sentences(story: str) -> Iterable[tuple[str, bool]]:
    """Whole sentences without their quotation marks, and whether a part of each is quoted."""
    quoted = False
    for each in re.findall(r'[^.!?]*[.!?]+"?', story.replace("“", '"').replace("”", '"')):
        spoken = quoted or '"' in each
        quoted ^= each.count('"') % 2 == 1
        text = " ".join(each.replace('"', " ").split())
        if len(text.split()) >= 4:
            yield text, spoken


def data_folder() -> Path:
    folder = Path(os.environ.get("PATCHCLAMP_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        raise FileNotFoundError("PATCHCLAMP_DATA")
    return folder
