"""What another threshold would have given, from the histogram of probabilities.

Exact at the thresholds k/256 for k in 0..255, where a pixel is called person from the threshold on;
beyond the last one stands the answer that calls nothing person. Between them nothing is known.
"""

from dataclasses import dataclass

import numpy as np

from segtrain.classes import BACKGROUND, PERSON
from segtrain.evaluation.boundaries import Counts
from segtrain.evaluation.figures import Floats, Sums, person_iou, precision, recall
from segtrain.evaluation.picture import NUM_BINS


@dataclass(frozen=True)
class Curves:
    """Arrays of 256 float64, one value for each threshold, rising; and what sums them up.

    average_precision: sum over these thresholds, falling, of (gain in recall) times precision,
        without interpolation; what is surer than 255/256 is not told apart. 1 where nobody is to
        be found.
    """

    thresholds: Floats
    person_iou: Floats
    precision: Floats
    recall: Floats
    average_precision: float

    @property
    def best(self) -> tuple[float, float]:
        """The threshold with the highest person IoU, and that IoU; of equal ones the middle one."""
        highest = np.flatnonzero(self.person_iou == self.person_iou.max())
        at = highest[len(highest) // 2]
        return float(self.thresholds[at]), float(self.person_iou[at])


def curves_of(histogram: Counts) -> Curves:
    """
    Args:
        histogram: 2 256 int64, pixels by truth and by bin of probability.
    """
    sums = sums_at_thresholds(histogram)
    return Curves(
        thresholds=np.arange(NUM_BINS) / NUM_BINS,
        person_iou=person_iou(sums),
        precision=precision(sums),
        recall=recall(sums),
        average_precision=_average_precision(sums) if histogram[PERSON].any() else 1.0,
    )


def _average_precision(sums: Sums) -> float:
    recalls = np.append(recall(sums), 0.0)  # what calls nothing person finds nothing
    return float(np.sum((recalls[:-1] - recalls[1:]) * precision(sums)))


def sums_at_thresholds(histogram: Counts) -> Sums:
    """The confusion at each threshold: "tn", "fp", "fn" and "tp", 256 int64 each."""
    called = histogram[:, ::-1].cumsum(axis=1)[:, ::-1]
    left = histogram.sum(axis=1, keepdims=True) - called
    return {
        "tn": left[BACKGROUND],
        "fp": called[BACKGROUND],
        "fn": left[PERSON],
        "tp": called[PERSON],
    }
