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
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import soundfile
import torch
import torchaudio
from torch.utils.data import DataLoader

from benchmarks.measure import KEEPING, Row, in_process, machine, show
from curation.embeddings import batched
from dataset.audio import AudioReader
from dataset.pipelines import CropDataset, WindowCollator, stacker

SAMPLE_RATE, DURATION = 44100, 5.0
LENGTHS = (5, 10, 30)
FORMATS = ("wav", "flac", "ogg")
RATES = (16000, 32000, 44100, 48000)
# Of the loader: windows of a batch, batches of each process before the clock
# starts and while it runs.
SIZE, FIRST, TIMED = 64, 4, 16


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


def through_loader(paths, num_workers, num_workers_of_stack):
    """Seconds a window, and the last batch.

    Arguments
    ---------
    paths : list of str
        Files, which are read again and again.
    num_workers : int
        Processes of the loader.
    num_workers_of_stack : int
        As many, or none for PyTorch's shared memory.

    Returns
    -------
    tuple of float, torch.Tensor
    """
    reader = AudioReader(SAMPLE_RATE, DURATION)
    first = FIRST * num_workers
    wanted = (first + TIMED * num_workers) * SIZE
    rows = list(itertools.islice(itertools.cycle(range(len(paths))), wanted))
    loader = DataLoader(
        CropDataset(paths, reader),
        batch_sampler=batched(rows, SIZE),
        collate_fn=WindowCollator(stacker(num_workers_of_stack, SIZE, reader)),
        num_workers=num_workers,
    )
    batches, copy = iter(loader), torch.empty(SIZE, reader.num_samples)
    for batch in itertools.islice(batches, first):
        copy.copy_(batch.windows)
    begin = time.perf_counter()
    for batch in batches:
        copy.copy_(batch.windows)
    seconds = time.perf_counter() - begin
    return seconds / (TIMED * num_workers * SIZE), copy


def both_loaders(runs):
    """Median times a window, and the largest difference, as of `measure`."""
    rng, num_workers = np.random.default_rng(0), os.cpu_count()
    times, last = {0: [], num_workers: []}, {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.wav" for i in range(SIZE)]
        for path in paths:
            noise = rng.uniform(-0.3, 0.3, 10 * SAMPLE_RATE)
            soundfile.write(path, noise, SAMPLE_RATE)
        for _ in range(runs):
            for of_stack in times:
                seconds, last[of_stack] = through_loader(
                    paths, num_workers, of_stack
                )
                times[of_stack].append(seconds)
    before, after = (statistics.median(some) for some in times.values())
    difference = (last[0] - last[num_workers]).abs().max().item()
    return {"before": before, "after": after, "difference": difference}


def main(argv):
    """Measure each kind of file; returns and prints rows by length."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        kinds = all_kinds(args.files, args.runs)
        print(json.dumps({"kinds": kinds, "loader": both_loaders(args.runs)}))
        return None
    flags = ["--side", "--files", str(args.files), "--runs", str(args.runs)]
    sides = [
        in_process("benchmarks.loading", flags, environment)
        for environment in ({}, KEEPING)
    ]
    plain, keeping = (pd.DataFrame(side["kinds"]) for side in sides)
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
    loaders = [side["loader"] for side in sides]
    rows.append(
        Row(
            "WAV files through a loader",
            "shared memory that stays",
            1 / loaders[1]["after"],
            "windows/s",
            *(loader["before"] / loader["after"] for loader in loaders),
            difference=f"{loaders[1]['difference']:.1e}",
        )
    )
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
