"""How the time and memory of embedding and search grow with their input.

    python -m benchmarks.growth

The scripts' sides of benchmarks.embed (fp32) and benchmarks.retrieve (with its
report) at N, 2N and 4N, once each, in processes of their own.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile

import pandas as pd

from benchmarks import embed, retrieve
from benchmarks.measure import Row, in_process, machine, show


def embedding(sizes):
    """Rows of captions, then of clips.

    Arguments
    ---------
    sizes : list of tuple of int
        Numbers of captions and clips, ascending.

    Returns
    -------
    list of benchmarks.measure.Row
    """
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        embed.make_world(folder, *sizes[-1])
        captions = pd.read_csv(f"{folder}/captions.csv")
        paths = pathlib.Path(f"{folder}/audio.txt")
        clips = paths.read_text().splitlines(keepends=True)
        for n_captions, n_clips in sizes:
            captions[:n_captions].to_csv(f"{folder}/captions.csv", index=False)
            paths.write_text("".join(clips[:n_clips]))
            # A store of another list would not be replaced.
            shutil.rmtree(f"{folder}/fp32", ignore_errors=True)
            flags = ["--side", "ours", "--folder", folder]
            flags += ["--precision", "fp32"]
            runs.append(in_process("benchmarks.embed", flags))
    return [
        Row(f"embed {size[i]} {unit}s", "script, fp32", run[kind], "s",
            memory=run["memory"])
        for i, (kind, unit) in enumerate(
            (("text", "caption"), ("audio", "clip"))
        )
        for size, run in zip(sizes, runs)
    ]  # fmt: skip


def search(n_audio, n_text, spectrum="even", side="script"):
    """The row of a search, by a side of benchmarks.retrieve."""
    exponent = retrieve.SPECTRA[spectrum]
    with tempfile.TemporaryDirectory() as folder:
        threshold = retrieve.make_stores(folder, n_audio, n_text, exponent)
        flags = ["--side", retrieve.SIDES[side][0], "--folder", folder]
        flags += ["--threshold", repr(threshold)]
        run = in_process("benchmarks.retrieve", flags)
    return Row(
        f"search {n_audio} x {n_text}, {spectrum}", side, run["seconds"], "s",
        memory=run["memory"],
    )  # fmt: skip


def main(argv):
    """Measure the three sizes of each; returns and prints the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth")
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--audio", type=int, default=20000)
    parser.add_argument("--text", type=int, default=10000)
    args = parser.parse_args(argv)
    sizes = (1, 2, 4)
    rows = embedding([(n * args.captions, n * args.clips) for n in sizes])
    retrieve.compile_loops()
    rows += [search(n * args.audio, args.text) for n in sizes]
    rows += [search(args.audio, n * args.text) for n in sizes[1:]]
    print(machine())
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
