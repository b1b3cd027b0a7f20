"""What is said of a result in numbers: a line of JSON for each picture."""

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from segtrain.prediction.outputs import Result
from segtrain.prediction.regions import tiles


def describe(result: Result) -> dict[str, Any]:
    """The people of one picture, in types that JSON has.

    Returns:
        person_share: of the frame's pixels, 0..1.
        confidence: mean probability of the mask's pixels, 0.5..1: how sure the network is of what
            it calls person. None without a person. The background does not count: it is most of a
            picture and nearly always sure.
        num_pieces: what hangs together, also over corners. People who touch are one piece.
        box: [x, y, width, height] around all of them, pixels, as COCO has it. None without a
            person.
        rle: the mask as a run-length encoding, {"size": [H, W], "counts": str}, compressed as by
            COCO: `pycocotools.mask.decode` reads it.
    """
    mask = result.mask
    num_pixels = int(cv2.countNonZero(mask))
    rle = coco_mask.encode(np.asfortranarray(mask // 255))
    labels, _ = cv2.connectedComponents(mask, connectivity=8)
    confidence = _confidence(result) if num_pixels else None
    return {
        "person_share": num_pixels / mask.size,
        "confidence": None if confidence is None else round(confidence, 4),
        "num_pieces": labels - 1,
        "box": list(cv2.boundingRect(mask)) if num_pixels else None,
        "rle": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
    }


def _confidence(result: Result) -> float:
    total = 0.0
    for tile in tiles(result.mask.shape, reach=0):
        person = result.mask[tile.inner] > 0
        if person.any():
            total += float(result.answer[tile.inner][person].sum(dtype=np.float64))
    return total / np.count_nonzero(result.mask)
