"""Boundary IoU and the contour F measure.

The class of an ignored pixel is unknown, so neither measure may depend on it:

* Both masks are extended over the ignored pixels. A person who ends at an ignored pixel has no
  outline there, in the ground truth or in the prediction. Otherwise, two masks cut by the same
  ignored region would agree along its whole border without any evidence.
* Ignored pixels count in neither mask.
* A contour pixel is not evaluated if an ignored pixel lies within the tolerance, because its match
  may be hidden there. It still is a match for other pixels.

The border of the frame is treated as the authors of each measure treat it: it is a boundary for
boundary IoU, and not a contour for the F measure.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from segtrain.types import IGNORE, PERSON, BoolMask, Mask

DILATION_RATIO = 0.02
"""Depth of the boundary of boundary IoU, as a fraction of the diagonal."""
TOLERANCE = 3 / 400
"""Largest distance between matching contour pixels, as a fraction of the diagonal."""

Counts = npt.NDArray[np.int64]

# Up to this radius, dilating bytes is faster than a distance transform.
_MAX_DISK_RADIUS = 16


def boundary_counts(predicted: Mask, mask: Mask) -> tuple[int, int]:
    """Intersection and union of the two boundaries, in pixels.

    Boundary IoU is their ratio (Cheng et al. 2021, arXiv 2103.16562, "Boundary IoU"). A pixel of a
    mask belongs to its boundary if the square that extends d pixels to each side contains a pixel
    outside the mask or the frame; the reference implementation erodes d times by 3x3. d is 2 % of
    the diagonal, rounded, at least 1. All people of an image form one mask here; the authors'
    average precision evaluates each person separately.

    Args:
        predicted: H W uint8 in {0, 1}.
        mask: H W uint8 in {0, 1, 255}; see the module docstring for 255.
    """
    depth = boundary_depth(*mask.shape)
    known = mask != IGNORE
    pred_boundary = _boundary(_extend_over_ignored(predicted, mask), depth) & known
    true_boundary = _boundary(_extend_over_ignored(mask, mask), depth) & known
    return _count(pred_boundary & true_boundary), _count(pred_boundary | true_boundary)


def contour_counts(predicted: Mask, mask: Mask) -> Counts:
    """Number of contour pixels, and how many of them have a match in the other contour.

    Precision is the fraction of the predicted contour, recall that of the true contour, that has a
    pixel of the other contour within the tolerance; the F measure is their harmonic mean (Martin et
    al. 2004, PAMI 26(5); for segmentation Csurka et al. 2013, BMVC). A pixel can match several
    others. The contour of a mask consists of its pixels that have a pixel outside the mask above,
    below, left or right; the border of the frame is not one. The tolerance is 0.75 % of the
    diagonal (6 pixels at 640x480), at least 1, Euclidean, inclusive.

    Args:
        predicted: H W uint8 in {0, 1}.
        mask: H W uint8 in {0, 1, 255}; see the module docstring for 255.

    Returns:
        4 int64: matched and all pixels of the predicted contour, then of the true contour.
    """
    squared = squared_tolerance(*mask.shape)
    pred_contour, true_contour = (
        _contour(_extend_over_ignored(some, mask)) for some in (predicted, mask)
    )
    evaluated = ~_within(mask == IGNORE, squared)
    pred_evaluated, true_evaluated = pred_contour & evaluated, true_contour & evaluated
    return np.array(
        [
            _count(pred_evaluated & _within(true_contour, squared)),
            _count(pred_evaluated),
            _count(true_evaluated & _within(pred_contour, squared)),
            _count(true_evaluated),
        ],
        dtype=np.int64,
    )


def boundary_depth(height: int, width: int) -> int:
    """d of boundary IoU, in pixels."""
    return max(1, round(DILATION_RATIO * math.hypot(height, width)))


def squared_tolerance(height: int, width: int) -> int:
    """The largest squared pixel distance within the tolerance of contours."""
    # Integer arithmetic: 6 pixels at 640x480 is a tie and must not depend on rounding.
    return max(1, 9 * (height**2 + width**2) // 160_000)


def _extend_over_ignored(person: Mask, mask: Mask) -> Mask:
    """The person pixels of one mask and all ignored pixels of `mask`: H W uint8 in {0, 1}."""
    return np.asarray((person == PERSON) | (mask == IGNORE), dtype=np.uint8)


def _boundary(person: Mask, depth: int) -> BoolMask:
    # A border of zeros and one large square equal the reference implementation's border of one
    # pixel and `depth` small erosions.
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * depth + 1, 2 * depth + 1))
    inside = cv2.erode(person, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return (person > inside).reshape(person.shape)


def _contour(person: Mask) -> BoolMask:
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inside = cv2.erode(person, cross, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return (person > inside).reshape(person.shape)


def _within(region: BoolMask, squared: int) -> BoolMask:
    """All pixels whose squared distance to `region` is at most `squared`."""
    if not region.any():
        return np.zeros_like(region)
    radius = math.isqrt(squared)
    if radius <= _MAX_DISK_RADIUS:
        offsets = np.arange(-radius, radius + 1) ** 2
        disk = (offsets[:, None] + offsets <= squared).view(np.uint8)
        return np.asarray(cv2.dilate(region.view(np.uint8), disk).reshape(region.shape) > 0)
    distances = cv2.distanceTransform(
        (~region).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    ).reshape(region.shape)
    # Squared distances are integers, so a bound halfway between two of them is safe from rounding.
    return np.asarray(distances < math.sqrt(squared + 0.5))


def _count(region: BoolMask) -> int:
    return int(np.count_nonzero(region))
