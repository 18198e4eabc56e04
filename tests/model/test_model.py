"""`Model`: selecting sites, running on texts and tensors, padding, leaving everything as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.architectures import (
    BERT,
    GPT2,
    LAYERS,
    LLAMA,
    NEURONS,
    OPT,
    ROBERTA,
    SEQUENTIAL,
    T5,
    TEXTS,
    TRANSFORMERS,
    VIT,
    VOCABULARY,
    WIDTH,
    Architecture,
    Classifier,
    ids_of,
    padded,
    tokenizer,
)
from tests.raw import assert_same, hooks_of, watching
from torch import nn
from transformers import BartConfig, BartModel, BertForMaskedLM, BertForSequenceClassification

import patchclamp as pc
from patchclamp.errors import DataError, ModelError, SiteNotReached
from patchclamp.model.inspection import inspect
from patchclamp.model.probe import probe

BART_PARTS = [("layers", 2), ("ffn_dim", NEURONS), ("attention_heads", 4)]
readers = pytest.mark.parametrize("architecture", [BERT, GPT2, LLAMA, OPT, ROBERTA], ids=str)


@pytest.fixture
def model() -> pc.Model:
    return pc.load(BERT.build(), tokenizer=tokenizer(special=True))


def names(sites: Any) -> list[str]:
    return [site.name for site in sites]


# Running --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TRANSFORMERS, ids=str)
def test_keywords_are_passed_through_and_the_output_is_the_modules_own(architecture: Architecture) -> None:
    module = architecture.build()
    inputs = architecture.inputs()
    with torch.no_grad():
        expected, got = module(**inputs), pc.load(module)(**inputs)
    assert type(got) is type(expected) and torch.equal(got[0], expected[0])


def test_tensors_are_passed_through() -> None:
    module, x = Classifier(), torch.randn(5, 6, requires_grad=True)
    got = pc.load(module)(x)
    assert torch.equal(got, module(x)) and got.requires_grad
    assert torch.equal(pc.load(module)(x=x), got)
    bert, ids = BERT.build(), torch.tensor([[4, 5, 6]])
    assert torch.equal(
        pc.load(bert)(ids, output_hidden_states=True).hidden_states[0], bert.get_submodule("embeddings")(ids)
    )


def test_texts_are_tokenized_and_inputs_that_the_module_does_not_take_are_left_out(model: pc.Model) -> None:
    seen: dict[str, Any] = {}

    class Reader(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            seen["ids"] = input_ids
            return input_ids

    reader = pc.load(Reader(), tokenizer=tokenizer())
    reader(["the cat", "rained"])
    assert seen["ids"].tolist() == [ids_of("the cat"), [*ids_of("rained"), VOCABULARY["[PAD]"]]]
    assert set(model.inputs("the cat")) == {"input_ids", "attention_mask"}
    assert model.inputs("the cat")["input_ids"].tolist() == [[2, *ids_of("the cat"), 3]]
    assert model.inputs(("the", "it sat"))["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_one_text_is_a_batch_of_one_and_keywords_may_be_added(model: pc.Model) -> None:
    with torch.no_grad():
        one, listed = model("it sat"), model(["it sat"], output_hidden_states=True)
    assert torch.equal(one.last_hidden_state, listed.last_hidden_state) and len(listed.hidden_states) == LAYERS + 1
    with pytest.raises(DataError, match=r"give texts as one list: model\(\[first, second\]\)"):
        model("it", "sat")


def test_what_cannot_be_read_as_texts(model: pc.Model) -> None:
    calls: list[Callable[[Any], Any]] = [model, model.embed, lambda x: model.activations(x, "mlp.0")]
    for call in calls:
        with pytest.raises(DataError, match="there are no texts: the list is empty"):
            call([])
        with pytest.raises(DataError, match="text 1 is not a text but int: 3"):
            call(["the", 3])
    bare = pc.load(BERT.build(), tokenizer=tokenizer())
    calls = [bare, bare.embed, lambda x: bare.activations(x, "mlp.0")]
    for call in calls:
        with pytest.raises(DataError, match="the text '' has no tokens"):
            call(["the", ""])
    with pytest.raises(ModelError, match=r"a text needs a tokenizer and this model has none: pc\.load\(module, tok"):
        pc.load(BERT.build())("the cat")
    with pytest.raises(ModelError, match=r"tokens\(\) needs a tokenizer"):
        pc.load(BERT.build()).tokens("the cat")


def test_training_mode_is_the_users_own_in_a_call_and_off_when_reading() -> None:
    module = BERT.build().train()
    model = pc.load(module, tokenizer=tokenizer())
    module.get_submodule("encoder.layer.0").eval()
    modes = [each.training for each in module.modules()]
    with torch.no_grad():
        assert not torch.equal(model("the cat")[0], model("the cat")[0])  # dropout
    assert torch.equal(model.activations("the cat", "mlp.1"), model.activations("the cat", "mlp.1"))
    assert torch.equal(model.embed("the cat"), model.embed("the cat"))
    assert [each.training for each in module.modules()] == modes


# Helpers --------------------------------------------------------------------------------------------


def test_tokens_read_as_the_text(model: pc.Model) -> None:
    assert model.tokens("the cat sat") == ["[CLS]", " the", " cat", " sat", "[SEP]"]
    assert "".join(pc.load(BERT.build(), tokenizer=tokenizer()).tokens("the cat sat")).strip() == "the cat sat"


def test_activations_of_a_text_carry_its_tokens(model: pc.Model) -> None:
    read = model.activations("the cat sat", "mlp.1")
    assert read.shape == (5, NEURONS) and read.site == "mlp.1" and read.tokens == model.tokens("the cat sat")
    assert not read.requires_grad and isinstance(read, pc.Activations)
    assert not hasattr(read + 1, "tokens") and not hasattr(read[1:], "tokens")
    assert "mlp.1" in repr(read) and "cat" in repr(read)
    other: Any = copy.deepcopy(read)
    assert torch.equal(other, read) and other.tokens == read.tokens and other.data_ptr() != read.data_ptr()


def test_several_sites_give_a_dict_and_several_texts_a_list(model: pc.Model) -> None:
    read = model.activations("the cat", "mlp.*")
    assert list(read) == ["mlp.0", "mlp.1"] and read["mlp.1"].shape == (4, NEURONS)
    assert list(model.activations("the cat", ["mlp.1"])) == ["mlp.1"]
    assert list(model.activations("the cat")) == ["mlp.0", "mlp.1"]
    assert model.activations("the cat", model.sites["attn.0"]).shape == (4, WIDTH)
    listed = model.activations(["the", "it sat"], "mlp.0")
    assert [each.tokens for each in listed] == [model.tokens("the"), model.tokens("it sat")]


def test_activations_of_tensors_keep_their_shape() -> None:
    x = torch.randn(5, 6)
    assert pc.load(SEQUENTIAL.build()).activations(x, "mlp.1").shape == (5, 8)
    read = pc.load(VIT.build()).activations(torch.randn(3, 3, 8, 8), "mlp.0")
    assert read.shape == (3, 5, NEURONS) and read.tokens is None
    assert pc.load(BERT.build()).activations(padded(), "mlp.0").shape == (4, 11, NEURONS)
    assert pc.load(OPT.build()).activations(BERT.inputs(), "mlp.0").shape == (44, NEURONS)


def test_both_stacks_of_an_encoder_decoder_carry_their_tokens() -> None:
    model = pc.load(T5.build(), tokenizer=tokenizer())
    read = model.activations("the cat sat", "mlp.0")
    assert read["encoder.mlp.0"].tokens == [" the", " cat", " sat"]
    assert read["decoder.mlp.0"].tokens == ["[PAD]", " the", " cat"]  # the start token of T5 is the padding token
    assert list(model.activations("it", "decoder.mlp.0").shape) == [1, NEURONS]


def test_a_site_that_a_pass_never_reaches() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model = pc.load(Shortcut())
    with pytest.raises(SiteNotReached, match=r"never reached mlp\.1: the module third was not called"):
        model.activations(torch.ones(3, 4), "mlp.*")


def test_logits() -> None:
    model = pc.load(GPT2.build(), tokenizer=tokenizer())
    assert torch.equal(model.logits("the cat"), model.module(torch.tensor([ids_of("the cat")])).logits[0])
    assert model.logits("the cat").shape == (2, len(VOCABULARY))
    assert pc.load(T5.build(), tokenizer=tokenizer()).logits("the cat").shape == (2, len(VOCABULARY))
    classes = BertForSequenceClassification(BERT.build().config).eval()  # type: ignore[arg-type]
    assert pc.load(classes, tokenizer=tokenizer()).logits("the cat").shape == (2,)
    with pytest.raises(ModelError, match="BertModel has no head that gives logits"):
        pc.load(BERT.build(), tokenizer=tokenizer()).logits("the cat")


def by_hand(module: nn.Module, text: str) -> torch.Tensor:
    """The mean of the last hidden states of one text, of length 1."""
    ids = torch.tensor([ids_of(text)])
    with torch.no_grad():
        if module.config.is_encoder_decoder:  # type: ignore[union-attr]
            states = module.get_submodule("encoder")(ids)[0]
        else:
            states = module(ids, output_hidden_states=True).hidden_states[-1]
    return nn.functional.normalize(states[0].mean(0), dim=0)


@pytest.mark.parametrize("architecture", [BERT, GPT2, LLAMA, OPT, T5], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_embed_is_the_mean_of_the_last_hidden_state(architecture: Architecture, side: str) -> None:
    module = architecture.build()
    vectors = pc.load(module, tokenizer=tokenizer(side=side)).embed(TEXTS)
    assert_same(vectors, torch.stack([by_hand(module, text) for text in TEXTS]))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))


def test_embed_in_groups_gives_the_same() -> None:
    model = pc.load(BERT.build(), tokenizer=tokenizer())
    many = TEXTS * 20
    assert_same(model.embed(many), model.embed(TEXTS).repeat(20, 1))
    assert model.embed("it sat").shape == (1, WIDTH)


def test_embed_with_a_head() -> None:
    base = BERT.build()
    head = BertForMaskedLM(base.config).eval()  # type: ignore[arg-type]
    head.bert.load_state_dict(base.state_dict(), strict=False)
    assert_same(pc.load(head, tokenizer=tokenizer()).embed(TEXTS), pc.load(base, tokenizer=tokenizer()).embed(TEXTS))


@pytest.mark.parametrize("architecture", [GPT2, LLAMA, T5], ids=str)
def test_generate_continues_a_text(architecture: Architecture) -> None:
    module = architecture.build()
    model = pc.load(module, tokenizer=tokenizer())
    got = model.generate("the cat sat on", max_new_tokens=6, min_new_tokens=6)
    ids = torch.tensor([ids_of("the cat sat on")])
    wanted = module.generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)[0]  # type: ignore[operator]
    new = wanted if module.config.is_encoder_decoder else wanted[4:]  # type: ignore[union-attr]
    assert got == tokenizer().decode(new, skip_special_tokens=True) and got.split()
    assert model.generate("the cat", max_new_tokens=3) == model.generate("the cat", max_new_tokens=3)


def test_only_a_generator_generates() -> None:
    with pytest.raises(ModelError, match="BertModel cannot generate"):
        pc.load(BERT.build(), tokenizer=tokenizer()).generate("the cat")


# Padding --------------------------------------------------------------------------------------------


def rows_of_batch(model: pc.Model, texts: list[str], path: str) -> list[torch.Tensor]:
    """What enters a module when the texts are one batch: the rows of each text's own tokens."""
    mask = model.inputs(texts)["attention_mask"].bool()
    with watching(model.module, [path]) as seen, torch.no_grad():
        model(texts)
    given = seen[path][0].reshape(*mask.shape, -1)
    return [given[number][mask[number]] for number in range(len(texts))]


@readers
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [True, False], ids=["pad-token", "no-pad-token"])
def test_a_padded_batch_gives_what_one_text_at_a_time_gives(
    architecture: Architecture, side: str, padding: bool
) -> None:
    mine = tokenizer(padding=padding, side=side)
    model = pc.load(architecture.build(torch.float64), tokenizer=mine)
    last = f"mlp.{LAYERS - 1}"
    batch = rows_of_batch(model, TEXTS, architecture.sites[last].module)
    for text, rows in zip(TEXTS, batch, strict=True):
        alone = model.activations(text, last)
        assert alone.shape == (len(ids_of(text)), NEURONS)
        torch.testing.assert_close(rows, torch.as_tensor(alone.clone()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", [BERT, GPT2, LLAMA, OPT], ids=str)
def test_the_tokenizers_side_is_kept_where_positions_can_be_told(architecture: Architecture) -> None:
    model = pc.load(architecture.build(), tokenizer=tokenizer(side="left"))
    inputs = model.inputs(["it", "it sat"])
    assert inputs["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 0], [0, 1]]


def test_a_model_that_cannot_be_told_positions_is_padded_on_the_right() -> None:
    of_bart: dict[str, Any] = {f"{stack}_{part}": n for stack in ("encoder", "decoder") for part, n in BART_PARTS}
    bart = BartModel(BartConfig(vocab_size=len(VOCABULARY), d_model=WIDTH, **of_bart)).eval().double()
    for module in (bart, ROBERTA.build(torch.float64), T5.build(torch.float64)):
        model = pc.load(module, tokenizer=tokenizer(side="left"))
        assert model.safe_padding_side == "right"
        assert model.inputs(["it", "it sat"])["attention_mask"].tolist() == [[1, 0], [1, 1]]
    model = pc.load(bart, tokenizer=tokenizer(side="left"))
    batch = rows_of_batch(model, TEXTS, "encoder.layers.1.fc2")
    alone = [model.activations(text, "encoder.mlp.1") for text in TEXTS]
    for rows, each in zip(batch, alone, strict=True):
        torch.testing.assert_close(rows, torch.as_tensor(each.clone()), rtol=1e-9, atol=1e-9)


def test_the_users_tokenizer_is_not_changed() -> None:
    for padding in (True, False):
        mine = tokenizer(padding=padding, special=True)
        before = mine.backend_tokenizer.to_str(), mine.pad_token, mine.padding_side, mine.model_max_length
        model = pc.load(GPT2.build(), tokenizer=mine)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            model(TEXTS)
        model.activations(TEXTS[2], "mlp.0")
        model.generate("the cat", max_new_tokens=2)
        assert (mine.backend_tokenizer.to_str(), mine.pad_token, mine.padding_side, mine.model_max_length) == before
        assert model.tokenizer is mine


def test_a_text_is_cut_at_what_model_and_tokenizer_can_take() -> None:
    mine = tokenizer(special=True)
    model = pc.load(BERT.build(), tokenizer=mine)
    assert model.reader is not None and model.reader.max_length == 32
    long = " ".join(["cat"] * 50)
    assert len(model.tokens(long)) == 32 and model.tokens(long)[-1] == "[SEP]"
    mine.model_max_length = 10
    assert len(pc.load(BERT.build(), tokenizer=mine).tokens(long)) == 10
    encoded = model.reader.encode([long, "the cat", " ".join(["cat"] * 30)])
    assert [each.truncated for each in encoded] == [True, False, False]
    assert encoded[1].special == [True, False, False, True]


# Leaving everything as it was -------------------------------------------------------------------------


def test_load_wraps_the_very_object() -> None:
    module = BERT.build()
    model = pc.load(module)
    assert model.module is module and model.name == "BertModel"
    module.get_submodule("encoder.layer.0.output.dense").weight.data.zero_()  # type: ignore[union-attr,operator]
    assert not model.output_weights("mlp.0").any()


@pytest.mark.parametrize("architecture", TRANSFORMERS, ids=str)
def test_finding_sites_disturbs_nothing(architecture: Architecture) -> None:
    module = architecture.build().train()
    first = next(iter(architecture.sites.values())).module
    module.get_submodule(first).eval()
    calls: list[int] = []
    handle = module.get_submodule(first).register_forward_hook(lambda *_: calls.append(1))
    modes, hooks = [each.training for each in module.modules()], hooks_of(module)
    weights = {name: each.clone() for name, each in module.state_dict().items()}
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    probe(module, inspect(module))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert calls and [each.training for each in module.modules()] == modes and hooks_of(module) == hooks
    assert all(torch.equal(each, module.state_dict()[name]) for name, each in weights.items())
    assert all(each.grad is None for each in module.parameters())
    handle.remove()


def test_a_model_that_cannot_be_tried_keeps_what_inspection_found() -> None:
    module = BERT.build()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("not on made-up tokens")

    handle = module.register_forward_pre_hook(fail)
    model = pc.load(module)
    assert names(model.select("mlp.*")) == ["mlp.0", "mlp.1"]
    assert "resid_mid.*: not listed: the model could not be tried: ZeroDivisionError" in model.explain_sites()
    handle.remove()
    assert not any(hooks_of(module).values())


def test_the_hash_changes_with_the_weights_and_only_with_them() -> None:
    module = BERT.build()
    model = pc.load(module)
    first = model.weights_sha256()
    assert len(first) == 64 and model.weights_sha256() == first == pc.load(BERT.build()).weights_sha256()
    model.activations(padded(), "mlp.0")
    assert model.weights_sha256() == first
    weight: Any = module.get_submodule("encoder.layer.1.output.dense").weight
    kept = float(weight.detach()[0, 0])
    # Through .data, PyTorch does not count the change.
    weight.data[0, 0] += 1
    assert model.weights_sha256() != first
    with torch.no_grad():
        weight[0, 0] = kept
    assert model.weights_sha256() == first
    assert pc.load(BERT.build(torch.float64)).weights_sha256() != first
    assert pc.load(BERT.build(torch.bfloat16)).weights_sha256() != pc.load(BERT.build(torch.float16)).weights_sha256()


def test_the_hash_tells_the_same_bytes_in_another_shape_or_type_apart() -> None:
    layers = [nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)]
    layers += [nn.Linear(2, 3, bias=False).half(), nn.Linear(2, 3, bias=False).bfloat16()]
    for each in layers:
        each.weight.data.zero_()
    assert len({pc.load(each).weights_sha256() for each in layers}) == 4
    assert len(pc.load(nn.ReLU()).weights_sha256()) == 64
