"""Zero-shot classification: classes are the captions of their names."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binom

# Windows that are encoded at once, or as many as there are clips in the batch:
# a long clip has hundreds.
WINDOWS_AT_ONCE = 16


def prompted(template, text):
    """A class name in a prompt.

    Arguments
    ---------
    template : str
        "{}" in it stands for the name; without one, the name comes behind it.
    text : str
        The name of the class.

    Returns
    -------
    str
    """
    if "{}" in template:
        return template.replace("{}", text)
    return f"{template.rstrip()} {text}"


@torch.no_grad()
def text_embeddings(clap, tokenize, texts):
    """Embeddings of texts, as one batch.

    Arguments
    ---------
    clap : models.clap.CLAP
        In eval mode.
    tokenize : callable
        List of str -> dict of token tensors.
    texts : list of str
        Captions or prompted class names.

    Returns
    -------
    torch.Tensor
        (texts, d_proj) fp32, unit-norm, where the model is.
    """
    device = clap.logit_scale.device
    tokens = {k: v.to(device) for k, v in tokenize(texts).items()}
    return clap.encode_text(tokens)


def class_embeddings(clap, tokenize, texts, templates):
    """Embeddings of classes: the renormalised mean over the templates.

    Arguments
    ---------
    clap, tokenize
        As `text_embeddings`.
    texts : list of str
        Names of the classes.
    templates : str or list of str
        One prompt or several; see `prompted`.

    Returns
    -------
    torch.Tensor
        (classes, d_proj) fp32, unit-norm, where the model is.
    """
    if isinstance(templates, str):
        templates = [templates]
    total = 0
    for template in templates:
        prompts = [prompted(template, text) for text in texts]
        total = total + text_embeddings(clap, tokenize, prompts)
    return F.normalize(total, dim=-1)


@torch.no_grad()
def clip_embeddings(clap, windows, counts):
    """Embeddings of whole clips: the renormalised mean over their windows.

    Arguments
    ---------
    clap : models.clap.CLAP
        In eval mode.
    windows : torch.Tensor
        (sum of counts, samples), the windows of clip after clip; of
        any shape where there are none.
    counts : list of int
        Windows of each clip.

    Returns
    -------
    torch.Tensor
        (clips, d_proj) fp32, unit-norm, where the model is.
    """
    device = clap.logit_scale.device
    if not counts:
        return torch.empty(0, clap.d_proj, device=device)
    windows = windows.to(device, non_blocking=True)
    size = max(WINDOWS_AT_ONCE, len(counts))
    embeddings = torch.cat(
        [clap.encode_audio(part) for part in windows.split(size)]
    )
    if len(embeddings) > len(counts):
        clips = embeddings.split(counts)
        embeddings = torch.stack([clip.mean(dim=0) for clip in clips])
    return F.normalize(embeddings, dim=-1)


def class_scores(clips, classes):
    """Cosine similarities of clips and classes, in fp32 also under autocast.

    Those of one clip differ in the third decimal, where bf16 makes ties.

    Arguments
    ---------
    clips, classes : torch.Tensor
        (clips, d_proj) and (classes, d_proj) fp32, unit-norm.

    Returns
    -------
    torch.Tensor
        (clips, classes) fp32.

    Raises
    ------
    ValueError
        A score is not finite: it would pass for a guess of the first class.
    """
    with torch.autocast(clips.device.type, enabled=False):
        scores = clips @ classes.T
    if not scores.isfinite().all():
        raise ValueError(
            "Similarities to the classes are not finite: the weights are "
            "broken, or fp16 does not hold the network's values (--precision)"
        )
    return scores


def accuracy_interval(correct):
    """95 % interval of an accuracy: that of the percentile bootstrap.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", chapter
    13. A resample's count of correct clips is binomial, so that its quantiles
    are known without any draws.

    Arguments
    ---------
    correct : array of bool
        (clips,), whether each clip was classified correctly.

    Returns
    -------
    tuple of float
        Lower and upper end.

    Raises
    ------
    ValueError
        There are no clips.
    """
    correct = np.asarray(correct, dtype=bool)
    if not len(correct):
        raise ValueError("There are no clips, and so no accuracy")
    low, high = binom.interval(0.95, len(correct), correct.mean())
    return float(low / len(correct)), float(high / len(correct))
