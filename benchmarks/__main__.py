"""All benchmarks of speed, and the table of their figures.

    make bench
    python -m benchmarks embed growth

The second measures these alone anew; some are measured only so. Writes
benchmarks/results/<machine>.json and, between its two marks, the tables of all
such files into benchmarks/README.md.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import re
import sys
import time

from benchmarks.measure import Row, machine, precisions, product_speed, table

COMMANDS = {
    "step": ["--batch", "16", "--steps", "1"],
    "convolution": ["--clips", "4", "--runs", "1"],
    "embed": ["--captions", "256", "--clips", "48", "--runs", "1"],
    "loading": ["--files", "6", "--runs", "2"],
    "retrieve": ["--audio", "40000", "--runs", "1"],
    "writing": ["--pairs", "1000000", "--runs", "1"],
    "startup": ["--runs", "1"],
    "growth": ["--captions", "128", "--clips", "8"],
    "audioset": [],
}
# Measured where they are named: half an hour, and what is a part of `step`. The
# others together are to take less than 15 minutes on two cores.
ON_REQUEST = {"audioset", "convolution"}
FOLDER = pathlib.Path(__file__).parent
MARKS = ("<!-- made by make bench -->\n", "<!-- end -->\n")


def main(argv):
    """Run what is named, or everything, and write what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"what to measure: {', '.join(COMMANDS)}; by default all but "
        f"{', '.join(sorted(ON_REQUEST))}",
    )
    default = [name for name in COMMANDS if name not in ON_REQUEST]
    names = parser.parse_args(argv).names or default
    unknown = set(names) - COMMANDS.keys()
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    device = machine()
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    path = FOLDER / "results" / f"{name}.json"
    record = {"machine": device, "benchmarks": {}}
    if path.exists():
        record = json.loads(path.read_text())
    for name in names:
        print(f"\nbenchmarks.{name} {' '.join(COMMANDS[name])}", flush=True)
        begin = time.monotonic()
        # A virtual machine's speed changes from hour to hour.
        products = {p: product_speed(p) for p in precisions()}
        module = importlib.import_module(f"benchmarks.{name}")
        rows = module.main(COMMANDS[name])
        print(f"{name}: {time.monotonic() - begin:.0f} s in all", flush=True)
        if not rows:
            continue
        record["benchmarks"][name] = {
            "date": time.strftime("%Y-%m-%d"),
            "products": products,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    write_tables(sorted(path.parent.glob("*.json")))
    print(f"See {path} and {FOLDER / 'README.md'}")


def write_tables(paths):
    """Put the figures of all machines into README.md."""
    text = ""
    for path in paths:
        record = json.loads(path.read_text())
        text += f"\n### {record['machine']}\n"
        for name in COMMANDS:
            if name not in record["benchmarks"]:
                continue
            found = record["benchmarks"][name]
            products = ", ".join(
                f"{precision} {speed / 1e9:.0f}"
                for precision, speed in found["products"].items()
            )
            text += f"\n`{name}`, {found['date']}; product of matrices, 10^9 "
            text += f"operations/s: {products}.\n\n"
            text += table([Row(**row) for row in found["rows"]])
    readme = FOLDER / "README.md"
    before, _, rest = readme.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    readme.write_text(before + MARKS[0] + text + "\n" + MARKS[1] + after)


if __name__ == "__main__":
    main(sys.argv[1:])
