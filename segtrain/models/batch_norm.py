"""Batch-norm statistics at evaluation time.

Running statistics average over the last training steps. They come from weights that have changed
since, and from activations with dropout. There are two alternatives. The Tiramisu paper evaluates
with the statistics of the evaluated image itself. Recalibration measures the running statistics
again, which takes a few seconds and requires training images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from segtrain.config.schema import BnEval
from segtrain.runtime.devices import Autocast, prefetch
from segtrain.runtime.signals import raise_if_stopped

NUM_TO_RECALIBRATE = 200


@contextmanager
def eval_mode(model: nn.Module, bn_eval: BnEval) -> Iterator[None]:
    """Put `model` into evaluation mode; inside the block, "batch" uses batch statistics.

    With "batch", pass one image at a time, or the result of an image depends on the others in its
    batch. The running statistics do not change. "recalibrate" acts as "running": call
    `recalibrate` before.
    """
    model.eval()
    norms = _batch_norms(model) if bn_eval == "batch" else []
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()
            norm.track_running_stats = True


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device,
    autocast: Autocast,
    num_images: int = NUM_TO_RECALIBRATE,
    on_batch: Callable[[int], object] = lambda num_images: None,
) -> None:
    """Replace the running statistics by their mean over training batches, without dropout.

    A frozen encoder keeps its statistics. The model is left in evaluation mode.

    Args:
        batches: mappings with "image" N 3 H W uint8, from training images.
        num_images: stop after this many images, or when `batches` ends.
        on_batch: called after each batch with its number of images.
    """
    model.train()
    norms = [norm for norm in _batch_norms(model) if norm.training]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
    try:
        num_done = 0
        for number, batch in enumerate(prefetch(batches, device), 1):
            for norm in norms:
                # The mean over all batches so far. With momentum=None, torch computes the same but
                # reads a counter from the GPU in every norm, which synchronizes.
                norm.momentum = 1 / number
            with autocast():
                model(batch["image"])
            num_done += len(batch["image"])
            raise_if_stopped()
            on_batch(len(batch["image"]))
            if num_done >= num_images:
                break
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
