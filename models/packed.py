"""Weights as inference wants them: in its precision, and packed for a CPU."""

import torch
from torch import nn

from models.winograd import Conv3x3


def pack_weights(model, dtype):
    """Convert once what PyTorch would convert at every batch.

    In bf16 and fp16, layers get the weights that autocast would make for them.
    On a CPU, linear layers are also computed by another library: see
    `PackedLinear`; and in bf16, attention is computed by products and softmax
    one by one, since PyTorch's single function takes longer for the few tokens
    of a caption. Convolutions take too little time for preparing their
    weights to be worth the memory.

    Arguments
    ---------
    model : torch.nn.Module
        On its device and in eval mode. Changed in place, for inference alone,
        under autocast where `dtype` is not fp32. Its outputs stay the same but
        for rounding. Its state is not fit to be saved.
    dtype : torch.dtype
        float32, or what autocast computes in.
    """
    packs = (
        next(model.parameters()).device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and torch.backends.mkldnn.is_available()
        and (
            dtype == torch.float32
            or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    )
    if packs and dtype == torch.bfloat16:
        for module in model.modules():
            # One of transformers.
            if hasattr(module, "set_attn_implementation"):
                module.set_attn_implementation("eager")
    for name, module in list(model.named_modules()):
        # Not what derives from them: it may use the weights in its own way.
        if type(module) not in (nn.Linear, Conv3x3):
            continue
        module.requires_grad_(False).to(dtype)
        if packs and type(module) is nn.Linear:
            model.set_submodule(name, PackedLinear(module))


class PackedLinear(nn.Module):
    """A linear layer by oneDNN, its weights in that library's own layout.

    PyTorch's layer takes MKL for fp32, which leaves half of what a processor
    of another make can do unused, and in bf16 it brings the weights into this
    layout at every call. The operators are those of PyTorch's compiler.

    Arguments
    ---------
    linear : torch.nn.Linear
        Without gradients.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight)
        self.bias = linear.bias

    def forward(self, x):
        """As `torch.nn.Linear`, in the weights' precision."""
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.weight.dtype), self.weight, self.bias, "none", [], ""
        )
