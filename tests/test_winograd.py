"""Convolutions by other methods against PyTorch's direct ones."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import models.winograd
from models.winograd import Conv3x3, WinogradConvolution, two_wide

# Edges that no tile ends at, a tile alone, images two wide and narrower, in
# twos and threes, and more channels than are transformed at once.
SHAPES = [
    (2, 3, 7, 5), (1, 2, 1, 1), (3, 5, 9, 2), (2, 70, 16, 8), (5, 2, 4, 3)
]  # fmt: skip


def draw(*shape):
    return torch.randn(shape, requires_grad=True)


def have_instructions(kind, monkeypatch):
    """A processor with instructions for bf16: none, of vectors, of tiles."""
    has = {
        "_is_avx512_bf16_supported": kind != "none",
        "_is_amx_tile_supported": kind == "tiles",
    }
    for name, value in has.items():
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part_values", [1, 10**6])
def test_values_and_gradients_are_those_of_a_direct_convolution(
    shape, part_values, monkeypatch
):
    # 1: as many parts as there can be, of three tiles where rows have fewer.
    monkeypatch.setattr(models.winograd, "PART_VALUES", part_values)
    torch.manual_seed(0)
    inputs = draw(*shape), draw(3, shape[1], 3, 3)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found = WinogradConvolution.apply(*inputs, torch.float32)
    expected = F.conv2d(*exact, padding=1)
    gradient = torch.randn_like(found)
    of_found = torch.autograd.grad(found, inputs, gradient)
    of_expected = torch.autograd.grad(expected, exact, gradient.double())
    for a, b in zip((found, *of_found), (expected, *of_expected)):
        assert a.shape == b.shape
        assert (a - b).norm() < 1e-5 * b.norm()


def test_parts_are_as_large_as_they_may_but_no_smaller_than_channels(
    monkeypatch,
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    small = models.winograd.Tiling(torch.empty(5, 1, 8, 2))
    assert list(small.parts(64, 64)) == [range(0, 10)]
    # 100 rows of tiles, of 20 each.
    large = models.winograd.Tiling(torch.empty(5, 1, 80, 80))
    # 22 tiles are a row, but 60 are three.
    assert list(large.parts(2000, 60))[:2] == [range(0, 3), range(3, 6)]
    assert list(large.parts(2000, 60))[-1] == range(99, 100)
    assert len(list(large.parts(2000, 400))) == 5
    monkeypatch.setattr(torch, "get_num_threads", lambda: 72)
    assert len(list(large.parts(2000, 60))) == 3


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_in_fp32_it_stays_within_rounding(layout):
    torch.manual_seed(0)
    layer = Conv3x3(256, 128)
    x = torch.randn(2, 256, 21, 8)
    x = x.to(memory_format=getattr(torch, layout))
    exact = F.conv2d(x.double(), layer.weight.double(), padding=1)
    found = layer(x)
    assert "Winograd" in type(found.grad_fn).__name__
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - exact).norm() < 1e-5 * exact.norm()
    gradient = torch.randn_like(found)
    of_weight = torch.autograd.grad(found, layer.weight, gradient)[0]
    expected = torch.nn.grad.conv2d_weight(
        x.double(), layer.weight.shape, gradient.double(), padding=1
    )
    assert (of_weight - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("of_x", "of_weight", "expected"),
    [
        (True, False, ["inputs"]),
        (False, True, ["inputs", "gradients"]),
        (True, True, ["inputs", "inputs", "gradients"]),
    ],
)
def test_no_gradient_is_computed_in_vain(
    of_x, of_weight, expected, monkeypatch
):
    x, weight = draw(1, 2, 4, 4), draw(3, 2, 3, 3)
    x.requires_grad_(of_x)
    weight.requires_grad_(of_weight)
    found = WinogradConvolution.apply(x, weight, x.dtype)
    planes_of, seen = models.winograd.Tiling.planes_of, []

    def noted(tiling, images, part, matrices):
        seen.append(matrices)
        return planes_of(tiling, images, part, matrices)

    monkeypatch.setattr(models.winograd.Tiling, "planes_of", noted)
    found.sum().backward()
    assert seen == expected


@pytest.mark.skipif(os.cpu_count() == 1, reason="Numba has one thread then")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_stays_as_it_was(threads):
    """Numba and PyTorch may have the same OpenMP."""
    code = (
        "import torch; from models.winograd import Conv3x3;"
        f"torch.set_num_threads({threads});"
        "Conv3x3(64, 8)(torch.ones(1, 64, 8, 8));"
        "print(torch.get_num_threads())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    assert printed.split() == [str(threads)]


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last]
)
@pytest.mark.parametrize("shape", [(3, 5, 9, 2), (2, 3, 1, 2), (0, 4, 2, 2)])
def test_images_two_wide_are_a_product_of_matrices(shape, layout):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    x = x.to(memory_format=layout).requires_grad_()
    weight = torch.randn(7, shape[1], 3, 3).double().requires_grad_()
    found, expected = two_wide(x, weight), F.conv2d(x, weight, padding=1)
    gradient = torch.randn_like(expected)
    of_found = torch.autograd.grad(found, (x, weight), gradient)
    of_expected = torch.autograd.grad(expected, (x, weight), gradient)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip((found, *of_found), (expected, *of_expected)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_that_is_one_product_of_all_images(with_gradients):
    """One for each image, over rows that overlap, takes ten times as long."""
    x, weight = torch.randn(3, 5, 9, 2), draw(7, 5, 3, 3)
    with (
        FlopCounterMode(display=False) as counter,
        torch.set_grad_enabled(with_gradients),
    ):
        two_wide(x, weight)
    flop = 2 * (3 * 9) * (5 * 3 * 2) * (7 * 2)
    assert counter.get_flop_counts()["Global"] == {torch.ops.aten.mm: flop}


def test_no_images_have_no_gradient():
    layer = Conv3x3(64, 8)
    layer(torch.empty(0, 64, 8, 8)).sum().backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_it_computes_in_fp32(autocast, monkeypatch):
    have_instructions("none", monkeypatch)
    torch.manual_seed(0)
    layer = Conv3x3(64, 32)
    x = torch.randn(2, 64, 9, 6).bfloat16().requires_grad_()
    if not autocast:
        layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x)
        of_x, of_weight = torch.autograd.grad(
            found, (x, layer.weight), torch.ones_like(found)
        )
    assert found.dtype == of_x.dtype == torch.bfloat16
    assert of_weight.dtype == layer.weight.dtype
    exact_x = x.detach().double().requires_grad_()
    weight = layer.weight.detach().double().requires_grad_()
    exact = F.conv2d(exact_x, weight, padding=1)
    exact.sum().backward()
    for a, b in (
        (found, exact), (of_x, exact_x.grad), (of_weight, weight.grad)
    ):  # fmt: skip
        # Rounded once, at the end.
        bound = 2**-9 if a.dtype == torch.bfloat16 else 1e-5
        assert (a - b).norm() < bound * b.norm()


@pytest.mark.parametrize(
    ("instructions", "channels", "expected"),
    [
        ("none", 64, True),
        ("vectors", 64, False),
        ("vectors", 255, False),
        ("vectors", 256, True),
        ("tiles", 256, False),
    ],
)
def test_what_is_faster_in_bf16_depends_on_the_processor(
    instructions, channels, expected, monkeypatch
):
    have_instructions(instructions, monkeypatch)
    layer, x = Conv3x3(channels, 8), torch.randn(1, channels, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        direct = F.conv2d(x, layer.weight, padding=1)
    assert torch.equal(found, direct) != expected
    assert ("Winograd" in type(found.grad_fn).__name__) == expected
    # In fp32 it does not.
    assert "Winograd" in type(layer(x).grad_fn).__name__


@pytest.mark.parametrize(
    ("instructions", "width", "method"),
    [
        ("none", 2, "Winograd"),
        ("vectors", 2, "two_wide"),
        ("vectors", 3, "Winograd"),
        ("tiles", 2, "Convolution"),
    ],
)
def test_images_two_wide_have_their_method_in_bf16(
    instructions, width, method, monkeypatch
):
    have_instructions(instructions, monkeypatch)
    seen = []

    def noted(x, weight):
        seen.append("two_wide")
        return two_wide(x, weight)

    monkeypatch.setattr(models.winograd, "two_wide", noted)
    layer, x = Conv3x3(256, 32), torch.randn(2, 256, 5, width)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    seen.append(type(found.grad_fn).__name__)
    assert method in seen[0]
    assert found.dtype == torch.bfloat16
    exact = F.conv2d(x.double(), layer.weight.double(), padding=1)
    # Three roundings: images, weights and sums.
    assert (found - exact).norm() < 3 * 2**-9 * exact.norm()
    assert "Winograd" in type(layer(x).grad_fn).__name__
    assert seen.count("two_wide") == (method == "two_wide")


def test_what_is_faster_directly_is_left_to_pytorch():
    few, narrow = torch.randn(1, 32, 8, 8), Conv3x3(32, 64)
    assert torch.equal(narrow(few), F.conv2d(few, narrow.weight, padding=1))
    x, wide = torch.randn(1, 64, 8, 8).double(), Conv3x3(64, 8).double()
    assert torch.equal(wide(x), F.conv2d(x, wide.weight, padding=1))
