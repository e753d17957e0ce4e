"""Files of exactly the published forms load, and nothing else does."""

import hashlib
import math
import pathlib
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchlibrosa
from conftest import NETWORK
from test_models import reference_cnn14, reference_logmel
from transformers import AutoModel

from models.clap import CLAP
from models.weights import (
    AtomicCheckpointer,
    export_microsoft,
    find_checkpoint,
    load_weights,
    read_state,
    state_hash,
)

WIDTH = 2


def pann_state(sample_rate=32000):
    """The 84 entries of PANNs' file, for a narrow network."""
    torch.manual_seed(1)
    spectrogram, logmel = reference_logmel(sample_rate, 50, 14000)
    state = {f"spectrogram_extractor.{k}": v for k, v in
             spectrogram.state_dict().items()}  # fmt: skip
    state["logmel_extractor.melW"] = logmel.melW

    def batch_norm(name, size):
        state.update(
            {
                f"{name}.weight": torch.rand(size) + 0.5,
                f"{name}.bias": 0.1 * torch.randn(size),
                f"{name}.running_mean": 0.1 * torch.randn(size),
                f"{name}.running_var": torch.rand(size) + 0.5,
                f"{name}.num_batches_tracked": torch.tensor(7),
            }
        )

    batch_norm("bn0", 64)
    sizes = [1] + [WIDTH * 2**i for i in range(6)]
    for i in range(1, 7):
        for j, d_in in ((1, sizes[i - 1]), (2, sizes[i])):
            name = f"conv_block{i}.conv{j}.weight"
            state[name] = 0.3 * torch.randn(sizes[i], d_in, 3, 3)
            batch_norm(f"conv_block{i}.bn{j}", sizes[i])
    d = sizes[-1]
    for name, rows in (("fc1", d), ("fc_audioset", 527)):
        state[f"{name}.weight"] = 0.1 * torch.randn(rows, d)
        state[f"{name}.bias"] = 0.1 * torch.randn(rows)
    assert len(state) == 84
    return state


def microsoft_state(model):
    """The 93 entries besides BERT's of Microsoft's file, and BERT's."""
    torch.manual_seed(2)
    state = {f"audio_encoder.base.{k}": v for k, v in pann_state().items()}
    text_size = model.caption_encoder.base.config.hidden_size
    for side, d_in in (("audio", 32 * WIDTH), ("caption", text_size)):
        name = f"{side}_encoder.projection"
        state[f"{name}.linear1.weight"] = torch.randn(8, d_in)
        state[f"{name}.linear2.weight"] = torch.randn(8, 8)
        state[f"{name}.layer_norm.weight"] = torch.rand(8)
        state[f"{name}.layer_norm.bias"] = torch.rand(8)
    state["logit_scale"] = torch.tensor(3.5)
    assert len(state) == 93
    for k, v in model.caption_encoder.base.state_dict().items():
        state[f"caption_encoder.base.{k}"] = torch.randn_like(v)
    position_ids = torch.arange(128)[None]
    state["caption_encoder.base.embeddings.position_ids"] = position_ids
    return state


@pytest.fixture
def clap(text_model):
    torch.manual_seed(0)
    return CLAP(
        text_model=text_model,
        text_pretrained=False,
        sample_rate=32000,
        width=WIDTH,
        d_proj=8,
    ).eval()


@pytest.fixture
def pann_file(tmp_path):
    """PANNs' form: training state with the sampler's arrays beside it."""
    path = tmp_path / "Cnn14_mAP=0.431.pth"
    sampler = {
        "indexes_per_class": [np.arange(5), np.array([1, 2], np.int32)],
        "queue": [np.int64(3), 1],
        "pointers_of_classes": [0, 1],
    }
    torch.save(
        {"iteration": 600000, "model": pann_state(), "sampler": sampler}, path
    )
    return path


def rename_numpy_core(path):
    """Give the arrays the names that NumPy 1 pickled them under."""
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    old = path.with_name("numpy1.pth")
    with zipfile.ZipFile(old, "w") as archive:
        for name, data in entries.items():
            archive.writestr(
                name, data.replace(b"cnumpy._core.", b"cnumpy.core.")
            )
    return old


@pytest.mark.parametrize("numpy1", [False, True])
def test_pann_file(clap, pann_file, numpy1):
    path = rename_numpy_core(pann_file) if numpy1 else pann_file
    if numpy1:
        assert path.read_bytes() != pann_file.read_bytes()
    wavs = 0.1 * torch.randn(2, 32000)
    logmel = reference_logmel(32000, 50, 14000)(wavs)
    expected = reference_cnn14(pann_state(), logmel)
    loaded = load_weights(clap, pann_ckpt_path=str(path))
    torch.testing.assert_close(
        clap.audio_encoder.base(wavs), expected, rtol=1e-3, atol=1e-4
    )
    assert [f["source"] for f in loaded] == ["pann_ckpt_path"]


def reference_projection(state, side, x):
    """Unit-norm embeddings of an encoder's outputs x, from a state."""
    first, second, scale, shift = (
        state[f"{side}_encoder.projection.{name}"]
        for name in ("linear1.weight", "linear2.weight",
                     "layer_norm.weight", "layer_norm.bias")
    )  # fmt: skip
    x = x @ first.T
    gelu = x * (1 + torch.erf(x / 2**0.5)) / 2
    x = F.layer_norm(x + gelu @ second.T, (len(scale),), scale, shift)
    return x / x.norm(dim=1, keepdim=True)


def part(state, prefix):
    """The entries below a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def test_embeddings_of_microsofts_weights(clap, tmp_path):
    """By the formulas, from the entries of the file."""
    state = microsoft_state(clap)
    torch.save({"model": state}, tmp_path / "clap.pth")
    load_weights(clap, clap_ckpt_path=str(tmp_path / "clap.pth"))

    wavs = 0.1 * torch.randn(2, 32000)
    logmel = reference_logmel(32000, 50, 14000)(wavs)
    audio = reference_cnn14(part(state, "audio_encoder.base."), logmel)
    bert = AutoModel.from_config(clap.caption_encoder.base.config).eval()
    weights = part(state, "caption_encoder.base.")
    del weights["embeddings.position_ids"]
    bert.load_state_dict(weights)
    tokens = dict(
        input_ids=torch.tensor([[2, 7, 3, 0], [2, 8, 9, 3]]),
        attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    )
    text = bert(**tokens).last_hidden_state[:, 0]
    found = clap(wavs, tokens)
    for side, base, embeddings in zip(
        ("audio", "caption"), (audio, text), found
    ):
        expected = reference_projection(state, side, base)
        torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)
    assert found[2].item() == pytest.approx(math.exp(3.5))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_microsoft_file(clap, tmp_path, prefix):
    state = microsoft_state(clap)
    path = tmp_path / "CLAP_weights_2022.pth"
    torch.save({"model": {prefix + k: v for k, v in state.items()}}, path)
    load_weights(clap, clap_ckpt_path=str(path))
    own = clap.state_dict()
    not_ours = {
        "caption_encoder.base.embeddings.position_ids",
        "audio_encoder.base.spectrogram_extractor.stft.conv_real.weight",
        "audio_encoder.base.spectrogram_extractor.stft.conv_imag.weight",
    }
    assert own.keys() == state.keys() - not_ours
    assert all(torch.equal(own[k], state[k]) for k in own)


def test_export_is_the_published_form(clap, tmp_path):
    state = microsoft_state(clap)
    torch.save({"model": state}, tmp_path / "a.pth")
    load_weights(clap, clap_ckpt_path=str(tmp_path / "a.pth"))
    export_microsoft(clap, str(tmp_path / "b.pth"))
    exported = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    del state["caption_encoder.base.embeddings.position_ids"]
    assert exported.keys() == state.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6)


def test_an_export_that_fails_leaves_the_file_before(
    clap, tmp_path, monkeypatch
):
    def full(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    path = tmp_path / "a.pth"
    path.write_text("before")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"a\.pth cannot be written: No space"):
        export_microsoft(clap, str(path))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision(clap, tmp_path, dtype, caplog):
    """Their rounding is no other front end."""
    state = {k: v.to(dtype) for k, v in microsoft_state(clap).items()}
    torch.save({"model": state}, tmp_path / "half.pth")
    load_weights(clap, clap_ckpt_path=str(tmp_path / "half.pth"))
    own = clap.state_dict()
    assert all(torch.equal(own[k], state[k].float()) for k in own)
    assert "filterbank" not in caplog.text


def test_export_of_another_window(text_model, tmp_path):
    """Kernels have its size, as of PANNs' models for 16 kHz."""
    network = NETWORK | {"window_size": 512, "hop_size": 160}
    clap = CLAP(text_model=text_model, text_pretrained=False, **network)
    path = str(tmp_path / "a.pth")
    export_microsoft(clap, path)
    state = torch.load(path, weights_only=True)["model"]
    wavs = 0.1 * torch.randn(2, 16000)
    real, imag = (
        F.conv1d(
            F.pad(wavs[:, None], (256, 256), "reflect"),
            state[
                "audio_encoder.base.spectrogram_extractor.stft."
                f"conv_{part}.weight"
            ],
            stride=160,
        )
        for part in ("real", "imag")
    )
    power = (real**2 + imag**2).transpose(1, 2)
    melW = state["audio_encoder.base.logmel_extractor.melW"]
    expected = 10 * (power @ melW).clamp(min=1e-10).log10()
    found = clap.audio_encoder.base.logmel_extractor(wavs)
    torch.testing.assert_close(found.squeeze(), expected, rtol=0, atol=1e-2)
    load_weights(clap, clap_ckpt_path=path)


def test_weights_that_are_not_finite_are_refused(clap, tmp_path):
    state = microsoft_state(clap)
    state["audio_encoder.base.fc1.bias"][3] = math.nan
    torch.save({"model": state}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"finite, in audio_.*fc1.bias"):
        load_weights(clap, clap_ckpt_path=str(tmp_path / "nan.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "holds tensors alone: Weights only load failed$"),
        (b"", "is no file of PyTorch"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, message):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_state(str(path), "clap_ckpt_path")


@pytest.mark.parametrize("model", [None, [1]])
def test_a_file_without_parameters(tmp_path, model):
    torch.save({"model": model}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no parameters"):
        read_state(str(tmp_path / "a.pth"), "clap_ckpt_path")


def test_filterbank_of_the_file_wins_unless_recomputed(clap, pann_file):
    base = clap.audio_encoder.base
    torch.save({"model": pann_state(sample_rate=16000)}, pann_file)
    own = base.logmel_extractor.melW.clone()
    load_weights(clap, pann_ckpt_path=str(pann_file), recompute_mel=True)
    assert torch.equal(base.logmel_extractor.melW, own)
    load_weights(clap, pann_ckpt_path=str(pann_file))
    expected = pann_state(sample_rate=16000)["logmel_extractor.melW"]
    assert torch.equal(base.logmel_extractor.melW, expected)
    assert not torch.equal(expected, own)


def test_a_filterbank_of_another_rate_is_told(clap, pann_file, caplog):
    load_weights(clap, pann_ckpt_path=str(pann_file))
    torch.save({"model": pann_state(sample_rate=16000)}, pann_file)
    load_weights(clap, pann_ckpt_path=str(pann_file), recompute_mel=True)
    assert "filterbank" not in caplog.text
    load_weights(clap, pann_ckpt_path=str(pann_file))
    assert "which is kept, is not the one for 32000 Hz" in caplog.text


def test_the_hash_of_parameters():
    """If it changed, stores would be taken for those of other weights."""
    turned = torch.tensor([[1.5, 2.0], [3.0, 4.0]]).T
    state = {"b": torch.tensor(7), "a": turned, "c": turned.half()[:0]}
    content = b"a" + np.float32([1.5, 3, 2, 4]).tobytes()
    content += b"b" + np.int64(7).tobytes() + b"c"
    assert state_hash(state) == hashlib.sha256(content).hexdigest()


def test_later_sources_win(clap, pann_file, tmp_path):
    state = microsoft_state(clap)
    name = "audio_encoder.base.fc1.weight"
    state[name] = state[name] + 1
    torch.save({"model": state}, tmp_path / "clap.pth")
    paths = dict(
        pann_ckpt_path=str(pann_file), clap_ckpt_path=str(tmp_path / "clap.pth")
    )
    load_weights(clap, **paths)
    assert torch.equal(clap.state_dict()[name], state[name])
    saved = {k: v.clone() for k, v in clap.state_dict().items()}
    saved[name] += 1
    clap.load_state_dict(saved)
    AtomicCheckpointer(tmp_path / "save", {"clap": clap}).save_checkpoint()
    loaded = load_weights(
        clap, **paths, ssl_checkpoints_dir=str(tmp_path / "save")
    )
    assert torch.equal(clap.state_dict()[name], saved[name])
    paths["ssl_checkpoints_dir"] = str(find_checkpoint(tmp_path / "save"))
    assert {f["source"]: f["path"] for f in loaded} == paths
    assert [f["source"] for f in loaded] == list(paths)
    for file in loaded:
        content = pathlib.Path(file["path"]).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()


def test_another_model_is_refused_by_name(clap, pann_file, tmp_path):
    state = pann_state()
    del state["fc1.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["bn0.weight"] = torch.zeros(32)
    torch.save({"model": state}, pann_file)
    with pytest.raises(ValueError) as error:
        load_weights(clap, pann_ckpt_path=str(pann_file))
    message = str(error.value)
    assert "1 missing: fc1.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "bn0.weight (32,) instead of (64,)" in message


def test_another_front_end_is_refused(clap, pann_file):
    state = pann_state()
    state.update(
        {
            f"spectrogram_extractor.{k}": v
            for k, v in torchlibrosa.stft.Spectrogram(
                n_fft=1024, hop_length=320, window="hamming"
            )
            .state_dict()
            .items()
        }
    )
    torch.save({"model": state}, pann_file)
    with pytest.raises(ValueError, match="Hann"):
        read_state(str(pann_file), "pann_ckpt_path")


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("code from a weight file was run",)


def test_files_that_are_no_weights(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="clap_ckpt_path"):
        read_state(str(tmp_path / "absent"), "clap_ckpt_path")
    with pytest.raises(FileNotFoundError, match="is a folder: .*as --ssl_ch"):
        read_state(str(tmp_path), "clap_ckpt_path")
    (tmp_path / "text").write_text("hello")
    torch.save({"model": {}}, tmp_path / "empty")
    torch.save({"model": Malicious()}, tmp_path / "code")
    for name in ("text", "empty", "code"):
        with pytest.raises(ValueError, match=name):
            read_state(str(tmp_path / name), "clap_ckpt_path")
    assert "was run" not in capsys.readouterr().out


class Saved(torch.nn.Linear):
    """Something to save."""

    def __init__(self):
        super().__init__(1, 1)


def save_checkpoints(folder, metas):
    """One checkpoint a meta dictionary; returns their folders."""
    checkpointer = AtomicCheckpointer(folder, {"clap": Saved()})
    return [checkpointer.save_checkpoint(meta).path for meta in metas]


def test_best_checkpoint(tmp_path, monkeypatch):
    a, b, c = save_checkpoints(
        tmp_path / "save",
        [{"loss": 1.0, "acc": 0.5}, {"loss": 2.0, "acc": 0.7}, {"loss": 3.0}],
    )
    for which, expected in (
        (None, b), ("acc", b), ("loss", a), ("latest", c), (a.name, a)
    ):  # fmt: skip
        assert find_checkpoint(tmp_path / "save", which).parent == expected
    assert find_checkpoint(tmp_path).parent == b
    assert find_checkpoint(a).parent == a
    with pytest.raises(FileNotFoundError, match=r"typo.*acc, loss, latest"):
        find_checkpoint(tmp_path, "typo")
    with pytest.raises(FileNotFoundError, match="one .*'acc' cannot be chosen"):
        find_checkpoint(a, "acc")
    monkeypatch.chdir(a)
    assert find_checkpoint(".").parent == a


def test_best_by_loss_where_there_is_no_accuracy(tmp_path):
    a, _ = save_checkpoints(tmp_path, [{"loss": 1.0}, {"loss": 2.0}])
    assert find_checkpoint(tmp_path).parent == a
    with pytest.raises(FileNotFoundError, match="give one of loss, latest, C"):
        find_checkpoint(tmp_path, "acc")


def test_absent_or_empty_folders_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="typo"):
        find_checkpoint(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        find_checkpoint(tmp_path)


def test_a_choice_of_no_checkpoint_is_refused(clap, tmp_path):
    with pytest.raises(ValueError, match="=latest chooses a checkpoint of --"):
        load_weights(clap, ssl_checkpointer="latest")
    [path] = save_checkpoints(tmp_path, [{"loss": 1.0}])
    (path / "clap.ckpt").rename(path / "other.ckpt")
    with pytest.raises(FileNotFoundError, match=r"\+.* holds no clap\.ckpt"):
        load_weights(clap, ssl_checkpoints_dir=tmp_path)


def test_a_checkpoint_killed_while_saving_is_none(tmp_path):
    """The process ends between the weights and the meta file's renaming."""
    save_checkpoints(tmp_path, [{"loss": 1.0}])

    class Killed(torch.nn.Linear):
        def state_dict(self, *args, **kwargs):
            raise KeyboardInterrupt

    checkpointer = AtomicCheckpointer(tmp_path, {"clap": Killed(1, 1)})
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save_checkpoint({"loss": 0.0})
    assert len(list(tmp_path.iterdir())) == 2
    assert find_checkpoint(tmp_path).exists()
    assert len(checkpointer.list_checkpoints()) == 1
    checkpointer.remove_partial()
    assert len(list(tmp_path.iterdir())) == 1


def test_other_processes_write_and_remove_no_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "CKPT+new"
    folder.mkdir()
    checkpointer = AtomicCheckpointer(tmp_path, {"clap": Saved()})
    for module in (
        "models.weights",
        "speechbrain.utils.checkpoints",
        "speechbrain.utils.distributed",
    ):
        monkeypatch.setattr(f"{module}.if_main_process", lambda: False)
    monkeypatch.setattr(
        "speechbrain.utils.checkpoints.ddp_broadcast", lambda _, src: folder
    )
    assert checkpointer.save_checkpoint({"loss": 1.0}) is None
    checkpointer.remove_partial()
    assert list(tmp_path.rglob("*")) == [folder]


def test_the_latest_is_so_though_the_clock_was_set_back(tmp_path, monkeypatch):
    [before] = save_checkpoints(tmp_path, [{"loss": 1.0}])
    monkeypatch.setattr("time.time", lambda: 1e9)
    checkpointer = AtomicCheckpointer(tmp_path, {"clap": torch.nn.Linear(1, 1)})
    for loss in (2.0, 3.0):
        now = checkpointer.save_checkpoint({"loss": loss}).path
        assert find_checkpoint(tmp_path, "latest").parent == now != before


def test_a_checkpoint_that_does_not_fit_the_disk(tmp_path):
    """What was written of it makes room again; the one before stays."""
    save_checkpoints(tmp_path, [{"loss": 1.0}])

    class Large(torch.nn.Linear):
        def state_dict(self, *args, **kwargs):
            raise RuntimeError("unexpected pos 645440 vs 645328")

    checkpointer = AtomicCheckpointer(tmp_path, {"clap": Large(1, 1)})
    with pytest.raises(OSError, match=r"MiB are free: unexpected pos .*room"):
        checkpointer.save_checkpoint({"loss": 0.0})
    assert len(list(tmp_path.iterdir())) == 1
    assert find_checkpoint(tmp_path).exists()
