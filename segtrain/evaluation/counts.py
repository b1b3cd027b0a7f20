"""Everything that evaluation keeps of an image: integer counts from one pass, and their sums."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segtrain.data.sample import DatasetIndex
from segtrain.evaluation.boundary import Counts, boundary_counts, contour_counts
from segtrain.types import BACKGROUND, IGNORE, PERSON, Mask, Probs

NUM_BINS = 256
"""Bins of the histogram; bin k holds k/256 <= p < (k + 1)/256, the last one also p = 1."""
NUM_RELIABILITY_BINS = 16
"""Bins of the reliability diagram, each of 16 histogram bins."""
CONFIDENCE_BITS = 24
"""Probabilities are summed in units of 2**-24, which hold a float32 of 0.5 or more exactly."""

# Pixels per step of the histogram. The temporary arrays of a step fit into the processor's cache,
# which is several times as fast as a whole image at a time, and memory does not grow with its size.
_CHUNK_SIZE = 2**15


@dataclass(frozen=True, kw_only=True)
class ImageCounts:
    """Pixel counts of one image, without ignored pixels.

    Integers, so sums over images are exact in any order. The histogram gives the exact confusion at
    every threshold k/256, and nothing about the thresholds in between.

    size: height and width.
    confusion: 2 2 int64, `confusion[t][p]` is the number of pixels of class t predicted as p.
    boundary: 2 int64, `segtrain.evaluation.boundary.boundary_counts`.
    contour: 4 int64, `segtrain.evaluation.boundary.contour_counts`.
    histogram: 2 256 int64, pixels by true class and bin of the person probability.
    confidence: 16 int64, sum over the pixels of a reliability bin of the probability minus the
        bin's lower edge, in units of 2**-24, each rounded down.
    touches_frame: whether a person reaches the outermost pixels.
    """

    size: tuple[int, int]
    confusion: Counts
    boundary: Counts
    contour: Counts
    histogram: Counts
    confidence: Counts
    touches_frame: bool


def count_image(probs: Probs, mask: Mask, *, threshold: float = 0.5) -> ImageCounts:
    """Compare the prediction for one image with its ground truth, at original resolution.

    Args:
        probs: H W float32 in 0..1, probability of person.
        mask: H W uint8 in {0, 1, 255}; H and W are 1 or more.
        threshold: the lowest probability that counts as person.

    Raises:
        ValueError: shapes differ, or a dtype, a probability or a class is invalid.
    """
    _check_arrays(probs, mask)
    # Compare as float32, as the probabilities are: a threshold of 0.3 must include 0.3.
    predicted = (probs >= np.float32(threshold)).view(np.uint8)
    histogram, confidence = _count_bins(probs, mask)
    return ImageCounts(
        size=(mask.shape[0], mask.shape[1]),
        confusion=count_confusion(predicted, mask),
        boundary=np.array(boundary_counts(predicted, mask), dtype=np.int64),
        contour=contour_counts(predicted, mask),
        histogram=histogram,
        confidence=confidence,
        touches_frame=_touches_frame(mask),
    )


def count_confusion(predicted: Mask, mask: Mask) -> Counts:
    """`ImageCounts.confusion` of H W uint8 in {0, 1} against H W uint8 in {0, 1, 255}."""
    counts = []
    for label in (BACKGROUND, PERSON):
        pixels = mask == label
        num_person = int(np.count_nonzero(pixels & (predicted == PERSON)))
        counts.append([int(np.count_nonzero(pixels)) - num_person, num_person])
    return np.array(counts, dtype=np.int64)


def _check_arrays(probs: Probs, mask: Mask) -> None:
    if probs.shape != mask.shape or mask.ndim != 2 or not mask.size:
        raise ValueError(f"probabilities of shape {probs.shape} for a mask of shape {mask.shape}")
    if probs.dtype != np.float32 or mask.dtype != np.uint8:
        raise ValueError(f"probabilities are {probs.dtype}, the mask {mask.dtype}")
    if not (probs.min() >= 0 and probs.max() <= 1):  # written so that NaN fails
        raise ValueError("probabilities must be in 0..1")
    num_valid = sum(np.count_nonzero(mask == value) for value in (BACKGROUND, PERSON, IGNORE))
    if num_valid != mask.size:
        raise ValueError("a mask holds other values than 0, 1 and 255")


def _count_bins(probs: Probs, mask: Mask) -> tuple[Counts, Counts]:
    """`ImageCounts.histogram` and `.confidence`."""
    flat_probs, flat_mask = probs.reshape(-1), mask.reshape(-1)
    # A third row takes the ignored pixels: selecting the others would cost more.
    counts = np.zeros(3 * NUM_BINS, dtype=np.int64)
    excess = np.zeros(3 * NUM_BINS, dtype=np.int64)
    for start in range(0, flat_probs.size, _CHUNK_SIZE):
        units = flat_probs[start : start + _CHUNK_SIZE] * np.float32(2**CONFIDENCE_BITS)
        fixed = units.astype(np.int32)
        bins = np.minimum(fixed >> (CONFIDENCE_BITS - 8), NUM_BINS - 1)
        row = np.minimum(flat_mask[start : start + _CHUNK_SIZE], 2)
        keys = bins + row * np.int32(NUM_BINS)
        counts += np.bincount(keys, minlength=counts.size)
        # bincount sums float64, exactly: below 2**16 per pixel, and 2**15 pixels.
        fixed -= bins << (CONFIDENCE_BITS - 8)
        excess += np.bincount(keys, weights=fixed, minlength=counts.size).astype(np.int64)
    histogram = counts.reshape(3, NUM_BINS)[:2]
    return histogram, _sum_reliability_bins(histogram, excess.reshape(3, NUM_BINS)[:2])


def _sum_reliability_bins(histogram: Counts, excess: Counts) -> Counts:
    """Convert the excess over the lower edges of histogram bins to that of reliability bins."""
    per_bin = NUM_BINS // NUM_RELIABILITY_BINS
    offsets = (np.arange(NUM_BINS) % per_bin) << (CONFIDENCE_BITS - 8)
    both_classes = (excess + histogram * offsets).sum(axis=0)
    return np.asarray(both_classes.reshape(NUM_RELIABILITY_BINS, per_bin).sum(axis=1))


def _touches_frame(mask: Mask) -> bool:
    edges = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return any(bool((edge == PERSON).any()) for edge in edges)


RECORD = np.dtype(
    [
        # The index in the evaluated selection, and the identity in any selection.
        ("index", np.int64),
        ("identity", np.uint64),
        # The number of the data set among the roots.
        ("source", np.int32),
        ("size", np.int32, 2),
        ("num_people", np.int32),
        ("has_crowd", np.bool_),
        ("touches_frame", np.bool_),
        # As in ImageCounts.
        ("confusion", np.int64, (2, 2)),
        ("boundary", np.int64, 2),
        ("contour", np.int64, 4),
        # Pixels by true class and reliability bin, and `ImageCounts.confidence`.
        ("in_bin", np.int32, (2, NUM_RELIABILITY_BINS)),
        ("confidence", np.int64, NUM_RELIABILITY_BINS),
    ]
)

Records = npt.NDArray[np.void]
"""N rows of dtype `RECORD`, one for each image."""


def build_record(index: int, source: int, catalog: DatasetIndex, counts: ImageCounts) -> Records:
    """The record of one image, as an array of one row.

    Args:
        index: the image's row in `catalog`.
        source: the number of its data set.
    """
    row = np.zeros(1, dtype=RECORD)
    row["index"], row["source"] = index, source
    row["identity"] = catalog.identities[index]
    row["num_people"] = catalog.num_people[index]
    row["has_crowd"] = catalog.has_crowd[index]
    row["size"], row["touches_frame"] = counts.size, counts.touches_frame
    row["confusion"], row["boundary"] = counts.confusion, counts.boundary
    row["contour"], row["confidence"] = counts.contour, counts.confidence
    per_bin = NUM_BINS // NUM_RELIABILITY_BINS
    row["in_bin"] = counts.histogram.reshape(2, NUM_RELIABILITY_BINS, per_bin).sum(axis=2)
    return row


def records_to_lists(records: Records) -> dict[str, list[Any]]:
    """Columns of plain types for JSON: name → N numbers, booleans or nested lists."""
    return {name: records[name].tolist() for name in RECORD.names or ()}


def records_from_lists(columns: object) -> Records:
    """The inverse of `records_to_lists`; further columns are ignored.

    Raises:
        ValueError: a column is missing, or has other values, another shape or another length.
    """
    names = RECORD.names or ()
    if not isinstance(columns, dict) or not columns.keys() >= set(names):
        raise ValueError(f"not columns of {', '.join(names)}")
    lengths = {len(columns[name]) if isinstance(columns[name], list) else -1 for name in names}
    if len(lengths) != 1 or -1 in lengths:
        raise ValueError("columns of different lengths")
    records = np.zeros(lengths.pop(), dtype=RECORD)
    for name in names if len(records) else ():
        records[name] = _parse_column(name, columns[name], records[name].shape)
    return records


def _parse_column(
    name: str, values: list[object], shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    """`values` in the dtype of the column, without rounding or overflow."""
    dtype = RECORD[name].base
    kind = bool if dtype.kind == "b" else int
    # Objects first: small and large integers in one array would become floats.
    objects = np.array(values, dtype=object)
    if objects.shape != shape or any(type(value) is not kind for value in objects.flat):
        raise ValueError(f"column {name} has other values or another shape than {shape}")
    try:
        column: npt.NDArray[np.generic] = objects.astype(dtype)
    except OverflowError as error:
        raise ValueError(f"column {name}: {error}") from None
    return column


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The counts of all images.

    records: one for each image, ordered by `index`.
    histogram: 2 256 int64, pixels of all images by true class and bin of probability.
    threshold: at which confusion, boundary and contour were counted.
    """

    records: Records
    histogram: Counts
    threshold: float

    @staticmethod
    def merge(parts: "Sequence[Totals]") -> "Totals":
        """Join the counts of several processes; their order does not change the result.

        Raises:
            ValueError: an image was counted twice, or the thresholds differ.
        """
        thresholds = {part.threshold for part in parts}
        if len(thresholds) != 1:
            raise ValueError(f"{len(parts)} parts counted at the thresholds {sorted(thresholds)}")
        records = np.concatenate([part.records for part in parts])
        records = records[np.argsort(records["index"], kind="stable")]
        duplicates = records["index"][1:][np.diff(records["index"]) == 0]
        if len(duplicates):
            raise ValueError(f"image {duplicates[0]} was counted twice")
        histogram: Counts = np.sum([part.histogram for part in parts], axis=0)
        return Totals(records=records, histogram=histogram, threshold=thresholds.pop())


class CountAccumulator:
    """Collects the counts of images, a few hundred bytes each, whatever their size.

    Args:
        catalog: of the whole selection, also of images that other processes count.
        sources: the number of the data set for each image of the selection.
        threshold: at which the images are counted.
    """

    def __init__(
        self, catalog: DatasetIndex, sources: npt.NDArray[np.integer], threshold: float = 0.5
    ) -> None:
        self._catalog, self._sources, self._threshold = catalog, sources, threshold
        self._rows: list[bytes] = []
        self._histogram = np.zeros((2, NUM_BINS), dtype=np.int64)

    def add(self, index: int, counts: ImageCounts) -> None:
        """Add the counts of the image in row `index` of the catalog."""
        record = build_record(index, int(self._sources[index]), self._catalog, counts)
        self._rows.append(record.tobytes())
        self._histogram += counts.histogram

    def totals(self) -> Totals:
        """The counts of all images so far.

        Raises:
            ValueError: an image was counted twice.
        """
        unordered = Totals(
            records=np.frombuffer(b"".join(self._rows), dtype=RECORD),
            histogram=self._histogram.copy(),
            threshold=self._threshold,
        )
        return Totals.merge([unordered])
