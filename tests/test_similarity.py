"""The blocked search against a naive float64 product, and exact fractions."""

import concurrent.futures
import contextlib
import itertools
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import assert_pairs, search, unit

from curation import fastest, products, similarity, tally
from curation.similarity import keep_best, pairs_over
from curation.tally import EDGES, Tally

THRESHOLD = 0.75
count_threads = torch.get_num_threads  # tests replace PyTorch's
BLOCKS = [(1, 64), (7, 200), (64, 33), (4000, 4096)]
PRECISIONS = ["fp32", "bf16", "int8"]


def vectors_near(threshold, n_audio=300, n_text=200, width=64):
    """Each audio row has a similarity of about the threshold to some text."""
    rng = np.random.default_rng(3)
    text = unit(rng.standard_normal((n_text, width)))
    near = text[rng.integers(0, n_text, n_audio)]
    away = rng.standard_normal((n_audio, width))
    away = unit(away - (away * near).sum(1, keepdims=True) * near)
    cosine = threshold + rng.uniform(-1e-4, 1e-4, (n_audio, 1))
    audio = cosine * near + np.sqrt(1 - cosine**2) * away
    return audio.astype(np.float16), text.astype(np.float16)


@pytest.fixture(scope="module")
def vectors():
    return vectors_near(THRESHOLD)


@pytest.fixture(scope="module")
def naive(vectors):
    audio, text = (v.astype(np.float64) for v in vectors)
    return audio @ text.T


@pytest.mark.parametrize("with_report", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("audio_bs, text_bs", BLOCKS)
def test_pairs_are_those_of_a_naive_product(
    vectors, naive, audio_bs, text_bs, precision, with_report
):
    assert (np.abs(naive - THRESHOLD) < 1e-4).sum() > 100
    found = search(
        vectors,
        THRESHOLD,
        with_report=with_report,
        audio_bs=audio_bs,
        text_bs=text_bs,
        precision=precision,
    )
    assert 50 < len(found[0]) < 250
    assert_pairs(found, naive, THRESHOLD)


def low_rank(vectors, count=8, scale=0.1):
    """Vectors that lie near a few axes, as those of a trained model."""
    rng = np.random.default_rng(4)
    axes = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    scales = np.where(np.arange(64) < count, 1, scale)
    moved = [unit(v.astype(np.float64) * scales @ axes) for v in vectors]
    return [v.astype(np.float16) for v in moved]


def fastest_of(vectors, threshold, **kwargs):
    return fastest.fastest_product(*vectors, threshold, **kwargs)


@pytest.fixture
def costs(monkeypatch):
    """Set what a dimension costs in each format and to decide.

    Not the clock.
    """

    def set_costs(decision=0.0, preparing=0.0, **formats):
        times = {products.PRECISIONS[n]: t for n, t in formats.items()}
        monkeypatch.setattr(
            fastest,
            "product_seconds",
            lambda dtype, width, device, enough: width * times[dtype],
        )
        monkeypatch.setattr(
            fastest,
            "_decision_seconds",
            lambda audio, text, device: audio.shape[1] * decision,
        )
        clock = itertools.count(step=preparing)
        monkeypatch.setattr(fastest.time, "perf_counter", clock.__next__)

    return set_costs


@pytest.fixture
def take_axes(costs, monkeypatch):
    """Axes in that number."""

    def take(vectors, count):
        monkeypatch.setattr(fastest, "_NUM_AXES", (count,))
        costs(fp32=1.0)
        return fastest_of(vectors, 0.9, precision="fp32")[1]

    return take


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [1, 7, 15])
def test_fewer_dimensions_find_the_same_pairs(
    vectors, take_axes, count, precision
):
    low = low_rank(vectors)
    low[1][3] = 0
    axes = take_axes(low, count)
    assert axes.shape == (64, count)
    naive = low[0].astype(np.float64) @ low[1].astype(np.float64).T
    for limit in np.sort(naive[naive > 0.9])[:20]:
        for audio_bs, text_bs in BLOCKS[2:]:
            found = search(
                low, limit, audio_bs=audio_bs, text_bs=text_bs,
                precision=precision, axes=axes,
            )  # fmt: skip
            assert_pairs(found, naive, limit)


@pytest.mark.parametrize("scale", [0.02, 0.3, 1])
def test_axes_are_orthonormal_and_products_bounded(vectors, take_axes, scale):
    low = low_rank(vectors, scale=scale)
    axes = take_axes(low, 7)
    torch.testing.assert_close(
        axes.T @ axes, torch.eye(7, dtype=torch.float64), atol=1e-12, rtol=0
    )
    sides = [torch.from_numpy(v).double() for v in low]
    turned = products.turned_axes(axes)
    short = [
        products.shortened(side, turned, products.Scratch()) for side in sides
    ]
    bounds, exact = short[0] @ short[1].T, sides[0] @ sides[1].T
    assert (bounds >= exact - 1e-12).all()
    away = [
        torch.linalg.vector_norm(side - side @ axes @ axes.T, dim=1)
        for side in sides
    ]
    # As near as the residuals allow: with none left, they are equal.
    gap = 2 * (away[0][:, None] + 1e-5) * (away[1] + 1e-5)
    assert (bounds <= exact + gap + 1e-12).all()


def test_turned_axes_lose_less_to_int8(vectors, take_axes):
    """Long along one axis, vectors would need long steps for the others."""
    low = low_rank(vectors, count=1, scale=0.1)
    axes, side = take_axes(low, 31), torch.from_numpy(low[0]).double()
    short = products.shortened(
        side, products.turned_axes(axes), products.Scratch()
    )
    lost = [
        products.rounded(x, torch.int8, products.Scratch())[2]
        for x in (short, side @ axes)
    ]
    assert lost[0] < 0.7 * lost[1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bounds_are_looked_at_again_before_decisions(
    vectors, take_axes, precision, monkeypatch
):
    """Whatever rounding left, no more is decided than exact bounds leave."""
    low = low_rank(vectors, scale=0.3)
    axes, sides = take_axes(low, 15), [torch.from_numpy(v) for v in low]
    turned = products.turned_axes(axes)
    audio, text = (
        products.shortened(x, turned, products.Scratch()) for x in sides
    )
    bounds, decided = (audio @ text.T).numpy(), []

    def exact_of(rows, block, flat, scratch):
        audio, text = np.divmod(flat, len(block))
        decided.append((rows.begin + audio, block.begin + text))
        return exact(rows, block, flat, scratch)

    exact = products.exact_of
    monkeypatch.setattr(products, "exact_of", exact_of)
    search(low, 0.8, audio_bs=50, text_bs=64, precision=precision, axes=axes)
    audio, text = (np.concatenate(part) for part in zip(*decided))
    reaches = bounds >= 0.8 + 1e-5
    assert reaches[audio, text].sum() == reaches.sum() > 50
    margin = 1e-3 if precision == "fp32" else 1e-5  # fp32 itself is enough
    assert (bounds[audio, text] >= 0.8 - margin).all()


def test_the_fastest_product_is_taken(costs):
    rng = np.random.default_rng(0)

    def rows(scales, count):
        return unit(rng.standard_normal((count, 256)) * scales)

    def assert_fastest(vectors, threshold, expected, **kwargs):
        precision, axes = fastest_of(vectors, threshold, **kwargs)
        shape = None if axes is None else tuple(axes.shape)
        assert (precision, shape) == expected

    even = rows(1, 500), rows(1, 2500)
    # 256 dimensions, of which 40 matter.
    scales = np.where(np.arange(256) < 40, 1, 0.01)
    few = rows(scales, 500), rows(scales, 2500)
    costs(fp32=1.0, bf16=2.0, int8=0.25, decision=40)
    assert_fastest(even, 0.5, ("int8", None))
    assert_fastest(few, 0.7, ("int8", (256, 63)))
    assert_fastest(few, 0.7, ("fp32", (256, 63)), precision="fp32")
    # But not if the others matter too, for then nearly all is to decide,
    scales = np.where(np.arange(256) < 40, 1, 0.3)
    more = rows(scales, 500), rows(scales, 2500)
    assert_fastest(more, 0.4, ("fp32", None), precision="fp32")
    # which rounding makes more,
    costs(fp32=1.0, bf16=2.0, int8=0.25, decision=400)
    assert_fastest(few, 0.3, ("fp32", (256, 63)))
    assert_fastest(few, np.inf, ("int8", (256, 63)))
    # nor if preparing them takes longer,
    costs(fp32=1.0, bf16=2.0, int8=0.25, preparing=1e8)
    assert_fastest(few, 0.7, ("int8", None))
    # nor if all similarities are asked for.
    costs(fp32=1.0, bf16=0.1, int8=0.25)
    assert_fastest(few, 0.7, ("bf16", None), with_report=True)
    few[0][7, 3] = np.nan
    assert_fastest(few, 0.7, ("fp32", None))
    assert_fastest((few[0][:0], few[1]), 0.7, ("fp32", None))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_times_are_those_of_a_similarity(vectors, monkeypatch, precision):
    """A product of 1024 by 1024 and 1024 decisions, of a tick each."""
    clock = itertools.count()
    monkeypatch.setattr(fastest.time, "perf_counter", clock.__next__)
    dtype = products.PRECISIONS[precision]
    assert fastest.product_seconds(dtype, 64) == 2.0**-20
    assert next(clock) == 6
    # Begin and end of a single run that takes more than four times as long.
    for enough, used in ((0.24, 2), (0.26, 6)):
        begin = next(clock)
        fastest.product_seconds(dtype, 64, enough=enough * 2.0**-20)
        assert next(clock) == begin + used + 1
    sides = [torch.from_numpy(v).double() for v in vectors]
    assert fastest._decision_seconds(*sides, "cpu") == 2.0**-10


def test_nothing_is_timed_without_a_choice(vectors, monkeypatch):
    monkeypatch.setattr(fastest, "product_seconds", None)
    way = fastest_of(vectors, 0.5, precision="bf16", with_report=True)
    assert way == ("bf16", None)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_highest_similarity_by_fewer_dimensions(vectors, take_axes, precision):
    low = low_rank(vectors, scale=0.5)
    naive = low[0].astype(np.float64) @ low[1].astype(np.float64).T
    tally, axes = Tally(200), take_axes(low, 3)
    found = search(
        low, 3.0, tally, audio_bs=50, text_bs=64, axes=axes,
        precision=precision,
    )  # fmt: skip
    assert len(found[0]) == 0
    assert tally.highest in naive
    assert naive.max() - tally.margin <= tally.highest <= naive.max()
    assert tally.margin < 2
    with pytest.raises(ValueError, match="A report needs all"):
        search(low, 0.9, with_report=True, axes=axes)


def test_highest_similarity_if_no_candidate_is_left(
    vectors, take_axes, monkeypatch
):
    """int8 leaves candidates, and their bounds in fp32 leave none of them."""
    low = low_rank(vectors, scale=0.02)
    naive = low[0].astype(np.float64) @ low[1].astype(np.float64).T
    tally, axes, counts = Tally(200), take_axes(low, 15), []

    def bounded(rows, block, flat, threshold):
        left = look(rows, block, flat, threshold)
        counts.append((len(flat), len(left)))
        return left

    look = products.bounded
    monkeypatch.setattr(products, "bounded", bounded)
    limit = naive.max() + 5e-3
    found = search(low, limit, tally, precision="int8", axes=axes)
    assert len(found[0]) == 0
    assert len(counts) == 1 and counts[0][0] > 0 == counts[0][1]
    assert tally.highest in naive
    assert naive.max() - tally.margin <= tally.highest <= naive.max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pair_at_the_threshold_is_kept(vectors, naive, precision):
    rng = np.random.default_rng(0)
    for row, column in zip(rng.integers(0, 300, 40), rng.integers(0, 200, 40)):
        threshold = naive[row, column]
        for limit in (threshold, np.nextafter(threshold, 2)):
            found = search(vectors, limit, precision=precision)
            assert_pairs(found, naive, limit)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threshold", [-2.0, -0.2, -1e-9, 0.0, 1e-9])
def test_low_thresholds(vectors, naive, threshold, precision):
    found = search(vectors, threshold, precision=precision)
    assert_pairs(found, naive, threshold)


def test_similarities_are_exact(vectors):
    """Not merely as good as float64: no bit is lost, in any order."""
    audio, text = vectors
    found = search((audio[:20], text[:5]), -1.0)
    for row, column, value in zip(*found):
        products = [
            Fraction(float(a)) * Fraction(float(b))
            for a, b in zip(audio[row], text[column])
        ]
        assert Fraction(float(value)) == sum(products)


def test_fp32_vectors_are_put_on_the_grid():
    """Their pairs do not depend on the order of additions either."""
    audio, text = vectors_near(THRESHOLD)
    rng = np.random.default_rng(1)
    audio, text = (
        unit(v + 1e-4 * rng.standard_normal(v.shape)).astype(np.float32)
        for v in (audio, text)
    )
    grid = [
        np.rint(v.astype(np.float64) * 2**24) / 2**24 for v in (audio, text)
    ]
    for precision in PRECISIONS:
        found = search((audio, text), THRESHOLD, precision=precision)
        assert_pairs(found, grid[0] @ grid[1].T, THRESHOLD)
    shuffled = rng.permutation(audio.shape[1])
    again = search((audio[:, shuffled], text[:, shuffled]), THRESHOLD)
    np.testing.assert_array_equal(again[2], found[2])


@pytest.mark.parametrize("setting, bits", [("high", 13), ("medium", 16)])
def test_fp32_products_that_ignore_bits(vectors, setting, bits):
    """TF32, or bf16 on a CPU, simulated by cutting the last bits off."""
    rng = np.random.default_rng(1)
    vectors = [
        unit(v + 1e-4 * rng.standard_normal(v.shape)).astype(np.float32)
        for v in vectors
    ]
    grid = [np.rint(v.astype(np.float64) * 2**24) / 2**24 for v in vectors]
    naive = grid[0] @ grid[1].T

    def cut(tensor):
        return (tensor.view(torch.int32) & -(2**bits)).view(torch.float32)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "multiply", lambda a, b, _: cut(a) @ cut(b))
            for limit in np.sort(naive[naive > THRESHOLD])[:40]:
                found = search(vectors, limit, precision="fp32")
                assert_pairs(found, naive, limit)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_many_pairs_come_in_parts(vectors, naive, monkeypatch, precision):
    expected, tally = Tally(200), Tally(200)
    search(vectors, 0.1, expected, with_report=True, precision=precision)
    monkeypatch.setattr(similarity, "_MAX_PAIRS", 500)
    batches = list(
        pairs_over(
            *vectors,
            0.1,
            tally,
            with_report=True,
            text_bs=50,
            precision=precision,
        )
    )
    assert max(len(b[0]) for b in batches) <= 500
    # Never the pairs of one audio row in two parts.
    rows = np.concatenate([np.unique(b[0]) for b in batches])
    assert len(rows) == len(set(rows.tolist()))
    found = tuple(np.concatenate(part) for part in zip(*batches))
    assert_pairs(found, naive, 0.1)
    # Each block has its own unit of int8, by which fast counts differ a bit.
    start = 110 if precision == "int8" else 0
    for name, counts in expected.curves().items():
        found = tally.curves()[name]
        np.testing.assert_array_equal(found[start:], counts[start:])


class Noted:
    """Vectors, and which rows of them are read by which thread."""

    def __init__(self, vectors):
        self.vectors, self.reads = vectors, []

    def __len__(self):
        return len(self.vectors)

    def __getitem__(self, rows):
        self.reads.append((rows.start, rows.stop, threading.current_thread()))
        return self.vectors[rows]


@pytest.fixture(params=[2, 3, 20])
def threads(request, monkeypatch):
    """As on a machine with more cores than tests use."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    before = threading.active_count()
    yield request.param
    torch.set_num_threads(1)
    # A search that ends, at its end or before, ends its threads.
    assert threading.active_count() == before


def test_threads_share_the_cores(threads):
    with similarity.search_threads("cpu") as (pool, count):
        used = pool.submit(count_threads).result()
    assert (count, used) == {2: (2, 1), 3: (3, 1), 20: (8, 2)}[threads]


def test_a_search_leaves_the_number_of_threads(vectors, threads):
    fastest_of(vectors, 0.5)
    search(vectors, 0.5)
    assert count_threads() == threads
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(count_threads).result() == threads


def test_the_margin_is_the_largest_of_all_blocks(vectors):
    audio, tally = vectors[0].copy(), Tally(200)
    audio[:10] *= 1.9
    search((audio, vectors[1]), 0.5, tally, audio_bs=10, precision="int8")
    first = Tally(200)
    search((audio[:10], vectors[1]), 0.5, first, precision="int8")
    assert tally.margin == first.margin


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counts_of_parts_are_together_those_of_all(vectors, precision):
    """As processes have them, in either order; margins are of their rows."""
    audio = vectors[0].copy()
    audio[:40] *= 1.9
    sizes = {"audio_bs": 40, "text_bs": 50, "precision": precision}
    sizes["with_report"] = True

    def counted(rows):
        part = Tally(200)
        search((audio, vectors[1]), 0.9, part, rows=rows, **sizes)
        return part

    whole = counted((0, 300))
    parts = [counted(rows) for rows in ((0, 160), (160, 300))]
    assert parts[0].margin > parts[1].margin
    for order in (parts, parts[::-1]):
        together = Tally(200)
        together.start(0.9)
        for part in order:
            together.absorb(part)
        assert together.margin == whole.margin
        assert together.highest == whole.highest
        for name, counts in whole.curves().items():
            np.testing.assert_array_equal(together.curves()[name], counts)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_find_the_same_in_the_same_order(
    vectors, naive, threads, monkeypatch, precision
):
    """Also of blocks that are halved."""
    sizes = {"audio_bs": 40, "text_bs": 50, "precision": precision}
    alone, together = Tally(200), Tally(200)
    with monkeypatch.context() as context:
        context.setattr(torch, "get_num_threads", lambda: 1)
        search(vectors, 0.1, alone, with_report=True, **sizes)
    monkeypatch.setattr(similarity, "_MAX_PAIRS", 500)
    found = search(vectors, 0.1, together, with_report=True, **sizes)
    assert_pairs(found, naive, 0.1)
    assert together.highest == alone.highest
    start = 110 if precision == "int8" else 0  # units of halves differ
    for name, counts in alone.curves().items():
        found = together.curves()[name]
        np.testing.assert_array_equal(found[start:], counts[start:])
    # The rows of audio are those that one thread reads.
    audio, counts = Noted(vectors[0]), []
    pairs = pairs_over(audio, vectors[1], 0.1, progress=counts.append, **sizes)
    assert max(len(batch[0]) for batch in pairs) <= 500
    rows = [(i, min(i + 40, 300)) for i in range(0, 300, 40)]
    assert audio.reads == [(*r, threading.current_thread()) for r in rows]
    assert counts == [end - begin for begin, end in rows]


@pytest.mark.parametrize("rows", [(0, 90), (90, 250), (299, 300), (40, 40)])
def test_a_part_of_the_rows_has_its_own_pairs(vectors, naive, rows):
    """As processes share them; numbers are those of all rows."""
    sizes = {"audio_bs": 40, "text_bs": 50}
    batches = list(pairs_over(*vectors, 0.1, rows=rows, **sizes))
    inside = np.zeros_like(naive)
    inside[slice(*rows)] = naive[slice(*rows)]
    if rows[0] == rows[1]:
        assert batches == []
        return
    found = tuple(np.concatenate(part) for part in zip(*batches))
    assert_pairs(found, inside, 0.1)
    broken = vectors[0].copy()
    broken[rows[1] - 1, 3] = np.nan
    with pytest.raises(ValueError, match=f"of row {rows[1] - 1} "):
        list(pairs_over(broken, vectors[1], 0.1, rows=rows, **sizes))


@pytest.mark.parametrize("order", [1, -1])
def test_counts_of_parts_of_the_rows_add_up(vectors, order):
    whole, together = Tally(200), Tally(200)
    search(vectors, THRESHOLD, whole, with_report=True, audio_bs=100)
    together.start(THRESHOLD)
    for rows in [(0, 100), (100, 300)][::order]:
        part = Tally(200)
        sizes = {"audio_bs": 100, "rows": rows}
        search(vectors, THRESHOLD, part, with_report=True, **sizes)
        together.absorb(part)
    assert together.highest == whole.highest
    for name, counts in whole.curves().items():
        np.testing.assert_array_equal(together.curves()[name], counts)


def test_threads_prepare_what_is_kept_once(vectors, threads, monkeypatch):
    begins = []

    def noted(vectors, begin, dtype, device, kind, *rest):
        if kind == "text":
            time.sleep(0.01)  # others come meanwhile
            begins.append(begin)
        return prepare(vectors, begin, dtype, device, kind, *rest)

    prepare = products.prepare
    monkeypatch.setattr(products, "prepare", noted)
    search(vectors, THRESHOLD, audio_bs=20, text_bs=40)
    assert begins == [0, 40, 80, 120, 160]


def test_a_search_may_end_early(vectors, threads):
    audio = Noted(vectors[0].copy())
    audio.vectors[170, 3] = np.nan

    def pairs():
        return pairs_over(audio, vectors[1], 0.5, audio_bs=10)

    # What comes before the error is not lost.
    found = []
    with pytest.raises(ValueError, match="audio embedding of row 170"):
        for batch in pairs():
            found.append(batch)
    assert len(found) == 17
    audio.reads.clear()
    with contextlib.closing(pairs()) as batches:
        next(batches)
    assert len(audio.reads) <= 2 * min(threads, 8)


@pytest.mark.parametrize("count, size, most, expected", [
    (10, 4, 4, [(0, 4), (4, 8), (8, 10)]),
    (10, 4, 3, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]),
    (11, 5, 3, [(0, 3), (3, 5), (5, 8), (8, 10), (10, 11)]),
    (3, 9, 4, [(0, 3)]),
    (0, 4, 4, []),
])  # fmt: skip
def test_blocks_are_cut_evenly(count, size, most, expected):
    for first in (0, 7):
        blocks = similarity._even_blocks(first, first + count, size, most)
        assert [(b - first, e - first) for b, e in blocks] == expected


@pytest.mark.parametrize("room, expected", [
    (similarity._CACHE_BYTES, [0, 40, 80, 120, 160]),
    (80 * 64 * 4, [0, 40, 80, 120, 160] + 2 * [80, 120, 160]),
    (0, 3 * [0, 40, 80, 120, 160]),
])  # fmt: skip
def test_texts_are_prepared_again_only_without_room(
    vectors, naive, monkeypatch, room, expected
):
    monkeypatch.setattr(similarity, "_CACHE_BYTES", room)
    begins = []

    def noted(vectors, begin, dtype, device, kind, *rest):
        if kind == "text":
            begins.append(begin)
        return prepare(vectors, begin, dtype, device, kind, *rest)

    prepare = products.prepare
    monkeypatch.setattr(products, "prepare", noted)
    found = search(vectors, THRESHOLD, audio_bs=100, text_bs=40)
    assert_pairs(found, naive, THRESHOLD)
    assert begins == expected


def naive_curves(values, edges):
    return {
        "pairs": [(values >= e).sum() for e in edges],
        "clips": [(values >= e).any(axis=1).sum() for e in edges],
        "texts": [(values >= e).any(axis=0).sum() for e in edges],
    }


@pytest.mark.parametrize("threshold", [0.3, 0.755, np.inf])
def test_curves_of_fp32_are_those_of_a_naive_product(naive, vectors, threshold):
    tally = Tally(200)
    pairs = pairs_over(
        *vectors, threshold, tally, True, 64, 33, precision="fp32"
    )  # fmt: skip
    assert sum(len(p[0]) for p in pairs) == (naive >= threshold).sum()
    curves, zero = tally.curves(), 100
    for name, counts in naive_curves(naive, EDGES).items():
        np.testing.assert_array_equal(curves[name][zero:], counts[zero:])
    np.testing.assert_array_equal(
        curves["pairs"], naive_curves(naive, EDGES)["pairs"]
    )
    assert tally.highest == naive.max()


@pytest.mark.parametrize("precision, least, most, share", [
    # What bf16 rounds together is spread over the bins.
    ("bf16", 0.0065, 0.01, 0.004), ("int8", 0.02, 0.03, 0.0015),
])  # fmt: skip
def test_fast_curves_keep_their_promise(
    naive, vectors, precision, least, most, share
):
    tally = Tally(200)
    search(vectors, 0.5, tally, with_report=True, precision=precision)
    curves = tally.curves()
    assert least < tally.margin < most
    exact = naive_curves(naive, EDGES)
    lower = naive_curves(naive, EDGES - tally.margin)
    upper = naive_curves(naive, EDGES + tally.margin)
    for name, counts in curves.items():
        np.testing.assert_array_equal(counts[150:], exact[name][150:])
        assert (counts[100:] <= lower[name][100:]).all()
        assert (counts[100:] >= upper[name][100:]).all()
    assert curves["pairs"][0] == naive.size
    error = np.abs(curves["pairs"] - exact["pairs"])
    assert error.max() < share * naive.size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_curves_of_vectors_that_are_not_of_unit_norm(vectors, precision):
    audio, text = (v[:7].astype(np.float64) for v in vectors)
    text[:5] = np.array([[1.9], [1.9], [-1.9], [-0.3], [0.2]]) * audio[:5]
    text = text.astype(np.float16)
    audio = (1.9 * audio).astype(np.float16)
    tally = Tally(7)
    search((audio, text), np.inf, tally, with_report=True, precision=precision)
    naive = audio.astype(np.float64) @ text.T.astype(np.float64)
    assert naive.max() > 3.5 and naive.min() < -1
    # The first bin and the last take what is beyond them.
    expected = [(np.maximum(naive, -1) >= edge).sum() for edge in EDGES]
    error = np.abs(tally.curves()["pairs"] - expected)
    assert error.max() <= (0 if precision == "fp32" else 1)


@pytest.fixture
def forgotten():
    products._int8_is_exact.cache_clear()
    yield
    products._int8_is_exact.cache_clear()


def test_int8_is_refused_where_sums_saturate(vectors, monkeypatch, forgotten):
    """As on processors without VNNI: pairs of unsigned times signed numbers."""
    assert products._int8_is_exact()
    products._int8_is_exact.cache_clear()

    def saturated(audio, text, scratch):
        audio, text = (audio.int() + 128)[:, None], text.int()[None]
        products = audio * text
        sums = products[..., 0::2] + products[..., 1::2]
        sums = sums.clamp(-(2**15), 2**15 - 1).sum(-1)
        return (sums - 128 * text.sum(-1)).int()

    monkeypatch.setattr(products, "multiply", saturated)
    with pytest.raises(ValueError, match="precision=int8: give one of bf16"):
        search(vectors, THRESHOLD, precision="int8")
    assert products.precisions("cpu") == ["bf16", "fp32"]


def test_without_a_report_only_pairs_count(naive, vectors):
    tally = Tally(200)
    search(vectors, 0.5, tally, precision="bf16")
    pairs = tally.curves()["pairs"]
    exact = naive_curves(naive, EDGES)["pairs"]
    np.testing.assert_array_equal(pairs[150:], exact[150:])
    assert (pairs[:150] == exact[150]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_highest_similarity_without_a_pair(naive, vectors, precision):
    tally = Tally(200)
    found = search(
        vectors, 0.99, tally, precision=precision, audio_bs=50, text_bs=64
    )
    assert len(found[0]) == 0
    assert tally.highest in naive
    assert naive.max() - tally.margin <= tally.highest <= naive.max()
    audio = vectors[0][:1]
    opposite = np.concatenate([-audio, -audio / 2])
    tally = Tally(2)
    search((audio, opposite), 0.5, tally, precision=precision)
    expected = (audio.astype(np.float64) @ opposite.T.astype(np.float64)).max()
    assert tally.highest == expected


def test_bf16_limits_are_rounded_down():
    for value in np.random.default_rng(0).uniform(-1, 1, 50):
        found = products._bf16_below(value)
        above = torch.nextafter(found, torch.tensor(2.0).bfloat16())
        assert found.item() <= value < above.item()


def test_bf16_numbers_are_spread_evenly():
    values = np.random.default_rng(0).uniform(0.3, 1, 200_000)
    bits = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    counts = np.bincount(bits.view(np.uint16), minlength=2**16)
    found = tally._at_least_of_bits(counts)
    middle = (EDGES > 0.31) & (EDGES < 0.99)
    exact = np.array([(values >= e).sum() for e in EDGES[middle]])
    # A bin holds 2857, a bf16 number up to 1116.
    assert np.abs(found[middle] - exact).max() < 60


def test_every_bf16_number_is_counted_by_its_bits():
    bits = torch.randint(-(2**15), 2**15, (40, 30), dtype=torch.int16)
    numbers = bits.view(torch.bfloat16)
    bits[numbers.isnan()] = 0
    seen = tally.Seen(np.full(40, -np.inf, np.float32))
    for begin in (0, 10, 20):
        part = numbers[:, begin : begin + 10].contiguous()
        seen.add(part, 1.0, begin, products.Scratch())
    unsigned = bits.numpy().view(np.uint16).ravel()
    expected = np.bincount(unsigned, minlength=2**16)
    np.testing.assert_array_equal(seen.bits, expected)


def test_a_similarity_at_an_edge_reaches_it():
    tally = Tally(1)
    tally.start(0.5)
    zero = np.array([0])
    tally.add_pairs(zero, zero, np.array([0.57]))
    for counts in tally.curves().values():
        assert counts[157] == 1 and counts[158] == 0


def test_keep_best_takes_the_lower_row_of_equals():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 5, 60)
    others = rng.permutation(60)
    values = rng.integers(0, 4, 60) / 4
    expected = []
    for group in range(5):
        members = np.flatnonzero(groups == group)
        best = sorted(members, key=lambda i: (-values[i], others[i]))
        expected += best[:3]
    found = keep_best(groups, others, values, 3)
    assert found.tolist() == sorted(expected)
    assert len(keep_best(groups[:0], others[:0], values[:0], 3)) == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_vectors_and_nothing_at_all(vectors, precision):
    zero = np.zeros((2, 64), np.float16)
    found = search((vectors[0], zero), 0.1, precision=precision)
    assert len(found[0]) == 0
    for audio, text in ((zero[:0], zero), (zero, zero[:0])):
        assert list(pairs_over(audio, text, 0.5)) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_vectors_of_one_number(precision):
    """PyTorch's product of such int8 numbers is wrong."""
    rng = np.random.default_rng(0)
    vectors = [rng.choice([-1.0, 0.5, 1.0], (n, 1)) for n in (50, 20)]
    vectors = [v.astype(np.float16) for v in vectors]
    naive = vectors[0].astype(np.float64) @ vectors[1].T.astype(np.float64)
    assert_pairs(search(vectors, 0.5, precision=precision), naive, 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.0])
def test_vectors_of_no_bounded_norm_are_refused(vectors, value):
    broken = vectors[1].copy()
    broken[130, 7] = value
    with pytest.raises(ValueError, match="text .* row 130 .* finite"):
        search((vectors[0], broken), THRESHOLD, text_bs=100)


def test_wrong_arguments(vectors):
    for precision in ("fp16", "auto"):
        with pytest.raises(
            ValueError, match=f"{precision}: give one of .*fp32"
        ):
            search(vectors, THRESHOLD, precision=precision)
    with pytest.raises(ValueError, match="fp16: give one of .*fp32"):
        fastest_of(vectors, THRESHOLD, precision="fp16")
    with pytest.raises(ValueError, match="computed on cpu or cuda"):
        fastest_of(vectors, THRESHOLD, device="meta")
    with pytest.raises(ValueError, match="Block sizes"):
        search(vectors, THRESHOLD, audio_bs=0)
    with pytest.raises(ValueError, match="not a number"):
        search(vectors, np.nan)
