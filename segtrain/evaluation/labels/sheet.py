"""The sheet of a label check: the strongest suspicions of each kind, to look at."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from segtrain.classes import IGNORE, PERSON
from segtrain.data.sample import Sample, Source
from segtrain.errors import DataError
from segtrain.evaluation.labels.close_up import CloseUp
from segtrain.evaluation.labels.pieces import Box
from segtrain.evaluation.labels.ranking import Ranking
from segtrain.evaluation.labels.suspicion import KINDS
from segtrain.images import Pixels
from segtrain.overview.words import printable
from segtrain.sheets import (
    OUTLINE_COLOUR,
    Cell,
    block,
    draw_outline,
    hatch,
    scaled,
    scaled_mask,
    write_sheet,
)

_COLUMNS = 6
_NETWORK_COLOUR = (0, 225, 255)
_BOX_COLOUR = (255, 60, 60)
_LEGEND = "yellow: annotation, blue: network, red: what is suspicious, hatched: ignored"


def write_review(path: Path, ranking: Ranking, source: Source) -> None:
    """A block for each kind, also where there is nothing, as one PNG.

    Raises:
        ResourceError: it cannot be written.
    """
    blocks = []
    for kind, about in KINDS.items():
        cells = list(_cells(kind, ranking, source))
        total = len(ranking.ranked(kind))
        shown = f"{len(cells)} of {total} suspicious pictures" if total else "nothing suspicious"
        blocks.append(block(f"{kind} ({about.meaning}): {shown}", cells, _COLUMNS))
    blocks.append(block(_LEGEND, [], _COLUMNS))
    write_sheet(path, blocks)


def _cells(kind: str, ranking: Ranking, source: Source) -> Iterator[Cell]:
    for ranked, view in ranking.shown(kind):
        try:
            sample = source.sample(ranked.index)
        except DataError:
            continue  # it was readable when it was judged; the table still names it
        picture = drawn(sample, view, ranked.suspicion.box)
        name = printable(source.stem(ranked.index))
        yield Cell(picture, name, f"{ranked.suspicion.score:.2f}")


def drawn(sample: Sample, close_up: CloseUp, box: Box) -> Pixels:
    """The part of the picture, h w 3 uint8, with both outlines and the box in it."""
    view, size = close_up.view, (close_up.answer.shape[0], close_up.answer.shape[1])
    pixels = np.ascontiguousarray(scaled(sample.image[view.slices], size))
    mask = scaled_mask(sample.mask[view.slices], size)
    hatch(pixels, mask == IGNORE)
    draw_outline(pixels, close_up.answer >= 128, _NETWORK_COLOUR)
    draw_outline(pixels, mask == PERSON, OUTLINE_COLOUR)
    scale = size[0] / view.height, size[1] / view.width
    left, top = round((box.left - view.left) * scale[1]), round((box.top - view.top) * scale[0])
    right, bottom = left + round(box.width * scale[1]) - 1, top + round(box.height * scale[0]) - 1
    cv2.rectangle(pixels, (left, top), (right, bottom), _BOX_COLOUR, 1)
    return pixels
