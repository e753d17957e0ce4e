"""Counts of similarities: what each threshold would keep."""

import dataclasses

import numpy as np
import torch

from curation import kernels
from curation.products import MAX_NORM

EDGES = np.arange(-100, 101) / 100  # lower ends of the histogram's bins


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
        names = ("_fast_bits", "_fast_pairs", "_fast_clips", "_pairs", "_clips")
        for name in names:
            getattr(self, name)[:] += getattr(other, name)
        for name in ("_fast_texts", "_texts"):
            own = getattr(self, name)
            np.maximum(own, getattr(other, name), out=own)

    def add_found(self, found):
        """Count what a search of some audio rows and all texts found.

        Arguments
        ---------
        found : Found
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
class Seen:
    """Fast products of a block of audio rows, counted.

    Arguments
    ---------
    best : array of float
        (audio rows,) the highest of each so far.
    bits : array of int
        (65536,) counts of bf16 numbers by their bits, of products in bf16.
    bins : array of int
        (201,) counts by bin, of others.
    text_best : list of tuple
        Of each product, its first text's number and the highest of each text.
    """

    best: np.ndarray
    bits: np.ndarray | None = None
    bins: np.ndarray | None = None
    text_best: list = dataclasses.field(default_factory=list)

    def add(self, product, unit, text_begin, scratch):
        """Count one product.

        Arguments
        ---------
        product : torch.Tensor
            (audio rows, texts).
        unit : float
            What 1 stands for in it.
        text_begin : int
            The first text's number.
        scratch : curation.products.Scratch

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


@dataclasses.dataclass
class Found:
    """What a search of a block of audio rows and all texts found.

    Arguments
    ---------
    pairs : tuple of array
        As `curation.similarity.pairs_over` yields them.
    highest, margin : float
        As `Tally`.
    seen : Seen
        Counts of all similarities, if they were asked for.
    """

    pairs: tuple
    highest: float
    margin: float
    seen: Seen | None


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
    near = patterns[np.abs(values) <= 2 * MAX_NORM**2]
    order = near[np.argsort(values[near], kind="stable")]
    values, counts = values[order].astype(np.float64), counts[order]
    below = np.concatenate([[0], counts[:-1].cumsum()])
    middles = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2])
    reached = counts.sum() - np.interp(EDGES, middles, below)
    reached[0] = counts.sum()
    return np.rint(reached).astype(np.int64)
