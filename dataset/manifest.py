"""Manifests: CSV files that pair audio files with captions.

The columns `ID,wav_path,caption` come first and more may follow (`duration`,
`start` and `end` in seconds, `similarity`, `dataset`). They are read as text,
and never through SpeechBrain's CSV reader, which takes every `$word` in a cell
for a variable to substitute.
"""

import contextlib
import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pyarrow as pa
import pyarrow.csv
from tqdm import tqdm

from dataset.audio import AudioError, probe_seconds

_BLOCK_BYTES = 2**24  # a row must be shorter


@contextlib.contextmanager
def written_whole(path):
    """A binary file that appears at its path only when it is complete.

    Raises
    ------
    OSError
        It cannot be written, for instance since the disk is full; what was at
        the path before is there still, and nothing else is left.
    """
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        if isinstance(error, OSError) and error.filename in (None, partial):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


def write_csv(frame, path):
    """Write a table whole or not at all: beside its place, then renamed."""
    with written_whole(path) as file:
        write_cells(frame, file)


def write_cells(frame, file):
    """Write a table as CSV into an open binary file."""
    texts = frame.select_dtypes(["object", "str"]).astype(str)
    # pandas leaves cells with a lone \r bare, where readers end the line.
    returns = any(
        texts[name].str.contains("\r", regex=False).any() for name in texts
    )
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    frame.to_csv(file, index=False, quoting=quoting)


def write_json(content, path):
    """Write a JSON file whole or not at all, as `write_csv`."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    with written_whole(path) as file:
        file.write(text.encode())


def read_table(path, columns=()):
    """Read a CSV file with a header, every cell as text.

    Arguments
    ---------
    path : str
        UTF-8, with or without a byte order mark.
    columns : sequence of str
        Those that must be there.

    Returns
    -------
    pandas.DataFrame
        Empty cells as empty texts.

    Raises
    ------
    ValueError
        It cannot be read, has a row of another number of cells (a comma
        without quotes), or lacks a column; the message begins with the path
        and names the row.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
        table = pa.csv.read_csv(
            path,
            # In several threads its errors do not name the row.
            pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            pa.csv.ParseOptions(newlines_in_values=True),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string())
            ),
        )
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    lacking = [column for column in columns if column not in names]
    if lacking:
        raise ValueError(
            f"{path} lacks the column(s) {', '.join(lacking)}; its header is "
            f"{','.join(names)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has two columns of one name: {names}")
    return table.to_pandas()


def read_lines(path):
    """Lines of a UTF-8 text file that are not blank.

    Raises
    ------
    ValueError
        It cannot be read; the message begins with the path.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_pairs(path, flag, audio_folder=None):
    """Read a CSV of audio-caption pairs.

    Arguments
    ---------
    path : str
        CSV with a header; `wav_path` and `caption` are needed, `ID`, `start`,
        `end` and others may be there.
    flag : str
        The flag that named the file, for errors.
    audio_folder : str
        Where relative audio paths start; by default in the CSV's folder.

    Returns
    -------
    pandas.DataFrame
        `ID`, `wav_path` (absolute) and `caption` first; `start` and `end`, if
        there, as float seconds (NaN where empty); every other cell as text.

    Raises
    ------
    ValueError
        The file cannot be read, has no rows, lacks a column, or has an empty
        path or a time that is no number; the message names the first row.
    """
    try:
        frame = read_table(path, ["wav_path", "caption"])
    except ValueError as error:
        raise ValueError(f"--{flag}={error}") from error
    if frame.empty:
        raise ValueError(f"--{flag}={path} has no rows")
    empty = frame.index[frame["wav_path"].str.strip() == ""]
    if len(empty):
        # Row 1 is the header, as a spreadsheet counts.
        raise ValueError(f"--{flag}={path}: row {empty[0] + 2} has no wav_path")
    for name in frame.columns.intersection(["start", "end"]):
        seconds = pd.to_numeric(frame[name], errors="coerce")
        wrong = frame.index[seconds.isna() & (frame[name].str.strip() != "")]
        if len(wrong):
            raise ValueError(
                f"--{flag}={path}: row {wrong[0] + 2} has the {name} "
                f"'{frame[name][wrong[0]]}', which is no number of seconds"
            )
        frame[name] = seconds
    if "ID" not in frame:
        frame["ID"] = [str(i) for i in range(len(frame))]
    folder = os.path.abspath(audio_folder or os.path.dirname(path) or ".")
    # One spelling of a path, or one recording could count as two.
    frame["wav_path"] = [
        os.path.normpath(os.path.join(folder, p)) for p in frame["wav_path"]
    ]
    first = ["ID", "wav_path", "caption"]
    return frame[first + [c for c in frame.columns if c not in first]]


def probe_audio(paths, threads=16):
    """Look into the header of every audio file.

    Arguments
    ---------
    paths : iterable of str
        Audio files; each distinct one is opened once.
    threads : int
        Files opened at a time (headers wait for the disk, not the processor).

    Returns
    -------
    tuple
        A dict path -> seconds of the usable files, and a dict path -> reason
        of the others ("missing", or why it cannot be read).
    """

    def probe(path):
        if not os.path.exists(path):
            return "missing"
        try:
            return probe_seconds(path)
        except AudioError as error:
            return str(error)

    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(threads) as pool:
        results = list(
            tqdm(
                pool.map(probe, paths),
                total=len(paths),
                desc="audio headers",
                unit="file",
                disable=len(paths) < 1000,
            )
        )
    seconds = {p: r for p, r in zip(paths, results) if isinstance(r, float)}
    failed = {p: r for p, r in zip(paths, results) if isinstance(r, str)}
    return seconds, failed
