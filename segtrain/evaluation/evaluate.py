"""Judging a network on whole pictures at their original resolution."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from segtrain.config import BnEval
from segtrain.devices import Autocast, prefetched
from segtrain.evaluation.metrics import ConfusionMatrix
from segtrain.models.batch_norm import evaluation_statistics
from segtrain.models.inference import person_probs


def evaluate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device,
    autocast: Autocast,
    bn_eval: BnEval = "running",
    on_batch: Callable[[int], object] = lambda num_images: None,
) -> ConfusionMatrix:
    """Count every pixel of every picture once.

    The network sees the picture scaled to its size; its probabilities are enlarged to the mask's
    resolution and thresholded at one half there.

    Args:
        model: put into evaluation mode here and left so.
        batches: mappings with "image" N 3 h w uint8 and "mask" N H W uint8 in {0, 1, 255}.
        bn_eval: as in `segtrain.models.batch_norm.evaluation_statistics`.
        on_batch: called with the number of images after each batch.
    """
    confusion = ConfusionMatrix(device=device)
    with evaluation_statistics(model, bn_eval):
        for batch in prefetched(batches, device):
            image, mask = batch["image"], batch["mask"]
            probs = person_probs(model, image, (mask.shape[1], mask.shape[2]), autocast)
            confusion.update(probs >= 0.5, mask)
            on_batch(len(image))
    return confusion
