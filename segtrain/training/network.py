"""The network as training runs it: compiled, and on several processes at once."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from segtrain.config import TrainConfig
from segtrain.distributed import World
from segtrain.errors import UsageError
from segtrain.models.dense_block import DenseBlock

_MAX_COMPILATIONS = 256


def make_ready(model: nn.Module, config: TrainConfig, world: World, device: torch.device) -> None:
    """Give a network, in place, the batch norm and the compilation that are configured.

    Its weights keep their names.

    Raises:
        UsageError: sync_bn or cuda_graph where it cannot be.
    """
    if config.cuda_graph and (device.type != "cuda" or world.size > 1):
        raise UsageError("train.cuda_graph needs one process on one GPU; drop it")
    if config.sync_bn and world.size > 1:
        if device.type != "cuda":
            raise UsageError("train.sync_bn needs GPUs; drop it or choose --device cuda")
        if any(isinstance(module, DenseBlock) for module in model.modules()):
            raise UsageError(
                "train.sync_bn is for U-Nets, for dense blocks measure by themselves; drop it"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if config.compile != "off":
        # All blocks share the code of one forward, and torch gives up on code that it has compiled
        # eight times: every block, in training and in evaluation, is once.
        torch._dynamo.config.recompile_limit = _MAX_COMPILATIONS
    if config.compile == "full":
        model.compile()
    elif config.compile == "blocks":
        for block in _blocks(model):
            block.compile()


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """Within, sync_bn's layers are plain batch norm over the images of this process.

    Outside of training steps the processes pass different numbers of batches, and a layer that
    synchronizes would wait for one that never comes.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    for norm in norms:
        norm.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.SyncBatchNorm


def in_parallel(model: nn.Module, world: World) -> nn.Module:
    """The network whose gradients are means over all processes; alone, the network itself.

    Make it anew where weights were frozen or set free.
    """
    if world.size == 1:
        return model
    # Each process has its own running statistics until they are averaged for validation. torch
    # 2.15 has another name for it.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, **options)


@torch.no_grad()
def average_statistics(model: nn.Module, world: World) -> None:
    """Make batch norm's running statistics those of all processes together."""
    if world.size == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            world.sum_(buffer).div_(world.size)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost dense blocks and sequences of layers."""
    for child in module.children():
        if isinstance(child, DenseBlock | nn.Sequential):
            yield child
        else:
            yield from _blocks(child)
