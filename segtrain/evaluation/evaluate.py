"""Judging a network on whole pictures at their original resolution."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.asking import Asking
from segtrain.config import BnEval
from segtrain.devices import Autocast, prefetched
from segtrain.evaluation.metrics import ConfusionMatrix
from segtrain.models.batch_norm import evaluation_statistics
from segtrain.models.inference import person_probs

Batch = Mapping[str, Any]


def answered_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    asking: Asking,
    device: torch.device,
    autocast: Autocast,
    bn_eval: BnEval,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch, on the device, with what the network says of it.

    The network sees the pictures as they are in the batch, scaled to its size; its probabilities
    are enlarged to the masks' resolution.

    Args:
        model: put into evaluation mode here and left so.
        batches: mappings with "image" N 3 h w uint8 and "mask" N H W uint8 in {0, 1, 255}.
        bn_eval: as in `segtrain.models.batch_norm.evaluation_statistics`.

    Returns:
        With each batch N H W float32 in 0..1, on the device.
    """
    with evaluation_statistics(model, bn_eval):
        for batch in prefetched(batches, device):
            size = (batch["mask"].shape[1], batch["mask"].shape[2])
            yield batch, person_probs(model, batch["image"], size, autocast, asking=asking)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    asking: Asking,
    device: torch.device,
    autocast: Autocast,
    bn_eval: BnEval = "running",
    on_batch: Callable[[int], object] = lambda num_images: None,
) -> ConfusionMatrix:
    """Count every pixel of every picture once, called person from one half on.

    Args:
        model, batches, asking, bn_eval: as in `answered_batches`.
        on_batch: called with the number of images after each batch.
    """
    confusion = ConfusionMatrix(device=device)
    for batch, probs in answered_batches(
        model, batches, asking=asking, device=device, autocast=autocast, bn_eval=bn_eval
    ):
        confusion.update(probs >= 0.5, batch["mask"])
        on_batch(len(batch["image"]))
    return confusion
