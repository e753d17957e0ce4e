"""What `make demo` runs: the toolkit from nothing, by its real scripts.

    python demo.py

Makes synthetic sounds with captions, trains a small teacher on some of them,
classifies others, from another acoustic domain, zero-shot, and curates pairs
of unlabelled sounds of that domain and a corpus of captions. Each command is
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
WEIGHTS = f"--ssl_checkpoints_dir={FOLDER}/teacher/save"
EMBEDDINGS = f"--emb_dir={FOLDER}/embeddings/save"
COMMANDS = [
    f"python -m dataset.synthetic {DATA} --unlabelled 300",
    "python microsoft_clap_train.py hparams/demo/microsoft_clap_train.yaml"
    f" --data_annot_folder={DATA}/pairs --output_folder={FOLDER}/teacher",
    "python microsoft_zeroshot.py hparams/demo/microsoft_zeroshot.yaml"
    f" --data_folder={DATA}/target {WEIGHTS}"
    f" --output_folder={FOLDER}/teacher_zeroshot",
    "python microsoft_curation_toemb.py hparams/demo/microsoft_toemb.yaml"
    f" --audio_pathfile={DATA}/unlabelled.txt"
    f" --text_pathfile={DATA}/captions.csv {WEIGHTS}"
    f" --output_folder={FOLDER}/embeddings",
    "python retrieve_from_emb_thresh.py"
    " hparams/curation/audioset_insper_duv2_retr.yaml"
    f" {EMBEDDINGS} --target_pairs=2000",
    "python retrieve_ds_t2t.py hparams/demo/t2t_retr.yaml"
    f" --target_csv_path={DATA}/captions.csv {EMBEDDINGS} {WEIGHTS}"
    f" --output_folder={FOLDER}/captions",
    "python retrieve_from_emb_thresh.py hparams/demo/audioset_dudsv3_retr.yaml"
    f" {EMBEDDINGS} --target_pairs=2000",
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
        "embeddings/save/audioset_insper_duv2_report.png",
        "embeddings/save/demo_insper_audioset_dudsv3_curation.csv",
        "data/pairs",
    ):
        print(f"  {FOLDER}/{path}")


if __name__ == "__main__":
    main()
