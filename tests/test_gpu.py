"""The same results on a GPU: `make test-gpu`, skipped where there is none.

Numbers of a GPU are compared with those of a CPU, within the rounding of their
formats: fp32 products are TF32 there, as SpeechBrain sets it.
"""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NETWORK,
    ROOT,
    assert_pairs,
    check_resume,
    final_state,
    history,
    make_clap,
    search,
    unit,
    write_esc_layout,
)

import microsoft_clap_train
import microsoft_curation_toemb
import microsoft_zeroshot
import retrieve_ds_t2t
import retrieve_from_emb_thresh
import softclap_train
from curation import products
from curation.embeddings import encoded, open_embeddings
from curation.fastest import fastest_product
from curation.tally import EDGES, Tally
from models.cnn14 import CNN14

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
HPARAMS = ROOT / "hparams"
PRECISIONS = ["fp32", "fp16", "bf16"]
WAYS = [(precision, False) for precision in PRECISIONS] + [("bf16", True)]
DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# Least cosine between embeddings of a GPU and a CPU, which has fp32.
COSINES = {"fp32": 0.9999, "fp16": 0.9995, "bf16": 0.9995}
# The same of what narrow networks with random weights make, and of gradients.
NARROW = {"fp32": 0.9999, "fp16": 0.995, "bf16": 0.99}
GRADIENTS = {"fp32": 0.98, "fp16": 0.9, "bf16": 0.6}


def autocast(precision):
    dtype = DTYPES[precision]
    return torch.autocast("cuda", dtype, enabled=dtype is not None)


@pytest.mark.parametrize("precision, compiles", WAYS)
def test_audio_embeddings_are_those_of_a_cpu(precision, compiles):
    torch.manual_seed(0)
    network = CNN14(width=16).eval()
    wavs = 0.1 * torch.randn(4, 44100)
    on_gpu = copy.deepcopy(network).cuda()
    if compiles:
        on_gpu.compile()
    with torch.no_grad(), autocast(precision):
        found = on_gpu(wavs.cuda()).float().cpu()
        cosine = F.cosine_similarity(found, network(wavs))
    assert cosine.min() > NARROW[precision]


def siren_calls():
    """Eight clips of a second, unlike in loudness, pitch and rhythm.

    Of clips that are all alike, as of noise, batch norm leaves the rounding.
    """
    time = torch.arange(44100) / 44100
    pitches = torch.tensor([100, 200, 400, 800, 1600, 3000, 5000, 9000])
    pulses = torch.tensor([1, 2, 3, 4, 5, 7, 9, 11])
    cycles = pitches[:, None] * time * (1 + time)
    loudness = torch.logspace(-2, 0, 8)[:, None]
    pulse = 1 + (2 * math.pi * pulses[:, None] * time).sin()
    return loudness * pulse * (2 * math.pi * cycles).sin() / 2


@pytest.mark.parametrize("precision, compiles", WAYS)
def test_gradients_are_those_of_a_cpu(precision, compiles):
    torch.manual_seed(0)
    network = CNN14(width=16, dropout_factor=0).train()
    wavs = siren_calls()
    on_gpu = copy.deepcopy(network).cuda()
    if compiles:
        on_gpu.compile()
    weight = torch.randn(network.embedding_size)
    (network(wavs) @ weight).sum().backward()
    with autocast(precision):
        out = on_gpu(wavs.cuda()).float()
    (out @ weight.cuda()).sum().backward()
    pairs = zip(network.named_parameters(), on_gpu.parameters())
    for (name, expected), found in pairs:
        if expected.grad is None:
            assert found.grad is None, name
            continue
        cosine = F.cosine_similarity(
            found.grad.cpu().flatten(), expected.grad.flatten(), dim=0
        )
        assert cosine > GRADIENTS[precision], name


def test_text_embeddings_are_those_of_a_cpu(text_model):
    from dataset.text import CaptionTokenizer

    clap = make_clap(text_model)
    tokens = CaptionTokenizer(text_model)(["a dog", "rain", "a siren falls"])
    expected = clap.encode_text(tokens)
    clap.cuda()
    for precision in PRECISIONS:
        with torch.no_grad(), autocast(precision):
            found = clap.encode_text({k: v.cuda() for k, v in tokens.items()})
        cosine = F.cosine_similarity(found.cpu(), expected)
        assert cosine.min() > COSINES[precision]


def test_batches_are_encoded_in_their_order():
    """Results are read while later batches are at work."""
    matrix = torch.randn(2048, 2048, device="cuda") / 50

    def encode(number):
        x = torch.full((64, 2048), float(number), device="cuda")
        for _ in range(20):
            x = x @ matrix
        return torch.full((2, 3), float(number), device="cuda") + 0 * x[:2, :3]

    for i, (number, vectors) in enumerate(encoded(range(40), encode)):
        assert i == number
        assert not vectors.is_cuda
        assert (vectors == number).all()
    assert i == 39


@pytest.fixture(scope="module")
def vectors():
    """Similarities close to 0.4, along few axes; fp16."""
    rng = np.random.default_rng(0)
    scales = np.where(np.arange(128) < 12, 1, 0.1)
    text = unit(rng.standard_normal((3000, 128)) * scales)
    audio = unit(rng.standard_normal((5000, 128)) * scales)
    near = text[rng.integers(0, 3000, 2000)]
    away = audio[:2000] - (audio[:2000] * near).sum(1, keepdims=True) * near
    cosine = 0.4 + rng.uniform(-1e-4, 1e-4, (2000, 1))
    audio[:2000] = cosine * near + np.sqrt(1 - cosine**2) * unit(away)
    return audio.astype(np.float16), text.astype(np.float16)


@pytest.mark.parametrize("kind", ["whole", "report", "axes"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threshold", [0.4, 0.8])
def test_pairs_are_those_of_a_naive_product(
    vectors, threshold, precision, dtype, kind
):
    rng = np.random.default_rng(1)
    vectors = [
        (v + (dtype == np.float32) * rng.normal(0, 1e-5, v.shape)).astype(dtype)
        for v in vectors
    ]
    grid = [np.round(v.astype(np.float64) * 2**24) / 2**24 for v in vectors]
    naive = grid[0] @ grid[1].T
    options = {"device": "cuda", "precision": precision, "audio_bs": 1700}
    if kind == "report":
        options["with_report"] = True
    if kind == "axes":
        sides = [torch.from_numpy(v) for v in grid]
        options["axes"] = products.joint_axes(*sides)[:, :15].contiguous()
    tally = Tally(len(naive[0]))
    found = search(vectors, threshold, tally, **options)
    assert_pairs(found, naive, threshold)
    assert tally.highest == naive.max()
    if kind != "report":
        return
    margin, curves = tally.margin, tally.curves()
    assert margin < 0.02
    for edge, count in zip(EDGES, curves["pairs"]):
        if edge >= threshold:
            assert count == (naive >= edge).sum()
        else:
            low, high = ((naive >= edge + m).sum() for m in (margin, -margin))
            assert low <= count <= high


def test_the_fastest_product_is_one_that_a_gpu_has(vectors):
    for with_report in (False, True):
        name, axes = fastest_product(*vectors, 0.4, with_report, device="cuda")
        assert name == "fp16"
        assert axes is None or not with_report


def argv(flags, script=microsoft_clap_train, **changes):
    path = HPARAMS / f"insper/{script.__name__}.yaml"
    return [str(path), *(f"--{k}={v}" for k, v in (flags | changes).items())]


def train(flags, script=microsoft_clap_train, **changes):
    flags = {"device": "cuda"} | flags | changes
    script.main(argv(flags, script))
    return history(flags["output_folder"])


def test_losses_are_those_of_a_cpu(flags, tmp_path):
    """With steps of next to nothing, in which dropout would still matter.

    Batch norms keep statistics of what it leaves.
    """
    flags |= {"base_lr": 1e-12, "final_lr": 1e-13, "number_of_epochs": 1}
    flags["clap"] = flags["clap"].replace("{", "{dropout_factor: 0, ")
    losses = {
        device: train(
            flags, device=device, output_folder=tmp_path / device
        ).valid_loss[0]
        for device in ("cpu", "cuda")
    }
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("precision, compiles", WAYS)
def test_training_learns(flags, precision, compiles):
    flags |= {
        "precision": precision,
        "compile": compiles,
        "number_of_epochs": 8,
        "base_lr": 0.003,
    }
    table = train(flags)
    assert np.isfinite(table[["train_loss", "valid_loss"]]).all(axis=None)
    assert table.train_loss.iloc[-1] < 0.8 * table.train_loss.iloc[0]
    state = final_state(flags["output_folder"])
    # As without compiler, so that other scripts can read it.
    assert state.keys() == make_clap(flags["text_model"]).state_dict().keys()


def test_killed_and_resumed_goes_on_as_uninterrupted(flags, tmp_path):
    """But for kernels that add in no fixed order."""
    flags |= {
        "number_of_epochs": 3,
        "ckpt_interval_steps": 3,
        "batch_size": 2,
        "num_workers": 1,
        "precision": "bf16",
    }
    check_resume(
        "microsoft_clap_train.py",
        argv(flags, output_folder=tmp_path / "whole"),
        argv(flags, output_folder=tmp_path / "killed"),
        tmp_path,
        rtol=0.02,
    )


def test_torchrun_with_nccl_trains_as_one_process(flags, tmp_path):
    alone = train(flags)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=1", "microsoft_clap_train.py"),
            *argv(flags, output_folder=tmp_path / "nccl"),
        ],
        cwd=ROOT,
        check=True,
    )
    np.testing.assert_allclose(
        history(tmp_path / "nccl").train_loss, alone.train_loss, rtol=0.02
    )


@pytest.mark.parametrize("compiles", [False, True])
def test_the_whole_method(flags, tones, text_model, tmp_path, compiles):
    """A teacher, and its embeddings, pairs and scores as on a CPU; students."""
    train(flags, number_of_epochs=8, base_lr=0.003)
    write_esc_layout(tmp_path / "esc")
    network = json.dumps(NETWORK).replace('"', "")
    save = f"{flags['output_folder']}/save"
    common = {"text_model": text_model, "clap": network, "noprogressbar": True}
    weights = {"ssl_checkpoints_dir": save, "ssl_checkpointer": "latest"}
    pairs = pd.read_csv(tones / "pairs.csv")
    paths = pairs.wav_path.unique()
    names = [tmp_path / f"{i}.wav" for i in range(len(paths))]
    for name, path in zip(names, paths):
        name.symlink_to(tones / path)
    (tmp_path / "list.txt").write_text("".join(f"{n}\n" for n in names))
    (tmp_path / "classes.txt").write_text("dog\nrain\nsiren\n")
    pairs[["caption"]].to_csv(tmp_path / "captions.csv", index=False)

    def run(script, yaml, device, **flags):
        flags = {"device": device} | common | flags
        if device == "cuda":
            flags["compile"] = compiles
        argv = [f"--{k}={v}" for k, v in flags.items()]
        script.main([str(HPARAMS / yaml), *argv])

    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        run(
            microsoft_curation_toemb,
            "curation/microsoft_audioset_insper_toemb.yaml",
            device,
            **weights,
            precision="fp32" if device == "cpu" else "auto",
            audio_pathfile=tmp_path / "list.txt",
            text_pathfile=tmp_path / "captions.csv",
            output_folder=folder,
            num_workers=2,
        )
        run(
            retrieve_ds_t2t,
            "curation/esc_insper_t2t_retr.yaml",
            device,
            **weights,
            emb_dir=folder / "save",
            target_csv_path=tmp_path / "captions.csv",
            class_path=tmp_path / "classes.txt",
            sim_threshold=-1,
            output_folder=folder / "t2t",
        )
        run(
            microsoft_zeroshot,
            "esc/microsoft_zeroshot.yaml",
            device,
            **weights,
            data_folder=tmp_path / "esc",
            labels_path=tmp_path / "esc" / "labels.csv",
            output_folder=folder / "zeroshot",
            num_workers=2,
        )
        found[device] = {
            stem: open_embeddings(folder / "save", stem, column).vectors
            for stem, column in (
                ("audio_audioset", "wav_path"),
                ("text_insper", "caption"),
            )
        }
        found[device]["scores"] = pd.read_csv(
            folder / "zeroshot" / "predictions.csv"
        )
    for stem in ("audio_audioset", "text_insper"):
        sides = [torch.tensor(found[d][stem]).double() for d in found]
        assert F.cosine_similarity(*sides).min() > COSINES["bf16"]
    numbers = [found[d]["scores"].select_dtypes("float") for d in found]
    np.testing.assert_allclose(*numbers, atol=0.01)

    # The same store on both devices: the same bytes.
    stores = (found["cuda"][k] for k in ("audio_audioset", "text_insper"))
    audio, text = (np.asarray(vectors, np.float64) for vectors in stores)
    curated, threshold = {}, np.median(audio @ text.T)
    for device in ("cpu", "cuda"):
        retrieve_from_emb_thresh.main(
            [
                str(HPARAMS / "curation/audioset_insper_duv2_retr.yaml"),
                f"--emb_dir={tmp_path / 'cuda' / 'save'}",
                f"--sim_threshold={threshold}",
                f"--device={device}",
            ]
        )
        path = tmp_path / "cuda/save/audioset_insper_duv2_curation.csv"
        curated[device] = path.read_bytes()
    assert curated["cuda"] == curated["cpu"]
    assert len(pd.read_csv(path)) > len(audio)
    student = {"curation_csv": path, "curation_prob": 0.5, **weights}
    for script in (microsoft_clap_train, softclap_train):
        table = train(
            flags | student | {"compile": compiles},
            script=script,
            output_folder=tmp_path / script.__name__,
        )
        assert np.isfinite(table.valid_loss).all()
