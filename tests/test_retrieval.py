"""Recall@k against a reference in plain Python."""

import pytest
import torch
import torch.nn.functional as F

from models import retrieval

CLIPS = torch.tensor([5, 5, 2, 9, 9, 4, 7, 7, 3, 8, 1, 6, 0])
CAPTIONS = torch.tensor([0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10])


def embeddings(seed):
    torch.manual_seed(seed)
    return F.normalize(torch.randn(len(CLIPS), 3), dim=1)


def naive(queries, answers, query_ids, answer_ids, k):
    """Sort all answers to each query; look for a right one in the first k."""
    pairs = list(zip(query_ids.tolist(), answer_ids.tolist()))
    # The last one that is put in stays: those of the first pairs.
    query_of = dict(zip(query_ids.tolist()[::-1], queries.tolist()[::-1]))
    answer_of = dict(zip(answer_ids.tolist()[::-1], answers.tolist()[::-1]))
    found = 0
    for query, own in query_of.items():
        nearness = {
            name: sum(x * y for x, y in zip(own, other))
            for name, other in answer_of.items()
        }
        nearest = sorted(nearness, key=nearness.get, reverse=True)[:k]
        found += any((query, answer) in pairs for answer in nearest)
    return found / len(query_of)


@pytest.mark.parametrize("at_once", [33, 2**24])
def test_recalls_are_those_of_sorting(at_once, monkeypatch):
    monkeypatch.setattr(retrieval, "_SIMILARITIES_AT_ONCE", at_once)
    audio, text = embeddings(0), embeddings(1)
    figures = retrieval.recalls(audio, text, CLIPS, CAPTIONS)
    assert len(figures) == 6
    for k in (1, 5, 10):
        t2a = naive(text, audio, CAPTIONS, CLIPS, k)
        assert figures[f"t2a_recall@{k}"] == pytest.approx(t2a)
        a2t = naive(audio, text, CLIPS, CAPTIONS, k)
        assert figures[f"a2t_recall@{k}"] == pytest.approx(a2t)
    assert 0 < figures["t2a_recall@1"] < figures["t2a_recall@5"] < 1


def test_equal_embeddings_find_nothing():
    same = embeddings(0)[:1].expand(len(CLIPS), -1)
    figures = retrieval.recalls(same, same, CLIPS, CAPTIONS)
    # Ten clips, eleven captions.
    assert figures["t2a_recall@5"] == figures["a2t_recall@5"] == 0
    assert figures["a2t_recall@10"] == pytest.approx(3 / 10)


def test_answers_near_each_other_are_told_apart_also_under_autocast():
    """Their similarities differ by less than a step of bf16."""
    angles, ids = 0.02 * torch.arange(13), torch.arange(13)
    same = torch.stack([angles.cos(), angles.sin()], dim=1)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            figures = retrieval.recalls(same, same, ids, ids)
        assert set(figures.values()) == {1}
