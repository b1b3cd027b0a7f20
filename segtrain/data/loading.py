"""From a data set to batches of bytes: N 3 H W uint8 images and N H W uint8 masks."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from segtrain.classes import IGNORE
from segtrain.data.borders import border_map
from segtrain.data.sample import Sample, Source, tolerated
from segtrain.data.selection import is_negative
from segtrain.data.workers import (
    Item,
    Watched,
    begin_worker,
    connection_errors,
    deaf_children,
    worker_errors,
)
from segtrain.errors import DataError
from segtrain.images import Pixels, resize_short_side

# Where /dev/shm is full a worker's batch gets lost without a word, so nobody waits for ever.
_PATIENCE = 120.0  # seconds for one batch


class Batch(TypedDict):
    """image: N 3 h w uint8 RGB in channels_last memory. mask: N H W uint8 in {0, 1, 255}.

    In training h w = H W; in evaluation the image is scaled for the network and the mask is not.
    """

    image: Tensor
    mask: Tensor
    border: NotRequired[Tensor]
    """N H W uint8, see `segtrain.data.borders`; only in training, and only if asked for."""
    size: list[tuple[int, int]]
    """h, w of each picture in the upper left of its image, where they differ; the rest is padding
    that the mask ignores."""
    image_id: list[str]
    index: NotRequired[list[int]]
    """Each picture's place in the source; only in evaluation."""
    damaged: list[str]
    """One message for each picture that could not be read and is not in the batch."""
    num_drawn: NotRequired[int]
    """Pictures of the epoch that were drawn until now, damaged ones and this batch's included."""


@dataclass(frozen=True, kw_only=True)
class _Bordered(Sample):
    """A sample and its border map, H W uint8."""

    border: Pixels


@dataclass(frozen=True, kw_only=True)
class _Placed(Sample):
    """A sample and its place in the source."""

    index: int


# The sampler's keys carry the epoch, so that worker processes can live from epoch to epoch.
Key = tuple[int, int]
Backdrop = Callable[[int], Pixels | None]


class Transform(Protocol):
    """A random change of image and mask together that depends on (seed, epoch, index) alone."""

    def short_side(self, *, seed: int, epoch: int, index: int) -> int:
        """The scale at which the picture is wanted: its shorter side in pixels."""
        ...

    def __call__(
        self, sample: Sample, *, seed: int, epoch: int, index: int, backdrop: Backdrop | None
    ) -> Sample:
        """The scaled picture changed; `backdrop` gives one without people for any number."""
        ...


class TrainImages(Dataset[Item]):
    """Augmented crops, picked by (epoch, index).

    border_sigma: with it each crop has its `border_map`.
    """

    def __init__(
        self, source: Source, transform: Transform, seed: int, border_sigma: float | None = None
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.border_sigma = border_sigma
        self._negatives = np.flatnonzero(is_negative(source.catalog))

    def __getitem__(self, key: Key) -> Item:
        epoch, index = key
        short_side = self.transform.short_side(seed=self.seed, epoch=epoch, index=index)
        try:
            sample = self.source.sample(index, short_side)
        except DataError as error:
            return str(error)
        backdrop = partial(self._backdrop, short_side)
        sample = self.transform(sample, seed=self.seed, epoch=epoch, index=index, backdrop=backdrop)
        if self.border_sigma is None:
            return sample
        border = border_map(sample.mask, self.border_sigma)
        return _Bordered(
            image=sample.image, mask=sample.mask, image_id=sample.image_id, border=border
        )

    def _backdrop(self, short_side: int, lot: int) -> Pixels | None:
        """A picture without people; None where there is none or it is damaged."""
        if not len(self._negatives):
            return None
        try:
            return self.source.sample(
                int(self._negatives[lot % len(self._negatives)]), short_side
            ).image
        except DataError:
            return None  # it is counted when its own turn comes


class EvalImages(Dataset[Item]):
    """Whole pictures scaled to the network's size, with masks at the original resolution."""

    def __init__(self, source: Source, image_size: int) -> None:
        self.source, self.image_size = source, image_size

    def __getitem__(self, index: int) -> Item:
        try:
            sample = self.source.sample(index)
        except DataError as error:
            return str(error)
        image = resize_short_side(sample.image, self.image_size)
        return _Placed(image=image, mask=sample.mask, image_id=sample.image_id, index=index)


class EpochSampler(Sampler[Key]):
    """Another order every epoch, the same for the same (seed, epoch).

    Args:
        lengths: pictures of each data set that is mixed, one after the other in the source.
        weights: share of each in an epoch; None shows every picture once. With weights an epoch has
            as many pictures as all sets together, and no picture comes again before all others of
            its set have come.
        rank, world_size: this process takes every world_size-th picture. All take equally many: the
            last ones may be the epoch's first again.
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
        self.lengths, self.seed, self.epoch, self.num_done = list(lengths), seed, 0, 0
        self.rank, self.world_size = rank, world_size
        total = sum(lengths)
        shares = np.array(lengths if weights is None else weights, dtype=np.float64)
        # Rounding the ends and not the parts keeps their sum.
        ends = np.rint(np.cumsum(shares) / shares.sum() * total).astype(int)
        self.draws = np.diff(ends, prepend=0).tolist()

    def __iter__(self) -> Iterator[Key]:
        rng = np.random.default_rng([self.seed, self.epoch])
        starts = np.cumsum([0, *self.lengths[:-1]])
        order = np.concatenate(
            [
                start + np.concatenate([rng.permutation(n) for _ in range(-(-draws // n))])[:draws]
                for start, n, draws in zip(starts, self.lengths, self.draws, strict=True)
                if draws
            ]
        )
        if len(self.lengths) > 1:
            rng.shuffle(order)
        order = np.resize(order, self.num_in_all * self.world_size)
        mine = order[self.rank :: self.world_size][self.num_done :]
        yield from ((self.epoch, int(index)) for index in mine)

    @property
    def num_in_all(self) -> int:
        """Pictures of an epoch that this process takes."""
        return -(-sum(self.lengths) // self.world_size)

    def __len__(self) -> int:
        return self.num_in_all - self.num_done


class SameSizeBatches(Sampler[list[int]]):
    """Batches of pictures of one original size, so that none is padded or left out.

    Padding would let a picture's score depend on its neighbours in the batch. Of several processes
    each takes other batches; together they take every picture once.
    """

    def __init__(
        self, source: Source, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, (height, width) in enumerate(source.catalog.sizes.tolist()):
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


class Batches:
    """A loader that counts damaged pictures instead of ending at the first.

    Iterating raises DataError once more than 1 % of the data set is damaged, naming the last file,
    and ResourceError when a worker process dies or gives no batch for two minutes.

    Args:
        never_empty: a batch of nothing but damaged pictures is not left out but holds one that is
            ignored: of several processes all must take every step.
    """

    def __init__(
        self, loader: "DataLoader[Item]", num_images: int, *, never_empty: bool = False
    ) -> None:
        self.loader, self.num_images, self.epoch = loader, num_images, 0
        self.never_empty = never_empty
        self.damaged: set[str] = set()

    @property
    def watched(self) -> Watched:
        """The pictures; they know where worker processes are."""
        assert isinstance(self.loader.dataset, Watched)
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        sampler = self.loader.sampler
        num_drawn = sampler.num_done if isinstance(sampler, EpochSampler) else 0
        with worker_errors(self.watched), connection_errors(self.watched):
            with deaf_children():  # here the worker processes are made
                batches = iter(self.loader)
            for batch in batches:
                self._count(batch["damaged"])
                num_drawn += len(batch["image_id"]) + len(batch["damaged"])
                batch["num_drawn"] = num_drawn
                if len(batch["image"]):
                    yield batch
                elif self.never_empty:
                    yield {**batch, **_ignored_picture()}

    def set_epoch(self, epoch: int, *, num_done: int = 0) -> None:
        """Choose the permutation and the draws of the next pass over training images.

        Args:
            num_done: the first pictures of it are left out, for they have been seen.
        """
        self.epoch = epoch
        if isinstance(self.loader.sampler, EpochSampler):
            self.loader.sampler.epoch, self.loader.sampler.num_done = epoch, num_done

    def _count(self, messages: list[str]) -> None:
        self.damaged.update(messages)
        if len(self.damaged) > tolerated(self.num_images):
            raise DataError(
                f"{len(self.damaged)} of {self.num_images} pictures cannot be used, last: "
                f"{messages[-1]}"
            )


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    pin_memory: bool,
    lengths: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    rank: int = 0,
    world_size: int = 1,
    border_sigma: float | None = None,
) -> Batches:
    """Shuffled batches of transformed pictures, all of one size; the last one may be smaller.

    Args:
        border_sigma: pixels; with it each batch has "border", see `segtrain.data.borders`.
        lengths, weights, rank, world_size: as in EpochSampler; one data set without them.
    """
    sampler = EpochSampler(
        lengths or [len(source)], seed, weights=weights, rank=rank, world_size=world_size
    )
    loader = DataLoader(
        Watched(TrainImages(source, transform, seed, border_sigma), workers),
        batch_size=batch_size,
        sampler=sampler,
        **_loader_options(workers, pin_memory),
    )
    return Batches(loader, sampler.num_in_all, never_empty=world_size > 1)


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Every picture once, whole, in batches of one original size."""
    sampler = SameSizeBatches(source, batch_size, rank=rank, world_size=world_size)
    loader = DataLoader(
        Watched(EvalImages(source, image_size), workers),
        batch_sampler=sampler,
        **_loader_options(workers, pin_memory),
    )
    return Batches(loader, sum(map(len, sampler.batches)))


def collate(items: list[Item]) -> Batch:
    """Stack what could be read; a batch of nothing but damaged pictures is empty."""
    samples = [item for item in items if isinstance(item, Sample)]
    borders = [sample.border for sample in samples if isinstance(sample, _Bordered)]
    sizes = [sample.image.shape[:2] for sample in samples]
    image_shape = (len(samples), *_largest(sizes), 3)
    mask_shape = (len(samples), *_largest([sample.mask.shape for sample in samples]))
    # One piece of memory for all: what a worker hands over costs a connection a piece.
    bytes_of = [math.prod(image_shape), *[math.prod(mask_shape)] * (2 if borders else 1)]
    memory = torch.empty(sum(bytes_of), dtype=torch.uint8)
    image, mask, *border = torch.split(memory, bytes_of)
    image, mask = image.view(image_shape), mask.view(mask_shape)
    padded = len(set(sizes)) > 1
    _fill(image, [sample.image for sample in samples], 0 if padded else None)
    _fill(mask, [sample.mask for sample in samples], IGNORE if padded else None)
    batch = Batch(
        # They lie as H W 3 and are only viewed as 3 H W: that is channels_last, for free.
        image=image.permute(0, 3, 1, 2),
        mask=mask,
        size=sizes,
        image_id=[s.image_id for s in samples],
        damaged=[item for item in items if isinstance(item, str)],
    )
    places = [sample.index for sample in samples if isinstance(sample, _Placed)]
    if places:
        batch["index"] = places
    if borders:
        batch["border"] = border[0].view(mask_shape)
        _fill(batch["border"], borders, 0 if padded else None)
    return batch


def _ignored_picture() -> Batch:
    side = (64, 64)
    blank, ignored = np.zeros((*side, 3), np.uint8), np.full(side, IGNORE, np.uint8)
    border = np.zeros(side, np.uint8)
    return collate([_Bordered(image=blank, mask=ignored, border=border, image_id="")])


def _fill(stack: Tensor, pictures: Sequence[Pixels], padding: int | None) -> None:
    """Write each picture into the upper left of its place."""
    if padding is not None:
        stack.fill_(padding)
    for place, picture in zip(stack.numpy(), pictures, strict=True):
        place[: picture.shape[0], : picture.shape[1]] = picture


def _largest(sizes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Height and width that all fit into."""
    heights, widths = zip(*sizes, strict=True) if sizes else ((0,), (0,))
    return max(heights), max(widths)


def _loader_options(workers: int, pin_memory: bool) -> dict[str, Any]:
    return {
        "collate_fn": collate,
        "num_workers": workers,
        "pin_memory": pin_memory,
        "persistent_workers": workers > 0,
        "timeout": _PATIENCE if workers > 0 else 0,
        "worker_init_fn": begin_worker,
        # A generator of its own: the loader would draw from the one that dropout draws from.
        "generator": torch.Generator(),
    }
