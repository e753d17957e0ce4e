r"""Do students beat their teacher? The whole loop on ESC-10, many times.

    python -m benchmarks.students ESC-50 audiocaps/train.csv MINILM \
        --output results/students

ESC-50 is the data set's folder, the CSV is AudioCaps', MINILM the folder of a
pretrained text encoder, which stays frozen (all-MiniLM-L6-v2).

For each fold to test and each seed, by the toolkit's scripts: a teacher learns
from the next fold, each clip with five of AudioCaps' captions that name its
class and no other one; the clips of the two other folds are the unlabelled
audio, all other captions of up to ten words the corpus; pairs are curated (DU,
and ADS for ESC-10's class names), and students trained on each with hard and
with soft labels. All are evaluated on the fold to test, by the prompted class
names. Three controls have as many steps as a student:

- longer: the teacher trained on, with its own pairs alone;
- random: a student on the pairs of ADS with their captions shuffled;
- right: a student on those pairs of ADS that are right, which shows what the
  best choice among them would bring; with seed 0 alone, as the next one;
- true: a student on the unlabelled clips with their true class names, which
  shows how much there is to gain.

With --telephone, all clips but the teacher's sound as over a telephone: the
task is not recorded as what the teacher has learned from.

Fold 1 is left for choosing the settings (--folds 1); the others are for
reporting.

Beside the accuracies stands what was curated: precision, the fraction of pairs
whose caption names the class of their clip; coverage, the fraction of the
unlabelled clips that have a pair, and the number of the ten classes of which
a clip has a right one. classes.csv has accuracy and precision of each class. A
stopped run goes on by the same command.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import sys

import numpy as np
import pandas as pd
import soundfile
import torch
import torchaudio
from matplotlib.figure import Figure
from tqdm import tqdm

import microsoft_clap_train
import microsoft_curation_toemb
import microsoft_zeroshot
import retrieve_ds_t2t
import retrieve_from_emb_thresh
import softclap_train
from dataset.audio import AudioReader
from dataset.prepare_zeroshot import caption_folds, prepare_zeroshot
from files import write_csv, write_json

# What of a caption names a class.
NAMES = {
    "dog": r"\b(?:dogs?|puppy)\b",
    "rooster": r"\broosters?\b",
    "rain": r"\brain(?:fall|s|ing|storm)?\b",
    "sea_waves": r"\bwaves\b",
    "crackling_fire": r"\b(?:fire|crackl\w+)\b",
    "crying_baby": r"\b(?:baby|babies|infant)\b",
    "sneezing": r"\bsneez\w+",
    "clock_tick": r"\b(?:clock|tick\w*)\b",
    "helicopter": r"\bhelicopters?\b",
    "chainsaw": r"\bchain ?saw\w*",
}
PROMPT = "this is a sound of "
LONGEST_CAPTION = 10  # words
CAPTIONS_PER_CLIP = 5
SAMPLE_RATE = 16000
TELEPHONE_BAND = (300, 3400)  # Hz
NETWORK = (
    f"{{sample_rate: {SAMPLE_RATE}, fmax: 8000, hop_size: 640, width: 8, "
    "dropout_factor: 0.2, d_proj: 128"
)
TRAINED = NETWORK + (
    ", duration: 2, text_pretrained: True, freeze_text_encoder: True}"
)
LOADED = NETWORK + ", duration: 2, text_pretrained: False}"
TRAINING = {
    "clap": TRAINED,
    "batch_size": 32,
    "lr_schedule": "cosine",
    "warmup_steps": 20,
    "num_workers": 0,
    "noprogressbar": True,
}
# Epochs of 45 or 46 steps.
TEACHER = {"number_of_epochs": 11, "base_lr": 0.002}
STUDENT = {"number_of_epochs": 8, "base_lr": 0.001}
PARTS = [(0, 5), (0, 4), (0.5, 4.5), (1, 5)]  # seconds
CURATION_PROB = 0.8
# Of a batch's captions of one class, only equal ones count as such; for all
# others it is up to the teacher.
SOFT = {"softclap_beta": 0.8}
DU = {"sim_threshold": 0.6, "max_captions_per_audio": 5}
# The ten captions nearest to each class; of the 160 clips of ten classes,
# each caption takes the best 12, lest one class take nearly all.
DS = {"sim_threshold": 1, "min_captions_per_class": 10}
ADS = {"sim_threshold": 0.6, "max_audios_per_caption": 12}

TRAIN_YAML = "hparams/insper/microsoft_clap_train.yaml"
SOFT_YAML = "hparams/insper/softclap_train.yaml"
EMBED_YAML = "hparams/curation/microsoft_audioset_insper_toemb.yaml"
DU_YAML = "hparams/curation/audioset_insper_duv2_retr.yaml"
DS_YAML = "hparams/curation/esc_insper_t2t_retr.yaml"
ADS_YAML = "hparams/curation/esc_insper_audioset_dudsv3_retr.yaml"
ZEROSHOT_YAML = "hparams/esc/microsoft_zeroshot.yaml"

MODELS = ("longer", "random", "DU hard", "DU soft", "ADS hard", "ADS soft")
MODELS += ("right", "true")


class Loop:
    """One pass of the loop, for a fold to test and a seed.

    Arguments
    ---------
    esc, target : str
        ESC-10 as the teacher hears it, and as the task sounds.
    captions, text_model : str
        As on the command line.
    folder : str
        For everything that it writes.
    fold, seed : int
        The fold to test; the teacher's is the next one.
    """

    def __init__(self, esc, target, captions, text_model, folder, fold, seed):
        self.target, self.text_model, self.folder = target, text_model, folder
        self.fold, self.seed = fold, seed
        corpus = pd.Series(pd.read_csv(captions)["caption"].unique())
        self.corpus = corpus[corpus.str.split().str.len() <= LONGEST_CAPTION]
        self.taught = prepare_zeroshot("esc", esc, esc10=True)
        self.data = prepare_zeroshot("esc", target, esc10=True)
        self.teacher = {
            "ssl_checkpoints_dir": f"{folder}/teacher/save",
            "ssl_checkpointer": "latest",
        }
        self.pairs = {"teacher": None, "longer": None}

    def run(self):
        """Everything.

        Returns
        -------
        list of dict
            One row for each model.
        """
        self.write_inputs()
        self.train("teacher", **TEACHER)
        self.curate()
        rows = [self.row("teacher")]
        for model in MODELS if self.seed == 0 else MODELS[:-2]:
            method, _, labels = model.partition(" ")
            soft = SOFT if labels == "soft" or method == "right" else {}
            curated = {}
            if method != "longer":
                curated = {
                    "curation_csv": f"{self.folder}/{method}.csv",
                    "curation_prob": CURATION_PROB,
                }
            self.train(model, **STUDENT, **self.teacher, **soft, **curated)
            rows.append(self.row(model))
        return rows

    def write_inputs(self):
        """The teacher's pairs, the unlabelled clips, corpus and classes."""
        os.makedirs(self.folder, exist_ok=True)
        teacher_fold = self.fold % 4 + 1
        others = {1, 2, 3, 4} - {self.fold, teacher_fold}
        clips = self.taught.of_folds([teacher_fold], "folds").clips
        captions = captions_of(clips["label"], self.corpus, self.seed)
        pairs = pd.DataFrame(
            {
                "wav_path": clips["wav_path"].repeat(CAPTIONS_PER_CLIP),
                "caption": captions.ravel(),
            }
        )
        # Four rows a pair, lest an epoch be over in a few steps.
        parts = [pairs.assign(start=s, end=e) for s, e in PARTS]
        write_csv(pd.concat(parts), f"{self.folder}/train.csv")
        true = caption_folds(self.data, sorted(others), PROMPT)
        self.add_pairs("true", true.drop(columns="fold"))
        rest = self.corpus[~self.corpus.isin(pairs["caption"])]
        write_csv(rest.to_frame("caption"), f"{self.folder}/captions.csv")
        unlabelled = self.data.of_folds(sorted(others), "folds").clips
        self.unlabelled = unlabelled.set_index("wav_path")["label"]
        lines = {
            "audio.txt": unlabelled["wav_path"],
            "classes.txt": self.data.labels["text"],
        }
        for name, column in lines.items():
            with open(f"{self.folder}/{name}", "w") as file:
                file.writelines(f"{line}\n" for line in column)

    def train(self, model, **flags):
        """Train a model of a name with more flags."""
        is_soft = "softclap_beta" in flags
        call(
            softclap_train if is_soft else microsoft_clap_train,
            SOFT_YAML if is_soft else TRAIN_YAML,
            train_csv_path=f"{self.folder}/train.csv",
            text_model=self.text_model,
            output_folder=f"{self.folder}/{model.replace(' ', '_')}",
            seed=self.seed,
            **TRAINING,
            **flags,
        )

    def curate(self):
        """Make DU.csv, ADS.csv, right.csv and random.csv."""
        save = f"{self.folder}/embeddings/save"
        weights = {"text_model": self.text_model, "clap": LOADED}
        weights |= self.teacher
        call(
            microsoft_curation_toemb,
            EMBED_YAML,
            audio_pathfile=f"{self.folder}/audio.txt",
            text_pathfile=f"{self.folder}/captions.csv",
            output_folder=f"{self.folder}/embeddings",
            windows_per_clip="mean",
            num_workers=0,
            **weights,
        )
        call(retrieve_from_emb_thresh, DU_YAML, emb_dir=save, **DU)
        call(
            retrieve_ds_t2t,
            DS_YAML,
            class_path=f"{self.folder}/classes.txt",
            target_csv_path=f"{self.folder}/captions.csv",
            emb_dir=save,
            **DS,
            output_folder=f"{self.folder}/captions",
            **weights,
        )
        call(retrieve_from_emb_thresh, ADS_YAML, emb_dir=save, **ADS)
        names = {
            "DU": "audioset_insper_duv2",
            "ADS": "esc_insper_audioset_dudsv3",
        }
        for method, name in names.items():
            pairs = pd.read_csv(f"{save}/{name}_curation.csv")
            self.add_pairs(method, pairs)
        ads = self.pairs["ADS"]
        true = ads["wav_path"].map(self.unlabelled)
        self.add_pairs("right", ads[is_right(ads["caption"], true)])
        shuffled = ads.copy()
        rng = np.random.default_rng(self.seed)
        shuffled["caption"] = rng.permutation(shuffled["caption"].to_numpy())
        self.add_pairs("random", shuffled)

    def add_pairs(self, method, pairs):
        """Keep the pairs of a method, and write them for students."""
        self.pairs[method] = pairs
        write_csv(pairs, f"{self.folder}/{method}.csv")

    def row(self, model):
        """Accuracy of a model, and figures of the pairs it was trained on."""
        folder = f"{self.folder}/{model.replace(' ', '_')}"
        call(
            microsoft_zeroshot,
            ZEROSHOT_YAML,
            data_folder=self.target,
            esc10=True,
            folds=[self.fold],
            text_model=self.text_model,
            clap=LOADED,
            ssl_checkpoints_dir=f"{folder}/save",
            ssl_checkpointer="latest",
            text_prompt=PROMPT,
            output_folder=f"{folder}/zeroshot",
            num_workers=0,
        )
        with open(f"{folder}/zeroshot/results.json") as file:
            accuracy = json.load(file)["accuracy"]
        row = {"fold": self.fold, "seed": self.seed, "model": model}
        row["accuracy"] = accuracy
        pairs = self.pairs[model.partition(" ")[0]]
        return row if pairs is None else row | self.judge(pairs)

    def judge(self, pairs):
        """Precision and coverage of curated pairs by the true labels."""
        true = pairs["wav_path"].map(self.unlabelled)
        right = is_right(pairs["caption"], true)
        return {
            "pairs": len(pairs),
            "captions": pairs["caption"].nunique(),
            "precision": right.mean(),
            "coverage": pairs["wav_path"].nunique() / len(self.unlabelled),
            "classes": true[right].nunique(),
        }


def copy_esc10(esc, folder, change=None):
    """ESC-10 as WAV files of the network's rate, which are read faster.

    Arguments
    ---------
    esc : str
        ESC-50's folder.
    folder : str
        For the copy.
    change : callable
        What is done to each clip, (samples,) -> (samples,).

    Returns
    -------
    str
        Folder of the copy, in the layout of ESC-50.
    """
    os.makedirs(f"{folder}/meta", exist_ok=True)
    os.makedirs(f"{folder}/audio", exist_ok=True)
    reader = AudioReader(SAMPLE_RATE, 5.0)
    meta = pd.read_csv(f"{esc}/meta/esc50.csv")
    meta = meta[meta["esc10"]]
    copies = meta["filename"].str.replace(r"\.\w+$", ".wav", regex=True)
    for name, copy in zip(meta["filename"], copies):
        window, _ = reader.crop(f"{esc}/audio/{name}", start=0)
        window = change(window) if change else window
        soundfile.write(f"{folder}/audio/{copy}", window.numpy(), SAMPLE_RATE)
    meta = meta.assign(filename=copies)
    write_csv(meta, f"{folder}/meta/esc50.csv")
    return folder


def over_telephone(wav):
    """A clip with the sound of a telephone.

    Two second-order Butterworth filters on each side of its band: what is
    beyond gets faint, by 24 dB an octave.

    Arguments
    ---------
    wav : torch.Tensor
        (samples,) at `SAMPLE_RATE`.

    Returns
    -------
    torch.Tensor
        (samples,).
    """
    low, high = TELEPHONE_BAND
    for _ in range(2):
        wav = torchaudio.functional.highpass_biquad(wav, SAMPLE_RATE, low)
        wav = torchaudio.functional.lowpass_biquad(wav, SAMPLE_RATE, high)
    return wav


def captions_of(labels, corpus, seed):
    """Captions that name a clip's class alone, from one half of the corpus.

    The other half is never taken, so that something is left to curate.

    Returns
    -------
    array
        (clips, CAPTIONS_PER_CLIP) of str.
    """
    rng = np.random.default_rng(seed)
    named = names_in(corpus)
    is_taken = (named.sum(axis="columns") == 1) & (
        rng.random(len(corpus)) < 0.5
    )
    pools = {k: corpus[is_taken & named[k]].to_numpy() for k in named}
    return np.stack(
        [rng.choice(pools[label], CAPTIONS_PER_CLIP) for label in labels]
    )


def names_in(captions):
    """Which classes each caption names, a column of booleans each."""
    return pd.DataFrame(
        {
            label: captions.str.contains(pattern, case=False)
            for label, pattern in NAMES.items()
        }
    )


def is_right(captions, labels):
    """Which captions name the class beside them, (captions,) booleans."""
    named = names_in(captions)
    columns = named.columns.get_indexer(labels)
    return named.to_numpy()[np.arange(len(captions)), columns]


def call(script, yaml_file, **flags):
    """Run a script's command line in this process."""
    script.main([yaml_file, *(f"--{k}={v}" for k, v in flags.items())])


def run_loop(esc, target, captions, text_model, folder, fold, seed):
    """One loop in a process of its own; its output goes to a file."""
    done = f"{folder}/rows.json"
    if not os.path.exists(done):
        os.makedirs(folder, exist_ok=True)
        torch.set_num_threads(1)
        with (
            open(f"{folder}/output.txt", "a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            inputs = (esc, target, captions, text_model)
            rows = Loop(*inputs, folder, fold, seed).run()
        write_json(rows, done)
    with open(done) as file:
        return json.load(file)


def summarize(results):
    """Mean and standard deviation over folds and seeds, by model.

    Arguments
    ---------
    results : pandas.DataFrame
        `fold`, `seed`, `model`, `accuracy` and figures of the pairs.

    Returns
    -------
    pandas.DataFrame
        One row a model, in the order of training. Gains are those over the
        teacher and the longer-trained teacher of the same fold and seed.
    """
    results = results.set_index(["fold", "seed", "model"])
    accuracy = 100 * results["accuracy"].unstack("model")
    table = pd.DataFrame({"accuracy": accuracy.mean(), "sd": accuracy.std()})
    for name in ("teacher", "longer"):
        gain = accuracy.sub(accuracy[name], axis=0)
        table[f"over {name}"] = gain.mean()
        table[f"sd over {name}"] = gain.std()
    figures = results.drop(columns="accuracy").groupby("model").mean()
    return table.join(figures).loc[["teacher", *MODELS]]


def by_class(esc, folders):
    """Accuracy of each model, and precision of its pairs, in each class.

    Arguments
    ---------
    esc : str
        ESC-50's folder.
    folders : list of str
        Of the loops.

    Returns
    -------
    pandas.DataFrame
        Means over the loops, in per cent: a row for each class; of DU and ADS,
        the fraction of the pairs of its clips that name it.
    """
    clips = prepare_zeroshot("esc", esc, esc10=True).clips
    labels = clips.set_index(clips["wav_path"].map(os.path.basename))["label"]
    table = []
    for folder in folders:
        for model in ("teacher", *MODELS):
            path = f"{folder}/{model.replace(' ', '_')}/zeroshot/results.json"
            if not os.path.exists(path):
                continue
            with open(path) as file:
                classes = json.load(file)["classes"]
            table += [(k, model, v["accuracy"]) for k, v in classes.items()]
        for method in ("DU", "ADS"):
            pairs = pd.read_csv(f"{folder}/{method}.csv")
            true = pairs["wav_path"].map(os.path.basename).map(labels)
            right = is_right(pairs["caption"], true)
            means = pd.Series(right).groupby(true.to_numpy()).mean()
            table += [(k, f"{method} pairs", v) for k, v in means.items()]
    table = pd.DataFrame(table, columns=["class", "of", "value"])
    means = 100 * table.pivot_table("value", "class", "of")
    return means[["teacher", *MODELS, "DU pairs", "ADS pairs"]]


def draw(results, path):
    """Accuracy of each model in each loop, and the means, as a picture."""
    accuracy = 100 * results.pivot(
        index=["fold", "seed"], columns="model", values="accuracy"
    )
    accuracy = accuracy[["teacher", *MODELS]]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(accuracy.shape[1])
    for row in accuracy.to_numpy():
        axes.plot(places, row, color="0.8", marker=".", zorder=1)
    axes.errorbar(
        places,
        accuracy.mean(),
        accuracy.std(),
        fmt="o",
        capsize=4,
        label="mean and standard deviation",
    )
    axes.axhline(accuracy["teacher"].mean(), color="black", linestyle="--")
    axes.set_xticks(places, accuracy.columns)
    axes.set_ylabel("zero-shot accuracy, %")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv):
    """Run the loops and show what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students")
    parser.add_argument("esc", metavar="ESC-50")
    parser.add_argument("captions", metavar="CSV")
    parser.add_argument("text_model", metavar="MINILM")
    parser.add_argument("--output", default="results/students")
    parser.add_argument("--folds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--telephone", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    # One thread each: networks this small gain little from more.
    os.environ["OMP_NUM_THREADS"] = "1"
    esc = copy_esc10(args.esc, f"{args.output}/esc10")
    target = esc
    if args.telephone:
        folder = f"{args.output}/telephone"
        target = copy_esc10(args.esc, folder, over_telephone)
    inputs = (esc, target, args.captions, args.text_model)
    with concurrent.futures.ProcessPoolExecutor(
        args.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        loops = [
            pool.submit(
                run_loop, *inputs, f"{args.output}/{fold}_{seed}", fold, seed
            )
            for seed in args.seeds
            for fold in args.folds
        ]
        finished = concurrent.futures.as_completed(loops)
        for loop in tqdm(finished, total=len(loops), unit="loop"):
            loop.result()
    results = pd.DataFrame([row for loop in loops for row in loop.result()])
    write_csv(results, f"{args.output}/results.csv")
    table = summarize(results)
    write_json(
        table.reset_index().to_dict("records"), f"{args.output}/summary.json"
    )
    draw(results, f"{args.output}/accuracy.png")
    print(table.round(2).to_string())
    folders = [f"{args.output}/{f}_{s}" for s in args.seeds for f in args.folds]
    classes = by_class(esc, folders)
    write_csv(classes.reset_index(), f"{args.output}/classes.csv")
    print(classes.round(0).to_string())
    print(f"See {args.output}/results.csv, classes.csv and accuracy.png")


if __name__ == "__main__":
    main(sys.argv[1:])
