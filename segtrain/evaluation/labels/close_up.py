"""The part of a picture around a suspicion, small enough to be kept until all are judged."""

from dataclasses import dataclass

import cv2
import numpy as np

from segtrain.evaluation.labels.pieces import Box
from segtrain.evaluation.picture import Probs
from segtrain.images import Pixels
from segtrain.sheets import fitted

_MARGIN = 0.5
"""Of the longer side of the box: how much of the surroundings is shown to each side."""
_LEAST_VIEW = 0.4
"""Of the picture's longer side: of less than this one does not see what it is a part of."""


@dataclass(frozen=True)
class CloseUp:
    """What the network said of a part of a picture.

    view: the part, in pixels of the picture.
    answer: h w uint8, probability of person in 255ths, of a cell's size.
    """

    view: Box
    answer: Pixels


def close_up(probs: Probs, box: Box) -> CloseUp:
    """Around `box`, which is in pixels of `probs`, H W float32 in 0..1."""
    longer = max(box.width, box.height)
    least = round(_LEAST_VIEW * max(probs.shape))
    margin = max(round(_MARGIN * longer), (least - longer) // 2)
    view = box.widened(margin, (probs.shape[0], probs.shape[1]))
    height, width = fitted(view.height, view.width)
    interpolation = cv2.INTER_AREA if height < view.height else cv2.INTER_LINEAR
    small = cv2.resize(probs[view.slices], (width, height), interpolation=interpolation)
    return CloseUp(view, np.asarray(255 * small + 0.5, dtype=np.uint8))
