"""Audio-caption pairs from data sets in their official layouts, or a CSV.

Finds the annotations and audio of any of these below one folder, checks the
header of every audio file, and splits the recordings into training and
validation manifests:

- AudioCaps: Kim et al., "AudioCaps: Generating Captions for Audios in The
  Wild", NAACL-HLT 2019.
- Clotho: Drossos et al., "Clotho: an Audio Captioning Dataset", ICASSP 2020,
  arXiv 1910.09387.
- MACS: Martín-Morató and Mesaros, "What is the ground truth? Reliability of
  multi-annotator data for audio tagging", EUSIPCO 2021, arXiv 2104.04214.
- FSD50K: Fonseca et al., "FSD50K: an Open Dataset of Human-Labeled Sound
  Events", IEEE/ACM TASLP 2022, arXiv 2010.00475. Its captions are the titles
  and descriptions that the uploaders gave their sounds.
- Index files of any other collection, `*_index.tsv`: path<TAB>caption.

Training does this by itself. To see what there is, or to have the lists alone:

    python -m dataset.prepare_captions DATA results/pairs
"""

import argparse
import csv
import functools
import hashlib
import html
import json
import logging
import os
import random
import re
import sys
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import yaml

from dataset.audio import AUDIO_SUFFIXES, UNREAD_SUFFIXES
from dataset.manifest import of_headers, probe_audio, read_pairs
from files import path_in, read_table, write_csv, write_json

logger = logging.getLogger(__name__)

OUTPUTS = (
    "train_raw.csv",
    "valid_raw.csv",
    "skipped_audio.csv",
    "prepare.json",
)

LOOKED_FOR = """\
  AudioCaps: any .csv with the header audiocap_id,youtube_id,start_time,caption
  Clotho: clotho_captions_{development,validation,evaluation}.csv
  MACS: MACS.yaml
  FSD50K: {dev,eval}.csv in FSD50K.ground_truth/, or with the header
    fname,labels,mids
  index files: *_index.tsv"""

AUDIOCAPS_COLUMNS = ["audiocap_id", "youtube_id", "start_time", "caption"]
CLOTHO_COLUMNS = ["file_name"] + [f"caption_{i}" for i in range(1, 6)]
CLOTHO_NAME = re.compile(
    r"clotho_captions_(development|validation|evaluation)\.csv"
)
FSD50K_INFO = "{}_clips_info_FSD50K.json"

# What annotation files of the official test splits have in their stems.
TEST_SPLITS = {
    "audiocaps": re.compile("(?<![a-z])test(?![a-z])", re.I),
    "clotho": re.compile("evaluation"),
    "fsd50k": re.compile("eval"),
}

# Of a table's text in memory at once.
_HASHED_ROWS = 2**16

# Arguments that say where data is.
_PLACES = ("data_annot_folder", "train_csv_path")
_PLACES += ("curation_csv", "data_curation_folder")

# The end of a start time that is a whole number, written as a float.
WHOLE_AS_FLOAT = re.compile(r"(?<=\d)\.0+$")

# How files of AudioSet are named by their ids; perhaps with times behind.
YOUTUBE_NAMES = (r"^([\w-]{11})(?:_.*)?$", r"^Y([\w-]{11})(?:_.*)?$")

# What stands in YAML for no text; the last is Python's.
NO_SENTENCE = ("null", "Null", "NULL", "~", "None")

# A link goes with its text, which is nearly always an address or a name.
HTML_LINK = re.compile(
    r"<a\b[^>]*>.*?</a>|(?:https?://|www\.)[^\s\"'<>]+", re.I | re.S
)
HTML_BREAK = re.compile(r"</?(?:br|p|div|ul|ol|li)\b[^>]*>", re.I)
# A letter must follow, so that "5 < 6 and 7 > 6" stays whole.
HTML_TAG = re.compile(r"</?[a-z][^>]*>", re.I)
# JSON may hold half of a pair, where a text was cut; no file can.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def prepare_captions(
    save_folder,
    data_annot_folder=None,
    train_csv_path=None,
    valid_pct=0.05,
    subset_pct=1.0,
    overfit_size=None,
    official_test_splits=True,
    max_bad_audio=0.05,
    seed=1234,
    curation_csv=None,
    data_curation_folder=None,
):
    """Write the training and validation manifests of audio-caption pairs.

    Writes `train_raw.csv` and `valid_raw.csv` (`ID,wav_path,caption,dataset,
    duration`, and `start` and `end` if the ready CSV has them),
    `curated_raw.csv` if there are curated pairs, `skipped_audio.csv`
    (`wav_path,reason`) and, last, `prepare.json` (arguments, hashes of the
    data, and counts). With the arguments and the data of the run before, its
    files are used again; whatever the data, beside checkpoints.

    Arguments
    ---------
    save_folder : str
        Folder of these files; made if absent.
    data_annot_folder : str
        Folder that holds AudioCaps, Clotho, MACS, FSD50K or `*_index.tsv`
        files, annotations (not hidden) and audio, at any depth.
    train_csv_path : str
        A ready CSV with `wav_path` and `caption`, used besides the folder.
    valid_pct : float
        Fraction of the recordings to validate on, at least one.
    subset_pct : float
        Fraction of the other recordings to train on.
    overfit_size : int
        Train and validate on this many pairs, the same ones, to see whether a
        model can learn them by heart.
    official_test_splits : bool
        Whether the test splits of AudioCaps, Clotho and FSD50K are used too.
    max_bad_audio : float
        Fraction of the files present that may be unreadable.
    seed : int
        Seed of the split.
    curation_csv : str
        Curated pairs, a CSV as `train_csv_path`; they are not split, and
        those of recordings to validate on, or held out, are left out.
    data_curation_folder : str
        Where relative paths in it start, instead of its own folder.

    Returns
    -------
    dict
        "datasets": for each one `clips`, `captions` and `hours` that can be
        used, clips `missing` and `unreadable`, captions dropped as empty
        (`no_caption`) or `duplicates`, and captions `held_out`. "train",
        "valid" and perhaps "curated": `clips`, `captions` and `hours`, and
        of "curated" clips `missing` and `unreadable`, captions `no_caption`,
        and those left out since their recording is `validated` on or, with
        a test split, `held_out`.

    Raises
    ------
    ValueError
        An argument is out of range, nothing was recognised, an annotation
        file is broken, or too much audio is missing or unreadable, or shorter
        than times say; or there are checkpoints beside files of other
        arguments.
    FileNotFoundError
        `data_annot_folder` or a file that belongs to an annotation is absent.
    """
    arguments = {
        "data_annot_folder": data_annot_folder
        and os.path.abspath(data_annot_folder),
        "train_csv_path": train_csv_path and os.path.abspath(train_csv_path),
        "valid_pct": valid_pct,
        "subset_pct": subset_pct,
        "overfit_size": overfit_size,
        "official_test_splits": official_test_splits,
        "max_bad_audio": max_bad_audio,
        "seed": seed,
        "curation_csv": curation_csv and os.path.abspath(curation_csv),
        "data_curation_folder": data_curation_folder
        and os.path.abspath(data_curation_folder),
    }
    _check_arguments(arguments)
    train_csv, valid_csv, skipped_csv, record = (
        os.path.join(save_folder, name) for name in OUTPUTS
    )
    pairs = _collect(
        arguments["data_annot_folder"],
        arguments["train_csv_path"],
        official_test_splits,
    )
    curated = None
    if curation_csv:
        curated = _read_curated(curation_csv, data_curation_folder)
    hashes = _hashes(pairs, curated)
    if os.path.exists(record):
        counts = _earlier_counts(save_folder, arguments, hashes)
        if counts is not None:
            return counts
        # Were it left, a run that ends early would leave it beside files of
        # other arguments.
        os.remove(record)

    pairs["wav_path"] = _one_name(pairs["wav_path"])
    pairs["fate"] = _fates(pairs)
    wanted = pairs["wav_path"][pairs["fate"] == "used"].unique()
    seconds, failed = _probe(wanted)
    skipped = dict(failed)
    if curated is not None:
        curated, gone, lost = _usable(curated)
        skipped |= gone
    os.makedirs(save_folder, exist_ok=True)
    write_csv(
        pd.DataFrame(skipped.items(), columns=["wav_path", "reason"]),
        skipped_csv,
    )
    _check_audio(seconds, failed, max_bad_audio, skipped_csv)

    _mark_failed(pairs, failed)
    _check_datasets(pairs, skipped_csv)
    pairs["duration"] = pairs["wav_path"].map(seconds)
    _check_times(pairs, "train_csv_path", max_bad_audio)
    used = _manifest(pairs)
    train, valid = _split(used, valid_pct, subset_pct, overfit_size, seed)
    if valid.empty:
        raise ValueError(
            "The validation set is empty: of all recordings, only "
            f"{used['wav_path'].iloc[0]} can be used. Add others, or train "
            "with --overfit_size to validate on the same pairs."
        )
    write_csv(train, train_csv)
    write_csv(valid, valid_csv)

    counts = {
        "datasets": _count_datasets(pairs),
        "train": _totals(train),
        "valid": _totals(valid),
    }
    if curated is not None:
        _check_curated(curated, gone, max_bad_audio, skipped_csv)
        _check_times(curated, "curation_csv", max_bad_audio)
        kept, left_out = _left_to_train_on(curated, pairs, valid)
        write_csv(kept, os.path.join(save_folder, "curated_raw.csv"))
        counts["curated"] = {**_totals(kept), **lost, **left_out}
    _log_counts(counts, skipped_csv)
    write_json({"arguments": arguments, **hashes, "counts": counts}, record)
    return counts


def _check_arguments(arguments):
    """Raise for the first argument that is absent or out of range."""
    if not (arguments["data_annot_folder"] or arguments["train_csv_path"]):
        raise ValueError(
            "No training data: give --data_annot_folder, --train_csv_path or "
            "both"
        )

    fraction = (int, float)
    limits = {
        "valid_pct": (
            fraction,
            lambda value: 0 < value < 1,
            "a fraction, above 0 and below 1",
        ),
        "subset_pct": (
            fraction,
            lambda value: 0 < value <= 1,
            "a fraction, above 0 and at most 1",
        ),
        "max_bad_audio": (
            fraction,
            lambda value: 0 <= value <= 1,
            "a fraction, from 0 to 1",
        ),
    }
    if arguments["overfit_size"] is not None:
        limits["overfit_size"] = (
            int,
            lambda value: value >= 1,
            "a whole number of pairs, at least 1, or nothing",
        )
    for flag, (types, allows, allowed) in limits.items():
        value = arguments[flag]
        is_number = isinstance(value, types) and not isinstance(value, bool)
        if not (is_number and allows(value)):
            raise ValueError(f"--{flag}={value}: give {allowed}")


def _hashes(pairs, curated):
    """Hashes of what each data set lists, and of the sizes of its audio.

    They are apart, since pairs are the same whatever becomes of their audio.
    """
    listed = pairs.drop(columns="youtube_id", errors="ignore")
    tables = dict(tuple(listed.groupby("dataset")))
    if curated is not None:
        tables["curation_csv"] = curated
    paths = pd.concat([table["wav_path"] for table in tables.values()])
    sizes = _sizes(paths.unique())
    return {
        "data": {name: _hash(table) for name, table in tables.items()},
        "audio": {
            name: _hash(table["wav_path"].map(sizes))
            for name, table in tables.items()
        },
    }


def _hash(table):
    """Hash of the cells of a table."""
    digest = hashlib.sha256()
    for begin in range(0, max(len(table), 1), _HASHED_ROWS):
        rows = table.iloc[begin : begin + _HASHED_ROWS]
        digest.update(rows.to_csv(index=False, header=not begin).encode())
    return digest.hexdigest()


def _sizes(paths):
    """Bytes of each audio file, -1 where there is none."""

    def size(path):
        try:
            return os.stat(path).st_size
        except (OSError, ValueError):
            return -1

    # A bare name is none of a file.
    paths = [path for path in paths if os.path.isabs(path)]
    return dict(zip(paths, of_headers(size, paths, len(paths) < 1000)))


def _earlier_counts(save_folder, arguments, hashes):
    """Counts of the run before if its files can be used again, else None.

    Raises
    ------
    ValueError
        They cannot, but there are checkpoints of a run that needs them.
    """
    with open(
        os.path.join(save_folder, "prepare.json"), encoding="utf-8"
    ) as file:
        earlier = json.load(file)
    has_begun = any(
        name.startswith("CKPT+") for name in os.listdir(save_folder)
    )
    changed = {
        flag: f"{flag} ({earlier['arguments'].get(flag)} -> {value})"
        for flag, value in arguments.items()
        if earlier["arguments"].get(flag) != value
    }
    if has_begun:
        # These do not change which pairs there are.
        moved = _PLACES if earlier["data"] == hashes["data"] else ()
        for flag in ("max_bad_audio", *moved):
            changed.pop(flag, None)
        if changed:
            raise ValueError(
                f"{save_folder} holds a run that began with other pairs, and "
                f"keeps them: {', '.join(changed.values())}. Give the same "
                "again, or another --output_folder"
            )
    if changed:
        logger.warning(
            "%s was prepared with other arguments and is prepared again: %s",
            save_folder,
            ", ".join(changed.values()),
        )
        return None
    lists = ("curated_raw.csv",) if arguments["curation_csv"] else ()
    for name in (*OUTPUTS, *lists):
        if not os.path.exists(os.path.join(save_folder, name)):
            logger.warning(
                "%s lacks %s and is prepared again", save_folder, name
            )
            return None
    counts = earlier["counts"]
    skipped_csv = os.path.join(save_folder, "skipped_audio.csv")
    changed = _changes_of_data(earlier, hashes, skipped_csv)
    if not changed:
        logger.info(
            "Using the captions prepared in %s with the same arguments and "
            "data",
            save_folder,
        )
        _log_counts(counts, skipped_csv)
        return counts
    if has_begun:
        # With another split it would validate on what it was trained on.
        logger.warning(
            "The data changed since %s was prepared: %s. Its run goes on with "
            "the pairs that it began with; another --output_folder takes the "
            "change in",
            save_folder,
            ", ".join(changed),
        )
        return counts
    logger.warning(
        "%s was prepared with other data and is prepared again: %s",
        save_folder,
        ", ".join(changed),
    )
    return None


def _changes_of_data(before, now, skipped_csv):
    """What is not as it was when the data was prepared, in words."""
    changed = [
        f"captions or audio files of {name}"
        for name in sorted(before["data"].keys() | now["data"].keys())
        if any(
            before.get(kind, {}).get(name) != now[kind].get(name)
            for kind in now
        )
    ]
    skipped = read_table(skipped_csv)["wav_path"]
    usable, _ = _probe(skipped)
    if usable:
        changed.append(
            f"{len(usable)} files of {skipped_csv} that can be used now, "
            f"{_first(usable)}"
        )
    return changed


# ---- Finding annotations and audio ----------------------------------------


@dataclass
class _Found:
    """What one walk of the data folder found.

    Arguments
    ---------
    annotations : list
        Pairs of the data set's name and the path of an annotation file.
    fsd50k_info : dict
        File name -> paths of FSD50K's clip metadata.
    audio, unread : dict
        Stem of the file name -> paths of audio files, and of those in formats
        that are not read.
    foreign : dict
        Path of an annotation file -> a tuple of the folders of other data
        sets, where its audio is not.
    held_out : set
        Paths of the annotation files of test splits that are not used.
    """

    annotations: list = field(default_factory=list)
    fsd50k_info: dict = field(default_factory=dict)
    audio: dict = field(default_factory=dict)
    unread: dict = field(default_factory=dict)
    foreign: dict = field(default_factory=dict)
    held_out: set = field(default_factory=set)

    def locate(self, stems, near, folder=None):
        """Path of the audio file with the first of the stems that is there.

        Arguments
        ---------
        stems : iterable of str
            File names without ending, the likeliest first.
        near : str
            The annotation file, to choose among equal names.
        folder : str
            Name of the folder where the layout has the file. Without one, it
            may be in any; never is it one of another data set.

        Returns
        -------
        str
            None if there is no such file. One in a format that is not read
            where there is no other.
        """

        def fits(path):
            above = os.path.basename(os.path.dirname(path))
            is_foreign = path.startswith(self.foreign[near])
            return folder in (None, above) and not is_foreign

        for audio in (self.audio, self.unread):
            for stem in stems:
                paths = [path for path in audio.get(stem, ()) if fits(path)]
                if paths:
                    return _nearest(paths, near)
        return None


def _nearest(paths, near):
    """The path closest to another in the tree."""
    if len(paths) == 1:
        return paths[0]
    return min(paths, key=lambda p: (-len(os.path.commonpath((p, near))), p))


def _walk(top):
    """The folders of a tree and their files, each folder once.

    Folders behind links are part of it; a link back up does not lead round
    in a circle.
    """
    seen = {os.path.realpath(top)}

    def report(error):
        logger.warning("Left out, cannot be listed: %s", error)

    for folder, subfolders, files in os.walk(
        top, onerror=report, followlinks=True
    ):
        yield folder, sorted(files)
        fresh = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen:
                seen.add(real)
                fresh.append(name)
        subfolders[:] = fresh


def _scan(top):
    """Sort the files of a tree into annotations and audio."""
    found = _Found()
    info_names = [FSD50K_INFO.format(split) for split in ("dev", "eval")]
    for folder, files in _walk(top):
        for name in files:
            stem, suffix = os.path.splitext(name)
            path = os.path.join(folder, name)
            if suffix.lower() in AUDIO_SUFFIXES:
                found.audio.setdefault(stem, []).append(path)
            elif suffix.lower() in UNREAD_SUFFIXES:
                found.unread.setdefault(stem, []).append(path)
            elif name in info_names:
                found.fsd50k_info.setdefault(name, []).append(path)
            elif dataset := _recognise(folder, name):
                found.annotations.append((dataset, path))
    found.annotations.sort()
    tops = [(dataset, _top(path)) for dataset, path in found.annotations]
    for dataset, path in found.annotations:
        found.foreign[path] = tuple(
            top
            for other, top in tops
            if other != dataset and not path.startswith(top)
        )
    return found


def _top(annotation):
    """The folder of a data set, with a separator behind it."""
    folder, name = os.path.split(os.path.dirname(annotation))
    if name == "FSD50K.ground_truth":
        return os.path.join(folder, "")
    return os.path.join(folder, name, "")


def _recognise(folder, name):
    """Data set that a file annotates, or None; hidden files are none's.

    On disks of other systems macOS puts a file of attributes, `._x_index.tsv`,
    beside each.
    """
    if name.startswith("."):
        return None
    if CLOTHO_NAME.fullmatch(name):
        return "clotho"
    if name == "MACS.yaml":
        return "macs"
    if name.endswith("_index.tsv"):
        return name.removesuffix(".tsv")
    if not name.lower().endswith(".csv"):
        return None
    header = _peek_header(os.path.join(folder, name))
    if "audiocap_id" in header:
        return "audiocaps"
    in_place = os.path.basename(folder) == "FSD50K.ground_truth"
    if name in ("dev.csv", "eval.csv") and (
        in_place or header[:3] == ["fname", "labels", "mids"]
    ):
        return "fsd50k"
    return None


def _peek_header(path):
    """Column names of a CSV that may be anyone's: in any encoding, any size.

    None of one that cannot be opened, as a link to nowhere.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.readline(1000).replace('"', "").strip().split(",")
    except OSError as error:
        logger.warning("Left out, cannot be read: %s", error)
        return []


def _collect(data_annot_folder, train_csv_path, official_test_splits):
    """All pairs that the data sets list.

    Returns
    -------
    pandas.DataFrame
        `wav_path` (absolute, or the bare name looked for in vain), `caption`
        with single blanks, `dataset`, `held_out`, and perhaps `youtube_id`,
        `start` and `end`.
    """
    frames = []
    if data_annot_folder:
        frames += _collect_folder(data_annot_folder, official_test_splits)
    if train_csv_path:
        ready = _ready_csv(train_csv_path)
        frames.append(ready.assign(dataset="csv", held_out=False))
    pairs = pd.concat(frames, ignore_index=True)
    pairs["caption"] = [" ".join(c.split()) for c in pairs["caption"]]
    return pairs


def _collect_folder(folder, official_test_splits):
    """A table of pairs for every annotation file below a folder."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"--data_annot_folder={folder} is not a folder that exists"
        )
    logger.info("Looking for captions and audio below %s", folder)
    found = _scan(folder)
    if not found.annotations:
        raise ValueError(
            f"--data_annot_folder={folder}: nothing recognised in it or any "
            f"folder below. Looked for\n{LOOKED_FOR}"
        )
    if not official_test_splits:
        found.held_out = {
            path
            for dataset, path in found.annotations
            if _is_test_split(dataset, path)
        }
    readers = {
        "audiocaps": _audiocaps,
        "clotho": _clotho,
        "macs": _macs,
        "fsd50k": _fsd50k,
    }
    frames = []
    for dataset, path in found.annotations:
        frame = readers.get(dataset, _index)(path, found)
        if frame.empty:
            raise ValueError(f"{path} lists no clips")
        frame["dataset"] = dataset
        frame["held_out"] = path in found.held_out
        frames.append(frame)
    return frames


def _is_test_split(dataset, path):
    """Whether an annotation file is of an official test split."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return dataset in TEST_SPLITS and bool(TEST_SPLITS[dataset].search(stem))


# ---- One reader for each layout -------------------------------------------


def _audiocaps(path, found):
    """Pairs of an AudioCaps CSV, with the YouTube id of each."""
    split = os.path.splitext(os.path.basename(path))[0]
    rows = list(_read_cells(path, AUDIOCAPS_COLUMNS))
    paths = {}
    for number, video, start, _ in rows:
        clip = f"{video}_{start}"
        # pandas makes 30.0 of 30 where another start is missing.
        names = dict.fromkeys((clip, WHOLE_AS_FLOAT.sub("", clip), video))
        stems = [prefix + name for name in names for prefix in ("", "Y")]
        # audiocaps-download has a file for each caption of a clip.
        paths[clip] = (
            paths.get(clip)
            or found.locate(stems, path)
            or found.locate((number,), path, split)
        )
    pairs = [
        (paths[f"{video}_{start}"] or f"{video}_{start}", caption)
        for _, video, start, caption in rows
    ]
    return _pairs_frame(pairs).assign(youtube_id=[row[1] for row in rows])


def _clotho(path, found):
    """Pairs of a Clotho CSV, five captions for each recording."""
    split = CLOTHO_NAME.fullmatch(os.path.basename(path))[1]
    rows = [
        (name, (os.path.splitext(name)[0],), captions)
        for name, *captions in _read_cells(path, CLOTHO_COLUMNS)
    ]
    # Audio may be in a folder of another name, but then all of it is.
    in_place = any(found.locate(stems, path, split) for _, stems, _ in rows)
    folder = split if in_place else None
    pairs = []
    for name, stems, captions in rows:
        wav_path = found.locate(stems, path, folder)
        wav_path = wav_path or os.path.join(folder or "", name)
        pairs += [(wav_path, caption) for caption in captions]
    return _pairs_frame(pairs)


def _macs(path, found):
    """Pairs of MACS.yaml."""
    pairs = []
    try:
        with open(path, "rb") as file:
            # Of all loaders this one takes nothing for a number, a date or a
            # truth value: the caption "No" stays text.
            listing = yaml.load(file, Loader=yaml.CBaseLoader)
        for clip in listing["files"]:
            name = clip["filename"]
            stem = os.path.splitext(name)[0]
            wav_path = found.locate((stem,), path) or name
            for annotation in clip["annotations"]:
                sentence = annotation["sentence"]
                caption = "" if sentence in NO_SENTENCE else sentence
                pairs.append((wav_path, caption))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a list `files` of `filename` and `annotations`, "
            f"each with a `sentence`: {error!r}"
        ) from error
    return _pairs_frame(pairs)


def _fsd50k(path, found):
    """Pairs of an FSD50K ground truth: titles and descriptions."""
    split = os.path.splitext(os.path.basename(path))[0]
    info_name = FSD50K_INFO.format(split)
    if path in found.held_out:
        captions = {}
    elif info_name in found.fsd50k_info:
        info = _nearest(found.fsd50k_info[info_name], path)
        captions = _fsd50k_captions(info)
    else:
        raise FileNotFoundError(
            f"{path} is there, but {info_name}, which has the captions, is in "
            "no folder of --data_annot_folder (the layout has it in "
            f"FSD50K.metadata/). Add it, or keep FSD50K out of the folder."
        )
    folder = f"FSD50K.{split}_audio"
    return _pairs_frame(
        [
            (
                found.locate((name,), path, folder) or f"{folder}/{name}.wav",
                captions.get(name, ""),
            )
            for (name,) in _read_cells(path, ["fname"])
        ]
    )


def _fsd50k_captions(path):
    """The caption of every clip in a file of FSD50K's clip metadata."""
    try:
        with open(path, encoding="utf-8") as file:
            info = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return {
            name: _describe(clip["title"] or "", clip["description"] or "")
            for name, clip in info.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not give a `title` and a `description` of each "
            f"clip: {error!r}"
        ) from error


def _describe(title, description):
    """Caption of a sound from what its uploader wrote about it."""
    title = _plain_text(title)
    stem, suffix = os.path.splitext(title)
    if suffix.lower() in (*AUDIO_SUFFIXES, ".m4a"):
        title = stem
    parts = (title, _plain_text(description))
    return ". ".join(part for part in parts if part)


def _plain_text(text):
    """Text without HTML links, tags and entities, with single blanks."""
    text = HTML_BREAK.sub(" ", HTML_LINK.sub(" ", text))
    # Entities come last: what "&lt;" stands for opens no tag.
    text = html.unescape(HTML_TAG.sub("", text))
    text = LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)
    return " ".join(text.split())


def _index(path, _):
    """Pairs of an index file, whose paths start from its folder."""
    folder = os.path.dirname(path)
    pairs = []
    for line, cells in _read_index(path):
        if len(cells) != 2 or not cells[0].strip():
            raise ValueError(
                f"{path}, line {line}: not path<TAB>caption (several captions "
                "in quotes, a line each)"
            )
        wav_path = path_in(folder, cells[0])
        captions = cells[1].strip().split("\n")
        pairs += [(wav_path, caption) for caption in captions]
    return _pairs_frame(pairs)


def _ready_csv(path):
    """Pairs of a CSV given with --train_csv_path, with times if it has them."""
    logger.info("Reading the pairs of %s", path)
    columns = ("wav_path", "caption", "start", "end")
    frame = read_pairs(path, "train_csv_path")
    return frame[[column for column in columns if column in frame]]


def _pairs_frame(pairs):
    """A table of (wav_path, caption), with its columns even if empty."""
    return pd.DataFrame(pairs, columns=["wav_path", "caption"])


def _read_cells(path, columns):
    """Cells of the named columns, row by row, of a CSV with a header."""
    table = read_table(path, columns)[columns]
    return table.itertuples(index=False, name=None)


def _read_index(path):
    """Rows of an index file that are not blank, every cell as text.

    Arguments
    ---------
    path : str
        The file, in UTF-8.

    Returns
    -------
    list
        Pairs of the number of the row's last line and the list of its cells.

    Raises
    ------
    ValueError
        The file is not UTF-8, or quotes are not closed.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        # Strict, or a quote left open would swallow the rest of the file.
        reader = csv.reader(file, delimiter="\t", strict=True)
        try:
            return [(reader.line_num, cells) for cells in reader if cells]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}"
            ) from error


# ---- What becomes of the pairs --------------------------------------------


def _fates(pairs):
    """Why each pair is left out, or "used", before its audio is looked at."""
    # Other lists may have these recordings too.
    held_out = pairs["wav_path"].isin(pairs["wav_path"][pairs["held_out"]])
    # Two windows of a recording are two examples.
    same = ["wav_path", "caption", "start", "end"]
    same = [column for column in same if column in pairs]
    return np.select(
        [held_out, pairs["caption"] == "", pairs.duplicated(same)],
        ["held_out", "no_caption", "duplicates"],
        "used",
    )


def _probe(wanted):
    """Seconds of the usable audio files, and reasons why others are not."""
    # A bare name is none of a file; it must not be tried as one.
    seconds, failed = probe_audio(p for p in wanted if os.path.isabs(p))
    absent = {path: "missing" for path in wanted if not os.path.isabs(path)}
    return seconds, absent | failed


def _check_audio(seconds, failed, max_bad_audio, skipped_csv):
    """Raise if no audio is left or too much of what is there is unreadable."""
    if not seconds and not failed:
        raise ValueError(
            "No captions are left: all are empty or of held-out test splits"
        )
    bad = {p: r for p, r in failed.items() if r != "missing"}
    present = len(seconds) + len(bad)
    if not present:
        raise ValueError(
            f"All {len(failed)} audio files are missing. Looked for "
            f"{_first(failed)}. Relative paths of a CSV start from its folder; "
            "bare names are looked for in any folder of --data_annot_folder "
            "that is not another data set's, with any of the endings "
            f"{' '.join(AUDIO_SUFFIXES)}. All are listed in {skipped_csv}."
        )
    if not seconds or len(bad) > max_bad_audio * present:
        reasons = [f"{path} ({reason})" for path, reason in bad.items()]
        raise ValueError(
            f"{len(bad)} of {present} audio files cannot be read, more than "
            f"--max_bad_audio={max_bad_audio} allows: {_first(reasons)}. All "
            f"are listed in {skipped_csv}."
        )


def _check_datasets(pairs, skipped_csv):
    """Raise if there is none of the audio that a data set would have."""
    for dataset, fates in pairs.groupby("dataset", sort=False)["fate"]:
        if (fates == "missing").any() and "used" not in fates.values:
            raise ValueError(
                f"All audio of {dataset} is missing or unreadable: see "
                f"{skipped_csv}. Put it beside the annotations, or these "
                "elsewhere to train without them"
            )


def _check_times(pairs, flag, max_bad_audio):
    """Raise if too many pairs start where their audio has ended; warn of few.

    Milliseconds for seconds would else make them all about the last window.
    """
    if "start" not in pairs:
        return
    late = pairs[pairs["start"] >= pairs["duration"]]
    if late.empty:
        return
    said = (
        f"{len(late)} pairs of --{flag} start behind the end of their audio, "
        f"as {late['wav_path'].iloc[0]} at {late['start'].iloc[0]:g} of "
        f"{late['duration'].iloc[0]:g} s"
    )
    if len(late) > max_bad_audio * pairs["start"].notna().sum():
        raise ValueError(
            f"{said}, more than --max_bad_audio={max_bad_audio} allows. Are "
            "the times in seconds?"
        )
    logger.warning("%s: its last window is taken", said)


def _first(names):
    """The first few of many names, to show in a message."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


def _mark_failed(pairs, failed):
    """Set the fate of the pairs whose audio cannot be used."""
    reason = pairs["wav_path"].map(failed)
    used = pairs["fate"] == "used"
    pairs.loc[used & reason.notna(), "fate"] = "unreadable"
    pairs.loc[used & (reason == "missing"), "fate"] = "missing"


def _manifest(pairs):
    """The usable pairs, in the columns of a manifest."""
    used = pairs[pairs["fate"] == "used"].reset_index(drop=True)
    number = used.groupby("dataset").cumcount().astype(str)
    used["ID"] = used["dataset"] + "_" + number
    columns = ["ID", "wav_path", "caption", "dataset", "duration"]
    columns += ["start", "end"]
    return used[[column for column in columns if column in used]]


def _split(pairs, valid_pct, subset_pct, overfit_size, seed):
    """Training and validation pairs that share no recording.

    The recordings are sorted before they are shuffled, so that the split
    depends on nothing but their names and the seed. A smaller subset is part
    of every larger one, and they all have the same validation pairs.
    """
    names = pairs["wav_path"]
    clips = sorted(names.unique())
    random.Random(seed).shuffle(clips)
    wanted = max(round(valid_pct * len(clips)), 1)
    num_valid = min(wanted, len(clips) - 1)
    num_train = max(round(subset_pct * (len(clips) - num_valid)), 1)
    train_clips = clips[num_valid : num_valid + num_train]
    train = pairs[names.isin(train_clips)]
    if overfit_size is not None:
        train = train.sample(frac=1, random_state=seed).head(overfit_size)
        return train, train
    return train, pairs[names.isin(clips[:num_valid])]


def _one_name(paths):
    """Paths, of which those that lead to one recording are all the first."""
    return paths.groupby(_real(paths)).transform("min")


def _real(paths):
    """The files that paths lead to, over whatever links; bare names stay."""
    # Of the many files of a folder, its links are followed once.
    folder_of = functools.cache(os.path.realpath)

    def real(path):
        if not os.path.isabs(path):
            return path
        if os.path.islink(path):
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        return os.path.join(folder_of(folder), name)

    return paths.map({path: real(path) for path in paths.unique()})


def _read_curated(curation_csv, data_curation_folder):
    """All pairs of a curation CSV."""
    logger.info("Reading the pairs of %s", curation_csv)
    pairs = read_pairs(curation_csv, "curation_csv", data_curation_folder)
    pairs["caption"] = [" ".join(c.split()) for c in pairs["caption"]]
    return pairs


def _usable(pairs):
    """The curated pairs that can be used, and what is lost.

    Returns
    -------
    tuple
        The pairs, a dict path -> reason of the audio that cannot be used, and
        counts of it and of the captions that are empty.
    """
    has_caption = pairs["caption"] != ""
    seconds, failed = probe_audio(pairs["wav_path"][has_caption])
    pairs["duration"] = pairs["wav_path"].map(seconds)
    missing = list(failed.values()).count("missing")
    lost = {
        "missing": missing,
        "unreadable": len(failed) - missing,
        "no_caption": int((~has_caption).sum()),
    }
    return pairs[has_caption & pairs["duration"].notna()], failed, lost


def _check_curated(curated, gone, max_bad_audio, skipped_csv):
    """Raise if too much audio of the curated pairs is gone.

    They were made from audio that was there, so that missing counts as bad.
    """
    clips = curated["wav_path"].nunique() + len(gone)
    if len(gone) > max_bad_audio * clips:
        reasons = [f"{path} ({reason})" for path, reason in gone.items()]
        raise ValueError(
            f"{len(gone)} of {clips} audio files of --curation_csv cannot be "
            f"used, more than --max_bad_audio={max_bad_audio} allows: "
            f"{_first(reasons)}. All are listed in {skipped_csv}. Relative "
            "paths start from --data_curation_folder, or else from the CSV's "
            "folder."
        )


def _left_to_train_on(curated, pairs, valid):
    """The curated pairs whose recordings are not kept for other uses.

    Returns
    -------
    tuple
        These pairs, and counts of those whose recordings are validated on, or
        held out with a test split.
    """
    is_valid = pairs["wav_path"].isin(valid["wav_path"])
    which, paths = pd.factorize(curated["wav_path"])
    paths = pd.Series(paths)
    real = _real(paths)
    validated = _are_among(paths, real, pairs[is_valid])[which]
    held_out = _are_among(paths, real, pairs[pairs["held_out"]])[which]
    held_out &= ~validated
    counts = {
        "validated": int(validated.sum()),
        "held_out": int(held_out.sum()),
    }
    kept = curated[~(validated | held_out)]
    if kept.empty:
        raise ValueError(
            "--curation_csv has no pairs to train on: "
            f"{counts['validated']} are of recordings to validate on (a "
            f"smaller --valid_pct leaves more), {counts['held_out']} of a test "
            "split that is held out, and the others have no audio or no caption"
        )
    return kept, counts


def _are_among(paths, real, pairs):
    """Whether files are recordings of these pairs, under whatever name.

    AudioCaps' are AudioSet's, whose files are named by their YouTube ids.

    Arguments
    ---------
    paths, real : pandas.Series
        The files, and where they lead to: see `_real`.
    pairs : pandas.DataFrame

    Returns
    -------
    array of bool
    """
    among = real.isin(_real(pairs["wav_path"]))
    if "youtube_id" in pairs:
        stems = paths.map(lambda path: os.path.basename(path).split(".")[0])
        ids = pairs["youtube_id"].dropna()
        for name in YOUTUBE_NAMES:
            among |= stems.str.extract(name)[0].isin(ids)
    return among.to_numpy()


# ---- Counts ---------------------------------------------------------------


def _count_datasets(pairs):
    """Counts of each data set, in the order found."""
    counts = {}
    for dataset, rows in pairs.groupby("dataset", sort=False):
        fate = rows["fate"]
        counts[dataset] = {
            **_totals(rows[fate == "used"]),
            "missing": rows["wav_path"][fate == "missing"].nunique(),
            "unreadable": rows["wav_path"][fate == "unreadable"].nunique(),
            "no_caption": int((fate == "no_caption").sum()),
            "duplicates": int((fate == "duplicates").sum()),
            "held_out": int((fate == "held_out").sum()),
        }
    return counts


def _totals(pairs):
    """Recordings, captions, and hours of the recordings."""
    clips = pairs.drop_duplicates("wav_path")
    return {
        "clips": len(clips),
        "captions": len(pairs),
        "hours": round(float(clips["duration"].sum()) / 3600, 4),
    }


def _log_counts(counts, skipped_csv):
    """A line for each data set, one for the split, one for lost audio."""
    keys = ("clips", "hours", "captions", "missing", "unreadable")
    keys += ("no_caption", "duplicates", "held_out")
    for dataset, count in counts["datasets"].items():
        logger.info(
            "%s: %d clips (%.2f h), %d captions; %d clips missing, %d "
            "unreadable; %d captions empty, %d duplicate, %d held out",
            dataset,
            *(count[key] for key in keys),
        )
    curated = counts.get("curated")
    totals = [*counts["datasets"].values(), *([curated] if curated else [])]
    missing = sum(count["missing"] for count in totals)
    unreadable = sum(count["unreadable"] for count in totals)
    if missing or unreadable:
        logger.warning(
            "%d audio files are missing and %d unreadable: see %s",
            missing,
            unreadable,
            skipped_csv,
        )
    if curated:
        keys = ("captions", "clips", "hours")
        keys += ("missing", "unreadable", "no_caption")
        logger.info(
            "Curated: %d captions of %d clips (%.2f h); %d clips missing, %d "
            "unreadable; %d captions empty",
            *(curated[key] for key in keys),
        )
        logger.info(
            "Of curated captions, %d are left out since their recordings are "
            "validated on, and %d since these are of a held-out test split",
            curated["validated"],
            curated.get("held_out", 0),  # not counted by earlier versions
        )
    logger.info(
        "Split by recording: %d captions of %d clips (%.2f h) to train on, "
        "%d of %d (%.2f h) to validate",
        *(
            counts[part][key]
            for part in ("train", "valid")
            for key in ("captions", "clips", "hours")
        ),
    )


def main(argv):
    """Write the manifests of a folder of data sets."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.prepare_captions",
        description="List the audio-caption pairs of a folder of data sets.",
    )
    parser.add_argument("data_annot_folder")
    parser.add_argument("save_folder", help="where the lists are written")
    parser.add_argument(
        "--leave_test_splits_out",
        action="store_true",
        help="as training with --official_test_splits=False",
    )
    parser.add_argument(
        "--max_bad_audio",
        type=float,
        default=0.05,
        help="stop when more than this fraction is unreadable",
    )
    args = parser.parse_args(argv)
    prepare_captions(
        args.save_folder,
        args.data_annot_folder,
        official_test_splits=not args.leave_test_splits_out,
        max_bad_audio=args.max_bad_audio,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(sys.argv[1:])
