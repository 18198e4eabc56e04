"""The compiled loops learn what the summaries learn by themselves, and where they cannot, they take nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.recording import tiny
from tests.recording.tiny import recorded
from torch import nn

import patchclamp as pc
from patchclamp.recording import fused, run
from patchclamp.recording.batch import Batch, Setting
from patchclamp.recording.folds import fold_of
from patchclamp.recording.forward import Rows
from patchclamp.recording.fused import Fused
from patchclamp.recording.pass_rows import PassRows

pytest.importorskip("numba", reason="the compiled loops need numba: the extra fast")

KINDS = np.array([0, 1, 2, 1, 0], np.int32)
LABELS = {"kind": ("code", "prose", "verse")}
# Ties, zeros of both signs, and large means: what sums and orders go wrong on.
numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 3.0, 1e4, 1e4 + 1, -2.5])


def summaries() -> list[pc.Summary]:
    return [
        pc.Moments(),
        pc.FiringRate(0.0, 0.5),
        pc.MinMax(),
        pc.TopExamples(3),
        pc.ByToken(tokens=[4, 2, 7], threshold=0.25),
        pc.ByLabel(of=(pc.Moments, pc.FiringRate(0.5))),
    ]


def started(size: int, dtype: torch.dtype = torch.float32) -> dict[str, pc.Summary]:
    setting = Setting("mlp.0", size, tokens=np.arange(9), labels=LABELS, dtype=dtype)
    return {each.name: each.start(setting) for each in summaries()}


@st.composite
def passes(draw: st.DrawFn) -> tuple[np.ndarray, PassRows, Batch]:
    """Values of all positions of a pass, which of them count, and the same as a batch."""
    lines, length, size = draw(st.integers(1, 5)), draw(st.integers(1, 17)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    flat_values = draw(st.lists(numbers, min_size=lines * length * size, max_size=lines * length * size))
    values = np.array(flat_values, dtype).reshape(-1, size)
    counted = torch.tensor(draw(st.lists(st.booleans(), min_size=lines * length, max_size=lines * length)))
    counted[draw(st.integers(0, len(counted) - 1))] = True
    flat = counted.nonzero().squeeze(1)
    row = flat // length
    examples = np.array(draw(st.permutations(range(5))))[:lines]
    example = torch.from_numpy(examples)[row]
    token = torch.tensor(draw(st.lists(st.integers(0, 8), min_size=len(flat), max_size=len(flat))))
    rows = Rows((lines, length), flat, example, flat % length, token, row)
    folds = fold_of(torch.arange(5)).numpy().astype(np.uint8)
    batch = Batch(
        torch.from_numpy(values)[flat],
        example,
        flat % length,
        token,
        {"kind": torch.from_numpy(KINDS).long()[example]},
        fold=torch.from_numpy(folds).long()[example],
    )
    return values, PassRows(rows, examples, {"kind": KINDS}, folds), batch


def assert_alike(left: dict[str, pc.Summary], right: dict[str, pc.Summary]) -> None:
    for name, summary in left.items():
        there = right[name].state()
        for key, array in summary.state().items():
            if array.dtype.kind in "iu" or name in ("min_max", "top_examples"):
                assert array.tobytes() == there[key].tobytes(), (name, key)
            else:
                # Values are up to 1e4: the last bit of one square is 1e-8, and the two add them up in another order.
                np.testing.assert_allclose(array, there[key], rtol=1e-10, atol=1e-6, err_msg=f"{name} {key}")


@given(several=st.lists(passes(), min_size=1, max_size=3).filter(lambda each: len({p[0].shape[1] for p in each}) == 1))
def test_they_learn_what_the_summaries_learn(several: list[tuple[np.ndarray, PassRows, Batch]]) -> None:
    size, dtype = several[0][0].shape[1], torch.from_numpy(several[0][0]).dtype
    together, apart = started(size, dtype), started(size, dtype)
    walk = Fused(together)
    assert walk.names == set(together)
    for values, rows, batch in several:
        same_type = batch.values.dtype == dtype
        assert walk.take(torch.from_numpy(values), rows) is same_type
        for summary in apart.values() if same_type else ():
            summary.update(batch)
    assert_alike(together, apart)


@settings(deadline=None)
@given(one=passes(), wrong=st.sampled_from([np.nan, np.inf, -np.inf]), place=st.integers(0, 10**6))
def test_a_number_that_is_none_takes_nothing(one: tuple[np.ndarray, PassRows, Batch], wrong: float, place: int) -> None:
    values, rows, _ = one
    held, before = started(values.shape[1], torch.from_numpy(values).dtype), None
    walk = Fused(held)
    assert walk.take(torch.from_numpy(values.copy()), rows)
    before = {name: each.state() for name, each in held.items()}
    position = rows.flat[place % len(rows)]
    values[position, place % values.shape[1]] = wrong
    assert not walk.take(torch.from_numpy(values), rows)
    for name, each in held.items():
        assert all(array.tobytes() == before[name][key].tobytes() for key, array in each.state().items())


def one_line(values: torch.Tensor) -> PassRows:
    """All positions of one example count."""
    row = torch.zeros(len(values), dtype=torch.int64)
    rows = Rows((1, len(values)), None, row, torch.arange(len(values)), row, row)
    return PassRows(rows, np.array([0]), {"kind": KINDS}, np.zeros(5, np.uint8))


def test_what_was_kept_before_the_wrong_number_came_is_given_back() -> None:
    values, held = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)), started(3)
    walk = Fused(held)
    assert walk.take(values, one_line(values))
    before = held["top_examples"].state()
    larger = values + 10
    larger[-1, 2] = torch.nan
    assert not walk.take(larger, one_line(larger))
    assert all(array.tobytes() == before[key].tobytes() for key, array in held["top_examples"].state().items())


def test_squares_of_large_numbers_do_not_cancel() -> None:
    values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e7
    held = started(3, torch.float64)
    assert Fused(held).take(values, one_line(values))
    np.testing.assert_allclose(held["moments"].variance, values.numpy().var(0), rtol=1e-9)  # type: ignore[attr-defined]


def test_what_does_not_count_may_be_anything() -> None:
    values = torch.tensor([[1.0, 2.0], [np.nan, np.inf], [3.0, 1.0]])
    row = torch.tensor([0, 0])
    rows = Rows((1, 3), torch.tensor([0, 2]), row, torch.tensor([0, 2]), torch.tensor([1, 1]), row)
    held = started(2)
    assert Fused(held).take(values, PassRows(rows, np.array([0]), {"kind": KINDS}, np.zeros(5, np.uint8)))
    assert held["min_max"].max.tolist() == [3.0, 2.0]  # type: ignore[attr-defined]


def test_the_number_of_threads_leaves_no_trace() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(100, 2048, generator=draw)
    row = torch.zeros(100, dtype=torch.int64)
    rows = Rows((1, 100), None, row, torch.arange(100), torch.randint(0, 9, (100,), generator=draw), row)
    states = []
    usual = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            held = started(2048)
            assert Fused(held).take(values, PassRows(rows, np.array([0]), {"kind": KINDS}, np.zeros(5, np.uint8)))
            states.append(b"".join(array.tobytes() for each in held.values() for array in each.state().values()))
    finally:
        torch.set_num_threads(usual)
    assert states[0] == states[1] == states[2]


def test_a_class_derived_from_a_summary_is_not_taken_for_it() -> None:
    class Doubled(pc.Moments):
        name = "doubled"

        def add(self, batch: Batch) -> None:
            super().add(batch)
            super().add(batch)

    held = {each.name: each.start(Setting("mlp.0", 2)) for each in (pc.Moments(), Doubled(), pc.TopExamples(2, 1))}
    assert Fused(held).names == {"moments"}


# In a recording -------------------------------------------------------------------------------------


@pytest.fixture(params=["with", "without"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """With the loops and without; counts how often they took something."""
    taken: list[int] = []
    take = Fused.take

    def counted(self: Fused, values: torch.Tensor, rows: PassRows) -> bool:
        taken.append(len(rows))
        return take(self, values, rows)

    monkeypatch.setattr(Fused, "take", counted)
    if request.param == "without":
        monkeypatch.setattr(run, "available", lambda: False)
    yield taken
    assert bool(taken) == (request.param == "with")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_recording_is_what_the_model_did(loops: list[int], dtype: torch.dtype) -> None:
    model = pc.load(tiny.bert().to(dtype), tokenizer=tiny.tokenizer())
    texts = tiny.texts(23)
    kinds = [("code", "prose")[len(text) % 2] for text in texts]
    data = pc.Texts(texts, labels={"kind": kinds})
    kept = [pc.Moments(), pc.FiringRate(0.0), pc.MinMax(), pc.TopExamples(4), pc.ByLabel(), pc.Histogram()]
    recording = recorded(model, data, summaries=kept, batch_tokens=40)
    for name in recording:
        alone = [model.activations(text, name)[1:-1].double().numpy() for text in texts]
        rows, site = np.concatenate(alone), recording[name]
        rough, near = (2e-2, 2e-2) if dtype == torch.bfloat16 else (1e-5, 1e-6)
        assert site.count == len(rows) == site.moments.count == site.histogram.counts.sum(1)[0]
        np.testing.assert_allclose(site.moments.mean, rows.mean(0), rough, near)
        np.testing.assert_allclose(site.min_max.max, rows.max(0), rough, near)
        np.testing.assert_allclose(site.top_examples.values, -np.sort(-rows, axis=0)[:4].T, rough, near)
        for kind in ("code", "prose"):
            of_kind = np.concatenate([each for each, label in zip(alone, kinds, strict=True) if label == kind])
            group = site.by_label.of("kind", kind)
            assert group.count == len(of_kind)
            np.testing.assert_allclose(group.moments.variance, of_kind.var(0), rough, near)


def test_rows_that_are_no_numbers_are_counted_and_left_out(loops: list[int]) -> None:
    module = tiny.bert()
    embeddings = module.get_submodule("embeddings.word_embeddings")
    assert isinstance(embeddings, nn.Embedding)
    with torch.no_grad():
        embeddings.weight[tiny.SPECIAL.__len__() + 3] = np.nan  # one word, and all that read it
    model = pc.load(module, tokenizer=tiny.tokenizer())
    texts = tiny.texts(23)
    hit = [tiny.WORDS[3] in text.split() for text in texts]
    assert 0 < sum(hit) < len(texts)
    with pytest.warns(UserWarning, match="rows were left out"):
        recording = recorded(model, texts, summaries=[pc.Moments(), pc.TopExamples(4)], batch_tokens=40)
    words = [len(text.split()) for text in texts]
    for name in recording:
        assert recording[name].count == sum(n for n, bad in zip(words, hit, strict=True) if not bad)
        assert recording[name].nonfinite["rows"] == sum(n for n, bad in zip(words, hit, strict=True) if bad)
        assert np.isfinite(recording[name].top_examples.values).all()


def test_without_numba_it_says_so_once_and_records_the_same() -> None:
    script = """
import importlib.machinery, warnings
real = importlib.machinery.PathFinder.find_spec
def hidden(cls, name, path=None, target=None):
    return None if name.split(".")[0] == "numba" else real(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(hidden)
import patchclamp as pc
from tests.recording import tiny
model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        recording = pc.record(model, tiny.texts(), summaries=[pc.Moments()], progress=False)
print([str(each.message) for each in said if "numba" in str(each.message)], [each.filename for each in said])
print(recording["mlp.0"].moments.mean.sum())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, total = done.stdout.splitlines()[-2:]
    assert said.count("its compiled loops need numba (pip install 'patchclamp[fast]')") == 1 and "<string>" in said
    model = pc.load(tiny.bert(), tokenizer=tiny.tokenizer())
    here = recorded(model, tiny.texts(), summaries=[pc.Moments()])["mlp.0"].moments.mean.sum()
    assert float(total) == pytest.approx(here, rel=1e-6)


def test_importing_compiles_nothing_and_needs_no_numba() -> None:
    script = "import patchclamp.recording.fused, patchclamp.recording.record, sys; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert fused.available()
