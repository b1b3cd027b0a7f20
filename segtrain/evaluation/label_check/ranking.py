"""The issues of all images, ranked, and crops of the strongest ones."""

import heapq
import threading
from dataclasses import dataclass

import cv2
import numpy as np

from segtrain.evaluation.label_check.issues import ISSUE_KINDS, Box, LabelIssue
from segtrain.imaging.contact_sheet import fit_size
from segtrain.types import Mask, Probs

CROPS_PER_KIND = 24

# Margin around an issue, as a fraction of its longer side.
_MARGIN = 0.5
# Shortest longer side of a crop, as a fraction of that of the image.
_MIN_CROP = 0.4


@dataclass(frozen=True)
class Crop:
    """The prediction around an issue.

    view: the cropped part, in pixels of the image.
    levels: h w uint8, 255 times the probability of person, scaled to fit a cell of the sheet.
    """

    view: Box
    levels: Mask


def crop_around(probs: Probs, box: Box) -> Crop:
    """Crop `probs`, H W float32 in 0..1, around `box`."""
    longer = max(box.width, box.height)
    min_side = round(_MIN_CROP * max(probs.shape))
    margin = max(round(_MARGIN * longer), (min_side - longer) // 2)
    view = box.expand(margin, (probs.shape[0], probs.shape[1]))
    height, width = fit_size(view.height, view.width)
    interpolation = cv2.INTER_AREA if height < view.height else cv2.INTER_LINEAR
    scaled = cv2.resize(probs[view.slices], (width, height), interpolation=interpolation)
    return Crop(view, np.asarray(255 * scaled + 0.5, dtype=np.uint8))


@dataclass(frozen=True)
class RankedIssue:
    """An issue of the image `index` of the data set."""

    index: int
    issue: LabelIssue

    @property
    def key(self) -> tuple[float, int]:
        """Sort key: stronger issues have a higher key; of equal scores, earlier images have."""
        return self.issue.score, -self.index


class Ranking:
    """Collects issues. Thread-safe; the order of additions does not change the result.

    Keeps a record of each issue, and a crop of at most 64 KiB of the `CROPS_PER_KIND` strongest of
    each kind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranked: dict[str, list[RankedIssue]] = {kind: [] for kind in ISSUE_KINDS}
        # A heap for each kind, with the weakest on top. Keys are unique.
        self._crops: dict[str, list[tuple[tuple[float, int], Crop]]] = {k: [] for k in ISSUE_KINDS}

    def add(self, index: int, issue: LabelIssue, probs: Probs) -> None:
        """Add an issue.

        Args:
            index: of the image, which has at most one issue of a kind.
            probs: H W float32 in 0..1; not kept.
        """
        ranked = RankedIssue(index, issue)
        with self._lock:
            self._ranked[issue.kind].append(ranked)
            crops = self._crops[issue.kind]
            if len(crops) < CROPS_PER_KIND:
                heapq.heappush(crops, (ranked.key, crop_around(probs, issue.box)))
            elif ranked.key > crops[0][0]:
                heapq.heapreplace(crops, (ranked.key, crop_around(probs, issue.box)))

    def ranked(self, kind: str) -> list[RankedIssue]:
        """All issues of a kind, strongest first."""
        return sorted(self._ranked[kind], key=lambda ranked: ranked.key, reverse=True)

    def crops(self, kind: str) -> list[tuple[RankedIssue, Crop]]:
        """The strongest issues of a kind with their crops, strongest first."""
        crops = dict(self._crops[kind])
        return [(ranked, crops[ranked.key]) for ranked in self.ranked(kind)[: len(crops)]]
