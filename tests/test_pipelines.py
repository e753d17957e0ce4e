"""From rows to batches, on clips whose samples tell their clip and place."""

import math
import multiprocessing
import os
import time

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader, default_collate

from curation.embeddings import batched
from dataset.audio import AudioError, AudioReader
from dataset.pipelines import (
    PairCollator,
    PairDataset,
    SharedWindows,
    WindowBatch,
    batches_of_windows,
    stacker,
    window_loader,
)

CLIPS = "abcd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of 3 s at 1000 Hz; sample i of clip number n is 10000 n + i."""
    folder = tmp_path_factory.mktemp("ramps")
    for n, name in enumerate(CLIPS):
        ramp = 10000.0 * n + np.arange(3000)
        soundfile.write(folder / f"{name}.wav", ramp, 1000, "FLOAT")
    return folder


def pairs(folder, rows):
    """A manifest of clip, caption and, where known, start and end."""
    columns = ["wav_path", "caption", "start", "end"][: len(rows[0])]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(wav_path=f"{folder}/" + frame["wav_path"] + ".wav")


def dataset(*manifests, seed=0):
    return PairDataset(manifests, AudioReader(1000, 1), seed)


def places(data, draws):
    """Numbers of the clips that were cut, and first samples of the crops."""
    wavs = torch.stack([data[draw]["wav"] for draw in draws])
    assert torch.equal(wavs, wavs[:, :1] + torch.arange(1000.0))
    return np.divmod(wavs[:, 0].numpy().astype(int), 10000)


def test_batches_hold_so_many_windows(folder, tmp_path):
    """Of clips of three windows each, and some of one, two and nine."""
    lengths = {"e": 900, "f": 1001, "g": 8001}
    for name, length in lengths.items():
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(length), 1000)
    paths = [f"{folder}/{name}.wav" for name in "abcd"]
    paths[2:2] = [tmp_path / f"{name}.wav" for name in "efg"]
    paths.insert(2, tmp_path / "absent.wav")
    # 3, 3, 1, 1, 2, 9, 3, 3
    found = batches_of_windows(paths, AudioReader(1000, 1), 8, hides_bar=True)
    assert found == [[0, 1, 2, 3], [4], [5], [6, 7]]
    found = batches_of_windows(paths, AudioReader(1000, 1), 5, hides_bar=True)
    assert found == [[0], [1, 2, 3], [4], [5], [6], [7]]
    first = [tmp_path / "absent.wav", *paths[:1]]
    found = batches_of_windows(first, AudioReader(1000, 1), 4, hides_bar=True)
    assert found == [[0, 1]]


@pytest.mark.parametrize(
    ("times", "lowest", "highest"),
    [
        ((), 0, 2000),
        ((math.nan, math.nan), 0, 2000),
        ((0.5, 2.25), 500, 1250),
        ((0.5, 1.5), 500, 500),
        ((0.5, math.nan), 500, 500),
        ((2.75, math.nan), 2000, 2000),
    ],
)
def test_crops_fill_the_part_that_a_pair_is_about(
    folder, times, lowest, highest
):
    """Beside a set of pairs about whole clips."""
    data = dataset(
        pairs(folder, [("a", "x")]), pairs(folder, [("b", "x", *times)])
    )
    clips, begins = places(data, [(epoch, 1) for epoch in range(300)])
    assert set(clips) == {1}
    assert lowest <= begins.min() and begins.max() <= highest
    # Uniform, but for four standard deviations of a mean.
    width = highest - lowest
    near = 4 * width / math.sqrt(12 * 300)
    assert abs(begins.mean() - (lowest + highest) / 2) <= near
    assert begins.std() >= 0.9 * width / math.sqrt(12)


def test_crops_go_by_seed_epoch_and_row(folder):
    manifest = pairs(folder, [("a", "x"), ("a", "y")])
    draws = [(epoch, row) for epoch in range(50) for row in (0, 1)]
    _, begins = places(dataset(manifest), draws)
    _, backwards = places(dataset(manifest), draws[::-1])
    np.testing.assert_array_equal(backwards[::-1], begins)
    _, validation = places(dataset(manifest), [0, 1])
    np.testing.assert_array_equal(validation, begins[:2])
    _, others = places(dataset(manifest, seed=1), draws)
    # Of 200 among 2001 places, ten are expected to be equal to another one.
    assert len({*begins, *others}) > 170


forked = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="memory is not shared"
)


@forked
@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_stay_until_the_next_one_is_asked_for(folder, num_workers):
    """Whatever the loader's processes read meanwhile; the last one is small."""
    data = dataset(pairs(folder, [(CLIPS[i % 4], str(i)) for i in range(63)]))
    stack = SharedWindows(num_workers, 5, 1000)
    begin = stack.memory.data_ptr()
    loader = DataLoader(
        data,
        batch_sampler=[list(rows) for rows in batched(range(63), 5)],
        collate_fn=PairCollator(lambda captions: {}, stack),
        num_workers=num_workers,
        persistent_workers=True,
    )
    for _ in range(2):
        batches = zip(loader, batched(range(63), 5), strict=True)
        for batch, rows in batches:
            time.sleep(0.02)
            expected = torch.stack([data[row]["wav"] for row in rows])
            assert torch.equal(batch.wavs, expected)
            place = batch.wavs.data_ptr() - begin
            assert 0 <= place < 4 * stack.memory.numel()


@forked
def test_windows_that_are_too_many_are_left_to_pytorch(folder, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.arange(9000.0), 1000, "FLOAT")
    paths = [f"{tmp_path}/long.wav", f"{tmp_path}/absent.wav"]
    paths = [f"{folder}/a.wav", *paths, f"{folder}/b.wav"]
    # Of 3 windows, 9, one that cannot be read, and 3.
    reader = AudioReader(1000, 1)
    plain = window_loader(paths, reader, 3)
    shared = window_loader(paths, reader, 3, num_workers=2)
    assert isinstance(shared.collate_fn.stack, SharedWindows)
    assert [len(batch.windows) for batch in plain] == [3, 9, 0, 3]
    for batch, expected in zip(shared, plain, strict=True):
        assert torch.equal(batch.windows, expected.windows)
        assert batch.rows == expected.rows
        assert batch.counts == expected.counts
        assert batch.unreadable == expected.unreadable


def test_more_memory_than_there_is_is_told():
    message = r"--num_workers=2000000: .* 7 windows takes 168000000\.0 GB of"
    with pytest.raises(OSError, match=message):
        SharedWindows(2000000, 7, 10**9)


def test_memory_is_shared_with_processes_that_are_forked(monkeypatch):
    reader = AudioReader(1000, 1)
    assert stacker(0, 5, reader) is default_collate
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    assert stacker(2, 5, reader) is default_collate


def test_positives_are_equal_clips_and_captions(folder):
    """Whichever set they are in; windows of a recording are clips."""
    manifests = [
        pairs(folder, [("a", "x"), ("a", "y"), ("b", "x"), ("c", "z")]),
        pairs(folder, [("b", "w", 1.0, 2.0), ("d", "y", 1.0, 2.0)]),
        pairs(folder, [("b", "v", 1.0, 2.0), ("b", "u", 0.0, 1.0)]),
        pairs(folder, [("b", "t", 1.0, 2.5)]),
    ]
    data = dataset(*manifests)
    batch = PairCollator(lambda captions: {"text": captions})(
        [data[1, row] for row in range(9)]
    )
    every = pd.concat(manifests)
    assert batch.tokens["text"] == every["caption"].tolist()
    clips = batch.wavs[:, 0] // 10000
    assert clips.tolist() == [0, 0, 1, 2, 1, 3, 1, 1, 1]
    windows = every[["wav_path", "start", "end"]].astype(str).sum(axis=1)
    for ids, values in (
        (batch.clip_ids, windows.to_numpy()),
        (batch.caption_ids, every["caption"].to_numpy()),
    ):
        same = torch.from_numpy(values[:, None] == values)
        assert torch.equal(ids[:, None] == ids, same)
    assert batch.unreadable == {}


@pytest.mark.parametrize(("bad", "own"), [(2, {0, 1}), (3, {4, 5})])
def test_unreadable_clips_are_replaced_by_others_of_their_set(folder, bad, own):
    rows = list(zip("abcbcd", "uvwxyz"))
    rows[bad] = ("gone", rows[bad][1])
    data = dataset(pairs(folder, rows[:3]), pairs(folder, rows[3:]))
    whole = [data[1, row] for row in range(6) if row != bad]
    taken = [data[epoch, bad] for epoch in range(50)]
    captions = [rows[i][1] for i in own]
    assert {example["caption"] for example in taken} == set(captions)
    for example in taken:
        [same] = [e for e in whole if e["caption"] == example["caption"]]
        for name in ("clip_id", "caption_id"):
            assert example[name] == same[name]
        assert example["wav"][0] // 10000 == same["wav"][0] // 10000
    reasons = {f"{folder}/gone.wav": "is missing"}
    collate = PairCollator(lambda captions: {})
    assert collate([*whole, taken[0]]).unreadable == reasons


def test_a_set_without_readable_clips_takes_none_of_another(folder):
    good, bad = (pairs(folder, [(name, "x")] * 2) for name in ("a", "gone"))
    with pytest.raises(AudioError, match="No readable clip in 20: .*missing"):
        dataset(good, bad, good)[1, 3]


def test_windows_are_pinned_by_several_threads(monkeypatch):
    """For that alone: the loader's thread may be the process's own."""
    threads, seen = torch.get_num_threads(), []

    def pin(tensor):
        seen.append(torch.get_num_threads())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    WindowBatch(torch.zeros(2, 3), [0, 1], [1, 1], [0.0, 0.0], {}).pin_memory()
    assert seen == [3]
    assert torch.get_num_threads() == threads
