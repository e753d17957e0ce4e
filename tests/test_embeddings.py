"""Embedding runs by the real command line: alignment, resume, refusals."""

import collections
import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NETWORK, ROOT, torchrun, torchrun_watched, write_noise
from transformers import AutoModel, AutoTokenizer, RobertaConfig

import microsoft_curation_toemb
import retrieve_ds_t2t
from curation.embeddings import (
    SKIPPED,
    WAITING,
    EmbeddingWriter,
    Manifest,
    batched,
    captions_writer,
    check_same_weights,
    dump_captions,
    manifest_hash,
    open_embeddings,
    read_captions,
    text_hash,
    write_store,
)
from dataset.audio import AudioError, AudioReader
from dataset.manifest import of_headers
from dataset.text import CaptionTokenizer
from files import alone, written_whole
from models.weights import AtomicCheckpointer

CAPTIONS = [
    "rain falls",
    'a dog, "barks"',
    "$HOME é",
    "rain falls",
    " ".join(["hum"] * 2500),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, clap):
    """Weights, captions, and 40 clips; one unreadable, one missing."""
    folder = tmp_path_factory.mktemp("world")
    names = [f"{i}, $x.wav" for i in range(40)]
    for i, name in enumerate(names):
        write_noise(folder / name, 0.4 + 0.07 * i, 16000, seed=i)
    (folder / names[7]).write_text("no audio")
    (folder / names[9]).unlink()
    lines = [*names, "", names[3]]
    (folder / "list.txt").write_text("\n".join(lines) + "\n")
    rows = [f" {c}\n" for c in CAPTIONS]
    pd.DataFrame({"ID": list("abcdef"), "caption": [*rows, " "]}).to_csv(
        folder / "captions.csv", index=False
    )
    AtomicCheckpointer(folder / "weights", {"clap": clap}).save_checkpoint()
    return folder


def argv(script, world, text_model, /, **changes):
    flags = {
        "text_model": text_model,
        "clap": json.dumps(NETWORK).replace('"', ""),
        "ssl_checkpoints_dir": world / "weights",
    } | changes
    flags = [f"--{k}={v}" for k, v in flags.items() if v is not None]
    return [str(ROOT / "hparams/curation" / f"{script}.yaml"), *flags]


@pytest.fixture
def embed(world, text_model, tmp_path):
    """Runs the embedding script; returns its save folder."""

    def run(name="run", main=microsoft_curation_toemb.main, **changes):
        flags = {
            "audio_pathfile": world / "list.txt",
            "text_pathfile": world / "captions.csv",
            "output_folder": tmp_path / name,
            "num_workers": 0,
            "audio_bs": 4,
            "text_bs": 2,
            # What is fastest is another one on another machine.
            "precision": "fp32",
        } | changes
        script = "microsoft_audioset_insper_toemb"
        main(argv(script, world, text_model, **flags))
        return tmp_path / name / "save"

    return run


def frame_of(store):
    return pd.concat(store.manifest, ignore_index=True)


def test_rows_are_the_embeddings_of_their_manifest(
    embed, world, clap, text_model
):
    save = embed()
    audio = open_embeddings(save, "audio_audioset", "wav_path")
    names = [i for i in range(40) if i not in (7, 9)]
    paths = [str(world / f"{i}, $x.wav") for i in names]
    assert audio.manifest["wav_path"].tolist() == paths
    files = (save / "audio_audioset_files.txt").read_text().splitlines()
    assert files == paths
    reader = AudioReader(16000, 1)
    with torch.no_grad():
        for row, line in frame_of(audio).iterrows():
            window, _ = reader.crop(line["wav_path"], start=line["start"])
            centre, start = reader.crop(line["wav_path"])
            assert torch.equal(window, centre) and start == line["start"]
            expected = clap.encode_audio(window[None])[0].numpy()
            np.testing.assert_allclose(
                audio[row : row + 1][0], expected, atol=2e-3
            )
    skipped = pd.read_csv(save / "audio_audioset_skipped.csv")
    assert skipped["path"].tolist() == [
        str(world / "7, $x.wav"),
        str(world / "9, $x.wav"),
    ]
    assert audio.info["skipped"] == 2
    text = open_embeddings(save, "text_insper", "caption")
    assert text.manifest["caption"].tolist() == CAPTIONS
    assert text.manifest["ID"].tolist() == list("abcde")
    tokenize = CaptionTokenizer(text_model)
    with torch.no_grad():
        for row, caption in enumerate(CAPTIONS):
            expected = clap.encode_text(tokenize([caption]))[0].numpy()
            np.testing.assert_allclose(
                text[row : row + 1][0], expected, atol=2e-3
            )
    assert text.info["distinct"] == 4
    assert text.vectors.dtype == audio.vectors.dtype == np.float16
    check_same_weights(audio, text)


def test_all_windows(embed):
    save = embed(windows_per_clip="all", text_pathfile=None)
    manifest = frame_of(open_embeddings(save, "audio_audioset", "wav_path"))
    # Clip 30 is 2.5 s long.
    clip = manifest[manifest["wav_path"].str.endswith("/30, $x.wav")]
    assert clip["start"].tolist() == [0, 1, 1.5]
    assert clip["end"].tolist() == [1, 2, 2.5]
    assert not (save / "text_insper_embeddings.npy").exists()


def test_the_mean_is_that_of_all_windows(embed, monkeypatch):
    # More windows than are encoded at once.
    monkeypatch.setattr("models.zeroshot.WINDOWS_AT_ONCE", 2)
    every, mean = (
        open_embeddings(
            embed(name, windows_per_clip=name, text_pathfile=None),
            "audio_audioset",
            "wav_path",
        )
        for name in ("all", "mean")
    )
    rows = every[:]
    paths = every.manifest["wav_path"]
    assert mean.manifest["wav_path"].tolist() == paths.unique().tolist()
    for row, path in enumerate(mean.manifest["wav_path"]):
        expected = rows[paths == path].mean(axis=0)
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(mean[row : row + 1][0], expected, atol=2e-3)
    assert paths.duplicated().any()
    # Training may crop anywhere.
    assert frame_of(mean)[["start", "end"]].isna().all(axis=None)


STORES = ("audio_audioset_embeddings.npy", "audio_audioset.csv",
          "text_insper_embeddings.npy", "text_insper.csv")  # fmt: skip


def contents(save):
    return [(save / name).read_bytes() for name in STORES]


# Kills itself when a third batch is on disk.
KILLED = """
import itertools
import os
import signal
import sys

import microsoft_curation_toemb
from curation.embeddings import EmbeddingWriter

write, calls = EmbeddingWriter.write, itertools.count(1)

def write_and_die(*args):
    write(*args)
    if next(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

EmbeddingWriter.write = write_and_die
microsoft_curation_toemb.main(sys.argv[1:])
"""


def test_killed_and_resumed_gives_the_same_bytes(
    embed, world, text_model, tmp_path
):
    whole = embed("whole")
    flags = argv(
        "microsoft_audioset_insper_toemb",
        world,
        text_model,
        audio_pathfile=world / "list.txt",
        text_pathfile=world / "captions.csv",
        output_folder=tmp_path / "killed",
        num_workers=0,
        audio_bs=4,
        text_bs=2,
        precision="fp32",
    )

    def run(*script):
        command = [sys.executable, *script, *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode

    save = tmp_path / "killed" / "save"
    assert run("-c", KILLED) == -signal.SIGKILL
    fates = np.load(save / "audio_audioset.partial.fate.npy")
    assert 0 < np.count_nonzero(fates) < len(fates)
    assert not (save / "audio_audioset.json").exists()
    assert run("microsoft_curation_toemb.py") == 0
    assert contents(save) == contents(whole)
    assert not list(save.glob("*.partial*"))


def test_two_processes_give_the_same_bytes(embed, tmp_path):
    whole = embed("whole")

    watch = """
write = script.EmbeddingWriter.write

def noted(writer, items, *args):
    note(f"{writer.base} {sorted(items)}")
    write(writer, items, *args)

script.EmbeddingWriter.write = noted
"""
    shares = []

    def main(flags):
        script = "microsoft_curation_toemb.py"
        shares.extend(torchrun_watched(script, flags, tmp_path, watch))

    assert contents(embed("two", main=main)) == contents(whole)
    assert all(shares) and not set(shares[0]) & set(shares[1])


def test_a_finished_store_is_kept_and_another_refused(embed, world):
    save = embed()
    times = [(save / name).stat().st_mtime_ns for name in STORES]
    embed()
    assert [(save / name).stat().st_mtime_ns for name in STORES] == times
    with pytest.raises(ValueError, match=r"short \(repeat there, zero now\)"):
        embed(short_audio="zero")


def test_a_finished_store_names_what_it_lacks(embed, world, capsys, tmp_path):
    save = embed(text_pathfile=None)
    skipped = len(pd.read_csv(save / "audio_audioset_skipped.csv"))
    assert skipped
    capsys.readouterr()
    embed(text_pathfile=None)
    path = f"{save}/audio_audioset_skipped.csv"
    log = "".join(capsys.readouterr())
    assert f"lacks {skipped} files" in log and path in log
    (tmp_path / "list.txt").write_text(f"{world}/3, $x.wav\n")
    whole = {"audio_pathfile": tmp_path / "list.txt", "text_pathfile": None}
    embed("whole", **whole)
    capsys.readouterr()
    embed("whole", **whole)
    log = "".join(capsys.readouterr())
    assert "complete already" in log and "lacks" not in log


@pytest.fixture
def changed(world, text_model, clap, tmp_path):
    """Other weights, a shorter list, and other words of the same number."""
    other = copy.deepcopy(clap)
    with torch.no_grad():
        next(other.caption_encoder.parameters()).add_(1)
    AtomicCheckpointer(tmp_path / "weights", {"clap": other}).save_checkpoint()
    (tmp_path / "list.txt").write_text(f"{world}/3, $x.wav\n")
    shutil.copytree(text_model, tmp_path / "words")
    for path in (tmp_path / "words").iterdir():
        path.write_text(path.read_text().replace("siren", "snore"))
    (tmp_path / "captions.csv").write_text("caption\nhail\n")
    return tmp_path


AUDIO, TEXT = {"text_pathfile": None}, {"audio_pathfile": None}


@pytest.mark.parametrize(
    ("inputs", "changes", "name"),
    [
        (AUDIO, {"ssl_checkpoints_dir": "{}/weights"}, "weights"),
        (AUDIO, {"audio_pathfile": "{}/list.txt"}, "list"),
        (AUDIO, {"clap": "{width: 2, d_proj: 8, sample_rate: 16000, "
                 "duration: 1, fmax: 8000, hop_size: 160}"}, "hop_size"),
        (AUDIO, {"clap": "{width: 2, d_proj: 8, sample_rate: 16000, "
                 "duration: 0.75, fmax: 8000}"}, "duration"),
        (AUDIO, {"precision": "bf16"}, "precision"),
        (AUDIO, {"windows_per_clip": "mean"}, "windows_per_clip"),
        (AUDIO, {"short_audio": "zero"}, "short"),
        (TEXT, {"ssl_checkpoints_dir": "{}/weights"}, "weights"),
        (TEXT, {"text_pathfile": "{}/captions.csv"}, "list"),
        (TEXT, {"text_model": "{}/words"}, "tokenizer"),
        (TEXT, {"tokenizer": "{text_max_length: 7}"}, "text_max_length"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("finished", [True, False])
def test_what_was_changed_is_named(
    embed, changed, inputs, changes, name, finished, monkeypatch, tmp_path
):
    """Of a finished store, and of one in the making."""
    if not finished:
        monkeypatch.setattr(EmbeddingWriter, "finish", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        embed(**inputs, precision="fp32")
    changes = {k: v.replace("{}", str(changed)) for k, v in changes.items()}
    record = (tmp_path / "run" / "hyperparams.yaml").read_bytes()
    with pytest.raises(ValueError, match="is of other embeddings") as caught:
        embed(**{**inputs, "precision": "fp32", **changes})
    assert (tmp_path / "run" / "hyperparams.yaml").read_bytes() == record
    message = str(caught.value)
    assert ("partial" in message) != finished
    assert re.findall(r"(\w+) \([^()]* there, [^()]* now\)", message) == [name]


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes",
    [
        {"ssl_checkpoints_dir": "{}/weights"},
        {"text_pathfile": "{}/captions.csv"},
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_captions_in_the_way_are_told_before_audio_is_embedded(
    embed, changed, changes, finished, monkeypatch
):
    with (
        monkeypatch.context() as stopped,
        contextlib.suppress(KeyboardInterrupt),
    ):
        if not finished:
            stopped.setattr(EmbeddingWriter, "finish", interrupt)
        embed(audio_pathfile=None)
    changes = {k: v.replace("{}", str(changed)) for k, v in changes.items()}
    with pytest.raises(ValueError, match=r"text_insper\S* is of other embedd"):
        embed(**changes)
    save = changed / "run" / "save"
    assert not [path for path in save.iterdir() if "audio" in path.name]


def test_both_stores_need_their_place_before_audio_is_embedded(
    embed, monkeypatch, tmp_path
):
    """Of 40 clips and 4 captions, then 40."""
    row = 2 * NETWORK["d_proj"]

    def fill(free):
        usage = collections.namedtuple("Usage", "free")(free)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    def begin(**changes):
        with pytest.raises(KeyboardInterrupt):
            embed(**changes)

    monkeypatch.setattr(EmbeddingWriter, "_begin", interrupt)
    for free, changes in (
        (2 * 4 * row, {"audio_pathfile": None}),
        (2 * 40 * row, {"text_pathfile": None}),
        (2 * 40 * row, {}),
    ):
        fill(free)
        begin(**changes)
        fill(free - 1)
        with pytest.raises(OSError, match="free some, or give another"):
            embed(**changes)
    many = pd.DataFrame({"caption": [str(i) for i in range(40)]})
    many.to_csv(tmp_path / "many.csv", index=False)
    many = {"text_pathfile": tmp_path / "many.csv"}
    fill(3 * 40 * row)
    begin(**many)
    fill(3 * 40 * row - 1)
    with pytest.raises(OSError, match="free some, or give another"):
        embed(**many)


@pytest.mark.parametrize("seconds", [1.5, 5, None])
def test_a_file_of_another_length_has_other_windows(
    embed, world, tmp_path, monkeypatch, seconds
):
    """It had 1.8 s, and two windows."""
    shutil.copytree(world, tmp_path / "copy")
    flags = {
        "audio_pathfile": tmp_path / "copy" / "list.txt",
        "text_pathfile": None,
        "windows_per_clip": "all",
    }
    with monkeypatch.context() as stopped:
        stopped.setattr(EmbeddingWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(**flags)
    path = tmp_path / "copy" / "20, $x.wav"
    path.rename(tmp_path / "away")
    if seconds is not None:
        write_noise(path, seconds, 16000)
    message = r"other embeddings: windows \([^()]*\)\. Audio files appeared"
    with pytest.raises(ValueError, match=message):
        embed(**flags)
    with pytest.raises(ValueError, match=r"windows_per_clip \(") as caught:
        embed(**flags | {"windows_per_clip": "mean"})
    assert "Audio files" not in str(caught.value)
    (tmp_path / "away").rename(path)
    embed(**flags)


def test_all_windows_are_kept_when_a_file_is_put_back(
    embed, world, tmp_path, capsys
):
    """As centre windows are: what the store lacks is told."""
    shutil.copytree(world, tmp_path / "copy")
    flags = {
        "audio_pathfile": tmp_path / "copy" / "list.txt",
        "text_pathfile": None,
        "windows_per_clip": "all",
    }
    path = tmp_path / "copy" / "20, $x.wav"
    path.rename(tmp_path / "away")
    save = embed(**flags)
    before = (save / "audio_audioset.csv").read_bytes()
    (tmp_path / "away").rename(path)
    capsys.readouterr()
    embed(**flags)
    assert "lacks 3 files" in "".join(capsys.readouterr())
    assert (save / "audio_audioset.csv").read_bytes() == before


@pytest.fixture
def outage(world, monkeypatch):
    """Some files cannot be read the first time."""
    away = {str(world / f"{i}, $x.wav") for i in (3, 4, 20)}

    def after(read):
        def once(reader, path, **kwargs):
            if path in away:
                away.remove(path)
                raise AudioError("is on a disk that is away")
            return read(reader, path, **kwargs)

        return once

    def begin():
        for name in ("crop", "starts"):
            method = getattr(AudioReader, name)
            monkeypatch.setattr(AudioReader, name, after(method))

    return begin


def test_what_can_be_read_at_the_end_is_embedded_by_the_next_run(embed, outage):
    whole = embed("whole")
    outage()
    with pytest.raises(RuntimeError, match=r"^3 files .* same command again"):
        embed("away")
    save = whole.parents[1] / "away" / "save"
    assert all(".partial." in path.name for path in save.iterdir())
    embed("away")
    assert contents(save) == contents(whole)
    lists = [f / "audio_audioset_skipped.csv" for f in (whole, save)]
    assert lists[0].read_bytes() == lists[1].read_bytes()


def test_files_that_can_be_read_at_the_end_are_counted_once(
    embed, monkeypatch, tmp_path
):
    flags = {"windows_per_clip": "all", "text_pathfile": None}
    with monkeypatch.context() as stopped:
        stopped.setattr(EmbeddingWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(**flags)
    path = tmp_path / "run" / "save" / "audio_audioset.partial.fate.npy"
    fates = np.load(path, "r+")
    fates[-3:] = SKIPPED  # windows of the last file
    fates.flush()
    with pytest.raises(RuntimeError, match=r"^1 files .* same command again"):
        embed(**flags)
    embed(**flags)


def test_all_processes_stop_for_what_can_be_read_at_the_end(
    embed, monkeypatch, tmp_path
):
    whole = embed("whole")
    with monkeypatch.context() as stopped:
        stopped.setattr(EmbeddingWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed("two")
    save = tmp_path / "two" / "save"
    fates = np.load(save / "audio_audioset.partial.fate.npy", "r+")
    fates[[3, 20]] = SKIPPED
    fates.flush()

    def main(flags):
        torchrun("microsoft_curation_toemb.py", flags)

    with pytest.raises(AssertionError, match="2 files .* can be read now"):
        embed("two", main=main)
    embed("two")
    assert contents(save) == contents(whole)


def test_files_whose_windows_are_not_known_are_left_out(embed, world, outage):
    outage()
    save = embed(windows_per_clip="all", text_pathfile=None)
    skipped = pd.read_csv(save / "audio_audioset_skipped.csv")
    names = [str(world / f"{i}, $x.wav") for i in (3, 4, 7, 9, 20)]
    assert skipped["path"].tolist() == names
    assert "when its windows were listed" in skipped["reason"][0]
    manifest = open_embeddings(save, "audio_audioset", "wav_path").manifest
    assert not manifest["wav_path"].isin(names).any()


def test_nothing_that_can_be_read(embed, tmp_path):
    (tmp_path / "list.txt").write_text("absent.wav\nagain absent.wav\n")
    with pytest.raises(ValueError, match="None of the 2 files"):
        embed(audio_pathfile=tmp_path / "list.txt")
    save = tmp_path / "run" / "save"
    assert [p.name for p in save.iterdir()] == ["audio_audioset_skipped.csv"]
    skipped = pd.read_csv(save / "audio_audioset_skipped.csv")
    assert skipped["path"].str.contains("absent").tolist() == [True, True]


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_store_is_read_to_its_end_when_another_takes_its_place(
    tmp_path, order
):
    first = np.random.default_rng(0).random((20, 4)).astype(np.float16)
    second = np.zeros((3, 4), np.float16)
    names = pd.DataFrame({"caption": [str(i) for i in range(20)]})
    names.to_csv(tmp_path / "x.csv", index=False)
    path = tmp_path / "x_embeddings.npy"
    np.save(path, np.asarray(first, order=order))
    found = open_embeddings(tmp_path, "x", "caption")
    found.info = {}  # of this program: as it is
    for replaced in (False, True):
        if replaced:
            np.save(tmp_path / "new.npy", second)
            (tmp_path / "new.npy").replace(path)
        np.testing.assert_array_equal(found[5:17], first[5:17])
    np.testing.assert_array_equal(np.load(path), second)


def test_items_that_nobody_embedded_are_not_forgotten(tmp_path):
    def writer():
        new = EmbeddingWriter(tmp_path, "x", "caption", 5, 2, {"weights": "a"})
        batches = batched(range(5), 5)
        return new, new.work(batches, "item", noprogressbar=True)[0]

    half, _ = writer()
    half.write([0, 1, 4], torch.ones(3, 2))
    half.skip([2])
    table = pd.DataFrame({"caption": list("abcd")})
    with pytest.raises(RuntimeError, match="1 items of .*the first .* 3, were"):
        half.finish(np.array([0, 1, 3, 4]), table, {})
    with pytest.raises(OSError, match=r"x\.partial\.lock: another process"):
        writer()
    half.lock.close()  # as when its process ends
    rest, [pending] = writer()
    assert list(pending) == [0, 1, 2, 3, 4]
    rest.write([3], torch.ones(1, 2))
    rest.finish(np.array([0, 1, 3, 4]), table, {})
    assert len(open_embeddings(tmp_path, "x", "caption")) == 4
    assert not list(tmp_path.glob("*.partial*"))


def test_a_store_that_another_process_makes_is_left_alone(tmp_path):
    """Also beside a finished one."""
    table, settings = pd.DataFrame({"caption": ["rain"]}), {"size": 2}
    write_store(f"{tmp_path}/x", [np.ones((1, 2))], table, settings, {})
    (tmp_path / "x.partial.rows.npy").touch()
    for is_left in (True, False):
        lock = tmp_path / "x.partial.lock"
        with alone(lock) if is_left else contextlib.nullcontext():
            assert EmbeddingWriter(tmp_path, "x", "caption", 1, 2, {}).finished
        assert (tmp_path / "x.partial.rows.npy").exists() == is_left


def test_a_store_that_gave_way_is_not_gone_on_with(tmp_path, monkeypatch):
    """Though what took its place is killed before all its files are there."""

    def begin(weights):
        settings = {"weights": weights}
        writer = EmbeddingWriter(
            tmp_path, "x", "caption", 2, 2, settings, replaces=True
        )
        with writer.lock:  # as if its process ended
            pending, bar = writer.work([[0], [1]], "item", noprogressbar=True)
            assert (bar.n, bar.total) == (2 - len(pending), 2)
            writer.write([0], torch.ones(1, 2))
            return pending

    assert begin("a") == [[0], [1]]
    assert begin("a") == [[1]]
    with monkeypatch.context() as stopped:
        stopped.setattr("curation.embeddings._take_space", interrupt)
        with pytest.raises(KeyboardInterrupt):
            begin("b")
    assert begin("a") == [[0], [1]]


def test_an_item_is_done_only_when_its_vector_is_written(tmp_path):
    writer = EmbeddingWriter(tmp_path, "x", "caption", 2, 2, {"weights": "a"})
    writer.work([[0, 1]], "item", noprogressbar=True)
    writer.rows.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        writer.write([0, 1], torch.ones(2, 2))
    assert writer.fate.tolist() == [WAITING, WAITING]


def test_a_store_is_put_together_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("curation.embeddings._COPY_ROWS", 2)
    writer = EmbeddingWriter(tmp_path, "x", "caption", 6, 3, {"weights": "a"})
    writer.work(batched(range(6), 4), "item", noprogressbar=True)
    vectors = torch.arange(18.0).view(6, 3)
    writer.write(list(range(6)), vectors)
    index = np.array([5, 0, 0, 3, 1])
    writer.finish(index, pd.DataFrame({"caption": list("abcde")}), {})
    store = open_embeddings(tmp_path, "x", "caption")
    np.testing.assert_array_equal(store[:], vectors.numpy()[index])


def test_embeddings_that_are_not_finite(tmp_path):
    def encode(captions):
        return torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])

    table = pd.DataFrame({"caption": ["rain", "a dog"]})
    with pytest.raises(RuntimeError, match="of 1 captions .* 'a dog'"):
        writer = captions_writer(tmp_path, "x", table, 2, {"weights": "a"})
        dump_captions(writer, table, tokenizer_of(words_of), encode, 2, "cpu")
    assert not (tmp_path / "x.json").exists()


def test_a_clip_whose_embedding_is_not_finite_is_skipped(
    embed, world, monkeypatch
):
    encode = microsoft_curation_toemb.EmbeddingBrain.embed_audio

    def overflow(brain, batch):
        vectors = encode(brain, batch).clone()
        if 3 in batch.rows:
            vectors[batch.rows.index(3), 5] = float("inf")
        return vectors

    monkeypatch.setattr(
        microsoft_curation_toemb.EmbeddingBrain, "embed_audio", overflow
    )
    save = embed(text_pathfile=None)
    store = open_embeddings(save, "audio_audioset", "wav_path")
    assert len(store) == 37 and np.isfinite(store[:]).all()
    skipped = pd.read_csv(save / "audio_audioset_skipped.csv")
    assert skipped["path"][0] == str(world / "3, $x.wav")
    assert "not finite" in skipped["reason"][0]


def test_what_a_killed_process_left_over_is_removed(embed):
    save = embed(text_pathfile=None)
    (save / "audio_audioset.partial.rows.npy").write_text("left")
    (save / "audio_audioset.partial.lock").touch()
    embed(text_pathfile=None)
    assert not list(save.glob("*.partial*"))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("audio_audioset_embeddings.npy", None, "does not exist"),
        ("audio_audioset_embeddings.npy", 0, "is not a whole .npy file"),
        ("audio_audioset_embeddings.npy", -10, "is not a whole .npy file"),
        ("audio_audioset.csv", None, "audio_audioset.csv is missing"),
        ("text_insper_embeddings.npy", -10, "is not a whole .npy file"),
        ("text_insper.csv", None, "has no manifest"),
        ("text_insper.csv", -10, "text_insper.csv"),
        ("text_insper.json", None, "it has no record"),
    ],
)
def test_a_store_that_cannot_be_opened_is_made_again(
    embed, capsys, name, damage, reason
):
    save = embed()
    before = contents(save)
    path = save / name
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(content[:damage])
    capsys.readouterr()
    embed()
    log = "".join(capsys.readouterr())
    assert log.count("is embedded again: ") == 1
    assert reason in log
    assert contents(save) == before


@pytest.mark.parametrize("kind", ["rows", "fate", "at"])
@pytest.mark.parametrize("end", [None, 0, -1])
def test_a_store_in_the_making_that_lost_a_file(
    embed, monkeypatch, tmp_path, kind, end
):
    with monkeypatch.context() as stopped:
        stopped.setattr(EmbeddingWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(text_pathfile=None)
    save = tmp_path / "run" / "save"
    path = save / f"audio_audioset.partial.{kind}.npy"
    content = path.read_bytes()
    path.unlink()
    if end is not None:
        path.write_bytes(content[:end])
    message = rf"^{path} is not whole .* delete (\S*\.partial\.json) to embed"
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as caught:
            embed(text_pathfile=None)
    os.remove(re.match(message, str(caught.value))[1])
    embed(text_pathfile=None)
    assert not list(save.glob("*.partial*"))


def test_an_empty_record_of_a_store_in_the_making(embed, monkeypatch, tmp_path):
    with monkeypatch.context() as stopped:
        stopped.setattr(EmbeddingWriter, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(text_pathfile=None)
    path = tmp_path / "run" / "save" / "audio_audioset.partial.json"
    path.write_bytes(b"")
    message = f"^{path} .*: delete it to embed from the start$"
    with pytest.raises(ValueError, match=message):
        embed(text_pathfile=None)
    path.unlink()
    embed(text_pathfile=None)


def test_a_resumed_run_does_not_choose_its_precision_again(embed, monkeypatch):
    def speed_up(of):
        monkeypatch.setattr(
            microsoft_curation_toemb,
            "product_seconds",
            lambda dtype, width: 0.1 if dtype == of else 1.0,
        )

    speed_up(torch.bfloat16)
    save = embed(text_pathfile=None, precision="auto")
    speed_up(torch.float32)
    embed(precision="auto")
    for stem in ("audio_audioset", "text_insper"):
        record = json.loads((save / f"{stem}.json").read_text())
        assert record["settings"]["precision"] == "bf16"


@pytest.mark.parametrize("stem", ["audio_audioset", "text_insper"])
@pytest.mark.parametrize("ending", ["json", "partial.json"])
def test_the_precision_of_a_folder_is_that_of_its_store(tmp_path, stem, ending):
    found = microsoft_curation_toemb.precision_of_folder
    assert found(tmp_path, "cpu") == "auto"
    for precision in ("bf16", "fp16"):
        record = {"settings": {"precision": precision}}
        (tmp_path / f"{stem}.{ending}").write_text(json.dumps(record))
        assert found(tmp_path, "cuda:0") == precision
        if precision == "bf16":
            assert found(tmp_path, "cpu") == precision
        else:
            message = rf"{stem}\.{ending} is of .* fp16, which needs a GPU"
            with pytest.raises(SystemExit, match=message):
                found(tmp_path, "cpu")


def test_missing_files_are_told_before_the_others_are_embedded(
    embed, world, capsys, monkeypatch
):
    told = (
        f"Of {{}} files of --audio_pathfile that were looked for, 1 are not "
        f"there, as {world}/9, $x.wav:"
    )
    monkeypatch.setattr(
        EmbeddingWriter, "work", lambda *_: pytest.fail("too late")
    )
    # All of them, or each third.
    for count, looked_for in ((1000, 40), (14, 14)):
        monkeypatch.setattr(microsoft_curation_toemb, "_LOOKED_FOR", count)
        with pytest.raises(pytest.fail.Exception, match="too late"):
            embed(f"run{count}", text_pathfile=None)
        assert told.format(looked_for) in capsys.readouterr().out


def test_duplicates_and_totals_are_told(embed, world, capsys):
    embed()
    printed = capsys.readouterr().out
    assert f"1 paths in {world}/list.txt are there more than once" in printed
    assert "audio_audioset: 38 windows embedded, 2 files skipped" in printed
    assert "1 captions in" in printed and "are empty" in printed
    assert "5 captions, 4 of them distinct" in printed


def test_a_file_that_is_listed_in_several_ways_is_one(tmp_path):
    path = tmp_path / "list.txt"
    lines = [" b.wav", "a.wav", "./b.wav ", "x/../a.wav", f"{tmp_path}/b.wav"]
    path.write_text("\n".join(lines))
    found = microsoft_curation_toemb.read_audio_list(path)
    assert found.to_pylist() == [f"{tmp_path}/b.wav", f"{tmp_path}/a.wav"]


def words_of(captions):
    return [len(caption.split()) for caption in captions]


def tokenizer_of(lengths):
    """What `dump_captions` asks of one."""
    return types.SimpleNamespace(
        lengths=lengths, all_cores=contextlib.nullcontext
    )


def test_captions_are_encoded_once_each_by_number_of_tokens(tmp_path):
    captions = ["c c c", "long", "b b", "long", "d d d d", "c c c", "a"]
    table = pd.DataFrame({"caption": captions})
    calls = []

    def encode(captions):
        calls.append(captions)
        return torch.tensor([[float(len(c)), 0] for c in captions])

    settings = {"weights": "a"}
    writer = captions_writer(tmp_path, "x", table, 2, settings)
    dump_captions(writer, table, tokenizer_of(words_of), encode, 3, "cpu")
    assert calls == [["a", "long", "b b"], ["c c c", "d d d d"]]
    rows = open_embeddings(tmp_path, "x", "caption").vectors[:, 0].tolist()
    assert rows == [5, 4, 3, 4, 7, 5, 1]


def test_tokens_are_those_of_transformers(text_model, tmp_path):
    """Of BERT, and of a model without types that pads on the left."""
    captions = ["a dog", " rain  " * 9, "hum", "", "no word of it: xyzzy"]
    other = {
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "truncation_side": "left",
    }
    AutoTokenizer.from_pretrained(text_model, **other).save_pretrained(tmp_path)
    shutil.copy(f"{text_model}/config.json", tmp_path)
    for folder, number in ((text_model, 3), (tmp_path, 2)):
        reference = AutoTokenizer.from_pretrained(folder)
        tokenize = CaptionTokenizer(folder, text_max_length=6)
        # Padding goes with the call: lengths are asked for in between.
        tokenize.lengths(captions)
        expected = reference(
            captions,
            padding=True,
            truncation=True,
            max_length=6,
            return_tensors="pt",
        )
        found = tokenize(captions)
        assert found.keys() == expected.keys() and len(found) == number
        for name, column in found.items():
            assert torch.equal(column, expected[name]), name


@pytest.mark.parametrize("length", [0, 2, 129, 7.5, True])
def test_a_length_that_the_text_model_does_not_take(text_model, length):
    with pytest.raises(ValueError, match="text_max_length=.* 3 to 128 tokens"):
        CaptionTokenizer(text_model, length)


def test_positions_of_a_roberta_begin_behind_its_padding(text_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    tokenizer.save_pretrained(tmp_path)
    size = {"vocab_size": len(tokenizer), "hidden_size": 8}
    config = RobertaConfig(
        **size,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=20,
        pad_token_id=3,
    )
    config.save_pretrained(tmp_path)
    longest = CaptionTokenizer(tmp_path, 16)(["dog " * 30])
    model = AutoModel.from_config(config)
    assert model(**longest).last_hidden_state.shape == (1, 16, 8)
    with pytest.raises(ValueError, match="takes 3 to 16 tokens"):
        CaptionTokenizer(tmp_path, 17)


@pytest.mark.parametrize("lacks", ["pad_token", "is_fast"])
def test_a_tokenizer_that_cannot_be_used(text_model, monkeypatch, lacks):
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    monkeypatch.setattr(type(tokenizer), lacks, None, raising=False)
    with pytest.raises(ValueError, match="take another text model"):
        CaptionTokenizer(text_model)


def test_captions_are_embedded_with_all_cores(embed, monkeypatch):
    tokenize, seen = CaptionTokenizer._encode, []

    def encode(self, captions):
        seen.append(os.environ["TOKENIZERS_PARALLELISM"])
        return tokenize(self, captions)

    monkeypatch.setattr(CaptionTokenizer, "_encode", encode)
    embed(audio_pathfile="")
    assert set(seen) == {"true"}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_all_cores_tokenize_for_a_time(text_model, monkeypatch):
    name = "TOKENIZERS_PARALLELISM"
    for before in ("false", None):
        if before:
            monkeypatch.setenv(name, before)
        else:
            monkeypatch.delenv(name)
        with CaptionTokenizer(text_model).all_cores():
            assert os.environ[name] == "true"
        assert os.environ.get(name) == before


@pytest.mark.parametrize("at_once", [2, 4096])
def test_lengths_are_numbers_of_tokens(text_model, monkeypatch, at_once):
    monkeypatch.setattr("dataset.text._LENGTHS_AT_ONCE", at_once)
    tokenize = CaptionTokenizer(text_model, text_max_length=7)
    # One is cut, and of one only [CLS] and [SEP] are left.
    captions = ["a", "  a   a ", "a " * 10, "", "a a a"]
    masks = tokenize(captions)["attention_mask"]
    assert tokenize.lengths(captions) == masks.sum(dim=1).tolist()
    assert tokenize.lengths(captions) == [3, 4, 7, 2, 5]


def test_a_store_in_the_making_may_go_on_in_another_order(tmp_path):
    table = pd.DataFrame({"caption": ["long", "b b", "c"]})

    def dump(lengths, encode):
        settings = {"weights": "a"}
        writer = captions_writer(tmp_path, "x", table, 2, settings)
        dump_captions(writer, table, tokenizer_of(lengths), encode, 1, "cpu")

    def encode(captions):
        if captions == ["b b"]:
            raise KeyboardInterrupt
        return torch.ones(1, 2)

    with pytest.raises(KeyboardInterrupt):
        dump(words_of, encode)
    dump(
        lambda captions: [-n for n in words_of(captions)],
        lambda captions: 2 * torch.ones(1, 2),
    )
    rows = open_embeddings(tmp_path, "x", "caption").vectors[:, 0].tolist()
    assert rows == [1, 2, 1]


@pytest.mark.parametrize("show", [True, False])
def test_progress_can_be_turned_off(embed, capsys, show):
    embed(noprogressbar=not show, text_pathfile=None)
    assert ("40/40" in capsys.readouterr().err) == show
    flags = {"windows_per_clip": "all", "text_pathfile": None}
    embed("all", noprogressbar=not show, **flags)
    assert ("audio headers: 100%" in capsys.readouterr().err) == show


def test_the_main_process_alone_shows_that_headers_are_read(
    embed, capsys, monkeypatch
):
    monkeypatch.setattr(EmbeddingWriter, "__init__", interrupt)
    for is_main in (True, False):
        monkeypatch.setattr(
            microsoft_curation_toemb, "if_main_process", lambda x=is_main: x
        )
        with pytest.raises(KeyboardInterrupt):
            embed(windows_per_clip="all", text_pathfile=None)
        assert ("audio headers" in capsys.readouterr().err) == is_main


def test_headers_are_read_in_threads():
    """In all of them at once, which have two tasks each and then are gone."""
    together, threads = threading.Barrier(16), set()

    def look(path):
        threads.add(threading.current_thread())
        together.wait(timeout=30)
        return path.upper()

    names = [f"{i}.wav" for i in range(256)]
    found = of_headers(look, names, hides_bar=True)
    assert found == [name.upper() for name in names]
    assert not any(thread.is_alive() for thread in threads)


def test_errors_of_threads_that_read_headers():
    def look(path):
        return 1 / path

    with pytest.raises(ZeroDivisionError):
        of_headers(look, range(100, -1, -1), hides_bar=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_pathfile": "", "text_pathfile": ""}, "--audio_pathfile"),
        ({"ssl_checkpoints_dir": ""}, "Name the weights"),
        ({"windows_per_clip": "each"}, "centre, mean, all"),
        ({"num_workers": "-1"}, "--num_workers=-1: give a whole number"),
        ({"audio_pathfile": "{}/empty"}, "lists no files"),
        ({"text_pathfile": "{}/list.txt"}, "--text_pathfile=.* caption"),
        ({"text_pathfile": "{}/commas"}, "--text_pathfile=.* Row #3"),
        ({"audio_pathfile": "{}/latin"}, "--audio_pathfile=.*'utf-8'"),
        ({"audio_bs": "0"}, "--audio_bs=0: give a whole number"),
        ({"text_bs": "-1"}, "--text_bs=-1: give a whole number"),
        ({"num_workers": "1.5"}, "--num_workers=1.5: give a whole number"),
    ],
)
def test_wrong_input(embed, world, changes, message):
    (world / "empty").write_text("\n")
    (world / "commas").write_text("ID,caption\n1,rain\n2,rain, hail\n")
    (world / "latin").write_bytes(b"caf\xe9.wav\n")
    changes = {k: v.format(world) for k, v in changes.items()}
    with pytest.raises((ValueError, SystemExit), match=message):
        embed(**changes)


def test_a_manifest_waits_on_disk(tmp_path, monkeypatch):
    table = pd.DataFrame(
        {
            "wav_path": [f"caf\xe9, {i}.wav" for i in range(20)],
            "start": [np.nan, 1.5] * 10,
        }
    )
    pieces = [table[:0], table[:9], table[9:]]
    monkeypatch.setattr("curation.embeddings._ROWS_AT_ONCE", 4)
    manifest = Manifest(iter(pieces), tmp_path)
    assert len(manifest) == 20 and list(tmp_path.iterdir()) == []
    sizes = [len(piece) for piece in manifest]
    assert sizes == [4, 4, 1, 4, 4, 3]
    found = pd.concat(manifest, ignore_index=True)
    pd.testing.assert_frame_equal(found, table)
    for name in table:
        pd.testing.assert_series_equal(manifest[name], table[name])
    for rows in ([], [19], [0, 3, 4, 8, 9, 18], range(20), [7, 7, 8]):
        found = manifest.take(np.array(rows, dtype=int)).to_pandas()
        expected = table.iloc[list(rows)].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected)
    empty = Manifest([table[:0]], tmp_path)
    assert len(empty) == 0 and empty["wav_path"].tolist() == []


def test_a_disk_without_room_for_a_manifest(embed, monkeypatch):
    save = embed(audio_pathfile=None)

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    message = f"{save} cannot hold a copy of {save}/text_insper.csv .*No space"
    with pytest.raises(OSError, match=message):
        open_embeddings(save, "text_insper", "caption")
    # Nor is it taken for a store that is broken, and made again.
    with pytest.raises(OSError, match=message):
        embed(audio_pathfile=None)


def test_hashes_of_texts_and_manifests():
    """A hash that changed would turn down all the stores that exist."""
    texts = ["", "a,b", "caf\xe9\n", "\N{DOG}"]
    marked = b"0:3:a,b6:caf\xc3\xa9\n4:\xf0\x9f\x90\x95"
    assert text_hash(texts) == hashlib.sha256(marked).hexdigest()
    assert text_hash([]) == hashlib.sha256().hexdigest()
    # In pieces, as large files are read.
    table = pd.concat(
        pd.DataFrame({"caption": piece}, dtype="str")
        for piece in (texts[:1], texts[1:])
    )
    found = manifest_hash([table], "caption")
    assert found == hashlib.sha256(marked).hexdigest()
    audio = pd.DataFrame({"wav_path": ["b", "a", "b"]})
    for times, lines in (
        (
            {"start": [10.5, np.nan, 0.1], "end": [11, np.nan, 1]},
            b"11:b\n10.5\n11.09:a\nnan\nnan9:b\n0.1\n1.0",
        ),
        ({"start": [7, 0, 7]}, b"7:b\n7\nnan7:a\n0\nnan7:b\n7\nnan"),
        ({}, b"9:b\nnan\nnan9:a\nnan\nnan9:b\nnan\nnan"),
    ):
        found = manifest_hash([audio.assign(**times)], "wav_path")
        assert found == hashlib.sha256(lines).hexdigest()


def test_hashes_of_many_texts_are_those_of_all(monkeypatch):
    monkeypatch.setattr("curation.embeddings._ROWS_AT_ONCE", 2)
    texts = ["rain", "", "caf\xe9", "a,b", "hum"]
    marked = [f"{len(t.encode())}:{t}".encode() for t in texts]
    expected = hashlib.sha256(b"".join(marked)).hexdigest()
    assert text_hash(texts) == expected
    table = pd.DataFrame({"caption": texts})
    assert manifest_hash([table], "caption") == expected


def test_stores_that_do_not_belong_together(embed):
    save = embed()
    manifest = save / "text_insper.csv"
    manifest.write_text(manifest.read_text().replace("rain", "ruin"))
    with pytest.raises(ValueError, match="was changed after"):
        open_embeddings(save, "text_insper", "caption")
    manifest.write_text("".join(manifest.read_text().splitlines(True)[:-1]))
    with pytest.raises(ValueError, match="4 rows and .* 5"):
        open_embeddings(save, "text_insper", "caption")
    manifest = save / "audio_audioset.csv"
    lines = manifest.read_text()
    for name in ("start", "end"):
        table = pd.read_csv(manifest)
        table.loc[5, name] += 0.5
        table.to_csv(manifest, index=False)
        with pytest.raises(ValueError, match="was changed after"):
            open_embeddings(save, "audio_audioset", "wav_path")
        manifest.write_text(lines)
    audio = open_embeddings(save, "audio_audioset", "wav_path")
    other = open_embeddings(save, "audio_audioset", "wav_path")
    other.info["settings"]["weights"] = "0" * 64
    with pytest.raises(ValueError, match="different weights"):
        check_same_weights(audio, other)
    with pytest.raises(FileNotFoundError, match="emb_dir"):
        open_embeddings(save, "typo", "caption")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text_insper_embeddings.npy", b"\x93NUMPY", "not a whole .npy file"),
        ("text_insper_embeddings.npy", b"", "not a whole .npy file"),
        ("text_insper_embeddings.npy", None, "not a whole .npy file"),
        ("text_insper.json", b"{}", "no record .*'manifest'|'settings'"),
        ("text_insper.json", b"{", "is no record of embeddings"),
        ("text_insper.csv", b"wav_path,text\nb,a\n", "lacks .* caption; its"),
        (
            "text_insper.csv",
            b"caption,start\na,soon\n",
            "row 2 has the start 'soon'",
        ),
    ],
)
def test_broken_files_of_a_store_are_named(embed, name, content, message):
    save = embed(audio_pathfile=None)
    path = save / name
    if content is None:
        content = path.read_bytes()[:-10]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_embeddings(str(save), "text_insper", "caption")
    assert str(caught.value).startswith(str(path))


def test_manifests_that_lack_what_is_needed(embed, tmp_path):
    save = embed()
    for stem, column, name, content in (
        ("text_insper", "caption", "files.txt", "a.wav\n"),
        ("audio_audioset", "wav_path", "captions.csv", "caption\nrain\n"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"^\S*/{name} .*{column}"):
            open_embeddings(save, stem, column, f"{tmp_path}/{name}")


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_a_list_of_files_as_manifest(embed, tmp_path, ending):
    """It has no times, but the store's own manifest of the same files has."""
    save = embed(text_pathfile=None)
    own = open_embeddings(save, "audio_audioset", "wav_path")
    listed = f"{save}/audio_audioset_files.txt"
    if ending == "csv":
        listed = f"{tmp_path}/list.csv"
        table = frame_of(own)[["wav_path"]].assign(caption="rain")
        table.to_csv(listed, index=False)
    store = open_embeddings(save, "audio_audioset", "wav_path", listed)
    pd.testing.assert_frame_equal(frame_of(store), frame_of(own))
    assert store.manifest["start"].max() > 0


@pytest.mark.parametrize("other", [None, 0, 3, 6])
def test_a_list_of_other_files_has_no_times(tmp_path, monkeypatch, other):
    """Be it one alone, in any part of the list."""
    monkeypatch.setattr("curation.embeddings._ROWS_AT_ONCE", 3)
    np.save(tmp_path / "x_embeddings.npy", np.eye(7, dtype=np.float32))
    paths = [f"{tmp_path}/{i}.wav" for i in range(7)]
    table = pd.DataFrame({"wav_path": paths, "start": 0.5})
    table.to_csv(tmp_path / "x.csv", index=False)
    if other is not None:
        paths[other] = f"{tmp_path}/other.wav"
    (tmp_path / "list.txt").write_text("\n".join(paths))
    listed = f"{tmp_path}/list.txt"
    manifest = open_embeddings(tmp_path, "x", "wav_path", listed).manifest
    assert manifest["wav_path"].tolist() == paths
    assert ("start" in manifest.schema.names) == (other is None)


def test_stores_of_other_programs_are_normalised(tmp_path, caplog):
    """But for norms that are 1 as rounding leaves them."""
    norms = np.array([5, 0, 1, 1.002, 0.998, 1.0005, 0.9995], np.float32)
    rows = norms[:, None] * np.array([0.6, 0.8], np.float32)
    np.save(tmp_path / "x_embeddings.npy", rows)
    (tmp_path / "x_files.txt").write_text("a\n" * len(rows))
    store = open_embeddings(tmp_path, "x", "wav_path")
    assert "no record" in caplog.text
    expected = np.array([1, 0, 1, 1, 1, 1.0005, 0.9995])
    found = np.linalg.norm(store[:], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(store[:3], rows[[2, 1, 2]], atol=1e-6)


def test_rows_of_other_programs_do_not_depend_on_the_block(tmp_path):
    rows = np.random.default_rng(0).standard_normal((50, 300), np.float32)
    np.save(tmp_path / "x_embeddings.npy", np.asfortranarray(rows))
    (tmp_path / "x_files.txt").write_text("a.wav\n" * 50)
    store = open_embeddings(tmp_path, "x", "wav_path")
    alone = np.concatenate([store[i : i + 1] for i in range(50)])
    assert np.array_equal(store[:], alone)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_of_other_programs_that_are_not_finite_are_named(tmp_path, value):
    rows = np.eye(5, dtype=np.float32)
    rows[3, 1] = value
    np.save(tmp_path / "x_embeddings.npy", rows)
    (tmp_path / "x_files.txt").write_text("a.wav\n" * 5)
    store = open_embeddings(tmp_path, "x", "wav_path")
    assert len(store[:3]) == 3
    message = rf"{tmp_path}/x_embeddings.npy: row 3 \(from 0\) is not finite"
    with pytest.raises(ValueError, match=message):
        store[2:5]


@pytest.mark.parametrize(
    "vectors",
    [np.ones((4, 2)), np.ones((4, 2), np.int8), np.ones(4, np.float16)],
)
def test_arrays_that_are_no_embeddings(tmp_path, vectors):
    np.save(tmp_path / "x_embeddings.npy", vectors)
    (tmp_path / "x_files.txt").write_text("a.wav\n" * 4)
    message = rf"{vectors.dtype} of shape \(4,.*\); embeddings are \(rows, d\)"
    with pytest.raises(ValueError, match=message):
        open_embeddings(tmp_path, "x", "wav_path")


@pytest.mark.parametrize("rows", [3, 5])
def test_a_manifest_of_another_length_is_refused(tmp_path, rows):
    np.save(tmp_path / "x_embeddings.npy", np.eye(4, dtype=np.float32))
    (tmp_path / "x_files.txt").write_text("a.wav\n" * rows)
    with pytest.raises(ValueError, match=f"x_files.txt has {rows} rows and"):
        open_embeddings(tmp_path, "x", "wav_path")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (" ,1", "row 6 has no wav_path"),
        (",", "row 6 has no wav_path"),
        ("a.wav,soon", "row 6 has the start 'soon', which is no number"),
    ],
)
def test_rows_of_a_manifest_that_are_wrong(
    tmp_path, monkeypatch, line, message
):
    monkeypatch.setattr("files._PIECE_ROWS", 3)
    np.save(tmp_path / "x_embeddings.npy", np.eye(6, dtype=np.float32))
    lines = ["wav_path,start", "a.wav,0", "a.wav,", "b.wav,1", "c.wav,2"]
    lines += [line, "d.wav,3"]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"x\.csv: {message}"):
        open_embeddings(tmp_path, "x", "wav_path")


def test_a_manifest_that_is_missing_is_named(embed):
    """A list of its files stands in for it, but has no times."""
    save = embed(text_pathfile=None)
    (save / "audio_audioset.csv").unlink()
    message = rf"files\.txt has no times, and {save}/audio_audioset\.csv"
    with pytest.raises(ValueError, match=message):
        open_embeddings(save, "audio_audioset", "wav_path")


@pytest.fixture
def choose_captions(world, text_model, tmp_path):
    """Runs the DS script on classes of one word each."""

    def run(save, **changes):
        (tmp_path / "classes.txt").write_text("dog\nrain\n")
        flags = {
            "dataset": "own",
            "class_path": tmp_path / "classes.txt",
            "target_csv_path": world / "captions.csv",
            "emb_dir": save,
            "output_folder": tmp_path / "ds",
            "text_prompt": "the sound of",
        } | changes
        retrieve_ds_t2t.main(
            argv("esc_insper_t2t_retr", world, text_model, **flags)
        )
        return pd.read_csv(save / "own_insper_t2t_ds.csv")

    return run


def naive_similarities(clap, text_model):
    tokenize = CaptionTokenizer(text_model)

    def embed(text):
        with torch.no_grad():
            vector = clap.encode_text(tokenize([text]))[0]
        return vector.half().double().numpy()

    classes = [embed(f"the sound of {name}") for name in ("dog", "rain")]
    return np.array([[embed(c) @ k for k in classes] for c in CAPTIONS])


def test_domain_specific_captions(
    embed, choose_captions, clap, text_model, tmp_path
):
    save = embed(audio_pathfile=None)
    similarities = naive_similarities(clap, text_model)
    best = similarities.max(axis=1)
    threshold = float(np.sort(np.unique(best.round(4)))[1:3].mean())
    chosen = choose_captions(save, sim_threshold=threshold)
    expected = np.flatnonzero(best >= threshold)
    assert 0 < len(expected) < len(CAPTIONS)
    assert chosen["caption"].tolist() == [CAPTIONS[i] for i in expected]
    assert chosen["ID"].tolist() == ["abcde"[i] for i in expected]
    names = np.array(["dog", "rain"])[similarities.argmax(axis=1)]
    assert chosen["class"].tolist() == names[expected].tolist()
    np.testing.assert_allclose(chosen["similarity"], best[expected], atol=2e-3)
    store = open_embeddings(save, "own_insper_t2t", "caption")
    corpus = open_embeddings(save, "text_insper", "caption")
    assert np.array_equal(store.vectors, corpus.vectors[expected])
    # Without the embedding run's store the captions are embedded anew.
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    again = choose_captions(fresh, sim_threshold=threshold)
    pd.testing.assert_frame_equal(again, chosen)


def test_similarities_are_those_to_the_class(
    embed, choose_captions, clap, text_model
):
    """Also where another class is nearer, which has enough captions."""
    save = embed(audio_pathfile=None)
    similarities = naive_similarities(clap, text_model)
    chosen = choose_captions(save, sim_threshold=1, min_captions_per_class=2)
    rows = [CAPTIONS.index(caption) for caption in chosen["caption"]]
    classes = chosen["class"].map(["dog", "rain"].index).to_numpy()
    expected = similarities[rows, classes]
    assert (expected < similarities[rows].max(axis=1) - 0.01).any()
    np.testing.assert_allclose(chosen["similarity"], expected, atol=2e-3)


def chosen_rows(similarities, captions, *limits):
    rows, classes = retrieve_ds_t2t.choose(
        np.array(similarities), pd.Series(list(captions)), *limits
    )
    return rows.tolist(), classes.tolist()


def test_captions_at_the_threshold_are_kept():
    similarities = [[0.7, 0.1], [0.2, 0.7], [0.69, 0.6]]
    assert chosen_rows(similarities, "abc", 0.7, 0) == ([0, 1], [0, 1])


def test_classes_without_captions_are_topped_up():
    similarities = [[0.9, 0.1], [0.8, 0.5], [0.2, 0.6], [0.3, 0.4]]
    expected = {
        0: ([0, 1], [0, 0]),
        1: ([0, 1, 2], [0, 0, 1]),
        2: ([0, 1, 2, 3], [0, 0, 1, 1]),
    }
    for least, found in expected.items():
        assert chosen_rows(similarities, "abcd", 0.7, least) == found


def test_captions_that_are_more_like_another_class_count_for_both():
    """Far ones do not make up for them."""
    similarities = [[0.9, 0.88], [0.8, 0.79], [0.75, 0.74], [0.1, 0.2]]
    assert chosen_rows(similarities, "abcd", 0.7, 3) == ([0, 1, 2], [0, 0, 0])
    found = chosen_rows(similarities, "abcd", 0.77, 3)
    assert found == ([0, 1, 2, 3], [0, 0, 0, 1])


def test_captions_too_few_for_all_classes_are_told(caplog):
    chosen_rows([[0.9, 0.1], [0.8, 0.5]], "ab", 0.7, 2)
    assert "per_class=2, with those that reach it: 1 classes" in caplog.text


def test_the_table_has_the_best_of_all_captions(caplog):
    """Also of those that are not kept."""
    similarities = np.array([[0.9, 0.1], [0.2, 0.6], [0.3, 0.4]])
    with caplog.at_level("INFO"):
        retrieve_ds_t2t.report(
            similarities,
            np.array([0]),
            np.array([0]),
            ["dog", "rain"],
            pd.Series(list("abc")),
            0.7,
        )
    for line in ("dog 1 0.900 a | c | b", "rain 0 0.600 b | c | a"):
        assert line in " ".join(caplog.text.split())


def test_pairs_of_captions_keep_their_audio(choose_captions, tmp_path):
    (tmp_path / "pairs").mkdir()
    table = pd.DataFrame({"caption": ["dog", "rain"]})
    table[["wav_path", "start", "end"]] = ["a/0.wav", 0.5, 2.5]
    table.to_csv(tmp_path / "pairs" / "x.csv", index=False)
    chosen = choose_captions(
        tmp_path / "pairs",
        target_csv_path=tmp_path / "pairs" / "x.csv",
        sim_threshold=-1,
    )
    assert set(chosen["wav_path"]) == {f"{tmp_path}/pairs/a/0.wav"}
    assert set(chosen["start"]) == {0.5} and set(chosen["end"]) == {2.5}


def test_captions_are_read_with_their_ids(tmp_path, caplog):
    """Those that are empty leave no gap."""
    path = tmp_path / "x.csv"
    path.write_text('other,ID,caption\nx,a," a  dog\nbarks"\nx,b, \nx,c,rain\n')
    expected = {"ID": ["a", "c"], "caption": ["a dog barks", "rain"]}
    pd.testing.assert_frame_equal(
        read_captions(path, "text_pathfile"), pd.DataFrame(expected)
    )
    assert f"1 captions in {path} are empty" in caplog.text


def test_times_of_captions_are_read_before_they_are_embedded(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("caption,wav_path,start\n,a.wav,\nrain,a.wav,0:30\n")
    message = f"^--text_pathfile={path}: row 3 has the start '0:30'"
    with pytest.raises(ValueError, match=message):
        read_captions(path, "text_pathfile")
    # Without audio they mean nothing.
    path.write_text("caption,start\nrain,0:30\n")
    assert list(read_captions(path, "text_pathfile")) == ["caption"]


def test_captions_without_audio_have_no_path(tmp_path):
    lines = "caption,wav_path\nrain,\nsnow, \nhail,a.wav\n"
    (tmp_path / "x.csv").write_text(lines)
    table = read_captions(tmp_path / "x.csv", "text_pathfile")
    assert table["wav_path"].tolist() == ["", "", f"{tmp_path}/a.wav"]


def test_equal_captions_count_once_for_a_class():
    a, b, c, d = [0.9, 0.1], [0.2, 0.6], [0.3, 0.4], [0.6, 0.3]
    similarities = [a, b, b, a, c, d]
    expected = {
        0: ([0, 3], [0, 0]),
        1: ([0, 1, 3], [0, 1, 0]),
        2: ([0, 1, 3, 4, 5], [0, 1, 0, 1, 0]),
    }
    for least, found in expected.items():
        assert chosen_rows(similarities, "abbacd", 0.7, least) == found


def test_class_lists(tmp_path):
    (tmp_path / "c.txt").write_text("air_horn\n\nrain\n")
    (tmp_path / "c.csv").write_text("label,text\na,air horn\n")

    def classes(dataset, path):
        table = retrieve_ds_t2t.read_classes(
            {"dataset": dataset, "class_path": path and str(tmp_path / path)}
        )
        return table[["label", "text"]].to_numpy().tolist()

    expected = [["air_horn", "air horn"], ["rain", "rain"]]
    assert classes("own", "c.txt") == expected
    assert classes("esc", "c.txt") == expected
    assert classes("own", "c.csv") == [["a", "air horn"]]
    sizes = [len(classes(d, None)) for d in ("esc", "tut", "us8k")]
    assert sizes == [50, 15, 10]
    with pytest.raises(ValueError, match="--class_path"):
        classes("own", None)


def test_classes_are_embedded_by_their_texts(embed, choose_captions, tmp_path):
    save = embed(audio_pathfile=None)
    named = choose_captions(save, sim_threshold=-1)
    path = tmp_path / "c.csv"
    path.write_text("label,text\na,dog\nb,rain\n")
    found = choose_captions(save, sim_threshold=-1, class_path=path)
    named["class"] = named["class"].map({"dog": "a", "rain": "b"})
    pd.testing.assert_frame_equal(found, named)


def test_captions_for_audio_of_other_weights_are_refused(
    embed, choose_captions, changed
):
    save = embed()
    with pytest.raises(SystemExit, match="embedded with other weights: give"):
        choose_captions(save, ssl_checkpoints_dir=changed / "weights")
    assert not list(save.glob("own_insper_t2t*"))


def test_nothing_reaches_the_threshold(embed, choose_captions):
    save = embed(audio_pathfile=None)
    with pytest.raises(RuntimeError, match="highest similarity is"):
        choose_captions(save, sim_threshold=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sim_threshold": 75}, "--sim_threshold=75: .* from -1 to 1"),
        ({"text_bs": 0}, "--text_bs=0"),
        ({"min_captions_per_class": 1.5}, "--min_captions_per_class=1.5"),
        ({"dataset": "a/b"}, "--dataset=a/b: .* a name without /"),
        ({"bfloat16_mix_prec": True}, "give --precision"),
        ({"debug": True}, "--debug is not taken: give few captions"),
        ({"text_prompt": "[]"}, "--text_prompt=.*: give a text"),
    ],
)
def test_flags_of_ds_that_make_no_sense(
    choose_captions, tmp_path, flags, message
):
    with pytest.raises(SystemExit, match=message):
        choose_captions(tmp_path, **flags)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_embedding_runs_captions_are_reused(
    embed, choose_captions, capsys, precision
):
    """In whatever precision they were made."""
    save = embed(audio_pathfile=None, precision=precision)
    choose_captions(save, sim_threshold=-1)
    assert not list(save.glob("*corpus*"))
    assert "is not used" not in capsys.readouterr().out
    chosen = open_embeddings(save, "own_insper_t2t", "caption")
    corpus = open_embeddings(save, "text_insper", "caption")
    assert np.array_equal(chosen.vectors, corpus.vectors)
    assert chosen.info["settings"] == corpus.info["settings"]
    assert chosen.info["text_prompt"] == "the sound of"
    assert chosen.info["versions"]["torch"] == torch.__version__.split("+")[0]


def test_other_captions_replace_the_scripts_own_store(
    embed, choose_captions, world, tmp_path, capsys
):
    save = embed(audio_pathfile=None)
    for name in ("hail", "snow"):
        other = tmp_path / f"{name}.csv"
        other.write_text(f"caption\n{name}\n")
        chosen = choose_captions(save, sim_threshold=-1, target_csv_path=other)
        assert chosen["caption"].tolist() == [name]
        corpus = open_embeddings(save, "own_t2t_corpus", "caption")
        assert corpus.manifest["caption"].tolist() == [name]
        printed = capsys.readouterr().out
        assert "text_insper in" in printed and "no record" not in printed


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"ssl_checkpoints_dir": "{}/weights"}, "weights"),
        ({"text_model": "{}/words"}, "tokenizer"),
        ({"tokenizer": "{text_max_length: 7}"}, "text_max_length"),
        ({"target_csv_path": "{}/captions.csv"}, "list"),
    ],
)
def test_captions_of_other_settings_are_embedded_anew(
    embed, choose_captions, changed, capsys, changes, name
):
    save = embed(audio_pathfile=None)
    changes = {k: v.replace("{}", str(changed)) for k, v in changes.items()}
    choose_captions(save, sim_threshold=-1, **changes)
    log = capsys.readouterr().out
    assert f"is not used (it differs in {name}): the captions are em" in log
    there, now = (
        open_embeddings(save, stem, "caption").info["settings"]
        for stem in ("text_insper", "own_t2t_corpus")
    )
    assert {key for key in now if now[key] != there[key]} == {name}


def test_captions_of_a_broken_store_are_embedded_anew(
    embed, choose_captions, capsys
):
    save = embed(audio_pathfile=None)
    whole = choose_captions(save, sim_threshold=-1)
    (save / "text_insper_embeddings.npy").unlink()
    pd.testing.assert_frame_equal(
        choose_captions(save, sim_threshold=-1), whole
    )
    assert "is not used (" in capsys.readouterr().out


def test_the_table_of_classes(embed, choose_captions, clap, text_model, capsys):
    save = embed(audio_pathfile=None)
    similarities = naive_similarities(clap, text_model)
    nearest = similarities.argmax(axis=1)
    best = similarities.max(axis=1)
    # What keeps the best caption alone, and so one class.
    winner = nearest[best.argmax()]
    threshold = np.unique(best.round(4))[-2:].mean()
    choose_captions(save, sim_threshold=float(threshold))
    printed = capsys.readouterr().out
    names = ["dog", "rain"]
    loser = names[1 - winner]
    assert f"No captions for 1 of 2 classes: {loser}. Those that" in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    counts = np.bincount(nearest[best >= threshold], minlength=2)
    for k, name in enumerate(names):
        order = np.argsort(-similarities[:, k], kind="stable")
        _, count, value, *_ = rows[name].split()
        assert int(count) == counts[k]
        assert float(value) == pytest.approx(
            similarities[order[0], k], abs=2e-3
        )
        nearest_captions = list(dict.fromkeys(CAPTIONS[i][:60] for i in order))
        shown = rows[name].split(f"{value}  ")[1].split(" | ")
        assert shown == nearest_captions[:3]
    assert f"{counts.sum()} of 5 captions kept" in printed
    # And topped up from the command line, if none reaches the threshold.
    threshold = (similarities[:, 1 - winner].max() + best.max()) / 2
    choose_captions(save, sim_threshold=float(threshold))
    assert f"{loser}. Lower --sim" in capsys.readouterr().out
    more = choose_captions(
        save, sim_threshold=float(threshold), min_captions_per_class=1
    )
    assert more["class"].tolist().count(loser) == 1


# ---- Precision -------------------------------------------------------------


def test_bf16_embeddings_are_close_to_those_in_fp32(embed):
    exact, low = (
        embed("exact", precision="fp32"),
        embed("low", precision="bf16"),
    )
    for stem in ("audio_audioset", "text_insper"):
        a, b = (
            np.load(save / f"{stem}_embeddings.npy").astype(np.float32)
            for save in (exact, low)
        )
        assert (a != b).any()
        assert ((a * b).sum(axis=1) > 0.9995).all()
        record = json.loads((low / f"{stem}.json").read_text())
        assert record["settings"]["precision"] == "bf16"


@pytest.mark.parametrize(
    ("fast", "precision"), [(1.0, "fp32"), (0.7, "fp32"), (0.6, "bf16")]
)
def test_automatic_precision_takes_what_is_faster(monkeypatch, fast, precision):
    monkeypatch.setattr(
        microsoft_curation_toemb,
        "product_seconds",
        lambda dtype, width: fast if dtype == torch.bfloat16 else 1.0,
    )
    choose = microsoft_curation_toemb.choose_precision
    assert choose("auto", "cpu") == precision
    assert choose("fp32", "cpu") == "fp32"
    for wrong in ("fp16", "half"):
        with pytest.raises(SystemExit, match="auto, fp32, bf16"):
            choose(wrong, "cpu")


# ---- A full disk -----------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_told_before_the_work(small_disk):
    def writer(count):
        return EmbeddingWriter(small_disk, "x", "caption", count, 20, {})

    with pytest.raises(OSError, match=r"need 0\.\d+ GB .*--output_folder"):
        writer(1000)
    assert not list(small_disk.iterdir())
    writer(100).work(batched(range(100), 8), "caption", noprogressbar=True)


def test_a_disk_that_fills_leaves_no_half_csv(small_disk):
    path = small_disk / "pairs.csv"
    path.write_text("of the run before")
    with (
        pytest.raises(OSError, match=r"pairs\.csv cannot be written"),
        written_whole(path) as file,
    ):
        for _ in range(1000):
            file.write(b"a line of a CSV file " * 10)
    assert path.read_text() == "of the run before"
    assert [file.name for file in small_disk.iterdir()] == ["pairs.csv"]


def test_a_disk_that_fills_leaves_the_store_before(small_disk):
    def write(count):
        rows = np.ones((count, 100), np.float16)
        table = pd.DataFrame({"caption": ["rain"] * count})
        base = f"{small_disk}/x"
        write_store(base, [rows], table, {"size": 100}, {})

    write(3)
    names = sorted(path.name for path in small_disk.iterdir())
    with pytest.raises(OSError, match=r"x_embeddings\.npy cannot be written"):
        write(1000)
    assert sorted(path.name for path in small_disk.iterdir()) == names
    assert len(open_embeddings(small_disk, "x", "caption")) == 3


def test_a_store_is_complete_before_the_one_before_goes(tmp_path, monkeypatch):
    names = ("x_embeddings.npy", "x.json", "x.csv")

    def write(caption):
        table = pd.DataFrame({"caption": [caption]})
        base, rows = f"{tmp_path}/x", np.ones((1, 2))
        write_store(base, [rows], table, {"size": 2}, {})

    def sizes(ending=""):
        return [(tmp_path / f"{n}{ending}").stat().st_size for n in names]

    remove, found = os.remove, []

    def noted(path):
        found.append(sizes(".partial"))
        remove(path)

    write("rain")
    with monkeypatch.context() as watched:
        watched.setattr(os, "remove", noted)
        write("a dog barks")
    assert found == 3 * [sizes()]


@pytest.mark.parametrize("renamed", range(3))
def test_a_kill_leaves_no_vectors_beside_other_captions(
    tmp_path, monkeypatch, renamed
):
    """Between any two of the files that take their places."""

    def write(caption):
        rows = np.full((2, 2), len(caption), np.float16)
        table = pd.DataFrame({"caption": [caption] * 2})
        base, manifest = f"{tmp_path}/x_t2t", f"{tmp_path}/x_t2t_ds.csv"
        write_store(base, [rows], table, {"size": 2}, {}, manifest)

    write("rain")
    replace, calls = os.replace, []

    def killed(*paths):
        if len(calls) == renamed:
            raise KeyboardInterrupt
        calls.append(paths)
        replace(*paths)

    with monkeypatch.context() as stopped:
        stopped.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write("a dog")
    with pytest.raises(FileNotFoundError, match="exist: run retrieve_ds_t2t"):
        open_embeddings(tmp_path, "x_t2t", "caption")
    write("a dog")
    store = open_embeddings(tmp_path, "x_t2t", "caption")
    assert store.vectors[0, 0] == len(store.manifest["caption"][0]) == 5


def test_a_store_in_the_making_has_its_place_on_the_disk(tmp_path):
    """Or a memory map would find the disk full, which kills the process."""
    writer = EmbeddingWriter(tmp_path, "x", "caption", 1000, 50, {})
    writer.work(batched(range(1000), 8), "caption", noprogressbar=True)
    for kind, size in (("rows", 100_000), ("fate", 1000), ("at", 8000)):
        found = (tmp_path / f"x.partial.{kind}.npy").stat()
        assert found.st_blocks * 512 >= size
