"""Training steps as pure functions: no configuration, no files, no loggers.

Nothing here waits for the device. What a step found stays there in a `Tally` until somebody reads
it, and a step whose gradients are not finite is left out by the optimizer's own kernel.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segtrain.classes import IGNORE, PERSON
from segtrain.devices import Autocast, prefetched
from segtrain.pieces import pieces
from segtrain.training.losses import LossFn
from segtrain.training.step_graph import StepGraph


class Step(NamedTuple):
    """One optimizer step: images of it, and how many of the epoch have been drawn with it."""

    num_images: int
    num_drawn: int


class Found(NamedTuple):
    """What a tally has counted so far.

    loss: mean over the images of steps that were taken.
    person_iou: of the training pictures, as augmented, by the changing weights.
    skipped: steps left out for a loss or gradient that is not finite.
    skipped_in_a_row: the most of them without one good step between since the last look.
    """

    loss: float
    person_iou: float
    skipped: int
    skipped_in_a_row: int


class Tally:
    """Counts of an epoch, on the device, as float64: sums of 2^53 pixels are exact.

    Args:
        sums: as `sums` of an earlier tally that this one goes on with.
    """

    # Loss times images, images of steps taken, intersection, union, steps left out, of these in a
    # row now, and the most in a row since the last `read`.

    def __init__(self, device: torch.device, sums: list[float] | None = None) -> None:
        self.sums = torch.tensor(sums or [0.0] * 7, dtype=torch.float64, device=device)
        self.num_images = 0
        self.seconds_waited = 0.0

    def add(self, step: Tensor, finite: Tensor) -> None:
        """One step.

        Args:
            step: loss, images, intersection, union; float64.
            finite: scalar bool, whether it was taken.
        """
        row = torch.where(finite, 0, self.sums[5] + 1)
        counted = torch.cat([step[:1] * step[1], step[1:]])
        self.sums[:4] += torch.where(finite, counted, 0)
        self.sums[4] += ~finite
        self.sums[5] = row
        self.sums[6] = torch.maximum(self.sums[6], row)

    def read(self) -> Found:
        """What was counted until now. Waits for the device."""
        loss, images, intersection, union, skipped, _, worst = self.sums.tolist()
        self.sums[6] = self.sums[5]
        return Found(
            # Where no step could be taken there is no loss; NaN would not be JSON.
            loss=loss / images if images else 0.0,
            person_iou=intersection / union if union else 1.0,
            skipped=int(skipped),
            skipped_in_a_row=int(worst),
        )

    @property
    def in_a_row(self) -> int:
        """Steps left out since the last good one. Waits for the device."""
        return int(self.sums[5])

    def forget_row(self) -> None:
        """Steps left out in a row are counted from here on."""
        self.sums[5:] = 0

    def of_next_epoch(self) -> "Tally":
        """A fresh one that goes on counting steps left out in a row."""
        fresh = Tally(self.sums.device)
        fresh.sums[5:] = self.sums[5]
        return fresh


def training_steps(
    network: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    tally: Tally,
    *,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Autocast,
    device: torch.device,
    before_step: Callable[[], float],
    images_at_once: int,
    clip_norm: float | None = None,
    sum_of_all: Callable[[Tensor], Tensor] = lambda values: values,
    graph: StepGraph | None = None,
) -> Iterator[Step]:
    """Take one optimizer step a batch, and yield after each.

    Args:
        network: in training mode; may be wrapped by DistributedDataParallel.
        batches: mappings with "image" N 3 H W uint8, "mask" N H W uint8, "size" N pairs (h, w) of
            what is picture in the upper left of each, perhaps "border" N H W uint8.
        tally: what the steps find is added here.
        loss_fn: mean loss over the counted pixels of (logits, mask, border).
        scaler: disabled unless the precision is fp16, so that there is one way through.
        before_step: called before each step; returns its learning rate.
        images_at_once: a batch goes through the network in pieces of so many images; together they
            give the gradient of the whole, each piece weighing as much as it has counted pixels.
        clip_norm: longest gradient, L2 norm.
        sum_of_all: sums a tensor over the processes that train together.
        graph: on CUDA, for batches that go through the network in one piece.
    """

    def backward(batch: Mapping[str, Any]) -> Tensor:
        return _backward(network, batch, loss_fn, scaler, autocast, images_at_once, sum_of_all)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    waiting_since = time.perf_counter()
    for batch in prefetched(batches, device):
        tally.seconds_waited += time.perf_counter() - waiting_since
        rate = before_step()
        for group in optimizer.param_groups:
            group["lr"] = rate

        num_images = len(batch["image"])
        if graph is None or num_images > images_at_once:
            step = backward(batch)
        else:
            step = graph.run(backward, batch, parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        # The scaler looks at gradients only: a loss that is not finite makes one of them NaN.
        for gradient in gradients[:1]:
            gradient.add_(0 * step[0])
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        finite = norm.isfinite()
        if clip_norm is not None:
            torch._foreach_mul_(gradients, (clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0))
        _step_if(finite, optimizer, scaler)
        optimizer.zero_grad(set_to_none=True)

        tally.add(step, finite)
        tally.num_images += num_images
        yield Step(num_images, batch.get("num_drawn", 0))
        waiting_since = time.perf_counter()


def _backward(
    network: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: LossFn,
    scaler: torch.amp.GradScaler,
    autocast: Autocast,
    images_at_once: int,
    sum_of_all: Callable[[Tensor], Tensor],
) -> Tensor:
    """Gradients of one batch; returns its loss, images, intersection and union of all processes."""
    parallel = isinstance(network, DistributedDataParallel)
    world_size = dist.get_world_size() if parallel else 1
    # What was counted: the mean of the loss, images, intersection, union.
    step = torch.zeros(4, dtype=torch.float64, device=batch["mask"].device)
    # Not step[1]: before torch 2.15 that waits for the GPU.
    step[1:2] = len(batch["image"])
    num_pixels = sum_of_all((batch["mask"] != IGNORE).sum().double()).clamp(min=1)
    parts = list(pieces(batch, images_at_once))
    for number, piece in enumerate(parts, 1):
        image, mask = piece["image"], piece["mask"]
        with _gradients_stay_here(network, unless=number == len(parts)):
            with autocast():
                logits = network(image)
            loss = loss_fn(logits, mask, piece.get("border")) * (mask != IGNORE).sum() / num_pixels
            # Of the gradients the mean over the processes is taken, and this is part of a sum.
            scaler.scale((loss * world_size).float()).backward()  # type: ignore[no-untyped-call]
        step[0] += loss.detach()
        step[2:] += _overlap(logits.detach(), mask)
    return sum_of_all(step)


def _step_if(
    finite: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:  # RMSProp with momentum has no such kernel: this waits for the device
        optimizer.step()


def _overlap(logits: Tensor, mask: Tensor) -> Tensor:
    """Pixels of intersection and of union of truth and prediction."""
    person = logits.argmax(dim=1) == PERSON
    truth = mask == PERSON
    return torch.stack([(person & truth).sum(), ((person & (mask != IGNORE)) | truth).sum()])


def _gradients_stay_here(network: nn.Module, *, unless: bool) -> AbstractContextManager[object]:
    """Processes exchange gradients once a step, with those of its last piece."""
    if isinstance(network, DistributedDataParallel) and not unless:
        return network.no_sync()
    return nullcontext()
