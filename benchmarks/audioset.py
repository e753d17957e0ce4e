"""The search at AudioSet's size: time and memory.

    python -m benchmarks.audioset [--audio 2000000] [--text 130000]

The script's sides of benchmarks.retrieve, once each: on even embeddings with
its report, as by default, and on steep ones without. On two cores it takes half
an hour or more, and 5 GB of disk; make bench leaves it out.
"""

import argparse
import sys

from benchmarks import growth, retrieve
from benchmarks.measure import machine, precisions, product_speed, show

SEARCHES = (("even", "script"), ("steep", "script, no report"))


def main(argv):
    """Measure both; returns and prints the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audioset")
    parser.add_argument("--audio", type=int, default=2_000_000)
    parser.add_argument("--text", type=int, default=130_000)
    args = parser.parse_args(argv)
    retrieve.compile_loops()
    speeds = {name: product_speed(name) for name in precisions()}
    fastest = max(speeds, key=speeds.get)
    flop = 2 * args.audio * args.text * retrieve.SIZE
    rows = []
    for spectrum, side in SEARCHES:
        row = growth.search(args.audio, args.text, spectrum, side)
        row.of_limit = flop / speeds[fastest] / row.value
        row.limit = f"{fastest} product"
        rows.append(row)
    print(machine())
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
