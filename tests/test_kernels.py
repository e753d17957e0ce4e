"""The compiled loops, and what a GPU has in their place, against NumPy."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

from curation import kernels, products, tally
from curation.tally import EDGES

SHAPES = [(1, 1), (3, 7), (5, 8), (40, 77)]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def exact_on(side, audio, text, flat):
    """Similarities as a device's functions have them, on this one."""
    if side == "gpu":
        return products._dots_on_gpu(audio, text, *np.divmod(flat, len(text)))
    rows, kept = (products.Rows(0, x, 1.0, 0.0, 1.0, x) for x in (audio, text))
    again = dataclasses.replace(kept, exact=lambda: text)
    scratch = products.Scratch()
    found, of_again = (
        products.exact_of(rows, block, flat, scratch) for block in (kept, again)
    )
    np.testing.assert_array_equal(found, of_again)
    return found[2]


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_that_reach_a_limit(rng, shape, dtype):
    ends = np.iinfo(dtype)
    values = rng.integers(ends.min, ends.max, shape, dtype)
    for limit in (ends.min, -5, values[-1, -1], ends.max):
        for rows in (np.arange(len(values)), np.arange(0, len(values), 2)):
            hits = np.full(values.size, -1, np.int32)
            count = kernels.reaching(values, rows, dtype(limit), hits)
            expected = np.zeros(shape, bool)
            expected[rows] = values[rows] >= limit
            expected = np.flatnonzero(expected)
            np.testing.assert_array_equal(hits[:count], expected)
            assert (hits[count:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("limit", [-np.inf, -0.25, 0.0, 0.25, 0.6, np.inf])
def test_what_reaches_a_limit_in_each_format(rng, dtype, limit):
    """Bits of positive numbers are compared as integers."""
    values = torch.from_numpy(np.round(rng.normal(0, 0.4, (33, 50)), 2))
    if dtype == torch.int32:
        values, limit = 1000 * values, 1000 * limit
    values = values.to(dtype)
    scratch = products.Scratch()
    found = products.reaching(values, np.arange(33), limit, scratch)
    # 0.6 is no bf16 number: the next one below it is the limit.
    if dtype == torch.bfloat16 and np.isfinite(limit):
        limit = products._bf16_below(limit).item()
    flat = values.double().numpy().ravel()
    limit = np.float32(limit) if dtype == torch.float32 else limit
    np.testing.assert_array_equal(found, np.flatnonzero(flat >= limit))


@pytest.mark.parametrize("side", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_and_the_highest(rng, shape, dtype, side):
    """Also of what is below the first bin and above the last."""
    unit = 2.0**-10 if dtype == torch.int32 else 1.0
    # In the middle of a bin: neither way rounds it out of there.
    steps = rng.integers(-150, 250, shape)
    steps[0] = steps[:, 0] = -40  # a row and a column below 0
    values = ((steps + 0.5) / 100 / unit).round(0 if unit < 1 else 6)
    product = torch.from_numpy(values).to(dtype)
    copy, scratch = product.clone(), products.Scratch()
    bins, *best = (
        tally._binned_on_cpu(copy, unit)
        if side == "cpu"
        else tally._binned_on_gpu(copy, unit, scratch)
    )
    expected = np.bincount(
        steps.clip(-100, 100).ravel() + 100, minlength=len(EDGES)
    )
    np.testing.assert_array_equal(bins, expected)
    highest = [unit * product.numpy().max(axis=axis) for axis in (1, 0)]
    assert torch.equal(copy, product)  # it is looked through afterwards
    for found, wanted in zip(best, highest):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("side", ["cpu", "gpu"])
@pytest.mark.parametrize("formats", ["hh", "hf", "fh", "ff"])
def test_dot_products_are_not_rounded(rng, side, formats):
    """Small numbers among large ones, fp16's smallest too."""
    kinds = {"h": torch.float16, "f": torch.float32}
    sides = []
    for kind in formats:
        values = rng.normal(0, 0.2, (9, 37)) * 2.0 ** rng.integers(-15, 1, 37)
        values = np.rint(values.clip(-0.99, 0.99) * 2**24) / 2**24
        sides.append(torch.from_numpy(values).to(kinds[kind]))
    flat = np.sort(rng.integers(0, 81, 40))
    for value, pair in zip(exact_on(side, *sides, flat), flat):
        i, j = divmod(pair, 9)
        products = zip(sides[0][i].tolist(), sides[1][j].tolist())
        exact = sum(Fraction(a) * Fraction(b) for a, b in products)
        assert Fraction(float(value)) == exact
