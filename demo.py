"""What `make demo` runs: the whole method from nothing, by the real scripts.

    python demo.py

Makes synthetic sounds with captions, trains a small teacher on some of them,
and classifies others, from another acoustic domain, zero-shot. Then it curates
pairs of unlabelled sounds of that domain and a corpus of captions, trains
students on them, and classifies again. (All settings were chosen on worlds of
other seeds of dataset.synthetic; how much students gain differs from world to
world.) Each command is printed as a user would type it. Data, training and
embedding that are done already are not done again (for a fresh start, delete
results/demo).
"""

import json
import os
import shlex
import subprocess
import sys

import pandas as pd
from matplotlib.figure import Figure

from files import write_json, written_whole

FOLDER = "results/demo"
DATA = f"{FOLDER}/data"
TEACHER = (
    f"--ssl_checkpoints_dir={FOLDER}/teacher/save --ssl_checkpointer=latest"
)
EMBEDDINGS = f"{FOLDER}/embeddings/save"
DU = f"--emb_dir={EMBEDDINGS} --sim_threshold=0.7 --max_captions_per_audio=5"
# Ten captions for each class, and for each caption its best clips, so that no
# class is left out.
DS = f"--emb_dir={EMBEDDINGS} --sim_threshold=1 --min_captions_per_class=10"
ADS = f"--emb_dir={EMBEDDINGS} --sim_threshold=0.6 --max_audios_per_caption=20"
STUDENT = (
    f"--train_csv_path={FOLDER}/teacher/save/train_raw.csv {TEACHER}"
    " --curation_prob=0.8 --number_of_epochs=40"
)
# Rows of the summary, and the names of their folders.
MODELS = {
    "teacher": "teacher",
    "DU hard": "student_du_hard",
    "ADS soft": "student_ads_soft",
}


def zeroshot(model):
    """The command that evaluates a model of the demo."""
    return (
        "python microsoft_zeroshot.py hparams/demo/microsoft_zeroshot.yaml"
        f" --data_folder={DATA}/target"
        f" --ssl_checkpoints_dir={FOLDER}/{model}/save"
        f" --ssl_checkpointer=latest --output_folder={FOLDER}/{model}_zeroshot"
    )


COMMANDS = [
    f"python -m dataset.synthetic {DATA} --clips_per_class 10 --unlabelled 600",
    "python microsoft_clap_train.py hparams/demo/microsoft_clap_train.yaml"
    f" --data_annot_folder={DATA}/pairs --output_folder={FOLDER}/teacher",
    zeroshot("teacher"),
    "python microsoft_curation_toemb.py hparams/demo/microsoft_toemb.yaml"
    f" --audio_pathfile={DATA}/unlabelled.txt"
    f" --text_pathfile={DATA}/captions.csv {TEACHER}"
    f" --output_folder={FOLDER}/embeddings",
    "python retrieve_from_emb_thresh.py"
    f" hparams/curation/audioset_insper_duv2_retr.yaml {DU}",
    "python retrieve_ds_t2t.py hparams/demo/t2t_retr.yaml"
    f" --target_csv_path={DATA}/captions.csv {DS} {TEACHER}"
    f" --output_folder={FOLDER}/captions",
    "python retrieve_from_emb_thresh.py"
    f" hparams/demo/audioset_dudsv3_retr.yaml {ADS}",
    "python microsoft_clap_train.py hparams/demo/microsoft_clap_train.yaml"
    f" {STUDENT} --curation_csv={EMBEDDINGS}/audioset_insper_duv2_curation.csv"
    f" --output_folder={FOLDER}/student_du_hard",
    "python softclap_train.py hparams/demo/softclap_train.yaml"
    f" {STUDENT}"
    f" --curation_csv={EMBEDDINGS}/demo_insper_audioset_dudsv3_curation.csv"
    f" --output_folder={FOLDER}/student_ads_soft",
    zeroshot("student_du_hard"),
    zeroshot("student_ads_soft"),
]


def summarize(model, folder):
    """One row of the summary: accuracy, its 95 % interval, chance, pairs."""
    with open(f"{FOLDER}/{folder}_zeroshot/results.json") as file:
        results = json.load(file)
    figures = {k: results[k] for k in ("accuracy", "low", "high", "chance")}
    pairs = {"pairs": f"{FOLDER}/{folder}/save/train_raw.csv"}
    pairs["curated"] = f"{FOLDER}/{folder}/save/curated_raw.csv"
    counts = {
        name: len(pd.read_csv(path)) if os.path.exists(path) else 0
        for name, path in pairs.items()
    }
    return {"model": model, **figures, **counts}


def draw(rows, path):
    """Accuracies with their intervals as bars."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = [row["accuracy"] for row in rows]
    reach = [
        [row["accuracy"] - row["low"] for row in rows],
        [row["high"] - row["accuracy"] for row in rows],
    ]
    bars = axes.bar([row["model"] for row in rows], values, width=0.6)
    axes.bar_label(bars, [f"{v:.1%}" for v in values], label_type="center")
    axes.errorbar(
        range(len(rows)), values, reach, fmt="none", color="black", capsize=6
    )
    axes.axhline(rows[0]["chance"], color="black", linestyle=":")
    axes.set_ylabel("zero-shot accuracy, 95 % interval; dotted: chance")
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=120)


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
    rows = [summarize(model, folder) for model, folder in MODELS.items()]
    write_json(rows, f"{FOLDER}/summary.json")
    draw(rows, f"{FOLDER}/summary.png")
    print(f"\n{'model':10}{'accuracy':>10}{'95 % interval':>18}", end="")
    print(f"{'chance':>8}{'pairs':>8}{'curated':>9}")
    for row in rows:
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        print(
            f"{row['model']:10}{row['accuracy']:>10.1%}{interval:>18}"
            f"{row['chance']:>8.1%}{row['pairs']:>8}{row['curated']:>9}"
        )
    print("\nTo look at:")
    for path in (
        "summary.json",
        "summary.png",
        "teacher/train_history.png",
        "teacher_zeroshot/confusion_matrix.png",
        "student_ads_soft_zeroshot/predictions.csv",
        "embeddings/save/audioset_insper_duv2_report.png",
        "embeddings/save/demo_insper_audioset_dudsv3_curation.csv",
        "data/pairs",
    ):
        print(f"  {FOLDER}/{path}")


if __name__ == "__main__":
    main()
