"""Faults in training: a network that fails at chosen steps, and checks of its run."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.command import Finished
from segtrain.checkpoint import load_checkpoint
from segtrain.models.unet import UNet

Forward = Callable[[Tensor], Tensor]
# Called for each training forward pass with its number, counted from 1, the image tensor and the
# original forward.
ForwardPatch = Callable[[int, Tensor, Forward], Tensor]

# Like TOY_TRAINING, but with the full learning rate from the first step on.
TINY = (
    *("--set", "model.base_channels=4", "--set", "model.depth=2", "--set", "optim.warmup_steps=0"),
    *("--image-size", "48", "--workers", "0", "--precision", "fp32", "--device", "cpu"),
    *("--lr", "2e-3"),
)


class PatchedForward:
    """Replaces the forward pass of the toy U-Net in training by `patch` and records its inputs.

    sizes: number of images, height and width of each pass.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patch: ForwardPatch) -> None:
        self.sizes: list[tuple[int, int, int]] = []
        original = UNet.forward

        def forward(model: UNet, image: Tensor) -> Tensor:
            # Recalibration of batch norm is not training.
            if not (model.training and torch.is_grad_enabled()):
                return original(model, image)
            self.sizes.append((len(image), image.shape[2], image.shape[3]))
            return patch(len(self.sizes), image, lambda image: original(model, image))

        monkeypatch.setattr(UNet, "forward", forward)

    @property
    def count(self) -> int:
        return len(self.sizes)


def overflow(image: Tensor, forward: Forward) -> Tensor:
    """Infinite input: NaN in the loss and in the running statistics of batch norm."""
    return forward(torch.full_like(image, torch.inf, dtype=torch.float32))


def bad_gradient(image: Tensor, forward: Forward) -> Tensor:
    """The loss is finite and its gradient is not."""
    logits = forward(image)
    logits.register_hook(lambda gradient: gradient * torch.inf)
    return logits


def fault_at(
    steps: set[int], fault: Callable[[Tensor, Forward], Tensor] = overflow
) -> ForwardPatch:
    """Apply `fault` at these passes only."""
    return lambda number, image, forward: (
        fault(image, forward) if number in steps else forward(image)
    )


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def digests(run: Path) -> dict[str, str]:
    """sha256 of each checkpoint of a run."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((run / "checkpoints").glob("*.pt"))
    }


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "last.pt"


def largest_difference(first: Path, second: Path) -> float:
    """Largest absolute difference between the weights and statistics of two checkpoints."""
    a, b = load_checkpoint(first).weights, load_checkpoint(second).weights
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def assert_one_error(finished: Finished, code: int) -> str:
    """Return the only `error:` line, which must be short and must not report a bug."""
    assert finished.code == code, finished.err
    assert "Traceback" not in finished.out + finished.err
    [line] = finished.error_lines
    assert len(line) <= 200
    assert "bug" not in line
    return line


def warnings_of(finished: Finished) -> list[str]:
    return [line for line in finished.err.splitlines() if line.startswith("warning:")]
