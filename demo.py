"""What `make demo` runs: a teacher from nothing, with the real scripts.

    python demo.py

Makes synthetic sounds with captions, trains a small teacher on some of them
and classifies others, from another acoustic domain, zero-shot. Each command is
printed as a user would type it; a command that is done is not done again (for
a fresh start, delete results/demo).
"""

import json
import os
import shlex
import subprocess
import sys

import pandas as pd

from dataset.manifest import write_json

FOLDER = "results/demo"
DATA = f"{FOLDER}/data"
COMMANDS = [
    f"python -m dataset.synthetic {DATA}",
    "python microsoft_clap_train.py hparams/demo/microsoft_clap_train.yaml"
    f" --data_annot_folder={DATA}/pairs --output_folder={FOLDER}/teacher",
    "python microsoft_zeroshot.py hparams/demo/microsoft_zeroshot.yaml"
    f" --data_folder={DATA}/target"
    f" --ssl_checkpoints_dir={FOLDER}/teacher/save"
    f" --output_folder={FOLDER}/teacher_zeroshot",
]


def summarize(model):
    """One row of the summary: accuracy, its 95 % interval, chance, pairs."""
    with open(f"{FOLDER}/{model}_zeroshot/results.json") as file:
        results = json.load(file)
    pairs = len(pd.read_csv(f"{FOLDER}/{model}/save/train_raw.csv"))
    figures = {k: results[k] for k in ("accuracy", "low", "high", "chance")}
    return {"model": model, **figures, "pairs": pairs}


def main():
    """Run the commands and show what came out."""
    # Small networks on few cores: threads that wait should not spin.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    for command in COMMANDS:
        print(f"\n$ {command}", flush=True)
        words = shlex.split(command)
        subprocess.run(
            [sys.executable, *words[1:]], check=True, env=environment
        )
    rows = [summarize("teacher")]
    write_json(rows, f"{FOLDER}/summary.json")
    print(f"\n{'model':10}{'accuracy':>10}{'95 % interval':>18}", end="")
    print(f"{'chance':>8}{'pairs':>8}")
    for row in rows:
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        print(
            f"{row['model']:10}{row['accuracy']:>10.1%}{interval:>18}"
            f"{row['chance']:>8.1%}{row['pairs']:>8}"
        )
    print("\nTo look at:")
    for path in (
        "summary.json",
        "teacher/train_history.png",
        "teacher_zeroshot/confusion_matrix.png",
        "teacher_zeroshot/predictions.csv",
        "data/pairs",
    ):
        print(f"  {FOLDER}/{path}")


if __name__ == "__main__":
    main()
