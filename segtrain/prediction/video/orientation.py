"""Turning frames upright, as the display matrix of a phone's clip says."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from av.video.frame import VideoFrame

from segtrain.images import Pixels

_FLIP_ROWS, _FLIP_COLUMNS, _FLIP_BOTH = 0, 1, -1


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways a picture can lie.

    transposed: rows and columns change places, before the flip.
    flip: cv2's code of the axes to turn round.
    """

    transposed: bool = False
    flip: int | None = None

    def upright(self, pixels: Pixels) -> Pixels:
        """H W 3 uint8 as stored → H W 3 (or W H 3) as it is to be seen."""
        if self.transposed:
            pixels = np.asarray(cv2.transpose(pixels), dtype=np.uint8)
        if self.flip is not None:
            pixels = np.asarray(cv2.flip(pixels, self.flip), dtype=np.uint8)
        return pixels


def orientation_of(frame: VideoFrame) -> Orientation:
    """The orientation that a decoded frame carries; angles between are taken as the nearest."""
    side_data: Any = frame.side_data  # PyAV's stubs know one key, and not this one
    if "DISPLAYMATRIX" not in side_data:
        return Orientation()
    # A stored pixel x, y is seen at a x + c y, b x + d y.
    a, b, _, c, d, *_ = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32).tolist()
    transposed = abs(b) > abs(a)
    flip_columns, flip_rows = (c < 0, b < 0) if transposed else (a < 0, d < 0)
    if flip_columns and flip_rows:
        return Orientation(transposed, _FLIP_BOTH)
    if flip_columns or flip_rows:
        return Orientation(transposed, _FLIP_COLUMNS if flip_columns else _FLIP_ROWS)
    return Orientation(transposed)
