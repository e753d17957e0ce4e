"""The networks against torchlibrosa and an independent CNN14."""

import math
import os
import shutil
import sys
import sysconfig

import librosa
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchlibrosa
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from dataset.text import CaptionTokenizer
from models.clap import CLAP
from models.cnn14 import (
    CNN14,
    ConvBlock,
    Dropout,
    LogMel,
    PooledReLU,
    channels_last,
    pooled_frames,
)


def reference_logmel(sample_rate, fmin, fmax):
    """PANNs' front end, as torchlibrosa computes it: DFT as convolution."""
    return torch.nn.Sequential(
        torchlibrosa.stft.Spectrogram(n_fft=1024, hop_length=320),
        torchlibrosa.stft.LogmelFilterBank(
            sr=sample_rate, n_fft=1024, n_mels=64, fmin=fmin, fmax=fmax,
            amin=1e-10, top_db=None,
        ),
    )  # fmt: skip


def reference_cnn14(state, logmel):
    """CNN14 by the letter of PANNs' Table I, from a state dictionary.

    Arguments
    ---------
    state : dict
        PANNs' parameters.
    logmel : torch.Tensor
        (batch, 1, frames, 64).
    """

    def norm(x, name):
        stats = [
            state[f"{name}.{k}"]
            for k in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.batch_norm(x, *stats, training=False)

    x = norm(logmel.permute(0, 3, 2, 1), "bn0").permute(0, 3, 2, 1)
    for i in range(1, 7):
        for j in (1, 2):
            name = f"conv_block{i}"
            x = F.conv2d(x, state[f"{name}.conv{j}.weight"], padding=1)
            x = F.relu(norm(x, f"{name}.bn{j}"))
        x = F.avg_pool2d(x, (2, 2) if i < 6 else (1, 1))
    x = x.mean(3)
    x = x.max(2).values + x.mean(2)
    return F.relu(F.linear(x, state["fc1.weight"], state["fc1.bias"]))


def test_logmel_equals_torchlibrosa():
    torch.manual_seed(0)
    wavs = 0.1 * torch.randn(3, 44100)
    wavs[1] += torch.sin(440 * 2 * math.pi * torch.arange(44100) / 44100)
    expected = reference_logmel(44100, 50, 14000)(wavs)[:, 0]
    logmel = LogMel(44100, 1024, 320, 64, 50, 14000)(wavs)
    assert logmel.shape == (3, 138, 64)
    error = (logmel - expected).abs()
    near_peak = expected > expected.amax(dim=2, keepdim=True) - 80
    assert (error < 1e-3).float().mean() >= 0.999
    assert error[near_peak].max() < 5e-3
    assert error.max() < 0.1


def test_logmel_is_fp32_under_autocast_and_bounded_in_silence():
    front = LogMel(16000, 1024, 320, 64, 50, 8000)
    wavs = torch.randn(1, 16000)
    with torch.autocast("cpu", torch.bfloat16):
        low = front(wavs.bfloat16().float())
    assert torch.equal(low, front(wavs.bfloat16().float()))
    silence = front(torch.zeros(1, 16000))
    assert torch.equal(silence, torch.full_like(silence, -100.0))


@pytest.mark.parametrize("width", [2, 4, 64])
def test_cnn14_equals_the_reference(width):
    torch.manual_seed(0)
    model = CNN14(width=width).train()
    wavs = 0.1 * torch.randn(2, 44100)
    model(wavs)  # moves the running statistics away from 0 and 1
    model.eval()
    logmel = model.logmel_extractor(wavs)[:, None]
    expected = reference_cnn14(model.state_dict(), logmel)
    embedding = model(wavs)
    assert embedding.shape == (2, 32 * width)
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_are_unit_norm_and_independent_of_padding(tiny_clap):
    torch.manual_seed(0)
    audio = tiny_clap.encode_audio(torch.randn(3, 16000))
    torch.testing.assert_close(audio.norm(dim=1), torch.ones(3))
    ids = torch.tensor([[2, 7, 9, 3]])
    tokens = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    padded = {k: F.pad(v, (0, 5)) for k, v in tokens.items()}
    text = tiny_clap.encode_text(tokens)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(1))
    torch.testing.assert_close(
        tiny_clap.encode_text(padded), text, rtol=1e-4, atol=1e-5
    )
    _, _, scale = tiny_clap(torch.randn(1, 16000), tokens)
    assert scale.item() == pytest.approx(1 / 0.07)


def test_zero_vectors_stay_finite(tiny_clap):
    for encoder in (tiny_clap.audio_encoder, tiny_clap.caption_encoder):
        torch.nn.init.zeros_(encoder.projection.layer_norm.weight)
        d_in = encoder.projection.linear1.in_features
        assert encoder.project(torch.randn(2, d_in)).abs().max() == 0


def test_logit_scale_is_clamped_and_can_come_back(tiny_clap):
    with torch.no_grad():
        tiny_clap.logit_scale.fill_(9.0)
    tiny_clap.clamp_logit_scale()
    assert tiny_clap.logit_scale.exp().item() == pytest.approx(100)
    tiny_clap.logit_scale.exp().backward()
    assert tiny_clap.logit_scale.grad.item() == pytest.approx(100)


def test_frozen_encoders_stay_as_they_are(text_model):
    model = CLAP(
        text_model=text_model,
        text_pretrained=False,
        width=2,
        d_proj=8,
        freeze_audio_encoder=True,
        freeze_text_encoder=True,
    ).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.tensor([[2, 7, 3], [2, 8, 3]])
    tokens = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    audio, text, scale = model(torch.randn(2, 44100), tokens)
    (scale * (audio * text).sum()).backward()
    optimizer.step()
    changed = {
        k for k, v in model.state_dict().items() if (v != before[k]).any()
    }
    assert changed
    assert not any(".base." in k for k in changed)


@pytest.mark.parametrize("side", ["audio", "text"])
def test_one_encoder_may_be_frozen(text_model, side):
    switch = {f"freeze_{side}_encoder": True}
    model = CLAP(text_model, text_pretrained=False, width=2, **switch)
    frozen, other = model.audio_encoder, model.caption_encoder
    if side == "text":
        frozen, other = other, frozen
    assert not any(p.requires_grad for p in frozen.base.parameters())
    assert any(p.requires_grad for p in other.base.parameters())


def test_settings_reach_the_network(text_model):
    """Those that the shapes of its parameters do not tell."""
    sizes = {"sample_rate": 16000, "width": 2, "text_pretrained": False}
    model = CLAP(text_model, fmin=200, fmax=7000, dropout_factor=0, **sizes)
    melW = librosa.filters.mel(
        sr=16000, n_fft=1024, n_mels=64, fmin=200, fmax=7000
    )
    network = model.audio_encoder.base.train()
    np.testing.assert_allclose(network.logmel_extractor.melW, melW.T)
    wavs = torch.randn(2, 16000)
    assert torch.equal(network(wavs), network(wavs))


@pytest.mark.parametrize(
    "name", ["text_pretrained", "freeze_audio_encoder", "freeze_text_encoder"]
)
def test_switches_of_the_network_are_no_texts(text_model, name):
    """A text would be on, also --clap='{freeze_text_encoder: no}'."""
    switches = {"text_pretrained": False, name: "no"}
    with pytest.raises(ValueError, match=f"{name}=no: give True or False"):
        CLAP(text_model, **switches)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", 0, "width=0: give a whole number from 1 on"),
        ("d_proj", 2.5, "d_proj=2.5: give a whole"),
        ("hop_size", True, "hop_size=True: give a whole"),
        ("sample_rate", "fast", "sample_rate=fast: give a whole"),
        ("window_size", 48000, "window_size=48000: duration=1 s at 16000 Hz"),
        ("duration", math.inf, "duration=inf: give a number"),
        ("fmin", "a", "fmin=a: give a number"),
        ("fmin", 8000, "fmin=8000, fmax=8000: give frequencies from 0 to 8000"),
        ("fmax", 14000, "fmin=50, fmax=14000: give frequencies from 0 to 8000"),
    ],
)
def test_settings_that_a_network_cannot_have(text_model, name, value, message):
    settings = {"sample_rate": 16000, "duration": 1, "fmax": 8000, "width": 2}
    with pytest.raises(ValueError, match=f"^{message}"):
        CLAP(text_model, text_pretrained=False, **(settings | {name: value}))


def test_mel_bins_that_poolings_leave_none_of():
    wavs = torch.randn(1, 16000)
    narrow = CNN14(16000, mel_bins=32, fmax=8000, width=2).eval()
    assert narrow(wavs).isfinite().all()
    with pytest.raises(ValueError, match="mel_bins=31: give 32 or more"):
        CNN14(16000, mel_bins=31, fmax=8000, width=2)


def test_what_never_reaches_the_loss_has_no_gradient(tiny_clap):
    """DDP waits for every parameter that requires a gradient."""
    ids = torch.tensor([[2, 7, 3], [2, 8, 3]])
    tokens = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=torch.zeros_like(ids),
    )
    audio, text, scale = tiny_clap(torch.randn(2, 16000), tokens)
    (scale * (audio @ text.T)[0, 1]).backward()
    unused = [
        name
        for name, p in tiny_clap.named_parameters()
        if p.requires_grad and p.grad is None
    ]
    assert unused == []


def test_other_text_encoders(tmp_path):
    """A model without pooler and token types, with its own weights."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=30, dim=16, hidden_dim=32, n_layers=1, n_heads=2
    )
    text = DistilBertModel(config).eval()
    text.save_pretrained(tmp_path)
    model = CLAP(text_model=str(tmp_path), width=2, d_proj=8).eval()
    tokens = dict(input_ids=torch.tensor([[2, 7, 3]]))
    hidden = text(**tokens).last_hidden_state[:, 0]
    projected = model.caption_encoder.projection(hidden)
    torch.testing.assert_close(
        model.encode_text(tokens), F.normalize(projected, dim=1)
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "config", [BertConfig, ElectraConfig, RobertaConfig, XLMRobertaConfig]
)
def test_the_first_token_is_that_of_the_whole_model(config, tmp_path):
    """With the same gradients; in the last layer nothing else is computed."""
    torch.manual_seed(0)
    text = AutoModel.from_config(
        config(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        )
    ).eval()
    text.save_pretrained(tmp_path)
    model = CLAP(text_model=str(tmp_path), width=2, d_proj=8).eval()
    base, shapes = model.caption_encoder.base, []
    for layer in base.encoder.layer:
        layer.output.register_forward_hook(
            lambda *args: shapes.append(args[2].shape)
        )
    tokens = dict(
        input_ids=torch.tensor([[2, 7, 3, 0, 0], [2, 8, 9, 11, 3]]),
        attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    )
    hidden = text(**tokens).last_hidden_state[:, 0]
    expected = model.caption_encoder.project(hidden)
    found = model.encode_text(tokens)
    assert shapes == [(2, 5, 16), (2, 1, 16)]
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(base.named_parameters())
    for name, parameter in text.named_parameters():
        if not name.startswith("pooler"):
            torch.testing.assert_close(
                gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-6
            )


def test_the_first_convolution_is_in_fp32_under_autocast():
    """In bf16 its input, tens of decibels, would lose what is below 0.25."""
    torch.manual_seed(0)
    network = CNN14(16000, fmax=8000, width=4).eval()
    block = network.conv_block1
    spectrogram = -50 + 10 * torch.randn(1, 1, 40, 64)
    with torch.no_grad():
        expected = block.conv1(spectrogram)
        with torch.autocast("cpu", torch.bfloat16):
            found = block.conv1(spectrogram)
            assert torch.equal(found, expected.bfloat16())
            assert block.conv2(found).dtype == torch.bfloat16


def test_dropout_factor():
    torch.manual_seed(0)
    wavs = torch.randn(2, 16000)
    for factor, repeats in ((0, True), (1, False)):
        network = CNN14(16000, fmax=8000, width=2, dropout_factor=factor)
        assert torch.equal(network(wavs), network(wavs)) == repeats
    # Half of the last layer's outputs at the published rate, a quarter here.
    network = CNN14(16000, fmax=8000, width=2, dropout_factor=0.5)
    torch.nn.init.ones_(network.fc1.bias)
    torch.nn.init.zeros_(network.fc1.weight)
    zeros = (network(wavs.repeat(32, 1)) == 0).float().mean()
    assert zeros == pytest.approx(0.25, abs=0.03)
    with pytest.raises(ValueError, match="dropout_factor=2"):
        CNN14(16000, fmax=8000, dropout_factor=2)


def test_dropout_is_where_the_published_networks_have_it(tiny_clap):
    """After the six blocks, around the last layer, and in the projection."""
    found = []
    for layer in tiny_clap.train().audio_encoder.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.register_forward_hook(
                lambda layer, args, _: found.append((layer.p, args[0].shape[1]))
            )
    tiny_clap.encode_audio(torch.randn(2, 16000))
    blocks = [(0.2, 2 * 2**i) for i in range(6)]
    assert found == [*blocks, (0.5, 64), (0.5, 64), (0.5, 8)]


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_each_value_by_itself(rate, dtype):
    torch.manual_seed(0)
    layer = Dropout(rate)
    x = torch.ones(7, 33, 125, 9, dtype=dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype and y.stride() == x.stride()
    scale = torch.tensor(1 / (1 - rate), dtype=dtype)
    assert set(y.unique().tolist()) == {0, scale.item()}
    kept = (y > 0).double()
    # Standard deviations of a share of n and of a correlation: 1 / sqrt(n).
    near = 4 / math.sqrt(x.numel())
    assert abs(kept.mean() - (1 - rate)) < near * math.sqrt(rate * (1 - rate))
    flat = kept.permute(0, 2, 3, 1).flatten()
    for lag in (1, 2, 3, 4, 33):
        pair = torch.stack([flat[lag:], flat[:-lag]])
        assert abs(torch.corrcoef(pair)[0, 1]) < near
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)


def test_dropout_goes_by_the_seed_and_by_the_mode():
    layer, x = Dropout(0.5), torch.ones(3, 5)
    torch.manual_seed(3)
    first, other = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(other, first)
    assert layer.eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.skipif(
    sys.version_info[:3] == (3, 13, 0), reason="--compile is refused with it"
)
def test_pytorchs_compiler_takes_the_network_as_a_whole():
    """Compiled loops and random bits, which it can't look into, are left out.

    The last block has the channels for them.
    """
    torch.manual_seed(0)
    network, wavs = CNN14(16000, fmax=8000, width=2), torch.randn(2, 16000)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert compiled(wavs).shape == (2, 64)
    network.eval()
    found, expected = compiled(wavs), network(wavs)
    assert not torch.equal(found, expected)  # for rounding
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(33, 16), (8, 7), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_pooling_and_its_gradient(size, dtype):
    """Odd numbers leave a row or a column out; channels stay last."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, *size, dtype=dtype)
    x[0, 0] = 0  # where the gradient of what is positive is 0 too
    x = x.contiguous(memory_format=torch.channels_last)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    found = PooledReLU.apply(ours, 2)
    expected = F.avg_pool2d(F.relu(theirs), 2)
    weight = torch.randn_like(expected)
    for out in (found, expected):
        (out * weight).sum().backward()
    for a, b in ((found, expected), (ours.grad, theirs.grad)):
        assert a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b)
    assert torch.equal(ours, x)  # for whom else may have it


@pytest.mark.skipif(
    not shutil.which("g++")
    or not os.path.exists(f"{sysconfig.get_path('include')}/Python.h"),
    reason="no C++ compiler, or no headers for it",
)
def test_compiled_frames_have_their_gradient():
    """In half precision too, in which a maximum equals nothing unrounded."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 21, 2, dtype=torch.bfloat16)
    x.requires_grad_()
    torch.compile(pooled_frames)(x).sum().backward()
    # A maximum's gradient and those of a mean.
    sums = x.grad.float().sum(dim=(2, 3))
    torch.testing.assert_close(
        sums, torch.full_like(sums, 2), rtol=0.02, atol=0
    )


def test_channels_last_holds_through_the_blocks():
    """Also of a spectrogram whose strides come from the batch norm."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(16).eval()
    x = torch.randn(2, 20, 16)
    x = norm(x.unsqueeze(1).transpose(1, 3)).transpose(1, 3)
    blocks = [ConvBlock(1, 4).eval(), ConvBlock(4, 8).eval()]
    same, expected = channels_last(x), x
    assert torch.equal(same, x)
    with torch.no_grad():
        for block in blocks:
            same, expected = block(same, 2), block(expected, 2)
            assert same.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(same, expected)


def test_gradients_of_text_come_behind_those_of_audio(tiny_clap, text_model):
    """Which take a GPU longer than to be asked for the others."""
    tokens = CaptionTokenizer(text_model)(["a dog", "rain"])
    audio, text, scale = tiny_clap(torch.randn(2, 16000), tokens)
    order = []
    for name, parameter in tiny_clap.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: order.append(name))
    (scale * audio @ text.T).sum().backward()
    last_of_audio = order.index("audio_encoder.base.bn0.weight")
    assert not any("caption_encoder.base" in n for n in order[:last_of_audio])
