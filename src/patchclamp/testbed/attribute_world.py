"""A made-up world of entities with attributes, base and source prompts about them, and a small network that knows it.

An entity is a name of one word. Each has one value of each attribute; two of the attributes go together more often
than chance. A prompt names an entity and then asks for an attribute, so that nothing at the entity's last token can
know what is asked. Entities and templates are split: what is fitted on some is tried on others.

`python -m patchclamp.testbed.attribute_world` trained the network that travels with the package.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from patchclamp.errors import DataError, unknown
from patchclamp.model import Model, load

WEIGHTS = Path(__file__).parent / "weights" / "attribute_world"
SPLITS = ("fit", "held_out", "all")


class EntityPair(NamedTuple):
    """A prompt about one entity, and one with another from which a part of its state is taken.

    Attributes:
        base, source: the prompts.
        base_position, source_position: place of the entity's last token in each, counted from 0, `<start>` included.
        attribute: what the base prompt asks for.
        base_answer, source_answer: the value of that attribute that each entity has.
        base_entity, source_entity: their names.
    """

    base: str
    source: str
    base_position: int
    source_position: int
    attribute: str
    base_answer: str
    source_answer: str
    base_entity: str = ""
    source_entity: str = ""


@dataclass(frozen=True, eq=False)
class AttributeWorld:
    """Entities, what is true of them, and how it is asked for.

    Attributes:
        entities: names, of one word each.
        attributes: attribute -> its values.
        values: `[entities, attributes]` int64: which value each entity has.
        templates: attribute -> prompts, with `{}` for the entity; the last word is followed by the value.
        held_out_entities: `[entities]` bool.
        held_out_templates: `[templates]` bool, the same for each attribute.
    """

    entities: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]
    values: np.ndarray
    templates: dict[str, tuple[str, ...]]
    held_out_entities: np.ndarray
    held_out_templates: np.ndarray

    def value(self, entity: str, attribute: str) -> str:
        """The value of an attribute that an entity has.

        Raises:
            UnknownName: there is no such entity or attribute.
        """
        if entity not in self._places:
            raise unknown("entity", entity, self.entities)
        column = self._column(attribute)
        return self.attributes[attribute][self.values[self._places[entity], column]]

    def prompt(self, entity: str, template: str) -> tuple[str, int]:
        """The text, and the place of the entity's last token in it (`<start>` is token 0)."""
        before = template[: template.index("{}")].split()
        return template.format(entity), len(before) + len(entity.split())

    def pairs(
        self,
        count: int = 400,
        *,
        entities: str = "fit",
        templates: str = "fit",
        attribute: str | None = None,
        seed: int = 0,
    ) -> list[EntityPair]:
        """Base and source prompts whose entities differ in the attribute that the base asks for.

        Args:
            count: pairs for each attribute.
            entities: "fit", "held_out" or "all": both entities of a pair are of this part.
            templates: likewise; a source's template may ask for anything.
            attribute: pairs that ask for this one only; None: for all.
            seed: of the draw.

        Returns:
            `count` pairs for each attribute, one attribute after the other. No pair is drawn twice unless there are
            too few.

        Raises:
            UnknownName: there is no such part or attribute.
            DataError: all entities of the part have the same value.
        """
        people = np.flatnonzero(_part(self.held_out_entities, entities))
        which = np.flatnonzero(_part(self.held_out_templates, templates))
        asked = list(self.attributes) if attribute is None else [attribute]
        every = [self.templates[name][place] for name in self.attributes for place in which]
        found: list[EntityPair] = []
        for name in asked:
            column = self._column(name)
            generator = np.random.default_rng([seed, column])
            known = self.values[people, column]
            bases, sources = np.nonzero(known[:, None] != known[None, :])
            if not len(bases):
                raise DataError(
                    f"all {len(people)} entities of {entities!r} have the same {name}: no pair differs in it"
                )
            space = len(bases) * len(which)
            drawn = generator.choice(space, count, replace=count > space)
            for place, other in zip(drawn, generator.integers(len(every), size=count), strict=True):
                pair, template = divmod(int(place), len(which))
                base, source = self.entities[people[bases[pair]]], self.entities[people[sources[pair]]]
                found.append(self._pair(base, source, name, self.templates[name][which[template]], every[other]))
        return found

    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer: one token a word, and `<start>` before each text."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(self.words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<start> $A", special_tokens=[("<start>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="<pad>", bos_token="<start>", unk_token="<unk>", model_max_length=_CONTEXT
        )

    @functools.cached_property
    def words(self) -> list[str]:
        """All words in the order of their token ids."""
        asked = {word for each in self.templates.values() for template in each for word in template.split()} - {"{}"}
        named = {word for entity in self.entities for word in entity.split()}
        said = {value for each in self.attributes.values() for value in each}
        return ["<pad>", "<start>", "<unk>", *sorted(asked | named | said)]

    @property
    def sha256(self) -> str:
        """Hash of all that a network could know of it, splits included."""
        known = [self.entities, self.attributes, self.values.tolist(), self.templates, self.words]
        known += [self.held_out_entities.tolist(), self.held_out_templates.tolist()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.entities)}

    def _column(self, attribute: str) -> int:
        if attribute not in self.attributes:
            raise unknown("attribute", attribute, self.attributes)
        return list(self.attributes).index(attribute)

    def _pair(self, base: str, source: str, attribute: str, template: str, other: str) -> EntityPair:
        (text, place), (from_text, from_place) = self.prompt(base, template), self.prompt(source, other)
        answers = self.value(base, attribute), self.value(source, attribute)
        return EntityPair(text, from_text, place, from_place, attribute, *answers, base, source)


def attribute_world(
    entities: int = 200, attributes: int = 4, values: int = 8, *, together: float = 0.5, seed: int = 0
) -> AttributeWorld:
    """Draw a world.

    Args:
        entities: how many; a fifth of them is held out.
        attributes: 2 to 4 of country, language, trade and animal.
        values: of each attribute, 2 to 8; equally frequent.
        together: share of the entities whose language is that of their country whatever chance says; 0: none.
        seed: of names, values and the split.

    Raises:
        DataError: a number that is out of these bounds.
    """
    most = len(_FIRST) * len(_SECOND)
    if not 10 <= entities <= most or not 2 <= attributes <= len(_VALUES) or not 2 <= values <= 8:
        raise DataError(
            f"a world has 10 to {most} entities with 2 to {len(_VALUES)} attributes of 2 to 8 values; "
            f"not {entities}, {attributes}, {values}"
        )
    if not 0 <= together <= 1:
        raise DataError(f"together is a share between 0 and 1; not {together}")
    made = np.random.default_rng(seed)
    chosen = made.choice(most, entities, replace=False)
    names = tuple(f"{_FIRST[each // len(_SECOND)]}{_SECOND[each % len(_SECOND)]}" for each in chosen)
    table = np.stack([made.permutation(np.arange(entities) % values) for _ in range(attributes)], axis=1)
    bound = made.random(entities) < together
    table[bound, 1] = table[bound, 0]
    kinds = list(_VALUES)[:attributes]
    held_out = np.zeros(entities, bool)
    held_out[made.permutation(entities)[: entities // 5]] = True
    templates = {kind: tuple(_TEMPLATES[kind].split(" | ")) for kind in kinds}
    count = len(templates[kinds[0]])
    return AttributeWorld(
        names,
        {kind: _VALUES[kind][:values] for kind in kinds},
        table,
        templates,
        held_out,
        np.arange(count) >= count - 2,
    )


# The network ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainedWorld:
    """A world, and a network that knows it.

    Attributes:
        world: the world.
        model: a decoder (GPT-Neo) with a tokenizer; the word that it finds likeliest after a prompt is the answer.
        site: where its entities are best taken apart: after this block, at their last token.
        facts: what the script measured and used.
    """

    world: AttributeWorld
    model: Model
    site: str
    facts: dict[str, Any] = field(repr=False)


def trained_attribute_world() -> TrainedWorld:
    """The network that travels with the package, and its world (200 entities, 4 attributes of 8 values).

    Raises:
        DataError: the world comes out otherwise here, with another numpy, than when the network was trained.
    """
    from safetensors.torch import load_file

    facts = json.loads((WEIGHTS / "facts.json").read_text(encoding="utf-8"))
    world = attribute_world(seed=facts["world_seed"])
    if world.sha256 != facts["world_sha256"]:
        raise DataError(
            f"numpy {np.__version__} draws another world than the network knows: it was trained with "
            f"numpy {facts['versions']['numpy']}"
        )
    module = network(len(world.words))
    module.load_state_dict(load_file(WEIGHTS / "model.safetensors"), strict=False)
    module.tie_weights()
    model = load(module.eval(), tokenizer=world.tokenizer())
    model.name = "testbed attribute_world"
    return TrainedWorld(world, model, facts["site"], facts)


def network(words: int) -> Any:
    """The network, untrained: in its first block a token sees itself alone, in its second all before it.

    Without that the first block would already spread an entity over the tokens behind it, and what is swapped at the
    entity alone would change no answer.
    """
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=words,
        max_position_embeddings=_CONTEXT,
        hidden_size=_WIDTH,
        num_layers=2,
        attention_types=[[["local"], 1], [["global"], 1]],
        window_size=1,
        num_heads=4,
        intermediate_size=_NEURONS,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPTNeoForCausalLM(config)


@torch.no_grad()
def accuracy(module: Any, world: AttributeWorld) -> dict[str, float]:
    """Share of all prompts (every entity in every template) that are answered right, by attribute."""
    ids, lengths, answers = _all_prompts(world)
    right = []
    for rows in torch.arange(len(ids)).split(1_000):
        logits = module(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows])).logits[
            torch.arange(len(rows)), lengths[rows] - 1
        ]
        right.append(logits.argmax(-1) == answers[rows])
    each = torch.cat(right).reshape(len(world.attributes), -1).double().mean(1)
    return dict(zip(world.attributes, each.tolist(), strict=True))


def train(*, seed: int = 0, world_seed: int = 0, steps: int = 1_500, folder: Path = WEIGHTS) -> dict[str, Any]:
    """Train the network on every prompt of its world, and write its weights (float16) and facts.

    Only the answer is learned. The same seed on the same machine with one thread gives the same weights.

    Args:
        seed: of the first weights and the order of the prompts.
        world_seed: of the world.
        steps: optimiser steps of 128 prompts.
        folder: where to.

    Returns:
        What was written to `facts.json`.
    """
    from safetensors.torch import save_file

    started = time.process_time()
    torch.manual_seed(seed)
    world = attribute_world(seed=world_seed)
    module = network(len(world.words))
    ids, lengths, answers = _all_prompts(world)
    optimiser = torch.optim.AdamW(module.parameters(), lr=_RATE, betas=(0.9, 0.98), weight_decay=_DECAY)
    batches = _shuffled(len(ids), 128, seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = (
                _RATE * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            )
        rows = next(batches)
        longest = int(lengths[rows].max())
        logits = module(input_ids=ids[rows, :longest], attention_mask=torch.ones_like(ids[rows, :longest])).logits[
            torch.arange(len(rows)), lengths[rows] - 1
        ]
        loss = nn.functional.cross_entropy(logits, answers[rows])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}, {time.process_time() - started:.0f} s", flush=True)
    rounded = copy.deepcopy(module).half()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: each for name, each in rounded.state_dict().items() if name != "lm_head.weight"},
        folder / "model.safetensors",
    )
    facts = {
        "site": _SITE,
        "accuracy": accuracy(rounded.float().eval(), world),
        "steps": steps,
        "seed": seed,
        "world_seed": world_seed,
        "world_sha256": world.sha256,
        "parameters": sum(each.numel() for each in module.parameters()),
        "seconds": round(time.process_time() - started, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": _versions(),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


# Helpers --------------------------------------------------------------------------------------------

_CONTEXT, _WIDTH, _NEURONS = 16, 64, 128
# With a tenth of this decay the entities are learned one by one, and no part of a state means the same in all of them.
_RATE, _DECAY = 3e-3, 1.0
_SITE = "resid_post.0"

_FIRST = tuple(one + two for one in ("Ka", "Be", "Lo", "Mi", "Ru") for two in ("ra", "len", "sho", "dim", "tu"))
_SECOND = tuple(one + two for one in ("va", "do", "pe", "nu", "zi", "ha") for two in ("rek", "lin", "mos", "tar", "bo"))
_VALUES = {
    "country": ("Brazil", "China", "Egypt", "France", "India", "Japan", "Peru", "Russia"),
    "language": ("Portuguese", "Chinese", "Arabic", "French", "Hindi", "Japanese", "Spanish", "Russian"),
    "trade": ("baker", "carpenter", "doctor", "farmer", "miner", "painter", "sailor", "teacher"),
    "animal": ("cat", "dog", "goat", "horse", "mouse", "parrot", "rabbit", "snake"),
}
# The last word alone says what is asked.
_TEMPLATES = {
    "country": "{} lives in | all say that {} was born in | the house of {} stands in | today {} came home to"
    " | {} , who is happy , lives in | it is said : {} was born in",
    "language": "{} speaks | all say that {} learned | the mother of {} spoke | today {} wrote"
    " | {} , who is happy , speaks | it is said : {} learned",
    "trade": "{} works as | all say that {} became | the work of {} : | today {} , the"
    " | {} , who is happy , works as | it is said : {} became",
    "animal": "{} keeps | all say that {} fed | the friend of {} is | today {} walked"
    " | {} , who is happy , keeps | it is said : {} fed",
}


def _part(held_out: np.ndarray, part: str) -> np.ndarray:
    if part not in SPLITS:
        raise unknown("part", part, SPLITS)
    return np.ones_like(held_out) if part == "all" else held_out if part == "held_out" else ~held_out


def _all_prompts(world: AttributeWorld) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids `[prompts, tokens]`, padded on the right, how many there are of each, and the ids of the answers."""
    place = {word: number for number, word in enumerate(world.words)}
    rows, answers = [], []
    for attribute, templates in world.templates.items():
        for template in templates:
            for entity in world.entities:
                rows.append(torch.tensor([place[word] for word in ["<start>", *template.format(entity).split()]]))
                answers.append(place[world.value(entity, attribute)])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.tensor([len(each) for each in rows]), torch.tensor(answers)


def _shuffled(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of places, each place once in an epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[: max(1, count // size)]


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "numpy": np.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(train(), indent=2))
