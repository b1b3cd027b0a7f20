"""The micro-batch size that fits in memory: searched for if auto, reduced after running out.

Images go through the network in micro-batches of that size; a step is still that of the whole
batch.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from segtrain.config.schema import Config
from segtrain.errors import ResourceError, is_memory_error
from segtrain.runtime.devices import Autocast
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import raise_if_stopped
from segtrain.training.losses import LossFn, build_loss
from segtrain.training.parallel import unsynchronized
from segtrain.training.setup import TrainContext

log = logging.getLogger(__name__)


def choose_micro_batch_size(ctx: TrainContext, config: Config, model: nn.Module) -> int:
    """Return the configured batch size or, if it is auto, the largest tried that fits in memory.

    Raises:
        ResourceError: not even one image fits.
    """
    if config.train.batch_size != "auto":
        return config.train.batch_size
    largest = config.train.effective_batch
    attempts = largest.bit_length()
    with progress_bar(total=attempts, desc="finding the batch size", unit="attempt") as bar:

        def try_size(size: int) -> None:
            raise_if_stopped()
            bar.update()
            _dry_run(ctx, config, model, size)

        size = ctx.world.all_reduce_min(find_micro_batch_size(try_size, largest))
    if not size:
        raise ResourceError(
            f"out of memory with a single image of {config.data.image_size} pixels",
            "lower --image-size or choose a smaller --model",
        )
    log.info(f"batch size: {size} images per pass, {largest} per step")
    return size


def shrink_micro_batch_size(
    ctx: TrainContext, config: Config, model: nn.Module, failed_size: int
) -> int:
    """Find a smaller micro-batch size after a step with `failed_size` ran out of memory.

    Args:
        config: the configuration of the current stage.

    Raises:
        ResourceError: no size fits, or the user has chosen the size that does not.
    """
    size = find_micro_batch_size(lambda size: _dry_run(ctx, config, model, size), failed_size // 2)
    if not size:
        raise ResourceError(
            f"out of memory with {failed_size} images per pass, and with fewer",
            "the state before this step is saved; start a new run with a lower --image-size or a "
            "smaller --model",
        )
    # No command-line option changes the batch size of a stage, so training continues on its own.
    chosen = config.train.batch_size == ctx.config.train.batch_size != "auto"
    if not chosen and ctx.world.size == 1:
        log.warning(
            f"out of memory with {failed_size} images per pass: continuing with {size}; each step "
            f"still has {config.train.effective_batch_size} images"
        )
        return size
    raise ResourceError(
        f"out of memory with {failed_size} images per pass, {size} fit",
        "the state before this step is saved; continue with --resume auto --batch-size auto "
        f"--set train.effective_batch={config.train.effective_batch_size}",
    )


def find_micro_batch_size(try_size: Callable[[int], None], largest: int) -> int:
    """Return the first of `largest`, its half, a quarter ... for which `try_size` has memory, or 0.

    `try_size` raises RuntimeError or MemoryError if it runs out of memory.
    """
    size = largest
    while size:
        try:
            try_size(size)
            return size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
    return 0


def _dry_run(ctx: TrainContext, config: Config, model: nn.Module, size: int) -> None:
    with unsynchronized(model):  # the other processes may be in the middle of a step
        dry_run_step(
            model,
            size,
            image_size=config.data.image_size,
            loss_fn=build_loss(config.loss),
            autocast=ctx.autocast,
            device=ctx.device,
        )


def dry_run_step(
    model: nn.Module,
    num_images: int,
    *,
    image_size: int,
    loss_fn: LossFn,
    autocast: Autocast,
    device: torch.device,
) -> None:
    """Run a forward and backward pass on random images and leave the model unchanged.

    Raises:
        RuntimeError, MemoryError: out of memory.
    """
    was_training = model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    shape = (num_images, image_size, image_size, 3)
    image = torch.randint(256, shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
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
        for buffer, before in buffers:
            buffer.copy_(before)
        model.train(was_training)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the network ran out of device or host memory.

    Errors of loader processes do not count, because a smaller batch would not avoid them.
    """
    return is_memory_error(error) and "in DataLoader worker" not in str(error)
