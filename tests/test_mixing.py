"""Batches: which rows, from which set, for which process."""

import itertools

import numpy as np
import pytest

from dataset.mixing import MixedBatchSampler


def epochs(count, **kwargs):
    """Batches of the first epochs as lists of rows."""
    sampler = MixedBatchSampler(**kwargs)
    result = []
    for epoch in range(1, count + 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert {e for batch in batches for e, _ in batch} == {epoch}
        result.append([[row for _, row in batch] for batch in batches])
    return result


def test_an_epoch_is_a_permutation():
    first, second = epochs(2, num_pairs=12, batch_size=4)
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(12))
    assert first != second


def test_rows_that_fill_no_batch_come_in_other_epochs():
    seen = itertools.chain(*epochs(8, num_pairs=11, batch_size=4))
    assert set(itertools.chain(*seen)) == set(range(11))


def test_batches_are_of_one_set_with_the_given_probability():
    batches = list(
        itertools.chain(
            *epochs(
                40, num_pairs=80, num_curated=30, batch_size=4,
                curation_prob=0.3,
            )
        )
    )  # fmt: skip
    curated = [min(batch) >= 80 for batch in batches]
    assert all(
        (max(b) < 80) != c and max(b) < 110 for b, c in zip(batches, curated)
    )
    assert len(batches) == 800
    # Four standard deviations of a binomial.
    assert abs(np.mean(curated) - 0.3) < 4 * np.sqrt(0.21 / 800)


def test_each_set_is_gone_through_without_repeats():
    batches = itertools.chain(
        *epochs(
            20, num_pairs=16, num_curated=12, batch_size=4, curation_prob=0.5
        )
    )
    paired, curated = [], []
    for batch in batches:
        (curated if batch[0] >= 16 else paired).append(batch)
    for batches, a_pass in ((paired, 4), (curated, 3)):
        for i in range(0, len(batches) - a_pass + 1, a_pass):
            rows = list(itertools.chain(*batches[i : i + a_pass]))
            assert len(set(rows)) == len(rows) == a_pass * 4


def test_epochs_do_not_depend_on_those_drawn_before():
    kwargs = dict(
        num_pairs=16, num_curated=8, batch_size=4, curation_prob=0.5, seed=5
    )
    sampler = MixedBatchSampler(**kwargs)
    sampler.set_epoch(3)
    alone = [[row for _, row in batch] for batch in sampler]
    assert alone == epochs(3, **kwargs)[2]
    assert alone != epochs(3, **{**kwargs, "seed": 6})[2]


def test_seeds_and_epochs_choose_the_sets_and_the_rows():
    """Each by itself, and the rows of each set by themselves."""
    sizes = dict(num_pairs=400, num_curated=400, batch_size=4)

    def sources(count, **kwargs):
        drawn = epochs(count, curation_prob=0.5, **sizes, **kwargs)
        return [[min(batch) >= 400 for batch in epoch] for epoch in drawn]

    [first, second], [other] = sources(2, seed=1), sources(1, seed=2)
    assert first != second and first != other
    paired, curated, other = (
        epochs(1, curation_prob=prob, seed=seed, **sizes)[0]
        for prob, seed in ((0, 1), (1, 1), (0, 2))
    )
    assert paired != other
    assert paired != [[row - 400 for row in batch] for batch in curated]


def test_processes_share_the_batches_of_one():
    kwargs = dict(num_pairs=32, num_curated=16, curation_prob=0.5)
    [whole] = epochs(1, batch_size=8, **kwargs)
    [first] = epochs(1, batch_size=4, rank=0, world_size=2, **kwargs)
    [second] = epochs(1, batch_size=4, rank=1, world_size=2, **kwargs)
    assert [a + b for a, b in zip(first, second)] == whole


def test_impossible_settings():
    with pytest.raises(ValueError, match="smaller batch_size"):
        MixedBatchSampler(num_pairs=10, batch_size=11)
    with pytest.raises(ValueError, match="A batch of 6 in 2 process"):
        MixedBatchSampler(num_pairs=10, batch_size=6, world_size=2)
    with pytest.raises(ValueError, match="0 curated"):
        MixedBatchSampler(num_pairs=10, batch_size=5, curation_prob=0.1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        MixedBatchSampler(num_pairs=10, batch_size=5, curation_prob=1.5)


def test_a_set_may_be_a_single_batch():
    sizes = dict(num_pairs=4, num_curated=4, batch_size=2, world_size=2)
    for prob, rows in ((0, range(4)), (1, range(4, 8))):
        shares = [
            epochs(1, curation_prob=prob, rank=rank, **sizes) for rank in (0, 1)
        ]
        [[first]], [[second]] = shares
        assert sorted(first + second) == list(rows)
