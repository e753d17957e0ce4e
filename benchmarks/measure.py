"""What the benchmarks share: sides in processes of their own, peaks."""

import json
import os
import statistics
import subprocess
import sys
import time

import torch

# The allocator's setting of experiment.keep_freed_memory, for any process.
KEEPING = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
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


def peak_memory():
    """Largest resident memory of this process so far, in bytes."""
    # Not getrusage's maximum, in which a process inherits its parent's.
    with open("/proc/self/status") as file:
        [peak] = [line.split()[1] for line in file if "VmHWM" in line]
    return int(peak) * 1024


def product_speed(dtype, rows=4096, width=1024):
    """FLOP/s of a product of matrices on this machine, the best of five.

    Arguments
    ---------
    dtype : torch.dtype
    rows, width : int
        Both factors are (rows, width).

    Returns
    -------
    float
    """
    a = torch.randn(rows, width).to(dtype)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        _ = a @ a.T
        times.append(time.perf_counter() - begin)
    return 2 * rows * rows * width / min(times)


def median(runs, key):
    """Median of one figure over the runs of a side."""
    return statistics.median(run[key] for run in runs)


def processor():
    """The processor's name and the number of cores in use."""
    with open("/proc/cpuinfo") as file:
        names = {
            line.partition(":")[2].strip()
            for line in file
            if line.startswith("model name")
        }
    return f"{os.cpu_count()} cores of {', '.join(sorted(names))}"
