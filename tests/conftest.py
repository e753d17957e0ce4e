"""Small audio files, models and text folders that tests share."""

import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import yaml

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Networks this small gain nothing from threads, and tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Nothing is looked up on a hub: a test must pass without a network.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = pathlib.Path(__file__).parents[1]
NETWORK = {
    "sample_rate": 16000,
    "duration": 1,
    "fmax": 8000,
    "width": 2,
    "d_proj": 8,
}
CAPTION = "this is a sound of dog rain siren hum click barks falls wails"


def pytest_configure(config):
    """Leave a GPU to the tests of it, `pytest -m gpu`."""
    config.addinivalue_line("markers", "gpu: for a machine with a GPU")
    # The others compare bit for bit, and their processes are more than GPUs.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def write_noise(path, seconds, rate, channels=1, seed=0, **kwargs):
    """White noise in an audio file; returns its path as text."""
    rng = np.random.default_rng(seed)
    shape = (round(seconds * rate), channels)
    soundfile.write(path, 0.3 * rng.uniform(-1, 1, shape), rate, **kwargs)
    return str(path)


PITCHES = {"dog": 300, "rain": 900, "siren": 2700}


def write_tone(path, pitch, seed, seconds=0.6):
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * 16000)) / 16000
    tone = 0.5 * np.sin(2 * np.pi * pitch * rng.uniform(0.95, 1.05) * t)
    soundfile.write(path, tone + 0.05 * rng.standard_normal(len(t)), 16000)


def write_esc_layout(folder):
    """Tones of three classes in two folds, in ESC-50's layout."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    rows = []
    for i in range(12):
        name = list(PITCHES)[i % 3]
        write_tone(folder / "audio" / f"{i}.wav", PITCHES[name], seed=100 + i)
        rows.append((f"{i}.wav", i % 2 + 1, i % 3, name, False))
    columns = ["filename", "fold", "target", "category", "esc10"]
    pd.DataFrame(rows, columns=columns).to_csv(
        folder / "meta" / "esc50.csv", index=False
    )
    pd.DataFrame({"label": list(PITCHES)}).to_csv(
        folder / "labels.csv", index=False
    )


@pytest.fixture(autouse=True)
def logging_as_before():
    """A script's main, run in this process, sets up logs and Ctrl-C."""
    root = logging.getLogger()
    level, handlers, hook = root.level, root.handlers[:], sys.excepthook
    interrupt = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, interrupt)
    root.setLevel(level)
    root.handlers[:] = handlers
    sys.excepthook = hook


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """Folder of a tiny BERT: config and vocabulary, no weights."""
    from dataset.text_model import make_text_model

    folder = tmp_path_factory.mktemp("text") / "model"
    make_text_model([CAPTION], str(folder), hidden_size=16)
    return str(folder)


def make_clap(text_model):
    """A CLAP model of a few thousand parameters, in eval mode."""
    from models.clap import CLAP

    torch.manual_seed(0)
    model = CLAP(text_model=text_model, text_pretrained=False, **NETWORK)
    return model.eval()


@pytest.fixture
def tiny_clap(text_model):
    """A model that the test may change."""
    return make_clap(text_model)


@pytest.fixture(scope="module")
def clap(text_model):
    """A model that many tests share."""
    return make_clap(text_model)


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """24 clips of three kinds with two captions each, as CSV."""
    folder = tmp_path_factory.mktemp("tones")
    # Whatever a name or a caption may hold.
    odd = "$HOME, 'é\" {x}\n"
    rows = []
    for i in range(24):
        name, path = list(PITCHES)[i % 3], f"{odd}{i}.wav"
        write_tone(folder / path, PITCHES[name], seed=i)
        rows += [(path, f"{word} {name}{odd}") for word in ("a", "sound of")]
    frame = pd.DataFrame(rows, columns=["wav_path", "caption"])
    from files import write_csv

    write_csv(frame, folder / "pairs.csv")
    write_csv(frame.assign(start="0.1")[::-1], folder / "curated.csv")
    return folder


@pytest.fixture
def flags(tones, text_model, tmp_path):
    """Flags that train a tiny model in a second or two."""
    return {
        "train_csv_path": f"{tones}/pairs.csv",
        "text_model": text_model,
        "clap": "{text_pretrained: False, sample_rate: 16000, duration: 1,"
        " fmax: 8000, width: 2, d_proj: 8}",
        "output_folder": f"{tmp_path}/run",
        "valid_pct": 0.25,
        "batch_size": 4,
        "number_of_epochs": 2,
        "num_workers": 0,
        "noprogressbar": True,
    }


def unit(vectors):
    """Rows of norm 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(vectors, threshold, tally=None, **kwargs):
    """All pairs that `pairs_over` finds, as three arrays."""
    from curation.similarity import pairs_over

    audio, text = vectors
    batches = pairs_over(audio, text, threshold, tally, **kwargs)
    return tuple(np.concatenate(part) for part in zip(*batches))


def assert_pairs(found, naive, threshold):
    """Those of the naive product, in order, with its similarities."""
    audio, text = np.nonzero(naive >= threshold)
    np.testing.assert_array_equal(found[0], audio)
    np.testing.assert_array_equal(found[1], text)
    np.testing.assert_array_equal(found[2], naive[audio, text])


def history(folder):
    return pd.read_csv(pathlib.Path(folder) / "train_history.csv")


def final_state(folder):
    from models.weights import find_checkpoint

    path = find_checkpoint(pathlib.Path(folder) / "save", "latest")
    return torch.load(path, weights_only=True)


# Of a training script, after each epoch's training and validation.
NOTE_PARAMETERS = """
from models.weights import state_hash

ended = script.CLAPBrain.on_stage_end

def on_stage_end(brain, *args):
    ended(brain, *args)
    note(state_hash(dict(brain.hparams.clap.named_parameters())))

script.CLAPBrain.on_stage_end = on_stage_end
"""

# A script in each process of torchrun, and what that one notes.
WATCHED = """
import os, sys

sys.path.insert(0, {root!r})
import {module} as script


def note(what):
    with open(f"{folder}/noted{{os.environ['RANK']}}", "a") as file:
        file.write(f"{{what}}\\n")


{watch}
script.main(sys.argv[1:])
"""


def torchrun_watched(script, flags, folder, watch):
    """As `torchrun`; returns the lines that each process noted.

    Arguments
    ---------
    script : str
    flags : list of str
    folder : pathlib.Path
        For the notes.
    watch : str
        Python that has the script's module as `script`, and calls `note`.
    """
    watched = folder / "watched.py"
    module = script.removesuffix(".py")
    watched.write_text(
        WATCHED.format(
            root=str(ROOT), module=module, folder=folder, watch=watch
        )
    )
    torchrun(str(watched), flags)
    return [
        (folder / f"noted{rank}").read_text().splitlines() for rank in (0, 1)
    ]


def torchrun(script, flags):
    """Run a script's command line in two gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc_per_node=2", f"--master_port={port}"),
            *(script, *flags),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout


def check_resume(script, whole, killed, tmp_path, rtol=0.0):
    """A run that SIGKILL ends within an epoch goes on as if it had not.

    Arguments
    ---------
    script : str
        Training script.
    whole, killed : list of str
        The same command line, for the folders `whole` and `killed`.
    tmp_path : pathlib.Path
        Where these are.
    rtol : float
        How much figures may differ; and if they may, weights are not compared.
    """

    def run(argv):
        return subprocess.Popen(
            [sys.executable, script, *argv],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert run(whole).wait() == 0
    process = run(killed)
    save = tmp_path / "killed" / "save"
    while not list(save.glob("CKPT+*/CKPT.yaml")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "train_history.csv").exists()
    [meta] = save.glob("CKPT+*/CKPT.yaml")
    assert not yaml.safe_load(meta.read_text())["end-of-epoch"]

    assert run(killed).wait() == 0
    figures = [c for c in history(tmp_path / "whole") if "second" not in c]
    pd.testing.assert_frame_equal(
        history(tmp_path / "killed")[figures],
        history(tmp_path / "whole")[figures],
        check_exact=not rtol,
        rtol=rtol,
    )
    if rtol:
        return
    states = [final_state(tmp_path / name) for name in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
