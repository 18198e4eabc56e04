"""Tiny networks with random weights, one of each family, with inputs and a tokenizer for them.

Every weight is drawn from a normal distribution, biases and norms too, so that a bias or a norm that is
forgotten shows. Nothing here comes from patchclamp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    CLIPConfig,
    CLIPModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

WIDTH, NEURONS, LAYERS, HEADS = 16, 24, 2, 4
TEXTS = ["the cat sat on a mat", "rained", "two dogs ran home and they stayed in all day long", "it sat"]
PAD, START, END, UNKNOWN = "[PAD]", "[CLS]", "[SEP]", "[UNK]"
WORDS = sorted({word for text in TEXTS for word in text.split()})
VOCABULARY = {word: number for number, word in enumerate([UNKNOWN, PAD, START, END, *WORDS])}


def tokenizer(padding: bool = True, side: str = "right", special: bool = False) -> PreTrainedTokenizerFast:
    """Words at spaces. `padding`: has a padding token; `special`: puts [CLS] and [SEP] around each text."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    names: dict[str, str] = {"unk_token": UNKNOWN} | ({"pad_token": PAD} if padding else {})
    if special:
        ends = [(START, VOCABULARY[START]), (END, VOCABULARY[END])]
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
            single=f"{START} $A {END}", special_tokens=ends
        )
        names |= {"cls_token": START, "sep_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **names)


def ids_of(text: str) -> list[int]:
    """The token ids of a text, by hand."""
    return [VOCABULARY[word] for word in text.split()]


def padded(texts: Sequence[str] = TEXTS, side: str = "right", pad_id: int = 1) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `position_ids` of several texts, by hand."""
    width = max(len(ids_of(text)) for text in texts)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "position_ids": []}
    for text in texts:
        ids = ids_of(text)
        fill = width - len(ids)
        before, after = (fill, 0) if side == "left" else (0, fill)
        rows["input_ids"].append([pad_id] * before + ids + [pad_id] * after)
        rows["attention_mask"].append([0] * before + [1] * len(ids) + [0] * after)
        rows["position_ids"].append([0] * before + list(range(len(ids))) + [0] * after)
    return {name: torch.tensor(each) for name, each in rows.items()}


@dataclass(frozen=True)
class Place:
    """What a site ought to say of itself: the module that its neurons enter, and what feeds them, by role."""

    module: str
    size: int
    activation: str | None = None
    reads: Mapping[str, str] = field(default_factory=dict)
    heads: int | None = None

    def at(self, layer: int) -> Place:
        """With the number of the layer in its paths."""
        reads = {role: path.format(layer) for role, path in self.reads.items()}
        return replace(self, module=self.module.format(layer), reads=reads)


@dataclass(frozen=True, eq=False)
class Architecture:
    """One family: how to build it, what it reads, and the sites it ought to have.

    Attributes:
        name: of the family.
        new: makes the network; its weights are drawn afterwards.
        read: padding side -> keyword arguments.
        places: name of a site without its number -> where it ought to be, `{}` for the layer.
        blocks: prefix of a stack -> path of its blocks, `{}` for the layer.
        norm: path within the block of the norm that follows attention, and of the one that follows the MLP.
        middle: whether its blocks have a residual stream between attention and MLP.
        left_in_float64: whether a float64 network survives padding on the left (in transformers' BLOOM and
            Gemma 2 a row that sees nothing becomes NaN, as its mask overflows float32).
    """

    name: str
    new: Callable[[], nn.Module]
    read: Callable[[str], dict[str, Any]]
    places: Mapping[str, Place]
    blocks: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, str] | None = None
    middle: bool = True
    left_in_float64: bool = True

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network, always with the same weights, in evaluation mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = self.new()
            for path, parameter in module.named_parameters():
                centre = 1.0 if "norm" in path.lower() or ".ln_" in path else 0.0
                with torch.no_grad():
                    parameter.normal_(centre, 0.3)
        return module.to(dtype).eval()

    def inputs(self, side: str = "right", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of a batch of different lengths, padded on a side."""
        made = self.read(side if self.left_in_float64 or dtype != torch.float64 else "right")
        return {name: each.to(dtype) if each.is_floating_point() else each for name, each in made.items()}

    @property
    def sites(self) -> dict[str, Place]:
        """Full name of a site -> where it ought to be."""
        if not self.blocks:
            return dict(self.places)
        return {f"{name}.{layer}": place.at(layer) for name, place in self.places.items() for layer in range(LAYERS)}

    def __str__(self) -> str:
        return self.name


def _texts(*names: str) -> Callable[[str], dict[str, Any]]:
    def read(side: str) -> dict[str, Any]:
        made = padded(side=side)
        return {name: made[name] for name in names}

    return read


def _two_texts(side: str) -> dict[str, Any]:
    encoder, decoder = padded(side=side), padded(TEXTS[::-1])
    return {
        "input_ids": encoder["input_ids"],
        "attention_mask": encoder["attention_mask"],
        "decoder_input_ids": decoder["input_ids"],
        "decoder_attention_mask": decoder["attention_mask"],
    }


def _numbers(name: str, *shape: int) -> Callable[[str], dict[str, Any]]:
    return lambda side: {name: torch.randn(*shape, generator=torch.Generator().manual_seed(len(side)))}


def bert(**options: Any) -> nn.Module:
    """BERT; `options` are those of its configuration."""
    return BertModel(BertConfig(**dict(_ENCODER, **options)))


def opt(before: bool) -> nn.Module:
    """OPT; `before`: norms before attention and MLP, as all but the 350m have it."""
    return OPTModel(
        OPTConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=32,
            do_layer_norm_before=before,
            pad_token_id=1,
            dropout=0.1,
        )
    )


def t5(feed_forward: str) -> nn.Module:
    """T5 whose heads are narrower together than the model."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(VOCABULARY),
            d_model=WIDTH,
            d_kv=3,
            d_ff=NEURONS,
            num_layers=LAYERS,
            num_heads=HEADS,
            feed_forward_proj=feed_forward,
            pad_token_id=1,
            eos_token_id=3,
            **OF_GENERATION,
        )
    )


OF_GENERATION: dict[str, Any] = {"decoder_start_token_id": 1}


def gpt_neox(parallel: bool) -> nn.Module:
    """GPT-NeoX; `parallel`: attention and MLP side by side."""
    return GPTNeoXModel(
        GPTNeoXConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=32,
            use_parallel_residual=parallel,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


class Classifier(nn.Module):
    """A plain network as anybody writes one: three linear layers, a norm on the way, functions for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.second = nn.Linear(10, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 6] -> [..., 3]."""
        hidden = self.norm(torch.relu(self.first(x)))
        return self.last(torch.tanh(self.second(hidden)))


_ENCODER: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def _single(
    blocks: str, attention: str, output: str, activation: str, into: str = "", attention_size: int = WIDTH
) -> dict[str, Place]:
    return {
        "attn": Place(f"{blocks}.{attention}", attention_size, heads=HEADS),
        "mlp": Place(f"{blocks}.{output}", NEURONS, activation, {"in": f"{blocks}.{into}"}),
    }


def _gated(places: dict[str, Place], module: str, gate: str, up: str) -> dict[str, Place]:
    """The same with gated MLPs: `module` computes the nonlinearity, `gate` and `up` are projections beside it."""
    found: dict[str, Place] = {}
    for name, place in places.items():
        if not name.endswith("mlp"):
            found[name] = place
            continue
        beside = place.module.rpartition(".")[0]
        reads = {"gate": f"{beside}.{gate}", "up": f"{beside}.{up}"}
        found[name.replace("mlp", "gate")] = replace(place, module=f"{beside}.{module}", reads={"gate": reads["gate"]})
        found[name] = replace(place, reads=reads)
    return found


BERT = Architecture(
    "bert",
    bert,
    _texts("input_ids", "attention_mask", "position_ids"),
    _single("encoder.layer.{}", "attention.output.dense", "output.dense", "gelu", "intermediate.dense"),
    {"": "encoder.layer.{}"},
    ("attention.output.LayerNorm", "output.LayerNorm"),
)
ROBERTA = replace(
    BERT,
    name="roberta",
    new=lambda: RobertaModel(RobertaConfig(**_ENCODER)),
    read=_texts("input_ids", "attention_mask"),
)
GPT2 = Architecture(
    "gpt2",
    lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCABULARY),
            n_embd=WIDTH,
            n_inner=NEURONS,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=32,
            bos_token_id=2,
            eos_token_id=3,
        )
    ),
    _texts("input_ids", "attention_mask", "position_ids"),
    _single("transformer.h.{}", "attn.c_proj", "mlp.c_proj", "gelu_new", "mlp.c_fc"),
    {"": "transformer.h.{}"},
)
LLAMA = Architecture(
    "llama",
    lambda: LlamaForCausalLM(LlamaConfig(**dict(_ENCODER, num_key_value_heads=HEADS // 2, head_dim=6))),
    _texts("input_ids", "attention_mask", "position_ids"),
    _gated(
        _single("model.layers.{}", "self_attn.o_proj", "mlp.down_proj", "silu", attention_size=6 * HEADS),
        "act_fn",
        "gate_proj",
        "up_proj",
    ),
    {"": "model.layers.{}"},
)
OPT = Architecture(
    "opt",
    lambda: opt(before=True),
    _texts("input_ids", "attention_mask"),
    _single("decoder.layers.{}", "self_attn.out_proj", "fc2", "relu", "fc1"),
    {"": "decoder.layers.{}"},
)
OPT_POST = replace(
    OPT,
    name="opt-norms-after",
    new=lambda: opt(before=False),
    norms=("self_attn_layer_norm", "final_layer_norm"),
)
T5 = Architecture(
    "t5",
    lambda: t5("relu"),
    _two_texts,
    {
        "encoder.attn": Place("encoder.block.{}.layer.0.SelfAttention.o", 3 * HEADS, heads=HEADS),
        "encoder.mlp": Place(
            "encoder.block.{}.layer.1.DenseReluDense.wo",
            NEURONS,
            "relu",
            {"in": "encoder.block.{}.layer.1.DenseReluDense.wi"},
        ),
        "decoder.attn": Place("decoder.block.{}.layer.0.SelfAttention.o", 3 * HEADS, heads=HEADS),
        "decoder.cross_attn": Place("decoder.block.{}.layer.1.EncDecAttention.o", 3 * HEADS, heads=HEADS),
        "decoder.mlp": Place(
            "decoder.block.{}.layer.2.DenseReluDense.wo",
            NEURONS,
            "relu",
            {"in": "decoder.block.{}.layer.2.DenseReluDense.wi"},
        ),
    },
    {"encoder.": "encoder.block.{}", "decoder.": "decoder.block.{}"},
)
T5_GATED = replace(
    T5,
    name="t5-gated",
    new=lambda: t5("gated-gelu"),
    places={
        name: replace(place, activation=place.activation and "gelu_new")
        for name, place in _gated(dict(T5.places), "act", "wi_0", "wi_1").items()
    },
)
VIT = Architecture(
    "vit",
    lambda: ViTModel(
        ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=8,
            patch_size=4,
        )
    ),
    _numbers("pixel_values", 3, 3, 8, 8),
    _single("layers.{}", "attention.o_proj", "mlp.fc2", "gelu", "mlp.fc1"),
    {"": "layers.{}"},
)
SEQUENTIAL = Architecture(
    "nn.Sequential",
    lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.GELU("tanh"), nn.Linear(8, 3)),
    _numbers("input", 5, 6),
    {"mlp.0": Place("2", 10, "relu", {"in": "0"}), "mlp.1": Place("4", 8, "gelu_new", {"in": "2"})},
)
CLASSIFIER = Architecture(
    "own-class",
    Classifier,
    _numbers("x", 5, 7, 6),
    {"mlp.0": Place("second", 10, None, {"in": "first"}), "mlp.1": Place("last", 8, None, {"in": "second"})},
)

_GROUPED: dict[str, Any] = dict(_ENCODER, num_key_value_heads=HEADS // 2, head_dim=6)
_EAGER: dict[str, Any] = {"attn_implementation": "eager"}
_OF_MIXERS: dict[str, Any] = {"intermediate_size": NEURONS}
_DECODER = _texts("input_ids", "attention_mask", "position_ids")


def _like_llama(name: str, new: Callable[[], nn.Module], **changes: Any) -> Architecture:
    return replace(LLAMA, name=name, new=new, **changes)


QWEN3 = _like_llama("qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED)))
MISTRAL = _like_llama("mistral", lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=16)))
GEMMA2 = _like_llama(
    "gemma2",
    lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED, query_pre_attn_scalar=6, **_EAGER)),
    places={name: replace(each, activation=each.activation and "gelu_new") for name, each in LLAMA.places.items()},
    norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    left_in_float64=False,
)
NEOX = Architecture(
    "gpt-neox",
    lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_ENCODER)),
    _DECODER,
    _single("gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h", "gelu", "mlp.dense_h_to_4h"),
    {"": "gpt_neox.layers.{}"},
    middle=False,
)
PHI = Architecture(
    "phi",
    lambda: PhiForCausalLM(PhiConfig(**_ENCODER)),
    _DECODER,
    _single("model.layers.{}", "self_attn.dense", "mlp.fc2", "gelu_new", "mlp.fc1"),
    {"": "model.layers.{}"},
    middle=False,
)
BLOOM = Architecture(
    "bloom",
    lambda: BloomForCausalLM(
        BloomConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
    ),
    _texts("input_ids", "attention_mask"),
    {
        name: replace(place, size=4 * WIDTH) if name == "mlp" else place
        for name, place in _single(
            "transformer.h.{}", "self_attention.dense", "mlp.dense_4h_to_h", "gelu_new", "mlp.dense_h_to_4h"
        ).items()
    },
    {"": "transformer.h.{}"},
    left_in_float64=False,
)
MAMBA = Architecture(
    "mamba",
    lambda: MambaForCausalLM(
        MambaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            **_OF_MIXERS,
            state_size=4,
            num_hidden_layers=LAYERS,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
        )
    ),
    _texts("input_ids", "attention_mask"),
    {"mixer": Place("backbone.layers.{}.mixer.out_proj", NEURONS)},
    {"": "backbone.layers.{}"},
    middle=False,
)


def _text_and_images(side: str) -> dict[str, Any]:
    made = padded(side=side)
    images = torch.randn(len(TEXTS), 3, 8, 8, generator=torch.Generator().manual_seed(len(side)))
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"], "pixel_values": images}


_TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
CLIP = Architecture(
    "clip",
    lambda: CLIPModel(
        CLIPConfig(
            text_config=dict(_ENCODER),
            vision_config=dict(_TOWER, image_size=8, patch_size=4),
            projection_dim=8,
        )
    ),
    _text_and_images,
    {
        f"{tower}.{name}": place
        for tower in ("text", "vision")
        for name, place in _single(
            f"{tower}_model.encoder.layers.{{}}", "self_attn.out_proj", "mlp.fc2", "quick_gelu", "mlp.fc1"
        ).items()
    },
    {f"{tower}.": f"{tower}_model.encoder.layers.{{}}" for tower in ("text", "vision")},
)


def mixtral(**options: Any) -> nn.Module:
    """Mixtral, all of whose MLPs are four fused experts of which two are chosen."""
    return MixtralForCausalLM(MixtralConfig(**dict(_GROUPED, num_local_experts=4, num_experts_per_tok=2) | options))


def qwen2_moe(**options: Any) -> nn.Module:
    """Qwen2-MoE: four fused experts beside one that sees every token."""
    of_experts = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**dict(_GROUPED, num_experts=4, num_experts_per_tok=2, **of_experts) | options)
    )


def deepseek(**options: Any) -> nn.Module:
    """DeepSeek-V3: the first layer is dense, the others have experts and a shared one; latent attention."""
    latent: dict[str, Any] = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 6,
    }
    routed = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 2}
    more = dict(_ENCODER, num_key_value_heads=HEADS, first_k_dense_replace=1, topk_group=1)
    config: dict[str, Any] = more | latent | routed | options
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config))


TRANSFORMERS = [BERT, GPT2, LLAMA, OPT, OPT_POST, T5, T5_GATED, VIT]
TRANSFORMERS += [QWEN3, MISTRAL, GEMMA2, NEOX, PHI, BLOOM, MAMBA, CLIP]
ALL = [*TRANSFORMERS, SEQUENTIAL, CLASSIFIER]
