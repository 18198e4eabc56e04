"""The geometry of embeddings: helices and frequencies that were planted, nets made by hand, and what noise gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import patchclamp as pc


def helix(numbers: np.ndarray, period: float = 7.3, rise: float = 0.1, phase: float = 0.4) -> np.ndarray:
    turn = 2 * np.pi * numbers / period + phase
    return np.stack([rise * numbers, 1.5 * np.cos(turn), 1.5 * np.sin(turn)], 1)


def turned(values: np.ndarray, width: int, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """In `width` dimensions, rotated in any way, with noise."""
    made = np.random.default_rng(seed)
    basis = np.linalg.qr(made.standard_normal((width, values.shape[1])))[0]
    return values @ basis.T + noise * made.standard_normal((len(values), width)) + made.standard_normal(width)


# Components -----------------------------------------------------------------------------------------


def test_components_of_a_helix() -> None:
    embedding = turned(helix(np.arange(73), rise=0.15), 32)
    found = pc.decompose.embedding_pca(torch.from_numpy(embedding), components=3)
    assert found.explained.sum() == pytest.approx(1) and found.explained.tolist() == sorted(found.explained)[::-1]
    assert abs(found.order[0]) > 0.99 and (np.abs(found.order[1:]) < 0.2).all()
    assert found.tied.tolist() == [False, True, True]  # the circle may be turned
    np.testing.assert_allclose(found.coordinates @ found.directions + found.mean, embedding, atol=1e-9)
    assert found.labels == tuple(range(73))


def test_components_that_differ_are_not_tied() -> None:
    made = np.random.default_rng(0)
    same = 0
    for _ in range(40):
        values = made.standard_normal((400, 4))
        assert not pc.decompose.embedding_pca(values * [8, 4, 2, 1]).tied.any()
        same += pc.decompose.embedding_pca(values * [9, 3, 3, 1]).tied.tolist() == [False, True, True, False]
    assert same >= 28


def test_numbers_that_training_has_not_seen_are_left_out() -> None:
    embedding = turned(helix(np.arange(60)), 16)
    trained = np.arange(60) % 7 != 3
    expected = pc.decompose.embedding_pca(embedding[trained], np.arange(60)[trained].tolist(), components=3)
    embedding[3] = np.nan  # without saying so
    embedding[~trained & (np.arange(60) > 3)] = 1e3
    found = pc.decompose.embedding_pca(embedding, components=3, trained=trained)
    np.testing.assert_allclose(found.coordinates[trained], expected.coordinates, atol=1e-9)
    assert np.isnan(found.coordinates[~trained]).all()
    assert found.order[0] == pytest.approx(expected.order[0])
    fit = pc.decompose.fit_helix(found.coordinates)
    assert fit.period == pytest.approx(7.3, rel=1e-4)


def test_rows_that_are_not_finite_are_left_out() -> None:
    numbers = np.delete(np.arange(60), 7)
    values = turned(helix(np.arange(60.0)), 6, 0.05)
    missing = values.copy()
    missing[7, 2] = np.nan
    found, expected = pc.decompose.embedding_pca(missing), pc.decompose.embedding_pca(values[numbers])
    assert np.isnan(found.coordinates[7]).all()
    np.testing.assert_allclose(np.abs(found.coordinates[numbers, :3]), np.abs(expected.coordinates[:, :3]))
    unknown = np.where(np.arange(60) == 7, np.nan, np.arange(60.0))
    fit = pc.decompose.fit_helix
    fits = [fit(missing), fit(values, unknown), fit(values[numbers], numbers)]
    assert repr(fits[0]) == repr(fits[1]) == repr(fits[2])
    plane, whole = (
        pc.decompose.latent_topography(each, lambda points: points[:, 0], steps=3) for each in (found, expected)
    )
    np.testing.assert_allclose(np.sort(np.abs(plane.first)), np.sort(np.abs(whole.first)))
    np.testing.assert_allclose(np.sort(np.abs(plane.second)), np.sort(np.abs(whole.second)))


def test_labels_that_are_no_numbers_have_no_order() -> None:
    found = pc.decompose.embedding_pca(np.random.default_rng(0).standard_normal((4, 6)), ["a", "b", "c", "d"])
    assert np.isnan(found.order).all() and found.coordinates.shape == (4, 3)


# Helix ----------------------------------------------------------------------------------------------


def test_a_helix_is_found_exactly() -> None:
    found = pc.decompose.fit_helix(helix(np.arange(60)))
    assert found.period == pytest.approx(7.3, rel=1e-5)
    assert (found.r2, found.r2_circle) == (pytest.approx(1), pytest.approx(1))
    assert found.radii == (pytest.approx(1.5, rel=1e-4), pytest.approx(1.5, rel=1e-4))
    assert (found.rise, found.tilt) == (pytest.approx(0.1, rel=1e-3), pytest.approx(90, abs=0.1))
    assert found.p == pytest.approx(1 / 200)


@pytest.mark.parametrize("period", [2.0, 7.3, 31.0])
def test_a_helix_in_noise_and_more_dimensions(period: float) -> None:
    for seed in range(5):
        numbers = np.arange(100)
        embedding = turned(helix(numbers, period), 24, noise=0.3, seed=seed)
        found = pc.decompose.fit_helix(pc.decompose.embedding_pca(embedding, components=5).coordinates)
        assert found.period == pytest.approx(period, rel=0.01)
        assert 0.5 < found.r2_circle < 0.99 and found.p < 0.01
        assert found.rise == pytest.approx(0.1, rel=0.1)
        # Of two steps there is no circle, but one number up and one down.
        assert found.radii == pytest.approx((1.5, 0 if period == 2 else 1.5), abs=0.4)


def test_numbers_in_any_order_and_steps() -> None:
    made = np.random.default_rng(0)
    numbers = made.choice(300, 80, replace=False) * 0.5 - 20
    found = pc.decompose.fit_helix(helix(numbers), numbers)
    assert found.period == pytest.approx(7.3, rel=1e-4) and found.r2 == pytest.approx(1)
    assert pc.decompose.fit_helix(helix(numbers), numbers, periods=(8.0, 30.0)).period >= 8


def test_a_wave_is_no_circle_and_a_slanted_helix_is_said() -> None:
    numbers = np.arange(80.0)
    flat = helix(numbers)[:, :2]
    assert pc.decompose.fit_helix(flat).radii[1] == pytest.approx(0, abs=1e-6)
    slanted = helix(numbers) + np.stack([np.zeros(80), 0.1 * numbers, np.zeros(80)], 1)
    found = pc.decompose.fit_helix(slanted)
    assert found.tilt == pytest.approx(45, abs=0.5) and found.rise == pytest.approx(0.1 * np.sqrt(2), rel=0.01)


def test_shares_are_those_of_least_squares() -> None:
    numbers = np.arange(60.0)
    values = turned(helix(numbers), 5, noise=0.5)
    found = pc.decompose.fit_helix(values)
    turn = 2 * np.pi * numbers / found.period
    whole = ((values - values.mean(0)) ** 2).sum()
    for design, expected in (
        (np.stack([np.ones(60), numbers], 1), found.r2_line),
        (np.stack([np.ones(60), numbers, np.cos(turn), np.sin(turn)], 1), found.r2),
    ):
        left = values - design @ np.linalg.lstsq(design, values)[0]
        assert expected == pytest.approx(1 - (left**2).sum() / whole)
    assert found.r2_circle == pytest.approx((found.r2 - found.r2_line) / (1 - found.r2_line))


def test_noise_has_no_helix() -> None:
    small = sum(
        pc.decompose.fit_helix(np.random.default_rng(seed).standard_normal((50, 3)), permutations=99).p <= 0.05
        for seed in range(60)
    )
    assert small <= 8  # 3 are expected


# Frequencies ----------------------------------------------------------------------------------------


def test_an_embedding_of_three_frequencies() -> None:
    made = np.random.default_rng(0)
    angle = 2 * np.pi * np.arange(53)[:, None] * np.asarray([4, 11, 25]) / 53
    weights = made.standard_normal((6, 40)) * np.repeat([3, 2, 1], 2)[:, None]
    embedding = np.concatenate([np.cos(angle), np.sin(angle)], 1)[:, [0, 3, 1, 4, 2, 5]] @ weights + 7
    found = pc.decompose.fourier_power(torch.from_numpy(embedding).float())
    assert found.frequencies[:3].tolist() == [4, 11, 25] and len(found.frequencies) == 26
    assert found.top(3) > 0.999 and found.share[0] == 0 and found.share.sum() == pytest.approx(1)


@pytest.mark.parametrize("size", [53, 54])
def test_a_random_embedding_is_flat(size: int) -> None:
    found = pc.decompose.fourier_power(np.random.default_rng(0).standard_normal((size, 3000)))
    frequencies = size / 2 - 0.5
    expected = np.full(size // 2, 1 / frequencies)
    if size == 54:
        expected[-1] /= 2  # of the last one there is a cosine alone
    np.testing.assert_allclose(found.share[1:], expected, rtol=0.15)
    assert found.top(5) < 0.25


# Ranks and topography -------------------------------------------------------------------------------


def network(width: int = 20, seed: int = 0) -> tuple[torch.Tensor, nn.Module]:
    """An embedding whose third to fifth components are all that is read, and what reads it: one layer with ReLU."""
    made = np.random.default_rng(seed)
    basis = np.linalg.qr(made.standard_normal((width, width)))[0].T
    size = np.asarray([8, 6, 4, 3, 2, *np.full(width - 5, 0.5)])
    embedding = made.standard_normal((200, width)) * size @ basis
    reads = nn.Linear(width, 3, bias=False)
    with torch.no_grad():
        reads.weight.copy_(torch.from_numpy(basis[2:5]))
    return torch.from_numpy(embedding).float(), nn.Sequential(reads, nn.ReLU())


def test_the_rank_that_a_network_needs() -> None:
    embedding, reads = network()
    wanted = reads(embedding).detach()

    def error(changed: torch.Tensor) -> float:
        assert changed.dtype == torch.float32
        return float((reads(changed) - wanted).square().mean().sqrt())

    found = pc.decompose.rank_needed(embedding, error, range(1, 21))
    assert found.rank.tolist() == list(range(21)) and found.full == 0
    assert found.needed == 5
    assert found.error[1:3] == pytest.approx(found.error[0], rel=0.1)  # the largest two are not read
    assert found.error[-1] < 1e-3 and found.random[-1] < 1e-3 and found.random[0] == pytest.approx(found.error[0])
    assert found.random[5] > 4 * found.error[5]
    assert pc.decompose.rank_needed(embedding, error, [1, 2]).needed is None
    assert pc.decompose.rank_needed(embedding, error).rank.tolist() == [0, 1, 2, 4, 8, 16, 20]


def test_topography_is_the_network_on_a_plane() -> None:
    embedding, reads = network()
    pca = pc.decompose.embedding_pca(embedding)
    found = pc.decompose.latent_topography(pca, reads, axes=(2, 0), steps=7)
    assert found.output.shape == (7, 7, 3)
    point = pca.mean + found.first[5] * pca.directions[2] + found.second[1] * pca.directions[0]
    np.testing.assert_allclose(found.output[5, 1], reads(torch.from_numpy(point).float()).detach(), atol=1e-4)
    low, high = pca.coordinates[:, 2].min(), pca.coordinates[:, 2].max()
    assert found.first[0] == pytest.approx(low - 0.1 * (high - low)) and found.second[-1] > pca.coordinates[:, 0].max()
    one = pc.decompose.latent_topography(pca, lambda points: reads(points).sum(1), steps=4)
    assert one.output.shape == (4, 4)


# Concepts -------------------------------------------------------------------------------------------


def nuclei(seed: int = 0) -> tuple[dict[str, np.ndarray], np.random.Generator]:
    """Terms of the semi-empirical mass formula, on a grid of protons and neutrons."""
    protons, neutrons = (each.ravel().astype(float) for each in np.meshgrid(np.arange(10, 60), np.arange(10, 70)))
    return mass_terms(protons, neutrons), np.random.default_rng(seed)


def mass_terms(protons: np.ndarray, neutrons: np.ndarray) -> dict[str, np.ndarray]:
    mass = protons + neutrons
    return {
        "volume": mass,
        "surface": mass ** (2 / 3),
        "Coulomb": protons * (protons - 1) / mass ** (1 / 3),
        "asymmetry": (neutrons - protons) ** 2 / mass,
        "pairing": ((protons % 2 == 0).astype(float) + (neutrons % 2 == 0) - 1) / np.sqrt(mass),
    }


def test_a_smooth_feature_correlates_with_what_it_is_not() -> None:
    """Feature 0 is the volume, 1 the asymmetry and 2 the pairing; none is the surface, which resembles the volume."""
    terms, made = nuclei()
    scaled = {name: (each - each.mean()) / each.std() for name, each in terms.items()}
    noise = made.standard_normal((len(terms["volume"]), 3))
    features = np.stack([scaled["volume"], -scaled["asymmetry"], 2 * scaled["pairing"]], 1) + 0.02 * noise
    control = np.stack([scaled["volume"] + scaled["Coulomb"], scaled["surface"], noise[:, 0]], 1) + 0.02 * noise
    found = pc.decompose.match_concepts(features, terms, control=control).concepts
    rows = {row["concept"]: row for row in found.iter_rows(named=True)}
    assert [rows[each]["feature"] for each in ("volume", "asymmetry", "pairing")] == [0, 1, 2]
    assert rows["asymmetry"]["correlation"] < -0.99 and rows["asymmetry"]["partial"] < -0.99
    assert rows["surface"]["correlation"] > 0.99 and abs(rows["surface"]["partial"]) < 0.1
    assert rows["volume"]["control"] > 0.9
    matched = {name for name, row in rows.items() if row["matched"]}
    assert {"asymmetry", "pairing"} <= matched and "surface" not in matched and "Coulomb" not in matched


def test_partial_correlation_is_that_of_residuals() -> None:
    made = np.random.default_rng(0)
    shared = made.standard_normal(300)
    terms = {"x": shared + made.standard_normal(300), "y": shared + made.standard_normal(300)}
    features = (terms["x"] + 0.5 * made.standard_normal(300))[:, None]
    found = pc.decompose.match_concepts(features, terms).pairs
    assert found["concept"].to_list() == ["x", "y"]
    for place, (name, other) in enumerate((("x", "y"), ("y", "x"))):
        design = np.stack([np.ones(300), terms[other]], 1)
        one, two = (each - design @ np.linalg.lstsq(design, each)[0] for each in (features[:, 0], terms[name]))
        assert found["partial"][place] == pytest.approx(np.corrcoef(one, two)[0, 1])
        assert found["correlation"][place] == pytest.approx(np.corrcoef(features[:, 0], terms[name])[0, 1])
    assert found["correlation"][1] > 0.3 and abs(found["partial"][1]) < 0.15


def test_of_features_that_are_noise_nothing_is_matched() -> None:
    terms, _ = nuclei()
    matched = 0
    for seed in range(10):
        noise = np.random.default_rng(seed).standard_normal((len(terms["volume"]), 30))
        found = pc.decompose.match_concepts(noise, terms, shuffles=60, seed=seed).concepts
        matched += int(found["matched"].sum())
        assert found["control"].null_count() == 5
    assert matched <= 8  # of 50, at a level of 1 in 20: 2.5 are expected


def test_components_of_a_hidden_layer_made_by_hand() -> None:
    """Two terms turned into 16 features, against features that have nothing to do with them."""
    terms, made = nuclei()
    wanted = np.stack([size * terms[each] / terms[each].std() for size, each in ((3, "volume"), (1, "asymmetry"))], 1)
    hidden = wanted @ np.linalg.qr(made.standard_normal((16, 2)))[0].T + 0.01 * made.standard_normal((3000, 16))
    untrained = np.maximum(made.standard_normal((3000, 4)) @ made.standard_normal((4, 16)), 0)
    found = pc.decompose.match_concepts(hidden, terms, control=untrained, components=2, shuffles=20).concepts
    rows = {row["concept"]: row for row in found.iter_rows(named=True)}
    assert [rows[each]["feature"] for each in ("volume", "asymmetry")] == [0, 1]  # the larger component first
    assert abs(rows["volume"]["correlation"]) > 0.9 and abs(rows["asymmetry"]["correlation"]) > 0.7
    assert rows["volume"]["control"] < 0.2 and rows["asymmetry"]["matched"]


class MassNetwork(nn.Module):
    """A table of embeddings for protons and one for neutrons, a layer, two residual blocks, three outputs."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.protons, self.neutrons = nn.Embedding(60, width), nn.Embedding(80, width)
        self.first, self.last = nn.Linear(2 * width, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for _ in range(2)
        )
        for table in (self.protons, self.neutrons):
            nn.init.normal_(table.weight, std=0.05)

    def features(self, protons: torch.Tensor, neutrons: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.first(torch.cat([self.protons(protons), self.neutrons(neutrons)], -1)))
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_network_that_learns_the_mass_formula_has_its_terms() -> None:
    """The first component of its last hidden layer is the volume; it had none of the terms before training."""
    protons, neutrons = (each.ravel() for each in np.meshgrid(np.arange(8, 60), np.arange(8, 80)))
    stable = (neutrons >= 0.8 * protons) & (neutrons <= 1.8 * protons)
    terms = mass_terms(protons[stable].astype(float), neutrons[stable].astype(float))
    energy = np.asarray([15.75, -17.8, -0.711, -23.7, 11.18]) @ np.stack(list(terms.values()))
    targets = np.stack([energy, energy / terms["volume"], terms["volume"] ** (1 / 3)], 1)
    wanted = torch.from_numpy((targets - targets.min(0)) / np.ptp(targets, 0)).float()
    given = torch.from_numpy(protons[stable]), torch.from_numpy(neutrons[stable])
    torch.manual_seed(0)
    net = MassNetwork()
    untrained = net.features(*given).detach().clone()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=700)
    for _ in range(700):
        optimizer.zero_grad()
        nn.functional.mse_loss(net.last(net.features(*given)), wanted).backward()
        optimizer.step()
        schedule.step()
    found = pc.decompose.match_concepts(net.features(*given), terms, control=untrained, components=5).concepts
    print(found.select("concept", "correlation", "control", "partial", "partial_control"))
    rows = {row["concept"]: row for row in found.iter_rows(named=True)}
    assert abs(rows["volume"]["correlation"]) > 0.9 and rows["volume"]["control"] < 0.4
    assert abs(rows["asymmetry"]["partial"]) > 0.7 and rows["asymmetry"]["partial_control"] < 0.3
    assert rows["volume"]["matched"] and rows["asymmetry"]["matched"]


def test_a_term_that_is_a_sum_of_others_has_no_partial_correlation() -> None:
    terms, _ = nuclei()
    terms = {"volume": terms["volume"], "asymmetry": terms["asymmetry"], "both": terms["volume"] + terms["asymmetry"]}
    features = terms["volume"][:, None]
    with pytest.warns(UserWarning, match="is a sum of the other terms"):
        found = pc.decompose.match_concepts(features, terms, shuffles=19).concepts
    assert np.isnan(found["partial"].to_numpy()).all() and not found["matched"].any()
    assert found["correlation"][0] == pytest.approx(1)


# Bad input ------------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    made = np.random.default_rng(0)
    values = made.standard_normal((20, 6))
    missing = values.copy()
    missing[3] = np.nan
    pca = pc.decompose.embedding_pca(values)
    line = np.arange(20.0)[:, None] * np.ones(3)
    fit, match = pc.decompose.fit_helix, pc.decompose.match_concepts
    for call, said in [
        (lambda: pc.decompose.embedding_pca(values, components=7), "7 components of 20 rows of width 6: there are 6"),
        (lambda: pc.decompose.embedding_pca(values[:, 0]), r"\[rows, width\]; not \[20\]"),
        (lambda: pc.decompose.embedding_pca(values, ["a"]), "1 labels were given for 20 rows"),
        (lambda: pc.decompose.embedding_pca(values, trained=[True] * 3), r"trained is \[3\]"),
        (lambda: pc.decompose.embedding_pca(values, trained=[False] * 20), "0 rows of the embedding count"),
        (lambda: fit(values[:7]), "8 numbers in 2 dimensions; there are 7"),
        (lambda: fit(values[:, :1]), "there are 20 in 1"),
        (lambda: fit(values, np.arange(3)), r"numbers is \[3\]"),
        (lambda: fit(values, periods=(9.0, 3.0)), "not 9 and 3"),
        (lambda: fit(line), "lie on a line"),
        (lambda: pc.decompose.fourier_power(missing), "number 3 is not finite"),
        (lambda: pc.decompose.fourier_power(np.ones((9, 4))), "alike"),
        (lambda: pc.decompose.fourier_power(values[:2]), "at least 3"),
        (lambda: pc.decompose.rank_needed(torch.from_numpy(values), lambda _: 0.0, [7]), "between 0 and 6; 7 does not"),
        (lambda: pc.decompose.rank_needed(torch.from_numpy(values), lambda _: 0.0, closed=0.0), "closed"),
        (lambda: pc.decompose.rank_needed(torch.from_numpy(missing), lambda _: 0.0), "the embedding is finite"),
        (lambda: pc.decompose.latent_topography(pca, lambda x: x, (1, 1)), "axes"),
        (lambda: pc.decompose.latent_topography(pca, lambda x: x, (0, 6)), "axes"),
        (lambda: pc.decompose.latent_topography(pca, lambda x: x[:3]), "3 outputs for 961 points"),
        (lambda: match(values, {}), "names none"),
        (lambda: match(missing, {"n": np.arange(20)}), "not all are finite"),
        (lambda: match(values, {"n": np.arange(19)}), "'n' is a finite number for each of 20"),
        (lambda: match(values, {"n": missing[:, 0]}), "'n' is a finite number for each of 20"),
        (lambda: match(values, {"n": np.ones(20)}), "'n' is the same for all"),
        (lambda: match(values, {"n": np.arange(20)}, control=values[:5]), "control has 5 examples"),
        (lambda: match(values, {"n": np.arange(20)}, components=7), "7 components of features"),
        (lambda: match(values, {"n": np.arange(20)}, shuffles=5), "95th percentile"),
        (lambda: match(values[:3], {"n": np.arange(3)}), "too few"),
    ]:
        with pytest.raises(pc.errors.DataError, match=said):
            call()
