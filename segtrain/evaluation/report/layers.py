"""What is laid over a photo: small label maps, as PNGs of a few colours, partly transparent."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from segtrain.classes import IGNORE, PERSON
from segtrain.images import Pixels


class Colour(NamedTuple):
    """Red, green, blue and opacity, 0..255 each."""

    red: int
    green: int
    blue: int
    alpha: int

    @property
    def css(self) -> str:
        """Without the opacity, for a legend."""
        return f"rgb({self.red} {self.green} {self.blue})"


CLEAR = Colour(0, 0, 0, 0)
# A veil over what is no person: of a middle tone it shows on dark and on bright photos.
VEIL = Colour(96, 104, 120, 216)
# Red and blue, and far apart in lightness, too: any eye tells them apart.
MISSED = Colour(230, 44, 22, 205)
INVENTED = Colour(52, 156, 255, 205)
# Ignored pixels are striped, so that they need no hue.
STRIPE = Colour(250, 250, 250, 190)
BETWEEN_STRIPES = Colour(40, 44, 52, 190)

_STRIPE_WIDTH = 5

NOTHING, MARKED, OTHER, STRIPED, BETWEEN = range(5)
"""Labels; what is marked, and what is marked otherwise, depends on the layer."""

TRUTH_COLOURS = (VEIL, CLEAR, VEIL, STRIPE, BETWEEN_STRIPES)
PREDICTION_COLOURS = (VEIL, CLEAR)
ERROR_COLOURS = (CLEAR, MISSED, INVENTED, STRIPE, BETWEEN_STRIPES)


def truth_labels(mask: Pixels) -> Pixels:
    """H W uint8: MARKED is person, STRIPED or BETWEEN is ignored.

    Args:
        mask: H W uint8 in {0, 1, 255}.
    """
    return _with_ignored(np.where(mask == PERSON, MARKED, NOTHING).astype(np.uint8), mask)


def error_labels(predicted: Pixels, mask: Pixels) -> Pixels:
    """H W uint8: MARKED is person that was missed, OTHER was invented, ignored as in the truth.

    Args:
        predicted: H W uint8 in {0, 1}.
        mask: H W uint8 in {0, 1, 255}.
    """
    labels = np.full(mask.shape, NOTHING, dtype=np.uint8)
    labels[(mask == PERSON) & (predicted != PERSON)] = MARKED
    labels[(mask != PERSON) & (predicted == PERSON)] = OTHER
    return _with_ignored(labels, mask)


def encode_labels(labels: Pixels, colours: Sequence[Colour]) -> bytes:
    """A PNG whose pixels are the labels themselves.

    Args:
        labels: H W uint8, each the row of a colour.
    """
    picture = Image.fromarray(labels)
    picture.putpalette([part for colour in colours for part in colour[:3]])
    png = io.BytesIO()
    picture.save(png, format="PNG", transparency=bytes(colour.alpha for colour in colours))
    return png.getvalue()


def _with_ignored(labels: Pixels, mask: Pixels) -> Pixels:
    height, width = mask.shape
    diagonal = np.arange(height)[:, None] + np.arange(width)[None, :]
    striped = diagonal // _STRIPE_WIDTH % 2 == 0
    ignored = mask == IGNORE
    labels[ignored & striped] = STRIPED
    labels[ignored & ~striped] = BETWEEN
    return labels
