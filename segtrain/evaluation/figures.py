"""The formulas: from counts, summed over pictures, to figures.

A figure is a function of sums alone. So it is the same in whatever order and by however many
processes the pictures were counted, and the bootstrap needs nothing but other sums.

Where nothing is there to be found or to be wrong about, a quotient is 0/0 and counts as 1: a
picture without a person in which none is seen has IoU 1, one invented pixel makes it 0; a network
that never calls anything person has precision 1 and, if there was one, recall 0.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from segtrain.classes import BACKGROUND, PERSON
from segtrain.evaluation.picture import CONFIDENCE_BITS, NUM_RELIABILITY_BINS
from segtrain.evaluation.records import Records

Floats = npt.NDArray[np.float64]
Columns = dict[str, npt.NDArray[np.int64]]
"""Of each picture a row: name → N int64, or N K int64."""
Sums = Mapping[str, npt.NDArray[np.int64] | Floats]
"""Over pictures: the same names → scalars or K; with further axes in front, a set of sums each."""
Figure = Callable[[Sums], Floats]

# The quotients of single pictures are summed as whole numbers, too, which makes the sum exact and
# each of them wrong by less than 5e-10.
_UNIT = 2**30


def columns_of(records: Records) -> Columns:
    """What is summed of N records: every figure is made of these."""
    confusion = records["confusion"]
    columns = {
        "num": np.ones(len(records), dtype=np.int64),
        "tn": confusion[:, BACKGROUND, BACKGROUND],
        "fp": confusion[:, BACKGROUND, PERSON],
        "fn": confusion[:, PERSON, BACKGROUND],
        "tp": confusion[:, PERSON, PERSON],
        "boundary_intersection": records["boundary"][:, 0],
        "boundary_union": records["boundary"][:, 1],
        "contour_found": records["contour"][:, 0],
        "contour_predicted": records["contour"][:, 1],
        "contour_met": records["contour"][:, 2],
        "contour_true": records["contour"][:, 3],
        "bin_pixels": records["in_bin"].sum(axis=1, dtype=np.int64),
        "bin_person": records["in_bin"][:, PERSON].astype(np.int64),
        "bin_excess": records["confidence"],
    }
    for name, figure in _OF_ONE_PICTURE.items():
        columns[name] = np.rint(figure(columns) * _UNIT).astype(np.int64)
    return columns


def sums_of(columns: Columns) -> Sums:
    """Over all pictures."""
    return {name: np.asarray(column.sum(axis=0)) for name, column in columns.items()}


def figures_of(sums: Sums, figures: Mapping[str, Figure] | None = None) -> dict[str, float]:
    """Every figure of one set of sums, in 0..1."""
    return {name: float(figure(sums)) for name, figure in (figures or FIGURES).items()}


def as_if_all(answer: int, records: Records) -> Records:
    """The records that the trivial answer "everything is `answer`" would have got.

    Only `CONFUSION_FIGURES` may be asked of them: the rest still is that of the prediction.

    Args:
        answer: PERSON or BACKGROUND.
    """
    trivial = records.copy()
    trivial["confusion"] = 0
    trivial["confusion"][:, :, answer] = records["confusion"].sum(axis=2)
    return trivial


def image_ious(records: Records) -> Floats:
    """Person IoU of each picture by itself."""
    return person_iou(columns_of(records))


def person_iou(sums: Sums) -> Floats:
    """Intersection over union of the person class: the headline."""
    return _ratio(sums["tp"], sums["tp"] + sums["fp"] + sums["fn"])


def mean_iou(sums: Sums) -> Floats:
    """Mean of the IoU of person and of background."""
    background = _ratio(sums["tn"], sums["tn"] + sums["fp"] + sums["fn"])
    return (person_iou(sums) + background) / 2


def dice(sums: Sums) -> Floats:
    """2 intersection / (truth + prediction) of the person class; equals its F1."""
    return _ratio(2 * sums["tp"], 2 * sums["tp"] + sums["fp"] + sums["fn"])


def precision(sums: Sums) -> Floats:
    """Share of what was called person that is."""
    return _ratio(sums["tp"], sums["tp"] + sums["fp"])


def recall(sums: Sums) -> Floats:
    """Share of person that was called so."""
    return _ratio(sums["tp"], sums["tp"] + sums["fn"])


def pixel_accuracy(sums: Sums) -> Floats:
    """Share of pixels whose class is right."""
    return _ratio(sums["tp"] + sums["tn"], _pixels(sums))


def predicted_share(sums: Sums) -> Floats:
    """Share of pixels that are called person; of none it is 0."""
    return _ratio(sums["tp"] + sums["fp"], _pixels(sums), empty=0)


def boundary_iou(sums: Sums) -> Floats:
    """Sum of intersections over sum of unions, as `person_iou` is, of the boundaries."""
    return _ratio(sums["boundary_intersection"], sums["boundary_union"])


def boundary_precision(sums: Sums) -> Floats:
    """Share of the predicted contour that has a partner in the true one."""
    return _ratio(sums["contour_found"], sums["contour_predicted"])


def boundary_recall(sums: Sums) -> Floats:
    """Share of the true contour that has a partner in the predicted one."""
    return _ratio(sums["contour_met"], sums["contour_true"])


def boundary_f1(sums: Sums) -> Floats:
    """Harmonic mean of the precision and the recall of the contours."""
    found, met = boundary_precision(sums), boundary_recall(sums)
    return _ratio(2 * found * met, found + met, empty=0)


def reliability(sums: Sums) -> tuple[Floats, Floats, Floats]:
    """Of each bin of probability: share of pixels, mean probability, share that is person.

    An empty bin has the share 0, and the middle of the bin for both means.
    """
    pixels = np.asarray(sums["bin_pixels"], dtype=np.float64)
    edges = np.arange(NUM_RELIABILITY_BINS) / NUM_RELIABILITY_BINS
    middle = edges + 0.5 / NUM_RELIABILITY_BINS
    some = pixels > 0
    whole = np.where(some, pixels, 1)
    mean = np.where(some, edges + sums["bin_excess"] / whole / 2**CONFIDENCE_BITS, middle)
    person = np.where(some, sums["bin_person"] / whole, middle)
    return _ratio(pixels, pixels.sum(axis=-1, keepdims=True), empty=0), mean, person


def ece(sums: Sums) -> Floats:
    """Expected calibration error of the probability of person, over 16 bins of equal width.

    Mean over pixels of the distance between a bin's mean probability and its share of person (Guo
    et al. 2017, arXiv 1706.04599, section 2, eq. 3, with the probability of the person class where
    they take that of the predicted one). Of no pixels it is 0.
    """
    share, mean, person = reliability(sums)
    return np.asarray((share * np.abs(mean - person)).sum(axis=-1))


def all_person_iou(sums: Sums) -> Floats:
    """Person IoU of the trivial answer "everything is person"."""
    return _ratio(sums["tp"] + sums["fn"], _pixels(sums))


def all_background_iou(sums: Sums) -> Floats:
    """Person IoU of the trivial answer "everything is background"."""
    return _ratio(0 * sums["tp"], sums["tp"] + sums["fn"])


def _mean_over_images(name: str) -> Figure:
    def mean(sums: Sums) -> Floats:
        return _ratio(sums[name] / _UNIT, sums["num"])

    return mean


def _pixels(sums: Sums) -> npt.NDArray[np.int64] | Floats:
    return sums["tn"] + sums["fp"] + sums["fn"] + sums["tp"]


def _ratio(part: npt.ArrayLike, whole: npt.ArrayLike, empty: float = 1) -> Floats:
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.asarray(np.where(whole > 0, part / np.where(whole > 0, whole, 1), empty))


_OF_ONE_PICTURE: dict[str, Figure] = {
    "image_iou": person_iou,
    "image_boundary_iou": boundary_iou,
    "image_boundary_f1": boundary_f1,
}

CONFUSION_FIGURES: dict[str, Figure] = {
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
"""Those that are made of nothing but which pixels were called what."""

FIGURES: dict[str, Figure] = CONFUSION_FIGURES | {
    "boundary_iou": boundary_iou,
    "image_boundary_iou": _mean_over_images("image_boundary_iou"),
    "boundary_precision": boundary_precision,
    "boundary_recall": boundary_recall,
    "boundary_f1": boundary_f1,
    "image_boundary_f1": _mean_over_images("image_boundary_f1"),
    "ece": ece,
}
"""All of them; the `image_` ones are means over pictures, the others quotients of sums."""
