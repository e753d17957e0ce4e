"""From manifests to batches of waveforms and tokens."""

import itertools
import math
import mmap
import multiprocessing
import os
import weakref
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    default_collate,
    get_worker_info,
)

from dataset.audio import AudioError
from dataset.manifest import of_headers

# Threads that copy windows into pinned memory. The loader's has one, which
# brings fewer than half of what a large GPU encodes.
_COPYING_THREADS = 4
# Unreadable clips in a row before a row of the data set is given up.
_MAX_REPLACEMENTS = 20
# Batches that each process of a loader reads ahead, if PyTorch is not told.
_AHEAD = 2
# The memory of all loaders: in their processes it has the same numbers.
_memories = weakref.WeakValueDictionary()
_numbers = itertools.count()


@dataclass
class PairBatch:
    """Audio-caption pairs of one batch.

    `wavs` is (batch, samples), `tokens` a dict of (batch, length), `clip_ids`
    and `caption_ids` are (batch,) integers, equal where the clip (file, start
    and end) or the caption is the same. `unreadable` maps paths to reasons, for
    the files in whose place other pairs stand.
    """

    wavs: torch.Tensor
    tokens: dict
    clip_ids: torch.Tensor
    caption_ids: torch.Tensor
    unreadable: dict = field(default_factory=dict)

    def to(self, device):
        """Move the tensors to a device; returns the batch itself."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        """Move the tensors to pinned memory; the loader calls it."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function):
        self.wavs = function(self.wavs)
        self.tokens = {k: function(v) for k, v in self.tokens.items()}
        self.clip_ids = function(self.clip_ids)
        self.caption_ids = function(self.caption_ids)
        return self


def shared_texts(texts):
    """Texts in memory that loader processes share, a `pyarrow` array.

    Python's own are copied into each process, page by page: looking at one
    changes its count of references.

    Arguments
    ---------
    texts : iterable of str

    Returns
    -------
    pyarrow.LargeStringArray
    """
    return pa.array(texts, pa.large_string())


class SharedWindows:
    """Stacks windows in memory that a loader shares with its processes.

    PyTorch takes new memory for each batch, whose pages the kernel clears and
    maps: that takes longer than to read them from a WAV file. It takes it of
    /dev/shm, of which containers have little. Here the same memory serves all
    batches; one is there until the next is asked for, or for good if pinned.

    Arguments
    ---------
    num_workers : int
        Processes of the loader, which are forked later.
    size : int
        Windows of a batch; PyTorch is left with those that have more.
    num_samples : int
        Of a window.

    Raises
    ------
    OSError
        The machine has not so much memory.
    """

    def __init__(self, num_workers, size, num_samples):
        # One that is in use, besides those that wait.
        shape = (num_workers, _AHEAD + 1, size, num_samples)
        num_bytes = math.prod(shape) * 4
        try:
            pages = mmap.mmap(-1, num_bytes)
        except OSError as error:
            raise OSError(
                f"--num_workers={num_workers}: what they read ahead in batches "
                f"of {size} windows takes {num_bytes / 1e9:.1f} GB of memory "
                f"({error}). Give fewer, or smaller batches"
            ) from error
        self.memory = torch.frombuffer(pages, dtype=torch.float32).view(shape)
        self.number = next(_numbers)
        _memories[self.number] = self.memory
        self.batches = 0

    def __call__(self, windows):
        """List of (samples,) -> (windows, samples), once it has arrived."""
        worker = get_worker_info()
        if worker is None or len(windows) > self.memory.shape[2]:
            return default_collate(windows)
        place = worker.id, self.batches % self.memory.shape[1]
        self.batches += 1
        torch.stack(windows, out=self.memory[place][: len(windows)])
        return _Stacked(self.number, place, len(windows))


@dataclass
class _Stacked:
    """Windows in shared memory; what is sent arrives as their tensor."""

    number: int
    place: tuple
    count: int

    def __reduce__(self):
        return _windows_at, (self.number, self.place, self.count)


def _windows_at(number, place, count):
    return _memories[number][place][:count]


def stacker(num_workers, size, reader):
    """What puts the windows of a loader's batches together.

    Arguments
    ---------
    num_workers : int
        Processes of the loader.
    size : int
        Windows of a batch.
    reader : dataset.audio.AudioReader
        Reads them.

    Returns
    -------
    callable
        List of (samples,) -> (windows, samples).
    """
    if num_workers and multiprocessing.get_start_method() == "fork":
        return SharedWindows(num_workers, size, reader.num_samples)
    return default_collate


class PairDataset(Dataset):
    """Audio-caption pairs, cut to one window each.

    The window is cut at a random place that depends on the seed, the epoch and
    the row alone: of the part from `start` to `end` where these are known, at
    `start` where only that is, else of the whole file. A row whose audio cannot
    be read is replaced by another one of the same set, and reported with the
    example, so that batches stay full.

    Arguments
    ---------
    manifests : list of pandas.DataFrame
        Sets of pairs with `wav_path`, `caption` and, where known, `start` and
        `end` in seconds; the rows are numbered through.
    reader : dataset.audio.AudioReader
        Reads the windows.
    seed : int
        Seed of the crops.
    """

    def __init__(self, manifests, reader, seed):
        pairs = pd.concat(manifests, ignore_index=True)
        pairs = pairs.reindex(columns=["wav_path", "start", "end", "caption"])
        self.wav_paths = shared_texts(pairs["wav_path"])
        self.captions = shared_texts(pairs["caption"])
        # Two windows of a recording are two clips: what is heard in one need
        # not be in the other.
        windows = pairs.groupby(
            ["wav_path", "start", "end"], dropna=False, sort=False
        )
        self.clip_ids = windows.ngroup().to_numpy()
        self.caption_ids = pd.factorize(pairs["caption"])[0]
        self.times = pairs[["start", "end"]].to_numpy(float)
        self.ends = np.cumsum([len(manifest) for manifest in manifests])
        self.reader = reader
        self.seed = seed

    def __len__(self):
        """Number of pairs."""
        return len(self.wav_paths)

    def __getitem__(self, draw):
        """One pair.

        Arguments
        ---------
        draw : tuple of int, or int
            Epoch and row, as `MixedBatchSampler` yields them; a row alone
            stands for epoch 0.

        Returns
        -------
        dict
            `wav` (samples,), `caption`, `clip_id`, `caption_id`, `unreadable`.

        Raises
        ------
        AudioError
            Too many clips in turn cannot be read.
        """
        epoch, row = draw if isinstance(draw, tuple) else (0, draw)
        rng = np.random.default_rng((self.seed, epoch, row))
        end = self.ends[np.searchsorted(self.ends, row, side="right")]
        begin = max([0, *self.ends[self.ends < end]])
        unreadable = {}
        for _ in range(_MAX_REPLACEMENTS):
            path = self.wav_paths[row].as_py()
            part = [None if np.isnan(t) else t for t in self.times[row]]
            try:
                wav, _ = self.reader.crop(path, rng.random(), *part)
            except AudioError as error:
                unreadable[path] = str(error)
                row = int(rng.integers(begin, end))
            else:
                return {
                    "wav": wav,
                    "caption": self.captions[row].as_py(),
                    "clip_id": int(self.clip_ids[row]),
                    "caption_id": int(self.caption_ids[row]),
                    "unreadable": unreadable,
                }
        reasons = "; ".join(f"{p} {r}" for p, r in unreadable.items())
        raise AudioError(f"No readable clip in {_MAX_REPLACEMENTS}: {reasons}")


class PairCollator:
    """Makes a `PairBatch` of examples; captions padded to the longest one.

    Arguments
    ---------
    tokenize : callable
        List of captions -> dict of tensors.
    stack : callable
        Of `stacker`.
    """

    def __init__(self, tokenize, stack=default_collate):
        self.tokenize = tokenize
        self.stack = stack

    def __call__(self, examples):
        """List of examples of `PairDataset` -> PairBatch."""
        unreadable = {}
        for example in examples:
            unreadable |= example["unreadable"]
        return PairBatch(
            wavs=self.stack([e["wav"] for e in examples]),
            tokens=self.tokenize([e["caption"] for e in examples]),
            clip_ids=torch.tensor([e["clip_id"] for e in examples]),
            caption_ids=torch.tensor([e["caption_id"] for e in examples]),
            unreadable=unreadable,
        )


@dataclass
class WindowBatch:
    """Clips of one batch in windows.

    `windows` is (sum of counts, samples), clip after clip; `rows` and `counts`
    are the clips' rows in the data set and their numbers of windows, `starts`
    where the windows start that are not of a whole clip, in seconds, else NaN.
    `unreadable` maps the rows of other clips to the reason.
    """

    windows: torch.Tensor
    rows: list
    counts: list
    starts: list
    unreadable: dict

    def pin_memory(self):
        """The batch in pinned memory; the loader calls it."""
        threads = torch.get_num_threads()
        torch.set_num_threads(min(_COPYING_THREADS, os.cpu_count()))
        self.windows = self.windows.pin_memory()
        torch.set_num_threads(threads)
        return self


class WindowDataset(Dataset):
    """Whole clips in consecutive windows.

    Arguments
    ---------
    wav_paths : sequence of str
        Audio files.
    reader : dataset.audio.AudioReader
        Reads the windows.
    """

    def __init__(self, wav_paths, reader):
        self.wav_paths = shared_texts(wav_paths)
        self.reader = reader

    def __len__(self):
        """Number of clips."""
        return len(self.wav_paths)

    def __getitem__(self, row):
        """(row, windows, start, None), or (row, None, None, reason)."""
        try:
            return row, *self.read(row), None
        except AudioError as error:
            return row, None, None, str(error)

    def read(self, row):
        """The windows of a clip, (windows, samples), and where it starts."""
        path = self.wav_paths[row].as_py()
        return self.reader.windows(path), math.nan


def batches_of_windows(wav_paths, reader, size, hides_bar):
    """Whole clips in batches of so many windows at most.

    A longer clip is a batch by itself: it is held as a whole.

    Arguments
    ---------
    wav_paths : sequence of str
        Audio files, whose headers are looked into.
    reader : dataset.audio.AudioReader
        Whose windows count.
    size : int
        Windows a batch.
    hides_bar : bool
        Whether to show no progress.

    Returns
    -------
    list of list of int
        Numbers of the clips, in order, for a `WindowDataset`.
    """

    def count(path):
        try:
            return len(reader.starts(path))
        except AudioError:
            return 1

    batches, room = [], 0
    counts = of_headers(count, list(wav_paths), hides_bar)
    for row, needed in enumerate(counts):
        if needed > room:
            batches.append([])
            room = size
        batches[-1].append(row)
        room -= needed
    return batches


class CropDataset(WindowDataset):
    """One window of each item.

    Arguments
    ---------
    wav_paths : sequence of str
        Audio file of each item.
    reader : dataset.audio.AudioReader
        Reads the windows.
    starts : array of float
        (items,) where their windows start, in seconds; NaN leaves an item out,
        since its windows are not known. None takes the centre windows.
    """

    def __init__(self, wav_paths, reader, starts=None):
        super().__init__(wav_paths, reader)
        self.starts = starts

    def read(self, row):
        """The window of an item, (1, samples), and where it starts."""
        start = None if self.starts is None else float(self.starts[row])
        if start is not None and math.isnan(start):
            raise AudioError("could not be read when its windows were listed")
        path = self.wav_paths[row].as_py()
        window, start = self.reader.crop(path, start=start)
        return window[None], start


class WindowCollator:
    """Makes a `WindowBatch` of items of a `WindowDataset`.

    Arguments
    ---------
    stack : callable
        Of `stacker`.
    """

    def __init__(self, stack):
        self.stack = stack

    def __call__(self, examples):
        """List of items -> WindowBatch."""
        good = [example[:3] for example in examples if example[1] is not None]
        rows, windows, starts = zip(*good) if good else ((), (), ())
        all_windows = [*itertools.chain(*windows)]
        return WindowBatch(
            windows=self.stack(all_windows) if good else torch.empty(0),
            rows=list(rows),
            counts=[len(w) for w in windows],
            starts=list(starts),
            unreadable={
                row: why for row, _, _, why in examples if why is not None
            },
        )


def window_loader(wav_paths, reader, size, **options):
    """Loader of whole clips, in order, so many windows a batch at most.

    Arguments
    ---------
    wav_paths, reader, size
        As `batches_of_windows`.
    **options
        Of the loader.

    Returns
    -------
    torch.utils.data.DataLoader
        Its batches are `WindowBatch`es.
    """
    return DataLoader(
        WindowDataset(wav_paths, reader),
        batch_sampler=batches_of_windows(
            wav_paths, reader, size, hides_bar=True
        ),
        collate_fn=WindowCollator(
            stacker(options.get("num_workers", 0), size, reader)
        ),
        **options,
    )
