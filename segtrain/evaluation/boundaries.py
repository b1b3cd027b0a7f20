"""How well the outline of a person is met: boundary IoU, and the F measure of contours.

Ignored pixels may hide anything, so what is measured may not hang on them:

* Both masks are taken to go on under them. A person who ends at an ignored pixel has no outline
  there, neither in the truth nor in the prediction: two masks that were cut by the same ignored
  region would otherwise agree along its whole rim, for nothing.
* They are counted in neither mask.
* A contour pixel that an ignored one lies within the tolerance of is not judged, for its partner
  may be hidden there; it still is a partner to others.

The frame is treated as the authors of either measure do: for boundary IoU a person ends there, for
the contours not.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.classes import IGNORE, PERSON
from segtrain.images import Pixels

DILATION_RATIO = 0.02
"""Of the diagonal: how deep the boundary of boundary IoU reaches."""
TOLERANCE = 3 / 400
"""Of the diagonal: how far apart two contours may be and still agree."""

Counts = npt.NDArray[np.int64]

# Up to this radius shifting bytes is cheaper than measuring distances.
_LARGEST_DISK = 16


def boundary_counts(predicted: Pixels, mask: Pixels) -> tuple[int, int]:
    """Intersection and union of the two boundaries, in pixels.

    Boundary IoU is their quotient (Cheng et al. 2021, arXiv 2103.16562, "Boundary IoU"). The
    boundary of a mask is those of its pixels that have one outside the mask, or outside the frame,
    in the square of d pixels to each side: as the authors' program erodes d times by 3x3. d is 2 %
    of the diagonal, rounded, at least 1. All people of a picture are one mask here, where the
    authors' average precision judges each alone.

    Args:
        predicted: H W uint8 in {0, 1}.
        mask: H W uint8 in {0, 1, 255}; 255 as said above.
    """
    depth = boundary_depth(*mask.shape)
    counted = mask != IGNORE
    ours = _band(_going_on(predicted, mask), depth) & counted
    theirs = _band(_going_on(mask, mask), depth) & counted
    return _count(ours & theirs), _count(ours | theirs)


def contour_counts(predicted: Pixels, mask: Pixels) -> Counts:
    """How many contour pixels find a partner in the other contour.

    Precision is the share of the predicted contour, recall that of the true one, that has a pixel
    of the other within the tolerance; the F measure is their harmonic mean (Martin et al. 2004,
    PAMI 26(5); for segmentation Csurka et al. 2013, BMVC). One pixel may be partner
    to several. The contour is the pixels of a mask that have one outside of it above, below, left
    or right; the frame makes none. The tolerance is 0.75 % of the diagonal (6 pixels at 640x480),
    at least 1, Euclidean, inclusive.

    Args:
        predicted: H W uint8 in {0, 1}.
        mask: H W uint8 in {0, 1, 255}; 255 as said above.

    Returns:
        4 int64: of the predicted contour those with a partner, and all; then of the true one.
    """
    reach = squared_tolerance(*mask.shape)
    ours, theirs = (_contour(_going_on(m, mask)) for m in (predicted, mask))
    ignored = mask == IGNORE
    judged = ~_within(ignored, reach)
    ours_judged, theirs_judged = ours & judged, theirs & judged
    return np.array(
        [
            _count(ours_judged & _within(theirs, reach)),
            _count(ours_judged),
            _count(theirs_judged & _within(ours, reach)),
            _count(theirs_judged),
        ],
        dtype=np.int64,
    )


def boundary_depth(height: int, width: int) -> int:
    """d of boundary IoU, pixels."""
    return max(1, round(DILATION_RATIO * math.hypot(height, width)))


def squared_tolerance(height: int, width: int) -> int:
    """The largest square of a distance between pixels that is within the tolerance of contours."""
    # In whole numbers: a distance of 6 at 640x480 is a tie, and must not hang on rounding.
    return max(1, 9 * (height**2 + width**2) // 160_000)


def _going_on(some: Pixels, mask: Pixels) -> Pixels:
    """The person of `some`, and all that is ignored in `mask`: H W uint8 in {0, 1}."""
    return np.asarray((some == PERSON) | (mask == IGNORE), dtype=np.uint8)


def _band(person: Pixels, depth: int) -> npt.NDArray[np.bool_]:
    # Nothing but zeros around the frame, and one square instead of many small ones, are the same
    # as the authors' border of one pixel and many steps.
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * depth + 1, 2 * depth + 1))
    inside = cv2.erode(person, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return (person > inside).reshape(person.shape)


def _contour(person: Pixels) -> npt.NDArray[np.bool_]:
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inside = cv2.erode(person, cross, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return (person > inside).reshape(person.shape)


def _within(some: npt.NDArray[np.bool_], squared: int) -> npt.NDArray[np.bool_]:
    """Which pixels have one of `some` no farther away than the root of `squared`."""
    if not some.any():
        return np.zeros_like(some)
    radius = math.isqrt(squared)
    if radius <= _LARGEST_DISK:
        steps = np.arange(-radius, radius + 1) ** 2
        disk = (steps[:, None] + steps <= squared).view(np.uint8)
        return np.asarray(cv2.dilate(some.view(np.uint8), disk).reshape(some.shape) > 0)
    distances = cv2.distanceTransform(
        (~some).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    ).reshape(some.shape)
    # Squares of distances are whole, so that between two of them rounding changes nothing.
    return np.asarray(distances < math.sqrt(squared + 0.5))


def _count(some: npt.NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(some))
