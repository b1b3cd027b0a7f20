"""Confusion matrix on the device and the metrics that follow from it, for validation."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from segtrain.config.schema import BnEval
from segtrain.evaluation.metrics import CONFUSION_METRICS, Sums, compute_metrics
from segtrain.inference.options import InferenceOptions
from segtrain.inference.predict import Batch, predict_batches
from segtrain.runtime.devices import Autocast
from segtrain.runtime.signals import raise_if_stopped

_SUMS = ("tn", "fp", "fn", "tp")


class ConfusionMatrix:
    """Integer counts of (truth, prediction) pairs, kept on the device and read once at the end.

    Counts are summed over images before any ratio is computed, so the result depends neither on
    the batch size nor on the order.
    """

    def __init__(self, num_classes: int = 2, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, preds: Tensor, mask: Tensor) -> None:
        """Add pixels.

        Args:
            preds: integer classes in 0..num_classes-1, any shape.
            mask: the ground truth, of the same shape; 255 is ignored.
        """
        num_classes = self.counts.shape[0]
        # The pair of an ignored pixel is larger than all others and never counted. Selecting
        # pixels and bincount synchronize to learn a size; comparisons do not.
        pairs = mask.to(torch.int16) * num_classes + preds.to(torch.int16)
        counts = torch.stack([(pairs == pair).sum() for pair in range(num_classes**2)])
        self.counts += counts.view(num_classes, num_classes)

    def compute(self) -> "SegmentationMetrics":
        """Read the counts from the device and compute the metrics."""
        return metrics_from_counts(self.counts.tolist())


@dataclass(frozen=True, kw_only=True)
class SegmentationMetrics:
    """Global metrics in 0..1 over all pixels that are not ignored, at original resolution.

    Each is the metric of the same name in `segtrain.evaluation.metrics`.
    """

    person_iou: float
    mean_iou: float
    dice: float
    precision: float
    recall: float
    pixel_accuracy: float
    predicted_share: float
    all_person_iou: float
    all_background_iou: float


def metrics_from_counts(counts: list[list[int]]) -> SegmentationMetrics:
    """Metrics of 2 2 counts; `counts[t][p]` is the number of pixels of class t predicted as p."""
    flat = np.asarray(counts, dtype=np.int64).ravel()
    sums: Sums = {name: np.asarray(count) for name, count in zip(_SUMS, flat, strict=True)}
    metrics = {f.name: CONFUSION_METRICS[f.name] for f in fields(SegmentationMetrics)}
    return SegmentationMetrics(**compute_metrics(sums, metrics))


def evaluate_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    options: InferenceOptions,
    device: torch.device,
    autocast: Autocast,
    bn_eval: BnEval = "running",
    on_batch: Callable[[int], object] = lambda num_images: None,
) -> ConfusionMatrix:
    """Count every pixel of every image once, at a threshold of 0.5.

    Args:
        model, batches, options, bn_eval: as in `predict_batches`.
        on_batch: called with the number of images after each batch.
    """
    confusion = ConfusionMatrix(device=device)
    for batch, probs in predict_batches(
        model, batches, options=options, device=device, autocast=autocast, bn_eval=bn_eval
    ):
        confusion.update(probs >= 0.5, batch["mask"])
        raise_if_stopped()
        on_batch(len(batch["image"]))
    return confusion
