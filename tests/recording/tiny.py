"""Tiny networks with random weights, a tokenizer of words, and what each text does when it is run alone.

`alone` is the reference that recordings are compared with: it pads nothing, batches nothing, and reads the
network with a hook of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from patchclamp.model import Model
from patchclamp.recording import Recording, record

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_WORDS = (
    "the a of to in is not if else return returns returned raise raises error errors value values list lists "
    "item items key keys file files open opens read reads write loop call calls name path , . ; ( )"
)
WORDS = tuple(_WORDS.split())
VOCABULARY = len(SPECIAL) + len(WORDS)
WIDTH, HIDDEN, LAYERS = 16, 24, 2


def tokenizer(
    template: str = "[CLS] $A [SEP]", pad: bool = True, side: str = "right", max_length: int = 64
) -> PreTrainedTokenizerFast:
    """One token a word; `template` says which special tokens are added."""
    made = Tokenizer(WordLevel({word: place for place, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    if template != "$A":
        special: list[tuple[str | int, int | str]] = [(each, SPECIAL.index(each)) for each in ("[CLS]", "[SEP]")]
        made.post_processor = TemplateProcessing(single=template, special_tokens=special)
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | ({"pad_token": "[PAD]"} if pad else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        padding_side=side,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **names,
    )


def texts(number: int = 17, longest: int = 14, seed: int = 0) -> list[str]:
    """Random texts of 1 to `longest` words."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, longest + 1))) for _ in range(number)]


def seeded(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """The module in evaluation mode with weights drawn anew, large enough for its nonlinearities to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def bert(**options: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    usual: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return seeded(BertModel(BertConfig(**(usual | options))))


def albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    return seeded(
        AlbertModel(
            AlbertConfig(
                vocab_size=VOCABULARY,
                embedding_size=WIDTH,
                hidden_size=WIDTH,
                intermediate_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=64)
    return seeded(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return seeded(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
            )
        )
    )


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return seeded(
        OPTForCausalLM(
            OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                ffn_dim=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=WIDTH,
            )
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=3,
    )
    config.decoder_start_token_id = 0
    return seeded(T5ForConditionalGeneration(config))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return seeded(
        ViTModel(
            ViTConfig(
                hidden_size=WIDTH,
                intermediate_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            )
        )
    )


class Words(nn.Module):
    """No sequence, only words: an embedding, neurons, and what they write."""

    def __init__(self, neurons: int = HIDDEN) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.last = nn.Linear(WIDTH, neurons), nn.Linear(neurons, 2)
        seeded(self)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(self.table(input_ids))))


def mlp() -> nn.Module:
    return seeded(
        nn.Sequential(nn.Linear(5, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 3))
    )


@dataclass(frozen=True)
class Case:
    """An architecture: how to build it, the tokenizer's template, and site -> (module, is it its input?)."""

    build: Callable[[], nn.Module]
    template: str
    sites: dict[str, tuple[str, bool]]


def _layers(name: str, module: str, is_input: bool = True) -> dict[str, tuple[str, bool]]:
    return {name.format(layer): (module.format(layer), is_input) for layer in range(LAYERS)}


CASES = {
    "bert": Case(bert, "[CLS] $A [SEP]", _layers("mlp.{}", "encoder.layer.{}.output.dense")),
    "gpt2": Case(gpt2, "$A", _layers("mlp.{}", "transformer.h.{}.mlp.c_proj")),
    "llama": Case(
        llama,
        "[CLS] $A",
        _layers("mlp.{}", "model.layers.{}.mlp.down_proj") | _layers("gate.{}", "model.layers.{}.mlp.act_fn", False),
    ),
    "opt": Case(opt, "[SEP] $A", _layers("mlp.{}", "model.decoder.layers.{}.fc2")),
    "t5": Case(
        t5,
        "$A [SEP]",
        _layers("encoder.mlp.{}", "encoder.block.{}.layer.1.DenseReluDense.wo")
        | _layers("decoder.mlp.{}", "decoder.block.{}.layer.2.DenseReluDense.wo"),
    ),
}


@dataclass(frozen=True)
class Rows:
    """What one site does on every position that counts. Arrays [rows, size] and [rows]."""

    values: np.ndarray
    example: np.ndarray
    position: np.ndarray
    token: np.ndarray

    def at(self, example: int, position: int) -> np.ndarray:
        (place,) = np.flatnonzero((self.example == example) & (self.position == position))
        return self.values[place]


def alone(
    module: nn.Module,
    sites: dict[str, tuple[str, bool]],
    words: Any,
    given: Sequence[str],
    targets: Sequence[str] | None = None,
    special: bool = False,
) -> dict[str, Rows]:
    """Run each text by itself, unpadded. `special` counts the tokens that the tokenizer adds too."""
    config: Any = module.config
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {site: [] for site in sites}
    for example, text in enumerate(given):
        ids, added = _encoded(words, text)
        inputs = {"input_ids": torch.tensor([ids])}
        reads = {"": (ids, [flag and not special for flag in added])}
        if config.is_encoder_decoder:
            to_write, added = (ids, added) if targets is None else _encoded(words, targets[example])
            shifted = [config.decoder_start_token_id, *to_write[:-1]]
            inputs["decoder_input_ids"] = torch.tensor([shifted])
            reads["decoder"] = (shifted, [flag and not special for flag in [True, *added[:-1]]])
        for site, values in captured(module, sites, inputs).items():
            tokens, skipped = reads["decoder" if site.startswith("decoder") else ""]
            position = np.flatnonzero(~np.asarray(skipped, bool))
            values = values.reshape(-1, values.shape[-1])
            assert len(values) == len(tokens)
            parts[site].append(
                (values[position], np.full(len(position), example), position, np.asarray(tokens)[position])
            )
    return {site: Rows(*(np.concatenate(each) for each in zip(*found, strict=True))) for site, found in parts.items()}


def captured(module: nn.Module, sites: dict[str, tuple[str, bool]], inputs: Any) -> dict[str, np.ndarray]:
    """One forward pass, read with hooks made here: site -> its tensor."""
    found: dict[str, np.ndarray] = {}

    def keep(site: str) -> Callable[..., None]:
        def hook(_module: nn.Module, *given: Any) -> None:
            tensor = given[-1] if isinstance(given[-1], torch.Tensor) else given[0][0]
            found[site] = tensor.detach().numpy().copy()

        return hook

    handles = []
    for site, (path, is_input) in sites.items():
        part = module.get_submodule(path)
        handles.append(
            part.register_forward_pre_hook(keep(site)) if is_input else part.register_forward_hook(keep(site))
        )
    try:
        with torch.no_grad():
            module(**inputs) if isinstance(inputs, dict) else module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _encoded(words: Any, text: str) -> tuple[list[int], list[bool]]:
    read = words(text, return_special_tokens_mask=True)
    return list(read["input_ids"]), [bool(flag) for flag in read["special_tokens_mask"]]


def recorded(model: Model, data: Any, sites: Any = "mlp.*", summaries: Any = None, **options: Any) -> Recording:
    """A quiet recording in several batches."""
    return record(model, data, sites, summaries, **({"batch_tokens": 40, "progress": False} | options))


def weight(model: Model, path: str) -> torch.Tensor:
    """A weight of a model, to be changed in place."""
    return dict(model.module.named_parameters())[path].data


def state_of(module: nn.Module) -> list[tuple[int, int, bool]]:
    """Hooks and modes of every part."""
    return [(len(each._forward_hooks), len(each._forward_pre_hooks), each.training) for each in module.modules()]
