"""Training by the real command line, on tones with captions."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
import soundfile
import speechbrain as sb
import torch
import yaml
from conftest import (
    CAPTION,
    NOTE_PARAMETERS,
    ROOT,
    check_resume,
    final_state,
    history,
    torchrun_watched,
    write_esc_layout,
    write_noise,
)

import experiment
import microsoft_clap_train
import microsoft_zeroshot
from dataset.audio import AudioReader
from dataset.mixing import MixedBatchSampler
from dataset.pipelines import PairCollator, PairDataset, window_loader
from dataset.text import CaptionTokenizer
from dataset.text_model import make_text_model
from files import alone, write_csv
from microsoft_clap_train import CLAPBrain, EpochLogger, HistoryLogger
from models.retrieval import recalls
from models.weights import AtomicCheckpointer, find_checkpoint

HPARAMS = str(ROOT / "hparams/insper/microsoft_clap_train.yaml")
ZEROSHOT = str(ROOT / "hparams/esc/microsoft_zeroshot.yaml")


def argv(flags, **changes):
    """A command line; a flag that becomes None is deleted."""
    flags = {k: v for k, v in (flags | changes).items() if v is not None}
    return [HPARAMS, *(f"--{key}={value}" for key, value in flags.items())]


def train(flags, **changes):
    microsoft_clap_train.main(argv(flags, **changes))


def test_killed_and_resumed_equals_uninterrupted(flags, tones, tmp_path):
    """All that is random is in play."""
    flags |= {
        "curation_csv": f"{tones}/curated.csv",
        "curation_prob": 0.5,
        "number_of_epochs": 3,
        "num_workers": 1,
        "lr_schedule": "cosine",
        "warmup_steps": 3,
        "grad_accumulation_factor": 2,
        "ckpt_interval_steps": 3,
        "batch_size": 2,
    }
    check_resume(
        "microsoft_clap_train.py",
        argv(flags, output_folder=tmp_path / "whole"),
        argv(flags, output_folder=tmp_path / "killed"),
        tmp_path,
    )


def test_a_time_stamped_run_is_resumed_by_the_printed_command(
    flags, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags["output_folder"] = None
    train(flags, number_of_epochs=1)
    [run] = (tmp_path / "results" / "microsoft_clap_train").iterdir()
    train(flags, resume_interrupt=True, prev_ckpt_dir=run / "save")
    assert len(list(run.parent.iterdir())) == 1
    assert history(run)["epoch"].tolist() == [1, 2]
    assert len((run / "train_log.txt").read_text().splitlines()) == 2


def test_a_second_run_in_a_folder_is_refused(flags, tmp_path, monkeypatch):
    train(flags, number_of_epochs=1)
    run = tmp_path / "run"
    before = history(run)
    record = (run / "hyperparams.yaml").read_bytes()
    # What the other is about to write.
    (run / "save" / "CKPT+other").mkdir()
    with alone(run / "save" / "train.lock"):
        with pytest.raises(SystemExit, match="run: another process trains"):
            train(flags, base_lr=0.5)
        # It may begin between the question and the work.
        assert (run / "hyperparams.yaml").read_bytes() == record
        monkeypatch.setattr("files.is_taken", lambda path: False)
        with pytest.raises(OSError, match=r"train\.lock: another process"):
            train(flags)
    pd.testing.assert_frame_equal(history(run), before)
    assert (run / "save" / "CKPT+other").exists()
    assert not (run / "save" / "train.lock").exists()
    train(flags)
    assert not (run / "save" / "CKPT+other").exists()


def test_the_seed_is_that_of_batches_and_crops(flags, monkeypatch):
    seeds = []

    def fit(brain, counter, train_set, valid_set):
        seeds.append(train_set.batch_sampler.seed)
        seeds.extend(x.dataset.seed for x in (train_set, valid_set))

    monkeypatch.setattr(CLAPBrain, "fit", fit)
    train(flags, seed=77)
    assert seeds == [77, 77, 77]


def test_validation_takes_no_negatives_of_other_processes(flags, monkeypatch):
    """These have the same pairs."""
    seen = []

    def gather(rows):
        seen.append(torch.is_grad_enabled())
        return rows

    monkeypatch.setattr(microsoft_clap_train, "gather_with_gradient", gather)
    train(flags, number_of_epochs=1)
    assert seen and all(seen)


def test_unreadable_files_are_counted_together():
    hparams = types.SimpleNamespace(max_bad_audio=0.1)
    brain, known = types.SimpleNamespace(hparams=hparams), {}
    for name in ("a", "b", "a"):
        CLAPBrain.note_unreadable(brain, {name: "is missing"}, known, 20)
    with pytest.raises(RuntimeError, match="3 of 20 audio files"):
        CLAPBrain.note_unreadable(brain, {"c": "is missing"}, known, 20)


def test_what_a_killed_run_left_is_removed(flags, tmp_path):
    """Half of a checkpoint, and one that it was about to delete."""
    train(flags, number_of_epochs=1)
    save = tmp_path / "run" / "save"
    [first] = save.glob("CKPT+*")
    meta = yaml.safe_load((first / "CKPT.yaml").read_text())
    for name, change in (("better", -1), ("worse", 1)):
        shutil.copytree(first, save / f"CKPT+{name}")
        record = {"loss": meta["loss"] + change}
        record |= {"unixtime": meta["unixtime"] - 9}
        (save / f"CKPT+{name}" / "CKPT.yaml").write_text(
            yaml.dump(meta | record)
        )
    shutil.copytree(first, save / "CKPT+half")
    (save / "CKPT+half" / "CKPT.yaml").unlink()
    train(flags, number_of_epochs=1)
    assert {p.name for p in save.glob("CKPT+*")} == {first.name, "CKPT+better"}


def test_ctrl_c_ends_with_a_line(flags, tmp_path):
    """It comes to a loader's process too."""
    flags |= {"number_of_epochs": 1000, "num_workers": 1}
    with subprocess.Popen(
        [sys.executable, "microsoft_clap_train.py", *argv(flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        while not list((tmp_path / "run" / "save").glob("CKPT+*/CKPT.yaml")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said = process.stdout.read()
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in said
    end = said[said.index("Stopped by Ctrl-C. To go on with this run after") :]
    assert re.fullmatch(r".*:\n  python microsoft_clap_train\.py .*\n", end)


def test_a_complete_run_is_told(flags, tmp_path, capsys):
    train(flags, number_of_epochs=1)
    before = final_state(tmp_path / "run")
    assert "nothing is trained" not in capsys.readouterr().out
    train(flags, number_of_epochs=1)
    assert "a complete run of 1 epochs: nothing is" in capsys.readouterr().out
    after = final_state(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(flags, number_of_epochs=2)
    assert "nothing is trained" not in capsys.readouterr().out
    record = (tmp_path / "run" / "hyperparams.yaml").read_text()
    assert "number_of_epochs: 2\n" in record


def test_a_run_keeps_the_settings_that_it_began_with(flags, tones, tmp_path):
    train(flags, number_of_epochs=1)
    record = (tmp_path / "run" / "hyperparams.yaml").read_bytes()
    network = yaml.safe_load(flags["clap"])
    curated = {"curation_prob": 0.5, "curation_csv": f"{tones}/curated.csv"}
    frozen = network | {"freeze_text_encoder": True}
    for changes, message in (
        ({"batch_size": 2}, r"batch_size \(4 -> 2\), step \(4 .* -> 2 pairs"),
        (
            {"grad_accumulation_factor": 2},
            r"grad_accumulation_factor \(1 -> 2\)\. ",
        ),
        ({"base_lr": 0.01}, r"base_lr \(0.0001 -> 0.01\)\. "),
        ({"final_lr": 1e-9}, r"final_lr \(1e-08 -> 1e-09\)\. "),
        ({"warmup_steps": 3}, r"warmup_steps \(1000 -> 3\)\. "),
        ({"max_grad_norm": 2}, r"max_grad_norm \(.* -> 2\)\. "),
        (curated, r"curation_prob \(0 -> 0.5\)\. "),
        ({"valid_pct": 0.5}, r"valid_pct \(0.25 -> 0.5\)\. "),
        ({"short_audio": "zero"}, r"short_audio \(repeat -> zero\)\. "),
        ({"precision": "bf16"}, r"precision \(fp32 -> bf16\)\. "),
        ({"clap": network | {"hop_size": 200}}, r"hop_size \(320 -> 200\)\. "),
        (
            {"clap": network | {"dropout_factor": 0}},
            r"dropout_factor \(1 -> 0\)\. ",
        ),
        ({"clap": network | {"fmax": 4000}}, r"fmax \(8000 -> 4000\)\. "),
        ({"clap": network | {"d_proj": 4}}, r"d_proj \(8 -> 4\)\. "),
        (
            {"lr_plateau": {"factor": 0.1}},
            r"lr_plateau \({'factor': 0.5, .* -> {'factor': 0.1, ",
        ),
        (
            {"opt_class": {"weight_decay": 0.5}},
            r"opt_options \({'fused': True} -> {.*'weight_decay': 0.5}\)\. ",
        ),
        ({"clap": frozen}, r"freeze_text_encoder \(False -> True\)\. "),
        (
            {"tokenizer": {"text_max_length": 7}},
            r"text_max_length \(100 -> 7\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(flags, **changes)
    assert (tmp_path / "run" / "hyperparams.yaml").read_bytes() == record
    # An earlier version wrote down less.
    path = f"{flags['output_folder']}/save/settings.json"
    with open(path) as file:
        record = json.load(file)
    del record["training"]["lr_plateau"], record["network"]["fmax"]
    with open(path, "w") as file:
        json.dump(record, file)
    with pytest.raises(ValueError, match=r": d_proj \(8 -> 4\)\. Give"):
        train(flags, clap=network | {"d_proj": 4}, lr_plateau={"factor": 0.1})
    path = f"{flags['output_folder']}/save/train_raw.csv"
    write_csv(pd.read_csv(path)[:-1], path)
    with pytest.raises(ValueError, match=r"train_raw.csv \(\w+ -> \w+\)\. "):
        train(flags)


def test_other_settings_are_refused_before_the_pairs_are_read(
    flags, monkeypatch
):
    train(flags, number_of_epochs=1)

    def prepare(**kwargs):
        raise AssertionError

    monkeypatch.setattr("dataset.prepare_captions.prepare_captions", prepare)
    with pytest.raises(ValueError, match=r"seed \(.* 5\), base_lr \(.* 0.01"):
        train(flags, seed=5, base_lr=0.01)


def test_weights_hear_as_in_their_training(flags, tmp_path):
    train(flags, number_of_epochs=1)
    flags |= {
        "output_folder": tmp_path / "other",
        "ssl_checkpoints_dir": tmp_path / "run",
    }

    def network(**changes):
        return {"clap": str(yaml.safe_load(flags["clap"]) | changes)}

    for name, value in {"sample_rate": 18000, "hop_size": 300}.items():
        message = rf"{name} \d+ in training, {value} now\. Give the same --clap"
        with pytest.raises(ValueError, match=message):
            train(flags, **network(**{name: value}))
    train(flags, **network(duration=1.5), output_folder=tmp_path / "longer")
    log = (tmp_path / "longer" / "log.txt").read_text()
    assert "duration 1 in training, 1.5 now" in log
    train(flags, **network(sample_rate=18000, duration=1.5), recompute_mel=True)
    log = (tmp_path / "other" / "log.txt").read_text()
    assert "sample_rate 16000 in training, 18000 now; duration 1 in" in log


def test_weights_read_as_in_their_training(flags, tmp_path):
    train(flags, number_of_epochs=1)
    # As many words, one of them another.
    make_text_model([CAPTION.replace("dog", "cat")], tmp_path / "cat", 16)
    flags |= {"ssl_checkpoints_dir": tmp_path / "run", "number_of_epochs": 1}
    for text_model in (flags["text_model"], tmp_path / "cat"):
        folder = tmp_path / "next" / pathlib.Path(text_model).name
        train(flags, text_model=text_model, output_folder=folder)
        log = (folder / "log.txt").read_text()
        warned = f"with other tokens than those of --text_model={text_model}:"
        assert (warned in log) == (folder.name == "cat")


@pytest.mark.parametrize(
    ("pairs", "sizes"), [(20, [10, 10]), (3, [3]), (39, [13, 13, 13])]
)
def test_validation_batches_are_of_one_size(pairs, sizes, caplog):
    manifest = pd.DataFrame(
        {"wav_path": [f"{i // 2}.wav" for i in range(pairs)], "caption": "a"}
    )
    hparams = types.SimpleNamespace(
        batch_size=19, reader=None, seed=0, tokenizer=None, num_workers=0
    )
    hparams.use_zs_loader = False
    brain = types.SimpleNamespace(hparams=hparams, device_type="cpu")
    loader = microsoft_clap_train.make_valid_loader(brain, manifest)
    batches = list(loader.batch_sampler)
    assert [len(batch) for batch in batches] == sizes
    assert np.concatenate(batches).tolist() == list(range(pairs))
    assert ("has 2 recordings" in caplog.text) == (pairs == 3)
    assert ("recordings, whose" in caplog.text) == (pairs < 39)
    # Where the accuracy chooses, not that loss.
    caplog.clear()
    hparams.use_zs_loader = True
    microsoft_clap_train.make_valid_loader(brain, manifest)
    assert "recordings, whose" not in caplog.text


@pytest.mark.parametrize("prob", [0.5, 1])
def test_whole_batches_are_curated(flags, tmp_path, monkeypatch, prob):
    """With that probability; the curated clips are others."""
    rows = [
        (write_noise(tmp_path / f"{i}.wav", 0.5, 16000, seed=i), "hum")
        for i in range(8)
    ]
    frame = pd.DataFrame(rows, columns=["wav_path", "caption"])
    write_csv(frame, tmp_path / "curated.csv")
    batches = []
    compute = CLAPBrain.compute_forward

    def spy(brain, batch, stage):
        if stage == sb.Stage.TRAIN:
            batches.append(batch.clip_ids)
        return compute(brain, batch, stage)

    monkeypatch.setattr(CLAPBrain, "compute_forward", spy)
    flags["curation_csv"] = tmp_path / "curated.csv"
    train(flags, curation_prob=prob)
    paired = pd.read_csv(tmp_path / "run" / "save" / "train_raw.csv")
    is_curated = torch.stack(batches) >= paired["wav_path"].nunique()
    assert torch.equal(is_curated.all(dim=1), is_curated.any(dim=1))
    assert len(batches) == 2 * (36 // 4)
    # Four standard deviations of a binomial.
    near = 4 * math.sqrt(prob * (1 - prob) / len(batches))
    assert abs(is_curated.float().mean() - prob) <= near


def test_curated_paths_start_from_their_folder(flags, tones, tmp_path):
    path = tmp_path / "lists.csv"
    path.write_bytes((tones / "curated.csv").read_bytes())
    train(
        flags,
        curation_csv=path,
        curation_prob=0.5,
        data_curation_folder=tones,
        number_of_epochs=1,
    )
    curated = pd.read_csv(tmp_path / "run" / "save" / "curated_raw.csv")
    assert curated["wav_path"].str.startswith(f"{tones}/").all()


def test_flags_of_the_data_reach_its_preparation(flags, tones, tmp_path):
    values = {
        "data_annot_folder": str(tones),
        "train_csv_path": f"{tones}/curated.csv",
        "official_test_splits": False,
        "valid_pct": 0.125,
        "subset_pct": 0.75,
        "overfit_size": 11,
        "max_bad_audio": 0.375,
        "seed": 77,
    }
    (tmp_path / "pann.pth").touch()
    weights = {
        "pann_ckpt_path": f"{tmp_path}/pann.pth",
        "clap_ckpt_path": f"{tmp_path}/pann.pth",
        "ssl_checkpoints_dir": str(tmp_path),
        "ssl_checkpointer": "latest",
        "recompute_mel": True,
    }
    zeroshot = {
        "zs_dataset": "tut",
        "data_zs_folder": str(tones),
        "zs_labels_path": f"{tones}/pairs.csv",
    }
    others = {"short_audio": "zero", **weights, **zeroshot}
    command = argv(flags, **values, **others)
    hparams, _ = experiment.start(command, "opt_class")
    save_folder = f"{tmp_path}/run/save"
    expected = {"save_folder": save_folder, **values}
    assert hparams["prepare_captions"].keywords == expected
    assert hparams["reader"].short == "zero"
    objects = {name: hparams[name] for name in ("clap", "tokenizer")}
    expected = {**objects, **weights}
    assert hparams["load_weights"].keywords == expected
    names = ("dataset", "data_folder", "labels_path")
    expected = dict(zip(names, zeroshot.values()))
    assert hparams["prepare_zeroshot"].keywords == expected
    record = f"{tmp_path}/run/hyperparams.yaml"
    with pytest.raises(SystemExit, match=f"record of a run.* Give {HPARAMS}"):
        experiment.start([record, "--base_lr=0.1"], "opt_class")


def test_the_rate_halves_while_the_loss_is_no_better(
    flags, tmp_path, monkeypatch
):
    """Every third epoch, down to the final rate."""
    end_epoch = CLAPBrain.end_epoch
    losses = [5.0, 6.0, 4.0, 4.1, 4.1, 4.1, 4.2, 4.2, 4.2, 4.2]
    monkeypatch.setattr(
        CLAPBrain,
        "end_epoch",
        lambda brain, epoch, _: end_epoch(brain, epoch, losses[epoch - 1]),
    )
    monkeypatch.setattr(HistoryLogger, "draw", lambda *_: None)
    flags |= {"base_lr": 0.01, "final_lr": 0.004, "subset_pct": 0.2}
    train(flags, number_of_epochs=10)
    figures = history(tmp_path / "run")
    assert figures["valid_loss"].tolist() == losses
    assert figures["lr"].tolist() == 6 * [0.01] + 3 * [0.005] + [0.004]
    # A resumed run goes on to count.
    for epochs in (5, 10):
        flags["output_folder"] = tmp_path / "resumed"
        train(flags, number_of_epochs=epochs)
    pd.testing.assert_series_equal(
        history(tmp_path / "resumed")["lr"], figures["lr"]
    )


def test_the_scale_is_held_at_100(flags, tiny_clap, tmp_path):
    torch.nn.init.constant_(tiny_clap.logit_scale, 9.0)
    AtomicCheckpointer(tmp_path / "high", {"clap": tiny_clap}).save_checkpoint()
    train(flags, ssl_checkpoints_dir=tmp_path / "high", number_of_epochs=1)
    [scale] = history(tmp_path / "run")["logit_scale"]
    assert 90 < scale < 100.001


def test_it_learns(flags, tmp_path):
    train(flags, number_of_epochs=12, base_lr=0.005, batch_size=8)
    figures = history(tmp_path / "run")
    assert figures["train_loss"].iloc[-1] < 0.7 * figures["train_loss"].iloc[0]
    assert figures["train_data_points"].tolist() == [
        (i + 1) * (36 // 8) * 8 for i in range(12)
    ]
    assert (tmp_path / "run" / "train_history.png").stat().st_size > 0


def test_every_flag_may_be_empty(flags, tmp_path):
    with open(HPARAMS) as file:
        keys = [
            line.split(":")[0]
            for line in file
            if line[0].isalpha() and "!" not in line
        ]
    assert {"ssl_checkpointer", "prev_ckpt_dir", "base_lr"} <= set(keys)
    empty = {key: "" for key in keys if key not in flags}
    train(flags, **empty, auto_mix_prec=True)
    assert len(history(tmp_path / "run")) == 2


def test_mixed_precision_and_tensorboard(flags, tmp_path):
    train(flags, precision="bf16", eval_precision="bf16")
    assert np.isfinite(history(tmp_path / "run")["valid_loss"]).all()
    exact = tmp_path / "exact"
    train(flags, output_folder=exact, use_tensorboard=True)
    assert list((exact / "tensorboard").glob("events*"))
    low, high = history(tmp_path / "run"), history(exact)
    assert (low["train_loss"] != high["train_loss"]).all()
    np.testing.assert_allclose(low["train_loss"], high["train_loss"], rtol=0.02)


@pytest.mark.parametrize("count", [1, 2])
def test_only_the_best_and_the_last_checkpoint_are_kept(flags, tmp_path, count):
    train(flags, number_of_epochs=4, num_ckpt_keep=count)
    metas = [
        yaml.safe_load(path.read_text())
        for path in (tmp_path / "run" / "save").glob("CKPT+*/CKPT.yaml")
    ]
    losses = history(tmp_path / "run")["valid_loss"]
    kept = {*(losses.nsmallest(count).index + 1), 4}
    assert {meta["epoch"] for meta in metas} == kept
    best = find_checkpoint(tmp_path / "run").parent / "CKPT.yaml"
    assert yaml.safe_load(best.read_text())["loss"] == losses.min()


def test_recall_is_that_of_all_validation_pairs(flags, tiny_clap, tmp_path):
    train(flags, number_of_epochs=1, base_lr=0.01)
    tiny_clap.load_state_dict(final_state(tmp_path / "run"))
    pairs = pd.read_csv(tmp_path / "run" / "save" / "valid_raw.csv")
    assert len(pairs) > 2 * flags["batch_size"]
    data = PairDataset([pairs], AudioReader(16000, 1), seed=1234)
    collate = PairCollator(CaptionTokenizer(flags["text_model"]))
    batch = collate([data[row] for row in range(len(pairs))])
    with torch.no_grad():
        audio, text, _ = tiny_clap(batch.wavs, batch.tokens)
    expected = recalls(audio, text, batch.clip_ids, batch.caption_ids)
    figures = history(tmp_path / "run")
    for name, value in expected.items():
        assert figures[f"valid_{name}"].item() == pytest.approx(value)
    # Those of a batch alone are higher.
    assert expected["t2a_recall@1"] < 1


def test_zero_shot_validation_chooses_the_checkpoint(flags, tmp_path):
    write_esc_layout(tmp_path / "esc")
    # Three dogs, two rains and a siren: whatever class a network of this size
    # takes for all of them, its accuracy is that class's own.
    meta = pd.read_csv(tmp_path / "esc" / "meta" / "esc50.csv")
    meta["fold"] = 1 + meta.index.isin([0, 3, 6, 1, 4, 2])
    write_csv(meta, tmp_path / "esc" / "meta" / "esc50.csv")
    flags |= {
        "use_zs_loader": True,
        "data_zs_folder": tmp_path / "esc",
        "zs_labels_path": tmp_path / "esc" / "labels.csv",
        "zs_valid_folds": [2],
    }
    train(flags)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "are trained on" not in log
    accuracies = history(tmp_path / "run")["valid_acc"]
    # Six clips are in fold 2.
    assert np.allclose(accuracies * 6, (accuracies * 6).round())
    best = find_checkpoint(tmp_path / "run", "acc").parent / "CKPT.yaml"
    assert yaml.safe_load(best.read_text())["acc"] == accuracies.max()
    same = ("text_model", "clap", "batch_size", "num_workers")
    evaluation = {
        "data_folder": tmp_path / "esc",
        "labels_path": tmp_path / "esc" / "labels.csv",
        "folds": [2],
        "ssl_checkpoints_dir": tmp_path / "run",
        "output_folder": tmp_path / "evaluation",
        **{name: flags[name] for name in same},
    }
    microsoft_zeroshot.main(
        [ZEROSHOT, *(f"--{key}={value}" for key, value in evaluation.items())]
    )
    results = json.loads((tmp_path / "evaluation/results.json").read_text())
    assert results["accuracy"] == pytest.approx(accuracies.max())
    with pytest.raises(ValueError, match=r"zs_valid_folds \(\[2\] -> \[1\]\)"):
        train(flags, zs_valid_folds=[1])
    with pytest.raises(ValueError, match=r"text_prompt \(.* of  -> hear\)\. "):
        train(flags, text_prompt="hear")
    with pytest.raises(ValueError, match="has the folds 1, 2"):
        train(flags, zs_valid_folds=[3], output_folder=tmp_path / "other")


def test_unreadable_zero_shot_audio_is_known_before_training(flags, tmp_path):
    write_esc_layout(tmp_path / "esc")
    for path in (tmp_path / "esc" / "audio").glob("*.wav"):
        path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(RuntimeError, match="6 of 6 audio files cannot be read"):
        train(
            flags,
            use_zs_loader=True,
            data_zs_folder=tmp_path / "esc",
            zs_labels_path=tmp_path / "esc" / "labels.csv",
            zs_valid_folds=[2],
        )
    assert not (tmp_path / "run" / "train_log.txt").exists()


def break_clips(folder, count):
    """Leave only the headers of the first clips of fold 2, in ESC-50's layout.

    They are those with odd numbers.
    """
    for i in range(count):
        path = folder / "audio" / f"{2 * i + 1}.wav"
        samples, rate = soundfile.read(path)
        soundfile.write(path, np.full_like(samples, np.nan), rate, "FLOAT")


@pytest.mark.parametrize(("broken", "allowed"), [(1, 0.2), (1, 0.1), (6, 1)])
def test_unreadable_audio_in_zero_shot_validation(
    flags, tmp_path, broken, allowed
):
    write_esc_layout(tmp_path / "esc")
    break_clips(tmp_path / "esc", broken)
    flags |= {
        "use_zs_loader": True,
        "data_zs_folder": tmp_path / "esc",
        "zs_labels_path": tmp_path / "esc" / "labels.csv",
        "zs_valid_folds": [2],
        "max_bad_audio": allowed,
    }
    if broken > allowed * 6:
        with pytest.raises(RuntimeError, match="1 of 6 audio files cannot"):
            train(flags)
    elif broken == 6:
        with pytest.raises(RuntimeError, match="None of the 6 clips"):
            train(flags)
    else:
        train(flags)
        accuracies = history(tmp_path / "run")["valid_acc"]
        assert np.allclose(accuracies * 5, (accuracies * 5).round())
        log = (tmp_path / "run" / "log.txt").read_text()
        assert log.count("Skipping ") == 1


def test_zero_shot_accuracy_is_that_of_the_clips_that_were_read(
    tiny_clap, tmp_path, monkeypatch
):
    """Six of eight, in batches of three; four guesses are right."""
    paths = [
        write_noise(tmp_path / f"{i}.wav", 1, 16000, seed=i) for i in range(8)
    ]
    unreadable = {paths[1], paths[6]}
    for path in unreadable:
        pathlib.Path(path).write_text("no audio")
    true_classes = np.array([0, 1, 2, 1, 0, 2, 2, 1])
    guesses = iter([[0, 2], [1, 2, 2], [2]])
    prompted = []

    def score(clips, classes):
        scores = torch.nn.functional.one_hot(torch.tensor(next(guesses)), 3)
        assert len(clips) == len(scores)
        return scores.float()

    def embed(*args):
        prompted.append(args)

    monkeypatch.setattr(microsoft_clap_train, "class_embeddings", embed)
    monkeypatch.setattr(microsoft_clap_train, "class_scores", score)
    hparams = {"clap": tiny_clap, "tokenizer": CaptionTokenizer}
    hparams |= {"text_prompt": ["hear {}"], "max_bad_audio": 0.25}
    brain = CLAPBrain(
        {"clap": tiny_clap}, hparams=hparams, run_opts={"device": "cpu"}
    )
    brain.zeroshot_unreadable = {}
    loader = window_loader(paths, AudioReader(16000, 1), 3)
    brain.zeroshot_set = loader, true_classes, ["a", "b", "c"]
    assert brain.zeroshot_accuracy() == 4 / 6
    assert brain.zeroshot_unreadable.keys() == unreadable
    assert prompted == [
        (tiny_clap, CaptionTokenizer, ["a", "b", "c"], ["hear {}"])
    ]


def test_a_model_that_is_not_finite_replaces_no_checkpoint(
    flags, tmp_path, monkeypatch
):
    ended = CLAPBrain.on_stage_end

    def overflow(brain, stage, stage_loss, epoch=None):
        ended(brain, stage, stage_loss, epoch)
        if stage == sb.Stage.TRAIN and epoch == 2:
            brain.hparams.clap.audio_encoder.base.bn0.running_mean[0] = math.nan

    monkeypatch.setattr(CLAPBrain, "on_stage_end", overflow)
    with pytest.raises(RuntimeError, match="validation loss is nan"):
        train(flags, number_of_epochs=3)
    assert history(tmp_path / "run")["epoch"].tolist() == [1]
    [meta] = (tmp_path / "run" / "save").glob("CKPT+*/CKPT.yaml")
    assert yaml.safe_load(meta.read_text())["epoch"] == 1


def test_accumulation_and_the_cosine_count_the_same_steps(flags, tmp_path):
    """Of 9 batches an epoch 8 make 4 steps; the ninth would be the next."""
    train(
        flags,
        grad_accumulation_factor=2,
        lr_schedule="cosine",
        warmup_steps=2,
        base_lr=0.01,
        final_lr=0.001,
    )
    halfway = 0.001 + 0.009 * (1 + math.cos(math.pi * 2 / 6)) / 2
    np.testing.assert_allclose(
        history(tmp_path / "run")["lr"], [halfway, 0.001]
    )
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "The last 1 of the 9 batches of an epoch" in log


@pytest.mark.parametrize(
    ("given", "warmup"), [(0, 0), (1, 1), (4, 4), (11, 11), (12, 11), (99, 11)]
)
def test_rates_rise_in_a_line_and_fall_as_a_cosine(given, warmup):
    """Twelve steps; one beyond them has the last rate."""
    brain = types.SimpleNamespace(
        hparams=types.SimpleNamespace(
            base_lr=0.5,
            final_lr=0.1,
            warmup_steps=given,
            number_of_epochs=2,
        ),
        train_sampler=range(13),
        grad_accumulation_factor=2,
    )
    rates = []
    for brain.optimizer_step in range(14):
        rates.append(CLAPBrain.cosine_lr(brain))
    rising = np.linspace(0, 0.5, warmup + 1)[1:]
    falling = 0.3 + 0.2 * np.cos(np.linspace(0, math.pi, 12 - warmup + 1))
    np.testing.assert_allclose(rates, [*rising, *falling, 0.1])


def test_a_warm_up_without_end_is_told(flags, tmp_path):
    train(flags, lr_schedule="cosine", number_of_epochs=1)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "has 9 steps, which --warmup_steps=1000 takes all" in log


def test_zero_shot_clips_that_are_trained_on_are_told(flags, tmp_path):
    write_esc_layout(tmp_path / "esc")
    (tmp_path / "link").symlink_to("esc/audio")
    rows = [(f"link/{i}.wav", "a dog") for i in range(0, 12, 2)]
    pairs = pd.DataFrame(rows, columns=["wav_path", "caption"])
    write_csv(pairs, tmp_path / "pairs.csv")
    train(
        flags,
        train_csv_path=tmp_path / "pairs.csv",
        use_zs_loader=True,
        data_zs_folder=tmp_path / "esc",
        zs_labels_path=tmp_path / "esc" / "labels.csv",
        number_of_epochs=1,
        valid_pct=0.1,
        debug=True,
    )
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "5 of the 6 clips of --zs_valid_folds are trained on" in log


def test_debug_leaves_neither_checkpoint_nor_figures(flags, tmp_path):
    train(flags, debug=True)
    assert not list((tmp_path / "run" / "save").glob("CKPT+*"))
    train(flags)
    before = [
        (tmp_path / "run" / name).read_bytes()
        for name in ("train_history.csv", "train_log.txt")
    ]
    train(flags, debug=True)
    assert before == [
        (tmp_path / "run" / name).read_bytes()
        for name in ("train_history.csv", "train_log.txt")
    ]


def test_a_cosine_that_is_stretched_is_told(flags, tmp_path):
    flags |= {"lr_schedule": "cosine", "warmup_steps": 1}
    told = "The cosine is now that of 6 epochs: the learning rate goes from"
    for epochs in (2, 2, 6):
        train(flags, number_of_epochs=epochs)
        log = (tmp_path / "run" / "log.txt").read_text()
        assert (told in log) == (epochs == 6)
    assert "2 epochs of 9 steps of 4 pairs: 18 steps" in log


def test_runs_of_wandb_are_told_apart_by_their_folders(
    flags, tmp_path, monkeypatch
):
    runs = []

    class Wandb(types.ModuleType):
        @staticmethod
        def init(**kwargs):
            runs.append(kwargs)
            return types.SimpleNamespace(log=lambda figures, step: None)

    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    for epochs, folder in (
        (1, "a/teacher"),
        (2, "a/teacher"),
        (1, "b/teacher"),
    ):
        changes = {"number_of_epochs": epochs, "use_wandb": True}
        train(flags, output_folder=tmp_path / folder, **changes)
    first, resumed, other = (run["id"] for run in runs)
    assert first == resumed != other


def test_no_weights_are_told(flags, tmp_path):
    train(flags, number_of_epochs=1)
    told = "the audio encoder starts at random"
    assert told in (tmp_path / "run" / "log.txt").read_text()
    folder, save = tmp_path / "other", tmp_path / "run" / "save"
    train(flags, output_folder=folder, ssl_checkpoints_dir=save)
    assert told not in (folder / "log.txt").read_text()


def test_student_starts_from_a_checkpoint(flags, tmp_path):
    train(flags)
    state = final_state(tmp_path / "run")
    # With a rate of nothing only the batch norm's statistics move.
    train(
        flags,
        output_folder=tmp_path / "student",
        ssl_checkpoints_dir=tmp_path / "run" / "save",
        ssl_checkpointer="latest",
        base_lr=1e-12,
        final_lr=0,
    )
    student = final_state(tmp_path / "student")
    for name in state:
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(student[name], state[name])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 500, "smaller batch_size"),
        ("clap_ckpt_path", "{}/weights.pth", "does not fit the model"),
        ("ssl_checkpoints_dir", "{}", "holds no checkpoint"),
        ("curation_prob", 0.5, "needs --curation_csv"),
        ("curation_prob", 2, "--curation_prob=2: give a number from 0 to 1"),
        ("max_bad_audio", -1, "--max_bad_audio=-1"),
        ("max_grad_norm", -1, "--max_grad_norm=-1: give a number over 0"),
        ("max_grad_norm", 0, "--max_grad_norm=0"),
        ("num_ckpt_keep", 0, "--num_ckpt_keep=0: give a whole number"),
        ("grad_accumulation_factor", 10, "has 9 batches, fewer than"),
        ("ssl_checkpointer", "acc", "--ssl_checkpoints_dir, which is not"),
        ("use_zs_loader", True, "needs --data_zs_folder"),
        ("lr_schedule", "linear", "--lr_schedule=linear: .* plateau, cosine"),
        ("text_prompt", "[]", "--text_prompt=.*: give a text"),
        ("num_workers", -1, "--num_workers=-1: give a whole number"),
        ("seed", -1, "--seed=-1: give a whole number"),
        ("warmup_steps", 1.5, "--warmup_steps=1.5: give a whole number"),
        ("base_lr", -1, "--base_lr=-1: give a number of 0 or more"),
        ("base_lr", "1e999", "--base_lr=inf: give a number of 0 or more"),
        ("final_lr", 1, "--final_lr=1: give a number from 0 to 0.0001"),
        ("opt_class", "{{lr: 0.1}}", "give the learning rate as --base_lr"),
        ("batch_size", 1, "--batch_size=1: .* Give 2 or more"),
        ("short_audio", "mirror", "repeat"),
        ("valid_pct", 5, "valid_pct"),
    ],
)
def test_wrong_settings(flags, tmp_path, key, value, message):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises((ValueError, OSError, SystemExit), match=message):
        train(flags, **{key: str(value).format(tmp_path)})


def test_a_pair_may_have_its_others_in_another_process(flags, monkeypatch):
    monkeypatch.setattr(experiment, "rank_and_world_size", lambda: (0, 2))
    hparams, _ = experiment.start(argv(flags, batch_size=1), "opt_class")
    microsoft_clap_train.check_flags(types.SimpleNamespace(**hparams))


@pytest.mark.parametrize(
    ("gradients", "kept"),
    [
        ([1.0, -2.0, 3.0], [True, True, True]),
        ([1.0, math.nan, None], [True, False, None]),
        ([math.inf, -math.inf, 3.0], [False, False, True]),
    ],
)
def test_gradients_that_are_not_finite_are_dropped(gradients, kept):
    modules = {str(i): torch.nn.Linear(2, 2, bias=False) for i in range(3)}
    brain = CLAPBrain(modules, run_opts={"device": "cpu"})
    for layer, value in zip(modules.values(), gradients):
        if value is not None:
            layer.weight.grad = torch.ones(2, 2)
            layer.weight.grad[1, 0] = value
    brain.check_gradients()
    for layer, is_kept in zip(modules.values(), kept):
        assert (layer.weight.grad is not None) == bool(is_kept)


def test_an_overflow_costs_no_more_than_its_step(flags, tmp_path, monkeypatch):
    """A gradient that is not finite is left out, and training goes on."""
    compute = CLAPBrain.compute_objectives
    scales = []

    def overflow(brain, predictions, batch, stage):
        scales.append(predictions[2].item())
        if len(scales) == 3:
            predictions[2].register_hook(lambda gradient: gradient * math.inf)
        return compute(brain, predictions, batch, stage)

    monkeypatch.setattr(CLAPBrain, "compute_objectives", overflow)
    train(flags, number_of_epochs=1)
    assert scales[2] == scales[3] != scales[4]
    state = final_state(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_masks_of_dropout_go_by_seed_epoch_step_and_process():
    def mask(**changes):
        numbers = dict.fromkeys(("seed", "epoch", "step", "rank"), 1) | changes
        brain = types.SimpleNamespace(
            hparams=types.SimpleNamespace(
                seed=numbers["seed"],
                epoch_counter=types.SimpleNamespace(current=numbers["epoch"]),
                lr_schedule="plateau",
            ),
            train_sampler=types.SimpleNamespace(rank=numbers["rank"]),
            step=numbers["step"],
        )
        CLAPBrain.on_fit_batch_start(brain, None, True)
        return tuple(torch.rand(4).tolist())

    first = mask()
    others = {mask(**{name: 2}) for name in ("seed", "epoch", "step", "rank")}
    assert mask() == first
    assert len(others - {first}) == 4


def test_an_epoch_that_is_run_again_replaces_its_figures(tmp_path):
    """As after a stop between the history and the checkpoint."""

    lines = tmp_path / "train_log.txt"

    def log(epoch, loss, **more):
        for logger in (HistoryLogger(tmp_path), EpochLogger(lines)):
            logger.log_stats(
                {"epoch": epoch, "lr": 0.1, "logit_scale": 14.0},
                {"loss": loss},
                {"loss": loss + 1, **more},
            )
        return history(tmp_path)

    for epoch in (1, 2, 3):
        log(epoch, float(epoch))
    with open(lines, "a") as file:
        file.write("epoch: 1, torn off")
    figures = log(2, 5.0)
    assert [line.split(" - ")[1] for line in lines.open()] == [
        "train loss: 1.00e+00",
        "train loss: 5.00",
    ]
    assert figures["epoch"].tolist() == [1, 2]
    assert figures["train_loss"].tolist() == [1, 5]
    assert figures["valid_loss"].tolist() == [2, 6]
    figures = log(3, 7.0, acc=0.5)
    assert figures["epoch"].tolist() == [1, 2, 3]
    assert figures["valid_acc"].isna().tolist() == [True, True, False]


def write_bad_pairs(folder, bad):
    """Twenty pairs of files, of which some cannot be decoded."""
    rows = []
    for i in range(20):
        path = folder / f"{i}.flac"
        write_noise(path, 3.0, 16000, seed=i)
        if i < bad:  # its header stays good
            path.write_bytes(path.read_bytes()[:4000])
        rows.append((str(path), f"dog {i}", "2.0"))
    frame = pd.DataFrame(rows, columns=["wav_path", "caption", "start"])
    write_csv(frame, folder / "pairs.csv")
    return folder / "pairs.csv"


def test_unreadable_audio_is_skipped_counted_and_limited(flags, tmp_path):
    flags["train_csv_path"] = write_bad_pairs(tmp_path, bad=3)
    # The second run goes on with the first, and knows what that met.
    for epochs in (2, 3):
        train(flags, max_bad_audio=0.2, number_of_epochs=epochs)
        log = (tmp_path / "run" / "log.txt").read_text()
        assert log.count("Skipping ") == 3
    assert "3 audio files were skipped" in log
    with pytest.raises(RuntimeError, match=r"max_bad_audio=0\.1"):
        train(flags, max_bad_audio=0.1, output_folder=tmp_path / "other")


NOTE_FIGURES = """
of_script = script.CLAPBrain.on_stage_end

def on_stage_end(brain, stage, loss, epoch):
    if stage == script.sb.Stage.TRAIN:
        note(script.json.dumps([float(loss), sorted(brain.unreadable)]))
    of_script(brain, stage, loss, epoch)

script.CLAPBrain.on_stage_end = on_stage_end
of_saving = script.CLAPBrain._save_intra_epoch_ckpt

def save(brain):
    before = brain.avg_train_loss
    of_saving(brain)
    note(script.json.dumps([before, brain.avg_train_loss]))

script.CLAPBrain._save_intra_epoch_ckpt = save
"""


def test_figures_are_those_of_all_processes(flags, tmp_path):
    flags["train_csv_path"] = write_bad_pairs(tmp_path, bad=8)
    flags |= {"max_bad_audio": 0.5, "number_of_epochs": 1}
    flags |= {"batch_size": 2, "ckpt_interval_steps": 2}
    noted = torchrun_watched(
        "microsoft_clap_train.py", argv(flags), tmp_path, NOTE_FIGURES
    )
    at_save, at_end = zip(*([json.loads(note) for note in of] for of in noted))
    # What is saved is that of the first process, and loaded by both.
    before, saved = zip(*at_save)
    assert before[0] != before[1]
    assert saved == (pytest.approx(np.mean(before)),) * 2
    losses, unreadable = zip(*at_end)
    [figures] = history(tmp_path / "run").to_dict("records")
    assert losses[0] != losses[1]
    assert figures["train_loss"] == pytest.approx(np.mean(losses))
    everyone = set().union(*unreadable)
    assert len(everyone) > len(unreadable[0])
    assert figures["train_unreadable"] == len(everyone)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert all(f"Skipping {path}" in log for path in everyone)


def test_clips_are_those_of_all_processes_since_the_start(monkeypatch):
    """Of an epoch that goes on at its third step: two, of eight pairs."""
    brain = types.SimpleNamespace(
        step=3,
        unreadable={"a.wav": "is missing"},
        num_clips=1,
        note_unreadable=lambda *_: None,
        train_sampler=MixedBatchSampler(40, 4, world_size=2),
    )
    clock = iter([10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(
        microsoft_clap_train.time, "perf_counter", clock.__next__
    )
    CLAPBrain.on_stage_start(brain, sb.Stage.TRAIN, 2)
    brain.step = 5
    CLAPBrain.on_stage_end(brain, sb.Stage.TRAIN, 0.5, 2)
    assert brain.train_stats == {
        "loss": 0.5,
        "clips_per_second": 4.0,
        "data_points": 80,
        "unreadable": 1,
    }
    # Of an epoch whose last checkpoint was at its last step.
    CLAPBrain.on_stage_start(brain, sb.Stage.TRAIN, 2)
    CLAPBrain.on_stage_end(brain, sb.Stage.TRAIN, 0.5, 2)
    assert math.isnan(brain.train_stats["clips_per_second"])


def test_torchrun_trains_as_one(flags, tmp_path):
    """Two gloo processes: one folder, one log, twice the batch."""
    noted = torchrun_watched(
        "microsoft_clap_train.py", argv(flags), tmp_path, NOTE_PARAMETERS
    )
    # Gradients are those of both, so that the models stay the same.
    assert noted[0] == noted[1] and len(set(noted[0])) == 2
    figures = history(tmp_path / "run")
    assert figures["epoch"].tolist() == [1, 2]
    assert (
        len((tmp_path / "run" / "train_log.txt").read_text().split("\n")) == 3
    )
    # 36 pairs make 4 batches of 2 x 4.
    assert figures["train_data_points"].tolist() == [32, 64]
    assert not any("module." in name for name in final_state(tmp_path / "run"))
