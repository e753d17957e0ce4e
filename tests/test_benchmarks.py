"""The benchmarks' ways, on tiny data: they compute what they are to time."""

import os

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import NETWORK, ROOT, write_noise

from benchmarks import embed, retrieve, step, writing
from dataset.text import CaptionTokenizer
from models.weights import export_microsoft

CAPTIONS = ["a dog barks", "rain falls on rain", "a siren wails", "click"]


@pytest.fixture
def world(text_model, clap, tmp_path, monkeypatch):
    """As `embed.make_world`, for a network of a few thousand parameters."""
    for module in (embed, step):
        tiny = tmp_path / f"{module.__name__}.yaml"
        base = str(ROOT / module.HPARAMS)
        tiny.write_text(yaml.safe_dump({"base": base, "clap": NETWORK}))
        monkeypatch.setattr(module, "HPARAMS", str(tiny))
    monkeypatch.setattr(step, "SAMPLES", 16000)
    os.symlink(text_model, tmp_path / "text_model")
    export_microsoft(clap, str(tmp_path / "clap.pth"))
    table = pd.DataFrame({"caption": CAPTIONS})
    table.to_csv(tmp_path / "captions.csv", index=False)
    paths = [
        write_noise(tmp_path / f"{i}.wav", 1.0, 16000, seed=i) for i in range(3)
    ]
    (tmp_path / "audio.txt").write_text("\n".join(paths))
    return tmp_path


def test_steps_begin_with_the_loss_of_clip(world, clap, text_model):
    run = step.run_side(step.ours, str(world), "fp32", batch=4, steps=1)
    tokenize = CaptionTokenizer(text_model)
    [(wavs, tokens)] = step.batches_of(world, 4, 1, tokenize)
    with torch.no_grad():
        audio, text, scale = clap(wavs, tokens)
    logits = scale * audio @ text.T
    losses = [F.cross_entropy(x, torch.arange(4)) for x in (logits, logits.T)]
    assert run["loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-5)


@pytest.mark.parametrize("fits", [1, 2, 31, 511, 848, 5000])
def test_the_largest_batch_is_found_to_3_percent(fits):
    sizes = []

    def train(size):
        sizes.append(size)
        assert len(sizes) < 30
        if size > fits:
            raise torch.OutOfMemoryError

    assert 0.968 * fits <= step.largest_batch(train) <= fits


def test_what_is_embedded_are_the_clips_and_captions(world, clap, text_model):
    embed.ours(str(world), "fp32")
    stores = {
        path.name: np.load(path)
        for path in (world / "fp32" / "save").glob("*.npy")
    }
    [audio], [text] = (
        [x for name, x in stores.items() if name.startswith(kind)]
        for kind in ("audio", "text")
    )
    assert len(audio) == 3
    with torch.no_grad():
        expected = clap.encode_text(CaptionTokenizer(text_model)(CAPTIONS))
    np.testing.assert_allclose(text, expected, atol=1e-3)


def test_the_ways_of_a_search_find_the_same(tmp_path):
    threshold = retrieve.make_stores(tmp_path, 60, 40, exponent=0.0)
    retrieve.ours(tmp_path, threshold - 0.3)
    retrieve.ordinary(tmp_path, threshold - 0.3)
    ours, ordinary = (
        retrieve.pairs_of(tmp_path / f"{name}.csv")
        for name in ("audioset_insper_duv2_curation", "ordinary")
    )
    assert ours == ordinary and 0 < len(ours) < 2400


def test_the_ways_of_writing_write_the_same(tmp_path, capsys):
    tables = []
    for side in writing.WAYS:
        writing.run_side(side, 1000, str(tmp_path / side))
        tables.append(pd.read_csv(tmp_path / side))
    pd.testing.assert_frame_equal(*tables)
