"""A decoder of four languages is to speak one of them no more: components of its unembedding, damped.

The words that only one language has are the bad tokens, each language in turn. How many components and which factor
is chosen on some documents, and tried on others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

import patchclamp as pc
from patchclamp.decompose.output_svd import OutputDecomposition, head_matrix, head_states, output_svd
from patchclamp.edit.spectral import damp_components
from patchclamp.testbed import languages
from patchclamp.testbed.trained import trained

DOCUMENTS, RANDOM_SETS, NEAREST = 120, 12, 6
COUNTS, FACTORS = range(1, 7), (0.75, 0.5, 0.25, 0.0)
MOST_COST, LEAST_FALL = 0.05, 0.5


def measure(seed: int = 0) -> dict[str, object]:
    """For each language: components chosen on documents, and what damping them does on others."""
    model = trained("four_languages").model
    chosen_on, held_out = languages.documents(DOCUMENTS, seed=2), languages.documents(DOCUMENTS, seed=3)
    found = output_svd(model)
    first, second = (Steps.of(model, data, found) for data in (chosen_on, held_out))
    vocabulary = model.tokenizer.get_vocab()
    rows = []
    for language in languages.NAMES:
        words = [vocabulary[word] for word in languages.vocabulary(language) if languages.owners(word) == (language,)]
        for way in ("standardised", "signed"):
            components, factor = first.choose(found, words, language, standardised=way == "standardised")
            after = Steps.of(damp_components(model, components, factor, decomposition=found), held_out, found)
            fall = 1 - after.rate(words) / second.rate(words)
            own, others = (
                (second.perplexity(language, each), after.perplexity(language, each)) for each in (True, False)
            )
            chance = second.chance(found, words, language, components, factor, seed)
            rows.append(
                {
                    "language": language,
                    "way": way,
                    "components": components.tolist(),
                    "factor": factor,
                    "rate_before": second.rate(words),
                    "rate_after": after.rate(words),
                    "fall": fall,
                    "perplexity_others": others[0],
                    "perplexity_others_after": others[1],
                    "cost_others": others[1] / others[0] - 1,
                    "perplexity_own": own[0],
                    "perplexity_own_after": own[1],
                    "fall_random": float(np.mean([each for each, _ in chance])),
                    "fall_random_largest": max(each for each, _ in chance),
                    "cost_random": float(np.mean([paid for _, paid in chance])),
                    "reproduces": fall > LEAST_FALL and others[1] / others[0] - 1 < MOST_COST,
                }
            )
    return {
        "rows": rows,
        "documents": DOCUMENTS,
        "steps": len(first.emitted),
        "components": len(found),
        "random_sets": RANDOM_SETS,
        "reproduced": sum(bool(row["reproduces"]) for row in rows if row["way"] == "standardised"),
        "reproduced_signed": sum(bool(row["reproduces"]) for row in rows if row["way"] == "signed"),
        "languages": len(languages.NAMES),
        "most_cost": MOST_COST,
        "least_fall": LEAST_FALL,
    }


@dataclass(frozen=True, eq=False)
class Steps:
    """What enters the unembedding at each step, and what came next.

    Attributes:
        states: `[steps, d]`.
        coordinates: `[steps, components]`.
        logits: `[steps, vocabulary]`, as they are.
        said: `[vocabulary, components]`, what one unit of each coordinate adds to the logits.
        emitted: `[steps]`, the most likely token.
        following: `[steps]`, the token that came next; -1 at the end of a document.
        losses: `[steps]`, of that token as the model is, in nats; 0 at the end of a document.
        languages: `[steps]`, of the document.
    """

    states: np.ndarray
    coordinates: torch.Tensor
    logits: torch.Tensor
    said: torch.Tensor
    emitted: np.ndarray
    following: torch.Tensor
    losses: torch.Tensor
    languages: np.ndarray

    @classmethod
    def of(cls, model: pc.Model, data: pc.Texts, found: OutputDecomposition) -> Steps:
        """Those of documents."""
        seen = head_states(model, data)
        ids = [each.ids for each in model.reader.encode([each.text for each in data])]  # type: ignore[union-attr]
        following = torch.tensor([token for each in ids for token in (*each[1:], -1)])
        said = torch.from_numpy(found.left(range(len(found))) * found.singular_values)
        by_document = np.asarray([each.labels["language"] for each in data])
        logits = torch.from_numpy(seen.states) @ head_matrix(model).T
        losses = functional.cross_entropy(logits, following, ignore_index=-1, reduction="none")
        return cls(
            seen.states,
            torch.from_numpy(found.coordinates(seen.states)).float(),
            logits,
            said.float(),
            seen.emitted,
            following,
            losses,
            by_document[seen.texts],
        )

    def rate(self, words: list[int]) -> float:
        """The share of steps that emit one of these tokens."""
        return float(np.isin(self.emitted, words).mean())

    def perplexity(self, language: str, own: bool) -> float:
        """Of the documents of a language, or of all others."""
        counted = (self.following >= 0) & torch.from_numpy((self.languages == language) == own)
        return float(torch.exp(self.losses[counted].mean()))

    def damped(self, components: np.ndarray, factor: float, words: list[int], language: str) -> tuple[float, float]:
        """The rate with damped components, and by what share the perplexity of the other languages rises."""
        logits = self.logits + (factor - 1) * self.coordinates[:, components] @ self.said[:, components].T
        clean = (self.following >= 0) & torch.from_numpy(self.languages != language)
        loss = functional.cross_entropy(logits[clean], self.following[clean], reduction="none")
        rate = float(np.isin(logits.argmax(-1).numpy(), words).mean())
        return rate, float(torch.exp((loss - self.losses[clean]).mean()) - 1)

    def choose(
        self, found: OutputDecomposition, words: list[int], language: str, standardised: bool
    ) -> tuple[np.ndarray, float]:
        """Components and factor with the lowest rate of all that cost little enough; of equals the fewest."""
        bad = np.isin(self.emitted, words)
        order = found.select(self.states[bad], self.states[~bad], max(COUNTS), standardised=standardised)
        tried = {
            (count, factor): self.damped(order[:count], factor, words, language)
            for count in COUNTS
            for factor in FACTORS
        }
        able = [each for each, (_, cost) in tried.items() if cost < MOST_COST] or [(1, max(FACTORS))]
        count, factor = min(able, key=lambda each: (tried[each][0], each[0], -each[1]))
        return order[:count], factor

    def chance(
        self,
        found: OutputDecomposition,
        words: list[int],
        language: str,
        components: np.ndarray,
        factor: float,
        seed: int,
    ) -> list[tuple[float, float]]:
        """Falls and costs of random sets of other components with singular values like those."""
        generator = np.random.default_rng(seed)
        before, results = self.rate(words), []
        for _ in range(RANDOM_SETS):
            taken: list[int] = []
            for each in components:
                away = np.abs(found.singular_values - found.singular_values[each])
                free = [one for one in np.argsort(away) if one not in components and one not in taken]
                taken.append(int(generator.choice(free[:NEAREST])))
            rate, cost = self.damped(np.asarray(taken), factor, words, language)
            results.append((1 - rate / before, cost))
        return results
