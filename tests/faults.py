"""What the tests of faults share: a network that does as told at one step, and what must hold."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished
from torch import Tensor

from segtrain.checkpoint import load_checkpoint
from segtrain.models.unet import UNet

Forward = Callable[[Tensor], Tensor]
# Called for each forward pass in training with its number, counted from 1, and the picture tensor.
Act = Callable[[int, Tensor, Forward], Tensor]

# As TOY_TRAINING, but at its full learning rate from the first step on.
TINY = (
    *("--set", "model.base_channels=4", "--set", "model.depth=2", "--set", "optim.warmup_steps=0"),
    *("--image-size", "48", "--workers", "0", "--precision", "fp32", "--device", "cpu"),
    *("--lr", "2e-3"),
)


class Steps:
    """Lets `act` stand for the toy U-Net's forward pass in training, and keeps what it was shown.

    sizes: pictures, height and width of each pass.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Act) -> None:
        self.sizes: list[tuple[int, int, int]] = []
        true_forward = UNet.forward

        def forward(model: UNet, image: Tensor) -> Tensor:
            # Measuring batch norm anew is no training.
            if not (model.training and torch.is_grad_enabled()):
                return true_forward(model, image)
            self.sizes.append((len(image), image.shape[2], image.shape[3]))
            return act(len(self.sizes), image, lambda image: true_forward(model, image))

        monkeypatch.setattr(UNet, "forward", forward)

    @property
    def count(self) -> int:
        return len(self.sizes)


def overflowing(image: Tensor, forward: Forward) -> Tensor:
    """Infinity in the first layer: NaN in the loss, and in batch norm's running statistics."""
    return forward(torch.full_like(image, torch.inf, dtype=torch.float32))


def bad_gradient(image: Tensor, forward: Forward) -> Tensor:
    """The loss is a number and its gradient is none."""
    logits = forward(image)
    logits.register_hook(lambda gradient: gradient * torch.inf)
    return logits


def at(steps: set[int], fault: Callable[[Tensor, Forward], Tensor] = overflowing) -> Act:
    """The fault at these passes; all others are as ever."""
    return lambda number, image, forward: (
        fault(image, forward) if number in steps else forward(image)
    )


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def digests(run: Path) -> dict[str, str]:
    """sha256 of each checkpoint that a run has written."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "checkpoints").glob("*.pt"))
    }


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.pt"


def largest_difference(one: Path, other: Path) -> float:
    """Of the weights and statistics of two checkpoints."""
    a, b = load_checkpoint(one).weights, load_checkpoint(other).weights
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def assert_one_error(finished: Finished, code: int) -> str:
    """The only `error:` line, which is short and not of a bug."""
    assert finished.code == code, finished.err
    assert "Traceback" not in finished.out + finished.err
    [line] = finished.error_lines
    assert len(line) <= 200
    assert "bug" not in line
    return line


def warnings_of(finished: Finished) -> list[str]:
    return [line for line in finished.err.splitlines() if line.startswith("warning:")]
