"""One training step as a pure function: no configuration, no files, no loggers.

Nothing here waits for the device: step statistics accumulate on it and are read only when logged.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segtrain.runtime.devices import Autocast
from segtrain.training.losses import LossFn
from segtrain.training.step_graph import StepGraph
from segtrain.types import IGNORE, PERSON


def micro_batches(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of at most `size` images at a time.

    Args:
        batch: tensors N ... H W, and "size", N pairs (h, w) of the image in the upper left corner.
            A micro-batch is cropped to its largest image, so a single image is never padded.
    """
    for start in range(0, len(batch["size"]), size):
        part = slice(start, start + size)
        height, width = (max(sides) for sides in zip(*batch["size"][part], strict=True))
        yield {
            key: value[part, ..., :height, :width]
            for key, value in batch.items()
            if isinstance(value, Tensor)
        }


class EpochStats(NamedTuple):
    """Statistics of an epoch so far.

    loss: mean over the images of the steps that were taken.
    person_iou: on the augmented training images, while the weights change.
    skipped: steps skipped because the loss or a gradient was not finite.
    skipped_in_a_row: the longest run of skipped steps since the last `StepStats.read`.
    """

    loss: float
    person_iou: float
    skipped: int
    skipped_in_a_row: int


class StepResult(NamedTuple):
    """Result of a step, on the device.

    counts: 4 float64: the mean loss, the number of images, and the intersection and union of mask
        and prediction in pixels.
    finite: scalar bool, whether the optimizer took the step.
    """

    counts: Tensor
    finite: Tensor


class StepStats:
    """Sums of step results over an epoch, on the device, as float64: exact to 2^53 pixels.

    Args:
        sums: `sums` of an earlier `StepStats`, to continue counting from.

    Attributes:
        num_images: images in the steps of this process.
        seconds_waited: time the loop waited for the next batch.
    """

    # sums: loss times images, images of the steps taken, intersection, union, skipped steps, the
    # current number of them in a row, and the most in a row since the last `read`.

    def __init__(self, device: torch.device, sums: list[float] | None = None) -> None:
        self.sums = torch.tensor(sums or [0.0] * 7, dtype=torch.float64, device=device)
        self.num_images = 0
        self.seconds_waited = 0.0

    def add(self, result: StepResult) -> None:
        """Count one step; does not wait for the device."""
        counts, finite = result
        in_a_row = torch.where(finite, 0, self.sums[5] + 1)
        counted = torch.cat([counts[:1] * counts[1], counts[1:]])
        self.sums[:4] += torch.where(finite, counted, 0)
        self.sums[4] += ~finite
        self.sums[5] = in_a_row
        self.sums[6] = torch.maximum(self.sums[6], in_a_row)

    def read(self) -> EpochStats:
        """The statistics so far. Waits for the device."""
        loss, images, intersection, union, skipped, _, most_in_a_row = self.sums.tolist()
        self.sums[6] = self.sums[5]
        return EpochStats(
            # Without a step there is no loss, and NaN is not valid JSON.
            loss=loss / images if images else 0.0,
            person_iou=intersection / union if union else 1.0,
            skipped=int(skipped),
            skipped_in_a_row=int(most_in_a_row),
        )

    @property
    def in_a_row(self) -> int:
        """Steps skipped since the last one taken. Waits for the device."""
        return int(self.sums[5])

    def reset_in_a_row(self) -> None:
        """Start counting skipped steps in a row from zero."""
        self.sums[5:] = 0

    def next_epoch(self) -> "StepStats":
        """Return empty statistics that continue the count of skipped steps in a row."""
        stats = StepStats(self.sums.device)
        stats.sums[5:] = self.sums[5]
        return stats


def train_step(
    network: nn.Module,
    batch: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss_fn: LossFn,
    *,
    autocast: Autocast,
    micro_batch_size: int,
    clip_norm: float | None = None,
    all_reduce: Callable[[Tensor], Tensor] = lambda values: values,
    graph: StepGraph | None = None,
) -> StepResult:
    """Take one optimizer step; does not wait for the device.

    A step whose loss or gradient is not finite is skipped by the optimizer's own kernel.

    Args:
        network: in training mode; may be wrapped by DistributedDataParallel.
        batch: on the network's device: "image" N 3 H W uint8, "mask" N H W uint8, "size" N pairs
            (h, w) of the image within H W, optionally "border" N H W uint8.
        scaler: disabled unless the precision is fp16; there is one code path for both.
        loss_fn: mean loss of (logits, mask, border) over the pixels that are not ignored.
        micro_batch_size: images per forward and backward pass. The gradients of the passes are
            weighted by their numbers of pixels. They add up to that of the whole batch if the loss
            is a plain mean over pixels; Dice, Lovasz and class weights are taken per pass.
        clip_norm: maximum L2 norm of the gradient.
        all_reduce: sums a tensor over all processes.
        graph: runs batches of a single pass as a CUDA graph.
    """

    def backward(batch: Mapping[str, Any]) -> Tensor:
        return _backward(network, batch, loss_fn, scaler, autocast, micro_batch_size, all_reduce)

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if graph is None or len(batch["image"]) > micro_batch_size:
        counts = backward(batch)
    else:
        counts = graph.run(backward, batch, parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    # The scaler checks gradients only: a loss that is not finite makes one of them NaN.
    for gradient in gradients[:1]:
        gradient.add_(0 * counts[0])
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    finite = norm.isfinite()
    if clip_norm is not None:
        torch._foreach_mul_(gradients, (clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0))
    _step_if(finite, optimizer, scaler)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(counts, finite)


def _backward(
    network: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: LossFn,
    scaler: torch.amp.GradScaler,
    autocast: Autocast,
    micro_batch_size: int,
    all_reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Accumulate the gradients of a batch and return the counts summed over all processes."""
    is_parallel = isinstance(network, DistributedDataParallel)
    world_size = dist.get_world_size() if is_parallel else 1
    counts = torch.zeros(4, dtype=torch.float64, device=batch["mask"].device)
    # A slice, because assigning to counts[1] waits for the GPU before torch 2.15.
    counts[1:2] = len(batch["image"])
    num_pixels = all_reduce((batch["mask"] != IGNORE).sum().double()).clamp(min=1)
    parts = list(micro_batches(batch, micro_batch_size))
    for number, part in enumerate(parts, 1):
        image, mask = part["image"], part["mask"]
        with _no_sync(network, unless=number == len(parts)):
            with autocast():
                logits = network(image)
            loss = loss_fn(logits, mask, part.get("border")) * (mask != IGNORE).sum() / num_pixels
            # DDP averages gradients. The loss is already normalized over all processes, so multiply
            # it by their number.
            scaler.scale((loss * world_size).float()).backward()  # type: ignore[no-untyped-call]
        counts[0] += loss.detach()
        counts[2:] += _overlap(logits.detach(), mask)
    return all_reduce(counts)


def _step_if(
    finite: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:  # RMSProp with momentum has no fused kernel: this waits for the device
        optimizer.step()


def _overlap(logits: Tensor, mask: Tensor) -> Tensor:
    """Pixels in the intersection and in the union of mask and prediction."""
    person = logits.argmax(dim=1) == PERSON
    truth = mask == PERSON
    return torch.stack([(person & truth).sum(), ((person & (mask != IGNORE)) | truth).sum()])


def _no_sync(network: nn.Module, *, unless: bool) -> AbstractContextManager[object]:
    """Skip the gradient exchange between processes, except in the last backward pass of a step."""
    if isinstance(network, DistributedDataParallel) and not unless:
        return network.no_sync()
    return nullcontext()


class FiniteBatchNormGuard:
    """Keeps the running statistics of batch norm finite after a forward pass overflowed.

    Skipping the step protects the weights, but the forward pass has already updated the statistics.
    Training does not read them, so it is enough to restore them at the next check.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._buffers = [
            buffer
            for model in models
            for buffer in model.buffers()
            if buffer.is_floating_point() and buffer.numel()
        ]
        self._sizes = [buffer.numel() for buffer in self._buffers]
        self._good = self._flat()

    @torch.no_grad()
    def check(self) -> None:
        """Restore each value that is not finite, and remember all values."""
        if not self._buffers:
            return
        # One flat tensor, because a kernel launch per buffer would take longer than the work.
        now = self._flat()
        self._good = torch.where(now.isfinite(), now, self._good)
        good = zip(torch.split(self._good, self._sizes), self._buffers, strict=True)
        torch._foreach_copy_(self._buffers, [part.view_as(buffer) for part, buffer in good])

    def _flat(self) -> Tensor:
        parts = [buffer.flatten() for buffer in self._buffers]
        return torch.cat(parts) if parts else torch.empty(0)

    @contextmanager
    def restored_on_exit(self) -> Iterator[None]:
        """Restore statistics that are not finite on exit, also after an exception."""
        try:
            yield
        finally:
            self.check()
