"""Batches of bytes from a dataset: N 3 H W uint8 images and N H W uint8 masks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segtrain.data.border_weights import border_map
from segtrain.data.sample import BackdropFn, Sample, SegmentationDataset, max_bad_samples
from segtrain.data.samplers import EpochIndex, EpochSampler, SameSizeBatchSampler
from segtrain.data.selection import is_negative
from segtrain.data.workers import (
    SampleOrError,
    WorkerTracker,
    begin_worker,
    block_signals,
    connection_errors,
    worker_errors,
)
from segtrain.errors import DataError
from segtrain.imaging.images import resize_short_side
from segtrain.types import IGNORE, Image

# Seconds to wait for a batch. If /dev/shm is full, the batch of a worker is lost silently.
_TIMEOUT = 120.0


class Batch(TypedDict):
    """image: N 3 h w uint8 RGB in channels_last memory. mask: N H W uint8 in {0, 1, 255}.

    In training, h w equals H W. In evaluation, the image is scaled for the network and the mask is
    not.
    """

    image: Tensor
    mask: Tensor
    border: NotRequired[Tensor]
    """N H W uint8, see `segtrain.data.border_weights`; only in training, and only on request."""
    size: list[tuple[int, int]]
    """h, w of each image if they differ. Images are at the upper left; the rest is padding, which
    the mask ignores."""
    image_id: list[str]
    index: NotRequired[list[int]]
    """Index of each image in the dataset; only in evaluation."""
    damaged: list[str]
    """One message for each unreadable image, which is not in the batch."""
    samples_seen: NotRequired[int]
    """Images of the epoch drawn so far, including damaged ones and this batch."""


@dataclass(frozen=True, kw_only=True)
class _SampleWithBorder(Sample):
    """A sample with its border map, H W uint8."""

    border: Image


@dataclass(frozen=True, kw_only=True)
class _IndexedSample(Sample):
    """A sample with its index in the dataset."""

    index: int


class Transform(Protocol):
    """A random joint change of image and mask, determined by (seed, epoch, index)."""

    def short_side(self, *, seed: int, epoch: int, index: int) -> int:
        """Short side in pixels to which the sample is scaled before the call."""
        ...

    def __call__(
        self, sample: Sample, *, seed: int, epoch: int, index: int, backdrop: BackdropFn | None
    ) -> Sample:
        """Transform a scaled sample."""
        ...


class TrainImages(Dataset[SampleOrError]):
    """Augmented samples by (epoch, index).

    Args:
        border_sigma: pixels; if set, each sample carries its `border_map`.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Transform,
        seed: int,
        border_sigma: float | None = None,
    ) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.border_sigma = border_sigma
        self._negatives = np.flatnonzero(is_negative(dataset.index))

    def __getitem__(self, key: EpochIndex) -> SampleOrError:
        epoch, index = key
        short_side = self.transform.short_side(seed=self.seed, epoch=epoch, index=index)
        try:
            sample = self.dataset.sample(index, short_side)
        except DataError as error:
            return str(error)
        backdrop = partial(self._backdrop, short_side)
        sample = self.transform(sample, seed=self.seed, epoch=epoch, index=index, backdrop=backdrop)
        if self.border_sigma is None:
            return sample
        border = border_map(sample.mask, self.border_sigma)
        return _SampleWithBorder(
            image=sample.image, mask=sample.mask, image_id=sample.image_id, border=border
        )

    def _backdrop(self, short_side: int, number: int) -> Image | None:
        """Load an image without people; None if there is none or it is damaged."""
        if not len(self._negatives):
            return None
        index = int(self._negatives[number % len(self._negatives)])
        try:
            return self.dataset.sample(index, short_side).image
        except DataError:
            return None  # counted when the sampler reaches it


class EvalImages(Dataset[SampleOrError]):
    """Whole images scaled to the network's size, with masks at the original resolution."""

    def __init__(self, dataset: SegmentationDataset, image_size: int) -> None:
        self.dataset, self.image_size = dataset, image_size

    def __getitem__(self, index: int) -> SampleOrError:
        try:
            sample = self.dataset.sample(index)
        except DataError as error:
            return str(error)
        image = resize_short_side(sample.image, self.image_size)
        return _IndexedSample(image=image, mask=sample.mask, image_id=sample.image_id, index=index)


class Batches:
    """A loader that counts damaged images instead of stopping at the first.

    Iterating raises DataError once more than 1 % of the dataset is damaged, with the last file, and
    ResourceError if a worker dies or yields no batch for two minutes.

    Args:
        fill_empty: replace a batch that has only damaged images by one ignored image instead of
            skipping it. With several processes, all must take every step.
    """

    def __init__(
        self, loader: "DataLoader[SampleOrError]", num_images: int, *, fill_empty: bool = False
    ) -> None:
        self.loader, self.num_images, self.epoch = loader, num_images, 0
        self.fill_empty = fill_empty
        self.damaged: set[str] = set()

    @property
    def tracker(self) -> WorkerTracker:
        """Tracker of the workers of this loader."""
        assert isinstance(self.loader.dataset, WorkerTracker)
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        sampler = self.loader.sampler
        samples_seen = sampler.samples_seen if isinstance(sampler, EpochSampler) else 0
        with worker_errors(self.tracker), connection_errors(self.tracker):
            with block_signals():  # this starts the workers
                batches = iter(self.loader)
            for batch in batches:
                self._count_damaged(batch["damaged"])
                samples_seen += len(batch["image_id"]) + len(batch["damaged"])
                batch["samples_seen"] = samples_seen
                if len(batch["image"]):
                    yield batch
                elif self.fill_empty:
                    yield {**batch, **_ignored_batch()}

    def set_epoch(self, epoch: int, *, samples_seen: int = 0) -> None:
        """Set the epoch, which determines the order and the augmentation of training images.

        Args:
            samples_seen: skip this number of images, which the epoch has already visited.
        """
        self.epoch = epoch
        if isinstance(self.loader.sampler, EpochSampler):
            self.loader.sampler.epoch, self.loader.sampler.samples_seen = epoch, samples_seen

    def _count_damaged(self, messages: list[str]) -> None:
        self.damaged.update(messages)
        if len(self.damaged) > max_bad_samples(self.num_images):
            raise DataError(
                f"{len(self.damaged)} of {self.num_images} images cannot be used, last: "
                f"{messages[-1]}"
            )


def train_batches(
    dataset: SegmentationDataset,
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
    """Build shuffled batches of transformed images of one size; the last one may be smaller.

    Args:
        border_sigma: pixels; if set, each batch has "border", see `segtrain.data.border_weights`.
        lengths, weights, rank, world_size: see `EpochSampler`; the default is one dataset.
    """
    sampler = EpochSampler(
        lengths or [len(dataset)], seed, weights=weights, rank=rank, world_size=world_size
    )
    loader = DataLoader(
        WorkerTracker(TrainImages(dataset, transform, seed, border_sigma), workers),
        batch_size=batch_size,
        sampler=sampler,
        **_loader_options(workers, pin_memory),
    )
    return Batches(loader, sampler.num_per_rank, fill_empty=world_size > 1)


def eval_batches(
    dataset: SegmentationDataset,
    *,
    image_size: int,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Build batches of one original size that contain every whole image once."""
    sampler = SameSizeBatchSampler(dataset, batch_size, rank=rank, world_size=world_size)
    loader = DataLoader(
        WorkerTracker(EvalImages(dataset, image_size), workers),
        batch_sampler=sampler,
        **_loader_options(workers, pin_memory),
    )
    return Batches(loader, sum(map(len, sampler.batches)))


def collate(items: list[SampleOrError]) -> Batch:
    """Stack the readable samples; the batch is empty if all images are damaged."""
    samples = [item for item in items if isinstance(item, Sample)]
    borders = [sample.border for sample in samples if isinstance(sample, _SampleWithBorder)]
    sizes = [sample.image.shape[:2] for sample in samples]
    image_shape = (len(samples), *_max_size(sizes), 3)
    mask_shape = (len(samples), *_max_size([sample.mask.shape for sample in samples]))
    # One memory block for all tensors: a worker opens a connection for each block it hands over.
    num_bytes = [math.prod(image_shape), *[math.prod(mask_shape)] * (2 if borders else 1)]
    memory = torch.empty(sum(num_bytes), dtype=torch.uint8)
    image, mask, *border = torch.split(memory, num_bytes)
    image, mask = image.view(image_shape), mask.view(mask_shape)
    is_padded = len(set(sizes)) > 1
    _copy_into(image, [sample.image for sample in samples], 0 if is_padded else None)
    _copy_into(mask, [sample.mask for sample in samples], IGNORE if is_padded else None)
    batch = Batch(
        # The memory layout is H W 3 and the view is 3 H W: channels_last at no cost.
        image=image.permute(0, 3, 1, 2),
        mask=mask,
        size=sizes,
        image_id=[sample.image_id for sample in samples],
        damaged=[item for item in items if isinstance(item, str)],
    )
    indices = [sample.index for sample in samples if isinstance(sample, _IndexedSample)]
    if indices:
        batch["index"] = indices
    if borders:
        batch["border"] = border[0].view(mask_shape)
        _copy_into(batch["border"], borders, 0 if is_padded else None)
    return batch


def _ignored_batch() -> Batch:
    """Make a batch of one black image that is ignored everywhere."""
    size = (64, 64)
    image, mask = np.zeros((*size, 3), np.uint8), np.full(size, IGNORE, np.uint8)
    border = np.zeros(size, np.uint8)
    return collate([_SampleWithBorder(image=image, mask=mask, border=border, image_id="")])


def _copy_into(stack: Tensor, images: Sequence[Image], padding: int | None) -> None:
    """Copy each image to the upper left of its slot."""
    if padding is not None:
        stack.fill_(padding)
    for slot, image in zip(stack.numpy(), images, strict=True):
        slot[: image.shape[0], : image.shape[1]] = image


def _max_size(sizes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Return the maximum height and width, 0 without sizes."""
    heights, widths = zip(*sizes, strict=True) if sizes else ((0,), (0,))
    return max(heights), max(widths)


def _loader_options(workers: int, pin_memory: bool) -> dict[str, Any]:
    return {
        "collate_fn": collate,
        "num_workers": workers,
        "pin_memory": pin_memory,
        "persistent_workers": workers > 0,
        "timeout": _TIMEOUT if workers > 0 else 0,
        "worker_init_fn": begin_worker,
        # Without its own generator, the loader would draw from the one that dropout uses.
        "generator": torch.Generator(),
    }
