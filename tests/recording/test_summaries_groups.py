"""ByLabel and ByToken: every group against the rows that belong to it, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from patchclamp.errors import DataError, UnknownName
from patchclamp.recording.batch import Batch, Calibration, Setting
from patchclamp.recording.summaries import (
    ByLabel,
    ByToken,
    FiringRate,
    Histogram,
    MinMax,
    Moments,
    TopExamples,
)
from patchclamp.recording.thresholds import FractionOfMaximum

LABELS = {"language": ("en", "fr", "tlh"), "kind": ("code", "prose")}
ROWS, SIZE = 700, 30


def make(seed: int = 0) -> tuple[np.ndarray, Batch, dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    values = random.normal(size=(ROWS, SIZE)).astype(np.float32)
    codes = {
        "language": np.repeat(random.integers(0, 2, size=ROWS // 7), 7),
        "kind": np.repeat(random.integers(0, 2, size=ROWS // 7), 7),
    }
    token = random.integers(0, 50, size=ROWS)
    rows = torch.arange(ROWS)
    batch = Batch(
        torch.from_numpy(values),
        rows // 7,
        rows % 7,
        torch.from_numpy(token),
        {label: torch.from_numpy(each) for label, each in codes.items()},
    )
    return values, batch, codes, token


def setting_of(tokens: np.ndarray | None = None, labels: dict[str, tuple[str, ...]] = LABELS) -> Setting:
    maximum = np.full(SIZE, 2, dtype=np.float32)
    return Setting("mlp.0", SIZE, tokens, labels, Calibration(maximum, lambda q: maximum))


# ByLabel --------------------------------------------------------------------------------------------


def test_every_label_and_category() -> None:
    values, batch, codes, _ = make()
    found = ByLabel(of=(Moments, FiringRate(0.0, 1.0), MinMax, Histogram)).start(setting_of())
    found.update(batch)
    assert found.labels == ("kind", "language")
    for label, categories in LABELS.items():
        assert found.categories(label) == categories
        assert found.count(label).tolist() == np.bincount(codes[label], minlength=len(categories)).tolist()
        assert found.mean(label).shape == (SIZE, len(categories))
        assert found.rate(label).shape == (SIZE, len(categories), 2)
        for code, category in enumerate(categories):
            part = values[codes[label] == code]
            group = found.of(label, category)
            assert group.count == len(part)
            if len(part):
                np.testing.assert_allclose(found.mean(label)[:, code], part.astype(np.float64).mean(0), atol=1e-12)
                np.testing.assert_array_equal(found.rate(label)[:, code, 1], (part > 1).mean(0))
                np.testing.assert_array_equal(group.min_max.max, part.max(0))
                assert (group.histogram.counts.sum(1) == len(part)).all()
    assert np.isnan(found.mean("language")[:, 2]).all()  # no text in Klingon


def test_one_label_only() -> None:
    _, batch, _, _ = make()
    found = ByLabel("kind").start(setting_of())
    found.update(batch)
    assert found.labels == ("kind",)
    with pytest.raises(UnknownName, match="kind"):
        found.mean("language")


def test_a_batch_of_one_category_is_not_taken_apart() -> None:
    values, batch, codes, _ = make()
    rows = torch.from_numpy(np.flatnonzero(codes["kind"] == 1))
    found = ByLabel("kind", of=[TopExamples(1)]).start(setting_of())
    found.update(batch.select(rows))
    np.testing.assert_array_equal(found.of("kind", "prose").top_examples.values[:, 0], values[rows].max(0))
    assert found.of("kind", "code").count == 0 and found.count("kind").tolist() == [0, len(rows)]


def test_unknown_names() -> None:
    _, batch, _, _ = make()
    found = ByLabel(of=[MinMax]).start(setting_of())
    with pytest.raises(UnknownName, match=r"'langage'.*language"):
        found.of("langage", "en")
    with pytest.raises(UnknownName, match=r"'english'.*en"):
        found.of("language", "english")
    with pytest.raises(UnknownName, match=r"moments.*Moments"):
        found.mean("language")
    with pytest.raises(AttributeError, match=r"'moments'.*min_max"):
        _ = found.of("language", "en").moments
    with pytest.raises(UnknownName, match=r"'sort'.*language, kind"):
        ByLabel("sort").start(setting_of())
    unlabelled = Batch(batch.values, batch.example, batch.position)
    with pytest.raises(UnknownName, match="kind"):
        found.update(unlabelled)


def test_a_code_without_a_category_is_refused() -> None:
    _, batch, _, _ = make()
    for code in (-1, 2):
        labels = dict(batch.labels) | {"kind": torch.full((ROWS,), code)}
        found = ByLabel("kind").start(setting_of())
        with pytest.raises(DataError, match=f"category {code} of 'kind', which has 2"):
            found.update(Batch(batch.values, batch.example, batch.position, None, labels))


def test_too_many_categories() -> None:
    many = {"user": tuple(map(str, range(1001)))}
    with pytest.raises(DataError, match=r"'user' has 1001 categories.*1000"):
        ByLabel().start(setting_of(labels=many))


def test_data_without_labels() -> None:
    _, batch, _, _ = make()
    found = ByLabel().start(setting_of(labels={}))
    found.update(batch)
    assert found.labels == () and found.state() == {}
    ByLabel().reopen(setting_of(labels={}), {})


@pytest.mark.parametrize("of", [(), [int], [Moments, Moments()], ["moments"], "moments"])
def test_bad_groups(of: object) -> None:
    with pytest.raises(DataError, match=r"ByLabel\(of="):
        ByLabel(of=of)  # pyright: ignore[reportArgumentType]


def test_merging_refuses_other_labels_and_leaves_all_as_it_was() -> None:
    _, batch, _, _ = make()
    found = ByLabel(of=(Moments(), FiringRate(FractionOfMaximum(0.5)))).start(setting_of())
    found.update(batch)
    before = found.state()
    other_labels = ByLabel(of=(Moments(), FiringRate(FractionOfMaximum(0.5)))).start(
        setting_of(labels={"kind": ("code", "verse"), "language": LABELS["language"]})
    )
    with pytest.raises(DataError, match=r"categories differ.*verse"):
        found.merge(other_labels)
    ones = np.ones(SIZE, dtype=np.float32)
    other_thresholds = ByLabel(of=(Moments(), FiringRate(FractionOfMaximum(0.5)))).start(
        Setting("mlp.0", SIZE, None, LABELS, Calibration(ones, lambda q: ones))
    )
    other_thresholds.update(batch)
    with pytest.raises(DataError, match="thresholds differ"):
        found.merge(other_thresholds)
    for name, array in found.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_damaged_state_is_named() -> None:
    _, batch, _, _ = make()
    found = ByLabel().start(setting_of())
    found.update(batch)
    state = found.state()
    for change, message in [
        ({"0.moments.mean": None}, "lacks the array 'mean'"),
        ({"1.count": None}, re.escape("lacks the array '1.count'")),
        (
            {"1.moments.mean": state["1.moments.mean"][:2]},
            r"moments\.mean of shape \[2, 30\].*3 categories.*language",
        ),
        ({"0.moments.mean": state["0.moments.mean"][:, :5]}, r"'mean' of shape \[5\]"),
        ({"2.moments.mean": state["0.moments.mean"]}, r"unknown arrays '2\.moments'"),
        ({"extra": np.zeros(2)}, "unknown array 'extra'"),
    ]:
        # Other numbers in all that fits, so that a restore that stops half way would show.
        other = {name: array + 1 for name, array in state.items()}
        damaged = {name: array for name, array in (other | change).items() if array is not None}
        with pytest.raises(DataError, match=message):
            found.restore(damaged)
        with pytest.raises(DataError, match=message):
            ByLabel().reopen(setting_of(), damaged)
    for name, array in found.state().items():
        np.testing.assert_array_equal(array, state[name])


# ByToken --------------------------------------------------------------------------------------------


def test_slots_and_totals() -> None:
    values, batch, _, token = make()
    tokens = np.array([49, 0, 77, 12])  # 77 never occurs
    found = ByToken(threshold=0.5).start(setting_of(tokens))
    for start in range(0, ROWS, 99):
        found.update(batch.select(slice(start, start + 99)))
    fires = values > 0.5
    assert found.tokens.tolist() == tokens.tolist() and found.count == ROWS
    assert found.occurrences.tolist() == [(token == each).sum() for each in tokens]
    np.testing.assert_array_equal(found.fired, [fires[token == each].sum(0) for each in tokens])
    np.testing.assert_array_equal(found.fired_total, fires.sum(0))
    assert found.fired.dtype == np.int32 and found.fired_total.dtype == np.int64
    np.testing.assert_array_equal(found.threshold, np.full(SIZE, 0.5, np.float32), strict=True)


def test_which_tokens_have_a_slot() -> None:
    frequent = np.array([5, 2, 9])
    assert ByToken(most_frequent=2).start(setting_of(frequent)).tokens.tolist() == [5, 2]
    assert ByToken([8, 1]).start(setting_of(frequent)).tokens.tolist() == [8, 1]
    none = ByToken().start(setting_of(np.empty(0, dtype=np.int64)))
    values, batch, _, _ = make()
    none.update(batch)
    assert none.fired.shape == (0, SIZE) and none.count == ROWS
    np.testing.assert_array_equal(none.fired_total, (values > 1).sum(0))


def test_by_token_needs_tokens() -> None:
    _, batch, _, _ = make()
    with pytest.raises(DataError, match=r"tokens.*mlp\.0 has none"):
        ByToken().start(setting_of(None))
    with pytest.raises(DataError, match="needs token ids"):
        ByToken().start(setting_of(np.array([1]))).update(Batch(batch.values, batch.example, batch.position))
    assert ByToken().needs_tokens and ByLabel(of=[ByToken()]).needs_tokens and not ByLabel().needs_tokens
    assert ByToken().relative and ByLabel(of=[ByToken()]).relative and not ByLabel().relative


@pytest.mark.parametrize("tokens", [[1, 1], [-1], [0.5], ["the"], [[1, 2]]])
def test_bad_tokens(tokens: list[int]) -> None:
    with pytest.raises(DataError, match="token"):
        ByToken(tokens)


@pytest.mark.parametrize("most", [0, 1.5, True])
def test_bad_number_of_slots(most: int) -> None:
    with pytest.raises(DataError, match="most_frequent"):
        ByToken(most_frequent=most)


def test_merging_refuses_other_tokens_and_thresholds() -> None:
    one = ByToken(threshold=0.5).start(setting_of(np.array([1, 2])))
    with pytest.raises(DataError, match="the tokens differ"):
        one.merge(ByToken(threshold=0.5).start(setting_of(np.array([2, 1]))))
    with pytest.raises(DataError, match="parameters differ"):
        one.merge(ByToken(threshold=0.6).start(setting_of(np.array([1, 2]))))


def test_a_state_brings_its_tokens_or_changes_nothing() -> None:
    _, batch, _, _ = make()
    found = ByToken().start(setting_of(np.array([3, 4, 5])))
    found.update(batch)
    state = found.state()
    again = ByToken().reopen(Setting("mlp.0", SIZE), state)
    assert again.tokens.tolist() == [3, 4, 5]
    np.testing.assert_array_equal(again.fired, found.fired)
    np.testing.assert_array_equal(again.threshold, found.threshold)
    with pytest.raises(DataError, match=r"'fired' of shape \[2, 3, 30\]; \[2, 1, 30\]"):
        again.restore(state | {"tokens": np.array([3]), "occurrences": np.array([[1], [0]])})
    assert again.tokens.tolist() == [3, 4, 5]


def test_counts_grow_beyond_int32() -> None:
    _, batch, _, token = make()
    found = ByToken(threshold=-100.0).start(setting_of(np.array([token[0]])))
    found.update(batch)
    before = int(found.fired[0, 0])
    state = found.state()
    state["count"] = np.array([2**31 - 1, 0])
    state["fired"][0], state["fired"][1] = 2**31 - 1, 0
    found.restore(state)
    found.update(batch)
    assert found.fired.dtype == np.int64 and int(found.fired[0, 0]) == 2**31 - 1 + before
    one, other = (ByToken(threshold=-100.0).reopen(setting_of(), state) for _ in range(2))
    assert one.fired.dtype == np.int32
    one.merge(other)
    assert int(one.fired[0, 0]) == 2 * (2**31 - 1)
