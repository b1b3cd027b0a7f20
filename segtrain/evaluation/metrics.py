"""What training watches: counts on the device, and the figures that need nothing else."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from segtrain.evaluation.figures import CONFUSION_FIGURES, Sums, figures_of

_SUMS = ("tn", "fp", "fn", "tp")


class ConfusionMatrix:
    """Integer counts of (truth, prediction) pairs, kept on the device and read once at the end.

    Counts are summed over images before any quotient is formed, so that the result depends neither
    on the batch size nor on the order.
    """

    def __init__(self, num_classes: int = 2, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, preds: Tensor, mask: Tensor) -> None:
        """Add pixels.

        Args:
            preds: integer classes in 0..num_classes-1, any shape.
            mask: the truth, of the same shape; 255 is left out.
        """
        num_classes = self.counts.shape[0]
        # An ignored pixel's pair is beyond all others and never asked for. Selecting pixels, or
        # bincount, would wait for the device to learn a size; comparing does not.
        pairs = mask.to(torch.int16) * num_classes + preds.to(torch.int16)
        counts = torch.stack([(pairs == pair).sum() for pair in range(num_classes**2)])
        self.counts += counts.view(num_classes, num_classes)

    def compute(self) -> "SegmentationMetrics":
        """Reads the counts from the device."""
        return metrics_from_counts(self.counts.tolist())


@dataclass(frozen=True, kw_only=True)
class SegmentationMetrics:
    """Global figures in 0..1 over all pixels that are not ignored, at original resolution.

    Each is the figure of the same name in `segtrain.evaluation.figures`.
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
    """The formulas; `counts[t][p]` pixels are of class t and were called p."""
    flat = np.asarray(counts, dtype=np.int64).ravel()
    sums: Sums = {name: np.asarray(count) for name, count in zip(_SUMS, flat, strict=True)}
    figures = {f.name: CONFUSION_FIGURES[f.name] for f in fields(SegmentationMetrics)}
    return SegmentationMetrics(**figures_of(sums, figures))
