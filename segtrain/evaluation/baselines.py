"""The mean-mask baseline: a prediction from training masks that ignores the image."""

from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.data.sample import Sample, SegmentationDataset
from segtrain.errors import DataError
from segtrain.runtime.thread_map import thread_map
from segtrain.types import IGNORE, PERSON, BoolMask, Mask, Probs

GRID = 64
"""Side of the square grid to which all masks are resized, whatever their aspect ratio."""


@dataclass(frozen=True)
class MeanMask:
    """The mean of many masks, as a prediction for images of any size.

    mean: 64 64 float32 in 0..1, fraction of person at each place of the frame.
    threshold: the lowest fraction that is predicted as person.
    """

    mean: Probs
    threshold: float

    def probs(self, size: tuple[int, int]) -> Probs:
        """The mean, resized to `size` (height, width): H W float32 in 0..1."""
        resized = cv2.resize(self.mean, size[::-1], interpolation=cv2.INTER_LINEAR)
        return np.clip(resized, 0, 1).astype(np.float32).reshape(size)

    def predict(self, size: tuple[int, int]) -> Mask:
        """The mask for an image of `size` (height, width): H W uint8 in {0, 1}."""
        return (self.probs(size) >= np.float32(self.threshold)).view(np.uint8)


def compute_mean_mask(dataset: SegmentationDataset) -> MeanMask:
    """Average the masks of a data set on a square grid.

    A cell averages its pixels that are not ignored. A cell without such pixels gets the mean of all
    others, and 0 if there are none at all. Damaged images are left out. The threshold is the one
    with the highest person IoU over these images: for small people, the mean is below 0.5
    everywhere, and a threshold of 0.5 would give an empty mask.

    Args:
        dataset: the training images.
    """
    person, known = np.zeros((2, GRID, GRID))
    read = partial(_sample_or_none, dataset)
    for _, sample in thread_map(read, range(len(dataset)), desc="reading training masks"):
        if sample is not None:
            person += _resize_to_grid(sample.mask == PERSON)
            known += _resize_to_grid(sample.mask != IGNORE)
    overall = person.sum() / known.sum() if known.any() else 0.0
    mean = np.where(known > 0, person / np.where(known > 0, known, 1), overall)
    mean = np.clip(mean, 0, 1).astype(np.float32)
    return MeanMask(mean, _best_threshold(mean, person, known))


def _best_threshold(
    mean: Probs, person: npt.NDArray[np.float64], known: npt.NDArray[np.float64]
) -> float:
    """The value of `mean` that gives the highest person IoU as a threshold."""
    order = np.argsort(-mean, axis=None, kind="stable")
    true_positives = person.flat[order].cumsum()
    if not true_positives[-1]:
        return 0.5
    union = known.flat[order].cumsum() + true_positives[-1] - true_positives
    ious = true_positives / union
    descending = mean.flat[order]
    ious[:-1][descending[:-1] == descending[1:]] = 0  # equal cells are on the same side
    return float(descending[np.argmax(ious)])


def _sample_or_none(dataset: SegmentationDataset, index: int) -> Sample | None:
    try:
        return dataset.sample(index, short_side=GRID)
    except DataError:
        return None


def _resize_to_grid(region: BoolMask) -> npt.NDArray[np.float64]:
    return np.asarray(
        cv2.resize(region.astype(np.float64), (GRID, GRID), interpolation=cv2.INTER_AREA)
    )
