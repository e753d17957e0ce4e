"""Pairs over a threshold, by retrieve_from_emb_thresh.py and the ordinary way.

    python -m benchmarks.retrieve [--audio 40000] [--text 20000] [--runs 3]

The ordinary way reads both arrays whole, multiplies blocks of 4000 audio rows
with all captions in fp32, takes the nonzero entries of the comparison, makes a
dictionary for each pair and lets pandas write the CSV. Both sides run in turn,
each in a process of its own, and start from the same files; compared are the
pairs, the time without the imports, and the peak of resident memory. Beside the
times stands what the product alone would take at the machine's own speed.
"""

import argparse
import json
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import torch

from benchmarks.measure import (
    in_process,
    median,
    peak_memory,
    processor,
    product_speed,
)
from curation.embeddings import write_store

HPARAMS = "hparams/curation/audioset_insper_duv2_retr.yaml"
SIZE = 1024
CLUSTERS = 2000


def make_stores(folder, n_audio, n_text):
    """Unit-norm fp16 rows around common centres, and their manifests.

    Returns
    -------
    float
        A threshold that about one pair in 8000 reaches.
    """
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS, SIZE), dtype=np.float32)
    names = [f"/data/audio/{i}.wav" for i in range(n_audio)]
    captions = [f"a sound of kind {i}, in words" for i in range(n_text)]
    manifests = {
        "audio_audioset": pd.DataFrame({"wav_path": names, "start": 0.0}),
        "text_insper": pd.DataFrame({"caption": captions}),
    }
    rows = {}
    for stem, manifest in manifests.items():
        count = len(manifest)
        x = centres[rng.integers(CLUSTERS, size=count)]
        x += rng.standard_normal((count, SIZE), dtype=np.float32) * 0.6
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        rows[stem] = x.astype(np.float16)
        settings = {"weights": "none", "size": SIZE}
        write_store(f"{folder}/{stem}", [rows[stem]], manifest, settings, {})
    some = rows["audio_audioset"][:500].astype(np.float32)
    sample = some @ rows["text_insper"].astype(np.float32).T
    return float(np.quantile(sample, 1 - 1 / 8000))


def ordinary(folder, threshold):
    """The baseline of the docstring."""
    audio = np.load(f"{folder}/audio_audioset_embeddings.npy")
    text = np.load(f"{folder}/text_insper_embeddings.npy")
    paths = pd.read_csv(f"{folder}/audio_audioset.csv")["wav_path"]
    captions = pd.read_csv(f"{folder}/text_insper.csv")["caption"]
    text = torch.from_numpy(text).float()
    pairs = []
    for begin in range(0, len(audio), 4000):
        block = torch.from_numpy(audio[begin : begin + 4000]).float()
        similarity = block @ text.T
        for i, j in (similarity >= threshold).nonzero().tolist():
            pairs.append(
                {
                    "ID": len(pairs),
                    "wav_path": paths[begin + i],
                    "caption": captions[j],
                }
            )
    pd.DataFrame(pairs).to_csv(f"{folder}/ordinary.csv", index=False)


def ours(folder, threshold):
    """The script, without the report, which the baseline has not either."""
    import retrieve_from_emb_thresh

    retrieve_from_emb_thresh.main(
        [
            HPARAMS,
            f"--emb_dir={folder}",
            f"--sim_threshold={threshold}",
            "--with_report=False",
        ]
    )


def run_side(side, folder, threshold):
    """Run one side in this process; print its time and peak memory."""
    import retrieve_from_emb_thresh  # noqa: F401, so that it is not timed

    begin = time.perf_counter()
    {"ours": ours, "ordinary": ordinary}[side](folder, threshold)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory()}))


def pairs_of(path):
    """The pairs of a CSV, as a set of paths and captions."""
    table = pd.read_csv(path)
    return set(zip(table["wav_path"], table["caption"]))


def main(argv):
    """Measure both sides in turn and print the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieve")
    parser.add_argument("--audio", type=int, default=40000)
    parser.add_argument("--text", type=int, default=20000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--threshold", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        run_side(args.side, args.folder, args.threshold)
        return
    with tempfile.TemporaryDirectory() as folder:
        threshold = make_stores(folder, args.audio, args.text)
        sides = {"ordinary": [], "ours": []}
        for _ in range(args.runs):
            for side, runs in sides.items():
                flags = ["--side", side, "--folder", folder]
                flags += ["--threshold", repr(threshold)]
                runs.append(in_process("benchmarks.retrieve", flags))
        found = pairs_of(f"{folder}/audioset_insper_duv2_curation.csv")
        expected = pairs_of(f"{folder}/ordinary.csv")
    print(processor())
    print(f"{args.audio} x {args.text} x {SIZE}, threshold {threshold:.4f}")
    print(f"pairs: {len(found)}; in one of the two: {len(found ^ expected)}")
    flop = 2 * args.audio * args.text * SIZE
    for name in ("float32", "bfloat16"):
        speed = product_speed(getattr(torch, name))
        print(
            f"product alone, {name}: {speed / 1e9:.0f} GFLOP/s, "
            f"{flop / speed:.1f} s"
        )
    medians = {}
    for side, runs in sides.items():
        medians[side] = median(runs, "seconds")
        peak = median(runs, "peak_bytes") / 2**20
        print(f"{side}: {medians[side]:.1f} s, peak {peak:.0f} MiB")
    print(f"ratio: {medians['ordinary'] / medians['ours']:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
