"""What the benchmarks share: sides in processes of their own, peaks, rows."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from models.packed import PackedLinear

# The allocator's setting of experiment.keep_freed_memory, for any process.
KEEPING = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(10**11),
    "MALLOC_TOP_PAD_": str(2**28),
}


def in_process(module, arguments, environment=None):
    """Run a module and read the JSON object of its last line.

    Arguments
    ---------
    module : str
        As behind `python -m`.
    arguments : list of str
    environment : dict
        Variables to add.

    Returns
    -------
    dict
    """
    output = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ).stdout
    return json.loads(output.splitlines()[-1])


def is_warm_soon():
    """Whether a first run leaves nothing for a second one to prepare.

    So it is on a CPU where memory goes back to the system after each.
    """
    return not (on_gpu() or KEEPING.items() <= os.environ.items())


def device():
    """Where a side computes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu():
    """Whether that is a GPU."""
    return device() == "cuda"


def precisions():
    """Formats of products there that the scripts may use."""
    return ("fp32", "bf16") if on_gpu() else ("fp32", "bf16", "int8")


def worthwhile(sides):
    """Leave out what computes in a format that is slower here than fp32.

    Arguments
    ---------
    sides : dict
        Name -> tuple with the precision as its second.

    Returns
    -------
    dict
        The others. What is left out is said.
    """
    if on_gpu():
        # Where the allocator of the system has no part in it.
        sides = {k: v for k, v in sides.items() if k != "ordinary (B)"}
    names = {"fp32"} | {side[1] for side in sides.values()}
    speeds = {name: product_speed(name) for name in names}
    slower = {name for name in names if speeds[name] < speeds["fp32"]}
    for precision in sorted(slower):
        print(f"{precision} products are slower here than fp32: left out")
    return {k: side for k, side in sides.items() if side[1] not in slower}


def peak_memory():
    """Largest memory of this process so far, in bytes: the GPU's, if any."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's maximum, in which a process inherits its parent's.
    with open("/proc/self/status") as file:
        [peak] = [line.split()[1] for line in file if "VmHWM" in line]
    return int(peak) * 1024


def product_speed(precision):
    """FLOP/s of a product of matrices on this machine, the best of ten.

    On a CPU in fp32, the better one of the two libraries that PyTorch has for
    it: MKL, and oneDNN as `models.packed` asks for it.

    Arguments
    ---------
    precision : str
        fp32 (TF32 on a GPU, which SpeechBrain allows), bf16 or int8.

    Returns
    -------
    float
    """
    import speechbrain  # noqa: F401

    # Large enough to be bound by the arithmetic, and on a CPU small enough for
    # its caches.
    rows, width = (2048, 1024) if device() == "cpu" else (16384, 4096)
    dtypes = {
        "fp32": (torch.float32, torch.float32, torch.mm),
        "bf16": (torch.bfloat16, torch.bfloat16, torch.mm),
        "int8": (torch.int8, torch.int32, torch._int_mm),
    }
    dtype, out_dtype, product = dtypes[precision]
    a = (16 * torch.randn(rows, width, device=device())).to(dtype)
    out = torch.empty(rows, rows, dtype=out_dtype, device=device())
    ways = [lambda: product(a, a.T, out=out)]
    if precision == "fp32" and device() == "cpu":
        layer = PackedLinear(torch.nn.Linear(width, rows).requires_grad_(False))
        ways.append(lambda: layer(a))
    times = []
    for way in ways * 10:
        begin = synchronized()
        way()
        times.append(synchronized() - begin)
    return 2 * rows * rows * width / min(times)


def synchronized():
    """The time, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def median(runs, key):
    """Median of one figure over the runs of a side."""
    return statistics.median(run[key] for run in runs)


def machine():
    """The device's name, and the number of cores in use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    with open("/proc/cpuinfo") as file:
        names = {
            line.partition(":")[2].strip()
            for line in file
            if line.startswith("model name")
        }
    return f"{', '.join(sorted(names))}, {os.cpu_count()} cores"


@dataclasses.dataclass
class Row:
    """One way of doing a job, measured.

    Arguments
    ---------
    job, way : str
    value : float
        Median of the runs.
    unit : str
        Of the value: "s", or what is done a second.
    ratio_a, ratio_b : float
        How many times as fast as the ordinary way, as a user runs it (A) and
        with the script's allocator setting (B).
    of_limit : float
        Fraction of what the machine can do.
    limit : str
        What that is.
    memory : int
        Its peak, in bytes.
    difference : str
        To the outcome of the ordinary way.
    """

    job: str
    way: str
    value: float
    unit: str
    ratio_a: float | None = None
    ratio_b: float | None = None
    of_limit: float | None = None
    limit: str = ""
    memory: int | None = None
    difference: str = ""

    def cells(self):
        """Texts for a table."""

        def text(value, form):
            return "" if value is None else form.format(value)

        limit = text(self.of_limit, f"{{:.0%}} of {self.limit}")
        memory = None if self.memory is None else self.memory / 2**20
        return [
            self.job,
            self.way,
            f"{self.value:.4g} {self.unit}",
            text(self.ratio_a, "{:.2f}"),
            text(self.ratio_b, "{:.2f}"),
            limit,
            text(memory, "{:.0f} MiB"),
            self.difference,
        ]


HEADER = ["job", "way", "speed", "A", "B", "limit", "memory", "difference"]


def table(rows):
    """Rows as a table in Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows):
    """Print rows, in columns."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip())
