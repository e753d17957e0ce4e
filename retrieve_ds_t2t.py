r"""Choose the captions that are about a task's classes (DS curation).

    python retrieve_ds_t2t.py hparams/curation/esc_insper_t2t_retr.yaml \
        --target_csv_path=captions.csv --emb_dir=results/embeddings/save \
        --ssl_checkpoints_dir=results/.../save --sim_threshold=0.7

Embeds the prompted class names, and keeps the captions whose best similarity
over the classes reaches the threshold (arXiv 2305.01864). Into <emb_dir> go
<dataset>_insper_t2t_ds.csv (ID,wav_path,caption,class,similarity, and start
and end where the captions have them) and the store of their embeddings, which
ADS curation matches audio with. Another task than esc, tut and us8k gives its
class names as --class_path=classes.txt and its name as --dataset.
"""

import logging
import os
import sys

import numpy as np
import pandas as pd
import speechbrain as sb
from speechbrain.utils.autocast import AMPConfig

import experiment
from curation.embeddings import (
    captions_writer,
    dump_captions,
    open_embeddings,
    read_captions,
    read_record,
    text_hash,
    write_store,
)
from dataset.prepare_zeroshot import BUILT_IN_LABELS, read_labels
from models.packed import pack_weights
from models.weights import state_hash
from models.zeroshot import class_embeddings, text_embeddings

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 65536


class CaptionBrain(sb.Brain):
    """Encodes captions and class names; nothing is trained."""

    def embed_text(self, captions):
        """List of captions -> (captions, d_proj) unit-norm."""
        with self.evaluation_ctx:
            return text_embeddings(
                self.modules.clap, self.hparams.tokenizer, captions
            )

    def embed_classes(self, texts):
        """List of class names -> (classes, d_proj) float64, as stored."""
        with self.evaluation_ctx:
            embeddings = class_embeddings(
                self.modules.clap,
                self.hparams.tokenizer,
                texts,
                self.hparams.text_prompt,
            )
        return embeddings.half().double().cpu().numpy()

    def corpus(self, table):
        """Embeddings of the captions to choose from.

        Those of the embedding run, in whatever precision, if they are of the
        same captions and weights; otherwise they are made, in a store of their
        own, which takes the place of an earlier one.

        Arguments
        ---------
        table : pandas.DataFrame
            `caption`, row for row.

        Returns
        -------
        curation.embeddings.Embeddings
        """
        hparams = self.hparams
        settings = {
            "weights": self.weights_hash,
            **hparams.tokenizer.settings(),
        }
        wanted = {**settings, "list": text_hash(table["caption"].tolist())}
        path = os.path.join(hparams.emb_dir, "text_insper.json")
        if os.path.exists(path):
            try:
                found = open_embeddings(
                    hparams.emb_dir, "text_insper", "caption"
                )
            except (FileNotFoundError, ValueError) as error:
                why = str(error)
            else:
                there = found.info["settings"]
                different = [k for k in wanted if there.get(k) != wanted[k]]
                if not different:
                    return found
                why = f"it differs in {', '.join(different)}"
            logger.warning(
                "text_insper in %s is not used (%s): the captions are embedded "
                "again",
                hparams.emb_dir,
                why,
            )
        stem = f"{hparams.dataset}_t2t_corpus"
        writer = captions_writer(
            hparams.emb_dir,
            stem,
            table,
            hparams.clap.d_proj,
            {**settings, "precision": self.eval_precision},
            replaces=True,
        )
        dump_captions(
            writer,
            table,
            hparams.tokenizer,
            self.embed_text,
            hparams.text_bs,
            self.device_type,
            self.noprogressbar,
        )
        return open_embeddings(hparams.emb_dir, stem, "caption")


def similarities_to(corpus, classes):
    """Similarity of every caption to every class.

    Arguments
    ---------
    corpus : curation.embeddings.Embeddings
        Of the captions.
    classes : array
        (classes, d) float64.

    Returns
    -------
    array
        (captions, classes) float64.
    """
    blocks = [
        corpus[i : i + _BLOCK_ROWS].astype(np.float64) @ classes.T
        for i in range(0, len(corpus), _BLOCK_ROWS)
    ]
    return np.concatenate(blocks)


def choose(similarities, captions, threshold, min_captions_per_class):
    """Rows to keep, and the class that each stands for.

    Arguments
    ---------
    similarities : array
        (captions, classes).
    captions : pandas.Series
        Their texts.
    threshold : float
        Captions whose best similarity reaches it are kept.
    min_captions_per_class : int
        Classes for which fewer reach the threshold, though these may be more
        like another class, get their nearest other captions as well, the most
        similar caption and class of all first; equal captions count once.

    Returns
    -------
    tuple of array
        Rows in order, and the index of the class of each.
    """
    nearest = similarities.argmax(axis=1)
    reach = similarities >= threshold
    is_kept = reach.any(axis=1)
    chosen = {int(i): int(nearest[i]) for i in np.flatnonzero(is_kept)}
    is_first = ~captions.duplicated().to_numpy()
    lacking = min_captions_per_class - reach[is_first].sum(axis=0)
    lacking = np.maximum(lacking, 0)
    free = np.flatnonzero(is_first & ~is_kept)
    places = []
    for k in np.flatnonzero(lacking).tolist():
        # Other classes take no more of a class's nearest than they lack.
        best = pd.Series(similarities[free, k], free).nlargest(lacking.sum())
        places += [(-similarity, i, k) for i, similarity in best.items()]
    for _, i, k in sorted(places):
        if lacking[k] and i not in chosen:
            chosen[i] = k
            lacking[k] -= 1
    if lacking.any():
        logger.warning(
            "Too few captions are left below --sim_threshold to give each "
            "class --min_captions_per_class=%d, with those that reach it: %d "
            "classes have fewer",
            min_captions_per_class,
            np.count_nonzero(lacking),
        )
    rows = np.array(sorted(chosen), dtype=int)
    return rows, np.array([chosen[i] for i in rows], dtype=int)


def report(similarities, rows, classes, labels, captions, threshold):
    """Log how many captions each class got, and its nearest ones.

    Arguments
    ---------
    similarities : array
        (captions, classes) of all captions.
    rows, classes : array of int
        As `choose` returns them.
    labels : list of str
        (classes,).
    captions : pandas.Series
        All captions.
    threshold : float
        As `choose` takes it.
    """
    counts = np.bincount(classes, minlength=len(labels))
    lines = [f"{'class':24}{'captions':>9}{'best':>8}  nearest"]
    distinct = np.flatnonzero(~captions.duplicated())
    for k, label in enumerate(labels):
        shown = pd.Series(similarities[distinct, k], distinct).nlargest(3)
        nearest = " | ".join(captions.iloc[row][:60] for row in shown.index)
        best = similarities[:, k].max()
        lines.append(f"{label:24}{counts[k]:>9}{best:>8.3f}  {nearest}")
    logger.info("Captions by class\n%s", "\n".join(lines))
    others = similarities.max(axis=0) >= threshold
    for reason, is_so in (
        ("Those that reach the threshold are more like other classes", others),
        (
            "Lower --sim_threshold, give --min_captions_per_class, or more "
            "captions",
            ~others,
        ),
    ):
        without = [labels[k] for k in np.flatnonzero((counts == 0) & is_so)]
        if without:
            logger.warning(
                "No captions for %d of %d classes: %s. %s",
                len(without),
                len(labels),
                ", ".join(without),
                reason,
            )
    logger.info("%d of %d captions kept", len(rows), len(captions))


def read_classes(hparams):
    """The task's classes, as `dataset.prepare_zeroshot.read_labels`.

    Raises
    ------
    ValueError
        The data set has no built-in list and none is given.
    """
    path = hparams["class_path"] or BUILT_IN_LABELS.get(hparams["dataset"])
    if path is None:
        raise ValueError(
            f"--dataset={hparams['dataset']}: give "
            f"{', '.join(BUILT_IN_LABELS)}, or the classes as --class_path"
        )
    return read_labels(path)


def check_weights_of_audio(emb_dir, weights_hash):
    """Stop if the audio that these captions are for has other weights.

    Raises
    ------
    SystemExit
    """
    record = os.path.join(emb_dir, "audio_audioset.json")
    if not os.path.exists(record):
        return
    settings = read_record(record, ("settings",))["settings"]
    if settings.get("weights", weights_hash) != weights_hash:
        raise SystemExit(
            f"The audio in {emb_dir} was embedded with other weights: give the "
            "same --clap_ckpt_path or --ssl_checkpoints_dir, and the same "
            "--ssl_checkpointer"
        )


def main(argv):
    """Choose captions as the command line says."""
    hparams, run_opts = experiment.start(
        argv,
        needs="target_csv_path",
        required={
            "target_csv_path": "captions to choose from, a CSV file",
            "emb_dir": "<output_folder>/save of microsoft_curation_toemb.py",
        },
        refused={"debug": "give few captions"},
    )
    experiment.require_one_process()
    if os.path.basename(hparams["dataset"]) != hparams["dataset"]:
        raise SystemExit(
            f"--dataset={hparams['dataset']}: files are named by it, so give a "
            "name without /"
        )
    experiment.require_weights(hparams)
    experiment.take_precision(run_opts)
    experiment.check_numbers(hparams, ["sim_threshold"], -1, 1)
    experiment.check_numbers(hparams, ["text_bs"], 1, whole=True)
    experiment.check_numbers(hparams, ["min_captions_per_class"], 0, whole=True)
    experiment.check_prompt(hparams)
    task = read_classes(hparams)
    labels = task["label"].tolist()
    table = read_captions(hparams["target_csv_path"], "target_csv_path")
    brain = CaptionBrain(
        modules={"clap": hparams["clap"]}, hparams=hparams, run_opts=run_opts
    )
    hparams["load_weights"]()
    brain.modules.eval()
    brain.weights_hash = state_hash(hparams["clap"].state_dict())
    check_weights_of_audio(hparams["emb_dir"], brain.weights_hash)
    dtype = AMPConfig.from_name(brain.eval_precision).dtype
    pack_weights(hparams["clap"], dtype)
    corpus = brain.corpus(table)
    embeddings = brain.embed_classes(task["text"].tolist())
    similarities = similarities_to(corpus, embeddings)
    rows, classes = choose(
        similarities,
        table["caption"],
        hparams["sim_threshold"],
        hparams["min_captions_per_class"],
    )
    report(
        similarities,
        rows,
        classes,
        labels,
        table["caption"],
        hparams["sim_threshold"],
    )
    if not len(rows):
        raise RuntimeError(
            f"No caption reaches --sim_threshold={hparams['sim_threshold']}: "
            f"the highest similarity is {similarities.max():.4f}"
        )
    chosen = table.iloc[rows].reset_index(drop=True)
    chosen["class"] = [labels[k] for k in classes]
    chosen["similarity"] = similarities[rows, classes].round(6)
    base = os.path.join(hparams["emb_dir"], f"{hparams['dataset']}_insper_t2t")
    write_store(
        base,
        [corpus.vectors[rows]],
        ds_manifest(chosen),
        corpus.info["settings"],
        {
            "classes": labels,
            "text_prompt": hparams["text_prompt"],
            "sim_threshold": hparams["sim_threshold"],
        },
        f"{base}_ds.csv",
    )
    hparams["write_records"]()
    logger.info("%d captions in %s_ds.csv", len(rows), base)


def ds_manifest(chosen):
    """The chosen captions in the columns of a curation CSV."""
    if "ID" not in chosen:
        chosen["ID"] = [str(i) for i in range(len(chosen))]
    if "wav_path" not in chosen:
        chosen["wav_path"] = ""
    columns = ["ID", "wav_path", "caption", "class", "similarity"]
    times = [name for name in ("start", "end") if name in chosen]
    return chosen[columns + times]


if __name__ == "__main__":
    main(sys.argv[1:])
