"""All benchmarks of speed, and the table of their figures.

    make bench

Writes benchmarks/results/<machine>.json and, between its two marks, the tables
of all such files into benchmarks/README.md.
"""

import dataclasses
import json
import pathlib
import re
import time

from benchmarks import (
    embed,
    growth,
    loading,
    retrieve,
    startup,
    step,
    writing,
)
from benchmarks.measure import Row, machine, product_speed, table

# Together under 15 minutes on two cores.
COMMANDS = {
    step: ["--batch", "16", "--steps", "2"],
    embed: ["--captions", "256", "--clips", "48", "--runs", "1"],
    loading: ["--files", "8", "--runs", "3"],
    retrieve: ["--audio", "40000", "--runs", "1"],
    writing: ["--pairs", "500000", "--runs", "3"],
    startup: ["--runs", "1"],
    growth: ["--captions", "128", "--clips", "16"],
}
FOLDER = pathlib.Path(__file__).parent
MARKS = ("<!-- made by make bench -->\n", "<!-- end -->\n")


def main():
    """Run everything and write what came out."""
    record = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    record["products"] = {p: product_speed(p) for p in ("fp32", "bf16")}
    rows = []
    for module, flags in COMMANDS.items():
        print(f"\n{module.__name__} {' '.join(flags)}", flush=True)
        rows += module.main(flags)
    record["rows"] = [dataclasses.asdict(row) for row in rows]
    results = FOLDER / "results"
    results.mkdir(exist_ok=True)
    name = re.sub(r"\W+", "-", record["machine"]).strip("-").lower()
    path = results / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    write_tables(sorted(results.glob("*.json")))
    print(f"See {path} and {FOLDER / 'README.md'}")


def write_tables(paths):
    """Put the figures of all machines into README.md."""
    text = ""
    for path in paths:
        record = json.loads(path.read_text())
        products = ", ".join(
            f"{name} {speed / 1e9:.0f} GFLOP/s"
            for name, speed in record["products"].items()
        )
        text += f"\n### {record['machine']}\n\n"
        text += f"{record['date']}; product of matrices: {products}.\n\n"
        text += table([Row(**row) for row in record["rows"]])
    readme = FOLDER / "README.md"
    before, _, rest = readme.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    readme.write_text(before + MARKS[0] + text + "\n" + MARKS[1] + after)


if __name__ == "__main__":
    main()
