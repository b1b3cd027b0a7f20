"""The loader: identical bytes for (seed, epoch) with any number of workers, and its failures."""

import contextlib
import errno
import gc
import hashlib
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.coco import image_row, make_toy_coco, write_coco
from helpers.command import Command, Finished
from helpers.faults import TINY, assert_one_error, digests
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import get_worker_info

import segtrain as segtrain_package
from segtrain.data.border_weights import border_map
from segtrain.data.coco.dataset import CocoDataset
from segtrain.data.loader import Batch, Batches, TrainImages, eval_batches, train_batches
from segtrain.data.sample import BackdropFn, DatasetIndex, Sample, max_bad_samples
from segtrain.data.samplers import EpochSampler, SameSizeBatchSampler
from segtrain.data.transforms import TrainTransform
from segtrain.data.workers import WorkerTracker, check_shared_memory, resolve_workers, worker_errors
from segtrain.errors import DataError, ResourceError
from segtrain.imaging.images import resize_image, scaled_size

IMAGE_SIZE = 24
SIZES = [(30, 40), (40, 30), (24, 24), (24, 60), (50, 31), (33, 33), (26, 90), (60, 25), (24, 25)]


class NoiseDataset:
    """Noise images of the given sizes, with masks that contain people and ignored regions."""

    def __init__(self, sizes: list[tuple[int, int]] = SIZES, negatives: Sequence[int] = ()) -> None:
        count = len(sizes)
        self.index = DatasetIndex(
            sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
            person_fraction=np.full(count, 0.5, dtype=np.float32),
            num_people=np.array([index not in negatives for index in range(count)], dtype=np.int32),
            has_crowd=np.zeros(count, dtype=bool),
            identities=np.arange(count, dtype=np.uint64),
        )
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        rng = np.random.default_rng(index)
        height, width = self.index.sizes[index]
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = blobs(rng, height, width)
        if short_side is not None:
            size = scaled_size(height, width, short_side)
            image = resize_image(image, size)
            mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
        return Sample(image=image, mask=mask, image_id=str(index))

    def image_path(self, index: int) -> Path:
        return Path(self.describe(index))

    def describe(self, index: int) -> str:
        return f"image {index}"


class FaultyDataset(NoiseDataset):
    """Noise images, some of which fail in the way that a subclass defines."""

    def __init__(self, faulty: set[int], sizes: list[tuple[int, int]] = SIZES) -> None:
        super().__init__(sizes)
        self.faulty = faulty

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        if index in self.faulty:
            self.fail(index)
        return super().sample(index, short_side)

    def fail(self, index: int) -> None:
        raise DataError(f"{self.describe(index)} is damaged")


def blobs(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Draw large rectangles of each mask value."""
    mask = np.zeros((height, width), dtype=np.uint8)
    for value in (1, 255, 1):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        mask[top : top + height // 2, left : left + width // 2] = value
    return mask


def train_loader(
    dataset: NoiseDataset | CocoDataset,
    *,
    workers: int = 0,
    seed: int = 0,
    batch_size: int = 4,
    border_sigma: float | None = None,
) -> Batches:
    return train_batches(
        dataset,
        TrainTransform(IMAGE_SIZE, scale=(1.0, 1.5)),
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        pin_memory=False,
        border_sigma=border_sigma,
    )


def eval_loader(
    dataset: NoiseDataset | CocoDataset,
    *,
    workers: int = 0,
    image_size: int = 16,
    batch_size: int = 4,
) -> Batches:
    return eval_batches(
        dataset, image_size=image_size, batch_size=batch_size, workers=workers, pin_memory=False
    )


def run_epoch(loader: Batches, epoch: int) -> list[Batch]:
    loader.set_epoch(epoch)
    return list(loader)


def digest(batches: list[Batch]) -> str:
    """Hash shapes, ids and bytes, in order."""
    sha = hashlib.sha256()
    for batch in batches:
        sha.update(repr((batch["image"].shape, batch["image_id"])).encode())
        sha.update(batch["image"].numpy().tobytes())
        sha.update(batch["mask"].numpy().tobytes())
    return sha.hexdigest()


def crops_by_id(batches: list[Batch]) -> dict[str, bytes]:
    """Map image_id to the bytes of the crop, regardless of the order."""
    return {
        image_id: image.numpy().tobytes() + mask.numpy().tobytes()
        for batch in batches
        for image_id, image, mask in zip(
            batch["image_id"], batch["image"], batch["mask"], strict=True
        )
    }


def image_ids(batches: list[Batch]) -> list[str]:
    return [image_id for batch in batches for image_id in batch["image_id"]]


# --------------------------------------------------------------------------- batch format


@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_are_uint8_in_channels_last(workers: int) -> None:
    batches = list(train_loader(NoiseDataset(), workers=workers))

    assert [len(batch["image_id"]) for batch in batches] == [4, 4, 1]
    for batch in batches:
        count = len(batch["image_id"])
        assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
        assert batch["image"].shape == (count, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert batch["mask"].shape == (count, IMAGE_SIZE, IMAGE_SIZE)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert batch["mask"].is_contiguous()


def test_evaluation_scales_the_image_but_not_the_mask() -> None:
    dataset = NoiseDataset()
    batches = list(eval_loader(dataset, image_size=16))

    assert sorted(image_ids(batches), key=int) == [str(i) for i in range(len(dataset))]
    for batch in batches:
        assert min(batch["image"].shape[2:]) == 16
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        for image_id, mask in zip(batch["image_id"], batch["mask"], strict=True):
            assert np.array_equal(mask.numpy(), dataset.sample(int(image_id)).mask)


def test_an_image_of_the_network_size_is_not_scaled() -> None:
    dataset = NoiseDataset([(16, 20)])
    (batch,) = eval_loader(dataset, image_size=16)
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), dataset.sample(0).image)


# --------------------------------------------------------------------------- borders


@pytest.mark.parametrize("workers", [0, 1])
def test_border_sigma_adds_the_border_map_of_each_crop(workers: int) -> None:
    """The map belongs to the augmented mask; the rest of the batch does not change."""
    plain = list(train_loader(NoiseDataset(), workers=workers))
    batches = list(train_loader(NoiseDataset(), workers=workers, border_sigma=5.0))

    assert digest(batches) == digest(plain)
    assert any(batch["border"].any() for batch in batches)
    for batch in batches:
        assert batch["border"].dtype == torch.uint8
        assert batch["border"].shape == batch["mask"].shape
        assert batch["border"].is_contiguous()
        for mask, border in zip(batch["mask"], batch["border"], strict=True):
            assert np.array_equal(border.numpy(), border_map(mask.numpy(), 5.0))


def test_a_larger_sigma_gives_larger_border_weights() -> None:
    narrow, wide = (list(train_loader(NoiseDataset(), border_sigma=sigma)) for sigma in (1.0, 9.0))
    assert sum(int(b["border"].sum()) for b in narrow) < sum(int(b["border"].sum()) for b in wide)


def test_no_border_without_sigma_or_in_evaluation() -> None:
    for batch in [*train_loader(NoiseDataset()), *eval_loader(NoiseDataset())]:
        assert "border" not in batch


@pytest.mark.parametrize("border_sigma", [None, 5.0])
def test_a_batch_is_one_memory_block(border_sigma: float | None) -> None:
    """The block contains only the bytes of the tensors."""
    for batch in train_loader(NoiseDataset(), border_sigma=border_sigma):
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (2 if border_sigma is None else 3)
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        size = tensors[0].untyped_storage().nbytes()
        assert size == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_has_no_border(workers: int) -> None:
    loader = train_loader(FaultyDataset({5}), workers=workers, border_sigma=5.0, batch_size=1)
    batches = list(loader)
    assert len(batches) == len(SIZES) - 1
    assert all(batch["border"].shape == batch["mask"].shape for batch in batches)


# --------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_training_batches(workers: int) -> None:
    """Over several epochs, because persistent workers could continue their random streams."""
    alone, together = train_loader(NoiseDataset()), train_loader(NoiseDataset(), workers=workers)
    for epoch in (0, 1, 2):
        assert digest(run_epoch(together, epoch)) == digest(run_epoch(alone, epoch))


def test_workers_do_not_change_evaluation_batches() -> None:
    dataset = NoiseDataset()
    assert digest(list(eval_loader(dataset, workers=2))) == digest(list(eval_loader(dataset)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_loader_yields_the_same_batches_for_an_epoch(workers: int) -> None:
    """Resuming relies on this."""
    uninterrupted = train_loader(NoiseDataset(), workers=workers)
    for epoch in (0, 1):
        run_epoch(uninterrupted, epoch)
    resumed = train_loader(NoiseDataset(), workers=workers)
    assert digest(run_epoch(resumed, 2)) == digest(run_epoch(uninterrupted, 2))


def test_an_interrupted_epoch_can_be_restarted() -> None:
    loader = train_loader(NoiseDataset(), workers=1)
    loader.set_epoch(3)
    next(iter(loader))
    assert digest(run_epoch(loader, 3)) == digest(run_epoch(train_loader(NoiseDataset()), 3))


def test_each_epoch_and_seed_draws_different_crops() -> None:
    """Compared by image: a different order alone is not sufficient."""
    dataset = NoiseDataset()
    base = crops_by_id(run_epoch(train_loader(dataset), 0))
    others = [
        crops_by_id(run_epoch(train_loader(dataset), 1)),
        crops_by_id(run_epoch(train_loader(dataset), 2)),
        crops_by_id(run_epoch(train_loader(dataset, seed=1), 0)),
    ]
    for other in others:
        changed = sum(other[image_id] != crop for image_id, crop in base.items())
        assert changed >= len(dataset) - 1


def test_images_have_independent_draws() -> None:
    """Nearly all crops of eight copies of one image differ."""

    class RepeatedImage(NoiseDataset):
        def sample(self, index: int, short_side: int | None = None) -> Sample:
            first = super().sample(0, short_side)
            return Sample(image=first.image, mask=first.mask, image_id=str(index))

    assert len(set(crops_by_id(list(train_loader(RepeatedImage([(60, 80)] * 8)))).values())) >= 7


def test_each_epoch_visits_every_image_in_a_different_order() -> None:
    loader = train_loader(NoiseDataset(), workers=0)
    orders = [image_ids(run_epoch(loader, epoch)) for epoch in range(4)]
    orders.append(image_ids(run_epoch(train_loader(NoiseDataset(), seed=9), 0)))
    all_ids = sorted(str(i) for i in range(len(SIZES)))
    assert all(sorted(order) == all_ids for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


@given(count=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 10_000))
def test_the_sampler_visits_every_index_once_with_its_epoch(
    count: int, seed: int, epoch: int
) -> None:
    sampler = EpochSampler([count], seed)
    sampler.epoch = epoch
    assert sorted(sampler) == [(epoch, index) for index in range(count)]
    assert list(sampler) == list(sampler)
    assert len(sampler) == count


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_does_not_advance_global_generators(workers: int) -> None:
    """Dropout uses torch's generator. If loading advanced it, workers would change the weights."""

    def states() -> tuple[bytes, str, object]:
        numpy_state = np.random.get_state()  # noqa: NPY002 - the legacy global generator is meant
        return torch.get_rng_state().numpy().tobytes(), repr(numpy_state), random.getstate()

    before = states()
    list(train_loader(NoiseDataset(), workers=workers))
    list(eval_loader(NoiseDataset(), workers=workers))
    assert states() == before


# --------------------------------------------------------------------------- several datasets


def epoch_indices(sampler: EpochSampler, epoch: int = 0) -> list[int]:
    sampler.epoch = epoch
    return [index for _, index in sampler]


def test_weights_set_the_share_of_each_dataset() -> None:
    counts = Counter(
        index >= 30 for index in epoch_indices(EpochSampler([30, 70], 0, weights=[3, 1]))
    )
    assert counts == {False: 75, True: 25}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
    epoch=st.integers(0, 3),
)
def test_no_image_repeats_before_all_of_its_dataset_are_visited(
    lengths: list[int], data: st.DataObject, epoch: int
) -> None:
    weight = st.floats(0.01, 10)
    weights = data.draw(st.lists(weight, min_size=len(lengths), max_size=len(lengths)))
    found = epoch_indices(EpochSampler(lengths, 0, weights=weights), epoch)

    assert len(found) == sum(lengths)
    starts = np.cumsum([0, *lengths])
    for start, end in pairwise(starts):
        visits = Counter(dict.fromkeys(range(start, end), 0))
        visits.update(index for index in found if start <= index < end)
        assert max(visits.values()) - min(visits.values()) <= 1
    expected = np.array(weights) / sum(weights) * sum(lengths)
    actual = [sum(s <= i < e for i in found) for s, e in pairwise(starts)]
    assert np.abs(expected - actual).max() <= 1


def test_weighted_datasets_are_mixed_differently_in_each_epoch() -> None:
    sampler = EpochSampler([50, 50], 0, weights=[1, 1])
    first, second = epoch_indices(sampler, 0), epoch_indices(sampler, 1)
    assert first != second
    assert 15 < sum(index < 50 for index in first[:50]) < 35
    assert epoch_indices(EpochSampler([50, 50], 0, weights=[1, 1]), 1) == second


# --------------------------------------------------------------------------- several processes


@given(total=st.integers(1, 50), world_size=st.integers(1, 6), epoch=st.integers(0, 2))
def test_ranks_share_an_epoch_equally(total: int, world_size: int, epoch: int) -> None:
    alone = epoch_indices(EpochSampler([total], 3), epoch)
    parts = [
        epoch_indices(EpochSampler([total], 3, rank=rank, world_size=world_size), epoch)
        for rank in range(world_size)
    ]

    assert len({len(part) for part in parts}) == 1
    assert len(EpochSampler([total], 3, world_size=world_size)) == len(parts[0])
    together = [index for group in zip(*parts, strict=True) for index in group]
    # Interleaved, they match a single process; the end repeats the first indices.
    assert together[:total] == alone
    assert len(together) - total < world_size


@given(
    sizes=st.lists(st.sampled_from([(9, 9), (9, 12)]), max_size=30), world_size=st.integers(1, 5)
)
def test_ranks_evaluate_every_image_once(sizes: list[tuple[int, int]], world_size: int) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in SameSizeBatchSampler(NoiseDataset(sizes), 4, rank=rank, world_size=world_size)
    ]
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))


# --------------------------------------------------------------------------- backdrops


class PasteBackdrop:
    """A transform that returns the backdrop, or the image if there is none."""

    def short_side(self, *, seed: int, epoch: int, index: int) -> int:
        return 24

    def __call__(
        self, sample: Sample, *, seed: int, epoch: int, index: int, backdrop: BackdropFn | None
    ) -> Sample:
        assert backdrop is not None
        behind = backdrop(seed + epoch + index)
        image = sample.image if behind is None else behind
        mask = np.zeros(image.shape[:2], dtype=np.uint8)
        return Sample(image=image, mask=mask, image_id=sample.image_id)


def test_backdrops_are_negatives_at_the_same_scale() -> None:
    dataset = NoiseDataset([(48, 48)] * 6, negatives=[2, 5])
    images = TrainImages(dataset, PasteBackdrop(), seed=0)
    for index in range(6):
        sample = images[(0, index)]
        assert isinstance(sample, Sample)
        expected = dataset.sample([2, 5][index % 2], 24).image
        assert np.array_equal(sample.image, expected)


def test_no_backdrop_without_a_readable_negative() -> None:
    without_negatives = TrainImages(NoiseDataset([(48, 48)] * 2), PasteBackdrop(), seed=0)
    damaged = FaultyDataset({1}, [(48, 48)] * 2)
    damaged.index.num_people[1] = 0
    for images in (without_negatives, TrainImages(damaged, PasteBackdrop(), seed=0)):
        sample = images[(0, 0)]
        assert isinstance(sample, Sample)
        assert np.array_equal(sample.image, NoiseDataset([(48, 48)]).sample(0, 24).image)


# --------------------------------------------------------------------------- same-size batches


@given(
    sizes=st.lists(st.sampled_from([(1, 1), (1, 2), (2, 1), (9, 9)]), max_size=40),
    batch_size=st.integers(1, 9),
)
def test_same_size_batches_visit_every_image_once(
    sizes: list[tuple[int, int]], batch_size: int
) -> None:
    dataset = NoiseDataset(sizes)
    batches = SameSizeBatchSampler(dataset, batch_size)

    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
    # The minimum number: all batches of a size are full except the last one.
    min_batches = sum(-(-count // batch_size) for count in Counter(sizes).values())
    assert len(batches) == len(list(batches)) == min_batches
    assert all(len(batch) <= batch_size for batch in batches)


# --------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("total", "expected"), [(1, 1), (8, 1), (199, 1), (200, 2), (118_287, 1182)]
)
def test_one_percent_and_at_least_one_sample_may_be_bad(total: int, expected: int) -> None:
    assert max_bad_samples(total) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_skipped_and_counted_once(workers: int) -> None:
    """The augmentation of the other images does not change."""
    intact = crops_by_id(run_epoch(train_loader(NoiseDataset()), 1))
    loader = train_loader(FaultyDataset({5}), workers=workers)

    run_epoch(loader, 0)
    remaining = crops_by_id(run_epoch(loader, 1))

    assert loader.damaged == {"image 5 is damaged"}
    assert remaining == {image_id: crop for image_id, crop in intact.items() if image_id != "5"}


def test_a_batch_with_only_damaged_images_is_skipped() -> None:
    for loader in (
        train_loader(FaultyDataset({2}), batch_size=1),
        eval_loader(FaultyDataset({2}), batch_size=1),
    ):
        batches = list(loader)
        assert len(batches) == len(SIZES) - 1
        assert all(len(batch["image"]) == 1 for batch in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_images_are_an_error(workers: int) -> None:
    dataset = FaultyDataset({3, 7})
    with pytest.raises(DataError, match=r"2 of 9 images cannot be used, last: image [37] is"):
        list(train_loader(dataset, workers=workers))
    with pytest.raises(DataError, match="2 of 9 images"):
        list(eval_loader(dataset, workers=workers))


def test_damaged_images_are_counted_across_epochs() -> None:
    dataset = FaultyDataset({3})
    loader = train_loader(dataset)
    run_epoch(loader, 0)
    dataset.faulty = {4}
    with pytest.raises(DataError, match="2 of 9 images"):
        run_epoch(loader, 1)


def test_a_truncated_jpeg_is_skipped_and_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [image_row(i, 40, 50, f"{i}.jpg") for i in range(4)]
    photos = {i: rng.integers(0, 256, (40, 50, 3), np.uint8) for i in range(4)}
    write_coco(tmp_path, "train", images, [], pixels=photos)
    path = tmp_path / "train2017" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-300])

    loader = train_loader(CocoDataset(tmp_path, "train"))

    assert sorted(image_ids(list(loader))) == ["0", "1", "3"]
    (message,) = loader.damaged
    assert str(path) in message


def test_the_toy_dataset_loads_completely(tmp_path: Path) -> None:
    """Other tests train on it; one image per split has no people."""
    root = make_toy_coco(tmp_path, num_train=6, num_val=3)
    train, val = train_loader(CocoDataset(root, "train")), eval_loader(CocoDataset(root, "val"))
    assert len(image_ids(list(train))) == 6
    people = [bool((mask == 1).any()) for batch in val for mask in batch["mask"]]
    assert sorted(people) == [False, True, True]


@pytest.fixture
def _collect_dead_workers() -> Iterator[None]:
    """Clean up after tests with dead workers: torch tracks them while their loader exists."""
    yield
    gc.collect()


class KilledWorkers(FaultyDataset):
    """Workers that are killed while decoding."""

    signal = signal.SIGKILL

    def fail(self, index: int) -> None:
        assert get_worker_info() is not None  # otherwise this would kill pytest
        os.kill(os.getpid(), self.signal)


class CrashedWorkers(KilledWorkers):
    """Workers that crash, as with a null pointer."""

    signal = signal.SIGSEGV


# torch reports the death from a signal handler, which may interrupt it while it opens files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_collect_dead_workers")
@pytest.mark.parametrize("kind", [KilledWorkers, CrashedWorkers])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("load", [train_loader, eval_loader])
def test_a_dead_worker_is_a_resource_error_with_the_image(
    kind: type[KilledWorkers], workers: int, load: Callable[..., Batches]
) -> None:
    loader = load(kind({5}), workers=workers, batch_size=1)
    with pytest.raises(ResourceError, match=r"died or hangs at image 5, .*--workers 0"):
        list(loader)


class HangingWorkers(FaultyDataset):
    def fail(self, index: int) -> None:
        assert get_worker_info() is not None
        time.sleep(300)


@pytest.fixture
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segtrain.data.loader._TIMEOUT", 1.0)
    # The time that torch waits for a worker to exit.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.mark.usefixtures("_short_timeout", "_collect_dead_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hanging_worker_is_a_resource_error_and_is_killed(workers: int) -> None:
    loader = train_loader(HangingWorkers({5}), workers=workers, batch_size=1)
    before = worker_pids()
    started = time.monotonic()

    with pytest.raises(ResourceError, match="hangs at image 5"):
        list(loader)

    assert time.monotonic() - started < 8
    del loader
    gc.collect()
    deadline = time.monotonic() + 5
    while worker_pids() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker_pids() - before


def worker_pids() -> set[int]:
    """Process ids of the running children."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


class DiesWhileOthersWork(FaultyDataset):
    """Image 5 kills its worker while the other worker has been at image 4 for longer."""

    def fail(self, index: int) -> None:
        if index == 5:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)


@pytest.mark.usefixtures("_short_timeout", "_collect_dead_workers")
def test_the_image_of_the_dead_worker_is_named_and_not_that_of_a_slow_one() -> None:
    loader = eval_loader(DiesWhileOthersWork({4, 5}, [(24, 24)] * 6), workers=2, batch_size=1)
    with pytest.raises(ResourceError, match="at image 5,"):
        list(loader)


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_lost_connection_to_a_worker_is_a_resource_error(
    error: type[Exception],
) -> None:
    """The memory of a batch arrives through a socket, and torch raises socket errors unchanged."""

    class BrokenLoader:
        num_workers, sampler = 1, None
        dataset = WorkerTracker(TrainImages(NoiseDataset(), TrainTransform(8), seed=0), workers=1)

        def __iter__(self) -> Iterator[Batch]:
            raise error(errno.ECONNRESET, "Connection reset by peer")
            yield

    with pytest.raises(ResourceError, match="--workers 0"):
        list(Batches(BrokenLoader(), 9))  # type: ignore[arg-type]


@pytest.mark.usefixtures("_collect_dead_workers", "no_curves")
def test_training_with_a_killed_worker_exits_with_5_and_keeps_its_checkpoints(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainTransform.__call__

    def call(transform: TrainTransform, sample: Sample, **key: Any) -> Sample:
        if key["epoch"] == 1 and key["index"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(transform, sample, **key)

    command = ["train", "--data", toy_coco, *TINY, "--batch-size", "2", "--workers", "2"]
    command += ["--name", "toy"]
    assert segtrain(*command, "--epochs", "1").code == 0
    before = digests(Path("runs/toy"))
    monkeypatch.setattr(TrainTransform, "__call__", call)

    finished = segtrain(*command, "--epochs", "2", "--resume", "auto")

    line = assert_one_error(finished, 5)
    assert "000000000004.png" in line  # the fourth image of the training split
    assert digests(Path("runs/toy")) == before


# The test needs permission to mount a file system.
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.slow
def test_training_reports_too_little_shared_memory_at_the_start(tmp_path: Path) -> None:
    if subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    root = make_toy_coco(tmp_path / "coco", size=(320, 320))
    train = [sys.executable, "-m", "segtrain", "train", "--data", root, *TINY, "--epochs", "1"]
    train += ["--batch-size", "4", "--workers", "2", "--image-size", "320"]
    mount_and_train = (
        f"mount -t tmpfs -o size=1m none /dev/shm && exec {shlex.join(map(str, train))}"
    )
    python_path = str(Path(segtrain_package.__file__).parents[1])

    process = subprocess.run(
        [*UNSHARE, "sh", "-c", mount_and_train],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": python_path},
    )

    line = assert_one_error(Finished(process.returncode, process.stdout, process.stderr), 5)
    assert "/dev/shm has 1 MB free" in line
    assert "--workers 0" in line


class DiesBetweenImages(FaultyDataset):
    """The worker dies after it has returned the image, so the cause is unknown."""

    def fail(self, index: int) -> None:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()


@pytest.mark.usefixtures("_collect_dead_workers")
def test_no_image_is_named_if_none_was_being_read() -> None:
    loader = train_loader(DiesBetweenImages({8}, [(24, 24)] * 9), workers=1, batch_size=9)

    def train() -> None:
        with worker_errors(loader.tracker):
            for _ in loader:
                time.sleep(3)  # torch reports the death during the training step

    with pytest.raises(ResourceError, match="a loader process died or hangs, perhaps"):
        train()


class NoMemoryToDecode(FaultyDataset):
    def fail(self, index: int) -> None:
        raise MemoryError("Unable to allocate 9 GiB")


def test_a_worker_out_of_memory_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="fewer --workers"):
        list(train_loader(NoMemoryToDecode({5}), workers=1))


def test_too_little_shared_memory_is_reported_before_the_first_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def disk_usage(path: Path) -> shutil._ntuple_diskusage:
        assert path == Path("/dev/shm")
        return shutil._ntuple_diskusage(1_000_000, 0, 1_000_000)

    monkeypatch.setattr("segtrain.data.workers.shutil.disk_usage", disk_usage)

    # Two workers could hold four batches, but an epoch has three.
    check_shared_memory(2, 3, bytes_per_batch=333_333)
    check_shared_memory(0, 3, bytes_per_batch=10**12)
    with pytest.raises(ResourceError, match=r"1 MB free.*need 2 MB; use --workers 0"):
        check_shared_memory(2, 3, bytes_per_batch=500_000)


class ProcessGroups(NoiseDataset):
    """The image id is the process group of the worker."""

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        sample = super().sample(index, short_side)
        return Sample(image=sample.image, mask=sample.mask, image_id=str(os.getpgrp()))


def test_workers_are_not_in_the_process_group_of_the_main_process() -> None:
    """Only the main process gets a signal to the group; it saves and then ends its workers."""
    groups = image_ids(list(train_loader(ProcessGroups(), workers=2)))
    assert len(set(groups)) == 2
    assert str(os.getpgrp()) not in groups


class BuggyDataset(FaultyDataset):
    def fail(self, index: int) -> None:
        raise RuntimeError("a bug in the dataset")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_worker_is_not_a_resource_error(workers: int) -> None:
    """The message from torch starts with "Caught RuntimeError in DataLoader worker process 0"."""
    with pytest.raises(RuntimeError, match="a bug in the dataset"):
        list(train_loader(BuggyDataset({5}), workers=workers))


class NoSharedMemory(FaultyDataset):
    """The worker cannot create files above a kilobyte, including those in /dev/shm."""

    def fail(self, index: int) -> None:
        assert get_worker_info() is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def test_full_shared_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with 64 MB of /dev/shm: do not wait forever for a lost batch."""

    def raise_timeout(*_: object) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "still waiting for a batch that never comes")

    monkeypatch.setattr("segtrain.data.loader._TIMEOUT", 3.0)
    previous_handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(30)  # in case the loader waits forever
    try:
        with pytest.raises(ResourceError, match="/dev/shm"):
            list(train_loader(NoSharedMemory({0, 1, 2}), workers=1))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous_handler)


# --------------------------------------------------------------------------- workers


EXIT_IN_MID_EPOCH = """
from test_loader import NoiseDataset, train_loader
batches = iter(train_loader(NoiseDataset(), workers=2))
next(batches)
raise SystemExit(3)
"""


def test_a_program_that_exits_in_mid_epoch_does_not_wait_for_its_workers() -> None:
    """Workers block SIGTERM, by which multiprocessing ends its children."""
    tests = Path(__file__).parents[1]
    folders = [Path(segtrain_package.__file__).parents[1], tests, tests / "data"]
    process = subprocess.Popen(
        [sys.executable, "-c", EXIT_IN_MID_EPOCH],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=60) == 3
    finally:
        with contextlib.suppress(ProcessLookupError):  # no process is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (3, 1), (8, 4), (16, 8), (128, 8)])
def test_auto_is_one_worker_per_two_cores(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A container may have fewer cores than the machine.
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert resolve_workers("auto") == workers


@pytest.mark.parametrize("workers", [0, 1, 30])
def test_a_number_of_workers_is_used_unchanged(workers: int) -> None:
    assert resolve_workers(workers) == workers
