"""Retrieval: whether captions find their clips, and clips their captions."""

import numpy as np
import torch

KS = (1, 5, 10)
_SIMILARITIES_AT_ONCE = 2**24


def recalls(audio, text, clip_ids, caption_ids):
    """Recall@k of text-to-audio and audio-to-text retrieval.

    Every clip and every caption is there once, with the embedding of its first
    pair. Right answers to a caption are all clips that have the same text, and
    to a clip, all its captions.

    Arguments
    ---------
    audio, text : torch.Tensor
        (pairs, d) unit-norm embeddings, fp32.
    clip_ids, caption_ids : torch.Tensor
        (pairs,) integers, equal where the clip or the caption is the same.

    Returns
    -------
    dict of str to float
        `t2a_recall@1` and so on, with a caption as the query; `a2t_...`, with a
        clip.
    """
    _, first_clips, clips = np.unique(
        clip_ids.cpu().numpy(), return_index=True, return_inverse=True
    )
    _, first_captions, captions = np.unique(
        caption_ids.cpu().numpy(), return_index=True, return_inverse=True
    )
    audio, text = audio[first_clips], text[first_captions]
    ranks = {
        "t2a": best_ranks(text, audio, captions, clips),
        "a2t": best_ranks(audio, text, clips, captions),
    }
    return {
        f"{name}_recall@{k}": float((found < k).mean())
        for name, found in ranks.items()
        for k in KS
    }


def best_ranks(queries, answers, query_rows, answer_rows):
    """How many wrong answers come before the nearest right one.

    A wrong one that is as near comes before: equal embeddings find nothing.

    Arguments
    ---------
    queries, answers : torch.Tensor
        (queries, d) and (answers, d) fp32.
    query_rows, answer_rows : array of int
        (right pairs,) rows of these; each query has one at least.

    Returns
    -------
    array of int
        (queries,), from 0.
    """
    # Small arrays that are kept of each block would cut up the memory that the
    # next one could have had.
    ranks = np.empty(len(queries), dtype=int)
    at_once = max(_SIMILARITIES_AT_ONCE // len(answers), 1)
    for begin in range(0, len(queries), at_once):
        part = queries[begin : begin + at_once]
        with torch.autocast(part.device.type, enabled=False):
            similarities = part @ answers.T
        inside = (query_rows >= begin) & (query_rows < begin + len(part))
        right = torch.from_numpy(
            np.stack([query_rows[inside] - begin, answer_rows[inside]])
        ).to(similarities.device)
        nearest = similarities.new_full((len(part),), -torch.inf)
        nearest.scatter_reduce_(0, right[0], similarities[*right], "amax")
        similarities[*right] = -torch.inf
        before = (similarities >= nearest[:, None]).sum(dim=1)
        ranks[begin : begin + at_once] = before.cpu().numpy()
    return ranks
