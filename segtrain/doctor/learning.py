"""Learning four pictures by heart: what cannot do even this, will not learn from thousands.

It finds masks that follow nothing in their pictures, people too small to be seen, and a machine
that computes nonsense. It does not find masks that belong to other pictures of the same size and
kind, for those can be learnt by heart, too; the contact sheet shows them.
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

from segtrain.data import Pictures
from segtrain.data.loading import Batch, collate
from segtrain.data.sample import Sample
from segtrain.devices import autocast_for, move_model
from segtrain.doctor.findings import Verdict
from segtrain.errors import DataError
from segtrain.evaluation.metrics import ConfusionMatrix
from segtrain.images import resize_image
from segtrain.models import build_model
from segtrain.progress import progress_bar
from segtrain.training.engine import Tally, training_steps
from segtrain.training.losses import cross_entropy

NUM_PICTURES = 4
ENOUGH = 0.9

_SIDE = 128
_LEARNING_RATE = 3e-3
_STOP_AT = 0.95
_SECONDS = 20.0
_ROUNDS, _STEPS_A_ROUND = 40, 10
# Healthy pictures take 20 to 70 steps; whoever stopped before knows nothing.
_FEWEST_STEPS = 70
_MOST_THREADS = 4
# People that fill the frame or are specks make a poor test.
_FITTING_SHARES = (0.05, 0.8)


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """How well the pictures are known by heart after so many steps."""

    person_iou: float
    num_pictures: int
    num_steps: int
    seconds: float


def learn_by_heart(pictures: Pictures, device: torch.device) -> Learnt | None:
    """Train a small U-Net on one batch until it knows it or the time is up.

    None where no picture shows people.

    Raises:
        RuntimeError: the device gives out.
    """
    samples = list(_samples(pictures))
    if not samples:
        return None
    started = time.perf_counter()
    ending = started + _SECONDS
    with (
        _few_threads(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        progress_bar(total=_ROUNDS, desc="learning by heart", unit="round") as bar,
    ):
        torch.manual_seed(0)
        model = build_model("unet", base_channels=8, depth=4)
        move_model(model, device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch, num_steps, person_iou = collate(list(samples)), 0, 0.0
        while num_steps < _ROUNDS * _STEPS_A_ROUND and person_iou < _STOP_AT:
            # Where others use the processor a single round may take longer than all should.
            batches = takewhile(
                lambda _: time.perf_counter() < ending, repeat(batch, _STEPS_A_ROUND)
            )
            num_steps += _learn(model, optimizer, batches, device)
            person_iou = _person_iou(model, batch, device)
            bar.update()
            if time.perf_counter() >= ending:
                break
    return Learnt(
        person_iou=person_iou,
        num_pictures=len(samples),
        num_steps=num_steps,
        seconds=time.perf_counter() - started,
    )


def judge_learning(learnt: Learnt | None) -> Iterator[Verdict]:
    """What the number means."""
    if learnt is None:
        return
    text = (
        f"a small U-Net learnt {learnt.num_pictures} pictures by heart to a person IoU of "
        f"{learnt.person_iou:.2f} ({learnt.num_steps} steps, {learnt.seconds:.0f} s)"
    )
    if learnt.person_iou >= ENOUGH:
        yield "ok", text, ""
    elif learnt.num_steps < _FEWEST_STEPS:
        yield "note", f"{text}: this machine is too slow or busy to tell more", ""
    else:
        yield (
            "warning",
            f"{text}, less than {ENOUGH}: perhaps the masks do not belong to the pictures, or the "
            "people are too small",
            "look at contact_sheet.png before you train for long",
        )


@contextmanager
def _few_threads() -> Iterator[None]:
    """So small a network gains little by threads.

    Where others use the processor, too, every layer would wait for the slowest of them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(_MOST_THREADS, max(1, before // 2)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _samples(pictures: Pictures) -> Iterator[Sample]:
    """A few pictures with people, squeezed to a square; damaged ones are passed over."""
    share = pictures.catalog.person_share
    smallest, largest = _FITTING_SHARES
    candidates = np.flatnonzero((share >= smallest) & (share <= largest))
    if len(candidates) < NUM_PICTURES:
        candidates = np.argsort(share)[::-1][: (share > 0).sum()][:NUM_PICTURES]
    # Evenly chosen, but with a few more at hand should some be damaged.
    in_turn = np.linspace(0, len(candidates) - 1, min(3 * NUM_PICTURES, len(candidates)))
    order = np.random.default_rng(0).permutation(in_turn.round().astype(int))
    found = 0
    for index in candidates[order].tolist():
        try:
            sample = pictures.sample(index, _SIDE)
        except DataError:
            continue
        mask = cv2.resize(sample.mask, (_SIDE, _SIDE), interpolation=cv2.INTER_NEAREST_EXACT)
        yield Sample(
            image=resize_image(sample.image, (_SIDE, _SIDE)),
            mask=np.asarray(mask, dtype=np.uint8),
            image_id=sample.image_id,
        )
        found += 1
        if found == NUM_PICTURES:
            return


def _learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    device: torch.device,
) -> int:
    """One round; returns the number of steps taken."""
    model.train()
    steps = training_steps(
        model,
        batches,
        Tally(device),
        loss_fn=cross_entropy,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        autocast=autocast_for("fp32", device),
        device=device,
        before_step=lambda: _LEARNING_RATE,
        images_at_once=NUM_PICTURES,
    )
    return sum(1 for _ in steps)


@torch.no_grad()
def _person_iou(model: nn.Module, batch: Batch, device: torch.device) -> float:
    """By the batch's own statistics, as it was trained: the running ones lag behind."""
    confusion = ConfusionMatrix(device=device)
    confusion.update(model(batch["image"].to(device)).argmax(dim=1), batch["mask"].to(device))
    return confusion.compute().person_iou
