"""Exact search for the pairs of vectors whose similarity reaches a threshold.

A faster product of blocks preselects candidates, with a margin for its largest
error; then each candidate is decided by its exact similarity. What is exact,
the margins and their proofs stand in products.py. So the pairs depend on
neither block sizes nor devices nor libraries, nor on what fastest.py chooses
for speed.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import threading

import numpy as np
import torch

from curation import products
from curation.tally import Found, Seen, Tally

# Rows of a block at most, that a product stays within 16 MB, on a GPU 1 GB.
_MAX_ROWS = {"cpu": 2048, "cuda": 16384}
# Texts of a block: a CPU is slower at products that its caches do not hold.
_TEXT_ROWS = {"cpu": 1024, "cuda": 4096}
_CACHE_BYTES = 192 * 2**20  # of text blocks on a CPU
_MAX_PAIRS = 2**19  # of one block of audio rows with all texts
# Threads that search a block each: Python runs in one of them at a time.
_MAX_THREADS = 8


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


def pairs_over(
    audio,
    text,
    threshold,
    tally=None,
    with_report=False,
    audio_bs=4000,
    text_bs=None,
    device="cpu",
    precision="fp32",
    axes=None,
    rows=None,
    progress=None,
):
    """Find all pairs whose exact similarity is the threshold or more.

    Memory depends on the block sizes and on the number of texts times a few
    bytes, not on the number of pairs: a block of audio rows that has too many
    is halved.

    Arguments
    ---------
    audio, text : array or curation.embeddings.Embeddings
        (rows, d) of about unit norm, fp16 or fp32, read as `audio[begin:end]`.
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
        pairs. `curation.fastest` chooses these and the precision.
    rows : tuple of int
        The audio rows to search, from the first to before the last. None
        searches all.
    progress : callable
        Told the number of audio rows that were read, at each block.

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
    products.check_precision(precision, device)
    dtype = products.PRECISIONS[precision]
    if audio_bs < 1 or (text_bs is not None and text_bs < 1):
        raise ValueError(
            f"Block sizes must be 1 or more: {audio_bs}, {text_bs}"
        )
    if np.isnan(threshold):
        raise ValueError("The threshold is not a number")
    if with_report and axes is not None:
        raise ValueError("A report needs all similarities, axes bound them")
    tally = Tally(len(text)) if tally is None else tally
    tally.start(threshold)
    first, last = (0, len(audio)) if rows is None else rows
    if first == last or not len(text):
        return
    # A thread begins with the first GPU, whichever is chosen in this one.
    device = torch.empty(0, device=device).device
    kind = device.type
    width = text[:1].shape[1]
    text_bs = _TEXT_ROWS[kind] if text_bs is None else text_bs
    text_bs = min(text_bs, _MAX_ROWS[kind])
    turned = None if axes is None else products.turned_axes(axes).to(device)

    def read_text(begin, end):
        rows = products.prepare(
            text[begin:end],
            begin,
            dtype,
            device,
            "text",
            turned,
            scratch,
        )
        if not fits:
            # Reading it again for a few rows costs less than preparing it.
            rows.exact = lambda: products.on_grid(text[begin:end], device)
        return rows

    def search(vectors, begin, reached):
        rows = products.prepare(
            vectors, begin, dtype, device, "audio", turned, scratch
        )
        return search_rows(rows, reached)

    def search_rows(rows, reached):
        return _pairs_of(rows, texts, threshold, reached, with_report, scratch)

    room = _CACHE_BYTES
    if kind == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // 4
    # Of a text, without what it is decided by.
    row_bytes = width * dtype.itemsize
    if turned is not None:
        row_bytes = turned.shape[1] * (
            dtype.itemsize + 4 * (dtype in products.ROUGH)
        )
    # On the grid a number takes 2 bytes and 4 more as `whole`, or 4 alone.
    fits = len(text) * (6 * width + row_bytes) <= room
    num_kept = len(text) if fits else room // row_bytes
    texts = _Blocks(read_text, len(text), text_bs, num_kept)
    scratch, waiting = products.Scratch(), collections.deque()
    blocks = _even_blocks(first, last, audio_bs, _MAX_ROWS[kind])
    with search_threads(device) as (pool, num_threads):
        while True:
            # Enough that none waits while the first is taken.
            free = max(2 * num_threads - len(waiting), 0)
            for begin, end in itertools.islice(blocks, free):
                vectors = audio[begin:end]
                if progress is not None:
                    progress(end - begin)
                reached = tally.highest >= threshold
                waiting.append(pool.submit(search, vectors, begin, reached))
            if not waiting:
                return
            found = waiting.popleft().result()
            if isinstance(found, Found):
                tally.add_found(found)
                yield found.pairs
            else:
                reached = tally.highest >= threshold
                parts = [pool.submit(search_rows, x, reached) for x in found]
                waiting.extendleft(reversed(parts))


def _even_blocks(first, last, size, most):
    """Begins and ends of blocks, each cut evenly if it exceeds the most."""
    step = -(-size // -(-size // most))
    for begin in range(first, last, size):
        end = min(begin + size, last)
        for part in range(begin, end, step):
            yield part, min(part + step, end)


@contextlib.contextmanager
def search_threads(device):
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


def _pairs_of(rows, texts, threshold, reached, with_report, scratch):
    """Pairs of a block of audio rows, or its halves if they are too many.

    Arguments
    ---------
    rows : products.Rows
    texts : _Blocks
    threshold : float
    reached : bool
        Whether a pair is known that reaches the threshold. If none is, the
        highest similarity is sought among those that do not.
    with_report : bool
    scratch : products.Scratch

    Returns
    -------
    Found or list of products.Rows
    """
    seen = None
    if with_report:
        seen = Seen(np.full(len(rows), -np.inf, dtype=np.float32))
    found, count, highest, largest_margin = [], 0, -np.inf, 0.0
    for block in texts:
        product = products.multiply(rows.fast, block.columns, scratch)
        unit, margin = rows.unit * block.unit, products.margin(rows, block)
        limit, looked_at = (threshold - margin) / unit, np.arange(len(rows))
        if with_report:
            highest_of_rows = seen.add(product, unit, block.begin, scratch)
            if product.dtype == torch.int32:
                # With room for what the multiplication by the unit rounds.
                lowest = threshold - margin - 1e-5
                looked_at = np.flatnonzero(highest_of_rows >= lowest)
        flat = products.reaching(product, looked_at, limit, scratch)
        if rows.short is not None:
            flat = products.bounded(rows, block, flat, threshold)
        largest_margin = max(
            largest_margin, margin + products.output_rounding(product)
        )
        if not (reached or len(flat)):
            best = np.array([products.argmax(product)])
            value = products.exact_of(rows, block, best, scratch)[2].item()
            highest = max(highest, value)
            if rows.fast.shape != rows.exact.shape:
                # Bounds may exceed the similarities by more than the margin.
                bound = unit * product.view(-1)[best[0]].item() + margin
                largest_margin = max(largest_margin, bound - value)
        audio, text, similarities = products.exact_of(
            rows, block, flat, scratch
        )
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
    return Found(pairs, highest, largest_margin, seen)
