"""Out of memory on a real GPU: this process may use only a fraction of its memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.command import Command
from helpers.faults import assert_one_error

from segtrain.checkpoint import load_checkpoint
from segtrain.models import build_model
from segtrain.runtime.devices import autocast_for, move_model, resolve_device
from segtrain.training.batch_size import dry_run_step, find_micro_batch_size
from segtrain.training.losses import cross_entropy

pytestmark = pytest.mark.gpu

# The default U-Net with its optimizer takes half a gigabyte, and each image a third of one.
LARGE = ("--image-size", "224", "--workers", "0", "--precision", "fp32", "--device", "cuda")
LAST = Path("runs/large/checkpoints/last.pt")


@contextmanager
def gpu_memory_limit(gigabytes: float) -> Iterator[None]:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gigabytes * 2**30 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_the_search_finds_a_batch_size_that_fits() -> None:
    device = resolve_device("cuda")
    model = build_model("unet")
    move_model(model, device)

    def try_size(size: int) -> None:
        dry_run_step(
            model,
            size,
            image_size=224,
            loss_fn=cross_entropy,
            autocast=autocast_for("fp32", device),
            device=device,
        )

    with gpu_memory_limit(2):
        size = find_micro_batch_size(try_size, 64)

    assert 0 < size < 64


def test_the_error_of_a_batch_that_does_not_fit_names_the_options_to_continue_with(
    segtrain: Command, toy_coco: Path
) -> None:
    common = ["train", "--data", toy_coco, *LARGE, "--epochs", "1", "--name", "large"]
    with gpu_memory_limit(2):
        finished = segtrain(*common, "--batch-size", "8")
        line = assert_one_error(finished, 5)
        assert "8 images" in line
        assert "--batch-size auto --set train.effective_batch=8" in line

        finished = segtrain(
            *(*common, "--batch-size", "auto", "--set", "train.effective_batch=8"),
            *("--resume", "auto"),
        )

    assert finished.code == 0, finished.err
    assert load_checkpoint(LAST).training["micro_batch_size"] in {1, 2, 4}
    assert load_checkpoint(LAST).global_step == 1


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_the_automatic_batch_size_fits_in_every_step(
    segtrain: Command, toy_coco: Path, optimizer: str
) -> None:
    with gpu_memory_limit(2):
        finished = segtrain(
            *("train", "--data", toy_coco, *LARGE, "--epochs", "2", "--name", "large"),
            *("--batch-size", "auto", "--set", "train.effective_batch=8"),
            *("--set", f"optim.name={optimizer}"),
        )

    assert finished.code == 0, finished.err
    assert "out of memory" not in finished.err
    assert load_checkpoint(LAST).global_step == 2
