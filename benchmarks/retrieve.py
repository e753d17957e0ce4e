"""Pairs over a threshold, by retrieve_from_emb_thresh.py and other ways.

    python -m benchmarks.retrieve [--audio 40000] [--text 20000] [--runs 3]

The ordinary way reads both arrays whole, multiplies blocks of 4000 audio rows
with all captions in fp32, takes the nonzero entries of the comparison, makes a
dictionary for each pair and lets pandas write the CSV. It is run as it is (A)
and with the allocator's setting that the scripts for networks make for
themselves (B). Where faiss is installed, its IndexFlatIP.range_search is a
third way, whose pairs go to pandas as arrays.

The script runs with its report, as it does by default, and without, when it may
bound similarities by a few principal axes. The embeddings are once even in all
their 1024 dimensions, around common centres, and once with a spectrum that
falls as k^-0.75, along axes that are not the coordinates', as in a trained
model. The sides run in turn, each in a process of its own, and start
from the same files, once the script's loops are compiled; the time is that
without the imports, and the limit the product alone at the machine's own speed,
for the script in the fastest format that it may use, for the others in fp32. A
GPU gets five times as many clips.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time

import numpy as np
import pandas as pd
import torch

from benchmarks.measure import (
    KEEPING,
    Row,
    device,
    in_process,
    machine,
    median,
    on_gpu,
    peak_memory,
    precisions,
    product_speed,
    show,
)
from curation.embeddings import write_store

HPARAMS = "hparams/curation/audioset_insper_duv2_retr.yaml"
SIZE = 1024
CLUSTERS = 2000
SPECTRA = {"even": 0.0, "steep": -0.75}
SIDES = {
    "ordinary (A)": ("ordinary", {}),
    "ordinary (B)": ("ordinary", KEEPING),
    "faiss": ("with_faiss", {}),
    "script": ("ours", {}),
    "script, no report": ("ours_without_report", {}),
}


def make_stores(folder, n_audio, n_text, exponent):
    """Unit-norm fp16 rows around common centres, and their manifests.

    Arguments
    ---------
    folder : str
    n_audio, n_text : int
    exponent : float
        Of the scale along an axis, by its number.

    Returns
    -------
    float
        A threshold that about one pair in 8000 reaches.
    """
    rng = np.random.default_rng(0)
    scales = np.arange(1, SIZE + 1, dtype=np.float32) ** exponent
    centres = rng.standard_normal((CLUSTERS, SIZE), dtype=np.float32)
    axes = np.linalg.qr(rng.standard_normal((SIZE, SIZE), dtype=np.float32))[0]
    names = [f"/data/audio/{i}.wav" for i in range(n_audio)]
    captions = [f"a sound of kind {i}, in words" for i in range(n_text)]
    manifests = {
        "audio_audioset": pd.DataFrame({"wav_path": names, "start": 0.0}),
        "text_insper": pd.DataFrame({"caption": captions}),
    }
    for stem, manifest in manifests.items():
        of_centres = rng.integers(CLUSTERS, size=len(manifest))

        def parts(of_centres=of_centres):
            for begin in range(0, len(of_centres), 65536):
                x = centres[of_centres[begin : begin + 65536]]
                x += rng.standard_normal(x.shape, dtype=np.float32) * 0.6
                x = (x * scales) @ axes
                yield x / np.linalg.norm(x, axis=1, keepdims=True)

        settings = {"weights": "none", "size": SIZE}
        write_store(f"{folder}/{stem}", parts(), manifest, settings, {})
    audio, text = (
        np.load(f"{folder}/{stem}_embeddings.npy", mmap_mode="r")
        for stem in manifests
    )
    sample = audio[:500].astype(np.float32) @ text.astype(np.float32).T
    return float(np.quantile(sample, 1 - 1 / 8000))


def ordinary(folder, threshold):
    """The baseline of the docstring."""
    audio = np.load(f"{folder}/audio_audioset_embeddings.npy")
    text = np.load(f"{folder}/text_insper_embeddings.npy")
    paths = pd.read_csv(f"{folder}/audio_audioset.csv")["wav_path"]
    captions = pd.read_csv(f"{folder}/text_insper.csv")["caption"]
    text = torch.from_numpy(text).float().to(device())
    pairs = []
    for begin in range(0, len(audio), 4000):
        block = torch.from_numpy(audio[begin : begin + 4000])
        block = block.float().to(device())
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


def with_faiss(folder, threshold):
    """faiss instead of products, arrays instead of dictionaries."""
    import faiss

    audio = np.load(f"{folder}/audio_audioset_embeddings.npy")
    text = np.load(f"{folder}/text_insper_embeddings.npy")
    paths = pd.read_csv(f"{folder}/audio_audioset.csv")["wav_path"].to_numpy()
    captions = pd.read_csv(f"{folder}/text_insper.csv")["caption"].to_numpy()
    index = faiss.IndexFlatIP(SIZE)
    index.add(text.astype(np.float32))
    found = []
    for begin in range(0, len(audio), 4000):
        block = audio[begin : begin + 4000].astype(np.float32)
        limits, _, columns = index.range_search(block, threshold)
        rows = begin + np.repeat(
            np.arange(len(block)), np.diff(limits.astype(np.int64))
        )
        found.append((rows, columns))
    rows, columns = (np.concatenate(part) for part in zip(*found))
    table = {"wav_path": paths[rows], "caption": captions[columns]}
    pd.DataFrame(table).to_csv(f"{folder}/faiss.csv", index_label="ID")


def ours(folder, threshold, *flags):
    """The script as it is."""
    import retrieve_from_emb_thresh

    retrieve_from_emb_thresh.main(
        [
            HPARAMS,
            f"--emb_dir={folder}",
            f"--sim_threshold={threshold}",
            *flags,
        ]
    )


def ours_without_report(folder, threshold):
    """The script without what the other ways have not either."""
    ours(folder, threshold, "--with_report=False")


WAYS = {
    way.__name__: way
    for way in (ordinary, with_faiss, ours, ours_without_report)
}


def run_side(side, folder, threshold):
    """Run one side in this process; print its time and peak memory."""
    import retrieve_from_emb_thresh  # noqa: F401, so that it is not timed

    if side == "with_faiss":
        import faiss  # noqa: F401
    begin = time.perf_counter()
    WAYS[side](folder, threshold)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "memory": peak_memory()}))


def pairs_of(path):
    """The pairs of a CSV, as a set of paths and captions."""
    table = pd.read_csv(path)
    return set(zip(table["wav_path"], table["caption"]))


def compile_loops():
    """Run the script's first search of all, in which it compiles its loops."""
    with tempfile.TemporaryDirectory() as folder:
        make_stores(folder, 8, 8, 0.0)
        flags = ["--side", "ours", "--folder", folder, "--threshold", "0"]
        in_process("benchmarks.retrieve", flags)


def measure(spectrum, n_audio, n_text, times):
    """All sides on one kind of embeddings, as rows."""
    sides = dict(SIDES)
    if importlib.util.find_spec("faiss") is None:
        print("faiss is not installed: left out")
        del sides["faiss"]
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        threshold = make_stores(folder, n_audio, n_text, SPECTRA[spectrum])
        pairs = {}
        for _ in range(times):
            for side, (name, environment) in sides.items():
                flags = ["--side", name, "--folder", folder]
                flags += ["--threshold", repr(threshold)]
                runs[side].append(
                    in_process("benchmarks.retrieve", flags, environment)
                )
                stem = {"ordinary": "ordinary", "with_faiss": "faiss"}
                stem = stem.get(name, "audioset_insper_duv2_curation")
                pairs[side] = pairs_of(f"{folder}/{stem}.csv")
    flop = 2 * n_audio * n_text * SIZE
    speeds = {name: product_speed(name) for name in precisions()}
    fastest = max(speeds, key=speeds.get)
    seconds = {side: median(r, "seconds") for side, r in runs.items()}
    rows = []
    for side in sides:
        limit = fastest if side.startswith("script") else "fp32"
        row = Row(
            f"{spectrum} {n_audio} x {n_text}, {len(pairs['script'])} pairs",
            side,
            seconds[side],
            "s",
            memory=median(runs[side], "memory"),
            of_limit=flop / speeds[limit] / seconds[side],
            limit=f"{limit} product",
        )
        if not side.startswith("ordinary"):
            row.ratio_a = seconds["ordinary (A)"] / seconds[side]
            row.ratio_b = seconds["ordinary (B)"] / seconds[side]
            differing = len(pairs[side] ^ pairs["ordinary (A)"])
            row.difference = f"{differing} pairs"
        rows.append(row)
    return rows


def main(argv):
    """Measure all sides in turn; returns and prints the rows."""
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
        return None
    if on_gpu():
        args.audio *= 5
    print(machine())
    compile_loops()
    rows = []
    for spectrum in SPECTRA:
        found = measure(spectrum, args.audio, args.text, args.runs)
        show(found)
        rows += found
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
