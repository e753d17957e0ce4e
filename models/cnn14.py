"""CNN14, the audio encoder, with the parameter names of the PANNs release.

Source: Kong et al., "PANNs: Large-Scale Pretrained Audio Neural Networks for
Audio Pattern Recognition", arXiv 1912.10211, Table I and section III-A.
"""

import librosa
import torch
import torch.nn.functional as F
from torch import nn

from models.winograd import Conv3x3

# PANNs' files end in a classifier over AudioSet's classes. It takes no part in
# CLAP, but its parameters belong to the published files.
AUDIOSET_CLASSES = 527

# Five poolings by 2 leave one frame of 32, which 31 hops make, and one band.
MIN_HOPS = 31
MIN_MEL_BINS = 32


class LogMel(nn.Module):
    """Log-mel spectrogram of waveforms: short-time FFT, mel, decibels.

    The filterbank `melW` is state: a checkpoint brings the one it was trained
    with. Everything is computed in fp32, also under autocast (on a GPU, the
    product with it in TF32).

    Arguments
    ---------
    sample_rate : int
        Rate of the waveforms in Hz.
    window_size, hop_size : int
        Hann window and hop in samples.
    mel_bins : int
        Number of mel bands.
    fmin, fmax : float
        Lowest and highest frequency of the bands in Hz.
    """

    def __init__(
        self, sample_rate, window_size, hop_size, mel_bins, fmin, fmax
    ):
        super().__init__()
        self.window_size = window_size
        self.hop_size = hop_size
        filterbank = librosa.filters.mel(
            sr=sample_rate,
            n_fft=window_size,
            n_mels=mel_bins,
            fmin=fmin,
            fmax=fmax,
        )
        self.register_buffer("melW", torch.from_numpy(filterbank.T.copy()))
        self.register_buffer(
            "window", torch.hann_window(window_size), persistent=False
        )

    def forward(self, wavs):
        """Decibels of the mel bands.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples), in -1..1.

        Returns
        -------
        torch.Tensor
            (batch, samples // hop_size + 1, mel_bins), at least -100 dB.
        """
        with torch.autocast(wavs.device.type, enabled=False):
            spectrum = torch.stft(
                wavs.float(),
                n_fft=self.window_size,
                hop_length=self.hop_size,
                window=self.window,
                center=True,
                pad_mode="reflect",
                return_complex=True,
            )
            power = spectrum.real.square().add_(spectrum.imag.square())
            mel = power.transpose(1, 2) @ self.melW
            return mel.clamp_(min=1e-10).log10_().mul_(10.0)


class FullPrecisionConv3x3(Conv3x3):
    """A convolution that is computed in fp32, also under autocast.

    On a GPU that has TF32, PyTorch takes this for it: three bits more than
    bf16. What comes out has autocast's format, as of any convolution.
    """

    def forward(self, x):
        """As `torch.nn.Conv2d`."""
        device = x.device.type
        with torch.autocast(device, enabled=False):
            out = super().forward(x.float())
        if torch.is_autocast_enabled(device):
            out = out.to(torch.get_autocast_dtype(device))
        return out


def channels_last(x):
    """One channel in the layout that makes convolutions keep to it.

    `contiguous` does nothing here, since both layouts of one channel are the
    same in memory; but convolutions go by the strides.

    Arguments
    ---------
    x : torch.Tensor
        (batch, 1, time, mel).

    Returns
    -------
    torch.Tensor
        The same, with a stride of 1 over channels.
    """
    return x.squeeze(1).contiguous().unsqueeze(-1).permute(0, 3, 1, 2)


def pooled_relu(x, size):
    """Means of squares of what is positive.

    As `torch.nn.functional.avg_pool2d` of `relu`, for which a GPU takes long
    with channels last.

    Arguments
    ---------
    x : torch.Tensor
        (batch, channels, time, mel), channels last; may be overwritten.
    size : int
        Of a square.

    Returns
    -------
    torch.Tensor
        (batch, channels, time // size, mel // size).
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return F.avg_pool2d(F.relu_(x), size)
    if x.requires_grad:
        return PooledReLU.apply(x, size)
    return _squares(x.relu_(), size).mean((2, 4)).permute(0, 3, 1, 2)


def _squares(x, size):
    """A view (batch, time, size, mel, size, channels), the rest cut off."""
    height, width = (n // size * size for n in x.shape[2:])
    x = x.permute(0, 2, 3, 1)[:, :height, :width]
    return x.unflatten(1, (-1, size)).unflatten(3, (-1, size))


class PooledReLU(torch.autograd.Function):
    """`pooled_relu` that keeps a byte a value for its gradient.

    PyTorch's two functions keep all values, and spread a gradient before they
    take the positive ones' part of it.
    """

    @staticmethod
    def forward(ctx, x, size):
        """(batch, channels, time, mel), int -> pooled, as `pooled_relu`."""
        ctx.save_for_backward(x > 0)
        ctx.size = size
        return _squares(x.relu(), size).mean((2, 4)).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad):
        """The gradient of the values, 0 for those that were cut off."""
        (positive,) = ctx.saved_tensors
        size = ctx.size
        spread = torch.empty_like(positive, dtype=grad.dtype)
        height, width = (n * size for n in grad.shape[2:])
        spread[:, :, height:] = 0
        spread[..., width:] = 0
        each = (grad / size**2).permute(0, 2, 3, 1)[:, :, None, :, None]
        torch.where(
            _squares(positive, size),
            each,
            each.new_zeros(()),
            out=_squares(spread, size),
        )
        return spread, None


def pooled_frames(x):
    """Mean over the bands, then maximum plus mean over time.

    Arguments
    ---------
    x : torch.Tensor
        (batch, channels, time, mel).

    Returns
    -------
    torch.Tensor
        (batch, channels).
    """
    x = x.mean(dim=3)
    # Not amax, whose gradient looks for the values that equal it: compiled, it
    # compares unrounded ones with a rounded maximum, finds none, and is NaN.
    return x.max(dim=2).values + x.mean(dim=2)


class Dropout(nn.Dropout):
    """Dropout, whose masks take less time on a CPU.

    PyTorch makes a draw for each value there. Here one of 64 bits makes four;
    the rate is met to 1/65536.
    """

    def forward(self, x):
        """As `torch.nn.Dropout`."""
        draws_masks = x.is_cpu and self.training and self.p
        if not draws_masks or torch.compiler.is_compiling():
            return super().forward(x)
        size = x.numel()
        draws = torch.empty(-(-size // 4), dtype=torch.int64)
        draws = draws.random_(-(2**63), None).view(torch.int16)[:size]
        kept = torch.empty_like(x, dtype=torch.bool)
        limit = round(self.p * 2**16) - 2**15
        torch.ge(draws, limit, out=kept.as_strided((size,), (1,)))
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU, then average pooling."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        # The first of all sees the spectrogram itself, to which half precision
        # does more harm than to all that follows.
        first = FullPrecisionConv3x3 if in_channels == 1 else Conv3x3
        self.conv1 = first(in_channels, out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, x, pool):
        """(batch, in, time, mel) -> (batch, out, time // pool, mel // pool)."""
        x = F.relu_(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return pooled_relu(x, pool) if pool > 1 else F.relu_(x)


class CNN14(nn.Module):
    """Fourteen-layer CNN over log-mel spectrograms.

    Arguments
    ---------
    sample_rate, window_size, hop_size, mel_bins, fmin, fmax
        As `LogMel`.
    width : int
        Channels of the first block; each of the six blocks doubles them, so
        embeddings have 32 * width values. The published network has 64.
    dropout_factor : float
        Times the published rates, which are 0.2 after each block and 0.5
        around the last layer. Networks much narrower than the published one
        underfit with these.

    Raises
    ------
    ValueError
        `dropout_factor` is negative, or makes a rate of 1 or more; or there
        are too few `mel_bins`.
    """

    def __init__(
        self,
        sample_rate=44100,
        window_size=1024,
        hop_size=320,
        mel_bins=64,
        fmin=50,
        fmax=14000,
        width=64,
        dropout_factor=1.0,
    ):
        super().__init__()
        if not 0 <= dropout_factor < 2:
            raise ValueError(
                f"dropout_factor={dropout_factor}: give 0 or more, and less "
                "than 2"
            )
        if mel_bins < MIN_MEL_BINS:
            raise ValueError(
                f"mel_bins={mel_bins}: give {MIN_MEL_BINS} or more, which five "
                "poolings halve"
            )
        self.block_dropout = Dropout(0.2 * dropout_factor)
        self.dropout = Dropout(0.5 * dropout_factor)
        self.embedding_size = 32 * width
        self.logmel_extractor = LogMel(
            sample_rate, window_size, hop_size, mel_bins, fmin, fmax
        )
        self.bn0 = nn.BatchNorm2d(mel_bins)
        channels = [1] + [width * 2**i for i in range(6)]
        for i in range(6):
            block = ConvBlock(channels[i], channels[i + 1])
            self.add_module(f"conv_block{i + 1}", block)
        self.fc1 = nn.Linear(self.embedding_size, self.embedding_size)
        self.fc_audioset = nn.Linear(self.embedding_size, AUDIOSET_CLASSES)
        self.fc_audioset.requires_grad_(False)
        for linear in (self.fc1, self.fc_audioset):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, wavs):
        """Embed waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples) at `sample_rate`, at least `MIN_HOPS` hops long.

        Returns
        -------
        torch.Tensor
            (batch, 32 * width).
        """
        x = self.logmel_extractor(wavs)
        # Batch norm over the mel bands, which PANNs keeps as channels.
        x = self.bn0(x.unsqueeze(1).transpose(1, 3)).transpose(1, 3)
        x = channels_last(x)
        for i in range(1, 7):
            block = getattr(self, f"conv_block{i}")
            x = block(x, pool=2 if i < 6 else 1)
            x = self.block_dropout(x)
        x = pooled_frames(x)
        x = F.relu_(self.fc1(self.dropout(x)))
        return self.dropout(x)
