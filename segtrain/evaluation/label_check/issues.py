"""Find issues in the annotation of one image.

A new kind of issue is one new function and one new row in `ISSUE_KINDS`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

from segtrain.evaluation.boundary import boundary_depth
from segtrain.types import BACKGROUND, IGNORE, PERSON, BoolMask, Mask, Probs

CONFIDENT = 0.9
"""The model is confident if the probability of its prediction is at least this."""
MIN_COMPONENT_FRACTION = 0.003
"""Components that cover less of the frame are left out."""

# Fraction of an outline that must be off. Less is typical of folds, shadows and locks of hair that
# mislead the model.
_MIN_OFF_FRACTION = 0.25
# Shortest outline, in widths of the band: the fraction of a shorter one is not meaningful.
_MIN_OUTLINE_LENGTH = 4
# An ignored region with at least this fraction of background contains no crowd.
_EMPTY_FRACTION = 0.95
# Larger images are checked at this longer side, which bounds the work. Relevant issues still show.
_MAX_SIDE = 640


class Box(NamedTuple):
    """The upper left pixel and the size, in whole pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of its part of an H W array."""
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )

    def expand(self, margin: int, size: tuple[int, int]) -> "Box":
        """Add `margin` pixels on each side, clipped to a frame of `size` (height, width)."""
        left, top = max(0, self.left - margin), max(0, self.top - margin)
        right = min(size[1], self.left + self.width + margin)
        bottom = min(size[0], self.top + self.height + margin)
        return Box(left, top, right - left, bottom - top)


@dataclass(frozen=True, kw_only=True)
class LabelIssue:
    """The strongest issue of its kind in an image.

    score: in 0..1, comparable within the kind.
    box: in pixels of the image at its original resolution.
    """

    kind: str
    score: float
    box: Box


_ScoredBox = tuple[float, Box]


@dataclass(frozen=True)
class IssueKind:
    """A kind of issue.

    find: yields a score and a box for each issue of an image.
    description: for the sheet.
    """

    find: "Callable[[Disagreement], Iterator[_ScoredBox]]"
    description: str


def find_issues(probs: Probs, mask: Mask) -> list[LabelIssue]:
    """Find the issue with the highest score of each kind.

    Args:
        probs: H W float32 in 0..1, probability of person.
        mask: H W uint8 in {0, 1, 255}.
    """
    scale = min(1.0, _MAX_SIDE / max(mask.shape))
    small_probs, small_mask = probs, mask
    if scale < 1:
        size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
        small_probs = np.asarray(cv2.resize(probs, size, interpolation=cv2.INTER_AREA))
        small_mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT))
    disagreement = Disagreement(small_probs, small_mask)
    issues = []
    for name, kind in ISSUE_KINDS.items():
        strongest = max(kind.find(disagreement), default=None)
        if strongest is not None:
            score, box = strongest
            box = _scale_box(box, small_mask.shape, mask.shape)
            issues.append(LabelIssue(kind=name, score=score, box=box))
    return issues


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Pixels where only one of annotation and model has a person, and the model is confident.

    All arrays are H W.

    pixels: all of them.
    far: parts wider than half the band, with no person of the other mask within the band.
    near: parts that are neither far nor connected to a far part: outlines that are off.
    """

    pixels: BoolMask
    far: BoolMask
    near: BoolMask


class Disagreement:
    """Where model and annotation of one image disagree.

    Args:
        probs: H W float32 in 0..1, probability of person.
        mask: H W uint8 in {0, 1, 255}.
    """

    def __init__(self, probs: Probs, mask: Mask) -> None:
        self.probs, self.mask = probs, mask
        self.depth = boundary_depth(*mask.shape)
        """Width of the band, in pixels."""

    @cached_property
    def confident_background(self) -> BoolMask:
        """Where the model is confident that there is no person."""
        return self.probs <= np.float32(1 - CONFIDENT)

    @cached_property
    def missing(self) -> Difference:
        """The model predicts person, the annotation is background."""
        pixels = (self.probs >= np.float32(CONFIDENT)) & (self.mask == BACKGROUND)
        return self._difference(pixels, other_people=self.mask == PERSON)

    @cached_property
    def phantom(self) -> Difference:
        """The annotation is person, the model predicts background."""
        pixels = self.confident_background & (self.mask == PERSON)
        return self._difference(pixels, other_people=self.probs >= np.float32(0.5))

    def _difference(self, pixels: BoolMask, other_people: BoolMask) -> Difference:
        """Split `pixels` by their distance to the people of the other mask."""
        if not pixels.any():
            return Difference(pixels=pixels, far=pixels, near=pixels)
        near_others = _dilate(other_people | (self.mask == IGNORE), self.depth)
        # A sliver just beyond the band is the rest of an outline that is off.
        far = _open(pixels & ~near_others, self.depth // 2 + 1)
        near = pixels & ~_dilate(far, self.depth)
        return Difference(pixels=pixels, far=far, near=near)


def _missing_people(disagreement: Disagreement) -> Iterator[_ScoredBox]:
    """The model confidently predicts a person where no annotated one is near."""
    return _far_components(disagreement, disagreement.missing)


def _phantom_people(disagreement: Disagreement) -> Iterator[_ScoredBox]:
    """A person is annotated where the model confidently predicts none near."""
    return _far_components(disagreement, disagreement.phantom)


def _far_components(disagreement: Disagreement, difference: Difference) -> Iterator[_ScoredBox]:
    """Score: mean confidence times linear size. The box includes the pixels nearby."""
    for component in large_components(difference.far):
        box = _box_with_nearby_pixels(component, difference.pixels, disagreement.depth)
        yield _confidence(disagreement, component) * math.sqrt(component.fraction), box


def _coarse_edges(disagreement: Disagreement) -> Iterator[_ScoredBox]:
    """The outline of an annotated person is off along much of its length; score: that fraction.

    The outline is off where it touches a confident disagreement that is thicker than an eighth of
    the band, on either side. Parts that reach far out of the band do not count, nor do pixels of
    which the model is unsure, such as its own blurred outline.
    """
    mask, depth = disagreement.mask, disagreement.depth
    near = disagreement.missing.near | disagreement.phantom.near
    people = list(large_components(mask == PERSON)) if near.any() else []
    beside_near = _dilate(_open(near, depth // 8 + 1), 1)
    background = (mask == BACKGROUND).view(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    beside_background = cv2.dilate(background, cross).view(np.bool_)
    for person in people:
        outline = person.region & beside_background[person.box.slices]
        length = np.count_nonzero(outline)
        if length >= _MIN_OUTLINE_LENGTH * depth:
            fraction = np.count_nonzero(outline & beside_near[person.box.slices]) / length
            if fraction >= _MIN_OFF_FRACTION:
                yield fraction, person.box


def _wrong_crowds(disagreement: Disagreement) -> Iterator[_ScoredBox]:
    """The model confidently predicts background for nearly all of an ignored region.

    Scored as missing people are. A region that hides a single person cannot be found: a mask does
    not separate one person from many.
    """
    for component in large_components(disagreement.mask == IGNORE):
        empty = disagreement.confident_background[component.box.slices][component.region]
        if float(empty.mean()) >= _EMPTY_FRACTION:
            score = _confidence(disagreement, component) * math.sqrt(component.fraction)
            yield score, component.box


ISSUE_KINDS: dict[str, IssueKind] = {
    "missing person": IssueKind(_missing_people, "the network sees one, the annotation does not"),
    "phantom person": IssueKind(_phantom_people, "the annotation has one, the network sees none"),
    "coarse edge": IssueKind(_coarse_edges, "much of the outline is off"),
    "wrong crowd": IssueKind(_wrong_crowds, "an ignored region without a predicted person"),
}


@dataclass(frozen=True)
class Component:
    """An 8-connected component.

    region: h w bool, which touches all sides of its box.
    box: of h w.
    fraction: of the frame.
    """

    region: BoolMask
    box: Box
    fraction: float


def large_components(region: BoolMask) -> Iterator[Component]:
    """The 8-connected components of `region`, H W, of at least `MIN_COMPONENT_FRACTION`."""
    if not region.any():
        return
    _, labels, stats, _ = cv2.connectedComponentsWithStats(region.view(np.uint8))
    for label in range(1, len(stats)):
        *corner_and_size, area = stats[label].tolist()
        if area >= MIN_COMPONENT_FRACTION * region.size:
            box = Box(*corner_and_size)
            yield Component(labels[box.slices] == label, box, area / region.size)


def _box_with_nearby_pixels(component: Component, region: BoolMask, depth: int) -> Box:
    """Bounding box of the component and of the pixels of `region`, H W, within `depth` of it."""
    window = component.box.expand(depth, region.shape)
    inside = np.zeros((window.height, window.width), dtype=np.bool_)
    top, left = component.box.top - window.top, component.box.left - window.left
    inside[top : top + component.box.height, left : left + component.box.width] = component.region
    nearby = _dilate(inside, depth) & region[window.slices]
    left, top, width, height = cv2.boundingRect((nearby | inside).view(np.uint8))
    return Box(window.left + left, window.top + top, width, height)


def _confidence(disagreement: Disagreement, component: Component) -> float:
    """Mean confidence of the model over the component: 0 at a probability of 0.5, 1 at 0 or 1."""
    probs = disagreement.probs[component.box.slices][component.region]
    return float(np.abs(2 * probs - 1).mean())


def _dilate(region: BoolMask, depth: int) -> BoolMask:
    """Dilate H W by a square of `depth` pixels to each side."""
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * depth + 1, 2 * depth + 1))
    return cv2.dilate(region.view(np.uint8), square).view(np.bool_)


def _open(region: BoolMask, side: int) -> BoolMask:
    """Morphological opening of H W: the union of all squares of `side` pixels within `region`."""
    square = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
    # Anchors at opposite corners: OpenCV's own opening shifts by a pixel if the side is even.
    corners = cv2.erode(
        region.view(np.uint8),
        square,
        anchor=(0, 0),
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return cv2.dilate(corners, square, anchor=(side - 1, side - 1)).view(np.bool_)


def _scale_box(box: Box, size: tuple[int, ...], new_size: tuple[int, ...]) -> Box:
    """Scale a box from an image of `size` (height, width) to `new_size`, rounded outwards."""
    right, bottom = box.left + box.width, box.top + box.height
    left, top = box.left * new_size[1] // size[1], box.top * new_size[0] // size[0]
    return Box(
        left,
        top,
        -(-right * new_size[1] // size[1]) - left,
        -(-bottom * new_size[0] // size[0]) - top,
    )
