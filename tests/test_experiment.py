"""The command line: given, deleted and empty flags, and wrong ones."""

import ast
import importlib.metadata
import multiprocessing
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT
from hyperpyyaml import load_hyperpyyaml

import experiment
import microsoft_zeroshot

YAML = """
data_folder: null
clap_ckpt_path: null
ssl_checkpointer: null
batch_size: 128
base_lr: 0.0001
text_prompt: "this is a sound of "
text_model: bert-base-uncased
seed: 1234
short_audio: repeat
time_stamp: null
resume_interrupt: False
prev_ckpt_dir: null
prev_checkpointer: null
ckpt_interval_minutes: 15
ckpt_interval_steps: 0
output_base: results
experiment_name: test
output_folder: !ref <output_base>/<experiment_name>/<time_stamp>
save_folder: !ref <output_folder>/save
network: {width: 64, depth: 3}
"""


@pytest.fixture
def yaml_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.yaml").write_text(YAML)
    return "h.yaml"


def parse(yaml_file, *flags):
    _, run_opts, overrides = experiment.parse_arguments([yaml_file, *flags])
    return run_opts, overrides


def test_values(yaml_file, tmp_path):
    weights = tmp_path / "Cnn14_mAP=0.431 #1.pth"
    weights.touch()
    run_opts, overrides = parse(
        yaml_file,
        f"--clap_ckpt_path={weights}",
        "--base_lr=1e-4",
        "--batch_size",
        "32",
        "--text_prompt=the sound of: a",
        "--network={width: 8}",
        "--device=cpu",
        "--auto_mix_prec",
        "--grad_accumulation_factor=2",
        "--max_grad_norm=1",
    )
    assert overrides == {
        "clap_ckpt_path": str(weights),
        "base_lr": 1e-4,
        "batch_size": 32,
        "text_prompt": "the sound of: a",
        "network": {"width": 8},
    }
    assert run_opts == {
        "device": "cpu",
        "auto_mix_prec": True,
        "grad_accumulation_factor": 2,
        "max_grad_norm": 1.0,
    }
    assert isinstance(run_opts["max_grad_norm"], float)


@pytest.mark.parametrize(
    "text",
    ["007", "1e3", "2024_05_01", "True", "0x1", "{}", "{a: b}", "#x", "[a]"],
)
def test_texts_stay_as_they_were_typed(yaml_file, tmp_path, text):
    (tmp_path / text).touch()
    keys = ("experiment_name", "text_model", "output_folder", "clap_ckpt_path")
    _, overrides = parse(yaml_file, *(f"--{key}={text}" for key in keys))
    assert overrides == dict.fromkeys(keys, text)


def test_home(yaml_file, tmp_path, monkeypatch):
    """A shell leaves ~ as it is after =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    _, overrides = parse(
        yaml_file,
        "--data_folder=~/data",
        "--output_folder=~",
        "--output_base=~/results",
        "--text_model=~/bert",
        "--text_prompt=~/dog",
        "--ssl_checkpointer=~",  # YAML's null
    )
    assert overrides == {
        "data_folder": f"{tmp_path}/data",
        "output_folder": str(tmp_path),
        "output_base": f"{tmp_path}/results",
        "text_model": f"{tmp_path}/bert",
        "text_prompt": "~/dog",
    }


@pytest.mark.parametrize("empty", ["", "=", "=null", "=None", "=Null"])
def test_empty_flags_are_as_if_deleted(yaml_file, empty):
    keys = ("data_folder", "ssl_checkpointer", "batch_size", "precision",
            "auto_mix_prec")  # fmt: skip
    if empty == "":
        keys = keys[:-1]  # a switch without a value is on
    flags = [f"--{key}{empty}" for key in keys]
    assert parse(yaml_file, *flags) == ({}, {})


@pytest.mark.parametrize("value", ["True", "False"])
def test_switches_take_a_value(yaml_file, value):
    run_opts, _ = parse(yaml_file, f"--auto_mix_prec={value}")
    assert run_opts == {"auto_mix_prec": value == "True"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batchsize=3"], "did you mean --batch_size"),
        (["--prec=bf16"], "did you mean --precision"),
        (["--precision=bf8"], "fp32, fp16, bf16"),
        (["--batch_size=3", "--batch_size=4"], "twice"),
        (["--data_folder=nowhere"], "--data_folder=nowhere does not exist"),
        (["batch_size=3"], "is no flag"),
        (["--grad_accumulation_factor=two"], "give a int"),
        (["--auto_mix_prec=maybe"], "give a bool"),
        (
            ["--text_prompt=[a {}, b {} c]"],
            "--text_prompt=.* no list: .*quotes",
        ),
        (["--batch_size=many"], "--batch_size=many: give a number"),
        (["--base_lr=True"], "--base_lr=True: give a number"),
        (["--seed=-1"], "--seed=-1: give a whole number from 0 to 4294967295"),
        (["--seed=1.5"], "--seed=1.5: give a whole number"),
        (["--short_audio=mirror"], "--short_audio=mirror: .* repeat, zero$"),
        (["--resume_interrupt=no"], "--resume_interrupt=no: give True or"),
        (["--output_base=r<seed>"], r"=r<seed>: <\.\.\.> stands for another"),
        (["--network=3"], r"--network=3: give --network='\{name: value"),
        (["--network={width: 3"], "give --network='{name: value"),
        (["--data_folder={a: 1}"], "--data_folder={a: 1} does not exist"),
        (["--batch_size={a: 1}"], "--batch_size={'a': 1}: give a number"),
        (["--time_stamp={a: 1}"], "--time_stamp={'a': 1}: give no {}"),
        (["--save_folder=x"], "<output_folder>/save.*give --output_folder$"),
        (["--param_file=x"], "--param_file is neither a key of"),
        (["--output_base=donn\udce9es"], "--output_base=donn.*is not UTF-8"),
    ],
)
def test_wrong_flags(yaml_file, flags, message):
    with pytest.raises(SystemExit, match=message):
        parse(yaml_file, *flags)


def test_switches_without_a_value_are_on(yaml_file):
    _, overrides = parse(yaml_file, "--resume_interrupt", "--batch_size=3")
    assert overrides == {"resume_interrupt": True, "batch_size": 3}


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many"])
def test_whole_numbers_within_limits(value):
    experiment.check_numbers({"a": 1, "b": None}, "ab", 1, whole=True)
    with pytest.raises(SystemExit, match=f"--b={value}: give a whole number "):
        experiment.check_numbers({"a": 1, "b": value}, "ab", 1, whole=True)


@pytest.mark.parametrize("value", [-1.01, 1.01, float("nan")])
def test_numbers_within_limits(value):
    experiment.check_numbers({"a": -1, "b": 0.5}, "ab", -1, 1)
    with pytest.raises(SystemExit, match=f"--a={value}: .* from -1 to 1"):
        experiment.check_numbers({"a": value}, "a", -1, 1)


def test_choices():
    experiment.check_choice({"a": "x"}, "a", ("x", "y"))
    with pytest.raises(SystemExit, match="^--a=z: give one of x, y$"):
        experiment.check_choice({"a": "z"}, "a", ("x", "y"))


@pytest.mark.parametrize("prompt", [[], [1], ["a", {}], ["a", None], {}, 3])
def test_prompts_are_texts(prompt):
    for good in ("a", "", ["a {}", "b"], ("a", "b")):
        experiment.check_prompt({"text_prompt": good})
    with pytest.raises(SystemExit, match="^--text_prompt=.*: give a text"):
        experiment.check_prompt({"text_prompt": prompt})


def test_wrong_hparams_files():
    with pytest.raises(
        SystemExit, match=r"no hyperparameter file absent\.yaml"
    ):
        experiment.parse_arguments(["absent.yaml"])
    with pytest.raises(SystemExit, match="usage"):
        experiment.parse_arguments(["--batch_size=3"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is no YAML file: "),
        (b"a: [1", "is no YAML file: "),
        (b"", "has no keys"),
        (b"- a", "has no keys"),
        (b"base: own.yaml", "names itself"),
        (b"base: h.yaml\nresume_interrupt: no", "--resume_interrupt=no: give"),
        (b"base: h.yaml\nbase_lr: null", "--base_lr=None: give a number"),
    ],
)
def test_own_hparams_files_that_are_wrong(
    yaml_file, tmp_path, content, message
):
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        experiment.parse_arguments(["own.yaml"])


@pytest.mark.parametrize("key", ["clap", "teacher"])
def test_arguments_that_an_object_has_not(key):
    path = f"{ROOT}/hparams/insper/softclap_train.yaml"
    with pytest.raises(SystemExit, match="no widht .did you mean width"):
        experiment.parse_arguments([path, f"--{key}={{widht: 3}}"])


@pytest.mark.parametrize("length", range(40, 80))
def test_two_spaces_in_a_path(tmp_path, monkeypatch, length):
    """HyperPyYAML writes texts in lines of 80 columns."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.yaml").write_text("output_folder: x\nneeded: 1\n")
    folder = f"{length * 'a'}/My  sounds  and captions"
    hparams, _ = experiment.start(
        ["h.yaml", f"--output_folder={folder}"], needs="needed"
    )
    assert hparams["output_folder"] == folder
    assert (tmp_path / folder / "hyperparams.yaml").exists()


def test_objects_that_cannot_be_made(tmp_path):
    path = f"{ROOT}/hparams/esc/microsoft_zeroshot.yaml"
    flags = ["--clap={fmax: 9}", f"--output_folder={tmp_path}/x"]
    message = f"^{re.escape(path)} with these flags: fmin=50, fmax=9: give"
    with pytest.raises(SystemExit, match=message):
        experiment.start([path, *flags], needs="folds")


@pytest.mark.parametrize("name", ["no/such/folder", "/absent"])
def test_text_models_that_are_not_there(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = f"{ROOT}/hparams/esc/microsoft_zeroshot.yaml"
    flags = [f"--text_model={name}", f"--output_folder={tmp_path}/x"]
    with pytest.raises(SystemExit, match=f"^--text_model={name} cannot be had"):
        experiment.start([path, *flags], needs="folds")


def test_a_record_names_the_file_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.yaml").write_text("output_folder: x\nneeded: 1\n")
    (tmp_path / "own.yaml").write_text("base: h.yaml\noutput_folder: run\n")
    experiment.start(["own.yaml"], needs="needed")
    with pytest.raises(SystemExit, match=f"Give {tmp_path}/own.yaml and the"):
        experiment.parse_arguments(["run/hyperparams.yaml"])


def test_errors_of_a_user_end_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.yaml").write_text("output_folder: run\nneeded: 1\n")
    experiment.start(["h.yaml"], needs="needed")
    capsys.readouterr()
    for given, is_of_the_code in (
        (ValueError("row 3 has no caption"), False),
        (FileNotFoundError(2, "No such file", "a.wav"), False),
        (RuntimeError("8 of 9 files cannot be read"), False),
        (TypeError("takes no argument"), True),
    ):
        try:
            raise given
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
        said = capsys.readouterr().out
        assert ("Traceback" in said) == is_of_the_code
        assert f"{type(given).__name__}: {given}" in said
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("Traceback (most recent call last)") == 4
    killed = "DataLoader worker (pid 7) is killed by signal: Killed. "
    sys.excepthook(RuntimeError, RuntimeError(killed), None)
    assert f"{killed}Most likely for want of memory" in capsys.readouterr().out


def test_folders_that_a_run_cannot_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.yaml").write_text("output_folder: x\nneeded: 1\n")
    (tmp_path / "file").touch()
    for folder in ("file", "file/x"):
        with pytest.raises(SystemExit, match=f"={folder}: .*file is no folder"):
            experiment.start(["h.yaml", f"--output_folder={folder}"], "needed")
    record = tmp_path / "run" / "hyperparams.yaml"
    record.parent.mkdir()
    record.write_text("# Generated\nopt_class: !name:torch.optim.Adam\n")
    with pytest.raises(SystemExit, match="=run is that of a training run"):
        experiment.start(["h.yaml", "--output_folder=run"], "needed")
    assert record.read_text().startswith("# Generated\nopt_class")
    # To the superuser no folder is closed.
    monkeypatch.setattr(os, "access", lambda path, _: path != str(tmp_path))
    message = f"=a/b: {tmp_path} may not be written to"
    with pytest.raises(SystemExit, match=message):
        experiment.start(["h.yaml", "--output_folder=a/b"], "needed")
    # Nor is it one that is derived.
    message = f"=x: {tmp_path} may not be written to"
    with pytest.raises(SystemExit, match=message):
        experiment.start(["h.yaml"], "needed")


def test_a_copy_of_the_code_is_replaced(tmp_path, monkeypatch):
    """Of a read-only installation it is read-only too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.yaml").write_text("output_folder: run\nneeded: 1\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / "experiment.py").symlink_to(tmp_path / "mine")
    experiment.start(["h.yaml"], "needed")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "run" / "experiment.py").is_symlink()


def test_what_a_script_cannot_run_in(yaml_file, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    told = "^RANK and LOCAL_RANK are set, .* not WORLD_SIZE, MASTER_ADDR. Unset"
    with pytest.raises(SystemExit, match=told):
        experiment.start([yaml_file], "seed")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    flags = [yaml_file, "--distributed_backend=nccl"]
    with pytest.raises(SystemExit, match="torchrun started: .*enough GPUs"):
        experiment.start(flags, "seed")
    monkeypatch.setattr(sys, "flags", types.SimpleNamespace(optimize=2))
    with pytest.raises(SystemExit, match="unset PYTHONOPTIMIZE"):
        experiment.start([yaml_file], "seed")


def test_a_wait_for_other_processes_is_told(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for patience, told in ((0, True), (60, False)):
        caplog.clear()
        monkeypatch.setattr(experiment, "_PATIENCE", patience)
        monkeypatch.setattr(
            experiment, "ddp_init_group", lambda _: time.sleep(0.2)
        )
        experiment._join_processes({})
        assert ("the others of WORLD_SIZE=3 processes" in caplog.text) == told


def test_paths_lead_where_the_system_says(yaml_file, tmp_path):
    (tmp_path / "real" / "data").mkdir(parents=True)
    (tmp_path / "real" / "b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "data")
    for given, expected in (
        ("link/../b", f"{tmp_path}/real/b"),
        ("real/../link", "real/../link"),
        ("link/", "link/"),
    ):
        _, overrides = parse(yaml_file, f"--data_folder={given}")
        assert overrides["data_folder"] == expected


def test_a_file_of_another_script_is_told_before_flags(yaml_file):
    with pytest.raises(SystemExit, match=f"{yaml_file} is of another script"):
        experiment.start([yaml_file, "--no_key_of_it=3"], "needed")


@pytest.mark.parametrize(
    ("base", "child", "ending"),
    [
        ("microsoft_zeroshot", "{}/microsoft_zeroshot", "zeroshot"),
        ("t2t_retr", "curation/{}_insper_t2t_retr", "insper_t2t_retr"),
    ],
)
def test_experiments_are_named_by_the_data_set(base, child, ending):
    def named(path, *flags):
        path = f"{ROOT}/hparams/{path}.yaml"
        root, _, overrides = experiment.parse_arguments([path, *flags])
        return experiment._top_level(root, overrides)["experiment_name"]

    for dataset in ("esc", "us8k", "tut"):
        assert named(child.format(dataset)) == f"{dataset}_{ending}"
    for path in (child.format("esc"), f"shared/{base}"):
        assert named(path, "--dataset=birds") == f"birds_{ending}"
        assert named(path, "--experiment_name=007") == "007"


def test_base(yaml_file, tmp_path):
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "c.yaml"
    child.write_text("base: ../h.yaml\nbatch_size: 8\nnetwork:\n    width: 4\n")
    path, _, overrides = experiment.parse_arguments(
        [str(child), "--network={depth: 1}", "--base_lr=1"]
    )
    assert (tmp_path / "h.yaml").samefile(path)
    assert overrides == {
        "batch_size": 8,
        "network": {"width": 4, "depth": 1},
        "base_lr": 1,
    }


def test_base_of_a_base_and_added_keys(yaml_file, tmp_path):
    (tmp_path / "b.yaml").write_text(
        "base: h.yaml\nbatch_size: 8\nadds:\n"
        "    beta: 0.3\n    half: !ref <batch_size> / 2\n"
        "    other: !include:part.yaml\n        depth: !ref <batch_size>\n"
    )
    (tmp_path / "part.yaml").write_text("width: 1\ndepth: 2\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\nbeta: 0.5\n")
    for flags, size in (([], 8), (["--batch_size=20"], 20)):
        root, _, overrides = experiment.parse_arguments(["c.yaml", *flags])
        with open(root) as file:
            hparams = load_hyperpyyaml(
                file, overrides, overrides_must_match=False
            )
        assert (hparams["beta"], hparams["half"]) == (0.5, size / 2)
        assert hparams["other"] == {"width": 1, "depth": size}
    with pytest.raises(SystemExit, match="did you mean --beta"):
        experiment.parse_arguments(["c.yaml", "--betta=1"])


def test_a_key_that_the_base_has_not(yaml_file, tmp_path):
    (tmp_path / "c.yaml").write_text("base: h.yaml\nbatchsize: 8\n")
    with pytest.raises(SystemExit, match=r"c\.yaml.*h\.yaml.*batchsize"):
        experiment.parse_arguments(["c.yaml"])


def test_steps_replace_minutes_between_checkpoints(yaml_file):
    _, overrides = parse(yaml_file, "--ckpt_interval_steps=5")
    assert overrides["ckpt_interval_minutes"] == 0


def test_options_that_need_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    run_opts = experiment.fit_to_device(
        {"auto_mix_prec": True, "data_parallel_backend": True, "compile": True}
    )
    assert run_opts == {"device": "cpu", "distributed_backend": "gloo"}
    assert caplog.text.count("is for a GPU") == 3
    with pytest.raises(SystemExit, match="bf16"):
        experiment.fit_to_device({"precision": "fp16"})
    assert (
        experiment.fit_to_device({"precision": "bf16"})["precision"] == "bf16"
    )


@pytest.mark.parametrize(
    "key",
    [
        "compile_module_keys",
        "compile_using_fullgraph",
        "compile_using_dynamic_shape_tracing",
        "jit",
        "jit_module_keys",
        "remove_vector_weight_decay",
        "optimizer_step_limit",
    ],
)
def test_options_that_are_not_taken(key):
    for path in ("insper/microsoft_clap_train", "esc/microsoft_zeroshot"):
        needs = "opt_class" if "train" in path else "folds"
        argv = [f"{ROOT}/hparams/{path}.yaml", f"--{key}=True", "--compile"]
        with pytest.raises(SystemExit, match=f"^--{key} is not taken: "):
            experiment.start(argv, needs)


@pytest.mark.parametrize(
    "flag",
    [
        "--test_only=True",
        "--grad_accumulation_factor=4",
        "--data_parallel_backend",
        "--auto_mix_prec",
        "--bfloat16_mix_prec",
    ],
)
@pytest.mark.parametrize(
    ("path", "needs"),
    [
        ("esc/microsoft_zeroshot", "folds"),
        ("curation/microsoft_audioset_insper_toemb", "audio_pathfile"),
        ("curation/audioset_insper_duv2_retr", "aud_ds_path"),
        ("curation/esc_insper_t2t_retr", "target_csv_path"),
    ],
)
def test_options_of_training_are_for_training(flag, path, needs):
    key = flag[2:].partition("=")[0]
    with pytest.raises(
        SystemExit, match=f"^--{key} is not taken: it is of training"
    ):
        experiment.start([f"{ROOT}/hparams/{path}.yaml", flag], needs)


def test_a_file_is_no_folder(yaml_file):
    with pytest.raises(SystemExit, match="--data_folder=.* is no folder"):
        experiment.parse_arguments([yaml_file, f"--data_folder={yaml_file}"])


@pytest.mark.parametrize("key", ["audio_pathfile", "train_csv_path"])
def test_a_folder_is_no_file(yaml_file, tmp_path, key):
    with open(yaml_file, "a") as file:
        file.write(f"{key}: null\n")
    with pytest.raises(SystemExit, match=f"--{key}={tmp_path} is a folder: "):
        experiment.parse_arguments([yaml_file, f"--{key}={tmp_path}"])


@pytest.mark.parametrize("flags", [["--help"], ["h.yaml", "-h"]])
def test_help_is_what_the_script_says(flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", microsoft_zeroshot)
    with pytest.raises(SystemExit) as stop:
        experiment.parse_arguments(flags)
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert printed.startswith("Classify sounds zero-shot: ")
    # To copy: two lines, as a shell takes them.
    assert "/microsoft_zeroshot.yaml \\\n        --data_folder=" in printed
    assert "Flags, --key=value, are the keys of the YAML file" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is unsafe")
def test_loaders_are_forked(yaml_file):
    before = multiprocessing.get_start_method()
    # What Python 3.14 begins with.
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        experiment.start([yaml_file, "--output_folder=run"], "seed")
        assert multiprocessing.get_start_method() == "fork"
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_what_a_script_cannot_begin_without(yaml_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="^Give --data_folder: clips$"):
        experiment.start(
            [f"{ROOT}/hparams/esc/microsoft_zeroshot.yaml"],
            needs="folds",
            required={"data_folder": "clips"},
        )
    assert set(tmp_path.rglob("*")) == before


def test_how_to_compile_goes_with_compiling(caplog):
    experiment.fit_to_device({"compile_mode": "default"})
    assert "not used without --compile=True" in caplog.text


@pytest.mark.parametrize("version", [(3, 12, 9), (3, 13, 0), (3, 13, 1)])
def test_compiling_is_refused_where_it_is_wrong(version, monkeypatch):
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    given = {"device": "cuda", "compile": True}
    if version == (3, 13, 0):
        with pytest.raises(SystemExit, match="--compile=True: .* 3.13.0 is wr"):
            experiment.fit_to_device(given)
    else:
        assert experiment.fit_to_device(given) == given


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("foo", " is not there: give cpu"),
        ("meta", " is not there: give cpu"),
        ("cuda:99", r": PyTorch finds \d+ GPUs"),
    ],
)
def test_a_device_that_is_not_there(device, message):
    with pytest.raises(SystemExit, match=f"^--device={device}{message}"):
        experiment.fit_to_device({"device": device})


def test_a_cpu_has_one_name():
    assert experiment.fit_to_device({"device": "cpu:0"})["device"] == "cpu"
    with pytest.raises(SystemExit, match="needs a GPU"):
        experiment.fit_to_device({"device": "cpu:0", "precision": "fp16"})


@pytest.mark.parametrize("key", ["precision", "eval_precision"])
def test_the_precision_of_scripts_that_only_evaluate(key):
    run_opts = {key: "bf16", "device": "cpu"}
    experiment.take_precision(run_opts)
    assert run_opts == {"eval_precision": "bf16", "device": "cpu"}
    run_opts = {"device": "cpu"}
    experiment.take_precision(run_opts)
    assert run_opts == {"device": "cpu"}


def test_scripts_that_only_evaluate_have_one_precision():
    both = {"precision": "bf16", "eval_precision": "bf16"}
    with pytest.raises(SystemExit, match="--eval_precision .*: give one"):
        experiment.take_precision(both)


def test_output_folder(yaml_file, tmp_path):
    overrides = {}
    assert not experiment.name_output_folder(yaml_file, overrides)
    assert list(overrides) == ["time_stamp"]
    other = {}
    experiment.name_output_folder(yaml_file, other)
    assert other["time_stamp"] > overrides["time_stamp"]
    overrides = {"time_stamp": "mine"}
    assert experiment.name_output_folder(yaml_file, overrides)
    assert overrides == {"time_stamp": "mine"}
    overrides = {"output_folder": "x"}
    assert experiment.name_output_folder(yaml_file, overrides)
    (tmp_path / "run" / "save").mkdir(parents=True)
    for previous in ("run", "run/save"):
        overrides = {"resume_interrupt": True, "prev_ckpt_dir": previous}
        assert experiment.name_output_folder(yaml_file, overrides)
        assert overrides["output_folder"] == str(tmp_path / "run")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("run")
        parse(yaml_file, f"--prev_ckpt_dir={previous}", "--output_folder=link")
        with pytest.raises(SystemExit, match="=other and .* are two runs"):
            parse(
                yaml_file,
                f"--prev_ckpt_dir={previous}",
                "--output_folder=other",
            )


def test_all_processes_have_the_time_stamp_of_the_first(yaml_file, monkeypatch):
    sent = []

    def broadcast(stamp, src):
        sent.append((stamp, src))
        return "of the first"

    monkeypatch.setattr(experiment, "ddp_broadcast", broadcast)
    overrides = {}
    experiment.name_output_folder(yaml_file, overrides)
    [(stamp, src)] = sent
    assert re.fullmatch(r"\d{4}-\d\d-\d\d\+\d\d-\d\d-\d\d-\d{6}", stamp)
    assert src == 0 and overrides == {"time_stamp": "of the first"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"resume_interrupt": True}, "needs --prev_ckpt_dir"),
        ({"prev_ckpt_dir": "."}, "without --resume_interrupt"),
        ({"resume_interrupt": True, "prev_ckpt_dir": "."}, "not the save"),
        ({"prev_checkpointer": "CKPT+x"}, "ssl_checkpoints_dir"),
    ],
)
def test_impossible_resumes(yaml_file, overrides, message):
    with pytest.raises(SystemExit, match=message):
        experiment.name_output_folder(yaml_file, overrides)


def test_resume_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    argv = ["h.yaml", "--resume_interrupt", "False", "--text_prompt", "a b"]
    command = experiment.resume_command(argv, "out", same_command=False)
    assert shlex.split(command) == [
        "python",
        "train.py",
        "h.yaml",
        "--text_prompt",
        "a b",
        "--resume_interrupt=True",
        "--prev_ckpt_dir=out/save",
    ]
    assert experiment.resume_command(argv, "out", True) == shlex.join(
        ["python", "train.py", *argv]
    )


@pytest.mark.parametrize("machines", [[], ["--nnodes=3"]])
def test_resume_command_of_several_processes(monkeypatch, machines):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3" if machines else "1")
    command = experiment.resume_command(["h.yaml"], "out", True)
    assert shlex.split(command) == [
        *("torchrun", "--nproc_per_node=4", *machines),
        *("train.py", "h.yaml"),
    ]


def test_versions_are_those_of_this_python(yaml_file, tmp_path):
    """Whatever pip comes first in the shell's path."""
    (tmp_path / "pip").write_text("#!/bin/sh\necho torch==0.1")
    (tmp_path / "pip").chmod(0o755)
    for folder, version in (("first", "1.0"), ("second", "2.0")):
        info = tmp_path / folder / "twice.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: twice\nVersion: {version}\n")
    (tmp_path / "first" / "broken.dist-info").mkdir()
    start = "import sys, experiment; experiment.start(sys.argv[1:], 'seed')"
    subprocess.run(
        [sys.executable, "-c", start, yaml_file, "--output_folder=run"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{tmp_path / 'first'}:{tmp_path / 'second'}",
        },
        check=True,
    )
    lines = (tmp_path / "run" / "env.log").read_text().splitlines()
    assert lines[0] == f"Python {sys.version}"
    found = [line for line in lines if line.startswith("torch==")]
    assert found == [f"torch=={importlib.metadata.version('torch')}"]
    assert [x for x in lines if x.startswith("twice==")] == ["twice==1.0"]


def test_what_is_imported_is_required():
    """And is not there only because something else requires it."""
    modules, folders = set(), ("curation", "dataset", "models")
    paths = [p for f in ("", *folders) for p in (ROOT / f).glob("*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
    others = {module.partition(".")[0] for module in modules}
    others -= {*folders, *(path.stem for path in paths)}
    others -= {*sys.stdlib_module_names, "wandb"}  # which is extra
    required = {
        line.partition("==")[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    }
    packages = importlib.metadata.packages_distributions()
    assert "torch" in others
    for module in others:
        assert required & {name.lower() for name in packages[module]}, module


def test_wrong_flags_do_not_wait_for_what_builds_networks():
    """Nor do any scripts import what they do not use."""
    scripts = [
        path.stem
        for path in ROOT.glob("*.py")
        if "experiment.start(" in path.read_text() and path.stem != "experiment"
    ]
    assert len(scripts) == 6
    program = f"import sys, {', '.join(scripts)}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = run.stdout.split()
    assert "torch" in modules
    assert not {"transformers", "librosa"} & set(modules)


def documented_commands():
    """Command lines of scripts with all of their flags, in all documents."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(
            r"^    .*?\w+\.py +(hparams/\S+\.yaml.*)$", text, re.M
        )
    found = [command.replace("$NETWORK", "{width: 8}") for command in found]
    return [command for command in found if "[flags]" not in command]


def test_there_are_documented_commands():
    assert len(documented_commands()) > 20


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_have_no_wrong_flag(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    monkeypatch.setattr(
        os.path, "isdir", lambda path: not os.path.splitext(path)[1]
    )
    # It raises for those.
    _, _, overrides = experiment.parse_arguments(shlex.split(command))
    assert overrides


on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told"
)


@on_glibc
def test_freed_memory_is_kept_until_a_process_is_forked():
    program = """
import os
import numpy as np
import experiment

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

experiment.keep_freed_memory()
empty = resident()
np.ones(2**25)
kept = resident()
if os.fork() == 0:
    os._exit(0)
os.wait()
print(kept - empty, resident() - empty)
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, left = map(int, run.stdout.split())
    assert kept > 0.9 * 2**28
    assert left < 0.2 * 2**28


@on_glibc
@pytest.mark.parametrize("keeps_memory", [True, False])
def test_threads_share_freed_memory_in_the_search(keeps_memory):
    """As malloc's own statistics tell."""
    program = f"""
import ctypes
import threading
import experiment

try:
    experiment.start([], "seed", keeps_memory={keeps_memory})
except SystemExit:
    libc = ctypes.CDLL("libc.so.6")
    threads = [threading.Thread(target=libc.malloc, args=[9]) for _ in "123"]
    for thread in threads:
        thread.start()
        thread.join()
    libc.malloc_stats()
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stderr.count("Arena") > 1) == keeps_memory


def test_compiled_networks_are_used_wherever_audio_is_encoded(
    tiny_clap, monkeypatch
):
    calls = []

    def compiler(function, mode):
        assert mode == "max-autotune"

        def compiled(*args):
            calls.append(len(args[0]))
            return function(*args)

        return compiled

    wavs = torch.randn(3, 16000)
    names, expected = set(tiny_clap.state_dict()), tiny_clap.encode_audio(wavs)
    monkeypatch.setattr(torch, "compile", compiler)
    experiment.compile_networks({"clap": tiny_clap, "seed": 1}, "max-autotune")
    assert torch.equal(tiny_clap.encode_audio(wavs), expected)
    tokens = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    tiny_clap(wavs[:2], tokens)
    assert calls == [3, 2]
    assert set(tiny_clap.state_dict()) == names
