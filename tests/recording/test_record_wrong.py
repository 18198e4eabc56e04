"""What `record` refuses, and what it says: networks it cannot read, wrong data, sites, summaries and stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import recorded, state_of
from torch import nn

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, SiteNotReached, StoreError, UnknownName

TEXTS = tiny.texts()
ALBERT = "module:encoder.albert_layer_groups.0.albert_layers.0.ffn"


def model_of() -> pc.Model:
    return pc.load(tiny.bert().double(), tokenizer=tiny.tokenizer())


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.shared(torch.relu(self.shared(x))))


class Turned(nn.Module):
    """Time before examples, and a table of tokens [time * examples / 2, n], as a router of experts would make it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(tiny.VOCABULARY, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        turned = self.first(self.table(input_ids).transpose(0, 1))
        routed = self.second(turned.reshape(-1, 4)[: 2 * len(input_ids)])
        return turned.sum() + routed.sum()


@pytest.mark.parametrize(
    ("build", "site", "error", "says"),
    [
        (tiny.albert, ALBERT, ModelError, "calls the module encoder.*ffn 2 times"),
        (Twice, "module:shared", ModelError, "module:shared: .* calls the module shared 2 times"),
        (Twice, "module:unused", SiteNotReached, "never reached module:unused"),
        (Turned, "module:first", ModelError, r"module:first gives a tensor \[16, 3, 4\]"),
        (Turned, "module:second", ModelError, r"module:second gives a tensor \[6, 4\]"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(
    build: Callable[[], nn.Module], site: str, error: type[Exception], says: str
) -> None:
    module = build().eval()
    model = pc.load(module) if build is Twice else pc.load(module, tokenizer=tiny.tokenizer())
    before = state_of(module)
    data = torch.ones(4, 5) if build is Twice else sorted(TEXTS, key=len)[-3:]
    with pytest.raises(error, match=says):
        recorded(model, data, site, batch_tokens=4096)
    assert state_of(module) == before


# Wrong input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "no examples"),
        (iter(()), "no examples"),
        (["a list", ""], "text 1 of texts has no tokens: ''"),
        (["a list", "the", "\n "], r"text 2 of texts has no tokens: '\\n '"),
        ("a list", "one str is not a data set"),
        (["a list", None], "text 1 of texts.*None"),
        ([3], "text 0"),
        (7, "cannot read data from int"),
    ],
)
def test_wrong_data(data: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        recorded(model_of(), data)


def test_labels_of_another_length() -> None:
    with pytest.raises(DataError, match=r"'kind' has 16 values.*17 examples"):
        pc.Texts(TEXTS, labels={"kind": ["x"] * 16})
    late = pc.Texts((text for text in TEXTS), labels={"kind": ["x"] * 18})
    with pytest.raises(DataError, match=r"'kind' has 18 values.*17 examples"):
        recorded(model_of(), late)


def test_a_broken_line_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"text": "a list"}\n{"text": "the list"}\n{"text": "the \n')
    with pytest.raises(DataError, match=r"broken\.jsonl, line 3 is not JSON"):
        recorded(model_of(), file, store=tmp_path / "store")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("sites", "error", "says"),
    [
        ("mlp.9", UnknownName, "'mlp.9'. The nearest: mlp.1"),
        (["mlp.0", "attention.*"], UnknownName, "'attention.*'"),
        ("module:encoder.layer.7", UnknownName, "no module is called 'encoder.layer.7'"),
        ([], DataError, "no sites are asked for"),
        ([3], DataError, "not by 3"),
    ],
)
def test_wrong_sites(sites: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says.replace("*", r"\*")):
        recorded(model_of(), TEXTS, sites=sites)


@pytest.mark.parametrize(
    ("summaries", "error", "says"),
    [
        (["moments"], DataError, "'moments' is not a summary; there are .*Moments"),
        ("moments", DataError, "'moments' is not a summary"),
        ([torch.nn.Linear], DataError, "is not a summary"),
        ([pc.Moments, pc.Moments()], DataError, "'moments' is asked for twice"),
        ([pc.FiringRate(0.0), pc.FiringRate(1.0)], DataError, "'firing_rate' is asked for twice"),
        ([], DataError, "no summaries are asked for"),
        ([pc.ByLabel("kind")], UnknownName, "'kind'"),
    ],
)
def test_wrong_summaries(summaries: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        recorded(model_of(), TEXTS, summaries=summaries)


def test_one_summary_needs_no_brackets() -> None:
    assert list(recorded(model_of(), TEXTS, summaries=pc.Moments())["mlp.0"].summaries) == ["moments"]


def test_summaries_of_tokens_need_tokens() -> None:
    with pytest.raises(DataError, match=r"ByToken needs texts \(or token ids\)"):
        recorded(pc.load(tiny.mlp()), torch.ones(3, 5), summaries=[pc.ByToken()])
    with pytest.raises(DataError, match=r"module:pooler gives a row for each example.*ByToken"):
        recorded(model_of(), TEXTS, sites="module:pooler", summaries=[pc.ByToken()])


def test_texts_need_a_tokenizer_and_a_model_that_reads_them() -> None:
    with pytest.raises(ModelError, match="needs a tokenizer"):
        recorded(pc.load(tiny.bert()), TEXTS)
    for build, takes in ((tiny.vit, "pixel_values"), (tiny.mlp, "input")):
        with pytest.raises(ModelError, match=f"cannot read texts: its forward takes {takes}.*not input_ids"):
            recorded(pc.load(build(), tokenizer=tiny.tokenizer()), TEXTS)
    with pytest.raises(DataError, match="batch_tokens"):
        recorded(model_of(), TEXTS, batch_tokens=0)


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere/store", "x" * 300])
def test_a_store_that_cannot_be_written_is_found_out_first(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model, calls = model_of(), []
    assert model.sites
    model.module.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(StoreError, match="cannot write"):
        recorded(model, TEXTS, store=tmp_path / place)
    assert not calls and [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_is_not_recorded_is_named() -> None:
    recording = recorded(model_of(), TEXTS, summaries=[pc.Moments()])
    with pytest.raises(UnknownName, match=r"'mlp\.7'.*mlp\.1"):
        recording["mlp.7"]
    with pytest.raises(UnknownName, match=r"'momens'.*moments"):
        _ = recording["mlp.0"].momens
    with pytest.raises(DataError, match="activations=True"):
        recording.with_tokens_permuted()
