"""One epoch of training, as pure functions: no configuration, no files, no loggers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.devices import Autocast, prefetched


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: Autocast,
    device: torch.device,
    learning_rate: Callable[[int], float],
    global_step: int,
    on_step: Callable[[int, Tensor], object] = lambda num_images, loss: None,
) -> tuple[Tensor, int]:
    """Take one optimizer step a batch.

    Args:
        batches: mappings with "image" N 3 H W uint8 and "mask" N H W uint8.
        scaler: disabled unless the precision is fp16, so that there is one way through.
        learning_rate: rate of the step with the given number.
        global_step: optimizer steps done before this epoch.
        on_step: called with the number of images and the loss, still on the device: reading it
            waits for the device, so the caller decides how often.

    Returns:
        Mean loss over the images, a scalar on the device, and the new global_step.
    """
    model.train()
    loss_sum = torch.zeros((), device=device)
    num_images = 0
    for batch in prefetched(batches, device):
        image, mask = batch["image"], batch["mask"]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(global_step)

        with autocast():
            logits = model(image)
        loss = loss_fn(logits, mask)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        global_step += 1
        num_images += len(image)
        loss_sum += loss.detach() * len(image)
        on_step(len(image), loss.detach())
    return loss_sum / max(num_images, 1), global_step
