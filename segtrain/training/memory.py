"""How many pictures go through a network at once before the memory is full."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from segtrain.devices import Autocast
from segtrain.errors import says_out_of_memory
from segtrain.training.losses import LossFn


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of the device or of the machine.

    What loader processes lack is another matter: the network's batch has no part in it.
    """
    return says_out_of_memory(error) and "in DataLoader worker" not in str(error)


def fitting_number(try_with: Callable[[int], None], largest: int) -> int:
    """`largest`, its half, a quarter ...: the first with which `try_with` finds memory; or 0."""
    number = largest
    while number:
        try:
            try_with(number)
            return number
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        number //= 2
    return 0


def rehearse_step(
    model: nn.Module,
    num_images: int,
    *,
    image_size: int,
    loss_fn: LossFn,
    autocast: Autocast,
    device: torch.device,
) -> None:
    """Forward and backward pass over made-up pictures; the network stays as it was.

    Raises:
        RuntimeError, MemoryError: there is no memory for it.
    """
    was_training = model.training
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    sides = (num_images, image_size, image_size, 3)
    image = torch.randint(256, sides, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    mask = torch.zeros(num_images, image_size, image_size, dtype=torch.uint8, device=device)
    try:
        model.train()
        with autocast():
            logits: Tensor = model(image)
        loss_fn(logits, mask, torch.zeros_like(mask)).backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, before in statistics:
            buffer.copy_(before)
        model.train(was_training)
