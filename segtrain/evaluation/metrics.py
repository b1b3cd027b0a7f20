"""Metrics as functions of counts that are summed over images.

A metric depends on sums alone, so neither the order of the images nor the number of processes that
counted them changes it, and the bootstrap only needs other sums.

A ratio of 0/0 counts as 1: an image without people has IoU 1 if no pixel is predicted as person,
and 0 if one is. A model that never predicts person has precision 1 and, if there was a person,
recall 0.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from segtrain.evaluation.counts import CONFIDENCE_BITS, NUM_RELIABILITY_BINS, Records
from segtrain.types import BACKGROUND, PERSON

Floats = npt.NDArray[np.float64]
Columns = dict[str, npt.NDArray[np.int64]]
"""Name → N int64 or N K int64, a row for each image."""
Sums = Mapping[str, npt.NDArray[np.int64] | Floats]
"""Name → the sum of a column: a scalar or K; leading axes hold several sets of sums."""
Metric = Callable[[Sums], Floats]

# Metrics of single images are summed as integers, too. The sum is then exact, and each value is off
# by less than 5e-10.
_FIXED_POINT_SCALE = 2**30


def metric_columns(records: Records) -> Columns:
    """The columns of N records whose sums every metric is computed from."""
    confusion = records["confusion"]
    columns = {
        "num": np.ones(len(records), dtype=np.int64),
        "tn": confusion[:, BACKGROUND, BACKGROUND],
        "fp": confusion[:, BACKGROUND, PERSON],
        "fn": confusion[:, PERSON, BACKGROUND],
        "tp": confusion[:, PERSON, PERSON],
        "boundary_intersection": records["boundary"][:, 0],
        "boundary_union": records["boundary"][:, 1],
        "pred_contour_matched": records["contour"][:, 0],
        "pred_contour": records["contour"][:, 1],
        "true_contour_matched": records["contour"][:, 2],
        "true_contour": records["contour"][:, 3],
        "bin_pixels": records["in_bin"].sum(axis=1, dtype=np.int64),
        "bin_person": records["in_bin"][:, PERSON].astype(np.int64),
        "bin_excess": records["confidence"],
    }
    for name, metric in _PER_IMAGE_METRICS.items():
        columns[name] = np.rint(metric(columns) * _FIXED_POINT_SCALE).astype(np.int64)
    return columns


def sum_columns(columns: Columns) -> Sums:
    """Sum each column over all images."""
    return {name: np.asarray(column.sum(axis=0)) for name, column in columns.items()}


def compute_metrics(sums: Sums, metrics: Mapping[str, Metric] | None = None) -> dict[str, float]:
    """Every metric of one set of sums, in 0..1."""
    return {name: float(metric(sums)) for name, metric in (metrics or METRICS).items()}


def constant_prediction(label: int, records: Records) -> Records:
    """The records of the baseline that predicts `label` for every pixel.

    Only `CONFUSION_METRICS` are valid for them: the other columns are still those of `records`.

    Args:
        label: PERSON or BACKGROUND.
    """
    baseline = records.copy()
    baseline["confusion"] = 0
    baseline["confusion"][:, :, label] = records["confusion"].sum(axis=2)
    return baseline


def image_ious(records: Records) -> Floats:
    """Person IoU of each image."""
    return person_iou(metric_columns(records))


def person_iou(sums: Sums) -> Floats:
    """Intersection over union of the person class: the headline metric."""
    return _ratio(sums["tp"], sums["tp"] + sums["fp"] + sums["fn"])


def mean_iou(sums: Sums) -> Floats:
    """Mean of the IoU of person and the IoU of background."""
    background = _ratio(sums["tn"], sums["tn"] + sums["fp"] + sums["fn"])
    return (person_iou(sums) + background) / 2


def dice(sums: Sums) -> Floats:
    """2 intersection / (truth + prediction) of the person class; equals its F1."""
    return _ratio(2 * sums["tp"], 2 * sums["tp"] + sums["fp"] + sums["fn"])


def precision(sums: Sums) -> Floats:
    """Fraction of the predicted person pixels that are person."""
    return _ratio(sums["tp"], sums["tp"] + sums["fp"])


def recall(sums: Sums) -> Floats:
    """Fraction of the true person pixels that are predicted as person."""
    return _ratio(sums["tp"], sums["tp"] + sums["fn"])


def pixel_accuracy(sums: Sums) -> Floats:
    """Fraction of pixels with the right class."""
    return _ratio(sums["tp"] + sums["tn"], _num_pixels(sums))


def predicted_share(sums: Sums) -> Floats:
    """Fraction of pixels predicted as person; 0 without pixels."""
    return _ratio(sums["tp"] + sums["fp"], _num_pixels(sums), empty=0)


def boundary_iou(sums: Sums) -> Floats:
    """IoU of the boundaries: sum of intersections over sum of unions, as in `person_iou`."""
    return _ratio(sums["boundary_intersection"], sums["boundary_union"])


def boundary_precision(sums: Sums) -> Floats:
    """Fraction of the predicted contour that has a match in the true contour."""
    return _ratio(sums["pred_contour_matched"], sums["pred_contour"])


def boundary_recall(sums: Sums) -> Floats:
    """Fraction of the true contour that has a match in the predicted contour."""
    return _ratio(sums["true_contour_matched"], sums["true_contour"])


def boundary_f1(sums: Sums) -> Floats:
    """Harmonic mean of the precision and the recall of the contours."""
    p, r = boundary_precision(sums), boundary_recall(sums)
    return _ratio(2 * p * r, p + r, empty=0)


def reliability(sums: Sums) -> tuple[Floats, Floats, Floats]:
    """Fraction of pixels, mean probability and fraction of person in each reliability bin.

    An empty bin has a fraction of pixels of 0, and its center as the two others.
    """
    pixels = np.asarray(sums["bin_pixels"], dtype=np.float64)
    edges = np.arange(NUM_RELIABILITY_BINS) / NUM_RELIABILITY_BINS
    centers = edges + 0.5 / NUM_RELIABILITY_BINS
    nonempty = pixels > 0
    divisor = np.where(nonempty, pixels, 1)
    mean = np.where(nonempty, edges + sums["bin_excess"] / divisor / 2**CONFIDENCE_BITS, centers)
    person = np.where(nonempty, sums["bin_person"] / divisor, centers)
    return _ratio(pixels, pixels.sum(axis=-1, keepdims=True), empty=0), mean, person


def ece(sums: Sums) -> Floats:
    """Expected calibration error of the person probability, over 16 bins of equal width.

    Mean over pixels of the distance between the mean probability and the fraction of person of a
    bin (Guo et al. 2017, arXiv 1706.04599, section 2, eq. 3, with the probability of the person
    class instead of that of the predicted class). 0 without pixels.
    """
    fraction, mean, person = reliability(sums)
    return np.asarray((fraction * np.abs(mean - person)).sum(axis=-1))


def all_person_iou(sums: Sums) -> Floats:
    """Person IoU of the baseline that predicts person everywhere."""
    return _ratio(sums["tp"] + sums["fn"], _num_pixels(sums))


def all_background_iou(sums: Sums) -> Floats:
    """Person IoU of the baseline that predicts background everywhere."""
    return _ratio(0 * sums["tp"], sums["tp"] + sums["fn"])


def _mean_over_images(name: str) -> Metric:
    def mean(sums: Sums) -> Floats:
        return _ratio(sums[name] / _FIXED_POINT_SCALE, sums["num"])

    return mean


def _num_pixels(sums: Sums) -> npt.NDArray[np.int64] | Floats:
    return sums["tn"] + sums["fp"] + sums["fn"] + sums["tp"]


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike, empty: float = 1) -> Floats:
    """The quotient, or `empty` where the denominator is 0."""
    top, bottom = (np.asarray(some, dtype=np.float64) for some in (numerator, denominator))
    return np.asarray(np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), empty))


_PER_IMAGE_METRICS: dict[str, Metric] = {
    "image_iou": person_iou,
    "image_boundary_iou": boundary_iou,
    "image_boundary_f1": boundary_f1,
}

CONFUSION_METRICS: dict[str, Metric] = {
    "person_iou": person_iou,
    "mean_iou": mean_iou,
    "image_iou": _mean_over_images("image_iou"),
    "dice": dice,
    "precision": precision,
    "recall": recall,
    "pixel_accuracy": pixel_accuracy,
    "predicted_share": predicted_share,
    "all_person_iou": all_person_iou,
    "all_background_iou": all_background_iou,
}
"""The metrics that depend on the confusion matrix alone."""

METRICS: dict[str, Metric] = CONFUSION_METRICS | {
    "boundary_iou": boundary_iou,
    "image_boundary_iou": _mean_over_images("image_boundary_iou"),
    "boundary_precision": boundary_precision,
    "boundary_recall": boundary_recall,
    "boundary_f1": boundary_f1,
    "image_boundary_f1": _mean_over_images("image_boundary_f1"),
    "ece": ece,
}
"""All metrics; `image_*` are means over images, the others ratios of sums."""
