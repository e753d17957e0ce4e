"""Fast products of vectors, what they are off by at most, and exact ones.

What is exact
-------------
A vector is taken on the grid of multiples of 2^-24: fp16 values lie on it, fp32
ones are rounded to it (by 3e-8 at most). A product of two such values is a
multiple of 2^-48, and with norms of at most 2 no partial sum of a dot product
exceeds 4 in magnitude (Cauchy-Schwarz), so each needs 51 bits at most and
float64, with 53, adds them without rounding, in any order. The similarity of a
pair is this exact dot product: it does not depend on block sizes, devices or
libraries.

Margins
-------
With r(x) the norm of what rounding x to a faster format took away, the fast
product of a and b is off by at most

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
trained models lie near a few axes.

Principal axes give a few coordinates nearly all of the length, and int8 numbers
the steps that these need. The short vectors are therefore turned, all by one
rotation that dot products do not feel, until their numbers are alike
(`turned_axes`). Pairs that products in int8 or bf16 leave are bounded once
more, by short vectors in fp32, before they are decided.
"""

import collections.abc
import dataclasses
import functools
import math
import threading

import numpy as np
import torch

from curation import kernels

GRID = 2.0**24  # steps in 1
MAX_NORM = 2.0
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
# Those that lose so much of a bound that it is worth a look before a decision.
ROUGH = (torch.int8, torch.bfloat16)
_ON = {"cpu": ("int8", "bf16", "fp32"), "cuda": ("fp16", "bf16", "fp32")}
_PAIRS_AT_ONCE = 2**16  # of which a GPU gathers the rows


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


def check_precision(precision, device):
    """Raise ValueError if a device has no fast product of this name."""
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
    products = multiply(ends, ends.T, Scratch())
    signs = ends.sign().long()
    return torch.equal(products.long(), 127**2 * signs @ signs.T)


class Scratch(threading.local):
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


@dataclasses.dataclass
class Rows:
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
        and its format is one of `ROUGH`.
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


def prepare(vectors, begin, dtype, device, kind, turned, scratch):
    """Put vectors on the grid and round them, or bounds, to the fast format.

    Arguments
    ---------
    vectors : array
        (rows, d) fp16 or fp32.
    begin : int
        The first one's number.
    dtype : torch.dtype
        The fast format.
    device : torch.device
    kind : str
        Audio or text, for the error.
    turned : torch.Tensor
        Of `turned_axes`; None for products of whole vectors.
    scratch : Scratch

    Returns
    -------
    Rows

    Raises
    ------
    ValueError
        A row is not finite or its norm exceeds 2. It is named.
    """
    exact = on_grid(vectors, device)
    whole = scratch.take(torch.float32, exact.shape, exact.device, "whole")
    whole.copy_(exact)
    norm = largest_norm(whole)
    if not norm <= MAX_NORM:
        norms = 1.001 * torch.linalg.vector_norm(whole, dim=1)
        row = begin + torch.nonzero(~(norms <= MAX_NORM))[0].item()
        raise ValueError(
            f"The {kind} embedding of row {row} (from 0) is not finite or its "
            f"norm exceeds {MAX_NORM:g}"
        )
    short = None
    if turned is not None:
        whole = shortened(whole, turned, scratch)
        norm = max(norm, largest_norm(whole))
        short = whole.float() if dtype in ROUGH else None
    return Rows(begin, *rounded(whole, dtype, scratch), norm, exact, short)


def on_grid(vectors, device):
    """Vectors as multiples of 2^-24, fp16 if that holds them, else fp32."""
    exact = torch.as_tensor(np.asarray(vectors), device=device)
    if exact.dtype == torch.float16:
        return exact
    exact = exact.float().mul(GRID).round_().div_(GRID)
    half = exact.half()
    return half if torch.equal(half.float(), exact) else exact


def rounded(whole, dtype, scratch):
    """Round vectors to a fast format.

    Arguments
    ---------
    whole : torch.Tensor
        (rows, d) float32 or float64.
    dtype : torch.dtype
    scratch : Scratch

    Returns
    -------
    tuple
        The vectors in the format, what 1 stands for in it, and the largest
        norm of what it took away from a row.
    """
    lost = scratch.take(whole.dtype, whole.shape, whole.device, "lost")
    if dtype == torch.int8:
        low, high = (end.item() for end in torch.aminmax(whole))
        unit = (max(-low, high) or 1.0) / 127
        steps = torch.div(whole, unit, out=lost).round_()
        fast = steps.to(dtype)
        return fast, unit, largest_norm(steps.mul_(-unit).add_(whole))
    fast = whole.to(dtype)
    if dtype == torch.float32:
        # Bits that the product may ignore are cleared, and their loss counted.
        fast = (fast.view(torch.int32) & -(2 ** _ignored_bits())).view(dtype)
    return fast, 1.0, largest_norm(lost.copy_(fast).sub_(whole))


def largest_norm(vectors):
    """Upper bound of the rows' norms, fp32's own rounding included."""
    norms = torch.linalg.vector_norm(vectors, dim=1)
    return 1.001 * norms.amax().item()


def _ignored_bits():
    """Last bits of a number that PyTorch may leave out of fp32 products."""
    # SpeechBrain allows TF32 when it is imported. fp16 vectors lose nothing.
    return {"highest": 0, "high": 13, "medium": 16}[
        torch.get_float32_matmul_precision()
    ]


def joint_axes(audio, text):
    """Principal axes of both sides together.

    Arguments
    ---------
    audio, text : torch.Tensor
        (rows, d) float64.

    Returns
    -------
    torch.Tensor
        (d, d) columns, the longest axis first.
    """
    moments = sum(side.T @ side / len(side) for side in (audio, text))
    return torch.linalg.eigh(moments)[1].flip(1)


def turned_axes(axes):
    """Axes for coordinates that are alike, (d, k + 1).

    They span the same space, but with a dimension more, in which coordinates
    add up to zero: the direction where all are equal is left to the residual.

    Arguments
    ---------
    axes : torch.Tensor
        (d, k) orthonormal columns.

    Returns
    -------
    torch.Tensor
    """
    size = axes.shape[1] + 1
    columns = torch.randn(
        size, size, generator=torch.Generator().manual_seed(0)
    ).double()
    columns[:, 0] = 1
    return axes @ torch.linalg.qr(columns)[0][:, 1:].T.to(axes)


def shortened(vectors, turned, scratch):
    """Vectors whose dot products bound those of the given ones.

    Arguments
    ---------
    vectors : torch.Tensor
        (rows, d).
    turned : torch.Tensor
        (d, k + 1) of `turned_axes`.
    scratch : Scratch

    Returns
    -------
    torch.Tensor
        (rows, k + 1) float64, in scratch: coordinates, and the residual's norm
        along what they leave.
    """
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


def multiply(audio, columns, scratch):
    """The fast product.

    Arguments
    ---------
    audio : torch.Tensor
        (audio rows, d).
    columns : torch.Tensor
        (d, texts) of the same format.
    scratch : Scratch

    Returns
    -------
    torch.Tensor
        (audio rows, texts) in the product of both sides' units: on a CPU of
        the same format, or int32 of int8; on a GPU fp32.
    """
    if audio.is_cuda and audio.dtype != torch.float32:
        # Partial sums of a half-precision result might be rounded too.
        return torch.mm(audio, columns, out_dtype=torch.float32)
    shape = (len(audio), columns.shape[1])
    if audio.dtype == torch.int8:
        out = scratch.take(torch.int32, shape, audio.device)
        if audio.shape[1] == 1:  # PyTorch's is wrong
            return torch.mul(audio.int(), columns.int(), out=out)
        return torch._int_mm(audio, columns, out=out)
    out = scratch.take(audio.dtype, shape, audio.device)
    return torch.mm(audio, columns, out=out)


def margin(audio, text):
    """Largest error of the fast product before its rounding (see above).

    Arguments
    ---------
    audio, text : Rows

    Returns
    -------
    float
    """
    width = audio.fast.shape[1]
    audio_norm, text_norm = audio.norm + audio.lost, text.norm + text.lost
    return (
        audio.lost * text.norm
        + audio_norm * text.lost
        + (width + 64) * 2.0**-22 * audio_norm * text_norm
    )


def output_rounding(product):
    """Largest rounding of similarities of unit vectors in a product."""
    return 2.0**-8 if product.dtype == torch.bfloat16 else 0.0


def reaching(product, rows, limit, scratch):
    """Flat indices of values that reach the limit, or would but for rounding.

    Arguments
    ---------
    product : torch.Tensor
        (audio rows, texts).
    rows : array of int64
        Those to look through, ascending; others have no such value.
    limit : float
        In the product's unit.
    scratch : Scratch

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
    nearest = torch.tensor(value, dtype=torch.float64).bfloat16()
    if nearest.item() > value:
        down = torch.tensor(-torch.inf, dtype=torch.bfloat16)
        nearest = torch.nextafter(nearest, down)
    return nearest


def argmax(product):
    """Flat index of the highest value."""
    if product.dtype != torch.bfloat16:
        row = product.amax(1).argmax().item()
        return row * product.shape[1] + product[row].argmax().item()
    bits = product.view(torch.int16).numpy()
    # Among negative numbers the lowest bits are the nearest to zero.
    return bits.argmax() if bits.max() >= 0 else bits.argmin()


def bounded(rows, block, flat, threshold):
    """Those candidates whose bound in fp32 reaches the threshold.

    Arguments
    ---------
    rows, block, flat
        As `exact_of`.
    threshold : float

    Returns
    -------
    array of int64
        Of `flat`.
    """
    bounds = _dots(rows.short, block.short, *np.divmod(flat, len(block)))
    # Norms are 2.01 at most, and rounding takes 2^-24 of each number.
    return flat[bounds >= threshold - 2.0**-20]


def exact_of(rows, block, flat, scratch):
    """Exact similarities of candidates.

    Arguments
    ---------
    rows, block : Rows
        Audio and text.
    flat : array of int64
        Indices into their product.
    scratch : Scratch

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
