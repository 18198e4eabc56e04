"""Weights that are tied, packed or of low precision. Dynamic int8 of torch serves as the quantised network."""

from __future__ import annotations

import copy
import hashlib
import warnings
from typing import Any

import pytest
import torch
from tests.architectures import BERT, GPT2, LLAMA, OPT, SEQUENTIAL, WIDTH
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import patchclamp as pc
from patchclamp.errors import ModelError
from patchclamp.model.blocks import blocks_of
from patchclamp.model.modules import linear_shape
from patchclamp.model.readout import readout_of
from patchclamp.model.weights import is_quantised, projection_weights, tied_weights, weights_sha256


def quantised(module: nn.Module, kinds: set[Any] | None = None, dtype: torch.dtype = torch.qint8) -> nn.Module:
    """The same network with its linear layers in int8."""
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        pytest.skip("this torch has no quantize_dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), kinds or {nn.Linear}, dtype=dtype)


class Linear4bit(nn.Linear):
    """Named and packed as that of bitsandbytes is."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)


# The matrix of a projection ---------------------------------------------------------------------------


@torch.no_grad()
def test_projection_weights_are_a_view_by_inputs_and_outputs() -> None:
    x = torch.randn(3, 4)
    for module in (nn.Linear(4, 6), Conv1D(6, 4)):
        weight = projection_weights(module)
        assert weight.shape == (4, 6)
        assert not weight.requires_grad
        torch.testing.assert_close(x @ weight + module.bias, module(x))
        weight[1] = 0.0
        assert torch.equal(module(x), module(x * torch.tensor([1.0, 0, 1, 1])))


def test_packed_weights_are_refused() -> None:
    packed = quantised(nn.Sequential(nn.Linear(4, 6))).get_submodule("0")
    with pytest.raises(ModelError, match=r"a\.b \(Linear\) is quantised.*cannot be read or edited"):
        projection_weights(packed, "a.b")
    with pytest.raises(ModelError, match="Linear4bit packs its weights"):
        projection_weights(Linear4bit())
    with pytest.raises(ModelError, match="ReLU is no linear layer"):
        projection_weights(nn.ReLU())


def test_what_is_quantised_and_what_is_not() -> None:
    class Held(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)

    for dtype in (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2):
        assert f"its qweight is of type {dtype}" in (is_quantised(Held(dtype)) or "")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert is_quantised(nn.Linear(4, 4, dtype=dtype)) is None
        assert is_quantised(Held(dtype)) is None
    for module in (*BERT.build().modules(), *GPT2.build().modules(), nn.BatchNorm2d(3), nn.LSTM(3, 3)):
        assert is_quantised(module) is None
    assert is_quantised(parametrizations.weight_norm(nn.Linear(4, 4))) is None
    for dtype in (torch.qint8, torch.float16):
        packed = quantised(nn.Sequential(nn.Linear(4, 6), nn.LSTM(4, 3)), {nn.Linear, nn.LSTM}, dtype)
        assert all("packs its weights" in (is_quantised(each) or "") for each in packed.children())


# A quantised network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [BERT, LLAMA, OPT, SEQUENTIAL], ids=str)
def test_a_quantised_network_has_sites_whose_weights_are_not_known(family: Any) -> None:
    exact = family.build()
    packed = quantised(exact)
    sites = pc.load(packed).sites
    assert [name for name in pc.load(exact).sites if "mlp" in name] == [name for name in sites if "mlp" in name]
    for block in blocks_of(packed, sites):
        for name in block.sites:
            assert block.consumers(name) == block.producers(name) == ()
            if sites[name].kind in ("mlp", "attn", "gate"):
                path = sites[name].writes or f"{sites[name].reads['gate'].rpartition('.')[0]}.down_proj"
                assert sites[name].size == (linear_shape(packed.get_submodule(path)) or (0, 0))[0]
                assert "quantised" in block.why_inexact(name)
            if sites[name].kind in ("mlp", "gate"):
                assert "producers" in block.why_incomplete(name)


def test_a_quantised_unembedding_has_no_readout() -> None:
    packed = quantised(LLAMA.build())
    why = readout_of(packed, pc.load(packed).sites)
    assert isinstance(why, str)
    assert "lm_head is quantised" in why


def test_a_quantised_network_with_an_exact_unembedding_has_a_readout() -> None:
    module: Any = LLAMA.build()
    packed: Any = quantised(module)
    packed.lm_head = module.lm_head
    readout = readout_of(packed, pc.load(packed).sites)
    assert not isinstance(readout, str), readout
    assert readout.weight.shape[1] == WIDTH


# Tied weights ------------------------------------------------------------------------------------------


def test_tied_weights_are_found() -> None:
    module: Any = GPT2.build()
    assert tied_weights(module) == [("transformer.wte.weight", "lm_head.weight")]
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.clone())
    assert tied_weights(module) == []
    assert tied_weights(LLAMA.build()) == []

    # Two parameters, one memory; and one module at two places.
    module.lm_head.weight.data = module.transformer.wte.weight.data
    assert tied_weights(module) == [("transformer.wte.weight", "lm_head.weight")]
    shared = nn.Linear(3, 3)
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    assert tied_weights(twice) == [("0.weight", "2.weight"), ("0.bias", "2.bias")]


def test_what_has_no_memory_is_tied_by_identity() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert tied_weights(module) == []
    module[1].weight = module[0].weight
    assert tied_weights(module) == [("0.weight", "1.weight")]
    empty = nn.Sequential(nn.LazyLinear(2), nn.LazyLinear(2))
    empty.register_parameter("first", nn.Parameter(torch.empty(0)))
    empty.register_parameter("second", nn.Parameter(torch.empty(0)))
    assert tied_weights(empty) == []


# The hash of all weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_the_hash_tells_one_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module: Any = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    module[0].weight.data = module[0].weight.data.to(dtype)
    first = weights_sha256(module)
    assert weights_sha256(copy.deepcopy(module)) == first
    module[0].weight.data.view(torch.uint8)[2, 1] ^= 1
    assert weights_sha256(module) != first
    module[0].weight.data.view(torch.uint8)[2, 1] ^= 1
    assert weights_sha256(module) == first
    module[1].running_mean[3] = 0.5
    assert weights_sha256(module) != first


def test_the_hash_is_that_of_the_bytes() -> None:
    module = SEQUENTIAL.build()
    expected = hashlib.sha256()
    for name, each in module.state_dict().items():
        expected.update(f"{name} {tuple(each.shape)} torch.float32\n".encode() + each.numpy().tobytes())
    assert weights_sha256(module) == expected.hexdigest()


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("path", ["0", "1"])
def test_different_packed_weights_have_different_hashes(path: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.LSTM(4, 3))
    first = weights_sha256(quantised(module, {nn.Linear, nn.LSTM}, dtype))
    assert weights_sha256(quantised(module, {nn.Linear, nn.LSTM}, dtype)) == first
    weight = next(module.get_submodule(path).parameters())
    changed = copy.deepcopy(module)
    with torch.no_grad():
        next(changed.get_submodule(path).parameters())[1, 2] -= weight[1, 2] / 3
    assert weights_sha256(quantised(changed, {nn.Linear, nn.LSTM}, dtype)) != first
    if dtype == torch.qint8:
        # The same integers, another scale.
        with torch.no_grad():
            next(changed.get_submodule(path).parameters()).copy_(2 * weight)
        assert weights_sha256(quantised(changed, {nn.Linear, nn.LSTM}, dtype)) != first
        assert quantised(changed)[0].weight().int_repr().equal(quantised(module)[0].weight().int_repr())  # type: ignore[index]


def test_the_hash_of_weights_without_values_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ModelError, match=r"0\.weight is on the device 'meta'"):
        weights_sha256(module)


def test_per_channel_scales_enter_the_hash() -> None:
    class Holder(nn.Module):
        def __init__(self, scales: list[float]) -> None:
            super().__init__()
            whole = torch.arange(6.0).reshape(2, 3) * torch.tensor(scales)[:, None]
            zeros = torch.zeros(2, dtype=torch.int64)
            self.register_buffer(
                "weight", torch.quantize_per_channel(whole, torch.tensor(scales), zeros, 0, torch.qint8)
            )

    first, second = Holder([1.0, 2.0]), Holder([1.0, 4.0])
    assert first.weight.int_repr().equal(second.weight.int_repr())  # type: ignore[operator]
    assert weights_sha256(first) != weights_sha256(second)
    assert "its weight is of type torch.qint8" in (is_quantised(first) or "")
