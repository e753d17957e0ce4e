r"""Clips and classes of the zero-shot test sets, in their official layouts.

- ESC-50: Piczak, "ESC: Dataset for Environmental Sound Classification", ACM
  Multimedia 2015. Any data set in its layout can be read, with `labels_path`.
- UrbanSound8K: Salamon et al., "A Dataset and Taxonomy for Urban Sound
  Research", ACM Multimedia 2014.
- TUT Acoustic Scenes 2017: Mesaros et al., "TUT database for acoustic scene
  classification and sound event detection", EUSIPCO 2016.

As a command it writes folds of one as audio-caption pairs, to train on with
`microsoft_clap_train.py --train_csv_path=train.csv`:

    python -m dataset.prepare_zeroshot esc DATA_FOLDER --folds 1 2 3 \
        --output train.csv
"""

import argparse
import functools
import logging
import os
import sys
from dataclasses import dataclass

import pandas as pd

from files import read_lines, read_table, write_csv

logger = logging.getLogger(__name__)

LABELS_FOLDER = os.path.join(os.path.dirname(__file__), "labels")
# Classes in the order of the official class numbers, or of TUT's README.
BUILT_IN_LABELS = {
    "esc": os.path.join(LABELS_FOLDER, "esc50.csv"),
    "us8k": os.path.join(LABELS_FOLDER, "us8k.csv"),
    "tut": os.path.join(LABELS_FOLDER, "tut17.csv"),
}
DATASET_FLAGS = "--dataset (--zs_dataset in training)"
FOLDER_FLAGS = "--data_folder (--data_zs_folder in training)"
LABELS_FLAGS = "--labels_path (--zs_labels_path in training)"
TUT_FOLDER = "TUT-acoustic-scenes-2017-{}"
TUT_PARTS = ("development", "evaluation")
TUT_FOLDS = ("1", "2", "3", "4")


@dataclass
class ZeroShotSet:
    """A data set to classify.

    Arguments
    ---------
    clips : pandas.DataFrame
        `ID`, `wav_path` (absolute), `label` and `fold`, all text, of every
        clip that is on disk.
    labels : pandas.DataFrame
        `label` and `text` of every class: its name in the metadata, and its
        name as it is put behind a prompt.
    missing : dict
        Path -> fold of the clips that are listed but not on disk.
    """

    clips: pd.DataFrame
    labels: pd.DataFrame
    missing: dict

    def of_folds(self, folds, flag):
        """The same data set with the clips of some folds only.

        Arguments
        ---------
        folds : list
            Names or numbers of folds, or a single one.
        flag : str
            The flag that named them, for the error.

        Returns
        -------
        ZeroShotSet

        Raises
        ------
        ValueError
            The data set lacks one of them; the message names those it has.
        """
        if not isinstance(folds, list):
            folds = [folds]
        known = sorted(self.clips["fold"].unique(), key=lambda f: (len(f), f))
        absent = [str(fold) for fold in folds if str(fold) not in known]
        if absent or not folds:
            raise ValueError(
                f"--{flag}={folds}: the data set has the folds "
                f"{', '.join(known)}"
            )
        folds = [str(fold) for fold in folds]
        clips = self.clips[self.clips["fold"].isin(folds)]
        missing = {p: f for p, f in self.missing.items() if f in folds}
        return ZeroShotSet(clips.reset_index(drop=True), self.labels, missing)

    def true_classes(self):
        """Index of each clip's class in `labels`, (clips,) int."""
        return pd.Index(self.labels["label"]).get_indexer(self.clips["label"])


def prepare_zeroshot(
    dataset, data_folder, labels_path=None, esc10=False, tut_part="both"
):
    """Read a data set's metadata and check it against disk and class list.

    Arguments
    ---------
    dataset : str
        "esc", "us8k" or "tut".
    data_folder : str
        The data set in its official layout, or the folder above it. Of TUT,
        the folder that holds TUT-acoustic-scenes-2017-development and
        -evaluation, or one of these two, which then stands for itself.
    labels_path : str
        List of the classes, as `read_labels` reads it, instead of the built-in
        one.
    esc10 : bool
        Whether to take only ESC-50's ESC-10 clips and their classes.
    tut_part : str
        "development", "evaluation" or "both".

    Returns
    -------
    ZeroShotSet

    Raises
    ------
    ValueError
        An argument is unknown, the class list or the metadata is broken, or
        the class of a clip is not in the list.
    FileNotFoundError
        The folder, its metadata, or all of its audio is absent.
    """
    readers = {
        "esc": functools.partial(_read_esc, esc10=esc10),
        "us8k": _read_us8k,
        "tut": functools.partial(_read_tut, part=tut_part),
    }
    if dataset not in readers:
        raise ValueError(
            f"{DATASET_FLAGS} is '{dataset}': give {', '.join(readers)}"
        )
    if esc10 and dataset != "esc":
        raise ValueError(f"--esc10 selects clips of ESC-50, not of '{dataset}'")
    if tut_part not in (*TUT_PARTS, "both"):
        raise ValueError(
            f"--tut_part={tut_part}: give development, evaluation or both"
        )
    if not data_folder or not os.path.isdir(data_folder):
        raise FileNotFoundError(
            f"{FOLDER_FLAGS} is '{data_folder or ''}', not a folder that exists"
        )
    labels_path = labels_path or BUILT_IN_LABELS[dataset]
    labels = read_labels(labels_path)
    listed = readers[dataset](os.path.abspath(data_folder))
    _check_listed(listed, labels, labels_path, esc10)
    if esc10:
        in_use = labels["label"].isin(listed["label"])
        labels = labels[in_use].reset_index(drop=True)
    clips, missing = _split_missing(listed)
    logger.info(
        "%s: %d clips, %d classes, %d clips missing",
        data_folder,
        len(clips),
        len(labels),
        len(missing),
    )
    return ZeroShotSet(clips, labels, missing)


def read_labels(path):
    """Read a list of classes.

    Arguments
    ---------
    path : str
        CSV with the columns `label` and `text`; without `text`, the text is
        the label with spaces for its underscores. Or any other text file, with
        a label a line.

    Returns
    -------
    pandas.DataFrame
        `label` and `text`, one row for each class.

    Raises
    ------
    ValueError
        The file cannot be read, has no column `label`, no rows, an empty
        cell, a TAB, or a class or a text twice.
    """
    if str(path).lower().endswith(".csv"):
        table = read_table(path, ["label"])
    else:
        table = pd.DataFrame({"label": list(read_lines(path))}, dtype=str)
    if table["label"].str.contains("\t").any():
        raise ValueError(
            f"{path} has TABs: give a .csv file, label,text, or a label a line"
        )
    if "text" not in table:
        table["text"] = table["label"].str.replace("_", " ")
    labels = table[["label", "text"]].apply(lambda cells: cells.str.strip())
    if labels.empty:
        raise ValueError(f"{path} lists no classes")
    empty = (labels == "").any(axis=1)
    if empty.any():
        raise ValueError(f"{path}: row {empty.argmax() + 2} has an empty cell")
    again = labels["label"].duplicated()
    if again.any():
        raise ValueError(
            f"{path} lists the class '{labels['label'][again.argmax()]}' twice"
        )
    again = labels["text"].duplicated()
    if again.any():
        label, text = labels.loc[again.argmax()]
        first = labels["label"][labels["text"] == text].iloc[0]
        raise ValueError(
            f"{path}: the class '{label}' has the text of '{first}', '{text}', "
            "and would never be guessed; give each its own"
        )
    return labels


# ---- Layouts ---------------------------------------------------------------
# The reader of a layout returns the columns of `ZeroShotSet.clips`, and
# `source`: file and row that list the clip, for errors.


def _read_esc(data_folder, esc10):
    """Clips of ESC-50, or of another data set in its layout."""
    meta_name = os.path.join("meta", "esc50.csv")
    root = _find_root(data_folder, meta_name)
    meta_path = os.path.join(root, meta_name)
    columns = ["filename", "fold", "category"] + ["esc10"] * esc10
    meta = read_table(meta_path, columns)
    paths = [os.path.join(root, "audio", name) for name in meta["filename"]]
    listed = _listed(meta_path, 2, paths, meta["category"], meta["fold"])
    # Other data sets in this layout may have a folder for each class.
    listed["ID"] = [os.path.splitext(name)[0] for name in meta["filename"]]
    # Spreadsheets have it in capitals.
    return listed[meta["esc10"].str.lower() == "true"] if esc10 else listed


def _read_us8k(data_folder):
    """Clips of UrbanSound8K."""
    meta_name = os.path.join("metadata", "UrbanSound8K.csv")
    root = _find_root(data_folder, meta_name)
    meta_path = os.path.join(root, meta_name)
    meta = read_table(meta_path, ["slice_file_name", "fold", "class"])
    paths = [
        os.path.join(root, "audio", f"fold{fold}", name)
        for fold, name in zip(meta["fold"], meta["slice_file_name"])
    ]
    return _listed(meta_path, 2, paths, meta["class"], meta["fold"])


def _read_tut(data_folder, part):
    """Clips of one or both parts of TUT Acoustic Scenes 2017."""
    parts = TUT_PARTS if part == "both" else (part,)
    for one in parts:
        if os.path.basename(data_folder) == TUT_FOLDER.format(one):
            return _read_tut_part(data_folder, one)
    remedy = ""
    if part == "both":
        remedy = (
            ". For the other part alone give its own folder (or --tut_part, "
            "where there is that flag)"
        )
    tables = []
    for one in parts:
        name = TUT_FOLDER.format(one)
        root = os.path.join(_find_root(data_folder, name, remedy), name)
        tables.append(_read_tut_part(root, one))
    return pd.concat(tables, ignore_index=True)


def _read_tut_part(root, part):
    """Clips of the development or the evaluation part."""
    setup = os.path.join(root, "evaluation_setup")
    # The evaluation part was published with its scenes in evaluate.txt.
    places = [os.path.join(root, "meta.txt")]
    places.append(os.path.join(setup, "evaluate.txt"))
    present = [path for path in places if os.path.isfile(path)]
    if not present:
        raise FileNotFoundError(f"Looked for {' and '.join(places)}: neither")
    meta = _read_scenes(present[0])
    folds = {}
    if part == "development":
        for fold in TUT_FOLDS:
            path = os.path.join(setup, f"fold{fold}_evaluate.txt")
            if os.path.isfile(path):
                folds.update(dict.fromkeys(_read_scenes(path)["file"], fold))
    listed = _listed(
        present[0],
        1,
        [os.path.join(root, file) for file in meta["file"]],
        meta["scene"],
        [folds.get(file, part) for file in meta["file"]],
    )
    # File names are unique within a part only.
    listed["ID"] = part + "/" + listed["ID"]
    return listed


def _read_scenes(path):
    """TUT's tables: file, scene, and perhaps location, without a header."""
    try:
        return pd.read_csv(
            path,
            sep="\t",
            header=None,
            usecols=[0, 1],
            names=["file", "scene"],
            dtype=str,
            keep_default_na=False,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _find_root(data_folder, name, remedy=""):
    """The folder that holds `name`: the given one or the one below it."""
    below = sorted(e.path for e in os.scandir(data_folder) if e.is_dir())
    roots = [
        folder
        for folder in (data_folder, *below)
        if os.path.exists(os.path.join(folder, name))
    ]
    if not roots:
        raise FileNotFoundError(
            f"The folder {data_folder} holds no {name}; looked there and in "
            f"the folders below it{remedy}"
        )
    if roots[0] != data_folder and len(roots) > 1:
        raise ValueError(
            f"The folder {data_folder} holds {name} more than once: give "
            f"one of {', '.join(roots)}"
        )
    return roots[0]


def _listed(meta_path, first_row, paths, labels, folds):
    """Table of the clips that a metadata file lists from a row on."""
    names = [os.path.basename(path) for path in paths]
    return pd.DataFrame(
        {
            "ID": [os.path.splitext(name)[0] for name in names],
            "wav_path": paths,
            "label": labels,
            "fold": folds,
            "source": [
                f"{meta_path}, row {first_row + i}" for i in range(len(paths))
            ],
        }
    )


# ---- Checks ----------------------------------------------------------------


def _check_listed(listed, labels, labels_path, esc10):
    """Raise if nothing is listed, a clip twice, or a class is unknown.

    Classes without clips are warned of: each makes the task harder.
    """
    if listed.empty:
        raise ValueError(
            "The metadata lists no clips" + (" of ESC-10" if esc10 else "")
        )
    again = listed[listed["wav_path"].duplicated()]
    if len(again):
        raise ValueError(
            f"{again['source'].iloc[0]}: the clip "
            f"'{again['wav_path'].iloc[0]}' is listed before"
        )
    unknown = listed[~listed["label"].isin(labels["label"])]
    if len(unknown):
        raise ValueError(
            f"{unknown['source'].iloc[0]}: the class "
            f"'{unknown['label'].iloc[0]}' is not in {labels_path}; give the "
            f"list of your classes by {LABELS_FLAGS}"
        )
    unused = labels[~labels["label"].isin(listed["label"])]
    if len(unused) and not esc10:
        logger.warning(
            "%d of the %d classes in %s have no clip, '%s' for one, but clips "
            "can be taken for them; give the list of your classes by %s",
            len(unused),
            len(labels),
            labels_path,
            unused["label"].iloc[0],
            LABELS_FLAGS,
        )


def _split_missing(listed):
    """The clips that are on disk, and the paths and folds of the others."""
    there = listed["wav_path"].map(os.path.isfile)
    missing = dict(zip(listed["wav_path"][~there], listed["fold"][~there]))
    if len(missing) == len(listed):
        raise FileNotFoundError(
            f"None of the {len(listed)} clips is on disk; the first would be "
            f"{next(iter(missing))}"
        )
    if missing:
        logger.warning(
            "%d of %d clips are missing and left out: %s%s",
            len(missing),
            len(listed),
            ", ".join(list(missing)[:3]),
            ", ..." if len(missing) > 3 else "",
        )
    clips = listed[there].drop(columns="source").reset_index(drop=True)
    return clips, missing


# ---- Command ---------------------------------------------------------------


def caption_folds(data, folds, text_prompt):
    """Pairs of the clips of some folds and their prompted class names.

    Arguments
    ---------
    data : ZeroShotSet
        The data set.
    folds : list of str
        Folds to take.
    text_prompt : str
        "{}" in it stands for the name of the class; without one, the name
        comes behind it.

    Returns
    -------
    pandas.DataFrame
        `ID`, `wav_path`, `caption` and `fold`.

    Raises
    ------
    ValueError
        A fold has no clips.
    """
    data = data.of_folds(folds, "folds")
    pairs = data.clips
    texts = dict(zip(data.labels["label"], data.labels["text"]))
    # As models.zeroshot.prompted, which is not imported here.
    if "{}" not in text_prompt:
        text_prompt = text_prompt.rstrip() + " {}"
    pairs["caption"] = [
        text_prompt.replace("{}", texts[label]) for label in pairs["label"]
    ]
    return pairs[["ID", "wav_path", "caption", "fold"]]


def main(argv):
    """Write folds of a data set as a CSV of pairs."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.prepare_zeroshot",
        description="Write folds of a data set as audio-caption pairs.",
    )
    parser.add_argument("dataset", choices=list(BUILT_IN_LABELS))
    parser.add_argument("data_folder")
    parser.add_argument("--folds", nargs="+", required=True)
    parser.add_argument("--output", required=True, help="CSV to write")
    parser.add_argument("--esc10", action="store_true")
    parser.add_argument("--labels_path", help="list of the classes")
    parser.add_argument("--text_prompt", default="this is a sound of ")
    args = parser.parse_args(argv)
    data = prepare_zeroshot(
        args.dataset, args.data_folder, args.labels_path, args.esc10
    )
    pairs = caption_folds(data, args.folds, args.text_prompt)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    write_csv(pairs, args.output)
    print(f"{len(pairs)} pairs in {args.output}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(sys.argv[1:])
