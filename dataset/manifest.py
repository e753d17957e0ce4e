"""Manifests: CSV files that pair audio files with captions.

The columns `ID,wav_path,caption` come first and more may follow (`duration`,
`start` and `end` in seconds, `similarity`, `dataset`). They are read as text,
and never through SpeechBrain's CSV reader, which takes every `$word` in a cell
for a variable to substitute.
"""

import math
import os
from multiprocessing.pool import ThreadPool

import pandas as pd
from tqdm import tqdm

from dataset.audio import MISSING, AudioError, probe_seconds
from files import check_paths, path_in, read_table, take_times

# Headers wait for the disk, not the processor.
_THREADS = 16
# Of a task: to give one to a thread takes longer than a header from memory.
_FILES = 8


def read_pairs(path, flag=None, audio_folder=None):
    """Read a CSV of audio-caption pairs.

    Arguments
    ---------
    path : str
        CSV with a header; `wav_path` and `caption` are needed, `ID`, `start`,
        `end` and others may be there.
    flag : str
        The flag that named the file, if one did, for errors.
    audio_folder : str
        Where relative audio paths start; by default in the CSV's folder.

    Returns
    -------
    pandas.DataFrame
        `ID`, `wav_path` (absolute) and `caption` first; `start` and `end`, if
        there, as float seconds (NaN where empty, but `start` 0 where there is
        only `end`); every other cell as text.

    Raises
    ------
    ValueError
        The file cannot be read, has no rows, lacks a column, or has an empty
        path, a time that is no number or negative, or an end before its start;
        the message names the first row.
    """
    given = f"--{flag}=" if flag else ""
    try:
        frame = read_table(path, ["wav_path", "caption"])
    except ValueError as error:
        raise ValueError(f"{given}{error}") from error
    if frame.empty:
        raise ValueError(f"{given}{path} has no rows")
    check_paths(frame, f"{given}{path}")
    take_times(frame, f"{given}{path}")
    _check_ends(frame, f"{given}{path}")
    if "ID" not in frame:
        frame["ID"] = [str(i) for i in range(len(frame))]
    folder = os.path.abspath(audio_folder or os.path.dirname(path) or ".")
    # One spelling of a path, or one recording could count as two.
    which, paths = pd.factorize(frame["wav_path"])
    paths = [path_in(folder, path) for path in paths]
    frame["wav_path"] = pd.Series(paths, dtype="str").take(which).array
    first = ["ID", "wav_path", "caption"]
    return frame[first + [c for c in frame.columns if c not in first]]


def _check_ends(frame, source):
    """Have a `start` where there is an `end`, which must not be before it."""
    if "end" not in frame:
        return
    if "start" not in frame:
        frame["start"] = math.nan
    frame.loc[frame["start"].isna() & frame["end"].notna(), "start"] = 0.0
    wrong = frame.index[frame["end"] < frame["start"]]
    if len(wrong):
        start, end = frame.loc[wrong[0], ["start", "end"]]
        raise ValueError(
            f"{source}: row {wrong[0] + 2} has the end {end}, before its "
            f"start {start}"
        )


def probe_audio(paths, hides_bar=False):
    """Look into the header of every audio file.

    Arguments
    ---------
    paths : iterable of str
        Audio files; each distinct one is opened once.
    hides_bar : bool
        Whether to show no progress; of few files there is none.

    Returns
    -------
    tuple
        A dict path -> seconds of the usable files, and a dict path -> reason
        of the others ("missing", or why it cannot be read).
    """

    def probe(path):
        try:
            return probe_seconds(path)
        except AudioError as error:
            return "missing" if str(error) == MISSING else str(error)

    paths = list(dict.fromkeys(paths))
    results = of_headers(probe, paths, hides_bar or len(paths) < 1000)
    seconds = {p: r for p, r in zip(paths, results) if isinstance(r, float)}
    failed = {p: r for p, r in zip(paths, results) if isinstance(r, str)}
    return seconds, failed


def of_headers(look, paths, hides_bar):
    """What a function finds in the header of every file.

    Arguments
    ---------
    look : callable
        Path -> anything; runs in threads.
    paths : list of str
        Audio files.
    hides_bar : bool
        Whether to show no progress.

    Returns
    -------
    list
        In the order of the paths.
    """
    with ThreadPool(_THREADS) as pool:
        found = pool.imap(look, paths, chunksize=_FILES)
        bar = tqdm(
            found,
            total=len(paths),
            desc="audio headers",
            unit="file",
            disable=hides_bar,
        )
        results = list(bar)
        # Threads that still end would be in the way of a fork.
        pool.close()
        pool.join()
    return results
