"""How files are written, whole or not at all, and tables and lists are read."""

import contextlib
import csv
import fcntl
import functools
import io
import json
import os
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

_BLOCK_BYTES = 2**24  # a row must be shorter
_PIECE_ROWS = 2**16
_TAIL_BYTES = 2**12  # with all empty lines that a file may end with
# Python's own limit is 2**17, also for a cell.
csv.field_size_limit(_BLOCK_BYTES)
_held_locks = set()


@contextlib.contextmanager
def written_whole(path):
    """A binary file that appears at its path only when it is complete.

    Raises
    ------
    OSError
        It cannot be written, for instance since the disk is full; what was at
        the path before is there still, and nothing else is left. Or another
        process is writing it, which is left alone.
    """
    partial, descriptor = f"{path}.partial", None
    try:
        descriptor = _locked(partial)
        # Closed before it is renamed, but locked until it has been.
        with open(partial, "wb", opener=lambda *_: os.dup(descriptor)) as file:
            file.truncate()
            yield file
        os.replace(partial, path)
    except BaseException as error:
        if descriptor is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
        is_own = isinstance(error, OSError) and error.__cause__ is None
        if is_own and error.filename in (None, partial):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise
    finally:
        if descriptor is not None:
            _unlock(descriptor)


@contextlib.contextmanager
def alone(path):
    """A file that is there while a process does what only one may do at once.

    Raises
    ------
    OSError
        Another process does it; the message begins with the path.
    """
    try:
        descriptor = _locked(path)
    except OSError as error:
        raise OSError(f"{path}: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        _unlock(descriptor)


def is_taken(path):
    """Whether another process is `alone` with a path."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # there is no such file, or there are no locks
    return False


def _locked(path):
    """Descriptor of a file, made if absent, that no other process writes."""
    descriptor = _with_lock(path)
    _held_locks.add(descriptor)
    return descriptor


def _unlock(descriptor):
    if descriptor in _held_locks:
        _held_locks.remove(descriptor)
        os.close(descriptor)


def _leave_locks():
    """In a forked process: the locks are its parent's, and end with that.

    A loader's process notices only after seconds that its parent was killed.
    """
    for descriptor in list(_held_locks):
        _unlock(descriptor)


os.register_at_fork(after_in_child=_leave_locks)


def _with_lock(path):
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OSError(
                "another process is writing it; wait for that, or have this "
                "one write elsewhere"
            ) from None
        except OSError:
            return descriptor  # on a disk without locks
        # The other process may just have put it in its place.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)


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
        without quotes) or a quote left open, or lacks a column; the message
        begins with the path and names the row.
    """
    return pa.Table.from_batches(_batches(path, columns)).to_pandas()


def read_pieces(path, columns=()):
    """Read a CSV file as `read_table`, without ever holding all of it.

    Arguments
    ---------
    path : str
    columns : sequence of str
        As there.

    Yields
    ------
    pandas.DataFrame
        The next rows, at most 65,536; of the first piece, none.

    Raises
    ------
    ValueError
        As there, at the latest when the row is reached.
    """
    for batch in _batches(path, columns):
        for begin in range(0, max(len(batch), 1), _PIECE_ROWS):
            yield batch.slice(begin, _PIECE_ROWS).to_pandas()


class _Blocks(io.FileIO):
    """A file to read in blocks that do not part a \\r from a \\n behind it.

    pyarrow would lose the \\n, within quotes too.
    """

    def read(self, size=-1):
        """The next bytes, `size` or one less."""
        block = super().read(size)
        if len(block) > 1 and block.endswith(b"\r"):
            self.seek(-1, os.SEEK_CUR)
            return block[:-1]
        return block


def _batches(path, columns):
    """Rows of a CSV file as `pyarrow.RecordBatch`, the first without any."""
    try:
        with open(path, "rb") as file:
            pieces = iter(functools.partial(file.read, _BLOCK_BYTES), b"")
            has_quotes = any(b'"' in piece for piece in pieces)
        with open(path, encoding="utf-8-sig", newline="") as file:
            names, above = _checked_header(file, columns, has_quotes)
        # Opened here: pyarrow takes a "~" in a path for the home folder.
        with _Blocks(path) as file:
            # With one column, such a line is a row: its cell is empty. But not
            # at the end.
            below = _empty_lines_below(file) if len(names) == 1 else 0
            file.seek(0)
            reader = pa.csv.open_csv(
                file,
                # In several threads its errors do not name the row.
                pa.csv.ReadOptions(
                    use_threads=False, block_size=_BLOCK_BYTES, skip_rows=above
                ),
                pa.csv.ParseOptions(
                    newlines_in_values=True,
                    ignore_empty_lines=len(names) > 1,
                ),
                pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string())
                ),
            )
            held = reader.schema.empty_table()
            yield pa.RecordBatch.from_pylist([], reader.schema)
            for batch in reader:
                held = pa.concat_tables([held, pa.Table.from_batches([batch])])
                whole = max(len(held) - below, 0)
                yield from held.slice(0, whole).to_batches()
                held = held.slice(whole)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {_said(error)}") from error


def _said(error):
    """An error of reading a text, and what to do."""
    text = str(error)
    if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in text:
        return f"{text}; save it as UTF-8"
    counts = re.search(r"Expected (\d+) columns, got (\d+)", text)
    if counts and int(counts[2]) > int(counts[1]):
        return f"{text}; put cells that hold commas in quotes"
    return text


def _empty_lines_below(file):
    """How many empty lines a binary file ends with."""
    file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
    tail = file.read()
    ends = tail[len(tail.rstrip(b"\r\n")) :]
    return max(ends.count(b"\n") - 1, 0)


def _checked_header(file, columns, has_quotes):
    """Names of an open CSV file's columns, and the empty lines above them.

    Its quotes are all closed: pyarrow takes one that is left open for a cell
    that ends with the file, and so for all rows behind it. Columns come first:
    where another mark separates them, rows are wrong in many ways.
    """
    names, row, above = [], 1, 0
    try:
        for cells in csv.reader(file, strict=True):
            if cells and not names:
                names, above = cells, row - 1
                _check_columns(names, columns)
            row += 1
            if names and not has_quotes:
                break
    except csv.Error as error:
        raise ValueError(
            f"Row #{row}: {error}; is a quote left open?"
        ) from error
    if not names:
        raise ValueError("Empty CSV file")
    return names, above


def _check_columns(names, columns):
    """Raise if a column is not there, or two are of one name."""
    lacking = [column for column in columns if column not in names]
    if lacking:
        remedy = ""
        if set(lacking) & {name.strip() for name in names}:
            remedy = "; delete the blanks around names"
        if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
            remedy = "; separate columns by commas"
        raise ValueError(
            f"it lacks the column(s) {', '.join(lacking)}; its header is "
            f"{','.join(names)}{remedy}"
        )
    if len(set(names)) < len(names):
        remedy = "; delete those without a name" if "" in names else ""
        raise ValueError(f"it has two columns of one name: {names}{remedy}")


def check_paths(table, source, first_row=2):
    """Raise ValueError if a row of a table has no `wav_path`.

    Arguments
    ---------
    table : pandas.DataFrame
        As `read_table` returns it, or a piece of `read_pieces`.
    source : str
        What the message begins with.
    first_row : int
        Number of its first row; 1 is the header, as a spreadsheet counts where
        no lines are empty.
    """
    paths = table["wav_path"]
    empty = np.flatnonzero((paths == "") | paths.str.isspace())
    if len(empty):
        raise ValueError(
            f"{source}: row {first_row + empty[0]} has no wav_path"
        )


def take_times(table, source, first_row=2):
    """Make seconds of the texts of `start` and `end`, where these are there.

    Arguments
    ---------
    table : pandas.DataFrame
        Changed in place: NaN where the text is empty.
    source, first_row
        As `check_paths` takes them.

    Raises
    ------
    ValueError
        One is no number of seconds from 0 on.
    """
    for name in table.columns.intersection(["start", "end"]):
        # Few windows begin or end at a time of their own.
        which, texts = pd.factorize(table[name])
        seconds = pd.to_numeric(texts, errors="coerce").to_numpy(float)
        is_time = (seconds >= 0) & (seconds < np.inf)
        wrong = np.flatnonzero(~is_time & (texts.str.strip() != ""))
        if len(wrong):
            row = first_row + np.argmax(which == wrong[0])
            raise ValueError(
                f"{source}: row {row} has the {name} '{texts[wrong[0]]}', "
                "which is no number of seconds from 0 on"
            )
        table[name] = seconds[which]


def path_in(folder, path):
    """A path that starts in a folder, unless it is absolute, in one spelling.

    Arguments
    ---------
    folder : str
        Absolute.
    path : str

    Returns
    -------
    str
        Where it has `..` behind a link to a folder, that is the folder above
        the one the link leads to, as for the system.
    """
    path = os.path.join(folder, path)
    if ".." not in path.split(os.sep):
        return os.path.normpath(path)
    above, name = os.path.split(path)
    return os.path.join(_in_one_spelling(above), name)


@functools.lru_cache(maxsize=2**16)
def _in_one_spelling(folder):
    plain, real = os.path.normpath(folder), os.path.realpath(folder)
    return plain if os.path.realpath(plain) == real else real


def read_lines(path):
    """Lines of a UTF-8 text file that are not blank.

    Yields
    ------
    str

    Raises
    ------
    ValueError
        It cannot be read; the message begins with the path.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    yield line.rstrip("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {_said(error)}") from error
