"""Edited models on disk: ordinary folders, that transformers loads in a process that has no patchclamp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from tests.architectures import CLASSIFIER, GPT2, LLAMA, VIT, VOCABULARY, tokenizer
from tests.model.test_table import outputs, same
from tests.zoo import CASES, Case, drawn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTImageProcessor,
)

import patchclamp as pc
from patchclamp.edit import EditedModel, bake, bakeable
from patchclamp.model.kinds import groups_of

GENERATING = [case for case in CASES if case.generates]
NEW = 64


def long_gpt2() -> Any:
    """The one whose positions are a table: long enough to generate."""
    sizes: dict[str, Any] = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return drawn(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=len(VOCABULARY), **sizes)))()


def edited(case: Case) -> tuple[pc.Model, EditedModel, list[Any]]:
    """Some neurons of each kind silenced, and others held at a value where that is exact."""
    model = pc.load(long_gpt2() if case.title == "GPT-2" else case.build(), tokenizer=tokenizer())
    table = {row["sites"]: row for row in bakeable(model).iter_rows(named=True)}
    silenced, held = {}, {}
    for name, sites in groups_of(model.sites).items():
        if table[name]["zero"] == "exact":
            silenced |= {site.name: [1, 3, 4] for site in sites}
        if table[name]["value"].startswith("exact"):
            held |= {site.name: [0, 5] for site in sites}
    interventions: list[Any] = [pc.ablate(pc.Neurons(silenced))]
    if held:
        interventions.append(pc.clamp(pc.Neurons(held), np.linspace(-1, 1, 2 * len(held)).tolist()))
    return model, bake(model, *interventions), interventions


# Generating -----------------------------------------------------------------------------------------


QUICK = ("GPT-2", "Llama", "Mamba")


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=[pytest.mark.slow] * (each.title not in QUICK)) for each in GENERATING], ids=str
)
def test_what_is_generated_is_the_same_token_for_token(case: Case) -> None:
    model, baked, interventions = edited(case)
    prompt = torch.tensor([[4, 7, 9, 5]])
    # Greedy; without the last option these models would say one token for ever, and the test very little.
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options |= {"no_repeat_ngram_size": 2}
    options |= {"output_scores": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(prompt)}

    def generated(module: Any) -> tuple[list[int], torch.Tensor]:
        with torch.no_grad():
            made = module.generate(prompt, **options)
        return made.sequences[0].tolist()[-NEW:], torch.cat(made.scores)

    with model.intervene(*interventions):
        expected, scores = generated(model.module)
    got, _ = generated(baked.module)
    untouched, _ = generated(model.module)
    assert len(expected) == NEW and expected != untouched
    if got != expected:
        # Only where two logits are equal up to rounding may another token be chosen; after that, texts differ.
        step = next(step for step in range(NEW) if got[step] != expected[step])
        best = scores[step].topk(2).values
        assert float(best[0] - best[1]) < 1e-5, f"another token at step {step} without a tie"


# On disk --------------------------------------------------------------------------------------------

_LOADER = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "patchclamp":
            raise ImportError("patchclamp is not here")

sys.meta_path.insert(0, Blocked())
try:
    import patchclamp
except ImportError:
    pass
else:
    raise SystemExit("patchclamp can be imported")

import torch, transformers
from safetensors.torch import load_file, save_file

found = {}
for folder in sorted(each for each in Path(sys.argv[1]).iterdir() if each.is_dir()):
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    model, said = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    inputs = load_file(folder.with_suffix(".inputs"))
    with torch.no_grad():
        save_file({"logits": model.eval()(**inputs, use_cache=False).logits.contiguous()}, folder.with_suffix(".out"))
    words = transformers.AutoTokenizer.from_pretrained(folder)("the cat sat")["input_ids"]
    wrong = {name: sorted(map(str, each)) for name, each in said.items() if each}
    found[folder.name] = {"wrong": wrong, "words": words, "class": type(model).__name__}
assert not any(name.partition(".")[0] == "patchclamp" for name in sys.modules)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_alone_loads_what_is_saved(tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for number, case in enumerate(GENERATING):
        model, baked, interventions = edited(case)
        folder = baked.save(tmp_path / str(number))
        inputs = {name: each for name, each in case.inputs("right").items() if name != "position_ids"}
        save_file(inputs, folder.with_suffix(".inputs"))
        with model.intervene(*interventions), torch.no_grad():
            expected[folder.name] = model.module(**inputs, use_cache=False).logits
    quiet = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, str(tmp_path)], capture_output=True, text=True, env=quiet, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(GENERATING)
    for number, case in enumerate(GENERATING):
        said = found[str(number)]
        assert said["wrong"] == {}, case.title
        assert said["words"] == tokenizer()("the cat sat")["input_ids"]
        got = load_file(tmp_path / f"{number}.out")["logits"]
        assert same([got], [expected[str(number)]]), case.title


def test_patchclamp_loads_it_again_with_the_same_hash(tmp_path: Path) -> None:
    for number, architecture in enumerate((GPT2, LLAMA)):
        model = pc.load(architecture.build(), tokenizer=tokenizer())
        baked = bake(model, pc.clamp(pc.Neurons({"mlp.0": [1, 2]}), 0.5))
        folder = baked.save(tmp_path / str(number))
        again = pc.load(folder)
        assert again.weights_sha256() == baked.provenance["weights_sha256_after"] == baked.weights_sha256()
        assert type(again.module) is type(model.module) and again.tokens("the cat") == model.tokens("the cat")
        assert (folder / "generation_config.json").is_file()
        # Saving does not change what is saved.
        assert cast(Any, baked.module).config.architectures is None
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    vision = pc.load(VIT.build(), processor=processor)
    bake(vision, pc.ablate(pc.Neurons({"mlp.0": [1]}))).save(tmp_path / "vision")
    assert pc.load(tmp_path / "vision").processor is not None


def test_a_flag_of_an_inner_configuration(tmp_path: Path) -> None:
    """Where a model is made of several, the flag is that of the part."""
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = LlamaConfig(vocab_size=50, max_position_embeddings=64, **small)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **small)
    config = LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=3)
    model = pc.load(drawn(lambda: LlavaForConditionalGeneration(config))())
    held = pc.clamp(pc.Neurons({"language.mlp.0": [1, 2]}), 0.7)
    baked = bake(model, held)
    assert baked.provenance["config"] == {"text_config.mlp_bias": [False, True]}
    kind: Any = LlavaForConditionalGeneration
    loaded, said = kind.from_pretrained(baked.save(tmp_path / "new"), output_loading_info=True)
    assert not any(said.values()) and baked.revert().weights_sha256() == model.weights_sha256()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with model.intervene(held):
        expected = outputs(model.module, inputs)
    assert same(outputs(loaded, inputs), expected) and not same(outputs(model.module, inputs), expected)


def test_adapters_beside_the_weights_are_not_left_behind(tmp_path: Path) -> None:
    """Their `save_pretrained` writes the adapters only: the edit would be lost without a word."""
    module: Any = LLAMA.build()
    module.peft_config = {"default": "what peft, and transformers with it, leave there"}
    baked = bake(pc.load(module), pc.ablate(pc.Neurons({"mlp.0": [1]})))
    with pytest.raises(pc.errors.ModelError, match="adapters"):
        baked.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_real_decoder(data_folder: Path, tmp_path: Path) -> None:
    """stories260K, trained: a hundred neurons held at their means over texts, with the flag of Llama."""
    model = pc.load(data_folder / "stories260K")
    texts = ["Once upon a time there was a dog.", "Lily went to the park with her mom.", "The sun was warm and bright."]
    recording = pc.record(model, texts, sites="mlp.*", progress=False)
    silenced = pc.ablate(model.neurons("mlp.*").sample(100, seed=0), "mean", recording=recording)
    baked = bake(model, silenced)
    again = pc.load(baked.save(tmp_path / "new"))
    with model.intervene(silenced):
        expected, logits = model.generate("Once upon a time", NEW), model.logits(texts[1])
    assert model.generate("Once upon a time", NEW) != expected
    for each in (baked, again):
        assert each.generate("Once upon a time", NEW) == expected and same([each.logits(texts[1])], [logits])


def test_the_card_says_what_was_done(tmp_path: Path) -> None:
    bake(pc.load(LLAMA.build()), pc.scale(pc.Neurons({"mlp.0": [1]}), 2.0)).save(tmp_path / "secret" / "base")
    model = pc.load(tmp_path / "secret" / "base")
    first = bake(
        model, pc.ablate(pc.Neurons({"mlp.1": [7, 3], "attn.0": [11]})), pc.scale(pc.Neurons({"gate.0": [2]}), 4)
    )
    baked = bake(first, pc.clamp(pc.Neurons({"mlp.1": [5]}), -1.5))
    folder = baked.save(tmp_path / "edited")
    card = (folder / "README.md").read_text(encoding="utf-8")
    said = json.loads((folder / "patchclamp.json").read_text(encoding="utf-8"))
    for words in (
        "# base, edited",
        "1. Silenced 3 neurons, held at 0.\n    - `mlp.1`: 7, 3\n    - `attn.0`: 11\n",
        "2. Multiplied 1 neuron by 4.\n    - `gate.0`: 2\n",
        "3. Held 1 neuron at -1.5.\n    - `mlp.1`: 5\n",
        "configuration, `mlp_bias` | False before, True after",
        model.weights_sha256(),
        baked.weights_sha256(),
        pc.__version__,
        "LlamaForCausalLM.from_pretrained",
        *baked.diff()["parameter"],
    ):
        assert words in card
    assert said == {**baked.provenance, "base_model": "base"}
    assert said["config"] == {"mlp_bias": [False, True]}
    assert said["interventions"][2]["details"] == {"kind": "clamp", "factor": 0.0, "values": {"mlp.1": [-1.5]}}
    assert said["interventions"][0]["neurons"] == {"mlp.1": [7, 3], "attn.0": [11]}
    assert str(tmp_path) not in card + json.dumps(said)


def test_a_plain_module_is_a_state_dict_and_a_card(tmp_path: Path) -> None:
    model, inputs = pc.load(CLASSIFIER.build()), CLASSIFIER.inputs()
    baked = bake(model, pc.clamp(pc.Neurons({"mlp.1": [1, 2]}), 0.5))
    folder = baked.save(tmp_path / "plain")
    assert sorted(each.name for each in folder.iterdir()) == ["README.md", "model.safetensors", "patchclamp.json"]
    fresh = CLASSIFIER.build()
    load_model(fresh, folder / "model.safetensors")
    with model.intervene(pc.clamp(pc.Neurons({"mlp.1": [1, 2]}), 0.5)):
        assert same(outputs(fresh, inputs), outputs(model.module, inputs))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "no Hugging Face model" in card and "load_model" in card and "library_name" not in card


class Failing:
    """A tokenizer on a full disk."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return {}

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "half").write_text("half")
        raise OSError(28, "No space left on device")


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    baked = bake(pc.load(GPT2.build()), pc.ablate(pc.Neurons({"mlp.0": [1]})))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file", "file/under"):
        with pytest.raises(pc.errors.StoreError):
            baked.save(tmp_path / place)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    baked.tokenizer = Failing()
    with pytest.raises(pc.errors.StoreError, match="No space left"):
        baked.save(tmp_path / "new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "full"]
    baked.tokenizer = None
    (tmp_path / "empty").mkdir()
    baked.save(tmp_path / "empty")
    with pytest.raises(pc.errors.StoreError, match="files are there"):
        baked.save(tmp_path / "empty")
