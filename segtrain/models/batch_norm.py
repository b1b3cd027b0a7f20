"""The statistics that batch norm goes by when a network is judged or used.

Running statistics are a mean over the last steps of training, made by weights that have changed
since, with dropout on. The Tiramisu paper evaluates by the statistics of what is looked at; and
measuring anew costs a few seconds and needs training images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from segtrain.config import BnEval
from segtrain.devices import Autocast, prefetched

NUM_TO_RECALIBRATE = 200


@contextmanager
def evaluation_statistics(model: nn.Module, bn_eval: BnEval) -> Iterator[None]:
    """Put `model` into evaluation mode; within, "batch" goes by what is looked at.

    Give it one picture at a time then, or a picture's result depends on its neighbours. The running
    statistics are not touched. "recalibrate" has been done before (`recalibrate`).
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

    A frozen encoder keeps its own. The network is left in evaluation mode.

    Args:
        batches: mappings with "image" N 3 H W uint8, of training images.
        num_images: after so many, or when there are no more, it is done.
        on_batch: called with the number of images after each batch.
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
        for number, batch in enumerate(prefetched(batches, device), 1):
            for norm in norms:
                # The mean over all batches so far. torch's own word for it, None, reads a counter
                # from the GPU and waits, in every norm.
                norm.momentum = 1 / number
            with autocast():
                model(batch["image"])
            num_done += len(batch["image"])
            on_batch(len(batch["image"]))
            if num_done >= num_images:
                break
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
