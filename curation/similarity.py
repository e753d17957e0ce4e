"""Exact search for the pairs of vectors whose similarity reaches a threshold.

What is exact
-------------
A vector is taken on the grid of multiples of 2^-24: fp16 values lie on it, fp32
ones are rounded to it (by 3e-8 at most). A product of two such values is a
multiple of 2^-48, and with norms of at most 2 no partial sum of a dot product
exceeds 4 in magnitude (Cauchy-Schwarz), so each needs 51 bits at most and
float64, with 53, adds them without rounding, in any order. The similarity of a
pair is this exact dot product: it does not depend on block sizes, devices or
libraries.

How it is found
---------------
A faster product of blocks preselects candidates, then each candidate is decided
by its exact similarity. With r(x) the norm of what rounding x to the fast
format took away, the fast product of a and b is off by at most

    r(a) |b| + (|a| + r(a)) r(b) + (d + 64) 2^-22 (|a| + r(a)) (|b| + r(b))

The first terms are the rounding of the input (Cauchy-Schwarz); r is measured
and not taken from the format's worst case. int8 numbers, in steps of 1/127 of
the largest of a block, lose the most; their products are added as integers,
without rounding, and several times as fast where the processor has
instructions for them (VNNI). For the other formats the last term is the
accumulation of d products in fp32 in any order, at most d 2^-24 with rounding
to nearest (Higham, "Accuracy and Stability of Numerical Algorithms", section
3.1), d 2^-23 if sums are truncated, and 1.1 d 2^-23 if groups of 16 are aligned
to their largest before, as GPUs do; 2^-22 leaves room, and 64 some for fp32
taken as the sum of two bf16 numbers without the product of the lower ones
(2^-18), and for r, which is itself computed in fp32. Products that are returned
in bf16 are compared with a limit that is itself a bf16 number: rounding keeps
the order, so none falls below the limit by it.

The same margins tell how far the histogram of all similarities may be off,
which is made from the fast product.

Fewer dimensions
----------------
Where no histogram is asked for, bounds are enough. With Q the first k joint
principal axes of both sides, a vector is Q times its coordinates x plus a
residual; axes are orthogonal, so by Cauchy-Schwarz

    a . b <= x(a) . x(b) + |residual(a)| |residual(b)|

which is the dot product of the coordinates with the residual's norm as one
more. These short vectors take the place of the long ones in the fast product;
what they cannot exclude is decided exactly as before. Coordinates and norms are
computed in float64, the square of the residual's as what the coordinates leave
of the vector's: that, and axes that are orthonormal to 1e-12 only, takes less
than the 1e-10 that is added to it, and moves the first product by less than
1e-10 of the norms, for which the last term above has room. Embeddings of
trained models lie near a few axes. How many to take, and the format, is found
from a sample and from the time that products take on the machine
(`fastest_product`).

Principal axes give a few coordinates nearly all of the length, and int8 numbers
the steps that these need. The short vectors are therefore turned, all by one
rotation that dot products do not feel, until their numbers are alike
(`_turned`). Pairs that products in int8 or bf16 leave are bounded once more, by
short vectors in fp32, before they are decided.
"""

import collections
import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import threading
import time

import numpy as np
import torch

from curation import kernels

GRID = 2.0**24  # steps in 1
EDGES = np.arange(-100, 101) / 100  # lower ends of the histogram's bins
_MAX_NORM = 2.0
_PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
# Those that lose so much of a bound that it is worth a look before a decision.
_ROUGH = (torch.int8, torch.bfloat16)
_ON = {"cpu": ("int8", "bf16", "fp32"), "cuda": ("fp16", "bf16", "fp32")}
# Rows of a block at most, that a product stays within 16 MB, on a GPU 1 GB.
_MAX_ROWS = {"cpu": 2048, "cuda": 16384}
# Texts of a block: a CPU is slower at products that its caches do not hold.
_TEXT_ROWS = {"cpu": 1024, "cuda": 4096}
_CACHE_BYTES = 192 * 2**20  # of text blocks on a CPU
_MAX_PAIRS = 2**19  # of one block of audio rows with all texts
# Threads that search a block each: Python runs in one of them at a time.
_MAX_THREADS = 8
_PAIRS_AT_ONCE = 2**16  # of which a GPU gathers the rows
_SAMPLE_ROWS = 2048  # of each side, to choose a fast product
# Axes to try; with the residual a multiple of 16.
_NUM_AXES = (63, 127, 255, 511)


class Tally:
    """What a search saw: its highest similarity, and counts by similarity.

    Counts at thresholds from the one searched with upwards are exact. Those
    below come from the fast product, and only if the search was asked for
    them; they are off by the pairs within `margin` of a bin's end.

    Arguments
    ---------
    n_text : int
        Number of texts. Memory is 12 bytes a text.

    Attributes
    ----------
    highest : float
        Highest similarity. If no pair reached the threshold, that of the pair
        with the highest fast product: exact for that pair, and at most
        `margin` below the true highest one.
    margin : float
        Largest error that the fast product may have had.
    """

    def __init__(self, n_text):
        self.margin = 0.0
        self._fast_bits = np.zeros(2**16, dtype=np.int64)
        self._fast_pairs = np.zeros(len(EDGES), dtype=np.int64)
        self._fast_clips = np.zeros(len(EDGES), dtype=np.int64)
        self._fast_texts = np.full(n_text, -np.inf, dtype=np.float32)
        self.start(np.inf)

    def start(self, threshold):
        """Begin a search: exact counts start anew, the fast ones stay."""
        self.threshold = threshold
        self.highest = -np.inf
        self._pairs = np.zeros(len(EDGES), dtype=np.int64)
        self._clips = np.zeros(len(EDGES), dtype=np.int64)
        self._texts = np.full(len(self._fast_texts), -np.inf)

    def absorb(self, other):
        """Add the counts of a search of the same texts for other audio."""
        self.margin = max(self.margin, other.margin)
        self.highest = max(self.highest, other.highest)
        for name in ("_fast_bits", "_fast_pairs", "_fast_clips", "_pairs"):
            getattr(self, name)[:] += getattr(other, name)
        self._clips += other._clips
        for name in ("_fast_texts", "_texts"):
            own = getattr(self, name)
            np.maximum(own, getattr(other, name), out=own)

    def add_found(self, found):
        """Count what a search of some audio rows and all texts found.

        Arguments
        ---------
        found : _Found
        """
        self.highest = max(self.highest, found.highest)
        self.margin = max(self.margin, found.margin)
        self.add_pairs(*found.pairs)
        if found.seen is not None:
            self._add_fast(found.seen)

    def add_pairs(self, audio_rows, text_rows, similarities):
        """Count pairs over the threshold, all those of some audio rows."""
        if not len(audio_rows):
            return
        firsts = np.flatnonzero(np.diff(audio_rows, prepend=-1))
        self._pairs += _binned(similarities)
        self._clips += _binned(np.maximum.reduceat(similarities, firsts))
        np.maximum.at(self._texts, text_rows, similarities)

    def _add_fast(self, seen):
        if seen.bits is not None:
            self._fast_bits += seen.bits
        if seen.bins is not None:
            self._fast_pairs += seen.bins
        self._fast_clips += _binned(seen.best)
        for begin, best in seen.text_best:
            view = self._fast_texts[begin : begin + len(best)]
            np.maximum(view, best, out=view)

    def curves(self):
        """Numbers of pairs, clips and texts that reach each threshold.

        Returns
        -------
        dict of str to array
            `pairs`, `clips` and `texts`, each (201,) int64, at the thresholds
            `EDGES`, -1.00 to 1.00. Clips and texts are counted from 0 up.
        """
        fast_pairs = _at_least(self._fast_pairs) + _at_least_of_bits(
            self._fast_bits
        )
        curves = {
            "pairs": (_at_least(self._pairs), fast_pairs),
            "clips": (_at_least(self._clips), _at_least(self._fast_clips)),
            "texts": (
                _at_least(_binned(self._texts)),
                _at_least(_binned(self._fast_texts)),
            ),
        }
        # A lower threshold keeps what a higher one keeps, whatever the margin.
        return {
            name: np.where(
                self.threshold <= EDGES, exact, np.maximum(fast, exact.max())
            )
            for name, (exact, fast) in curves.items()
        }


@dataclasses.dataclass
class _Rows:
    """A block of vectors, ready for products.

    Arguments
    ---------
    begin : int
        First row's number.
    fast : torch.Tensor
        (rows, d) in the format of the fast product, or (rows, k + 1)
        coordinates and residual, turned, if axes are used.
    unit : float
        What 1 stands for in `fast`.
    lost, norm : float
        Largest norm of what the format of `fast` took away, and of a row.
    exact : torch.Tensor or callable
        (rows, d) on the grid, fp16 if that holds them, else fp32; or what
        returns them, if they are not kept.
    short : torch.Tensor
        (rows, k + 1) float32, what `fast` was rounded from, if axes are used
        and its format is one of `_ROUGH`.
    """

    begin: int
    fast: torch.Tensor
    unit: float
    lost: float
    norm: float
    exact: torch.Tensor | collections.abc.Callable
    short: torch.Tensor | None = None

    @functools.cached_property
    def whole(self):
        """float32 of `exact`."""
        return self.exact.float()

    @functools.cached_property
    def columns(self):
        """`fast`, transposed."""
        return self.fast.T

    def __len__(self):
        """Number of rows."""
        return len(self.fast)

    def part(self, begin, end):
        """Some of the rows; the norms stay bounds."""
        return dataclasses.replace(
            self,
            begin=self.begin + begin,
            exact=self.exact[begin:end],
            fast=self.fast[begin:end],
            short=None if self.short is None else self.short[begin:end],
        )


@dataclasses.dataclass
class _Seen:
    """Fast products of a block of audio rows, counted."""

    best: np.ndarray
    bits: np.ndarray | None = None
    bins: np.ndarray | None = None
    text_best: list = dataclasses.field(default_factory=list)

    def add(self, product, unit, text_begin, scratch):
        """Count one product (audio rows, texts).

        Returns
        -------
        array of float
            (audio rows,) the highest similarity of each, as its fast product
            has it; of bf16, if all are negative, one of these.
        """
        if product.dtype == torch.bfloat16:
            bits = product.view(torch.int16)
            unsigned = scratch.take(torch.int32, bits.shape, bits.device)
            unsigned.copy_(bits).bitwise_and_(0xFFFF)
            counts = torch.bincount(unsigned.view(-1), minlength=2**16).numpy()
            bits = bits.numpy()
            self.bits = counts if self.bits is None else self.bits + counts
            # As integers, bits keep the order of positive numbers, and
            # negative ones stay below; no curve asks for more.
            best = [_from_bits(bits.max(axis=axis)) for axis in (1, 0)]
        else:
            counts, *best = (
                _binned_on_gpu(product, unit, scratch)
                if product.is_cuda
                else _binned_on_cpu(product, unit)
            )
            self.bins = counts if self.bins is None else self.bins + counts
        np.maximum(self.best, best[0], out=self.best)
        self.text_best.append((text_begin, best[1]))
        return best[0]


class _Scratch(threading.local):
    """Memory for products, which all blocks of a thread share.

    A system clears the pages of new buffers, which takes as long as a product
    of short vectors.
    """

    def __init__(self):
        self.buffers, self.views = {}, {}

    def take(self, dtype, shape, device, use=None):
        """An uninitialised tensor, valid until the next of its kind."""
        size, kind = math.prod(shape), (dtype, use)
        buffer = self.buffers.get(kind)
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=dtype, device=device)
            self.buffers[kind], self.views[kind] = buffer, {}
        # Every operation of PyTorch, however small, lets the other threads
        # run, and then waits for them.
        views = self.views[kind]
        if shape not in views:
            views[shape] = buffer[:size].view(shape)
        return views[shape]


class _Blocks:
    """Blocks of texts, of which the first are kept, the others read again."""

    def __init__(self, read, count, size, num_kept):
        self.read, self.count, self.size = read, count, size
        self.num_kept, self.kept = num_kept, {}
        self.lock = threading.Lock()

    def __iter__(self):
        for begin in range(0, self.count, self.size):
            end = min(begin + self.size, self.count)
            if end > self.num_kept:
                yield self.read(begin, end)
                continue
            # Threads start with the same block: one of them prepares it.
            with self.lock:
                if begin not in self.kept:
                    self.kept[begin] = self.read(begin, end)
            yield self.kept[begin]


@dataclasses.dataclass
class _Found:
    """What a search of a block of audio rows and all texts found.

    Arguments
    ---------
    pairs : tuple of array
        As `pairs_over` yields them.
    highest, margin : float
        As `Tally`.
    seen : _Seen
        Counts of all similarities, if they were asked for.
    """

    pairs: tuple
    highest: float
    margin: float
    seen: _Seen | None


def pairs_over(
    audio_block,
    n_audio,
    text_block,
    n_text,
    threshold,
    tally=None,
    with_report=False,
    audio_bs=4000,
    text_bs=None,
    device="cpu",
    precision="fp32",
    axes=None,
):
    """Find all pairs whose exact similarity is the threshold or more.

    Memory depends on the block sizes and on `n_text` times a few bytes, not on
    the number of pairs: a block of audio rows that has too many is halved.

    Arguments
    ---------
    audio_block, text_block : callable
        (begin, end) -> array (end - begin, d) of about unit norm, fp16 or
        fp32, the same for each row at every call.
    n_audio, n_text : int
        Number of rows of each.
    threshold : float
        Lowest similarity of a pair; infinity finds none and only counts.
    tally : Tally
        Counts, updated on the way.
    with_report : bool
        Whether to count all similarities too, which takes a fifth longer, or
        more than twice as long on embeddings near a few axes, as of trained
        models.
    audio_bs, text_bs : int
        Rows at a time. Blocks of more than 2048 on a CPU or 16384 on a GPU are
        cut. None takes 1024 texts on a CPU and 4096 on a GPU.
    device : str
        Where products are computed.
    precision : str
        Of the fast product: fp32 or bf16; on a GPU also fp16, which is exact
        for fp16 vectors but for the accumulation; on a CPU also int8.
    axes : torch.Tensor
        (d, k) orthonormal columns: fewer dimensions to multiply in, the same
        pairs. `fastest_product` chooses these and the precision.

    Yields
    ------
    tuple of array
        (audio rows int64, text rows int64, similarities float64) in order of
        audio row, then text row. All pairs of an audio row come together.

    Raises
    ------
    ValueError
        An argument is out of range, or a row is not finite or its norm
        exceeds 2; or both a report and axes are given; or the processor's
        int8 products are not exact.
    """
    _check_precision(precision, device)
    dtype = _PRECISIONS[precision]
    if audio_bs < 1 or (text_bs is not None and text_bs < 1):
        raise ValueError(
            f"Block sizes must be 1 or more: {audio_bs}, {text_bs}"
        )
    if np.isnan(threshold):
        raise ValueError("The threshold is not a number")
    if with_report and axes is not None:
        raise ValueError("A report needs all similarities, axes bound them")
    tally = Tally(n_text) if tally is None else tally
    tally.start(threshold)
    if not n_audio or not n_text:
        return
    # A thread begins with the first GPU, whichever is chosen in this one.
    device = torch.empty(0, device=device).device
    kind = device.type
    width = np.asarray(text_block(0, 1)).shape[1]
    text_bs = _TEXT_ROWS[kind] if text_bs is None else text_bs
    text_bs = min(text_bs, _MAX_ROWS[kind])
    turned = None if axes is None else _turned(axes).to(device)

    def read_text(begin, end):
        rows = _prepare(
            text_block(begin, end),
            begin,
            dtype,
            device,
            "text",
            turned,
            scratch,
        )
        if not fits:
            # Reading it again for a few rows costs less than preparing it.
            rows.exact = lambda: _on_grid(text_block(begin, end), device)
        return rows

    def search(vectors, begin, reached):
        rows = _prepare(vectors, begin, dtype, device, "audio", turned, scratch)
        return search_rows(rows, reached)

    def search_rows(rows, reached):
        return _pairs_of(rows, texts, threshold, reached, with_report, scratch)

    room = _CACHE_BYTES
    if kind == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // 4
    # Of a text, without what it is decided by.
    row_bytes = width * dtype.itemsize
    if turned is not None:
        row_bytes = turned.shape[1] * (dtype.itemsize + 4 * (dtype in _ROUGH))
    # On the grid a number takes 2 bytes and 4 more as `whole`, or 4 alone.
    fits = n_text * (6 * width + row_bytes) <= room
    num_kept = n_text if fits else room // row_bytes
    texts = _Blocks(read_text, n_text, text_bs, num_kept)
    scratch, waiting = _Scratch(), collections.deque()
    blocks = _even_blocks(n_audio, audio_bs, _MAX_ROWS[kind])
    with _threads(device) as (pool, num_threads):
        while True:
            # Enough that none waits while the first is taken.
            free = max(2 * num_threads - len(waiting), 0)
            for begin, end in itertools.islice(blocks, free):
                vectors = audio_block(begin, end)
                reached = tally.highest >= threshold
                waiting.append(pool.submit(search, vectors, begin, reached))
            if not waiting:
                return
            found = waiting.popleft().result()
            if isinstance(found, _Found):
                tally.add_found(found)
                yield found.pairs
            else:
                reached = tally.highest >= threshold
                parts = [pool.submit(search_rows, x, reached) for x in found]
                waiting.extendleft(reversed(parts))


def _even_blocks(count, size, most):
    """Begins and ends of blocks, each cut evenly if it exceeds the most."""
    step = -(-size // -(-size // most))
    for begin in range(0, count, size):
        end = min(begin + size, count)
        for part in range(begin, end, step):
            yield part, min(part + step, end)


@contextlib.contextmanager
def _threads(device):
    """Threads that each search a block by themselves, and their number.

    They need not wait for each other after every product, and what comes after
    a product is not all arithmetic: one thread's product has the caches while
    another looks through its own.
    """
    total = torch.get_num_threads()
    count = min(total, _MAX_THREADS)
    if torch.device(device).type == "cuda":
        count = 1
    pool = concurrent.futures.ThreadPoolExecutor(
        count,
        initializer=torch.set_num_threads,
        initargs=(total // count,),
    )
    try:
        yield pool, count
    finally:
        pool.shutdown(cancel_futures=True)
        # What one thread sets, PyTorch gives those that start later.
        torch.set_num_threads(total)


def fastest_product(
    audio_block,
    n_audio,
    text_block,
    n_text,
    threshold,
    with_report=False,
    precision="auto",
    device="cpu",
):
    """The precision and the axes with which a search should be the fastest.

    Products of each kind are timed on this machine; how many candidates they
    leave to decide is found from a sample. Axes are made from one half of it
    and judged by the other: rows that they were not made from lie farther from
    them.

    Arguments
    ---------
    audio_block, text_block, n_audio, n_text, threshold, with_report, device
        As `pairs_over`; of the blocks a sample is read.
    precision : str
        As `pairs_over`; auto takes fp16 on a GPU, and compares the others on a
        CPU.

    Returns
    -------
    tuple
        The precision, and (d, k) float64 orthonormal columns or None.

    Raises
    ------
    ValueError
        The precision or the device is none of those.
    """
    with _threads(device) as (pool, _):
        # Where a search computes, with as many cores.
        return pool.submit(
            _fastest_product,
            audio_block,
            n_audio,
            text_block,
            n_text,
            threshold,
            with_report,
            precision,
            device,
        ).result()


def _fastest_product(
    audio_block,
    n_audio,
    text_block,
    n_text,
    threshold,
    with_report,
    precision,
    device,
):
    names = precisions(device)
    if precision != "auto":
        _check_precision(precision, device)
        names = [precision]
    elif torch.device(device).type == "cuda":
        names = ["fp16"]
    best, least = (names[-1], None), np.inf
    if n_audio < 2 or n_text < 2 or (with_report and len(names) == 1):
        return best
    audio, text = _sample(audio_block, n_audio), _sample(text_block, n_text)
    if not (audio.isfinite().all() and text.isfinite().all()):
        return best  # the error comes with the row, and names it
    width = audio.shape[1]
    sizes = [None]
    if not with_report:
        sizes += [count for count in _NUM_AXES if count < width]
    scratch = _Scratch()
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        # The first decision loads compiled code, which takes longer.
        halves = audio[::2], text[::2]
        all_axes = None if with_report else beside.submit(_joint_axes, *halves)
        decision = _decision_seconds(audio, text, device)
    for count in sizes:
        axes, preparing = None, 0.0
        sides = [audio[1::2], text[1::2]]
        if count is not None:
            axes = all_axes.result()[:, :count].contiguous()
            turned = _turned(axes)
            short = [_short(side, turned, _Scratch()) for side in sides]
            begin = time.perf_counter()
            for side in sides:
                _short(side, turned, scratch)
            preparing = time.perf_counter() - begin
            preparing /= sum(map(len, sides))  # a row
            preparing *= 1 / n_audio + 1 / n_text  # a similarity
            sides = short
            looking = _decision_seconds(*sides, device)
        bounds = sides[0].float() @ sides[1].float().T
        for name in names:
            dtype = _PRECISIONS[name]
            rows = [
                _Rows(
                    0,
                    *_rounded(side, dtype, scratch),
                    _largest_norm(side),
                    side,
                )
                for side in sides
            ]
            candidates = _share(bounds >= threshold - _margin(*rows))
            seconds = preparing + candidates * decision
            if count is not None and dtype in _ROUGH:
                left = _share(bounds >= threshold)
                seconds = preparing + candidates * looking + left * decision
            if seconds < least:
                width = sides[0].shape[1]
                seconds += product_seconds(dtype, width, device, least)
            if seconds < least:
                best, least = (name, axes), seconds
    return best


def _share(chosen):
    """Of a tensor of bool, how many are true."""
    return chosen.double().mean().item()


def precisions(device):
    """The formats that fast products can have.

    Arguments
    ---------
    device : str

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        The device is neither a CPU nor a CUDA device.
    """
    kind = torch.device(device).type
    if kind not in _ON:
        raise ValueError(
            f"device={device}: products are computed on cpu or cuda"
        )
    return [name for name in _ON[kind] if name != "int8" or _int8_is_exact()]


def keep_best(groups, others, similarities, count):
    """Choose the best pairs of each group, the lower row first if equal.

    Arguments
    ---------
    groups : array of int
        (pairs,) the audio rows if captions per audio are limited, the text
        rows if audios per caption are.
    others : array of int
        (pairs,) the rows of the other kind.
    similarities : array of float
        (pairs,).
    count : int
        Pairs to keep of each group.

    Returns
    -------
    array of int
        Indices of the pairs to keep, ascending.
    """
    order = np.lexsort((others, -similarities, groups))
    ranks = np.arange(len(order))
    first = np.diff(groups[order], prepend=-1) != 0
    ranks -= np.maximum.accumulate(np.where(first, ranks, 0))
    return np.sort(order[ranks < count])


def _check_precision(precision, device):
    names = precisions(device)
    if precision not in names:
        raise ValueError(
            f"precision={precision}: give one of {', '.join(names)}"
        )


@functools.cache
def _int8_is_exact():
    """Whether products of int8 numbers are added without saturation.

    Processors without instructions for them (VNNI) may add pairs in 16 bits.
    """
    ends = torch.full((64, 64), 127, dtype=torch.int8)
    ends[1::2] = -127
    products = _product(ends, ends.T, _Scratch())
    signs = ends.sign().long()
    return torch.equal(products.long(), 127**2 * signs @ signs.T)


def _pairs_of(rows, texts, threshold, reached, with_report, scratch):
    """Pairs of a block of audio rows, or its halves if they are too many.

    Arguments
    ---------
    rows : _Rows
    texts : _Blocks
    threshold : float
    reached : bool
        Whether a pair is known that reaches the threshold. If none is, the
        highest similarity is sought among those that do not.
    with_report : bool
    scratch : _Scratch

    Returns
    -------
    _Found or list of _Rows
    """
    seen = None
    if with_report:
        seen = _Seen(np.full(len(rows), -np.inf, dtype=np.float32))
    found, count, highest, largest_margin = [], 0, -np.inf, 0.0
    for block in texts:
        product = _product(rows.fast, block.columns, scratch)
        unit, margin = rows.unit * block.unit, _margin(rows, block)
        limit, looked_at = (threshold - margin) / unit, np.arange(len(rows))
        if with_report:
            highest_of_rows = seen.add(product, unit, block.begin, scratch)
            if product.dtype == torch.int32:
                # With room for what the multiplication by the unit rounds.
                lowest = threshold - margin - 1e-5
                looked_at = np.flatnonzero(highest_of_rows >= lowest)
        flat = _reaching(product, looked_at, limit, scratch)
        if rows.short is not None:
            flat = _bounded(rows, block, flat, threshold)
        largest_margin = max(largest_margin, margin + _output_rounding(product))
        if not (reached or len(flat)):
            best = np.array([_argmax(product)])
            value = _exact_of(rows, block, best, scratch)[2].item()
            highest = max(highest, value)
            if rows.fast.shape != rows.exact.shape:
                # Bounds may exceed the similarities by more than the margin.
                bound = unit * product.view(-1)[best[0]].item() + margin
                largest_margin = max(largest_margin, bound - value)
        audio, text, similarities = _exact_of(rows, block, flat, scratch)
        highest = similarities.max(initial=highest)
        keep = similarities >= threshold
        found.append((audio[keep], text[keep], similarities[keep]))
        count += len(found[-1][0])
        reached = reached or count > 0
        if count > _MAX_PAIRS and len(rows) > 1:
            half = len(rows) // 2
            return [rows.part(0, half), rows.part(half, None)]
    audio, text, similarities = (np.concatenate(part) for part in zip(*found))
    # Texts are in order already.
    order = np.argsort(audio, kind="stable")
    pairs = audio[order], text[order], similarities[order]
    return _Found(pairs, highest, largest_margin, seen)


def _sample(read, count):
    """Rows from all over, (at most 2048, d) float64."""
    size = _SAMPLE_ROWS // 8
    begins = [i * (count - size) // 7 for i in range(8)]
    if count <= _SAMPLE_ROWS:
        begins, size = [0], count
    blocks = [np.asarray(read(begin, begin + size)) for begin in begins]
    return torch.from_numpy(np.concatenate(blocks)).double()


def _joint_axes(audio, text):
    """Principal axes of both sides, (d, d) columns, the longest first."""
    moments = sum(side.T @ side / len(side) for side in (audio, text))
    return torch.linalg.eigh(moments)[1].flip(1)


def _turned(axes):
    """Axes for coordinates that are alike, (d, k + 1).

    They span the same space, but with a dimension more, in which coordinates
    add up to zero: the direction where all are equal is left to the residual.

    Arguments
    ---------
    axes : torch.Tensor
        (d, k) orthonormal columns.
    """
    size = axes.shape[1] + 1
    columns = torch.randn(
        size, size, generator=torch.Generator().manual_seed(0)
    ).double()
    columns[:, 0] = 1
    return axes @ torch.linalg.qr(columns)[0][:, 1:].T.to(axes)


def _short(vectors, turned, scratch):
    """Coordinates and the residual's norm, (rows, k + 1) float64 in scratch."""
    wide = scratch.take(torch.float64, vectors.shape, vectors.device, "wide")
    wide.copy_(vectors)
    size = turned.shape[1]
    short = scratch.take(torch.float64, (len(wide), size), wide.device, "short")
    torch.mm(wide, turned, out=short)
    whole, within = (
        torch.linalg.vector_norm(x, dim=1).square_() for x in (wide, short)
    )
    # Pythagoras. Never too small, though nothing is quite orthonormal.
    residual = (whole - within).clamp_(min=0).add_(1e-10).sqrt_()
    return short.add_(residual[:, None] / math.sqrt(size))


def _prepare(vectors, begin, dtype, device, kind, turned, scratch):
    """Put vectors on the grid and round them, or bounds, to the fast format."""
    exact = _on_grid(vectors, device)
    whole = scratch.take(torch.float32, exact.shape, exact.device, "whole")
    whole.copy_(exact)
    norm = _largest_norm(whole)
    if not norm <= _MAX_NORM:
        norms = 1.001 * torch.linalg.vector_norm(whole, dim=1)
        row = begin + torch.nonzero(~(norms <= _MAX_NORM))[0].item()
        raise ValueError(
            f"The {kind} embedding of row {row} (from 0) is not finite or its "
            f"norm exceeds {_MAX_NORM:g}"
        )
    short = None
    if turned is not None:
        whole = _short(whole, turned, scratch)
        norm = max(norm, _largest_norm(whole))
        short = whole.float() if dtype in _ROUGH else None
    rounded = _rounded(whole, dtype, scratch)
    return _Rows(begin, *rounded, norm, exact, short)


def _on_grid(vectors, device):
    """Vectors as multiples of 2^-24, fp16 if that holds them, else fp32."""
    exact = torch.as_tensor(np.asarray(vectors), device=device)
    if exact.dtype == torch.float16:
        return exact
    exact = exact.float().mul(GRID).round_().div_(GRID)
    half = exact.half()
    return half if torch.equal(half.float(), exact) else exact


def _rounded(whole, dtype, scratch):
    """Vectors in the fast format, its unit, the largest norm of the loss."""
    lost = scratch.take(whole.dtype, whole.shape, whole.device, "lost")
    if dtype == torch.int8:
        low, high = (end.item() for end in torch.aminmax(whole))
        unit = (max(-low, high) or 1.0) / 127
        steps = torch.div(whole, unit, out=lost).round_()
        fast = steps.to(dtype)
        return fast, unit, _largest_norm(steps.mul_(-unit).add_(whole))
    fast = whole.to(dtype)
    if dtype == torch.float32:
        # Bits that the product may ignore are cleared, and their loss counted.
        fast = (fast.view(torch.int32) & -(2 ** _ignored_bits())).view(dtype)
    return fast, 1.0, _largest_norm(lost.copy_(fast).sub_(whole))


def _largest_norm(vectors):
    """Upper bound of the rows' norms, fp32's own rounding included."""
    norms = torch.linalg.vector_norm(vectors, dim=1)
    return 1.001 * norms.amax().item()


def _ignored_bits():
    """Last bits of a number that PyTorch may leave out of fp32 products."""
    # SpeechBrain allows TF32 when it is imported. fp16 vectors lose nothing.
    return {"highest": 0, "high": 13, "medium": 16}[
        torch.get_float32_matmul_precision()
    ]


def product_seconds(dtype, width, device="cpu", enough=np.inf):
    """Time that a similarity takes in the fast product.

    Arguments
    ---------
    dtype : torch.dtype
    width : int
        Length of the vectors.
    device : str
    enough : float
        Seconds of which four times as many need not be measured again.

    Returns
    -------
    float
        Seconds, the best of three of a product of 1024 by 1024 vectors that
        is searched for what reaches a limit.
    """
    matrix = torch.ones(1024, width, dtype=dtype, device=device)
    rows, scratch = np.arange(1024), _Scratch()

    def run():
        product = _product(matrix, matrix.T, scratch)
        _reaching(product, rows, 2.0 * 127**2 * width, scratch)

    return _least_seconds(run, enough * 1024**2) / 1024**2


def _decision_seconds(audio, text, device):
    """Time that the exact similarity of a candidate takes."""
    sides = [_on_grid(side[:1024].half(), device) for side in (audio, text)]
    audio, text = (_Rows(0, side, 1.0, 0.0, 1.0, side) for side in sides)
    flat = np.arange(1024) * len(audio) // 1024 * len(text)
    flat += np.arange(1024) % len(text)
    scratch = _Scratch()
    return _least_seconds(lambda: _exact_of(audio, text, flat, scratch)) / 1024


def _least_seconds(run, enough=np.inf):
    """The best of three, or the first if that is four times as much as enough.

    A first run may well take twice as long as the others.
    """
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
        if times[0] > 4 * enough:
            break
    return min(times)


def _product(audio, columns, scratch):
    """(audio rows, texts) of the same format on a CPU, int32 of int8; or fp32.

    In units of both sides. Texts are the columns.
    """
    if audio.is_cuda and audio.dtype != torch.float32:
        # Partial sums of a half-precision result might be rounded too.
        return torch.mm(audio, columns, out_dtype=torch.float32)
    shape = (len(audio), columns.shape[1])
    if audio.dtype == torch.int8:
        out = scratch.take(torch.int32, shape, audio.device)
        return torch._int_mm(audio, columns, out=out)
    out = scratch.take(audio.dtype, shape, audio.device)
    return torch.mm(audio, columns, out=out)


def _margin(audio, text):
    """Largest error of the fast product before its rounding (see above)."""
    width = audio.fast.shape[1]
    audio_norm, text_norm = audio.norm + audio.lost, text.norm + text.lost
    return (
        audio.lost * text.norm
        + audio_norm * text.lost
        + (width + 64) * 2.0**-22 * audio_norm * text_norm
    )


def _output_rounding(product):
    """Largest rounding of similarities of unit vectors in a product."""
    return 2.0**-8 if product.dtype == torch.bfloat16 else 0.0


def _reaching(product, rows, limit, scratch):
    """Flat indices of values that reach the limit, or would but for rounding.

    Arguments
    ---------
    product : torch.Tensor
        (audio rows, texts).
    rows : array of int64
        Those to look through, ascending; others have no such value.
    limit : float
        In the product's unit.
    scratch : _Scratch

    Returns
    -------
    array of int64
    """
    if product.dtype == torch.int32:
        ends = torch.iinfo(torch.int32)
        limit = math.floor(min(max(limit, ends.min), ends.max))
    # Integers of positive numbers' bits have the numbers' order, those of
    # negative numbers are negative; they are compared faster.
    if product.dtype == torch.bfloat16:
        limit = _bf16_below(limit)
        if limit > 0:
            limit = limit.view(torch.int16).item()
            product = product.view(torch.int16)
        else:
            product, limit = product.float(), limit.item()
    if product.dtype == torch.float32 and limit > 0:
        limit = torch.tensor(limit, dtype=torch.float32)
        limit = limit.view(torch.int32).item()
        product = product.view(torch.int32)
    if product.is_cuda or product.dtype == torch.float32:
        return torch.nonzero(product.view(-1) >= limit)[:, 0].cpu().numpy()
    values = product.numpy()
    hits = scratch.take(torch.int32, (values.size,), "cpu", "hits").numpy()
    count = kernels.reaching(values, rows, values.dtype.type(limit), hits)
    return hits[:count].astype(np.int64)


def _bf16_below(value):
    """The largest bf16 number that does not exceed a value, as a tensor."""
    rounded = torch.tensor(value, dtype=torch.float64).bfloat16()
    if rounded.item() > value:
        down = torch.tensor(-torch.inf, dtype=torch.bfloat16)
        rounded = torch.nextafter(rounded, down)
    return rounded


def _argmax(product):
    """Flat index of the highest value."""
    if product.dtype != torch.bfloat16:
        row = product.amax(1).argmax().item()
        return row * product.shape[1] + product[row].argmax().item()
    bits = product.view(torch.int16).numpy()
    # Among negative numbers the lowest bits are the nearest to zero.
    return bits.argmax() if bits.max() >= 0 else bits.argmin()


def _bounded(rows, block, flat, threshold):
    """Those candidates whose bound in fp32 reaches the threshold.

    Arguments
    ---------
    rows, block, flat
        As `_exact_of`.
    threshold : float

    Returns
    -------
    array of int64
        Of `flat`.
    """
    bounds = _dots(rows.short, block.short, *np.divmod(flat, len(block)))
    # Norms are 2.01 at most, and rounding takes 2^-24 of each number.
    return flat[bounds >= threshold - 2.0**-20]


def _exact_of(rows, block, flat, scratch):
    """Exact similarities of candidates.

    Arguments
    ---------
    rows, block : _Rows
        Audio and text.
    flat : array of int64
        Indices into their product.

    Returns
    -------
    tuple of array
        Audio rows and text rows (of all), similarities.
    """
    audio, text = np.divmod(flat, len(block))
    similarities = np.empty(0)
    if len(flat):
        sides = (_deciding(side, scratch) for side in (rows, block))
        similarities = _dots(*sides, audio, text)
    return rows.begin + audio, block.begin + text, similarities


def _deciding(rows, scratch):
    """Vectors on the grid: on a CPU as fp32, which has no loops for fp16."""
    if not callable(rows.exact):
        return rows.exact if rows.exact.is_cuda else rows.whole
    exact = rows.exact()
    if exact.is_cuda:
        return exact
    whole = scratch.take(torch.float32, exact.shape, "cpu", "text")
    return whole.copy_(exact)


def _dots(a, b, a_rows, b_rows):
    """float64 dot products of pairs of rows, as an array."""
    dots = _dots_on_gpu if a.is_cuda else _dots_on_cpu
    return dots(a, b, a_rows, b_rows)


def _dots_on_cpu(a, b, a_rows, b_rows):
    out = np.empty(len(a_rows))
    kernels.dots(a.numpy(), b.numpy(), a_rows, b_rows, out)
    return out


def _dots_on_gpu(a, b, a_rows, b_rows):
    """The same, of gathered rows."""
    out = np.empty(len(a_rows))
    for begin in range(0, len(out), _PAIRS_AT_ONCE):
        part = slice(begin, begin + _PAIRS_AT_ONCE)
        left, right = (
            side.index_select(0, torch.as_tensor(index[part], device=a.device))
            for side, index in ((a, a_rows), (b, b_rows))
        )
        products = left.double().mul_(right)
        out[part] = products.sum(dim=1).cpu().numpy()
    return out


def _binned(values):
    """Counts (201,) by bin; below -1 is dropped, the last is 1 and more."""
    bins = np.searchsorted(EDGES, values, side="right") - 1
    return np.bincount(bins[bins >= 0], minlength=len(EDGES))


def _binned_on_cpu(product, unit):
    """The same for a product, and the highest of each row and column.

    Below -1 is -1 here.
    """
    values = product.numpy()
    counts = np.zeros(len(EDGES), np.int64)
    best, best_texts = values[:, 0].copy(), values[0].copy()
    kernels.histogram(values, 100 * unit, -100, counts, best, best_texts)
    return counts, unit * best, unit * best_texts


def _binned_on_gpu(product, unit, scratch):
    """The same."""
    best = [unit * product.amax(dim).cpu().numpy() for dim in (1, 0)]
    shape, device = product.shape, product.device
    steps = scratch.take(torch.float32, shape, device, "steps")
    # From 0 up, where a conversion cuts off what is behind the point.
    origin = torch.tensor(100.0, device=device)
    torch.add(origin, product, alpha=100 * unit, out=steps).clamp_(0, 200)
    bins = scratch.take(torch.uint8, shape, device).copy_(steps)
    counts = torch.bincount(bins.view(-1), minlength=len(EDGES))
    return counts.cpu().numpy(), *best


def _at_least(counts):
    """Numbers in this bin or a higher one."""
    return counts[::-1].cumsum()[::-1]


def _from_bits(bits):
    """float32 of the bits of bf16 numbers, int16."""
    return torch.from_numpy(bits).view(torch.bfloat16).float().numpy()


def _at_least_of_bits(counts):
    """Numbers that reach each edge, from counts of bf16 bit patterns.

    What was rounded to one bf16 number is taken as spread evenly between the
    middles to its neighbours, or else steps of 1/256 would show in bins of
    1/100.
    """
    patterns = np.arange(2**16, dtype=np.uint16)
    values = _from_bits(patterns.view(np.int16))
    near = patterns[np.abs(values) <= 2 * _MAX_NORM**2]
    order = near[np.argsort(values[near], kind="stable")]
    values, counts = values[order].astype(np.float64), counts[order]
    below = np.concatenate([[0], counts[:-1].cumsum()])
    middles = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2])
    reached = counts.sum() - np.interp(EDGES, middles, below)
    reached[0] = counts.sum()
    return np.rint(reached).astype(np.int64)
