"""All that evaluation keeps of one picture: whole numbers, found in one pass."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.evaluation.boundaries import Counts, boundary_counts, contour_counts
from segtrain.images import Pixels

NUM_BINS = 256
"""Bins of the histogram; bin k holds k/256 <= p < (k + 1)/256, the last one 1, too."""
NUM_RELIABILITY_BINS = 16
"""Bins of the reliability curve, each of 16 of the histogram's."""
CONFIDENCE_BITS = 24
"""Probabilities are summed in units of 2**-24, which hold a float32 of one half or more exactly."""

Probs = npt.NDArray[np.float32]

# Pixels that the histogram takes at once. What it makes of them stays in the processor's cache,
# which is several times as fast as a whole picture at once, and memory does not grow with it.
_AT_ONCE = 2**15


@dataclass(frozen=True, kw_only=True)
class PictureCounts:
    """Counts of pixels of one picture; ignored ones are in none of them.

    Whole numbers, so that sums over pictures are exact in any order. The histogram gives the
    confusion at every threshold k/256 exactly; between two of these nothing is known.

    size: height and width.
    confusion: 2 2 int64, `confusion[t][p]` pixels are of class t and were called p.
    boundary: 2 int64, `segtrain.evaluation.boundaries.boundary_counts`.
    contour: 4 int64, `segtrain.evaluation.boundaries.contour_counts`.
    histogram: 2 256 int64, by truth and by the bin of the probability of person.
    confidence: 16 int64, sum of what the probabilities in a reliability bin exceed its lower edge
        by, in units of 2**-24, each rounded down.
    touches_frame: whether a person reaches the outermost pixels.
    """

    size: tuple[int, int]
    confusion: Counts
    boundary: Counts
    contour: Counts
    histogram: Counts
    confidence: Counts
    touches_frame: bool


def count_picture(probs: Probs, mask: Pixels, *, threshold: float = 0.5) -> PictureCounts:
    """Compare the prediction for one picture with its truth, at original resolution.

    Args:
        probs: H W float32 in 0..1, probability of person.
        mask: H W uint8 in {0, 1, 255}; H and W are 1 or more.
        threshold: from which probability on a pixel is called person.

    Raises:
        ValueError: shapes differ, or a probability or a class is none.
    """
    _check(probs, mask)
    # Compared as float32, as the probabilities are: 0.3 must include a probability of 0.3.
    predicted = (probs >= np.float32(threshold)).view(np.uint8)
    histogram, confidence = _histogram(probs, mask)
    return PictureCounts(
        size=(mask.shape[0], mask.shape[1]),
        confusion=confusion_of(predicted, mask),
        boundary=np.array(boundary_counts(predicted, mask), dtype=np.int64),
        contour=contour_counts(predicted, mask),
        histogram=histogram,
        confidence=confidence,
        touches_frame=_touches_frame(mask),
    )


def _check(probs: Probs, mask: Pixels) -> None:
    if probs.shape != mask.shape or mask.ndim != 2 or not mask.size:
        raise ValueError(f"probabilities of shape {probs.shape} for a mask of shape {mask.shape}")
    if probs.dtype != np.float32 or mask.dtype != np.uint8:
        raise ValueError(f"probabilities are {probs.dtype}, the mask {mask.dtype}")
    if not (probs.min() >= 0 and probs.max() <= 1):  # so that NaN, too, is none
        raise ValueError("probabilities must be in 0..1")
    known = sum(np.count_nonzero(mask == value) for value in (BACKGROUND, PERSON, IGNORE))
    if known != mask.size:
        raise ValueError("a mask holds other values than 0, 1 and 255")


def confusion_of(predicted: Pixels, mask: Pixels) -> Counts:
    """`PictureCounts.confusion` of H W uint8 in {0, 1} against H W uint8 in {0, 1, 255}."""
    counts = []
    for truth in (BACKGROUND, PERSON):
        there = mask == truth
        called = int(np.count_nonzero(there & (predicted == PERSON)))
        counts.append([int(np.count_nonzero(there)) - called, called])
    return np.array(counts, dtype=np.int64)


def _histogram(probs: Probs, mask: Pixels) -> tuple[Counts, Counts]:
    """`PictureCounts.histogram` and `.confidence`."""
    flat_probs, flat_mask = probs.reshape(-1), mask.reshape(-1)
    # A third row takes the ignored pixels: selecting the others would cost more.
    counts = np.zeros(3 * NUM_BINS, dtype=np.int64)
    excess = np.zeros(3 * NUM_BINS, dtype=np.int64)
    for start in range(0, flat_probs.size, _AT_ONCE):
        units = flat_probs[start : start + _AT_ONCE] * np.float32(2**CONFIDENCE_BITS)
        fixed = units.astype(np.int32)
        bins = np.minimum(fixed >> (CONFIDENCE_BITS - 8), NUM_BINS - 1)
        row = np.minimum(flat_mask[start : start + _AT_ONCE], 2)
        keys = bins + row * np.int32(NUM_BINS)
        counts += np.bincount(keys, minlength=counts.size)
        # As float64, yet exact: below 2**16 a pixel and 2**15 pixels.
        fixed -= bins << (CONFIDENCE_BITS - 8)
        excess += np.bincount(keys, weights=fixed, minlength=counts.size).astype(np.int64)
    histogram = counts.reshape(3, NUM_BINS)[:2]
    return histogram, _by_reliability_bin(histogram, excess.reshape(3, NUM_BINS)[:2])


def _by_reliability_bin(histogram: Counts, excess: Counts) -> Counts:
    """Excess over the lower edges of the histogram's bins → over those of the wider bins."""
    per_bin = NUM_BINS // NUM_RELIABILITY_BINS
    steps = (np.arange(NUM_BINS) % per_bin) << (CONFIDENCE_BITS - 8)
    both = (excess + histogram * steps).sum(axis=0)
    return np.asarray(both.reshape(NUM_RELIABILITY_BINS, per_bin).sum(axis=1))


def _touches_frame(mask: Pixels) -> bool:
    edges = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return any(bool((edge == PERSON).any()) for edge in edges)
