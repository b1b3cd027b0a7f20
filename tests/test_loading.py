"""The same bytes for the same (seed, epoch), however many processes load them."""

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
from coco_fixtures import image_row, make_toy_coco, write_coco
from conftest import Command, Finished
from faults import TINY, assert_one_error, digests
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import get_worker_info

import segtrain as segtrain_package
from segtrain.data.borders import border_map
from segtrain.data.coco import CocoPeople
from segtrain.data.loading import (
    Backdrop,
    Batch,
    Batches,
    EpochSampler,
    SameSizeBatches,
    TrainImages,
    eval_batches,
    train_batches,
)
from segtrain.data.sample import Catalog, Sample, tolerated
from segtrain.data.transforms import TrainTransform
from segtrain.data.workers import Watched, check_shared_memory, resolve_workers, worker_errors
from segtrain.errors import DataError, ResourceError
from segtrain.images import resize_image, scaled_size

IMAGE_SIZE = 24
SIZES = [(30, 40), (40, 30), (24, 24), (24, 60), (50, 31), (33, 33), (26, 90), (60, 25), (24, 25)]


class Pictures:
    """Noise with people and crowds in it, of the given sizes."""

    def __init__(self, sizes: list[tuple[int, int]] = SIZES, negatives: Sequence[int] = ()) -> None:
        count = len(sizes)
        self.catalog = Catalog(
            sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
            person_share=np.full(count, 0.5, dtype=np.float32),
            num_people=np.array([index not in negatives for index in range(count)], dtype=np.int32),
            has_crowd=np.zeros(count, dtype=bool),
            identities=np.arange(count, dtype=np.uint64),
        )
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.catalog)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        rng = np.random.default_rng(index)
        height, width = self.catalog.sizes[index]
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = blobs(rng, height, width)
        if short_side is not None:
            size = scaled_size(height, width, short_side)
            image = resize_image(image, size)
            mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
        return Sample(image=image, mask=mask, image_id=str(index))

    def picture_path(self, index: int) -> Path:
        return Path(self.describe(index))

    def describe(self, index: int) -> str:
        return f"picture {index}"


class PicturesWithFaults(Pictures):
    """Pictures of which some do what a test wants to see."""

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
    """Large rectangles of each mask value."""
    mask = np.zeros((height, width), dtype=np.uint8)
    for value in (1, 255, 1):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        mask[top : top + height // 2, left : left + width // 2] = value
    return mask


def training(
    source: Pictures | CocoPeople,
    *,
    workers: int = 0,
    seed: int = 0,
    batch_size: int = 4,
    border_sigma: float | None = None,
) -> Batches:
    return train_batches(
        source,
        TrainTransform(IMAGE_SIZE, scale=(1.0, 1.5)),
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        pin_memory=False,
        border_sigma=border_sigma,
    )


def evaluation(
    source: Pictures | CocoPeople, *, workers: int = 0, image_size: int = 16, batch_size: int = 4
) -> Batches:
    return eval_batches(
        source, image_size=image_size, batch_size=batch_size, workers=workers, pin_memory=False
    )


def epoch_of(loader: Batches, epoch: int) -> list[Batch]:
    loader.set_epoch(epoch)
    return list(loader)


def digest(batches: list[Batch]) -> str:
    """Of every byte in its order."""
    sha = hashlib.sha256()
    for batch in batches:
        sha.update(repr((batch["image"].shape, batch["image_id"])).encode())
        sha.update(batch["image"].numpy().tobytes())
        sha.update(batch["mask"].numpy().tobytes())
    return sha.hexdigest()


def crops(batches: list[Batch]) -> dict[str, bytes]:
    """image_id → the crop's bytes, whatever the order."""
    return {
        image_id: image.numpy().tobytes() + mask.numpy().tobytes()
        for batch in batches
        for image_id, image, mask in zip(
            batch["image_id"], batch["image"], batch["mask"], strict=True
        )
    }


def ids(batches: list[Batch]) -> list[str]:
    return [image_id for batch in batches for image_id in batch["image_id"]]


# --------------------------------------------------------------------------- what a batch is


@pytest.mark.parametrize("workers", [0, 1])
def test_training_batches_are_bytes_in_channels_last(workers: int) -> None:
    batches = list(training(Pictures(), workers=workers))

    assert [len(batch["image_id"]) for batch in batches] == [4, 4, 1]
    for batch in batches:
        count = len(batch["image_id"])
        assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
        assert batch["image"].shape == (count, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert batch["mask"].shape == (count, IMAGE_SIZE, IMAGE_SIZE)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert batch["mask"].is_contiguous()


def test_evaluation_scales_the_image_and_not_the_mask() -> None:
    source = Pictures()
    batches = list(evaluation(source, image_size=16))

    assert sorted(ids(batches), key=int) == [str(i) for i in range(len(source))]
    for batch in batches:
        assert min(batch["image"].shape[2:]) == 16
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        for image_id, mask in zip(batch["image_id"], batch["mask"], strict=True):
            assert np.array_equal(mask.numpy(), source.sample(int(image_id)).mask)


def test_a_picture_already_of_the_networks_size_is_evaluated_as_it_is() -> None:
    source = Pictures([(16, 20)])
    (batch,) = evaluation(source, image_size=16)
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), source.sample(0).image)


# --------------------------------------------------------------------------- borders


@pytest.mark.parametrize("workers", [0, 1])
def test_with_a_sigma_each_crop_has_the_border_map_of_its_mask(workers: int) -> None:
    """Of the mask after augmentation; and the rest of the batch stays as it is without."""
    plain = list(training(Pictures(), workers=workers))
    batches = list(training(Pictures(), workers=workers, border_sigma=5.0))

    assert digest(batches) == digest(plain)
    assert any(batch["border"].any() for batch in batches)
    for batch in batches:
        assert batch["border"].dtype == torch.uint8
        assert batch["border"].shape == batch["mask"].shape
        assert batch["border"].is_contiguous()
        for mask, border in zip(batch["mask"], batch["border"], strict=True):
            assert np.array_equal(border.numpy(), border_map(mask.numpy(), 5.0))


def test_the_sigma_is_the_one_that_was_asked_for() -> None:
    narrow, wide = (list(training(Pictures(), border_sigma=sigma)) for sigma in (1.0, 9.0))
    assert sum(int(b["border"].sum()) for b in narrow) < sum(int(b["border"].sum()) for b in wide)


def test_without_a_sigma_and_in_evaluation_there_is_no_border() -> None:
    for batch in [*training(Pictures()), *evaluation(Pictures())]:
        assert "border" not in batch


@pytest.mark.parametrize("border_sigma", [None, 5.0])
def test_a_batch_is_one_piece_of_memory(border_sigma: float | None) -> None:
    """And has no byte that nobody needs."""
    for batch in training(Pictures(), border_sigma=border_sigma):
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == (2 if border_sigma is None else 3)
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        size = tensors[0].untyped_storage().nbytes()
        assert size == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_has_no_border(workers: int) -> None:
    loader = training(PicturesWithFaults({5}), workers=workers, border_sigma=5.0, batch_size=1)
    batches = list(loader)
    assert len(batches) == len(SIZES) - 1
    assert all(batch["border"].shape == batch["mask"].shape for batch in batches)


# --------------------------------------------------------------------------- the same draws


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_no_bit(workers: int) -> None:
    """Over several epochs, because worker processes live on and could go on with their draws."""
    alone, together = training(Pictures()), training(Pictures(), workers=workers)
    for epoch in (0, 1, 2):
        assert digest(epoch_of(together, epoch)) == digest(epoch_of(alone, epoch))


def test_worker_processes_change_no_bit_in_evaluation() -> None:
    source = Pictures()
    assert digest(list(evaluation(source, workers=2))) == digest(list(evaluation(source)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_later_start_at_the_same_epoch_sees_the_same(workers: int) -> None:
    """What a resumed run relies on."""
    straight = training(Pictures(), workers=workers)
    for epoch in (0, 1):
        epoch_of(straight, epoch)
    resumed = training(Pictures(), workers=workers)
    assert digest(epoch_of(resumed, 2)) == digest(epoch_of(straight, 2))


def test_an_epoch_left_half_way_can_be_started_anew() -> None:
    loader = training(Pictures(), workers=1)
    loader.set_epoch(3)
    next(iter(loader))
    assert digest(epoch_of(loader, 3)) == digest(epoch_of(training(Pictures()), 3))


def test_every_epoch_and_seed_draws_other_crops_of_the_same_pictures() -> None:
    """Judged picture by picture: another order alone would not be enough."""
    source = Pictures()
    base = crops(epoch_of(training(source), 0))
    others = [
        crops(epoch_of(training(source), 1)),
        crops(epoch_of(training(source), 2)),
        crops(epoch_of(training(source, seed=1), 0)),
    ]
    for other in others:
        changed = sum(other[image_id] != crop for image_id, crop in base.items())
        assert changed >= len(source) - 1


def test_pictures_do_not_share_their_draws() -> None:
    """Eight times one picture: as good as all crops differ."""

    class OnePicture(Pictures):
        def sample(self, index: int, short_side: int | None = None) -> Sample:
            first = super().sample(0, short_side)
            return Sample(image=first.image, mask=first.mask, image_id=str(index))

    assert len(set(crops(list(training(OnePicture([(60, 80)] * 8)))).values())) >= 7


def test_each_epoch_is_another_order_of_every_picture() -> None:
    loader = training(Pictures(), workers=0)
    orders = [ids(epoch_of(loader, epoch)) for epoch in range(4)]
    orders.append(ids(epoch_of(training(Pictures(), seed=9), 0)))
    everything = sorted(str(i) for i in range(len(SIZES)))
    assert all(sorted(order) == everything for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


@given(count=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 10_000))
def test_the_sampler_visits_every_index_once_and_says_the_epoch(
    count: int, seed: int, epoch: int
) -> None:
    sampler = EpochSampler([count], seed)
    sampler.epoch = epoch
    assert sorted(sampler) == [(epoch, index) for index in range(count)]
    assert list(sampler) == list(sampler)
    assert len(sampler) == count


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_from_nobody_elses_generator(workers: int) -> None:
    """Dropout draws from torch's: loading must not move it, or workers would change the weights."""

    def states() -> tuple[bytes, str, object]:
        numpy_state = np.random.get_state()  # noqa: NPY002 - the old global one is what is meant
        return torch.get_rng_state().numpy().tobytes(), repr(numpy_state), random.getstate()

    before = states()
    list(training(Pictures(), workers=workers))
    list(evaluation(Pictures(), workers=workers))
    assert states() == before


# --------------------------------------------------------------------------- crops


# --------------------------------------------------------------------------- several data sets


def indices(sampler: EpochSampler, epoch: int = 0) -> list[int]:
    sampler.epoch = epoch
    return [index for _, index in sampler]


def test_weights_are_shares_of_an_epoch() -> None:
    counts = Counter(index >= 30 for index in indices(EpochSampler([30, 70], 0, weights=[3, 1])))
    assert counts == {False: 75, True: 25}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
    epoch=st.integers(0, 3),
)
def test_no_picture_comes_again_before_all_of_its_set_have_come(
    lengths: list[int], data: st.DataObject, epoch: int
) -> None:
    weight = st.floats(0.01, 10)
    weights = data.draw(st.lists(weight, min_size=len(lengths), max_size=len(lengths)))
    found = indices(EpochSampler(lengths, 0, weights=weights), epoch)

    assert len(found) == sum(lengths)
    starts = np.cumsum([0, *lengths])
    for start, end in pairwise(starts):
        of_set = Counter(dict.fromkeys(range(start, end), 0))
        of_set.update(index for index in found if start <= index < end)
        assert max(of_set.values()) - min(of_set.values()) <= 1
    wanted = np.array(weights) / sum(weights) * sum(lengths)
    got = [sum(s <= i < e for i in found) for s, e in pairwise(starts)]
    assert np.abs(wanted - got).max() <= 1


def test_weighted_sets_are_mixed_and_no_epoch_is_like_another() -> None:
    sampler = EpochSampler([50, 50], 0, weights=[1, 1])
    first, second = indices(sampler, 0), indices(sampler, 1)
    assert first != second
    assert 15 < sum(index < 50 for index in first[:50]) < 35
    assert indices(EpochSampler([50, 50], 0, weights=[1, 1]), 1) == second


# --------------------------------------------------------------------------- several processes


@given(total=st.integers(1, 50), world_size=st.integers(1, 6), epoch=st.integers(0, 2))
def test_processes_share_an_epoch_in_equal_parts(total: int, world_size: int, epoch: int) -> None:
    alone = indices(EpochSampler([total], 3), epoch)
    parts = [
        indices(EpochSampler([total], 3, rank=rank, world_size=world_size), epoch)
        for rank in range(world_size)
    ]

    assert len({len(part) for part in parts}) == 1
    assert len(EpochSampler([total], 3, world_size=world_size)) == len(parts[0])
    together = [index for group in zip(*parts, strict=True) for index in group]
    # Side by side they see what one process sees, and at the end the first ones again.
    assert together[:total] == alone
    assert len(together) - total < world_size


@given(
    sizes=st.lists(st.sampled_from([(9, 9), (9, 12)]), max_size=30), world_size=st.integers(1, 5)
)
def test_processes_judge_every_picture_once(sizes: list[tuple[int, int]], world_size: int) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in SameSizeBatches(Pictures(sizes), 4, rank=rank, world_size=world_size)
    ]
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))


# --------------------------------------------------------------------------- backdrops


class Pasting:
    """A transform that shows the backdrop it is given."""

    def short_side(self, *, seed: int, epoch: int, index: int) -> int:
        return 24

    def __call__(
        self, sample: Sample, *, seed: int, epoch: int, index: int, backdrop: Backdrop | None
    ) -> Sample:
        assert backdrop is not None
        picture = backdrop(seed + epoch + index)
        image = sample.image if picture is None else picture
        mask = np.zeros(image.shape[:2], dtype=np.uint8)
        return Sample(image=image, mask=mask, image_id=sample.image_id)


def test_backdrops_are_pictures_without_people_at_the_same_scale() -> None:
    source = Pictures([(48, 48)] * 6, negatives=[2, 5])
    images = TrainImages(source, Pasting(), seed=0)
    for index in range(6):
        sample = images[(0, index)]
        assert isinstance(sample, Sample)
        expected = source.sample([2, 5][index % 2], 24).image
        assert np.array_equal(sample.image, expected)


def test_without_a_whole_negative_there_is_no_backdrop() -> None:
    nobody_is_absent = TrainImages(Pictures([(48, 48)] * 2), Pasting(), seed=0)
    damaged = PicturesWithFaults({1}, [(48, 48)] * 2)
    damaged.catalog.num_people[1] = 0
    for images in (nobody_is_absent, TrainImages(damaged, Pasting(), seed=0)):
        sample = images[(0, 0)]
        assert isinstance(sample, Sample)
        assert np.array_equal(sample.image, Pictures([(48, 48)]).sample(0, 24).image)


# --------------------------------------------------------------------------- one size a batch


@given(
    sizes=st.lists(st.sampled_from([(1, 1), (1, 2), (2, 1), (9, 9)]), max_size=40),
    batch_size=st.integers(1, 9),
)
def test_same_size_batches_cover_everything_once(
    sizes: list[tuple[int, int]], batch_size: int
) -> None:
    source = Pictures(sizes)
    batches = SameSizeBatches(source, batch_size)

    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
    # As few as can be: each size fills its batches, but for the last one.
    fewest = sum(-(-count // batch_size) for count in Counter(sizes).values())
    assert len(batches) == len(list(batches)) == fewest
    assert all(len(batch) <= batch_size for batch in batches)


# --------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(("total", "few"), [(1, 1), (8, 1), (199, 1), (200, 2), (118_287, 1182)])
def test_one_in_a_hundred_is_tolerated_and_one_at_least(total: int, few: int) -> None:
    assert tolerated(total) == few


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_left_out_and_counted_once(workers: int) -> None:
    """The others keep the draws that they had with it."""
    whole = crops(epoch_of(training(Pictures()), 1))
    loader = training(PicturesWithFaults({5}), workers=workers)

    epoch_of(loader, 0)
    left = crops(epoch_of(loader, 1))

    assert loader.damaged == {"picture 5 is damaged"}
    assert left == {image_id: crop for image_id, crop in whole.items() if image_id != "5"}


def test_a_batch_of_nothing_but_damaged_pictures_is_passed_over() -> None:
    for loader in (
        training(PicturesWithFaults({2}), batch_size=1),
        evaluation(PicturesWithFaults({2}), batch_size=1),
    ):
        batches = list(loader)
        assert len(batches) == len(SIZES) - 1
        assert all(len(batch["image"]) == 1 for batch in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_damaged_pictures_end_the_epoch(workers: int) -> None:
    source = PicturesWithFaults({3, 7})
    with pytest.raises(DataError, match=r"2 of 9 pictures cannot be used, last: picture [37] is"):
        list(training(source, workers=workers))
    with pytest.raises(DataError, match="2 of 9 pictures"):
        list(evaluation(source, workers=workers))


def test_damage_is_summed_up_over_epochs() -> None:
    source = PicturesWithFaults({3})
    loader = training(source)
    epoch_of(loader, 0)
    source.faulty = {4}
    with pytest.raises(DataError, match="2 of 9 pictures"):
        epoch_of(loader, 1)


def test_a_cut_jpeg_in_coco_is_left_out_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [image_row(i, 40, 50, f"{i}.jpg") for i in range(4)]
    pictures = {i: rng.integers(0, 256, (40, 50, 3), np.uint8) for i in range(4)}
    write_coco(tmp_path, "train", images, [], pictures=pictures)
    path = tmp_path / "train2017" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-300])

    loader = training(CocoPeople(tmp_path, "train"))

    assert sorted(ids(list(loader))) == ["0", "1", "3"]
    (message,) = loader.damaged
    assert str(path) in message


def test_the_toy_data_set_loads_without_a_loss(tmp_path: Path) -> None:
    """Other tests train on it; one picture a split holds nobody."""
    root = make_toy_coco(tmp_path, num_train=6, num_val=3)
    train, val = training(CocoPeople(root, "train")), evaluation(CocoPeople(root, "val"))
    assert len(ids(list(train))) == 6
    people = [bool((mask == 1).any()) for batch in val for mask in batch["mask"]]
    assert sorted(people) == [False, True, True]


@pytest.fixture
def _dead_workers() -> Iterator[None]:
    """For tests that make some: torch remembers them as long as their loader is anywhere."""
    yield
    gc.collect()


class KilledWorkers(PicturesWithFaults):
    """A decoder that is killed, or goes through a null pointer."""

    signal = signal.SIGKILL

    def fail(self, index: int) -> None:
        assert get_worker_info() is not None  # or pytest itself would go
        os.kill(os.getpid(), self.signal)


class CrashedWorkers(KilledWorkers):
    signal = signal.SIGSEGV


@pytest.mark.usefixtures("_dead_workers")
@pytest.mark.parametrize("kind", [KilledWorkers, CrashedWorkers])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("load", [training, evaluation])
def test_a_dead_worker_is_a_resource_error_that_names_the_picture(
    kind: type[KilledWorkers], workers: int, load: Callable[..., Batches]
) -> None:
    loader = load(kind({5}), workers=workers, batch_size=1)
    with pytest.raises(ResourceError, match=r"died or hangs at picture 5, .*--workers 0"):
        list(loader)


class HangingWorkers(PicturesWithFaults):
    def fail(self, index: int) -> None:
        assert get_worker_info() is not None
        time.sleep(300)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segtrain.data.loading._PATIENCE", 1.0)
    # So long torch waits for a worker to end by itself.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


@pytest.mark.usefixtures("_impatient", "_dead_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_hangs_is_a_resource_error_in_time_and_is_ended(workers: int) -> None:
    loader = training(HangingWorkers({5}), workers=workers, batch_size=1)
    before = children()
    started = time.monotonic()

    with pytest.raises(ResourceError, match="hangs at picture 5"):
        list(loader)

    assert time.monotonic() - started < 8
    del loader
    gc.collect()
    deadline = time.monotonic() + 5
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children() - before


def children() -> set[int]:
    """Processes that this one has started and that still run."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


class DiesWhileOthersWork(PicturesWithFaults):
    """Picture 5 kills its worker while the other one is at picture 4, and was there before."""

    def fail(self, index: int) -> None:
        if index == 5:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)


@pytest.mark.usefixtures("_impatient", "_dead_workers")
def test_the_dead_worker_is_meant_and_not_the_slow_one() -> None:
    loader = evaluation(DiesWhileOthersWork({4, 5}, [(24, 24)] * 6), workers=2, batch_size=1)
    with pytest.raises(ResourceError, match="at picture 5,"):
        list(loader)


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_worker_that_dies_while_its_batch_is_fetched_is_a_resource_error(
    error: type[Exception],
) -> None:
    """The batch's memory comes through a socket, and torch lets that error out as it is."""

    class Broken:
        num_workers, sampler = 1, None
        dataset = Watched(TrainImages(Pictures(), TrainTransform(8), seed=0), workers=1)

        def __iter__(self) -> Iterator[Batch]:
            raise error(errno.ECONNRESET, "Connection reset by peer")
            yield

    with pytest.raises(ResourceError, match="--workers 0"):
        list(Batches(Broken(), 9))  # type: ignore[arg-type]


@pytest.mark.usefixtures("_dead_workers", "no_curves")
def test_a_training_whose_worker_is_killed_ends_with_5_and_keeps_its_checkpoints(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_call = TrainTransform.__call__

    def call(transform: TrainTransform, sample: Sample, **key: Any) -> Sample:
        if key["epoch"] == 1 and key["index"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return true_call(transform, sample, **key)

    command = ["train", "--data", toy_coco, *TINY, "--batch-size", "2", "--workers", "2"]
    command += ["--name", "toy"]
    assert segtrain(*command, "--epochs", "1").code == 0
    before = digests(Path("runs/toy"))
    monkeypatch.setattr(TrainTransform, "__call__", call)

    finished = segtrain(*command, "--epochs", "2", "--resume", "auto")

    line = assert_one_error(finished, 5)
    assert "000000000004.png" in line  # the fourth picture of the training split
    assert digests(Path("runs/toy")) == before


# Where nobody may mount anything there is nothing to try it in.
CAN_MOUNT = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.slow
def test_a_training_with_a_tiny_shared_memory_says_so_at_once(tmp_path: Path) -> None:
    if subprocess.run([*CAN_MOUNT, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of its own")
    root = make_toy_coco(tmp_path / "coco", size=(320, 320))
    train = [sys.executable, "-m", "segtrain", "train", "--data", root, *TINY, "--epochs", "1"]
    train += ["--batch-size", "4", "--workers", "2", "--image-size", "320"]
    tiny = f"mount -t tmpfs -o size=1m none /dev/shm && exec {shlex.join(map(str, train))}"
    python_path = str(Path(segtrain_package.__file__).parents[1])

    done = subprocess.run(
        [*CAN_MOUNT, "sh", "-c", tiny],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": python_path},
    )

    line = assert_one_error(Finished(done.returncode, done.stdout, done.stderr), 5)
    assert "/dev/shm has 1 MB free" in line
    assert "--workers 0" in line


class DiesBetweenPictures(PicturesWithFaults):
    """The worker ends after it has handed the picture on: nobody can say that it was this one."""

    def fail(self, index: int) -> None:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()


@pytest.mark.usefixtures("_dead_workers")
def test_no_picture_is_named_where_none_was_being_read() -> None:
    loader = training(DiesBetweenPictures({8}, [(24, 24)] * 9), workers=1, batch_size=9)

    def train() -> None:
        with worker_errors(loader.watched):
            for _ in loader:
                time.sleep(3)  # torch tells of it while the trainer is at work

    with pytest.raises(ResourceError, match="a loader process died or hangs, perhaps"):
        train()


class NoMemoryToDecode(PicturesWithFaults):
    def fail(self, index: int) -> None:
        raise MemoryError("Unable to allocate 9 GiB")


def test_a_worker_without_memory_is_a_resource_error_about_workers() -> None:
    with pytest.raises(ResourceError, match="fewer --workers"):
        list(training(NoMemoryToDecode({5}), workers=1))


def test_too_little_shared_memory_is_found_before_the_first_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def free(path: Path) -> shutil._ntuple_diskusage:
        assert path == Path("/dev/shm")
        return shutil._ntuple_diskusage(1_000_000, 0, 1_000_000)

    monkeypatch.setattr("segtrain.data.workers.shutil.disk_usage", free)

    # Two workers could have four batches ready, but an epoch has three.
    check_shared_memory(2, 3, bytes_a_batch=333_333)
    check_shared_memory(0, 3, bytes_a_batch=10**12)
    with pytest.raises(ResourceError, match=r"1 MB free.*need 2; use --workers 0"):
        check_shared_memory(2, 3, bytes_a_batch=500_000)


class GroupsOfTheirWorkers(Pictures):
    def sample(self, index: int, short_side: int | None = None) -> Sample:
        sample = super().sample(index, short_side)
        return Sample(image=sample.image, mask=sample.mask, image_id=str(os.getpgrp()))


def test_workers_are_out_of_reach_of_a_signal_to_the_process_group() -> None:
    """The main process gets it alone; it saves, and ends its workers when it wants to."""
    groups = ids(list(training(GroupsOfTheirWorkers(), workers=2)))
    assert len(set(groups)) == 2
    assert str(os.getpgrp()) not in groups


class PicturesWithABug(PicturesWithFaults):
    def fail(self, index: int) -> None:
        raise RuntimeError("the product of all fears")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_of_ours_is_not_blamed_on_the_machine(workers: int) -> None:
    """torch words it "Caught RuntimeError in DataLoader worker process 0"."""
    with pytest.raises(RuntimeError, match="the product of all fears"):
        list(training(PicturesWithABug({5}), workers=workers))


class NoSharedMemory(PicturesWithFaults):
    """From one picture on the worker may create no file above a kilobyte, in /dev/shm neither."""

    def fail(self, index: int) -> None:
        assert get_worker_info() is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


def test_too_little_shared_memory_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with 64 MB of /dev/shm: it must not wait for ever for the lost batch."""

    def give_up(*_: object) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "still waiting for a batch that never comes")

    monkeypatch.setattr("segtrain.data.loading._PATIENCE", 3.0)
    old = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)  # only where it would wait for ever
    try:
        with pytest.raises(ResourceError, match="/dev/shm"):
            list(training(NoSharedMemory({0, 1, 2}), workers=1))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# --------------------------------------------------------------------------- workers


LEAVE_IN_MID_EPOCH = """
from test_loading import Pictures, training
batches = iter(training(Pictures(), workers=2))
next(batches)
raise SystemExit(3)
"""


def test_a_program_that_ends_in_mid_epoch_does_not_wait_for_its_workers() -> None:
    """Workers that ignore SIGTERM outlive the way in which multiprocessing ends its children."""
    folders = [Path(segtrain_package.__file__).parents[1], Path(__file__).parent]
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVE_IN_MID_EPOCH],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        start_new_session=True,
    )
    try:
        assert process.wait(timeout=60) == 3
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (3, 1), (8, 4), (16, 8), (128, 8)])
def test_auto_is_a_process_for_every_second_core(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A container may use fewer cores than the machine has.
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert resolve_workers("auto") == workers


@pytest.mark.parametrize("workers", [0, 1, 30])
def test_a_number_of_workers_is_taken_as_it_is(workers: int) -> None:
    assert resolve_workers(workers) == workers
