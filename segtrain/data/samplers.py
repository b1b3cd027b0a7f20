"""Samplers: shuffled epochs for training, batches of one image size for evaluation."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from segtrain.data.sample import SegmentationDataset

EpochIndex = tuple[int, int]
"""(epoch, index). The keys carry the epoch, so that worker processes can outlive an epoch."""


class EpochSampler(Sampler[EpochIndex]):
    """A different order in every epoch, determined by (seed, epoch).

    Args:
        lengths: number of images of each dataset; the datasets follow one another in the index.
        weights: share of each dataset in an epoch; None visits every image once. A weighted epoch
            has as many images as all datasets together, and no image repeats before all other
            images of its dataset have been visited.
        rank, world_size: this process takes every world_size-th image. All processes take the same
            number: the last images may repeat the first ones of the epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths, self.seed, self.epoch, self.samples_seen = list(lengths), seed, 0, 0
        self.rank, self.world_size = rank, world_size
        total = sum(lengths)
        shares = np.array(lengths if weights is None else weights, dtype=np.float64)
        # Rounding the boundaries instead of the shares preserves the total.
        ends = np.rint(np.cumsum(shares) / shares.sum() * total).astype(int)
        self.num_draws = np.diff(ends, prepend=0).tolist()

    def __iter__(self) -> Iterator[EpochIndex]:
        rng = np.random.default_rng([self.seed, self.epoch])
        starts = np.cumsum([0, *self.lengths[:-1]])
        order = np.concatenate(
            [
                start + np.concatenate([rng.permutation(n) for _ in range(-(-draws // n))])[:draws]
                for start, n, draws in zip(starts, self.lengths, self.num_draws, strict=True)
                if draws
            ]
        )
        if len(self.lengths) > 1:
            rng.shuffle(order)
        order = np.resize(order, self.num_per_rank * self.world_size)
        own = order[self.rank :: self.world_size][self.samples_seen :]
        yield from ((self.epoch, int(index)) for index in own)

    @property
    def num_per_rank(self) -> int:
        """Number of images of a whole epoch that this process takes."""
        return -(-sum(self.lengths) // self.world_size)

    def __len__(self) -> int:
        return self.num_per_rank - self.samples_seen


class SameSizeBatchSampler(Sampler[list[int]]):
    """Batches of images of one original size, so that no image is padded or dropped.

    With padding, the score of an image could depend on the other images of its batch. Each process
    takes different batches; together they take every image once.
    """

    def __init__(
        self, dataset: SegmentationDataset, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, (height, width) in enumerate(dataset.index.sizes.tolist()):
            by_size.setdefault((height, width), []).append(index)
        batches = [
            indices[start : start + batch_size]
            for indices in by_size.values()
            for start in range(0, len(indices), batch_size)
        ]
        self.batches = batches[rank::world_size]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
