"""A GPU that is full, for real: a share of its memory is all that this process may take."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Command
from faults import assert_one_error

from segtrain.checkpoint import load_checkpoint
from segtrain.devices import autocast_for, move_model, resolve_device
from segtrain.models import build_model
from segtrain.training.losses import cross_entropy
from segtrain.training.memory import fitting_number, rehearse_step

pytestmark = pytest.mark.gpu

# The whole U-Net with its optimizer is half a gigabyte, and each image a third of one.
LARGE = ("--image-size", "224", "--workers", "0", "--precision", "fp32", "--device", "cuda")
LAST = Path("runs/large/checkpoints/last.pt")


@contextmanager
def memory_of(gigabytes: float) -> Iterator[None]:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gigabytes * 2**30 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_batch_that_fits_is_found_where_memory_ends() -> None:
    device = resolve_device("cuda")
    model = build_model("unet")
    move_model(model, device)

    def try_with(number: int) -> None:
        rehearse_step(
            model,
            number,
            image_size=224,
            loss_fn=cross_entropy,
            autocast=autocast_for("fp32", device),
            device=device,
        )

    with memory_of(2):
        found = fitting_number(try_with, 64)

    assert 0 < found < 64


def test_a_batch_that_does_not_fit_says_how_to_go_on(segtrain: Command, toy_coco: Path) -> None:
    common = ["train", "--data", toy_coco, *LARGE, "--epochs", "1", "--name", "large"]
    with memory_of(2):
        finished = segtrain(*common, "--batch-size", "8")
        line = assert_one_error(finished, 5)
        assert "8 pictures" in line
        assert "--batch-size auto --set train.effective_batch=8" in line

        finished = segtrain(
            *(*common, "--batch-size", "auto", "--set", "train.effective_batch=8"),
            *("--resume", "auto"),
        )

    assert finished.code == 0, finished.err
    assert load_checkpoint(LAST).training["images_at_once"] in {1, 2, 4}
    assert load_checkpoint(LAST).global_step == 1


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_what_auto_finds_fits_in_every_step(
    segtrain: Command, toy_coco: Path, optimizer: str
) -> None:
    with memory_of(2):
        finished = segtrain(
            *("train", "--data", toy_coco, *LARGE, "--epochs", "2", "--name", "large"),
            *("--batch-size", "auto", "--set", "train.effective_batch=8"),
            *("--set", f"optim.name={optimizer}"),
        )

    assert finished.code == 0, finished.err
    assert "out of memory" not in finished.err
    assert load_checkpoint(LAST).global_step == 2
