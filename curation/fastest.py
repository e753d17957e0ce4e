"""Which fast product a search should take, by measuring.

How many axes and which format are the fastest depends on the embeddings, the
threshold and the machine: it is found from a sample and from the time that
products take. The pairs do not depend on it.
"""

import concurrent.futures
import time

import numpy as np
import torch

from curation import products
from curation.similarity import search_threads

_SAMPLE_ROWS = 2048  # of each side, to choose a fast product
# Axes to try; with the residual a multiple of 16.
_NUM_AXES = (63, 127, 255, 511)


def fastest_product(
    audio,
    text,
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
    audio, text, threshold, with_report, device
        As `pairs_over`; of the vectors a sample is read.
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
    with search_threads(device) as (pool, _):
        # Where a search computes, with as many cores.
        return pool.submit(
            _fastest_product,
            audio,
            text,
            threshold,
            with_report,
            precision,
            device,
        ).result()


def _fastest_product(
    audio,
    text,
    threshold,
    with_report,
    precision,
    device,
):
    names = products.precisions(device)
    if precision != "auto":
        products.check_precision(precision, device)
        names = [precision]
    elif torch.device(device).type == "cuda":
        names = ["fp16"]
    best, least = (names[-1], None), np.inf
    n_audio, n_text = len(audio), len(text)
    if min(n_audio, n_text) < 2 or (with_report and len(names) == 1):
        return best
    audio, text = _sample(audio), _sample(text)
    if not (audio.isfinite().all() and text.isfinite().all()):
        return best  # the error comes with the row, and names it
    width = audio.shape[1]
    sizes = [None]
    if not with_report:
        sizes += [count for count in _NUM_AXES if count < width]
    scratch = products.Scratch()
    beside = concurrent.futures.ThreadPoolExecutor(1)
    halves = audio[::2], text[::2]
    all_axes = (
        None if with_report else beside.submit(products.joint_axes, *halves)
    )
    beside.shutdown(wait=False)  # the rest need not wait for them
    # The first decision loads compiled code, which takes longer.
    decision = _decision_seconds(audio, text, device)
    for count in sizes:
        axes, preparing = None, 0.0
        sides = [audio[1::2], text[1::2]]
        if count is not None:
            axes = all_axes.result()[:, :count].contiguous()
            turned = products.turned_axes(axes)
            short = []
            for side in sides:
                begin = time.perf_counter()
                short.append(
                    products.shortened(side, turned, products.Scratch())
                )
            preparing = time.perf_counter() - begin
            preparing /= len(side)  # a row
            preparing *= 1 / n_audio + 1 / n_text  # a similarity
            sides = short
            looking = _decision_seconds(*sides, device)
        bounds = sides[0].float() @ sides[1].float().T
        for name in names:
            dtype = products.PRECISIONS[name]
            rows = [
                products.Rows(
                    0,
                    *products.rounded(side, dtype, scratch),
                    products.largest_norm(side),
                    side,
                )
                for side in sides
            ]
            candidates = _share(bounds >= threshold - products.margin(*rows))
            seconds = preparing + candidates * decision
            if count is not None and dtype in products.ROUGH:
                left = _share(bounds >= threshold)
                seconds = preparing + candidates * looking + left * decision
            if seconds < least:
                width = sides[0].shape[1]
                seconds += product_seconds(dtype, width, device, least)
            if seconds < least:
                best, least = (name, axes), seconds
    return best


def _sample(vectors):
    """Rows from all over, (at most 2048, d) float64."""
    count, size = len(vectors), _SAMPLE_ROWS // 8
    begins = [i * (count - size) // 7 for i in range(8)]
    if count <= _SAMPLE_ROWS:
        begins, size = [0], count
    blocks = [vectors[begin : begin + size] for begin in begins]
    return torch.from_numpy(np.concatenate(blocks)).double()


def _share(chosen):
    """Of a tensor of bool, how many are true."""
    return chosen.double().mean().item()


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
    rows, scratch = np.arange(1024), products.Scratch()

    def run():
        product = products.multiply(matrix, matrix.T, scratch)
        products.reaching(product, rows, 2.0 * 127**2 * width, scratch)

    return _least_seconds(run, enough * 1024**2) / 1024**2


def _decision_seconds(audio, text, device):
    """Time that the exact similarity of a candidate takes."""
    sides = [
        products.on_grid(side[:1024].half(), device) for side in (audio, text)
    ]
    audio, text = (
        products.Rows(0, side, 1.0, 0.0, 1.0, side) for side in sides
    )
    flat = np.arange(1024) * len(audio) // 1024 * len(text)
    flat += np.arange(1024) % len(text)
    scratch = products.Scratch()
    return (
        _least_seconds(lambda: products.exact_of(audio, text, flat, scratch))
        / 1024
    )


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
