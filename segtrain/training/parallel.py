"""The model as training runs it: compiled, and in several processes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from segtrain.config.schema import TrainConfig
from segtrain.errors import UsageError
from segtrain.models.dense_block import DenseBlock
from segtrain.runtime.distributed import DistributedContext

_MAX_COMPILATIONS = 256


def prepare_model(
    model: nn.Module, config: TrainConfig, world: DistributedContext, device: torch.device
) -> None:
    """Set up synchronized batch norm and compilation in place, as configured.

    The keys of the state_dict do not change.

    Raises:
        UsageError: sync_bn or cuda_graph is not supported here.
    """
    if config.cuda_graph and (device.type != "cuda" or world.size > 1):
        raise UsageError("train.cuda_graph needs one process on one GPU", "drop it")
    if config.sync_bn and world.size > 1:
        if device.type != "cuda":
            raise UsageError("train.sync_bn needs GPUs", "drop it or choose --device cuda")
        if any(isinstance(module, DenseBlock) for module in model.modules()):
            raise UsageError(
                "train.sync_bn works with U-Nets only: dense blocks compute their own statistics",
                "drop it",
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if config.compile != "off":
        # All blocks share the code of one forward, which torch compiles once for each block and
        # mode (training, evaluation). By default it gives up after eight compilations.
        torch._dynamo.config.recompile_limit = _MAX_COMPILATIONS
    if config.compile == "full":
        model.compile()
    elif config.compile == "blocks":
        for block in _blocks(model):
            block.compile()


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """Turn synchronized batch norm into plain batch norm over the images of this process.

    Outside of training steps, the processes run different numbers of batches, and a synchronized
    layer would wait for a batch that never comes.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    for norm in norms:
        norm.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.SyncBatchNorm


def wrap_ddp(model: nn.Module, world: DistributedContext) -> nn.Module:
    """Wrap a model in DistributedDataParallel; with a single process, return the model itself.

    Gradients become means over all processes. Wrap it again after freezing or unfreezing weights.
    """
    if world.size == 1:
        return model
    # Each process has its own running statistics until they are averaged for validation. torch
    # 2.15 has renamed the option.
    parameters = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {option: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, **options)


@torch.no_grad()
def average_running_stats(model: nn.Module, world: DistributedContext) -> None:
    """Average the running statistics of batch norm over all processes."""
    if world.size == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            world.all_reduce_sum(buffer).div_(world.size)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost dense blocks and `nn.Sequential` modules."""
    for child in module.children():
        if isinstance(child, DenseBlock | nn.Sequential):
            yield child
        else:
            yield from _blocks(child)
