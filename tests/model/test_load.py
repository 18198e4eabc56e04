"""`pc.load`: folders, heads, types, tokenizers, and what cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.architectures import BERT, GPT2, LLAMA, T5, TEXTS, VIT, Architecture, bert, padded, tokenizer
from tests.raw import call
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel, T5ForConditionalGeneration, ViTModel

import patchclamp as pc
from patchclamp.errors import ModelError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it, with a tokenizer. Leave it as it is."""
    folder = tmp_path_factory.mktemp("saved") / "bert"
    BERT.build().save_pretrained(folder)  # type: ignore[operator]
    tokenizer(special=True).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def reconfigured(folder: Path, **changes: Any) -> Path:
    """The folder with another configuration; None takes an entry out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


# What is loaded -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [(GPT2, GPT2LMHeadModel), (T5, T5ForConditionalGeneration), (VIT, ViTModel)],
    ids=str,
)
def test_a_folder_is_loaded_as_the_class_it_was_saved_as(
    architecture: Architecture, kind: type, tmp_path: Path
) -> None:
    module = architecture.build()
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    model = pc.load(tmp_path)
    assert type(model.module) is kind and model.name == str(tmp_path) and model.tokenizer is None
    with torch.no_grad():
        inputs = architecture.inputs()
        assert torch.equal(call(model.module, inputs), call(module, inputs))
    assert not any(each.training for each in model.module.modules())
    assert model.weights_sha256() == pc.load(module).weights_sha256()


def test_a_head_is_loaded_with_its_weights(tmp_path: Path) -> None:
    module = BertForSequenceClassification(BERT.build().config).eval()  # type: ignore[arg-type]
    module.save_pretrained(tmp_path)
    loaded = pc.load(str(tmp_path)).module
    assert isinstance(loaded, BertForSequenceClassification)
    assert torch.equal(loaded.classifier.weight, module.classifier.weight)


@pytest.mark.parametrize("named", [None, [], ["MyOwnBert"], ["AutoTokenizer"]])
def test_without_a_class_that_transformers_has_it_is_the_plain_encoder(copy: Path, named: Any) -> None:
    model = pc.load(reconfigured(copy, architectures=named))
    assert type(model.module) is BertModel
    assert model.weights_sha256() == pc.load(BERT.build()).weights_sha256()


def test_the_tokenizer_beside_the_weights(saved: Path) -> None:
    model = pc.load(saved)
    assert model.tokens("the cat") == ["[CLS]", " the", " cat", "[SEP]"]
    with torch.no_grad():
        assert model(TEXTS).last_hidden_state.shape[0] == len(TEXTS)


def test_a_tokenizer_of_ones_own(saved: Path) -> None:
    mine = tokenizer()
    assert pc.load(saved, tokenizer=mine).tokenizer is mine
    model = pc.load(LLAMA.build(), tokenizer=saved)
    assert model.tokens("the cat") == ["[CLS]", " the", " cat", "[SEP]"]
    assert pc.load(LLAMA.build(), tokenizer=str(saved)).tokens("cat") == ["[CLS]", " cat", "[SEP]"]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("float64", torch.float64), (torch.bfloat16, torch.bfloat16), ("auto", torch.float16)],
)
def test_dtype(copy: Path, dtype: Any, expected: torch.dtype) -> None:
    BERT.build().half().save_pretrained(copy)  # type: ignore[operator]
    model = pc.load(copy, dtype=dtype)
    assert {each.dtype for each in model.module.parameters()} == {expected}
    read = model.activations("the cat", "mlp.1")
    assert read.dtype == expected


def test_device(saved: Path) -> None:
    for device in ("cpu", torch.device("cpu")):
        model = pc.load(saved, device=device)
        assert model.device == torch.device("cpu") and next(model.module.parameters()).dtype == torch.float32


def test_the_packaged_weights_are_found_by_their_alias(minilm: pc.Model) -> None:
    assert minilm.name == "all-MiniLM-L6-v2" and isinstance(minilm.module, BertModel)
    assert len(minilm.select("mlp.*")) == 6 and len(minilm.neurons()) == 6 * 1536


# What cannot be loaded ---------------------------------------------------------------------------------


def test_folders_that_are_none(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*nothing"):
        pc.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"there is no folder \./nothing|there is no folder nothing"):
        pc.load("./nothing")
    with pytest.raises(ModelError, match=r"there is no folder .*config\.json"):
        pc.load(saved / "config.json")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelError, match=r"it has no config\.json \(it has \['notes\.txt'\]\)"):
        pc.load(tmp_path)


def test_a_name_that_the_hub_does_not_know() -> None:
    message = r"cannot load 'nobody/nothing': it is no folder and no alias \(all-MiniLM-L6-v2\), and the hub gave: "
    with pytest.raises(ModelError, match=message):
        pc.load("nobody/nothing")


def test_a_damaged_folder_is_said(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cannot load the weights of '.*copy': SafetensorError"):
        pc.load(copy)
    weights.unlink()
    with pytest.raises(ModelError, match=r"cannot load the weights of '.*copy': OSError: .*no file named"):
        pc.load(copy)
    weights.write_bytes(whole)
    with pytest.raises(ModelError, match=r"cannot load the weights of '.*copy': RuntimeError"):
        pc.load(reconfigured(copy, intermediate_size=99))
    with pytest.raises(ModelError, match=r"cannot load '.*copy': ValueError: .*does not recognize"):
        pc.load(reconfigured(copy, model_type="unheard-of"))
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot load '.*copy': OSError: .*not a valid JSON"):
        pc.load(copy)


def test_weights_are_never_unpickled(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save(BERT.build().state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        pc.load(copy)


@pytest.mark.parametrize("content", ["{", '{"model": 3}', ""])
def test_a_damaged_tokenizer(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of '.*copy' \(give one with tokenizer=\)"):
        pc.load(copy)
    assert pc.load(copy, tokenizer=tokenizer()).tokens("cat") == [" cat"]


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    module = BERT.build()
    with pytest.raises(ModelError, match="a tokenizer turns texts into ids; int cannot be called"):
        pc.load(module, tokenizer=3)
    with pytest.raises(ModelError, match="there is no folder"):
        pc.load(module, tokenizer=tmp_path / "nothing")
    with pytest.raises(ModelError, match="tokenizer"):
        pc.load(module, tokenizer=tmp_path)
    GPT2.build().save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ModelError, match="has no tokenizer: give one with tokenizer="):
        pc.load(module, tokenizer=tmp_path)


def test_types_and_devices_that_are_none(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load the weights of .*dtype"):
        pc.load(saved, dtype="nonsense")
    with pytest.raises(ModelError, match="cannot load onto the device 'nonsense'"):
        pc.load(saved, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="cannot load onto the device 'cuda'"):
            pc.load(saved, device="cuda")


@pytest.mark.parametrize("option", ["dtype", "device", "revision"])
def test_options_of_loading_do_not_go_with_a_module(option: str) -> None:
    with pytest.raises(ModelError, match=rf"{option}= is for loading from disk; a module is wrapped as it is"):
        pc.load(BERT.build(), **{option: "float16"})  # type: ignore[arg-type]


def test_what_is_no_model() -> None:
    model = pc.load(bert().eval())
    with pytest.raises(ModelError, match="this is a Model already"):
        pc.load(model)  # type: ignore[arg-type]
    for wrong in (3, None, torch.nn.Linear, padded()):
        with pytest.raises(ModelError, match=r"cannot load .*: give a name, a folder or a torch\.nn\.Module"):
            pc.load(wrong)  # type: ignore[arg-type]
