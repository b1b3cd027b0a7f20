"""Metrics at other thresholds, from the histogram of probabilities.

They are exact at the thresholds k/256 for k in 0..255. Above the last one, nothing is predicted as
person. Thresholds in between are unknown.
"""

from dataclasses import dataclass

import numpy as np

from segtrain.evaluation.boundary import Counts
from segtrain.evaluation.counts import NUM_BINS
from segtrain.evaluation.metrics import Floats, Sums, person_iou, precision, recall
from segtrain.types import BACKGROUND, PERSON


@dataclass(frozen=True)
class ThresholdCurves:
    """Arrays of 256 float64, a value for each threshold in ascending order, and their summary.

    average_precision: sum over the thresholds, descending, of the gain in recall times the
        precision, without interpolation; all probabilities above 255/256 form one step. 1 if there
        is no person.
    """

    thresholds: Floats
    person_iou: Floats
    precision: Floats
    recall: Floats
    average_precision: float

    @property
    def best(self) -> tuple[float, float]:
        """The threshold with the highest person IoU, and that IoU; the middle one of ties."""
        ties = np.flatnonzero(self.person_iou == self.person_iou.max())
        best = ties[len(ties) // 2]
        return float(self.thresholds[best]), float(self.person_iou[best])


def threshold_curves(histogram: Counts) -> ThresholdCurves:
    """Compute the curves.

    Args:
        histogram: 2 256 int64, pixels by true class and bin of probability.
    """
    sums = _sums_at_thresholds(histogram)
    return ThresholdCurves(
        thresholds=np.arange(NUM_BINS) / NUM_BINS,
        person_iou=person_iou(sums),
        precision=precision(sums),
        recall=recall(sums),
        average_precision=_average_precision(sums) if histogram[PERSON].any() else 1.0,
    )


def _average_precision(sums: Sums) -> float:
    recalls = np.append(recall(sums), 0.0)  # above the last threshold
    return float(np.sum((recalls[:-1] - recalls[1:]) * precision(sums)))


def _sums_at_thresholds(histogram: Counts) -> Sums:
    """The confusion at each threshold: "tn", "fp", "fn" and "tp", 256 int64 each."""
    positive = histogram[:, ::-1].cumsum(axis=1)[:, ::-1]
    negative = histogram.sum(axis=1, keepdims=True) - positive
    return {
        "tn": negative[BACKGROUND],
        "fp": positive[BACKGROUND],
        "fn": negative[PERSON],
        "tp": positive[PERSON],
    }
