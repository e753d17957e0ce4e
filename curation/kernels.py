"""Loops over products and vectors on a CPU, compiled by Numba.

In PyTorch each of these would be several operations, which read and write
memory time and again and take longer than the product that they look through.
They hold no lock of Python's, so that threads work side by side.
"""

import numpy as np

from compiled import njit

# Neighbours are often equal; an addition to the same place would wait for the
# one before it.
_TALLIES = 8
# Values of which the highest is found first.
_LOOKED_AT = 64


@njit(nogil=True)
def reaching(product, rows, limit, hits):
    """Find the values that reach a limit.

    Arguments
    ---------
    product : array
        (rows, columns) of int16 or int32.
    rows : array of int
        Those to look through, ascending.
    limit : int
    hits : array of int32
        (rows * columns,) to be filled with flat indices, ascending.

    Returns
    -------
    int
        How many there are.
    """
    count = 0
    columns = product.shape[1]
    for i in rows:
        for begin in range(0, columns, _LOOKED_AT):
            part = product[i, begin : begin + _LOOKED_AT]
            highest = part[0]
            for j in range(len(part)):
                highest = part[j] if part[j] > highest else highest
            if highest >= limit:  # few have any
                for j in range(len(part)):
                    if part[j] >= limit:
                        hits[count] = i * columns + begin + j
                        count += 1
    return count


@njit(nogil=True)
def histogram(product, scale, lowest, counts, best_of_row, best_of_column):
    """Count values by bin, and find the highest of each row and column.

    Arguments
    ---------
    product : array
        (rows, columns) of int32 or float32, not NaN.
    scale : float
        Bins in 1.
    lowest : int
        The first bin; what is below counts there, and what is above the last
        in the last.
    counts : array of int64
        (bins,), added to.
    best_of_row, best_of_column : array
        (rows,), (columns,) of the product's type, raised to the highest.
    """
    columns = product.shape[1]
    tallies = np.zeros((_TALLIES, len(counts)), np.int64)
    # Unsigned: signed indices might count from the end, which takes longer.
    bins = np.empty(columns, np.uint32)
    scale = np.float32(scale)
    first, last = np.float32(0), np.float32(len(counts) - 1)
    offset = np.float32(lowest)
    whole = columns // _TALLIES * _TALLIES
    for i in range(len(product)):
        row = product[i]
        highest = best_of_row[i]
        for j in range(columns):
            value, best = row[j], best_of_column[j]
            highest = value if value > highest else highest
            best_of_column[j] = value if value > best else best
            step = np.floor(np.float32(value) * scale) - offset
            step = step if step > first else first
            bins[j] = np.uint32(step if step < last else last)
        best_of_row[i] = highest
        for j in range(0, whole, _TALLIES):
            for k in range(_TALLIES):
                tallies[k, bins[j + k]] += 1
        for j in range(whole, columns):
            tallies[0, bins[j]] += 1
    counts += tallies.sum(axis=0)


# Sums may be taken in any order: see products.py for why none is rounded.
@njit(nogil=True, fastmath={"reassoc", "contract"})
def dots(a, b, a_rows, b_rows, out):
    """float64 dot products of pairs of rows.

    Arguments
    ---------
    a, b : array of float32
        (rows, d).
    a_rows, b_rows : array of int
        (pairs,).
    out : array of float64
        (pairs,), to be filled.
    """
    for i in range(len(out)):
        x, y = a[a_rows[i]], b[b_rows[i]]
        total = 0.0
        for j in range(len(x)):
            total += np.float64(x[j]) * np.float64(y[j])
        out[i] = total
