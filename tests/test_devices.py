"""Batches on their way to the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from segtrain.devices import prefetched

Batch = dict[str, Any]


def numbered_batches(count: int, *, pinned: bool = False) -> Iterator[Batch]:
    for number in range(count):
        image = torch.full((2, 3, 8, 8), number, dtype=torch.uint8)
        image = image.contiguous(memory_format=torch.channels_last)
        yield {
            "image": image.pin_memory() if pinned else image,
            "mask": torch.full((2, 8, 8), number, dtype=torch.uint8),
            "image_id": [str(number)],
        }


def test_on_a_cpu_batches_pass_as_they_are() -> None:
    batches = list(numbered_batches(3))
    passed = list(prefetched(batches, torch.device("cpu")))
    assert all(a is b for a, b in zip(batches, passed, strict=True))


def test_no_batch_is_asked_for_before_it_is_needed_on_a_cpu() -> None:
    asked: list[int] = []

    def counting() -> Iterator[Batch]:
        for number, batch in enumerate(numbered_batches(3)):
            asked.append(number)
            yield batch

    next(prefetched(counting(), torch.device("cpu")))
    assert asked == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_on_a_gpu_every_batch_arrives_whole_and_in_order(count: int, pinned: bool) -> None:
    device = torch.device("cuda")
    busy = torch.randn(2048, 2048, device=device)
    seen = []
    for batch in prefetched(numbered_batches(count, pinned=pinned), device):
        busy = busy @ busy * 1e-3  # the copy of the next batch must not overtake its use
        assert batch["image"].device.type == batch["mask"].device.type == "cuda"
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        total = batch["image"].float().mean() + batch["mask"].float().mean()
        seen.append((total, batch["image_id"]))
    assert [(total.item() / 2, ids) for total, ids in seen] == [
        (number, [str(number)]) for number in range(count)
    ]
