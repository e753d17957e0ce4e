"""Which pairs make up each training batch."""

import numpy as np
from torch.utils.data import Sampler


class MixedBatchSampler(Sampler):
    """Whole batches of one data set or another, replayed exactly.

    Batches of an epoch come from the first set (the paired data) or, with
    probability `curation_prob`, from the second (the curated data). An epoch
    has as many batches as fit into the first set. Each set is gone through in
    a permutation of its own, from epoch to epoch, so that all of it is seen
    however often the other is drawn; what is left at the end of a permutation
    and fills no batch waits for the next one.

    Everything is a function of the seed and the epoch. So every process draws
    the same batches, takes its own share of each, and a resumed run that skips
    batches (as SpeechBrain's loader does, without loading them) goes on
    exactly where it stopped.

    Arguments
    ---------
    num_pairs : int
        Rows of the first set, which are numbered from 0.
    batch_size : int
        Pairs a batch in each process.
    num_curated : int
        Rows of the second set, numbered on from there.
    curation_prob : float
        Probability of a curated batch.
    seed : int
        Seed of all draws.
    rank, world_size : int
        This process and how many there are.

    Raises
    ------
    ValueError
        `curation_prob` is no probability, or a set is smaller than a batch.
    """

    def __init__(
        self,
        num_pairs,
        batch_size,
        num_curated=0,
        curation_prob=0.0,
        seed=0,
        rank=0,
        world_size=1,
    ):
        if not 0 <= curation_prob <= 1:
            raise ValueError(
                f"curation_prob is {curation_prob}: give a value from 0 to 1"
            )
        self.batch_size = batch_size
        self.global_batch_size = batch_size * world_size
        self.sizes = [num_pairs]
        if curation_prob > 0:
            self.sizes.append(num_curated)
        for name, size in zip(("paired", "curated"), self.sizes):
            if size < self.global_batch_size:
                raise ValueError(
                    f"A batch of {batch_size} in {world_size} process(es) is "
                    f"larger than the {size} {name} training pairs: give a "
                    "smaller batch_size"
                )
        self.curation_prob = curation_prob
        self.seed = seed
        self.rank = rank
        self.epoch = 1

    def set_epoch(self, epoch):
        """Choose the epoch, counted from 1; SpeechBrain's Brain calls it."""
        self.epoch = epoch

    def __len__(self):
        """Batches an epoch."""
        return self.sizes[0] // self.global_batch_size

    def __iter__(self):
        """Batches of (epoch, row) tuples.

        The epoch goes along with the row, since the crop depends on it and
        the loader's worker processes have no other way to know it.
        """
        drawn = [self._sources(epoch) for epoch in range(1, self.epoch)]
        counts = np.bincount(np.concatenate([[], *drawn]).astype(int), None, 2)
        share = slice(
            self.rank * self.batch_size, (self.rank + 1) * self.batch_size
        )
        permutations = {}
        for source in self._sources(self.epoch):
            a_pass = self.sizes[source] // self.global_batch_size
            turn, place = divmod(int(counts[source]), a_pass)
            counts[source] += 1
            if permutations.get(source, (None,))[0] != turn:
                rng = np.random.default_rng((self.seed, 1, source, turn))
                rows = rng.permutation(self.sizes[source])
                permutations[source] = (turn, rows + sum(self.sizes[:source]))
            begin = place * self.global_batch_size
            rows = permutations[source][1][
                begin : begin + self.global_batch_size
            ]
            yield [(self.epoch, int(row)) for row in rows[share]]

    def _sources(self, epoch):
        """Which set each batch of an epoch comes from: 0 or 1, (len,)."""
        rng = np.random.default_rng((self.seed, 0, epoch))
        return (rng.random(len(self)) < self.curation_prob).astype(int)
