"""Weights that are packed for inference give the same embeddings."""

import contextlib

import pytest
import torch

from models.packed import PackedLinear, pack_weights


def embeddings(clap, dtype):
    draw = torch.Generator().manual_seed(0)
    wavs = 0.1 * torch.randn(3, 16000, generator=draw)
    tokens = {
        "input_ids": torch.randint(5, (3, 7), generator=draw),
        # The last one is shorter.
        "attention_mask": (torch.arange(7) < torch.tensor([[7], [7], [4]])) + 0,
    }
    context = contextlib.nullcontext()
    if dtype != torch.float32:
        context = torch.autocast("cpu", dtype)
    with torch.inference_mode(), context:
        return clap(wavs, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [True, False])
def test_embeddings_stay_the_same(tiny_clap, dtype, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"
        )
    before = embeddings(tiny_clap, dtype)
    pack_weights(tiny_clap, dtype)
    for a, b in zip(before, embeddings(tiny_clap, dtype)):
        # In bf16 a sum may fall to the other side of its rounding.
        close = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, b, rtol=close, atol=close)
    base = tiny_clap.audio_encoder.base
    assert base.conv_block1.conv1.weight.dtype == torch.float32
    assert base.conv_block1.conv2.weight.dtype == dtype
    assert base.fc1.weight.dtype == dtype
    assert isinstance(base.fc1, PackedLinear) == packs
    bert = tiny_clap.caption_encoder.base.config
    one_by_one = packs and dtype == torch.bfloat16
    assert bert._attn_implementation == ("eager" if one_by_one else "sdpa")


def test_layers_of_other_kinds_are_left_alone():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(5, 4)
    model = torch.nn.Sequential(Doubled(4, 3), torch.nn.Linear(3, 2, False))
    with torch.no_grad():
        before = model(x)
        pack_weights(model, torch.float32)
        torch.testing.assert_close(model(x), before)
    assert type(model[0]) is Doubled and type(model[1]) is PackedLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5, 6), (1, 6), (0, 6)])
def test_a_packed_layer_equals_a_sum_in_float64(shape, bias):
    linear = torch.nn.Linear(6, 4, bias).requires_grad_(False)
    x = torch.randn(shape)
    exact = x.double() @ linear.weight.double().T
    if bias:
        exact += linear.bias.double()
    found = PackedLinear(linear)(x)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    # A part of a larger one, as the first token of each caption is.
    wide = torch.randn(*shape[:-1], 2, 6)[..., 0, :]
    torch.testing.assert_close(PackedLinear(linear)(wide), linear(wide))
