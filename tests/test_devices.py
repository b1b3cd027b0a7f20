"""Batches on their way to the device, and the memory of tensors."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from segtrain.devices import (
    ResolvedPrecision,
    autocast_for,
    prefetched,
    resolve_precision,
)

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


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_auto_on_a_cpu_is_bf16_where_it_has_instructions_for_it() -> None:
    has_bf16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()

    assert resolve_precision("auto", torch.device("cpu")) == ("bf16" if has_bf16 else "fp32")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True)])
def test_only_tf32_rounds_float32_and_torchs_switches_are_put_back(
    precision: ResolvedPrecision, tf32: bool, before: bool
) -> None:
    """torch's default rounds convolutions in evaluation and prediction, too."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = before
    with autocast_for(precision, torch.device("cuda"))():
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.cudnn.allow_tf32 == before
    assert torch.backends.cuda.matmul.allow_tf32 == before


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


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_pinned_memory_is_used_again_only_when_its_copy_is_done(channels_last: bool) -> None:
    """The GPU is far behind, while new batches take the memory of those handed over."""
    device, side = torch.device("cuda"), 512

    def batches() -> Iterator[Batch]:
        for number in range(30):
            image = torch.full((2, 3, side, side), number, dtype=torch.uint8)
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            yield {"image": image.pin_memory(), "mask": torch.full((2, side, side), number)}

    seen = []
    for batch in prefetched(batches(), device):
        torch.cuda._sleep(20_000_000)  # cycles, about a hundredth of a second
        seen.append(torch.stack([batch["image"].min(), batch["image"].max()]))

    assert torch.stack(seen).tolist() == [[number, number] for number in range(30)]


KEEPS_MEMORY = """
import resource, sys, torch
from segtrain.devices import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="another C library")
@pytest.mark.slow
def test_memory_that_is_kept_need_not_be_cleared_again() -> None:
    """Counted in page faults: 1,280 MB are 320,000 pages of 4 KB, or 640 of 2 MB."""
    faults = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", KEEPS_MEMORY, way],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for way in ("given back", "kept")
    }

    assert faults["given back"] >= 640
    # The heap may grow a few times before a piece is found again.
    assert faults["kept"] < faults["given back"] * 0.6
