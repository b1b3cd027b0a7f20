"""Statistics of one result, as written by `--jsonl`."""

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from segtrain.imaging.blocks import blocks
from segtrain.prediction.outputs import Result


def describe(result: Result) -> dict[str, Any]:
    """Describe the person pixels of one image in JSON types.

    Returns:
        person_fraction: fraction of the image's pixels, 0..1.
        confidence: mean probability of the person pixels, 0.5..1; None without a person. The
            background is excluded: it is most of an image and nearly always certain.
        num_components: number of 8-connected components. People who touch are one component.
        box: COCO bounding box of all person pixels, [x, y, width, height] in pixels; None without
            a person.
        rle: the mask in COCO's compressed run-length encoding, {"size": [H, W], "counts": str},
            for `pycocotools.mask.decode`.
    """
    mask = result.mask
    num_pixels = int(cv2.countNonZero(mask))
    rle = coco_mask.encode(np.asfortranarray(mask // 255))
    num_labels, _ = cv2.connectedComponents(mask, connectivity=8)
    return {
        "person_fraction": num_pixels / mask.size,
        "confidence": round(_confidence(result), 4) if num_pixels else None,
        "num_components": num_labels - 1,
        "box": list(cv2.boundingRect(mask)) if num_pixels else None,
        "rle": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
    }


def _confidence(result: Result) -> float:
    total = 0.0
    for block in blocks(result.mask.shape, reach=0):
        person = result.mask[block.inner] > 0
        if person.any():
            total += float(result.probs[block.inner][person].sum(dtype=np.float64))
    return total / np.count_nonzero(result.mask)
