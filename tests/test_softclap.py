"""Training of students by the real command line, on tones with captions."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    CAPTION,
    NOTE_PARAMETERS,
    ROOT,
    check_resume,
    final_state,
    history,
    torchrun_watched,
    write_esc_layout,
)

import microsoft_clap_train
import softclap_train
from dataset.text_model import make_text_model
from files import write_csv
from models.weights import (
    AtomicCheckpointer,
    export_microsoft,
    find_checkpoint,
    load_weights,
)

TEACHER = str(ROOT / "hparams/insper/microsoft_clap_train.yaml")
STUDENT = str(ROOT / "hparams/insper/softclap_train.yaml")


def argv(yaml_file, flags, **changes):
    """A command line; a flag that becomes None is deleted."""
    flags = {k: v for k, v in (flags | changes).items() if v is not None}
    return [yaml_file, *(f"--{key}={value}" for key, value in flags.items())]


def train(flags, **changes):
    softclap_train.main(argv(STUDENT, flags, **changes))


@pytest.fixture
def teacher(flags, tmp_path):
    """`save` folder of a teacher that was trained for an epoch."""
    folder = tmp_path / "teacher"
    flags = flags | {"output_folder": folder, "number_of_epochs": 1}
    microsoft_clap_train.main(argv(TEACHER, flags))
    return folder / "save"


@pytest.fixture
def student(flags, teacher, tones):
    """Flags of a student that is trained on curated pairs and replay."""
    return flags | {
        "ssl_checkpoints_dir": teacher,
        "curation_csv": tones / "curated.csv",
        "curation_prob": 0.5,
    }


def test_no_share_of_the_teacher_is_the_hard_loss(student, tmp_path):
    train(student, softclap_beta=0)
    hard = tmp_path / "hard"
    microsoft_clap_train.main(argv(TEACHER, student, output_folder=hard))
    soft = final_state(tmp_path / "run")
    for name, parameter in final_state(hard).items():
        assert torch.equal(soft[name], parameter), name


def test_the_loss_is_that_of_the_teachers_similarities(
    student, teacher, tmp_path, monkeypatch
):
    """By the formula, from the embeddings of the first step."""
    seen = []
    compute = softclap_train.SoftCLAPBrain.compute_objectives

    def spy(brain, predictions, batch, stage):
        loss = compute(brain, predictions, batch, stage)
        if not seen:
            seen.append((brain, batch, *predictions, loss))
        return loss

    monkeypatch.setattr(softclap_train.SoftCLAPBrain, "compute_objectives", spy)
    train(student, softclap_beta=0.25, softclap_tau=0.5)
    brain, batch, audio, text, scale, loss = seen[0]

    reference = brain.hparams.clap  # any model of the right shape
    load_weights(reference, ssl_checkpoints_dir=teacher)
    reference.eval()
    with torch.no_grad():
        own = reference(batch.wavs, batch.tokens)[:2]
    expected = 0
    clips, captions = batch.clip_ids.numpy(), batch.caption_ids.numpy()
    for a, b, z in ((audio, text, own[0]), (text, audio, own[1])):
        logits = (scale * a @ b.T).detach().double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        soft = np.exp((z @ z.T).double().numpy() / 0.5)
        for i in range(4):
            same = (clips == clips[i]) | (captions == captions[i])
            target = 0.75 * same / same.sum() + 0.25 * soft[i] / soft[i].sum()
            expected -= (target * log_p[i]).sum() / 4 / 2
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_the_teacher_stays_as_it_was_and_out_of_checkpoints(
    student, teacher, tmp_path, monkeypatch
):
    brains = []
    init = softclap_train.SoftCLAPBrain.__init__
    monkeypatch.setattr(
        softclap_train.SoftCLAPBrain,
        "__init__",
        lambda self, **kwargs: (brains.append(self), init(self, **kwargs))[1],
    )
    train(student, softclap_beta=1, base_lr=0.01)
    frozen = brains[0].teacher
    assert not frozen.training
    before = torch.load(find_checkpoint(teacher), weights_only=True)
    assert all(
        torch.equal(before[k], v) for k, v in frozen.state_dict().items()
    )
    optimized = brains[0].optimizer.param_groups[0]["params"]
    assert not {id(p) for p in optimized} & {id(p) for p in frozen.parameters()}
    assert final_state(tmp_path / "run").keys() == before.keys()
    files = {path.name for path in (tmp_path / "run" / "save").glob("CKPT+*/*")}
    assert not any("teacher" in name for name in files)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("ssl_checkpoints_dir", 1),
        ("ssl_checkpoints_dir ssl_checkpointer", 2),
        ("ssl_checkpoints_dir ssl_checkpointer clap_ckpt_path", 3),
        ("teacher_checkpoints_dir clap_ckpt_path", 4),
        ("teacher_checkpoints_dir teacher_checkpointer ssl_checkpoints_dir", 5),
    ],
)
def test_whose_weights_the_teacher_has(tiny_clap, tmp_path, flags, expected):
    """Each of five models holds its number in a bias."""
    states = {}

    def numbered(number):
        with torch.no_grad():
            tiny_clap.audio_encoder.base.fc1.bias.fill_(number)
        states[number] = copy.deepcopy(tiny_clap.state_dict())
        return tiny_clap

    for folder, numbers in (("ssl", (1, 2)), ("teacher", (4, 5))):
        for loss, number in enumerate(numbers):
            AtomicCheckpointer(
                tmp_path / folder, {"clap": numbered(number)}
            ).save_checkpoint({"loss": loss})
    export_microsoft(numbered(3), str(tmp_path / "clap.pth"))
    values = {
        "ssl_checkpoints_dir": tmp_path / "ssl",
        "ssl_checkpointer": "latest",
        "clap_ckpt_path": str(tmp_path / "clap.pth"),
        "teacher_checkpoints_dir": tmp_path / "teacher",
        "teacher_checkpointer": "latest",
    }
    given = {k: v if k in flags.split() else None for k, v in values.items()}
    teacher = softclap_train.load_teacher({"teacher": numbered(0), **given})
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, states[expected][name]), name


def test_a_teacher_of_another_size(student, flags, tmp_path):
    network = flags["clap"].replace(
        "width: 2, d_proj: 8", "width: 1, d_proj: 4"
    )
    other = flags | {"clap": network, "output_folder": tmp_path / "other"}
    microsoft_clap_train.main(argv(TEACHER, other, number_of_epochs=1))
    student |= {"teacher_checkpoints_dir": tmp_path / "other"}
    with pytest.raises(ValueError, match="does not fit.*of another shape"):
        train(student)
    train(student, teacher="{width: 1, d_proj: 4}")
    assert len(history(tmp_path / "run")) == 2


def test_killed_and_resumed_equals_uninterrupted(student, tmp_path):
    student |= {
        "number_of_epochs": 3,
        "ckpt_interval_steps": 3,
        "batch_size": 2,
        "num_workers": 1,
    }
    check_resume(
        "softclap_train.py",
        argv(STUDENT, student, output_folder=tmp_path / "whole"),
        argv(STUDENT, student, output_folder=tmp_path / "killed"),
        tmp_path,
    )


def test_every_flag_may_be_empty(student, tmp_path):
    keys = []
    for path in (TEACHER, STUDENT):
        with open(path) as file:
            lines = [line.strip() for line in file if line[0] not in "#\n"]
        keys += [
            line.split(":")[0]
            for line in lines
            if line[0].isalpha() and "!" not in line
        ]
    keys = [key for key in dict.fromkeys(keys) if key not in student]
    assert {"softclap_beta", "teacher_checkpointer", "base_lr"} <= set(keys)
    own = ("base", "adds", "text_pretrained", "clap", "epoch_counter")
    own += ("lr_plateau", "recoverables", "lr", "lr_min", "factor")
    own += ("patience", "dont_halve_until_epoch", "fused")
    empty = {key: "" for key in keys if key not in own}
    train(student, **empty, auto_mix_prec=True)
    assert len(history(tmp_path / "run")) == 2


@pytest.mark.parametrize("dataset", ["esc", "us8k", "tut"])
def test_zero_shot_validation(student, tmp_path, dataset):
    folder = write_layout(tmp_path / "zs", dataset)
    train(
        student,
        use_zs_loader=True,
        data_zs_folder=folder,
        zs_dataset=dataset,
        zs_labels_path=tmp_path / "zs" / "labels.csv",
        zs_valid_folds=[2],
    )
    accuracies = history(tmp_path / "run")["valid_acc"]
    assert np.allclose(accuracies * 6, (accuracies * 6).round())


def write_layout(folder, dataset):
    """Tones as one of the three data sets; returns its folder."""
    write_esc_layout(folder)
    meta = pd.read_csv(folder / "meta" / "esc50.csv")
    if dataset == "us8k":
        for fold in (1, 2):
            (folder / "audio" / f"fold{fold}").mkdir()
        for name, fold in zip(meta["filename"], meta["fold"]):
            place = folder / "audio" / f"fold{fold}" / name
            (folder / "audio" / name).rename(place)
        (folder / "metadata").mkdir()
        meta = meta.rename(
            columns={"filename": "slice_file_name", "category": "class"}
        )
        meta.to_csv(folder / "metadata" / "UrbanSound8K.csv", index=False)
    elif dataset == "tut":
        root = folder / "TUT-acoustic-scenes-2017-development"
        (root / "evaluation_setup").mkdir(parents=True)
        (folder / "audio").rename(root / "audio")
        files = "audio/" + meta["filename"] + "\t" + meta["category"] + "\n"
        (root / "meta.txt").write_text("".join(files))
        for fold in (1, 2):
            lines = "".join(files[meta["fold"] == fold])
            place = root / "evaluation_setup" / f"fold{fold}_evaluate.txt"
            place.write_text(lines)
        return root
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softclap_beta": 1.5}, "softclap_beta=1.5"),
        ({"softclap_beta": "much"}, "softclap_beta=much"),
        ({"softclap_tau": 0}, "softclap_tau=0"),
        ({"ssl_checkpoints_dir": None}, "Name the teacher"),
        ({"teacher_checkpoints_dir": "nowhere"}, "nowhere does not exist"),
        ({"teacher_checkpointer": "acc"}, "--teacher_checkpointer chooses"),
        ({"teacher": "{sample_rate: 32000}"}, "32000 Hz"),
        ({"teacher": "{text_model: OTHER}"}, "has other tokens than the"),
    ],
)
def test_wrong_settings(student, changes, message, tmp_path):
    if "OTHER" in changes.get("teacher", ""):
        make_text_model(["whale", "bat"], tmp_path / "words")
        changes = {"teacher": f"{{text_model: {tmp_path / 'words'}}}"}
    with pytest.raises(SystemExit, match=message):
        train(student, **changes)


def test_a_teacher_takes_captions_of_the_runs_length(student, tmp_path):
    make_text_model([CAPTION], tmp_path / "short", 16, max_length=110)
    changes = {"teacher": f"{{text_model: {tmp_path / 'short'}}}"}
    changes["tokenizer"] = "{text_max_length: 120}"
    with pytest.raises(ValueError, match="=120: .*short takes 3 to 110 tokens"):
        train(student, **changes)


def test_no_curated_pairs_are_told(student, tmp_path):
    for prob in (0.5, 0):
        train(student, curation_prob=prob, output_folder=tmp_path / f"{prob}")
        log = (tmp_path / f"{prob}" / "log.txt").read_text()
        told = "--curation_prob=0: the student is trained without curated"
        assert (told in log) == (prob == 0)


def test_a_run_keeps_its_teacher(student, flags, tmp_path):
    train(student, number_of_epochs=1)
    other = flags | {"output_folder": tmp_path / "other", "seed": 5}
    microsoft_clap_train.main(argv(TEACHER, other, number_of_epochs=1))
    with pytest.raises(ValueError, match=r"teacher \(\w{12} -> \w{12}\)\. "):
        train(student, teacher_checkpoints_dir=tmp_path / "other")
    for name, before in {"softclap_tau": 0.1, "softclap_beta": 0.3}.items():
        message = rf"{name} \({before} -> 0.25\)\. "
        with pytest.raises(ValueError, match=message):
            train(student, **{name: 0.25})


def test_labels_of_a_run_stay_soft_or_hard(student, tmp_path):
    train(student, number_of_epochs=1)
    with pytest.raises(ValueError, match=r"teacher \(\w{12} -> None\)\. "):
        microsoft_clap_train.main(argv(TEACHER, student))
    # The teacher's own run, whose labels are hard.
    folder = tmp_path / "teacher"
    keys = ("ssl_checkpoints_dir", "curation_csv", "curation_prob")
    same = student | dict.fromkeys(keys) | {"output_folder": folder}
    with pytest.raises(ValueError, match=r"teacher \(None -> \w{12}\)\. "):
        train(same, teacher_checkpoints_dir=folder / "save")


def test_scripts_take_their_own_settings(student):
    with pytest.raises(SystemExit, match="is of softclap_train.py"):
        microsoft_clap_train.main(argv(STUDENT, student))
    with pytest.raises(SystemExit, match="another script: it has no key teac"):
        softclap_train.main(argv(TEACHER, student))


def test_a_teacher_folder_without_a_checkpoint(student, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no checkpoint"):
        train(student, teacher_checkpoints_dir=tmp_path / "empty")


def test_curated_audio_that_is_gone(student, tones, tmp_path):
    curated = pd.read_csv(tones / "curated.csv")
    curated["wav_path"] = "gone/" + curated["wav_path"]
    write_csv(curated, tmp_path / "gone.csv")
    with pytest.raises(ValueError, match="24 of 24 audio .* --curation_csv"):
        train(student, curation_csv=tmp_path / "gone.csv")


def test_torchrun_shares_a_student(student, tmp_path):
    """Two gloo processes, the targets gathered over both."""
    noted = torchrun_watched(
        "softclap_train.py",
        argv(STUDENT, student, curation_prob=0, curation_csv=None),
        tmp_path,
        NOTE_PARAMETERS,
    )
    assert noted[0] == noted[1] and len(set(noted[0])) == 2
    assert history(tmp_path / "run")["train_data_points"].tolist() == [32, 64]
    assert not any("module." in k for k in final_state(tmp_path / "run"))
