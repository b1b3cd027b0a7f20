"""Writes drawn people as a data set in COCO layout.

Every picture follows from (seed, index) alone. Bags and whatever else a person carries are not
part of the person, and what stands in front of somebody is cut out of the mask, as in COCO.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from segtrain.data.people.scenes import draw_person_scene

GENERATOR_VERSION = 1
_SIZES = (
    (320, 240), (320, 240), (240, 320), (256, 256), (288, 216), (300, 300), (320, 214), (216, 288),
)  # fmt: skip
_FIRST_TRAIN = 1
_FIRST_VAL = 1_000_000  # validation scenes are numbered from here: none is ever a training scene
_ZOOM = 4  # masks are traced at this magnification
_TOLERANCE = 0.35  # how far, in pixels, a polygon may leave the traced edge


def write_demo_people(
    root: Path,
    *,
    num_train: int = 512,
    num_val: int = 96,
    seed: int = 0,
    on_image: Callable[[], object] | None = None,
) -> None:
    """Draw a data set in COCO's layout: `train2017/`, `val2017/` and `annotations/` in `root`.

    Image `index` of a split is the same whatever the split's length. `on_image` is called after
    each image. Raises OSError if a file cannot be written.
    """
    if not 0 <= num_train <= _FIRST_VAL - _FIRST_TRAIN:
        raise ValueError(f"num_train must be from 0 to {_FIRST_VAL - _FIRST_TRAIN}: {num_train}")
    splits = (("train2017", _FIRST_TRAIN, num_train), ("val2017", _FIRST_VAL, num_val))
    for split, first, count in splits:
        (root / split).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(first, first + count):
            rng = np.random.default_rng([seed, index, 1])
            width, height = _SIZES[rng.integers(len(_SIZES))]
            scene = draw_person_scene(seed, index, width=width, height=height)
            name = f"{index:012d}.jpg"
            _write_jpeg(root / split / name, scene.image, quality=int(rng.integers(75, 96)))
            images.append({"id": index, "file_name": name, "width": width, "height": height})
            for mask in scene.people:
                annotations.append(_annotation(mask, len(annotations) + 1, index))
            if on_image is not None:
                on_image()
        _write_json(root / "annotations" / f"instances_{split}.json", images, annotations, seed)


def mask_to_polygons(mask: NDArray[np.uint8]) -> list[list[float]]:
    """Outline a 0/1 mask (HW) as COCO polygons [x1, y1, x2, y2, ...], in pixel-edge coordinates.

    Holes are cut out by walking from the outline into the hole, round it, and back the same way.
    """
    if not mask.any():
        return []
    height, width = mask.shape
    left, top, wide, high = cv2.boundingRect(mask)
    piece = mask[top : top + high, left : left + wide] * 255
    padded = cv2.copyMakeBorder(piece, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    # Interpolating first makes slanted edges straight instead of stairs.
    size = ((wide + 2) * _ZOOM, (high + 2) * _ZOOM)
    fine = cv2.resize(padded, size, interpolation=cv2.INTER_LINEAR) >= 128
    contours, hierarchy = cv2.findContours(
        fine.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    polygons = []
    for i, contour in enumerate(contours):
        if hierarchy[0][i][3] >= 0:  # a hole: taken up with its outline
            continue
        outline = _simplified(contour)
        if len(outline) < 3:
            continue
        hole = hierarchy[0][i][2]
        while hole >= 0:
            ring = _simplified(contours[hole])
            if len(ring) >= 3:
                outline = _with_hole(outline, ring)
            hole = hierarchy[0][hole][0]
        points = np.clip((outline + 0.5) / _ZOOM + (left - 1, top - 1), 0, (width, height))
        polygons.append([round(float(value), 2) for value in points.ravel()])
    return polygons


def _simplified(contour: NDArray[Any]) -> NDArray[np.float64]:
    return cv2.approxPolyDP(contour, _TOLERANCE * _ZOOM, True).reshape(-1, 2).astype(np.float64)


def _with_hole(outline: NDArray[np.float64], hole: NDArray[np.float64]) -> NDArray[np.float64]:
    """One closed path: the outline, with a detour round the hole from where the two are nearest."""
    gaps = ((outline[:, None] - hole[None]) ** 2).sum(axis=2)
    start, entry = np.unravel_index(gaps.argmin(), gaps.shape)
    detour = np.concatenate((np.roll(hole, -entry, axis=0), hole[entry : entry + 1]))
    return np.concatenate((outline[: start + 1], detour, outline[start:]))


def _annotation(mask: NDArray[np.uint8], number: int, image_id: int) -> dict[str, Any]:
    x, y, width, height = cv2.boundingRect(mask)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [x, y, width, height],
        "segmentation": mask_to_polygons(mask),
    }


def _write_jpeg(path: Path, image: NDArray[np.uint8], quality: int) -> None:
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise OSError(f"could not encode {path}")
    path.write_bytes(data.tobytes())


def _write_json(
    path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]], seed: int
) -> None:
    document = {
        "info": {
            "description": "Drawn demo people; no photographs.",
            "version": str(GENERATOR_VERSION),
            "seed": seed,
        },
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
