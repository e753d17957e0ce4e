"""Contrastive losses over audio-caption batches."""

import torch
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather


def gather_with_gradient(tensor):
    """Rows of all processes, in order of rank, with gradients to each.

    Without a process group, the tensor itself.

    Arguments
    ---------
    tensor : torch.Tensor
        (batch, ...), the same shape in every process.

    Returns
    -------
    torch.Tensor
        (world size * batch, ...).
    """
    if not torch.distributed.is_initialized():
        return tensor
    # Its backward sums what every rank's loss sends back.
    return torch.cat(all_gather(tensor.contiguous()))


def contrastive_targets(clip_ids, caption_ids, all_clip_ids, all_caption_ids):
    """One target distribution a row, spread over all that match it.

    Pairs of the same clip are not each other's negatives, nor are pairs of
    the same caption.

    Arguments
    ---------
    clip_ids, caption_ids : torch.Tensor
        (rows,) integers of the pairs whose targets are wanted.
    all_clip_ids, all_caption_ids : torch.Tensor
        (columns,) integers of the pairs that they are compared with.

    Returns
    -------
    torch.Tensor
        (rows, columns) fp32; rows sum to 1.
    """
    match = (clip_ids[:, None] == all_clip_ids) | (
        caption_ids[:, None] == all_caption_ids
    )
    match = match.float()
    return match / match.sum(dim=1, keepdim=True)


def soft_targets(hard, own, others, beta, tau):
    """Target distributions that follow a teacher's similarities in part.

    (1 - beta) hard + beta softmax(own others^T / tau). After arXiv
    2305.01864; the softmax makes distributions of the similarities, which may
    be negative, and whose sum would grow with the batch.

    Arguments
    ---------
    hard : torch.Tensor
        (rows, columns) target distributions of the pairs.
    own, others : torch.Tensor
        (rows, d) and (columns, d) the teacher's unit-norm embeddings of the
        same kind: audio and audio, or text and text.
    beta : float
        Share of the teacher, from 0 to 1.
    tau : float
        Temperature of the teacher's similarities, over 0.

    Returns
    -------
    torch.Tensor
        (rows, columns) fp32; rows sum to 1.
    """
    with torch.autocast(own.device.type, enabled=False):
        teacher = F.softmax(own.float() @ others.float().T / tau, dim=1)
        return (1 - beta) * hard + beta * teacher


def contrastive_loss(
    audio, text, all_audio, all_text, scale, audio_targets, text_targets
):
    """Symmetric cross-entropy between similarities and target distributions.

    With one-hot targets this is CLIP's loss (arXiv 2103.00020, Figure 3).

    Arguments
    ---------
    audio, text : torch.Tensor
        (rows, d) unit-norm embeddings of this process's pairs.
    all_audio, all_text : torch.Tensor
        (columns, d) those of all processes' pairs.
    scale : torch.Tensor
        Factor from cosine similarities to logits, ().
    audio_targets, text_targets : torch.Tensor
        (rows, columns) distributions over texts for each audio, and over
        audios for each text.

    Returns
    -------
    torch.Tensor
        Mean over the rows and both directions, ().
    """
    # In fp32 also under autocast: similarities differ in the third decimal.
    with torch.autocast(audio.device.type, enabled=False):
        audio_loss = F.cross_entropy(scale * audio @ all_text.T, audio_targets)
        text_loss = F.cross_entropy(scale * text @ all_audio.T, text_targets)
        return (audio_loss + text_loss) / 2
