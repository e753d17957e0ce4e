"""Embedding stores: an .npy array, its manifest row for row, and a record.

A store of the stem `audio_audioset` in a folder is

    audio_audioset_embeddings.npy    (rows, d) float16, unit-norm
    audio_audioset.csv               one line for each row
    audio_audioset.json              what it was made with

Stores of other programs, without the record, can be read too.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import shutil
import tempfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from tqdm import tqdm

from files import (
    alone,
    check_paths,
    path_in,
    read_lines,
    read_pieces,
    read_table,
    take_times,
    write_cells,
    write_json,
    written_whole,
)

logger = logging.getLogger(__name__)

# What becomes of an item: not embedded yet, embedded, or left out, since it
# could not be read or since its embedding is not finite.
WAITING, DONE, SKIPPED, NOT_FINITE = 0, 1, 2, 3
_COPY_ROWS = 65536
_ROWS_AT_ONCE = 2**14  # of a manifest
# Captions that a CPU encodes at once; a GPU has many small products to start
# for a batch, whatever its size.
_CPU_CAPTIONS = 64
# What embeddings may depend on besides the settings: on record, not compared.
_PACKAGES = ("torch", "torchaudio", "speechbrain", "transformers", "numpy")


class Embeddings:
    """A store to read from; rows stay on disk until asked for.

    Arguments
    ---------
    vectors : numpy.ndarray
        (rows, d) float16 or float32, as a rule memory-mapped.
    manifest : Manifest
        (rows,), what each row is the embedding of.
    info : dict or None
        The record; None for a store of another program, whose rows are
        normalised where they are not unit-norm.
    path : str
        The .npy file, for messages.
    file : file
        The same, open: another store may take its place meanwhile.
    """

    def __init__(self, vectors, manifest, info, path, file=None):
        self.vectors = vectors
        self.manifest = manifest
        self.info = info
        self.path = path
        self.file = file

    def __len__(self):
        """Number of rows."""
        return len(self.vectors)

    def __getitem__(self, rows):
        """A slice of rows, (rows, d) float16 or float32.

        Raises
        ------
        ValueError
            A row of a store of another program is not finite. It is named.
        """
        # Mapped anew each time, or all pages that were read would count as
        # memory of the process until it ends. "c" never writes to the file,
        # but PyTorch warns of arrays that cannot be written to.
        whole = self.vectors
        if self.file is not None and len(whole):
            order = "C" if whole.flags.c_contiguous else "F"
            whole = np.memmap(
                self.file, whole.dtype, "c", whole.offset, whole.shape, order
            )
        block = whole[rows]
        if self.info is None:
            # Norms of another order would be rounded by the size of the block.
            block = np.ascontiguousarray(block, dtype=np.float32)
            norms = np.linalg.norm(block, axis=1, keepdims=True)
            wrong = np.flatnonzero(~np.isfinite(norms))
            if len(wrong):
                row = range(len(self))[rows][wrong[0]]
                raise ValueError(
                    f"{self.path}: row {row} (from 0) is not finite, or too "
                    "large to have a norm: embed it again, or remove it and "
                    "its line of the manifest"
                )
            foreign = np.abs(norms - 1) > 1e-3
            block = np.where(foreign, block / np.maximum(norms, 1e-12), block)
        return block


class Manifest:
    """A table that is on disk but for the rows that are asked for.

    Of 10^8 clips it would not fit into memory.

    Arguments
    ---------
    pieces : iterable of pandas.DataFrame
        Consecutive rows, of the same columns; one at least.
    folder : str
        Where to keep them, in a file without a name: it goes when the process
        does.

    Raises
    ------
    OSError
        The disk is full, or the folder may not be written to.
    """

    def __init__(self, pieces, folder):
        pieces = iter(pieces)
        first = pa.Table.from_pandas(next(pieces), preserve_index=False)
        self.schema, self.ends = first.schema, []
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        sink = pa.PythonFile(self.file, mode="w")
        with pa.ipc.new_file(sink, self.schema) as out:
            tables = (pa.Table.from_pandas(p, self.schema) for p in pieces)
            for table in itertools.chain([first], tables):
                for batch in table.to_batches(_ROWS_AT_ONCE):
                    out.write_batch(batch)
                    self.ends.append(len(self) + len(batch))
        self.batches = pa.ipc.open_file(pa.PythonFile(self.file, mode="r"))

    def __len__(self):
        """Number of rows."""
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, name):
        """A whole column, as pandas.Series."""
        parts = [batch[name] for batch in self._in_turn()]
        whole = pa.chunked_array(parts, self.schema.field(name).type)
        return whole.combine_chunks().to_pandas().rename(name)

    def __iter__(self):
        """Go through the rows, many at a time, as pandas.DataFrame."""
        return (batch.to_pandas() for batch in self._in_turn())

    def _in_turn(self):
        return map(self.batches.get_batch, range(len(self.ends)))

    def take(self, rows):
        """Some rows.

        Arguments
        ---------
        rows : array of int
            Ascending.

        Returns
        -------
        pyarrow.Table
        """
        found = []
        for i in np.unique(np.searchsorted(self.ends, rows, "right")):
            batch = self.batches.get_batch(i)
            begin = self.ends[i] - len(batch)
            inside = rows[slice(*np.searchsorted(rows, (begin, self.ends[i])))]
            found.append(batch.take(pa.array(inside - begin)))
        return pa.Table.from_batches(found, self.schema)


def open_embeddings(emb_dir, stem, column, manifest_path=None):
    """Open a store and check that its parts belong together.

    Arguments
    ---------
    emb_dir : str
        Folder of the store.
    stem : str
        Its name: "audio_audioset", "text_insper", "esc_insper_t2t".
    column : str
        What its rows are embeddings of, "wav_path" or "caption", which the
        manifest must have.
    manifest_path : str
        The manifest, if it is not `<stem>.csv`, `<stem>_ds.csv` or
        `<stem>_files.txt` in that folder.

    Returns
    -------
    Embeddings

    Raises
    ------
    FileNotFoundError
        The array or its manifest is absent.
    OSError
        The folder cannot hold a copy of the manifest for the time.
    ValueError
        The manifest lacks the column, or the parts disagree: another number
        of rows, or a manifest that was edited after embedding.
    """
    path = os.path.join(emb_dir, f"{stem}_embeddings.npy")
    if not os.path.exists(path):
        advice = "give the save folder of a finished embedding run as --emb_dir"
        if stem.endswith("_t2t"):
            advice = (
                "run retrieve_ds_t2t.py with the same --emb_dir first, or give "
                "the name of what it wrote there, <dataset>_insper_t2t, as "
                "--text_stem"
            )
        raise FileNotFoundError(f"{path} does not exist: {advice}")
    file = open(path, "rb")  # noqa: SIM115
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npy file: {error}") from error
    if vectors.ndim != 2 or vectors.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}; "
            "embeddings are (rows, d) float16 or float32"
        )
    if manifest_path is None:
        names = (f"{stem}.csv", f"{stem}_ds.csv", f"{stem}_files.txt")
        paths = [os.path.join(emb_dir, name) for name in names]
        manifest_path = next(filter(os.path.exists, paths), None)
    if manifest_path is None:
        raise FileNotFoundError(f"{path} has no manifest {' or '.join(names)}")
    manifest, digest = _kept_manifest(manifest_path, column, emb_dir)
    own = os.path.join(emb_dir, f"{stem}.csv")
    lacks_times = column == "wav_path" and "start" not in manifest.schema.names
    if lacks_times and os.path.exists(own):
        # A list of the same files, perhaps.
        whole, digest_of_whole = _kept_manifest(own, column, emb_dir)
        if _paths_hash(whole) == _paths_hash(manifest):
            manifest, digest = whole, digest_of_whole
    if len(manifest) != len(vectors):
        raise ValueError(
            f"{manifest_path} has {len(manifest)} rows and {path} "
            f"{len(vectors)}: they are not of one run"
        )
    info, record = None, os.path.join(emb_dir, f"{stem}.json")
    if os.path.exists(record):
        info = read_record(record, ("settings", "manifest"))
        if info["manifest"] != digest:
            problem = "was changed after its embeddings were made: restore it"
            if lacks_times and not os.path.exists(own):
                problem = f"has no times, and {own} is missing: restore that"
            raise ValueError(f"{manifest_path} {problem}, or embed again")
    else:
        logger.warning("%s has no record: of unknown weights", path)
    return Embeddings(vectors, manifest, info, path, file)


def _kept_manifest(path, column, folder):
    """A manifest and its hash; the paths are absolute from here on."""
    digest = hashlib.sha256()
    # What is made of these may lie in another folder.
    base = os.path.dirname(os.path.abspath(path))

    def pieces():
        for piece in _read_manifest(path, column):
            _hash_rows(digest, piece, column)
            if column == "wav_path":
                is_relative = ~piece[column].str.startswith("/")
                if is_relative.any():
                    piece.loc[is_relative, column] = [
                        path_in(base, p) for p in piece.loc[is_relative, column]
                    ]
            yield piece

    try:
        manifest = Manifest(pieces(), folder)
    except OSError as error:
        raise OSError(
            f"{folder} cannot hold a copy of {path} for the time: {error}"
        ) from error
    return manifest, digest.hexdigest()


def _paths_hash(manifest):
    digest = hashlib.sha256()
    for piece in manifest:
        _hash_texts(digest, piece["wav_path"])
    return digest.hexdigest()


def _read_manifest(path, column):
    """A manifest with every cell as text, `start` and `end` as seconds.

    Yields
    ------
    pandas.DataFrame
        Piece by piece.

    Raises
    ------
    ValueError
        It cannot be read, lacks the column, or has an empty path or a time
        that is no number.
    """
    if not path.endswith(".txt"):
        pieces = read_pieces(path, [column])
    elif column == "wav_path":
        pieces = _listed(path)
    else:
        raise ValueError(f"{path} lists files: give a CSV with a {column}")
    row = 2  # row 1 is the header, as a spreadsheet counts
    for piece in pieces:
        if column == "wav_path":
            check_paths(piece, path, row)
        take_times(piece, path, row)
        yield piece
        row += len(piece)


def _listed(path):
    """Files of a list, many at a time; of the first piece, none."""
    lines, some = read_lines(path), []
    while True:
        yield pd.DataFrame({"wav_path": some}, dtype="str")
        some = list(itertools.islice(lines, _ROWS_AT_ONCE))
        if not some:
            return


def read_record(path, keys):
    """A store's record, or that of one in the making.

    Arguments
    ---------
    path : str
        JSON file.
    keys : sequence of str
        What it must hold.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        It is no such file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        for key in keys:
            record[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "have them taken as those of another program, or embed again"
        if path.endswith(".partial.json"):
            advice = "embed from the start"
        raise ValueError(
            f"{path} is no record of embeddings ({error!r}): delete it to "
            f"{advice}"
        ) from error
    return record


def check_same_weights(audio, text):
    """Raise if two stores were made with different weights.

    Arguments
    ---------
    audio, text : Embeddings

    Raises
    ------
    ValueError
        They were, or their embeddings differ in size.
    """
    if audio.vectors.shape[1] != text.vectors.shape[1]:
        raise ValueError(
            f"{audio.path} has {audio.vectors.shape[1]} values a row and "
            f"{text.path} {text.vectors.shape[1]}: not of one model"
        )
    if audio.info is None or text.info is None:
        return
    weights = (
        audio.info["settings"]["weights"],
        text.info["settings"]["weights"],
    )
    if weights[0] != weights[1]:
        raise ValueError(
            f"{audio.path} and {text.path} were made with different weights "
            f"({weights[0][:12]} and {weights[1][:12]}): embed one of them "
            "again"
        )


def text_hash(texts):
    """Hash of a list of texts and their order.

    Arguments
    ---------
    texts : list of str or pyarrow.LargeStringArray

    Returns
    -------
    str
        SHA-256, hexadecimal, of the texts in UTF-8, each behind its number of
        bytes and a colon.
    """
    digest = hashlib.sha256()
    _hash_texts(digest, texts)
    return digest.hexdigest()


def _hash_texts(digest, texts):
    texts = pa.array(texts, pa.large_string())
    colon = pa.scalar(":", texts.type)
    for begin in range(0, len(texts), _ROWS_AT_ONCE):
        some = texts.slice(begin, _ROWS_AT_ONCE)
        sizes = pc.binary_length(some).cast(some.type)
        marked = pc.binary_join_element_wise(sizes, some, colon)
        digest.update(marked.buffers()[2])  # all of them, without a gap


def manifest_hash(pieces, column):
    """Hash of what the rows are embeddings of: captions, or paths and times.

    Arguments
    ---------
    pieces : iterable of pandas.DataFrame
        The manifest; pieces of any size have the same hash.
    column : str
        "caption" or "wav_path".

    Returns
    -------
    str
        As `text_hash`.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        _hash_rows(digest, piece, column)
    return digest.hexdigest()


def _hash_rows(digest, table, column):
    texts = pa.array(table[column].tolist(), pa.large_string())
    if column == "wav_path":
        newline = pa.scalar("\n", texts.type)
        for name in ("start", "end"):
            seconds = table.reindex(columns=[name])[name]
            # Few windows begin or end at a time of their own.
            times, which = np.unique(seconds, return_inverse=True)
            times = pa.array([repr(t) for t in times.tolist()], texts.type)
            times = times.take(pa.array(which))
            texts = pc.binary_join_element_wise(texts, times, newline)
    _hash_texts(digest, texts)


class EmbeddingWriter:
    """A store in the making, which a killed run leaves fit to go on with.

    The vectors of all items are written in place, into a memory-mapped array
    whose rows are the items; a byte for each tells whether that is done.
    Several processes may write, each its own items. Nothing is written before
    `work` is called.

    Arguments
    ---------
    folder, stem, column : str
        Where the store goes, its name, and what its rows are embeddings of, as
        in `open_embeddings`.
    num_items : int
        Number of rows before anything is left out.
    size : int
        Values a vector.
    settings : dict
        All that the vectors depend on but for rounding; plain values.
    replaces : bool
        Whether a store of other settings gives way to this one.
    growing : dict
        Further settings, of a store in the making alone.
    reserved : int
        Bytes of the disk that another store will need after this one.

    Raises
    ------
    OSError
        The disk has not enough space.
    ValueError
        The folder holds this store, or part of it, of other settings; the
        message names those that differ. Or a file of a store in the making is
        not whole.
    """

    def __init__(
        self,
        folder,
        stem,
        column,
        num_items,
        size,
        settings,
        replaces=False,
        growing=None,
        reserved=0,
    ):
        self.base = os.path.join(folder, stem)
        self.settings = {**settings, "size": size}
        self.growing = self.settings | (growing or {})
        self.replaces = replaces
        self.files = {
            f"{self.base}.partial.rows.npy": (np.float16, (num_items, size)),
            f"{self.base}.partial.fate.npy": (np.uint8, (num_items,)),
            f"{self.base}.partial.at.npy": (np.float64, (num_items,)),
        }
        self.needed, self.flaw, self.begun = 0, None, False
        self.lock = contextlib.ExitStack()
        self.lock_path = f"{self.base}.partial.lock"
        self.finished = self._check(f"{self.base}.json", self.settings)
        if os.path.exists(f"{self.base}_embeddings.npy") and not (
            self.finished or os.path.exists(f"{self.base}.json")
        ):
            self.flaw = "it has no record"
        if self.finished:
            try:
                open_embeddings(folder, stem, column)
            except (FileNotFoundError, ValueError) as error:
                self.finished, self.flaw = False, error
        if self.finished:
            if if_main_process():
                # Of a process that was killed while it tidied up, or began.
                with contextlib.suppress(OSError), alone(self.lock_path):
                    self.remove_partial()
            return
        record = f"{self.base}.partial.json"
        self.begun = self._check(record, self.growing)
        if self.begun:
            for path, (_, shape) in self.files.items():
                _check_whole(path, shape, record)
        elif if_main_process():
            # Twice: these rows, and those of the finished store.
            rows = 2 * num_items * size
            self.needed = 2 * rows
            os.makedirs(folder, exist_ok=True)
            _check_space(folder, max(self.needed, rows + reserved))

    def _check(self, path, settings):
        """Whether a record is there, of the same settings."""
        if not os.path.exists(path):
            return False
        found = read_record(path, ("settings",))["settings"]
        different = {
            key: f"{key} ({_short(found.get(key))} there, "
            f"{_short(settings.get(key))} now)"
            for key in sorted(found.keys() | settings.keys())
            if found.get(key) != settings.get(key)
        }
        listed = ", ".join(different.values())
        if different and self.replaces:
            logger.info("%s is replaced: %s", path, listed)
            return False
        if different:
            advice = "Use"
            if "weights" in different:
                advice = (
                    "Name the same weights, with the same --ssl_checkpointer, "
                    "use"
                )
            if list(different) == ["windows"]:
                advice = (
                    "Audio files appeared, vanished or changed since: have "
                    "them as they were, use"
                )
            raise ValueError(
                f"{path} is of other embeddings: {listed}. {advice} another "
                "output folder, or delete this one"
            )
        return True

    def _begin(self):
        """Open what the store grows from; the main process makes it."""
        if self.flaw:
            logger.warning(
                "%s is embedded again: %s",
                self.base,
                self.flaw,
            )
        record = f"{self.base}.partial.json"
        if if_main_process():
            self.lock.enter_context(alone(self.lock_path))
        if not self.begun and if_main_process():
            with contextlib.suppress(FileNotFoundError):
                os.remove(record)
            for path, (dtype, shape) in self.files.items():
                np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
                _take_space(path)
            write_json({"settings": self.growing}, record)
        ddp_barrier()
        self.rows, self.fate, self.at = (np.load(p, "r+") for p in self.files)

    def work(self, batches, unit, noprogressbar=False):
        """What this process has to do, and a progress bar for it.

        Arguments
        ---------
        batches : list of list of int
            All items. Which of them share a batch must depend neither on what
            is done already nor on the number of processes: the rounding can
            depend on it.
        unit : str
            What an item is, for the bar.
        noprogressbar : bool
            Whether to show none.

        Returns
        -------
        tuple
            Batches of items that are still to do, and a tqdm bar over the items
            of this process.

        Raises
        ------
        OSError
            Another run writes this store, or the disk has no place for it.
        """
        self._begin()
        if torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
            batches = batches[rank :: torch.distributed.get_world_size()]
        pending = [b for b in batches if (self.fate[b] == WAITING).any()]
        total, left = (sum(map(len, b)) for b in (batches, pending))
        bar = tqdm(
            total=total,
            initial=total - left,
            unit=unit,
            disable=noprogressbar or not if_main_process(),
            dynamic_ncols=True,
        )
        return pending, bar

    def write(self, items, vectors, starts=0.0):
        """Keep the vectors of some items; one that is not finite is left out.

        Arguments
        ---------
        items : list of int
            Rows.
        vectors : torch.Tensor
            (items, size), unit-norm, on the CPU.
        starts : list of float
            Where the windows begin, in seconds.
        """
        vectors = vectors.numpy().astype(np.float16)
        self.rows[items] = vectors
        self.at[items] = starts
        finite = np.isfinite(vectors).all(axis=1)
        self.fate[items] = np.where(finite, DONE, NOT_FINITE)

    def skip(self, items):
        """Leave some items out, which cannot be read."""
        self.fate[items] = SKIPPED

    def retry(self, items):
        """Have the next run embed some items that were left out."""
        self.fate[items] = WAITING

    def finish(self, index, manifest, info):
        """Put the complete store into place, and remove what it grew from.

        Arguments
        ---------
        index : array of int
            The item of each row of the store, in order.
        manifest : pandas.DataFrame
            One row for each.
        info : dict
            What else to put on record.

        Raises
        ------
        RuntimeError
            Some items were neither written nor skipped.
        """
        # As other processes left it: on a file system of a network their
        # writes need not have come here.
        fate = np.load(f"{self.base}.partial.fate.npy")
        waiting = np.flatnonzero(fate == WAITING)
        if len(waiting):
            raise RuntimeError(
                f"{len(waiting)} items of {self.base}, the first of them "
                f"{waiting[0]}, were not embedded; run the same command again. "
                "Processes on several machines need a file system that shows "
                "all of them the same"
            )
        parts = (
            self.rows[index[i : i + _COPY_ROWS]]
            for i in range(0, len(index), _COPY_ROWS)
        )
        write_store(self.base, parts, manifest, self.settings, info)
        self.remove_partial()

    def remove_partial(self):
        """Remove what the store grows from, the record first."""
        for kind in ("json", "rows.npy", "fate.npy", "at.npy"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{self.base}.partial.{kind}")
        self.lock.close()


def _short(setting):
    """A setting for a message; of a hash, what tells it from others."""
    return setting[:12] if isinstance(setting, str) else setting


def write_store(base, parts, manifest, settings, info, manifest_path=None):
    """Write a store, or put it in place of an earlier one.

    The array, without which there is no store, takes its place last: what is
    stopped on the way leaves the earlier store, or none.

    Arguments
    ---------
    base : str
        Folder and stem.
    parts : iterable of array
        The vectors, (some rows, d) float16 each, in order.
    manifest : pandas.DataFrame
        One row for each.
    settings : dict
        As `EmbeddingWriter`; with `size`, the number of values a row.
    info : dict
        What else to put on record.
    manifest_path : str
        Where the manifest goes, if not to `<base>.csv`.
    """
    path, record_path = f"{base}_embeddings.npy", f"{base}.json"
    manifest_path = manifest_path or f"{base}.csv"
    header = {
        "descr": "<f2",
        "fortran_order": False,
        "shape": (len(manifest), settings["size"]),
    }
    column = "caption" if "caption" in manifest else "wav_path"
    with written_whole(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype="<f2").tobytes())
        file.flush()
        with (
            written_whole(record_path) as record,
            written_whole(manifest_path) as table,
        ):
            write_cells(manifest, table)
            table.flush()
            content = {
                "settings": settings,
                "manifest": manifest_hash(
                    _read_manifest(table.name, column), column
                ),
                "rows": len(manifest),
                "dtype": "float16",
                "versions": {
                    name: importlib.metadata.version(name) for name in _PACKAGES
                },
            }
            text = json.dumps(content | info, indent=2, ensure_ascii=False)
            record.write(text.encode())
            record.flush()
            # All are complete before the first of the earlier ones goes.
            for earlier in (path, record_path, manifest_path):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(earlier)


def batched(items, size):
    """A sequence in parts of so many items; the last may have fewer."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def encoded(batches, encode):
    """Encode batch after batch, a GPU being given each before it has to wait.

    Arguments
    ---------
    batches : iterable
    encode : callable
        Batch -> (items, size) embeddings, on any device.

    Yields
    ------
    tuple
        A batch and its embeddings, on the CPU.
    """
    queue = collections.deque()
    for batch in batches:
        vectors = encode(batch)
        if not vectors.is_cuda:
            yield batch, vectors
            continue
        # Into pinned memory; the next batch's work queues up behind it.
        vectors = vectors.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        queue.append((batch, vectors, arrived))
        if len(queue) > 1:
            yield _arrived(*queue.popleft())
    for item in queue:
        yield _arrived(*item)


def _arrived(batch, vectors, arrived):
    arrived.synchronize()
    return batch, vectors


def captions_writer(folder, stem, table, size, settings, replaces=False):
    """A writer of a store of captions, each distinct one an item.

    Made before other work, it tells what is in the way of that store.

    Arguments
    ---------
    folder, stem, size, settings, replaces
        As `EmbeddingWriter`; the list of captions is added to the settings.
    table : pandas.DataFrame
        The manifest, with a column `caption`.

    Returns
    -------
    EmbeddingWriter

    Raises
    ------
    OSError, ValueError
        As `EmbeddingWriter`.
    """
    return EmbeddingWriter(
        folder,
        stem,
        "caption",
        table["caption"].nunique(),
        size,
        {**settings, "list": text_hash(table["caption"].tolist())},
        replaces,
    )


def dump_captions(
    writer,
    table,
    tokenizer,
    encode,
    batch_size,
    device_type,
    noprogressbar=False,
):
    """Make a store of captions.

    Each distinct caption is embedded once. Those of as many tokens share
    batches, so that next to nothing is padding.

    Arguments
    ---------
    writer : EmbeddingWriter
        Of `captions_writer`, for the same table.
    table : pandas.DataFrame
        Its manifest, with a column `caption`.
    tokenizer : dataset.text.CaptionTokenizer
        Tells how many tokens captions have.
    encode : callable
        List of captions -> (captions, size) unit-norm; tokenizes with it.
    batch_size : int
        Captions a batch.
    device_type : str
        Where they are encoded: a CPU takes 64 at once at most.
    noprogressbar : bool
        Whether to show no progress.

    Raises
    ------
    RuntimeError
        Some embeddings are not finite.
    OSError
        As `EmbeddingWriter.work`.
    """
    if writer.finished:
        logger.info("%s is complete already", writer.base)
        return
    if device_type == "cpu":
        batch_size = min(batch_size, _CPU_CAPTIONS)
    index, distinct = pd.factorize(table["caption"])
    distinct = distinct.tolist()
    with tokenizer.all_cores():
        lengths = tokenizer.lengths(distinct)
        rows = range(len(distinct))
        order = [row for *_, row in sorted(zip(lengths, distinct, rows))]
        batches = batched(order, batch_size)
        pending, bar = writer.work(batches, "caption", noprogressbar)
        with bar:
            for rows, vectors in encoded(
                pending, lambda rows: encode([distinct[i] for i in rows])
            ):
                writer.write(rows, vectors)
                bar.update(len(rows))
    ddp_barrier()
    if if_main_process():
        unusable = np.flatnonzero(writer.fate == NOT_FINITE)
        if len(unusable):
            raise RuntimeError(
                f"The embeddings of {len(unusable)} captions are not finite, "
                f"the first of them '{distinct[unusable[0]][:60]}': are these "
                "the right weights? Or give another --precision and output "
                "folder"
            )
        writer.finish(index, table, {"distinct": len(distinct)})
        logger.info(
            "%s: %d captions, %d of them distinct",
            writer.base,
            len(table),
            len(distinct),
        )
    ddp_barrier()


def read_captions(path, flag):
    """The captions of a CSV, with what else a pair has, where it is there.

    Arguments
    ---------
    path : str
        CSV with a column `caption`.
    flag : str
        The flag that named it, for errors.

    Returns
    -------
    pandas.DataFrame
        `caption`, and `ID`, `wav_path`, and with that `start` and `end`, where
        they are there. Whitespace of the captions is normalised, paths are
        absolute, times numbers, and rows without a caption left out.

    Raises
    ------
    ValueError
        It cannot be read, has no captions, or a time that is no number.
    """
    try:
        table = read_table(path, ["caption"])
    except ValueError as error:
        raise ValueError(f"--{flag}={error}") from error
    if "wav_path" in table:
        take_times(table, f"--{flag}={path}")
    # As in training; a line end in a cell would not survive every reader.
    table["caption"] = [" ".join(c.split()) for c in table["caption"]]
    empty = table["caption"] == ""
    if empty.any():
        logger.warning(
            "%d captions in %s are empty: left out", empty.sum(), path
        )
        table = table[~empty].reset_index(drop=True)
    if table.empty:
        raise ValueError(f"--{flag}={path} has no captions")
    names = ["ID", "wav_path", "caption"]
    if "wav_path" in table:
        names += ["start", "end"]
        # What is made of these may lie in another folder.
        folder = os.path.abspath(os.path.dirname(path) or ".")
        table["wav_path"] = [
            path_in(folder, p) if p.strip() else "" for p in table["wav_path"]
        ]
    return table[[name for name in names if name in table]]


def _check_whole(path, shape, record):
    """Raise if an array of a store in the making is not all there.

    NumPy fills one that is too short with zeros, when it may write to it.
    """
    problem = "it has another shape"
    try:
        if np.load(path, mmap_mode="r").shape == shape:
            return
    except (OSError, ValueError, EOFError) as error:
        problem = error
    raise ValueError(
        f"{path} is not whole ({problem}): restore it, or delete {record} to "
        "embed from the start"
    )


def _check_space(folder, needed):
    """Raise if a disk has fewer bytes free than are needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"The disk of {folder} has {free / 1e9:.3f} GB free, and the "
            f"embeddings need {needed / 1e9:.3f} GB while they are made: free "
            "some, or give another --output_folder"
        )


def _take_space(path):
    """Have a file, which exists sparse, occupy its place on the disk.

    A disk that is full only when a memory map is written to kills the process
    without a message.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
