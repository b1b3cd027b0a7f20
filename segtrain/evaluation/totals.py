"""Counting picture after picture, in one process or in several."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segtrain.data.sample import Catalog
from segtrain.evaluation.boundaries import Counts
from segtrain.evaluation.picture import NUM_BINS, PictureCounts
from segtrain.evaluation.records import RECORD, Records, record_of


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What was counted.

    records: of each picture one, in the order of `index`, whoever counted it when.
    histogram: 2 256 int64, pixels of all pictures by truth and by bin of probability.
    threshold: what the confusion and the outlines were counted at.
    """

    records: Records
    histogram: Counts
    threshold: float

    @staticmethod
    def merged(parts: "Sequence[Totals]") -> "Totals":
        """The same as if one process had counted all, in whatever order the parts are.

        Raises:
            ValueError: a picture was counted twice, or not all at the same threshold.
        """
        thresholds = {part.threshold for part in parts}
        if len(thresholds) != 1:
            raise ValueError(f"{len(parts)} parts counted at the thresholds {sorted(thresholds)}")
        records = np.concatenate([part.records for part in parts])
        records = records[np.argsort(records["index"], kind="stable")]
        twice = records["index"][1:][np.diff(records["index"]) == 0]
        if len(twice):
            raise ValueError(f"picture {twice[0]} was counted twice")
        histogram: Counts = np.sum([part.histogram for part in parts], axis=0)
        return Totals(records=records, histogram=histogram, threshold=thresholds.pop())


class Tally:
    """Takes one picture after the other; what it holds of each does not grow with its size."""

    def __init__(
        self, catalog: Catalog, sources: npt.NDArray[np.integer], threshold: float = 0.5
    ) -> None:
        """
        Args:
            catalog: of all pictures, whichever of them will be counted here.
            sources: of each of them the number of its data set.
            threshold: what the pictures are counted at.
        """
        self._catalog, self._sources, self._threshold = catalog, sources, threshold
        self._rows: list[bytes] = []
        self._histogram = np.zeros((2, NUM_BINS), dtype=np.int64)

    def add(self, index: int, counts: PictureCounts) -> None:
        """Keep the counts of the picture that has the row `index` in the catalog."""
        row = record_of(index, int(self._sources[index]), self._catalog, counts)
        self._rows.append(row.tobytes())
        self._histogram += counts.histogram

    def totals(self) -> Totals:
        """Of all pictures so far.

        Raises:
            ValueError: a picture was counted twice.
        """
        unordered = Totals(
            records=np.frombuffer(b"".join(self._rows), dtype=RECORD),
            histogram=self._histogram.copy(),
            threshold=self._threshold,
        )
        return Totals.merged([unordered])
