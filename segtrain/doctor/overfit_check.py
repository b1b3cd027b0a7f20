"""Overfit a small U-Net on four images: a setup that cannot do this will not learn from thousands.

It detects masks that are unrelated to their images, people too small to be visible, and a device
that computes wrong results. It does not detect masks that belong to other images of the same size
and kind, because a model can memorize those, too; the contact sheet shows them.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat, takewhile

import cv2
import numpy as np
import torch
from torch import nn

from segtrain.data.datasets import ImageSelection
from segtrain.data.loader import Batch, collate
from segtrain.data.sample import Sample
from segtrain.doctor.findings import CheckResult
from segtrain.errors import DataError
from segtrain.evaluation.confusion import ConfusionMatrix
from segtrain.imaging.images import resize_image
from segtrain.models import build_model
from segtrain.runtime.devices import autocast_for, move_model, prefetch
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import raise_if_stopped
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import set_lr
from segtrain.training.step import train_step

NUM_IMAGES = 4
MIN_IOU = 0.9

_SIDE = 128
_LR = 3e-3
_TARGET_IOU = 0.95
_MAX_SECONDS = 20.0
_ROUNDS, _STEPS_PER_ROUND = 40, 10
# Healthy images take 20 to 70 steps; a low IoU after fewer steps means nothing.
_MIN_STEPS = 70
_MAX_THREADS = 4
# People that fill the image or are specks make a poor test.
_PERSON_FRACTION_RANGE = (0.05, 0.8)


@dataclass(frozen=True, kw_only=True)
class OverfitResult:
    """Person IoU on the training images after `num_steps` steps."""

    person_iou: float
    num_images: int
    num_steps: int
    seconds: float


def overfit_one_batch(images: ImageSelection, device: torch.device) -> OverfitResult | None:
    """Train a small U-Net on one batch until it fits the batch or the time is up.

    Returns None if no image shows people.

    Raises:
        RuntimeError: the device fails.
    """
    samples = list(_choose_samples(images))
    if not samples:
        return None
    started = time.perf_counter()
    deadline = started + _MAX_SECONDS
    with (
        _few_threads(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        progress_bar(total=_ROUNDS, desc="overfitting four images", unit="round") as bar,
    ):
        torch.manual_seed(0)
        model = build_model("unet", base_channels=8, depth=4)
        move_model(model, device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch, num_steps, person_iou = collate(list(samples)), 0, 0.0
        while num_steps < _ROUNDS * _STEPS_PER_ROUND and person_iou < _TARGET_IOU:
            # On a busy machine, a single round can take longer than the whole time limit.
            batches = takewhile(
                lambda _: time.perf_counter() < deadline, repeat(batch, _STEPS_PER_ROUND)
            )
            num_steps += _train(model, optimizer, batches, device)
            person_iou = _person_iou(model, batch, device)
            raise_if_stopped()
            bar.update()
            if time.perf_counter() >= deadline:
                break
    return OverfitResult(
        person_iou=person_iou,
        num_images=len(samples),
        num_steps=num_steps,
        seconds=time.perf_counter() - started,
    )


def check_overfitting(result: OverfitResult | None) -> Iterator[CheckResult]:
    """Interpret the result."""
    if result is None:
        return
    text = (
        f"a small U-Net overfits {result.num_images} images to a person IoU of "
        f"{result.person_iou:.2f} ({result.num_steps} steps, {result.seconds:.0f} s)"
    )
    if result.person_iou >= MIN_IOU:
        yield "ok", text, ""
    elif result.num_steps < _MIN_STEPS:
        yield "note", f"{text}: inconclusive, this machine is too slow or busy", ""
    else:
        yield (
            "warning",
            f"{text}, less than {MIN_IOU}: perhaps the masks do not belong to the images, or the "
            "people are too small",
            "see contact_sheet.png before a long training",
        )


@contextmanager
def _few_threads() -> Iterator[None]:
    """Use few threads within: such a small network gains little from more.

    On a busy machine, every layer would wait for the slowest thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(_MAX_THREADS, max(1, before // 2)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose_samples(images: ImageSelection) -> Iterator[Sample]:
    """Up to four images with people, resized to a square; damaged images are skipped."""
    fraction = images.index.person_fraction
    smallest, largest = _PERSON_FRACTION_RANGE
    candidates = np.flatnonzero((fraction >= smallest) & (fraction <= largest))
    if len(candidates) < NUM_IMAGES:
        candidates = np.argsort(fraction)[::-1][: (fraction > 0).sum()][:NUM_IMAGES]
    # Evenly spaced, with spares in case some are damaged.
    positions = np.linspace(0, len(candidates) - 1, min(3 * NUM_IMAGES, len(candidates)))
    order = np.random.default_rng(0).permutation(positions.round().astype(int))
    num_chosen = 0
    for index in candidates[order].tolist():
        try:
            sample = images.sample(index, _SIDE)
        except DataError:
            continue
        mask = cv2.resize(sample.mask, (_SIDE, _SIDE), interpolation=cv2.INTER_NEAREST_EXACT)
        yield Sample(
            image=resize_image(sample.image, (_SIDE, _SIDE)),
            mask=np.asarray(mask, dtype=np.uint8),
            image_id=sample.image_id,
        )
        num_chosen += 1
        if num_chosen == NUM_IMAGES:
            return


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    device: torch.device,
) -> int:
    """Take one step per batch; returns the number of steps."""
    model.train()
    autocast, scaler = (
        autocast_for("fp32", device),
        torch.amp.GradScaler(device.type, enabled=False),
    )
    set_lr(optimizer, _LR)
    num_steps = 0
    for batch in prefetch(batches, device):
        train_step(
            model,
            batch,
            optimizer,
            scaler,
            cross_entropy,
            autocast=autocast,
            micro_batch_size=NUM_IMAGES,
        )
        num_steps += 1
    return num_steps


@torch.no_grad()
def _person_iou(model: nn.Module, batch: Batch, device: torch.device) -> float:
    """Person IoU in training mode: the running batch-norm statistics lag behind the weights."""
    confusion = ConfusionMatrix(device=device)
    confusion.update(model(batch["image"].to(device)).argmax(dim=1), batch["mask"].to(device))
    return confusion.compute().person_iou
