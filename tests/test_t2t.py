"""Which captions stand for which class."""

import numpy as np
import pandas as pd
import pytest

from retrieve_ds_t2t import choose, similarities_to


def naive_choice(similarities, captions, threshold, count):
    """By searching for the most similar free caption and class each time."""
    nearest = similarities.argmax(axis=1)
    others = similarities >= threshold
    chosen = {
        i: k for i, k in enumerate(nearest) if similarities[i, k] >= threshold
    }
    firsts = [i for i, c in enumerate(captions) if c not in captions[:i]]
    while True:
        counts = np.array(
            [
                sum(i in firsts and (own == k or others[i, k]) for i, own in c)
                for c in [chosen.items()]
                for k in range(similarities.shape[1])
            ]
        )
        places = [
            (i, k)
            for i in firsts
            for k in np.flatnonzero(counts < count)
            if i not in chosen
        ]
        if not places:
            return chosen
        i, k = max(places, key=lambda place: similarities[place])
        chosen[i] = k


@pytest.mark.parametrize("count", [0, 1, 4, 50])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 2.0])
def test_captions_go_to_the_classes_that_they_are_most_like(count, threshold):
    """In whatever order the classes are."""
    rng = np.random.default_rng(2)
    similarities = rng.uniform(0, 1, (30, 4))
    similarities[:, 1] *= 0.6
    captions = [f"caption {i // 2 if i < 8 else i}" for i in range(30)]
    similarities[1:8:2] = similarities[0:8:2]
    expected = naive_choice(similarities, captions, threshold, count)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        rows, classes = choose(
            similarities[:, order], pd.Series(captions), threshold, count
        )
        found = {i: order[k] for i, k in zip(rows, classes)}
        assert found == expected
        assert rows.tolist() == sorted(rows)


def test_similarities_are_computed_in_blocks(monkeypatch):
    monkeypatch.setattr("retrieve_ds_t2t._BLOCK_ROWS", 3)
    rng = np.random.default_rng(0)
    corpus = rng.integers(-9, 9, (8, 4)).astype(np.float16)
    classes = rng.integers(-9, 9, (5, 4)).astype(np.float64)
    expected = corpus.astype(np.float64) @ classes.T
    np.testing.assert_array_equal(similarities_to(corpus, classes), expected)
