"""Writing pairs to a CSV file: retrieve_from_emb_thresh.py and pandas.

    python -m benchmarks.writing [--pairs 1000000] [--runs 3]

The ordinary way makes a dictionary for each pair, a DataFrame of these, and
lets pandas write it; it is run as it is (A) and with freed memory kept (B).
The script's `PairSink` gets the same pairs, as arrays of a hundred thousand.
Both write the same columns; of the captions one in ten needs quotes. The
manifests are there before: as DataFrames, and of the script as the search has
them. The sides run in turn, each in a process of its own.
"""

import argparse
import json
import os
import sys
import tempfile
import time

import numpy as np
import pandas as pd

from benchmarks.measure import (
    KEEPING,
    Row,
    in_process,
    machine,
    median,
    peak_memory,
    show,
)
from curation.embeddings import Embeddings, Manifest
from retrieve_from_emb_thresh import PairSink

PAIRS_A_CLIP = 10
CAPTIONS = 20000
BATCH = 100_000
SIDES = {
    "ordinary (A)": ("ordinary", {}),
    "ordinary (B)": ("ordinary", KEEPING),
    "script": ("ours", {}),
}


def make_pairs(count):
    """Manifests of clips and captions, and pairs as the search finds them.

    Returns
    -------
    tuple
        Two DataFrames; rows of the first, of the second, and similarities,
        (count,) each.
    """
    rng = np.random.default_rng(0)
    clips = count // PAIRS_A_CLIP
    starts = rng.integers(0, 20, clips) / 4
    audio = pd.DataFrame(
        {
            "wav_path": [f"/data/audio/{i:07d}.wav" for i in range(clips)],
            "start": starts,
            "end": starts + 5,
        }
    )
    words = [" in the distance", ", and a man speaks"]
    captions = [
        f"a sound of kind {i}{words[i % 10 == 0]}" for i in range(CAPTIONS)
    ]
    rows = np.sort(rng.integers(0, clips, count))
    texts = rng.integers(0, CAPTIONS, count)
    values = rng.uniform(0.7, 1, count)
    return audio, pd.DataFrame({"caption": captions}), rows, texts, values


def ordinary(audio, text, rows, texts, values, path):
    """A dictionary for each pair, and pandas."""
    paths, captions = audio["wav_path"].tolist(), text["caption"].tolist()
    starts, ends = audio["start"].tolist(), audio["end"].tolist()
    pairs = []
    for i, (a, t, s) in enumerate(
        zip(rows.tolist(), texts.tolist(), values.tolist())
    ):
        pairs.append(
            {
                "ID": i,
                "wav_path": paths[a],
                "caption": captions[t],
                "similarity": round(s, 6),
                "start": starts[a],
                "end": ends[a],
            }
        )
    pd.DataFrame(pairs).to_csv(path, index=False)


def ours(audio, text, rows, texts, values, path):
    """The script's way."""
    # The sink reads nothing of a store but its manifest and its length.
    stores = (
        Embeddings(np.empty((len(x), 0)), x, info=None, path="")
        for x in (audio, text)
    )
    with open(path, "wb") as file:
        sink = PairSink(*stores, file)
        for i in range(0, len(rows), BATCH):
            sink.add(*(part[i : i + BATCH] for part in (rows, texts, values)))


WAYS = {way.__name__: way for way in (ordinary, ours)}


def run_side(side, count, path):
    """Run one side in this process; print its time and peak memory."""
    *tables, rows, texts, values = make_pairs(count)
    if side == "ours":
        # As the search has them.
        tables = (Manifest([table], os.path.dirname(path)) for table in tables)
    pairs = *tables, rows, texts, values
    begin = time.perf_counter()
    WAYS[side](*pairs, path)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "memory": peak_memory()}))


def main(argv):
    """Measure all sides in turn; returns and prints the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.writing")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        run_side(args.side, args.pairs, args.path)
        return None
    runs, tables = {side: [] for side in SIDES}, {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            for side, (name, environment) in SIDES.items():
                path = os.path.join(folder, name)
                flags = ["--side", name, "--path", path]
                flags += ["--pairs", str(args.pairs)]
                runs[side].append(
                    in_process("benchmarks.writing", flags, environment)
                )
                tables[name] = path
        same = pd.read_csv(tables["ours"]).equals(
            pd.read_csv(tables["ordinary"])
        )
    seconds = {side: median(r, "seconds") for side, r in runs.items()}
    rows = [
        Row(
            f"write {args.pairs} pairs",
            side,
            args.pairs / seconds[side],
            "pairs/s",
            memory=median(runs[side], "memory"),
        )
        for side in SIDES
    ]
    rows[-1].ratio_a = seconds["ordinary (A)"] / seconds["script"]
    rows[-1].ratio_b = seconds["ordinary (B)"] / seconds["script"]
    rows[-1].difference = "no cell" if same else "cells differ"
    print(machine())
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
