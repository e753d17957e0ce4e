"""CLAP: an audio and a text encoder with one embedding space.

Source: Elizalde et al., "CLAP: Learning Audio Concepts From Natural Language
Supervision", arXiv 2206.04769. The parameters carry the names of the weights
that Microsoft released in 2022.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel

from models.cnn14 import CNN14, MIN_HOPS

# Initial temperature 0.07 and greatest scale 100, as in CLIP (arXiv
# 2103.00020, section 2.5).
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)
# Text models of which `keep_first_token` knows the layers.
BERTS = ("bert", "electra", "roberta", "xlm-roberta")


class Projection(nn.Module):
    """Two linear layers with a residual connection and layer norm.

    Arguments
    ---------
    d_in, d_out : int
        Size of an encoder's output and of the joint space.
    """

    def __init__(self, d_in, d_out):
        super().__init__()
        self.linear1 = nn.Linear(d_in, d_out, bias=False)
        self.linear2 = nn.Linear(d_out, d_out, bias=False)
        self.layer_norm = nn.LayerNorm(d_out)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        """(batch, d_in) -> (batch, d_out)."""
        first = self.linear1(x)
        second = self.dropout(self.linear2(F.gelu(first)))
        return self.layer_norm(first + second)


class Encoder(nn.Module):
    """A base network with its projection.

    Arguments
    ---------
    base : torch.nn.Module
        Network to project the output of.
    d_base, d_proj : int
        Size of that output and of the joint space.
    freeze : bool
        Keep the base as it is: no gradients, always in eval mode.
    """

    def __init__(self, base, d_base, d_proj, freeze):
        super().__init__()
        self.base = base
        self.projection = Projection(d_base, d_proj)
        self.freeze = freeze
        if freeze:
            self.base.requires_grad_(False)

    def train(self, mode=True):
        """Set the mode; a frozen base stays in eval mode."""
        super().train(mode)
        if self.freeze:
            self.base.eval()
        return self

    def project(self, x):
        """Unit-norm fp32 embeddings (batch, d_proj) of base outputs.

        A zero vector stays zero instead of becoming NaN.
        """
        return F.normalize(self.projection(x).float(), dim=-1)


def keep_first_token(bert):
    """Let the last layer of a text model compute [CLS] alone.

    It attends to all tokens as before, but no other one's output is used: of
    the layer's work on each of them nine parts in twelve need not be done, six
    per cent of all of BERT-base.

    Arguments
    ---------
    bert : transformers.PreTrainedModel
        Its last hidden state becomes (batch, 1, size). Models of other kinds
        than `BERTS` are left as they are.
    """
    if bert.config.model_type in BERTS:
        # What follows the attention takes each token by itself.
        after = bert.encoder.layer[-1].attention.output
        after.register_forward_pre_hook(_first_token)


def _first_token(module, inputs):
    """The attention's output and what is added to it, of the first token."""
    return tuple(x[:, :1] for x in inputs)


def _check_sizes(**sizes):
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value}: give a whole number from 1 on")


def _check_numbers(**numbers):
    for name, value in numbers.items():
        is_number = isinstance(value, int | float)
        if isinstance(value, bool) or not (is_number and 0 <= value < math.inf):
            raise ValueError(f"{name}={value}: give a number from 0 on")


class CLAP(nn.Module):
    """Contrastive language-audio model, of parameters in fp32.

    For half precision, encode under `torch.autocast`.

    Arguments
    ---------
    text_model : str
        Any transformers encoder: hub name or local folder.
    text_pretrained : bool
        Start the text encoder from that model's weights. False reads its
        config.json alone: for a model from scratch, or where a checkpoint
        brings all the weights.
    sample_rate : int
        Rate of the waveforms in Hz.
    duration : float
        Length in seconds of the windows that the model is made for. The
        network takes any; the scripts cut audio to this.
    window_size, hop_size, mel_bins, fmin, fmax, width, dropout_factor
        As `CNN14`.
    d_proj : int
        Size of the joint space.
    freeze_audio_encoder, freeze_text_encoder : bool
        Train only the projection of that encoder.

    Attributes
    ----------
    settings : dict
        All of these by name, but for those of the text model: what a run keeps
        to its end.

    Raises
    ------
    ValueError
        `duration` is too short for the network, a switch is no bool, a size no
        whole number, or a frequency none that the sample rate has.
    """

    def __init__(
        self,
        text_model="bert-base-uncased",
        text_pretrained=True,
        sample_rate=44100,
        duration=5.0,
        window_size=1024,
        hop_size=320,
        mel_bins=64,
        fmin=50,
        fmax=14000,
        width=64,
        dropout_factor=1.0,
        d_proj=1024,
        freeze_audio_encoder=False,
        freeze_text_encoder=False,
    ):
        super().__init__()
        switches = {
            "text_pretrained": text_pretrained,
            "freeze_audio_encoder": freeze_audio_encoder,
            "freeze_text_encoder": freeze_text_encoder,
        }
        for name, value in switches.items():
            # YAML 1.2 has "no" for a text, which would be true.
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value}: give True or False")
        _check_sizes(
            sample_rate=sample_rate,
            window_size=window_size,
            hop_size=hop_size,
            mel_bins=mel_bins,
            width=width,
            d_proj=d_proj,
        )
        _check_numbers(
            duration=duration,
            fmin=fmin,
            fmax=fmax,
            dropout_factor=dropout_factor,
        )
        if not 0 <= fmin < fmax <= sample_rate / 2:
            raise ValueError(
                f"fmin={fmin}, fmax={fmax}: give frequencies from 0 to "
                f"{sample_rate / 2:g} Hz, half of sample_rate, the lower first"
            )
        if window_size // 2 >= duration * sample_rate:
            raise ValueError(
                f"window_size={window_size}: duration={duration} s at "
                f"{sample_rate} Hz has too few samples for it"
            )
        if duration * sample_rate < MIN_HOPS * hop_size:
            raise ValueError(
                f"duration={duration} s is too short: CNN14 needs {MIN_HOPS} "
                f"hops of {hop_size} samples at {sample_rate} Hz"
            )
        self.text_model = text_model
        self.sample_rate, self.duration = sample_rate, duration
        self.window_size, self.hop_size = window_size, hop_size
        self.d_proj = d_proj
        audio = {
            "sample_rate": sample_rate,
            "window_size": window_size,
            "hop_size": hop_size,
            "mel_bins": mel_bins,
            "fmin": fmin,
            "fmax": fmax,
            "width": width,
            "dropout_factor": dropout_factor,
        }
        cnn14 = CNN14(**audio)
        self.settings = {
            **audio,
            "duration": duration,
            "d_proj": d_proj,
            "freeze_audio_encoder": freeze_audio_encoder,
            "freeze_text_encoder": freeze_text_encoder,
        }
        if text_pretrained:
            bert = AutoModel.from_pretrained(text_model, dtype=torch.float32)
        else:
            config = AutoConfig.from_pretrained(text_model)
            bert = AutoModel.from_config(config, dtype=torch.float32)
        if getattr(bert, "pooler", None) is not None:
            # Its output is not used: without a gradient, DDP would wait for it.
            bert.pooler.requires_grad_(False)
        keep_first_token(bert)
        self.audio_encoder = Encoder(
            cnn14, cnn14.embedding_size, d_proj, freeze_audio_encoder
        )
        self.caption_encoder = Encoder(
            bert, bert.config.hidden_size, d_proj, freeze_text_encoder
        )
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def encode_audio(self, wavs):
        """Unit-norm embeddings of waveforms.

        Arguments
        ---------
        wavs : torch.Tensor
            (batch, samples) at `sample_rate`, in -1..1.

        Returns
        -------
        torch.Tensor
            (batch, d_proj) fp32.
        """
        return self.audio_encoder.project(self.audio_encoder.base(wavs))

    def encode_text(self, tokens):
        """Unit-norm embeddings of captions: [CLS] of the last hidden state.

        Arguments
        ---------
        tokens : dict
            What the text model's tokenizer returns: input_ids,
            attention_mask and, for some, token_type_ids; (batch, length).

        Returns
        -------
        torch.Tensor
            (batch, d_proj) fp32.
        """
        hidden = self.caption_encoder.base(**tokens).last_hidden_state
        return self.caption_encoder.project(hidden[:, 0])

    def forward(self, wavs, tokens):
        """Embeddings of both sides and the scale of their similarities.

        Arguments
        ---------
        wavs, tokens
            As `encode_audio` and `encode_text`.

        Returns
        -------
        tuple of torch.Tensor
            Audio and text embeddings, (batch, d_proj) each, and the scale
            that multiplies cosine similarities to logits, ().
        """
        # Gradients are computed in reverse. On a GPU a text encoder is many
        # small kernels, which take longer to launch than to run: meanwhile the
        # audio encoder's gradients, whose kernels are large, are computed.
        text = self.encode_text(tokens)
        audio = self.encode_audio(wavs)
        return audio, text, self.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self):
        """Hold the scale at 100 or below; for use after an optimizer step.

        The parameter is clamped and not the logits: a clamp in the forward
        pass would stop the gradient that could bring it back.
        """
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
