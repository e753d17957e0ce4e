"""Reading a window of a file: with seek, and the ordinary way.

    python -m benchmarks.loading [--files 24] [--runs 3]

Files of noise of 5, 10 and 30 s, as WAV, FLAC and OGG, at 16, 32, 44.1 and
48 kHz, of which a random window of 5 s at 44.1 kHz is wanted. The ordinary way
reads each file whole, resamples it with a new resampler, and cuts the window
out. Both run in turn in one process and one thread, over files in the page
cache, once as they are (A) and once with the allocator's setting that the
scripts make for themselves (B). The samples of both are compared.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import soundfile
import torch
import torchaudio

from benchmarks.measure import KEEPING, Row, in_process, machine, show
from dataset.audio import AudioReader

SAMPLE_RATE, DURATION = 44100, 5.0
LENGTHS = (5, 10, 30)
FORMATS = ("wav", "flac", "ogg")
RATES = (16000, 32000, 44100, 48000)


def ordinary(path, start):
    """The baseline of the docstring, from a start in seconds on."""
    samples, rate = soundfile.read(path, dtype="float32")
    samples = torch.from_numpy(samples)
    if rate != SAMPLE_RATE:
        samples = torchaudio.transforms.Resample(rate, SAMPLE_RATE)(samples)
    begin = round(start * SAMPLE_RATE)
    return samples[begin : begin + round(DURATION * SAMPLE_RATE)]


def measure(reader, paths, fractions, runs):
    """Median times of both ways over some files, and their difference.

    Returns
    -------
    tuple of float
        Seconds a file the ordinary way and ours, largest difference.
    """
    times, difference = {"ordinary": [], "ours": []}, 0.0
    found = [reader.crop(p, f) for p, f in zip(paths, fractions)]  # warm-up
    for _ in range(runs):
        begin = time.perf_counter()
        whole = [ordinary(p, at) for p, (_, at) in zip(paths, found)]
        middle = time.perf_counter()
        found = [reader.crop(p, f) for p, f in zip(paths, fractions)]
        times["ordinary"].append(middle - begin)
        times["ours"].append(time.perf_counter() - middle)
    for a, (b, _) in zip(whole, found):
        difference = max(difference, (a - b[: len(a)]).abs().max().item())
    medians = [statistics.median(t) / len(paths) for t in times.values()]
    return *medians, difference


def all_kinds(files, runs):
    """Every kind of file, one dictionary each."""
    torch.set_num_threads(1)
    reader = AudioReader(SAMPLE_RATE, DURATION)
    rng = np.random.default_rng(0)
    fractions = rng.random(files)
    kinds = []
    for seconds, ending, rate in itertools.product(LENGTHS, FORMATS, RATES):
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{i}.{ending}" for i in range(files)]
            for path in paths:
                noise = rng.uniform(-0.3, 0.3, seconds * rate)
                soundfile.write(path, noise.astype(np.float32), rate)
            before, after, difference = measure(reader, paths, fractions, runs)
        kind = {"seconds": seconds, "format": ending, "rate": rate}
        times = {"before": before, "after": after, "difference": difference}
        kinds.append(kind | times)
    return kinds


def main(argv):
    """Measure each kind of file; returns and prints rows by length."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(all_kinds(args.files, args.runs)))
        return None
    flags = ["--side", "--files", str(args.files), "--runs", str(args.runs)]
    plain, keeping = (
        pd.DataFrame(in_process("benchmarks.loading", flags, environment))
        for environment in ({}, KEEPING)
    )
    print(machine())
    plain["ratio A"] = plain["before"] / plain["after"]
    plain["ratio B"] = keeping["before"] / keeping["after"]
    print(plain.round(4).to_string(index=False))
    rows = []
    for seconds, group in plain.groupby("seconds"):
        ratios = np.exp(np.log(group[["ratio A", "ratio B"]]).mean())
        rows.append(
            Row(
                f"read windows of {seconds} s files",
                "AudioReader",
                1 / group["after"].mean(),
                "windows/s",
                *ratios,
                difference=f"{group['difference'].max():.1e}",
            )
        )
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
