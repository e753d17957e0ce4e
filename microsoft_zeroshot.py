r"""Classify sounds zero-shot: ESC-50, UrbanSound8K, TUT Acoustic Scenes 2017.

    python microsoft_zeroshot.py hparams/esc/microsoft_zeroshot.yaml \
        --data_folder=ESC-50 --ssl_checkpoints_dir=results/.../save

or hparams/us8k, hparams/tut; weights of Microsoft's release are given as
--clap_ckpt_path=CLAP_weights_2022.pth. Each clip gets the class whose prompted
name is nearest to it (arXiv 2206.04769, section 4); a clip longer than the
model's window is scored on all of its windows. The output folder receives
results.json, predictions.csv and confusion_matrix.png.
"""

import contextlib
import importlib.metadata
import logging
import os
import sys

import numpy as np
import pandas as pd
import speechbrain as sb
import torch
from matplotlib.figure import Figure

import experiment
from dataset.pipelines import window_loader
from files import write_cells, write_json, written_whole
from models.zeroshot import (
    accuracy_interval,
    class_embeddings,
    class_scores,
    clip_embeddings,
    prompted,
)

logger = logging.getLogger(__name__)

# Of a confusion matrix with numbers in it: text takes matplotlib long.
_MAX_CLASSES_WITH_NUMBERS = 100


class ZeroShotBrain(sb.Brain):
    """Scores clips against prompted class names; nothing is trained."""

    def on_stage_start(self, stage, epoch=None):
        """Embed the classes."""
        self.modules.eval()
        self.scores, self.rows, self.unreadable = [], [], {}
        with torch.no_grad(), self.evaluation_ctx:
            self.classes = class_embeddings(
                self.modules.clap,
                self.hparams.tokenizer,
                self.data.labels["text"].tolist(),
                self.hparams.text_prompt,
            )

    def compute_forward(self, batch, stage):
        """WindowBatch -> cosine similarities (clips, classes)."""
        clips = clip_embeddings(self.modules.clap, batch.windows, batch.counts)
        return class_scores(clips, self.classes).cpu()

    def compute_objectives(self, predictions, batch, stage):
        """Keep the scores; the number of errors stands in for a loss."""
        self.scores.append(predictions)
        self.rows += batch.rows
        self.unreadable |= batch.unreadable
        truth = torch.as_tensor(self.truth[batch.rows])
        return (predictions.argmax(dim=1) != truth).float().sum()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Write the results."""
        if not self.rows:
            raise RuntimeError("None of the clips could be read")
        clips = self.data.clips.iloc[self.rows].reset_index(drop=True)
        scores = torch.cat(self.scores).numpy()
        self.write(clips, self.truth[self.rows], scores)

    def write(self, clips, truth, scores):
        """Write results.json, predictions.csv and confusion_matrix.png.

        Arguments
        ---------
        clips : pandas.DataFrame
            The clips that were scored.
        truth : array
            (clips,) indices of their classes.
        scores : array
            (clips, classes) cosine similarities.
        """
        folder, labels = self.hparams.output_folder, self.data.labels
        names = "predictions.csv", "results.json", "confusion_matrix.png"
        paths = [os.path.join(folder, name) for name in names]
        guesses = scores.argmax(axis=1)
        results = self.summary(clips, truth, guesses)
        with written_whole(paths[0]) as file:
            best = predictions(clips, scores, labels["label"].to_numpy())
            write_cells(best, file)
            # Those of other weights must not lie beside these.
            for path in paths[1:]:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
        self.hparams.write_records()
        write_json(results, paths[1])
        figure = confusion_figure(
            truth, guesses, labels["text"].tolist(), results["accuracy"]
        )
        with written_whole(paths[2]) as file:
            figure.savefig(file, format="png", dpi=120)
        counts = results["counts"]
        if counts["not_scored"]:
            logger.warning(
                "%d clips were not scored: --debug takes a few batches alone",
                counts["not_scored"],
            )
        logger.log(
            logging.WARNING
            if counts["missing"] or counts["unreadable"]
            else logging.INFO,
            "Zero-shot accuracy %.4f (95 %% interval %.4f to %.4f, chance "
            "%.4f) on %d clips; %d missing, %d unreadable. See %s",
            *(results[k] for k in ("accuracy", "low", "high", "chance")),
            *(counts[k] for k in ("clips", "missing", "unreadable")),
            folder,
        )

    def summary(self, clips, truth, guesses):
        """All figures of the evaluation, as results.json holds them."""
        labels, hparams = self.data.labels, self.hparams
        correct = truth == guesses
        low, high = accuracy_interval(correct)
        by_fold = pd.Series(correct).groupby(clips["fold"].to_numpy()).mean()
        by_class = pd.Series(correct).groupby(truth).agg(["mean", "size"])
        prompts = hparams.text_prompt
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        paths = self.data.clips["wav_path"]
        return {
            "dataset": hparams.dataset,
            "accuracy": float(correct.mean()),
            "low": low,
            "high": high,
            "chance": 1 / len(labels),
            "folds": by_fold.to_dict(),
            "fold_mean": float(by_fold.mean()),
            "classes": {
                labels["label"][i]: {
                    "accuracy": row["mean"],
                    "clips": int(row["size"]),
                }
                for i, row in by_class.iterrows()
            },
            "counts": {
                "clips": len(clips),
                "missing": len(self.data.missing),
                "unreadable": len(self.unreadable),
                "not_scored": len(self.data.clips)
                - len(clips)
                - len(self.unreadable),
            },
            "missing": list(self.data.missing),
            "unreadable": {
                paths.iloc[row]: why for row, why in self.unreadable.items()
            },
            "prompts": prompts,
            "labels": {
                label: [prompted(prompt, text) for prompt in prompts]
                for label, text in zip(labels["label"], labels["text"])
            },
            "weights": self.weights,
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "speechbrain": sb.__version__,
                "transformers": importlib.metadata.version("transformers"),
            },
        }


def predictions(clips, scores, labels):
    """Table of each clip's class, prediction and five best classes with scores.

    Arguments
    ---------
    clips : pandas.DataFrame
        `wav_path`, `label` and `fold` of each clip.
    scores : array
        (clips, classes) cosine similarities.
    labels : array of str
        (classes,).

    Returns
    -------
    pandas.DataFrame
        wav_path, label, fold, prediction, top1, score1, top2, score2, ...
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    table = clips[["wav_path", "label", "fold"]].copy()
    table["prediction"] = labels[best[:, 0]]
    for i in range(best.shape[1]):
        table[f"top{i + 1}"] = labels[best[:, i]]
        table[f"score{i + 1}"] = scores[np.arange(len(scores)), best[:, i]]
    return table


def confusion_figure(truth, guesses, names, accuracy):
    """Picture of the confusion matrix, rows being the true classes.

    Of very many classes there are colours alone, and the names of some.

    Arguments
    ---------
    truth, guesses : array of int
        (clips,) indices of classes.
    names : list of str
        Names of the classes.
    accuracy : float
        For the title.

    Returns
    -------
    matplotlib.figure.Figure
    """
    count = len(names)
    matrix = np.zeros((count, count), dtype=int)
    np.add.at(matrix, (truth, guesses), 1)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shown = min(count, _MAX_CLASSES_WITH_NUMBERS)
    side = 3 + 0.28 * shown
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    named = range(0, count, -(-count // shown))
    # Between two "$" matplotlib would look for formulas.
    some = {"labels": names[:: named.step], "parse_math": False}
    axes.set_xticks(named, **some, rotation=90)
    axes.set_yticks(named, **some)
    axes.tick_params(labelsize=8)
    for row, column in zip(*matrix.nonzero()) if shown == count else ():
        axes.text(
            column,
            row,
            matrix[row, column],
            ha="center",
            va="center",
            fontsize=6,
            color="white" if share[row, column] > 0.5 else "black",
        )
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{len(truth)} clips, accuracy {accuracy:.1%}")
    return figure


def main(argv):
    """Evaluate as the command line says."""
    hparams, run_opts = experiment.start(argv, needs="folds")
    experiment.require_one_process()
    experiment.require_weights(hparams)
    experiment.take_precision(run_opts)
    experiment.check_numbers(hparams, ["batch_size"], 1, whole=True)
    experiment.check_numbers(hparams, ["num_workers"], 0, whole=True)
    experiment.check_prompt(hparams)
    brain = ZeroShotBrain(
        modules={"clap": hparams["clap"]}, hparams=hparams, run_opts=run_opts
    )
    brain.data = hparams["prepare_zeroshot"]()
    if hparams["folds"] is not None:
        brain.data = brain.data.of_folds(hparams["folds"], "folds")
    brain.truth = brain.data.true_classes()
    brain.weights = hparams["load_weights"]()
    loader = window_loader(
        brain.data.clips["wav_path"],
        hparams["reader"],
        hparams["batch_size"],
        num_workers=hparams["num_workers"],
        pin_memory=brain.device_type == "cuda",
    )
    brain.evaluate(loader)


if __name__ == "__main__":
    main(sys.argv[1:])
