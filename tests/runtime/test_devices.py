"""Devices, precisions, prefetching, and malloc."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from segtrain.runtime.devices import (
    ResolvedPrecision,
    autocast_for,
    prefetch,
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


def test_on_a_cpu_batches_pass_unchanged() -> None:
    batches = list(numbered_batches(3))
    prefetched = list(prefetch(batches, torch.device("cpu")))
    assert all(a is b for a, b in zip(batches, prefetched, strict=True))


def test_on_a_cpu_no_batch_is_read_ahead() -> None:
    read: list[int] = []

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(numbered_batches(3)):
            read.append(number)
            yield batch

    next(prefetch(batches(), torch.device("cpu")))
    assert read == [0]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_auto_on_a_cpu_is_bf16_if_it_has_bf16_instructions() -> None:
    has_bf16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()

    assert resolve_precision("auto", torch.device("cpu")) == ("bf16" if has_bf16 else "fp32")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True)])
def test_only_tf32_rounds_float32_and_the_switches_are_restored(
    precision: ResolvedPrecision, tf32: bool, before: bool
) -> None:
    """torch rounds convolutions by default, in evaluation and prediction too."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = before
    with autocast_for(precision, torch.device("cuda"))():
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.cudnn.allow_tf32 == before
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_on_a_gpu_batches_arrive_complete_and_in_order(count: int, pinned: bool) -> None:
    device = torch.device("cuda")
    busy = torch.randn(2048, 2048, device=device)
    results = []
    for batch in prefetch(numbered_batches(count, pinned=pinned), device):
        busy = busy @ busy * 1e-3  # the next copy must not overwrite a batch in use
        assert batch["image"].device.type == batch["mask"].device.type == "cuda"
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        total = batch["image"].float().mean() + batch["mask"].float().mean()
        results.append((total, batch["image_id"]))
    assert [(total.item() / 2, ids) for total, ids in results] == [
        (number, [str(number)]) for number in range(count)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_pinned_memory_is_reused_only_after_its_copy(channels_last: bool) -> None:
    """The GPU is far behind, while new batches reuse the memory of earlier ones."""
    device, side = torch.device("cuda"), 512

    def batches() -> Iterator[Batch]:
        for number in range(30):
            image = torch.full((2, 3, side, side), number, dtype=torch.uint8)
            if channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            yield {"image": image.pin_memory(), "mask": torch.full((2, side, side), number)}

    extremes = []
    for batch in prefetch(batches(), device):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        extremes.append(torch.stack([batch["image"].min(), batch["image"].max()]))

    assert torch.stack(extremes).tolist() == [[number, number] for number in range(30)]


COUNT_PAGE_FAULTS = """
import resource, sys, torch
from segtrain.runtime.devices import keep_freed_memory
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
def test_kept_memory_is_not_zeroed_again() -> None:
    """Counted in page faults: 1,280 MB are 320,000 pages of 4 KB, or 640 of 2 MB."""
    faults = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", COUNT_PAGE_FAULTS, way],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for way in ("returned", "kept")
    }

    assert faults["returned"] >= 640
    # The heap may grow a few times before a block is reused.
    assert faults["kept"] < faults["returned"] * 0.6
