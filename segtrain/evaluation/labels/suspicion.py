"""What is suspicious about the annotation of one picture.

A new kind is one new function and one new row in `KINDS`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from segtrain.classes import BACKGROUND, IGNORE, PERSON
from segtrain.evaluation.labels.disagreement import Difference, Disagreement, grown, opened
from segtrain.evaluation.labels.pieces import Box, Piece, box_with_surroundings, large_pieces
from segtrain.evaluation.picture import Probs
from segtrain.images import Pixels

_LEAST_OFF = 0.25
"""Of an outline: off it is where a fold, a shadow or a lock misled the network, with nearly all."""
_SHORTEST_OUTLINE = 4
"""In widths of the band: a share of less says nothing."""
_EMPTY = 0.95
"""Of an ignored region: where so much is background, no crowd is."""
# A larger picture is looked at as if its longer side were this: a fault that is worth a look shows
# there as well, and the work has an end.
_LONGEST_SIDE = 640

Scored = tuple[float, Box]


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """The strongest of its kind in a picture.

    score: in 0..1, comparable within the kind.
    box: in pixels of the picture at its original resolution.
    """

    kind: str
    score: float
    box: Box


@dataclass(frozen=True)
class Kind:
    """A way to be suspicious.

    find: yields a score and a box for each suspicious piece of a picture.
    meaning: for people.
    """

    find: Callable[[Disagreement], Iterator[Scored]]
    meaning: str


def suspicions_of(probs: Probs, mask: Pixels) -> list[Suspicion]:
    """At most one of each kind, the one with the highest score.

    Args:
        probs: H W float32 in 0..1, probability of person.
        mask: H W uint8 in {0, 1, 255}.
    """
    scale = min(1.0, _LONGEST_SIDE / max(mask.shape))
    small_probs, small_mask = probs, mask
    if scale < 1:
        size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
        small_probs = np.asarray(cv2.resize(probs, size, interpolation=cv2.INTER_AREA))
        small_mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT))
    disagreement = Disagreement(small_probs, small_mask)
    found = []
    for name, kind in KINDS.items():
        strongest = max(kind.find(disagreement), default=None)
        if strongest is not None:
            score, box = strongest
            box = _carried_over(box, small_mask.shape, mask.shape)
            found.append(Suspicion(kind=name, score=score, box=box))
    return found


def _missing_people(disagreement: Disagreement) -> Iterator[Scored]:
    """The network surely sees a person where no annotated one is near."""
    return _far_pieces(disagreement, disagreement.missing)


def _phantom_people(disagreement: Disagreement) -> Iterator[Scored]:
    """A person is annotated where the network surely sees none near."""
    return _far_pieces(disagreement, disagreement.phantom)


def _far_pieces(disagreement: Disagreement, difference: Difference) -> Iterator[Scored]:
    """Scored by mean certainty times linear size; the box takes in what of it is near, too."""
    for piece in large_pieces(difference.far):
        box = box_with_surroundings(piece, difference.pixels, disagreement.depth)
        yield _certainty(disagreement, piece) * math.sqrt(piece.share), box


def _coarse_edges(disagreement: Disagreement) -> Iterator[Scored]:
    """An annotated person's outline is off along much of its length; scored by that share.

    Off it is where a sure disagreement begins at the outline that is thicker than an eighth of the
    band, to whichever side. Pieces that reach far out of the band do not count, nor does what the
    network is unsure of, such as its own blurred outline.
    """
    mask, depth = disagreement.mask, disagreement.depth
    near = disagreement.missing.near | disagreement.phantom.near
    people = list(large_pieces(mask == PERSON)) if near.any() else []
    beside = grown(opened(near, depth // 8 + 1), 1)
    background = (mask == BACKGROUND).view(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    at_background = cv2.dilate(background, cross).view(np.bool_)
    for person in people:
        outline = person.region & at_background[person.box.slices]
        length = np.count_nonzero(outline)
        if length >= _SHORTEST_OUTLINE * depth:
            share = np.count_nonzero(outline & beside[person.box.slices]) / length
            if share >= _LEAST_OFF:
                yield share, person.box


def _wrong_crowds(disagreement: Disagreement) -> Iterator[Scored]:
    """An ignored region in which the network surely sees nobody, nearly everywhere.

    Scored as people are. One that hides a single person is not looked for: in a mask of what is
    person, one and many look the same.
    """
    for piece in large_pieces(disagreement.mask == IGNORE):
        empty = disagreement.surely_background[piece.box.slices][piece.region]
        if float(empty.mean()) >= _EMPTY:
            yield _certainty(disagreement, piece) * math.sqrt(piece.share), piece.box


KINDS: dict[str, Kind] = {
    "missing person": Kind(_missing_people, "the network sees one, the annotation does not"),
    "phantom person": Kind(_phantom_people, "the annotation has one, the network sees none"),
    "coarse edge": Kind(_coarse_edges, "much of the outline is off"),
    "wrong crowd": Kind(_wrong_crowds, "an ignored region in which the network sees nobody"),
}


def _certainty(disagreement: Disagreement, piece: Piece) -> float:
    """Of the network, in the mean over the piece: 0 torn, 1 sure."""
    return float(np.abs(2 * disagreement.probs[piece.box.slices][piece.region] - 1).mean())


def _carried_over(box: Box, size: tuple[int, ...], larger: tuple[int, ...]) -> Box:
    """From a picture of `size` H, W to the same picture of `larger`, rounded outwards."""
    right, bottom = box.left + box.width, box.top + box.height
    left, top = box.left * larger[1] // size[1], box.top * larger[0] // size[0]
    return Box(
        left, top, -(-right * larger[1] // size[1]) - left, -(-bottom * larger[0] // size[0]) - top
    )
