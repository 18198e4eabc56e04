"""A pass ends with the last site that is recorded, unless somebody would miss the rest of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.recording import tiny
from tests.recording.tiny import recorded, state_of
from torch import nn

import patchclamp as pc


class Counting(nn.Module):
    """The identity, which counts its calls; no hook, as hooks are somebody's who looks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any tensor."""
        self.calls += 1
        return x


def counting(site: str = "mlp.0") -> tuple[pc.Model, Counting]:
    """A model whose last layer's norm is followed by a counter."""
    module = tiny.bert()
    last = module.get_submodule("encoder.layer.1.output")
    counter = Counting()
    last.LayerNorm = nn.Sequential(last.LayerNorm, counter)  # type: ignore[assignment]
    return pc.load(module.eval(), tokenizer=tiny.tokenizer()), counter


@pytest.mark.parametrize(("site", "calls"), [("mlp.*", 1), ("mlp.0", 1), ("resid_post.1", 5)])
def test_what_comes_after_the_last_site_is_computed_once(site: str, calls: int) -> None:
    model, counter = counting()
    assert model.sites
    counter.calls = 0
    texts = [" ".join(tiny.WORDS[:5])] * 8
    stopped = recorded(model, texts, site, [pc.Moments(), pc.Histogram()], batch_tokens=14)
    assert counter.calls == calls  # of 4 passes and that of one example
    assert recorded(model, texts[:3], site, [pc.Moments()]) is not None and counter.calls == calls + 1
    whole = recorded(model, texts, [site, "resid_post.1"], [pc.Moments(), pc.Histogram()], batch_tokens=14)
    for name in stopped:
        assert stopped[name].moments.mean.tobytes() == whole[name].moments.mean.tobytes()


def test_hooks_of_others_see_every_pass_to_its_end() -> None:
    model, counter = counting()
    assert model.sites
    seen: list[int] = []
    handle = counter.register_forward_hook(lambda *_: seen.append(1))
    recorded(model, [" ".join(tiny.WORDS[:5])] * 8, "mlp.0", [pc.Moments()], batch_tokens=14)
    handle.remove()
    assert len(seen) == 4


def test_nothing_is_left_behind_by_a_pass_that_ended_early() -> None:
    model, _ = counting()
    model.module.train()
    assert model.sites
    before = state_of(model.module)
    with pytest.warns(UserWarning, match="training mode"):
        recorded(model, tiny.texts(), "mlp.0", [pc.Moments()], batch_tokens=14)
    assert state_of(model.module) == before
    assert model("the list of names").last_hidden_state.shape[-1] == tiny.WIDTH  # a whole pass again


def test_a_module_that_is_called_again_in_a_later_pass_is_an_error() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first, self.last = nn.Embedding(9, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            once = self.first(self.words(x))
            return self.last(self.first(once) if len(x) == 1 else once)

    data = pc.Tensors(torch.arange(9).reshape(3, 3))
    with pytest.raises(pc.errors.ModelError, match="calls the module first 2 times"):
        recorded(pc.load(Sometimes().eval()), data, ["module:first", "module:last"], [pc.Moments()], batch_tokens=6)


def test_the_whole_pass_is_made_once_for_a_model_and_its_sites() -> None:
    model, counter = counting()
    assert model.sites
    counter.calls = 0
    short, long = [" ".join(tiny.WORDS[:5])] * 8, [" ".join(tiny.WORDS[:9])] * 8
    for texts, site, calls in [
        (short, "mlp.0", 1),
        (short, "mlp.0", 1),
        (short, "mlp.1", 2),
        (long, "mlp.0", 3),
        (short, "mlp.0", 3),
    ]:
        recorded(model, texts, site, [pc.Moments()], batch_tokens=22)
        assert counter.calls == calls


def test_a_feed_forward_that_is_cut_into_pieces_later_is_read_whole() -> None:
    texts, words = [" ".join(tiny.WORDS[:6])] * 4 + [" ".join(tiny.WORDS[3:9])] * 8, tiny.tokenizer()
    model = pc.load(tiny.bert(), tokenizer=words)
    once = recorded(model, texts, "mlp.*", [pc.Moments(), pc.TopExamples(3)], batch_tokens=24)
    for number in range(tiny.LAYERS):
        model.module.get_submodule(f"encoder.layer.{number}").chunk_size_feed_forward = 4  # type: ignore[assignment]
    pieces = recorded(model, texts, "mlp.*", [pc.Moments(), pc.TopExamples(3)], batch_tokens=24)
    for name in once:
        assert pieces[name].count == once[name].count == 12 * 6
        np.testing.assert_allclose(pieces[name].moments.mean, once[name].moments.mean, atol=1e-6)
