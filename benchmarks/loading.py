"""Reading a window of a file: with seek, and the ordinary way.

    python -m benchmarks.loading [--files 24] [--runs 3]

Files of noise of 5, 10 and 30 s, as WAV, FLAC and OGG, at 16, 32, 44.1 and
48 kHz, of which a random window of 5 s at 44.1 kHz is wanted. The ordinary way
reads each file whole, resamples it with a new resampler, and cuts the window
out. Both run in turn in one process and one thread, over files in the page
cache. The samples of both are compared.
"""

import argparse
import itertools
import math
import statistics
import sys
import tempfile
import time

import numpy as np
import soundfile
import torch
import torchaudio

from benchmarks.measure import processor
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


def main(argv):
    """Measure each kind of file, and print the ratios by length."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    reader = AudioReader(SAMPLE_RATE, DURATION)
    rng = np.random.default_rng(0)
    fractions = rng.random(args.files)
    ratios = {seconds: [] for seconds in LENGTHS}
    print(processor())
    print("seconds format   rate  ordinary ms  ours ms  ratio  difference")
    for seconds, ending, rate in itertools.product(LENGTHS, FORMATS, RATES):
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/{i}.{ending}" for i in range(args.files)]
            for path in paths:
                noise = rng.uniform(-0.3, 0.3, seconds * rate)
                soundfile.write(path, noise.astype(np.float32), rate)
            before, after, difference = measure(
                reader, paths, fractions, args.runs
            )
        ratios[seconds].append(before / after)
        print(
            f"{seconds:7} {ending:6} {rate:6} {1e3 * before:12.2f} "
            f"{1e3 * after:8.2f} {before / after:6.2f} {difference:11.1e}"
        )
    for seconds, values in ratios.items():
        mean = math.exp(statistics.mean(map(math.log, values)))
        print(f"{seconds} s: {mean:.2f} times as fast (geometric mean)")


if __name__ == "__main__":
    main(sys.argv[1:])
