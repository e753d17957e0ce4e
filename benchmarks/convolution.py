"""CNN14's convolutions: by Winograd's method, and PyTorch's direct ones.

    python -m benchmarks.convolution [--clips 8] [--runs 3]

Each layer of the full-size network that `models.winograd` may take, for windows
of 5 s at 44.1 kHz, channels last there and first for the direct ones: forward,
and forward with the gradients of images and weights. In fp32, and of bf16
numbers, for which Winograd's method computes in fp32. (Which layers take it in
bf16 depends on the processor: `models.winograd.fewest_channels`. For the last
two, "Winograd" is `models.winograd.two_wide` where the network takes that.) The
direct ones run as they are (A) and with the scripts' allocator setting (B).
FLOP, for the limit, are those of a direct convolution. The difference is the
root mean square of what is off from the direct convolution of the same numbers
in fp32, over the root mean square of that. Seconds of each layer are printed as
well.
"""

import argparse
import json
import statistics
import sys
import time

import pandas as pd
import torch
import torch.nn.functional as F

from benchmarks.measure import (
    KEEPING,
    Row,
    in_process,
    machine,
    on_gpu,
    product_speed,
    show,
)
from models.winograd import WinogradConvolution, has_bf16_vectors, two_wide

# Channels in and out, frames and mel bands.
LAYERS = [
    (64, 64, 690, 64),
    (64, 128, 345, 32),
    (128, 128, 345, 32),
    (128, 256, 172, 16),
    (256, 256, 172, 16),
    (256, 512, 86, 8),
    (512, 512, 86, 8),
    (512, 1024, 43, 4),
    (1024, 1024, 43, 4),
    (1024, 2048, 21, 2),
    (2048, 2048, 21, 2),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
JOBS = ("forward", "with gradients")


def direct(x, weight):
    """PyTorch's convolution."""
    return F.conv2d(x, weight, padding=1)


def winograd(x, weight):
    """The network's."""
    if x.dtype == torch.bfloat16 and x.shape[3] == 2 and has_bf16_vectors():
        return two_wide(x, weight)
    return WinogradConvolution.apply(x, weight, x.dtype)


WAYS = {
    "direct": (direct, torch.contiguous_format),
    "Winograd": (winograd, torch.channels_last),
}


def seconds_of(run, runs):
    """Median after a warm-up."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def measure(way, precision, shape, clips, runs):
    """Seconds of one layer by job, and its difference."""
    convolve, layout = WAYS[way]
    in_channels, out_channels, *size = shape
    torch.manual_seed(0)
    x = torch.randn(clips, in_channels, *size).to(DTYPES[precision])
    x = x.contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(out_channels, in_channels, 3, 3)
    weight = weight.to(DTYPES[precision]).requires_grad_()

    def both():
        torch.autograd.grad(convolve(x, weight), (x, weight), gradient)

    with torch.no_grad():
        y = convolve(x, weight)
        exact = direct(x.float(), weight.float())
        forward = seconds_of(lambda: convolve(x, weight), runs)
    gradient = torch.randn_like(y)
    return {
        "forward": forward,
        "with gradients": seconds_of(both, runs),
        "difference": ((y - exact).norm() / exact.norm()).item(),
    }


def main(argv):
    """Measure all ways; returns and prints the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolution")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        layers = pd.DataFrame(
            measure(*args.side, shape, args.clips, args.runs)
            for shape in LAYERS
        )
        found = layers[list(JOBS)].sum().to_dict()
        found["difference"] = layers["difference"].max()
        found["layers"] = layers[list(JOBS)].to_dict("list")
        print(json.dumps(found))
        return None
    rows = []
    if on_gpu():
        print("a GPU has PyTorch's choice of methods: left out")
        return rows
    flop = sum(18 * i * o * h * w * args.clips for i, o, h, w in LAYERS)
    for precision in DTYPES:
        sides = {
            name: in_process(
                "benchmarks.convolution",
                [
                    *("--side", way, precision),
                    *("--clips", str(args.clips), "--runs", str(args.runs)),
                ],
                environment,
            )
            for name, way, environment in (
                ("direct (A)", "direct", {}),
                ("direct (B)", "direct", KEEPING),
                ("Winograd", "Winograd", KEEPING),
            )
        }
        speed = product_speed(precision)
        for job in JOBS:
            print(f"{precision}, {job}, seconds by channels")
            by_layer = {n: side["layers"][job] for n, side in sides.items()}
            index = [f"{layer[0]} to {layer[1]}" for layer in LAYERS]
            print(pd.DataFrame(by_layer, index).to_string(float_format="%.4f"))
        for job, times in zip(JOBS, (1, 3)):
            for name, side in sides.items():
                row = Row(
                    f"convolutions of {args.clips} clips, {precision}, {job}",
                    name,
                    side[job],
                    "s",
                    of_limit=times * flop / side[job] / speed,
                    limit=f"{precision} product",
                    difference=f"{side['difference']:.1e}",
                )
                if name == "Winograd":
                    row.ratio_a, row.ratio_b = (
                        sides[other][job] / side[job]
                        for other in ("direct (A)", "direct (B)")
                    )
                rows.append(row)
    print(machine())
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
