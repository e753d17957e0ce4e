"""Embedding runs by the real command line: alignment, resume, refusals."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NETWORK, ROOT, torchrun, write_noise

import microsoft_curation_toemb
import retrieve_ds_t2t
import retrieve_from_emb_thresh
from curation.embeddings import (
    EmbeddingWriter,
    check_same_weights,
    open_embeddings,
)
from dataset.audio import AudioReader
from dataset.text import CaptionTokenizer
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


def argv(script, world, text_model, **changes):
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
        } | changes
        script = "microsoft_audioset_insper_toemb"
        main(argv(script, world, text_model, **flags))
        return tmp_path / name / "save"

    return run


def test_rows_are_the_embeddings_of_their_manifest(
    embed, world, clap, text_model
):
    save = embed()
    audio = open_embeddings(save, "audio_audioset")
    names = [i for i in range(40) if i not in (7, 9)]
    paths = [str(world / f"{i}, $x.wav") for i in names]
    assert audio.manifest["wav_path"].tolist() == paths
    files = (save / "audio_audioset_files.txt").read_text().splitlines()
    assert files == paths
    reader = AudioReader(16000, 1)
    with torch.no_grad():
        for row, (_, line) in enumerate(audio.manifest.iterrows()):
            window, _ = reader.crop(line["wav_path"], start=line["start"])
            centre, start = reader.crop(line["wav_path"])
            assert torch.equal(window, centre) and start == line["start"]
            expected = clap.encode_audio(window[None])[0].numpy()
            np.testing.assert_allclose(
                audio.block(row, row + 1)[0], expected, atol=2e-3
            )
    skipped = pd.read_csv(save / "audio_audioset_skipped.csv")
    assert skipped["path"].tolist() == [
        str(world / "7, $x.wav"),
        str(world / "9, $x.wav"),
    ]
    text = open_embeddings(save, "text_insper")
    assert text.manifest["caption"].tolist() == CAPTIONS
    assert text.manifest["ID"].tolist() == list("abcde")
    tokenize = CaptionTokenizer(text_model)
    with torch.no_grad():
        for row, caption in enumerate(CAPTIONS):
            expected = clap.encode_text(tokenize([caption]))[0].numpy()
            np.testing.assert_allclose(
                text.block(row, row + 1)[0], expected, atol=2e-3
            )
    assert text.info["distinct"] == 4
    assert text.vectors.dtype == audio.vectors.dtype == np.float16
    check_same_weights(audio, text)


def test_all_windows(embed):
    save = embed(windows_per_clip="all", text_pathfile=None)
    manifest = open_embeddings(save, "audio_audioset").manifest
    # Clip 30 is 2.5 s long.
    clip = manifest[manifest["wav_path"].str.endswith("/30, $x.wav")]
    assert clip["start"].tolist() == [0, 1, 1.5]
    assert not (save / "text_insper_embeddings.npy").exists()


def test_the_mean_is_that_of_all_windows(embed, monkeypatch):
    # More windows than are encoded at once.
    monkeypatch.setattr("models.zeroshot.WINDOWS_AT_ONCE", 2)
    every, mean = (
        open_embeddings(
            embed(name, windows_per_clip=name, text_pathfile=None),
            "audio_audioset",
        )
        for name in ("all", "mean")
    )
    rows = every.block(0, len(every))
    paths = every.manifest["wav_path"]
    assert mean.manifest["wav_path"].tolist() == paths.unique().tolist()
    for row, path in enumerate(mean.manifest["wav_path"]):
        expected = rows[paths == path].mean(axis=0)
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(
            mean.block(row, row + 1)[0], expected, atol=2e-3
        )
    assert paths.duplicated().any()
    # Training may crop anywhere.
    assert mean.manifest[["start", "end"]].isna().all(axis=None)


STORES = ("audio_audioset_embeddings.npy", "audio_audioset.csv",
          "text_insper_embeddings.npy", "text_insper.csv")  # fmt: skip


def contents(save):
    return [(save / name).read_bytes() for name in STORES]


def test_killed_and_resumed_gives_the_same_bytes(
    embed, world, text_model, tmp_path
):
    whole = embed("whole")

    def run():
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
        )
        return subprocess.Popen(
            [sys.executable, "microsoft_curation_toemb.py", *flags],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    process = run()
    save = tmp_path / "killed" / "save"
    fates = save / "audio_audioset.partial.fate.npy"

    def has_begun():
        try:
            return np.load(fates).any()
        except (FileNotFoundError, EOFError, ValueError):
            return False  # the file is not there yet, or not whole

    while not has_begun():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (save / "audio_audioset.json").exists()
    assert run().wait() == 0
    assert contents(save) == contents(whole)
    assert not list(save.glob("*.partial*"))


def test_two_processes_give_the_same_bytes(embed, tmp_path):
    whole = embed("whole")

    def main(flags):
        torchrun("microsoft_curation_toemb.py", flags)

    assert contents(embed("two", main=main)) == contents(whole)


def test_a_finished_store_is_kept_and_another_refused(embed, world):
    save = embed()
    times = [(save / name).stat().st_mtime_ns for name in STORES]
    embed()
    assert [(save / name).stat().st_mtime_ns for name in STORES] == times
    with pytest.raises(ValueError, match=r"short \(repeat there, zero now\)"):
        embed(short_audio="zero")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_pathfile": "", "text_pathfile": ""}, "--audio_pathfile"),
        ({"ssl_checkpoints_dir": ""}, "Name the weights"),
        ({"windows_per_clip": "each"}, "centre, mean or all"),
        ({"audio_pathfile": "{}/empty"}, "lists no files"),
        ({"text_pathfile": "{}/list.txt"}, "cannot be read|column caption"),
    ],
)
def test_wrong_input(embed, world, changes, message):
    (world / "empty").write_text("\n")
    changes = {k: v.format(world) for k, v in changes.items()}
    with pytest.raises((ValueError, SystemExit), match=message):
        embed(**changes)


def test_stores_that_do_not_belong_together(embed):
    save = embed()
    manifest = save / "text_insper.csv"
    manifest.write_text(manifest.read_text().replace("rain", "ruin"))
    with pytest.raises(ValueError, match="was changed after"):
        open_embeddings(save, "text_insper")
    manifest.write_text("".join(manifest.read_text().splitlines(True)[:-1]))
    with pytest.raises(ValueError, match="4 rows and .* 5"):
        open_embeddings(save, "text_insper")
    audio = open_embeddings(save, "audio_audioset")
    other = open_embeddings(save, "audio_audioset")
    other.info["settings"]["weights"] = "0" * 64
    with pytest.raises(ValueError, match="different weights"):
        check_same_weights(audio, other)
    with pytest.raises(FileNotFoundError, match="emb_dir"):
        open_embeddings(save, "typo")


def test_stores_of_other_programs_are_normalised(tmp_path, caplog):
    rows = np.array([[3, 4], [0, 0], [0.6, 0.8]], np.float32)
    np.save(tmp_path / "x_embeddings.npy", rows)
    (tmp_path / "x_files.txt").write_text("a\nb\nc\n")
    store = open_embeddings(tmp_path, "x")
    assert "no record" in caplog.text
    expected = np.array([[0.6, 0.8], [0, 0], [0.6, 0.8]], np.float32)
    np.testing.assert_allclose(store.block(0, 3), expected, atol=1e-6)


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
    store = open_embeddings(save, "own_insper_t2t")
    corpus = open_embeddings(save, "text_insper")
    assert np.array_equal(store.vectors, corpus.vectors[expected])
    # Without the embedding run's store the captions are embedded anew.
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    again = choose_captions(fresh, sim_threshold=threshold)
    pd.testing.assert_frame_equal(again, chosen)


def test_classes_without_captions_are_topped_up():
    similarities = np.array([[0.9, 0.1], [0.8, 0.5], [0.2, 0.6], [0.3, 0.4]])
    rows, classes = retrieve_ds_t2t.choose(similarities, 0.7, 0)
    assert (rows.tolist(), classes.tolist()) == ([0, 1], [0, 0])
    rows, classes = retrieve_ds_t2t.choose(similarities, 0.7, 2)
    assert (rows.tolist(), classes.tolist()) == ([0, 1, 2, 3], [0, 0, 1, 1])
    rows, classes = retrieve_ds_t2t.choose(similarities, 0.7, 1)
    assert (rows.tolist(), classes.tolist()) == ([0, 1, 2], [0, 0, 1])


def test_class_lists(tmp_path):
    (tmp_path / "c.txt").write_text("air_horn\n\nrain\n")
    (tmp_path / "c.csv").write_text("label,text\na,air horn\n")

    def names(dataset, path):
        return retrieve_ds_t2t.class_names(
            {"dataset": dataset, "class_path": path and str(tmp_path / path)}
        )

    assert names("own", "c.txt") == (["air_horn", "rain"], ["air horn", "rain"])
    assert names("own", "c.csv") == (["a"], ["air horn"])
    assert [len(names(d, None)[0]) for d in ("esc", "tut", "us8k")] == [
        50,
        15,
        10,
    ]
    with pytest.raises(ValueError, match="--class_path"):
        names("own", None)


def test_nothing_reaches_the_threshold(embed, choose_captions):
    save = embed(audio_pathfile=None)
    with pytest.raises(RuntimeError, match="highest similarity is"):
        choose_captions(save, sim_threshold=1.5)


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


def test_weights_kept_in_bf16_change_nothing_under_autocast(tiny_clap):
    wavs = 0.1 * torch.randn(3, 16000)
    tokens = {"input_ids": torch.randint(5, (3, 7))}
    found = []
    for keep in (False, True):
        if keep:
            microsoft_curation_toemb.keep_weights_in(tiny_clap, "bf16")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found.append(tiny_clap(wavs, tokens))
    for before, after in zip(*found):
        assert torch.equal(before, after)
    base = tiny_clap.audio_encoder.base
    assert base.conv_block1.conv1.weight.dtype == torch.float32
    assert base.conv_block1.conv2.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("fast", "precision"), [(1.0, "fp32"), (0.4, "bf16")])
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
    settings = {"weights": "a"}
    with pytest.raises(OSError, match=r"need 0\.\d+ GB .*--output_folder"):
        EmbeddingWriter(small_disk, "audio", 1000, 20, settings)
    assert not list(small_disk.iterdir())
    EmbeddingWriter(small_disk, "audio", 100, 20, settings)


def test_a_disk_that_fills_leaves_no_half_csv(small_disk):
    path = small_disk / "pairs.csv"
    path.write_text("of the run before")
    with (
        pytest.raises(OSError, match=r"pairs\.csv cannot be written"),
        retrieve_from_emb_thresh.written_whole(path) as file,
    ):
        for _ in range(1000):
            file.write(b"a line of a CSV file " * 10)
    assert path.read_text() == "of the run before"
    assert [file.name for file in small_disk.iterdir()] == ["pairs.csv"]
