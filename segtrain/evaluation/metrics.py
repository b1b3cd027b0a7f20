"""Counting, and the formulas over the counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from segtrain.classes import PERSON

EMPTY_RULE = (
    "pixels marked ignore are left out; a class that is neither there nor predicted has IoU 1"
)


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
    """Global figures in 0..1 over all pixels that are not ignored, at original resolution."""

    person_iou: float
    """Sum of intersections over sum of unions of the person class: the headline."""
    mean_iou: float
    """Mean of the IoU of person and of background."""
    dice: float
    """2 intersection / (truth + prediction) of the person class; equals its F1."""
    pixel_accuracy: float
    """Share of pixels whose class is right."""
    predicted_share: float
    """Share of pixels that are called person."""
    all_person_iou: float
    """Person IoU of the trivial answer "everything is person"."""
    all_background_iou: float
    """Person IoU of the trivial answer "everything is background"."""


def metrics_from_counts(counts: list[list[int]]) -> SegmentationMetrics:
    """The formulas; `counts[t][p]` pixels are of class t and were called p."""
    total = sum(map(sum, counts))
    correct = sum(counts[c][c] for c in range(len(counts)))
    ious = [_iou(counts, c) for c in range(len(counts))]
    truth = sum(counts[PERSON])
    predicted = sum(row[PERSON] for row in counts)
    return SegmentationMetrics(
        person_iou=ious[PERSON],
        mean_iou=sum(ious) / len(ious),
        dice=_ratio(2 * counts[PERSON][PERSON], truth + predicted),
        pixel_accuracy=_ratio(correct, total),
        predicted_share=predicted / total if total else 0.0,
        all_person_iou=_ratio(truth, total),
        all_background_iou=_ratio(0, truth),
    )


def _iou(counts: list[list[int]], c: int) -> float:
    truth, predicted = sum(counts[c]), sum(row[c] for row in counts)
    return _ratio(counts[c][c], truth + predicted - counts[c][c])


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
