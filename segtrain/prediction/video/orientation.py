"""How the frames of a phone's clip lie, by its display matrix."""

from typing import Any

import numpy as np
from av.video.frame import VideoFrame

# EXIF's numbers, by whether the picture was laid on its side, and then mirrored to the left and
# upside down. `segtrain.rgb.turned_upright` undoes them.
_ORIENTATIONS = {
    (False, False, False): 1,
    (False, True, False): 2,
    (False, True, True): 3,
    (False, False, True): 4,
    (True, False, False): 5,
    (True, True, False): 6,
    (True, True, True): 7,
    (True, False, True): 8,
}


def orientation_of(frame: VideoFrame) -> int:
    """How a decoded frame lies, EXIF's 1 (upright) to 8; other angles are taken as the nearest."""
    side_data: Any = frame.side_data  # PyAV's stubs know one key, and not this one
    if "DISPLAYMATRIX" not in side_data:
        return 1
    # A stored pixel x, y is seen at a x + c y, b x + d y.
    a, b, _, c, d, *_ = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32).tolist()
    if abs(b) > abs(a):
        return _ORIENTATIONS[True, c < 0, b < 0]
    return _ORIENTATIONS[False, a < 0, d < 0]
