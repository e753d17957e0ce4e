"""How soon the scripts answer to a mistake on the command line.

    python -m benchmarks.startup [--runs 3]

Each script is given a flag that is misspelt and one that names a folder that
does not exist; both are refused before any work. The time is that of the whole
process, with what it imports. Beside it stands what importing PyTorch and
SpeechBrain takes alone, without which no script of this kind can start.
"""

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks.measure import Row, machine, show

CURATION = "hparams/curation"
SCRIPTS = {
    "microsoft_clap_train.py": "hparams/insper/microsoft_clap_train.yaml",
    "softclap_train.py": "hparams/insper/softclap_train.yaml",
    "microsoft_zeroshot.py": "hparams/esc/microsoft_zeroshot.yaml",
    "microsoft_curation_toemb.py": (
        f"{CURATION}/microsoft_audioset_insper_toemb.yaml"
    ),
    "retrieve_ds_t2t.py": f"{CURATION}/esc_insper_t2t_retr.yaml",
    "retrieve_from_emb_thresh.py": f"{CURATION}/audioset_insper_duv2_retr.yaml",
}
MISTAKES = {
    "a misspelt flag": "--output_foldr=x",
    "a missing folder": "--{}=/there/is/none",
}


def seconds_of(command, runs, message=None):
    """Median time of a process, and a check of what it says."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True
        )
        times.append(time.perf_counter() - begin)
        if message is not None and (
            done.returncode == 0 or message not in done.stderr
        ):
            raise RuntimeError(f"{command} was not refused: {done.stderr}")
    return statistics.median(times)


def main(argv):
    """Measure all scripts; returns and prints the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    imports = seconds_of(["-c", "import torch, speechbrain"], args.runs)
    rows = [Row("start", "import torch, speechbrain", imports, "s")]
    for script, hparams in SCRIPTS.items():
        folder = (
            "emb_dir"
            if script.startswith("retrieve")
            else "ssl_checkpoints_dir"
        )
        for mistake, flag in MISTAKES.items():
            flag = flag.format(folder)
            message = "did you mean" if "foldr" in flag else "does not exist"
            seconds = seconds_of([script, hparams, flag], args.runs, message)
            rows.append(Row(f"{script}: {mistake}", "script", seconds, "s"))
    print(machine())
    show(rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
