"""Activation coverage and the simple scores beside it, on classifiers whose neurons are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from torch import nn

import patchclamp as pc
from patchclamp.find.activation_coverage import ActivationCoverage, activation_coverage
from patchclamp.find.out_of_distribution import Mahalanobis, classify, detection_auroc, energy, maximum_softmax


def seeded(make: type[nn.Module], *given: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*given).eval()


class Mlp(nn.Module):
    """8 neurons between 5 numbers and 3 classes, and dropout behind them."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(5, 8), nn.GELU(), nn.Linear(8, classes)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(self.act(self.up(x))))


class Cnn(nn.Module):
    """4 channels that are pooled after a nonlinearity that writes in place; a side branch that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.aside, self.head = nn.Conv2d(1, 4, 3), nn.ReLU(True), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.act(self.conv(x)).amax((2, 3))
        self.aside(pooled)
        return self.head(pooled)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# States ---------------------------------------------------------------------------------------------


def test_the_state_of_a_neuron_by_hand() -> None:
    """Of linear logits W z the slope is W' (p - 1/C)."""
    net, x = seeded(Mlp), gaussian(40, 5)
    with torch.no_grad():
        z = net.act(net.up(x))  # type: ignore[operator]
        slope = (net(x).softmax(1) - 1 / 3) @ net.down.weight  # type: ignore[operator]
    for state, expected in [("product", z * slope), ("activation", z), ("gradient", slope)]:
        found = activation_coverage(net, x, "module:act", alpha=7.0, full_count=1, state=state)
        np.testing.assert_allclose(found.states(x)["module:act"], torch.sigmoid(7 * expected), atol=1e-6)


def test_pixels_are_averaged_before_they_are_multiplied() -> None:
    net, x = seeded(Cnn), gaussian(300, 1, 9, 9)
    z = net.conv(x).detach().requires_grad_()  # type: ignore[operator]
    logits = net.head(z.relu().amax((2, 3)))  # type: ignore[operator]
    (slope,) = torch.autograd.grad(-logits.log_softmax(1).mean(1).sum(), z)
    expected = torch.sigmoid(1e3 * z.mean((2, 3)) * slope.mean((2, 3)))
    site = pc.Site.custom("conv", axis=1)
    found = activation_coverage(net, x, site, alpha=1e3)
    np.testing.assert_allclose(found.states(x)[site.name], expected.detach(), atol=1e-5)
    assert found.examples == 300 and found.counts[site.name].shape == (4, 50)
    summed = activation_coverage(net, x, site, alpha=1e3 / 49**2, pool="sum").states(x)[site.name]
    np.testing.assert_allclose(summed, expected.detach(), atol=1e-5)
    first = activation_coverage(net, x, site, alpha=1e3, pool="first").states(x)[site.name]
    np.testing.assert_allclose(first, torch.sigmoid(1e3 * (z * slope)[..., 0, 0]).detach(), atol=1e-5)


def test_a_frozen_network_is_read_and_none_is_changed() -> None:
    net, x = seeded(Mlp), gaussian(10, 5)
    before = activation_coverage(net, x, "module:act", full_count=1).states(x)
    assert all(each.grad is None for each in net.parameters())
    for each in net.parameters():
        each.requires_grad_(False)
    after = activation_coverage(net.train(), x, "module:act", full_count=1).states(x)
    np.testing.assert_allclose(before["module:act"], after["module:act"], atol=1e-12)
    assert net.training and not any(each._forward_hooks or each._forward_pre_hooks for each in net.modules())
    assert not any(each.requires_grad for each in net.parameters())


# Counts ---------------------------------------------------------------------------------------------


class Given(nn.Module):
    """Its neurons are what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.neurons, self.head = nn.Identity(), nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neurons(x))


def test_coverage_by_hand() -> None:
    """One neuron, two bins of which two examples fill one, and counts of 1 and 3: 0.5 and 1, together 0.75."""
    x = torch.tensor([[-1.0], [1.0], [2.0], [0.0]])  # sigmoid(0) is where the upper bin begins
    found = activation_coverage(seeded(Given), x, "module:neurons", bins=2, full_count=2, alpha=1.0, state="activation")
    assert found.counts["module:neurons"].tolist() == [[1, 3]]
    assert found.phi("module:neurons").tolist() == [[0.5, 1.0]]
    assert found.coverage() == 0.75 and found.coverage_by_site() == {"module:neurons": 0.75}
    assert found.score(torch.tensor([[3.0], [-3.0], [9e9]])).tolist() == [1.0, 0.5, 1.0]
    assert found.neurons().names == ["module:neurons:0"] and found.neurons()["score"][0] == 0.75


def test_counts_and_scores_are_those_of_a_histogram_for_each_neuron() -> None:
    net, known, other = seeded(Mlp), gaussian(400, 5), gaussian(50, 5, seed=1)
    found = activation_coverage(net, known, "module:act", bins=6, full_count=100, alpha=5.0)
    states, edges = found.states(known)["module:act"], found.edges["module:act"]
    counts = np.stack([np.histogram(each, edges)[0] for each in states.T])
    np.testing.assert_array_equal(found.counts["module:act"], counts)
    places = np.stack([np.digitize(each, edges[1:-1]) for each in found.states(other)["module:act"].T], 1)
    phi = np.minimum(counts / 100, 1)
    assert 0.1 < (phi == 1).mean() < 0.9
    np.testing.assert_allclose(found.score(other), [phi[np.arange(8), each].mean() for each in places])
    frame = found.neurons().to_polars().sort("index")
    np.testing.assert_allclose(frame["score"], phi.mean(1))


def test_parts_add_up_to_the_whole() -> None:
    net, x = pc.load(seeded(Mlp)), gaussian(400, 5)
    whole = activation_coverage(net, x, "module:act", alpha=5.0)
    sum_of_parts = activation_coverage(net, x[:130], "module:act", alpha=5.0) + activation_coverage(
        net, x[130:], "module:act", alpha=5.0
    )
    np.testing.assert_array_equal(whole.counts["module:act"], sum_of_parts.counts["module:act"])
    assert whole.counts["module:act"].sum(1).tolist() == [400] * 8
    np.testing.assert_array_equal(whole.score(x), sum_of_parts.score(x))
    assert sum_of_parts.examples == 400


def test_scores_are_in_the_order_of_the_data_and_averaged_over_sites() -> None:
    net, x = seeded(Mlp), gaussian(300, 5)
    found = activation_coverage(net, x, ["module:up", "module:act"], alpha=5.0)
    by_site = found.score_by_site(x)
    np.testing.assert_allclose(found.score(x), (by_site["module:up"] + by_site["module:act"]) / 2)
    np.testing.assert_array_equal(found.score(x[250:]), found.score(x)[250:])
    assert by_site["module:up"].std() > 0
    assert found.coverage() == pytest.approx(np.mean(list(found.coverage_by_site().values())))


def test_settings_by_site_and_bins_that_crowd_in_the_middle() -> None:
    net, x = seeded(Mlp), gaussian(200, 5)
    bins = {"module:up": 4, "module:act": 10}
    found = activation_coverage(net, x, list(bins), bins=bins, full_count={"module:up": 3, "module:act": 7})
    assert {name: each.shape[1] for name, each in found.counts.items()} == bins
    assert found.full_count == {"module:up": 3, "module:act": 7}
    uniform = activation_coverage(net, x, "module:up", bins=4, spacing="uniform").edges["module:up"]
    assert uniform.tolist() == [0, 0.25, 0.5, 0.75, 1]
    edges = activation_coverage(net, x, "module:up", bins=8).edges["module:up"]
    # Equal steps of y from 1 to the root of 1000, where log(y) / log(1000) is 1/2.
    assert edges[:5] == pytest.approx(np.log(np.linspace(1, np.sqrt(1000), 5)) / np.log(1000))
    np.testing.assert_allclose(edges, 1 - edges[::-1], atol=1e-12)


def test_examples_are_drawn_by_the_seed() -> None:
    net, x = seeded(Mlp), gaussian(300, 5)
    one, two, other = (activation_coverage(net, x, "module:act", examples=100, seed=each) for each in (1, 1, 2))
    assert one.examples == 100
    np.testing.assert_array_equal(one.counts["module:act"], two.counts["module:act"])
    assert not np.array_equal(one.counts["module:act"], other.counts["module:act"])


# Texts ----------------------------------------------------------------------------------------------


def test_of_texts_the_tokens_are_averaged_without_padding() -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    config.num_labels = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = BertForSequenceClassification(config).eval()
    model = pc.load(net, tokenizer=BertTokenizer(vocab={word: number for number, word in enumerate(words)}))
    texts = ["a b c d a b", "c", "b a", "d d d d"]
    together = activation_coverage(model, texts, "mlp.0", full_count=1, alpha=3.0, state="activation")
    found = together.states(texts)["mlp.0"]
    for text, state in zip(texts, found, strict=True):
        alone = model.activations(text, "mlp.0")[1:-1].mean(0)
        np.testing.assert_allclose(state, torch.sigmoid(3 * alone), atol=1e-5)
    summed = activation_coverage(model, texts, "mlp.0", full_count=1, alpha=3.0, state="activation", pool="sum")
    alone = model.activations(texts[0], "mlp.0")[1:-1].sum(0)
    np.testing.assert_allclose(summed.states(texts)["mlp.0"][0], torch.sigmoid(3 * alone), atol=1e-5)
    first = activation_coverage(model, texts, "mlp.0", full_count=1, alpha=3.0, state="activation", pool="first")
    alone = model.activations(texts[2], "mlp.0")[1]
    np.testing.assert_allclose(first.states(texts)["mlp.0"][2], torch.sigmoid(3 * alone), atol=1e-5)
    sloped = activation_coverage(model, texts, "mlp.0", full_count=1, alpha=1e6)
    one_by_one = np.concatenate([sloped.states([each])["mlp.0"] for each in texts])
    np.testing.assert_allclose(sloped.states(texts)["mlp.0"], one_by_one, atol=1e-3)


# What it is for -------------------------------------------------------------------------------------


class Cancels(nn.Module):
    """Tells the sign of the first number; 6 neurons also carry the second, which cancels in the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.head = nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)
        with torch.no_grad():
            self.up.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]] * 3))
            self.up.bias.fill_(15.0)  # so large that none is ever silent
            self.head.weight.copy_(torch.tensor([[1.0] * 6, [-1.0] * 6]) / 6)
            self.head.bias.copy_(torch.tensor([-15.0, 15.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.up(x)))


def classes(examples: int, seed: int, ignored: float = 0.0) -> torch.Tensor:
    made = np.random.default_rng(seed)
    centre = np.where(made.random(examples) < 0.5, -4.0, 4.0)
    return torch.from_numpy(np.stack([made.normal(centre), made.normal(ignored, size=examples)], 1).astype(np.float32))


def test_what_the_classifier_ignores_is_seen_and_more_of_the_same_is_not() -> None:
    net = Cancels()
    inside, outside = classes(1000, 1), classes(1000, 2, ignored=6.0)
    found = activation_coverage(
        net, classes(3000, 0), "module:act", bins=50, full_count=20, alpha=0.5, spacing="uniform"
    )
    told = detection_auroc(found.score(inside), found.score(outside))
    same = detection_auroc(found.score(inside), found.score(classes(1000, 3)))
    blind = detection_auroc(*(maximum_softmax(classify(net, each).logits) for each in (inside, outside)))
    print(f"known against 6 sigma in an ignored direction {told:.3f}, maximum softmax {blind:.3f}; the same {same:.3f}")
    assert told >= 0.95
    assert abs(same - 0.5) <= 0.05
    assert abs(blind - 0.5) <= 0.05


# Simple scores --------------------------------------------------------------------------------------


def test_simple_scores_by_hand() -> None:
    logits = np.asarray([[0.0, np.log(3)], [2.0, 2.0]])
    np.testing.assert_allclose(maximum_softmax(logits), [0.75, 0.5])
    np.testing.assert_allclose(energy(logits), [np.log(4), 2 + np.log(2)])
    np.testing.assert_allclose(energy(logits, 2.0), [2 * np.log(1 + np.sqrt(3)), 2 + 2 * np.log(2)])
    assert detection_auroc(np.asarray([3.0, 2.0]), np.asarray([1.0, 2.0])) == 0.875


def test_mahalanobis_is_that_of_scikit_learn() -> None:
    made = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = made.standard_normal((90, 4)) @ made.standard_normal((4, 4)) + labels[:, None] * [3, 0, -1, 2]
    fitted = Mahalanobis.fit(features, labels)
    means = np.stack([features[labels == each].mean(0) for each in range(3)])
    reference = EmpiricalCovariance(assume_centered=True).fit(features - means[labels])
    points = made.standard_normal((7, 4)) * 3
    distances = np.stack([reference.mahalanobis(points - mean) for mean in means], 1)
    np.testing.assert_allclose(fitted.score(points), -distances.min(1))
    still = np.concatenate([features, np.full((90, 1), 2.0)], axis=1)  # a neuron that never changes says nothing
    held = Mahalanobis.fit(still, labels).score(np.concatenate([points, np.full((7, 1), 2.0)], 1))
    np.testing.assert_allclose(held, fitted.score(points))


def test_classify_reads_logits_and_neurons_in_order() -> None:
    net, x = seeded(Mlp), gaussian(300, 5)
    found = classify(net, x, "module:act")
    np.testing.assert_allclose(found.logits, net(x).detach(), atol=1e-6)
    np.testing.assert_allclose(found.values["module:act"], net.act(net.up(x)).detach(), atol=1e-6)  # type: ignore[operator]


# Errors ---------------------------------------------------------------------------------------------


def test_bad_input_is_said() -> None:
    net, x = seeded(Mlp), gaussian(60, 5)
    for given, match in [
        ({"sites": "module:app"}, "nearest: up"),
        ({"state": "both"}, "product, activation, gradient"),
        ({"spacing": "zzz"}, "middle, uniform"),
        ({"pool": "zzz"}, "mean, sum, first"),
        ({"bins": 1}, "bins of module:act is a whole number, at least 2"),
        ({"bins": 2.5}, "whole number"),
        ({"alpha": 0}, "alpha of module:act is above 0"),
        ({"full_count": 0.5}, "at least 1"),
        ({"alpha": {"module:up": 1.0}}, "nearest: module:up|alpha is for sites that are read"),
        ({"alpha": {}}, "alpha says nothing of module:act"),
        ({"examples": 61}, "there are 60"),
        ({"data": torch.full((3, 5), torch.nan), "full_count": 1}, "on example 0 a state is not a finite number"),
    ]:
        arguments = {"model": net, "data": x, "sites": "module:act"} | given
        with pytest.raises(pc.errors.PatchclampError, match=match):
            activation_coverage(**arguments)
    with pytest.raises(pc.errors.ModelError, match="one logit"):
        activation_coverage(seeded(Mlp, 1), x, "module:act")
    with pytest.raises(pc.errors.ModelError, match="module:aside is not on the way to the logits"):
        activation_coverage(seeded(Cnn), gaussian(3, 1, 9, 9), "module:aside")
    with pytest.raises(pc.errors.SiteNotReached, match="module:act"):
        activation_coverage(Skips(), x, "module:act")
    with pytest.raises(pc.errors.ModelError, match=r"gives logits \[examples, classes\]; .* gives \[60, 5, 1\]"):
        activation_coverage(nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Identity()), x, "module:1")
    with pytest.raises(pc.errors.ModelError, match="2 times"):
        twice = nn.Identity()
        activation_coverage(nn.Sequential(twice, nn.Linear(5, 5), twice), x, "module:0")
    with pytest.raises(pc.errors.DataError, match="temperature"):
        energy(np.zeros((2, 2)), 0)
    with pytest.raises(pc.errors.DataError, match="two classes at least"):
        maximum_softmax(np.zeros((4, 1)))
    with pytest.raises(pc.errors.DataError, match="3 labels"):
        Mahalanobis.fit(np.zeros((4, 2)), [0, 1, 1])


class Skips(Mlp):
    """Has a module that it never calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def test_too_few_examples_to_fill_a_bin_is_said() -> None:
    with pytest.warns(UserWarning, match="module:act: 30 examples were seen, and 50 fill a bin"):
        activation_coverage(seeded(Mlp), gaussian(30, 5), "module:act")


def test_coverages_that_differ_do_not_add_up() -> None:
    net, x = pc.load(seeded(Mlp)), gaussian(60, 5)

    def made(model: pc.Model = net, site: str = "module:act", **how: object) -> ActivationCoverage:
        return activation_coverage(model, x, site, **how)  # type: ignore[arg-type]

    others = {
        "state": made(state="gradient"),
        "alpha": made(alpha=3.0),
        "bins": made(bins=9),
        "model": made(pc.load(seeded(Mlp))),
        "alpha|bins": made(site="module:up"),
    }
    for what, other in others.items():
        with pytest.raises(pc.errors.DataError, match=f"differ in their ({what})"):
            _ = made() + other
