"""Write drawn people as a dataset in COCO layout.

Every image depends on (seed, index) only. As in COCO, bags and other carried things are not part
of the person, and objects in front of a person are cut out of the mask.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from segtrain.demo.scenes import draw_person_scene
from segtrain.runtime.signals import raise_if_stopped
from segtrain.types import Image, Mask

GENERATOR_VERSION = 1
_SIZES = (
    (320, 240), (320, 240), (240, 320), (256, 256), (288, 216), (300, 300), (320, 214), (216, 288),
)  # fmt: skip
_FIRST_TRAIN = 1
_FIRST_VAL = 1_000_000  # validation scenes start here, so they are never training scenes
_ZOOM = 4  # masks are traced at this magnification
_TOLERANCE = 0.35  # maximum distance of a polygon from the traced edge, pixels


def write_demo_people(
    root: Path,
    *,
    num_train: int = 512,
    num_val: int = 96,
    seed: int = 0,
    on_image: Callable[[], object] | None = None,
) -> None:
    """Draw a dataset in COCO layout: `train2017/`, `val2017/` and `annotations/` in `root`.

    Image `index` of a split does not depend on the size of the split.

    Args:
        on_image: called after each image.

    Raises:
        OSError: a file cannot be written.
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
            raise_if_stopped()
            if on_image is not None:
                on_image()
        _write_json(root / "annotations" / f"instances_{split}.json", images, annotations, seed)


def mask_to_polygons(mask: Mask) -> list[list[float]]:
    """Trace a 0/1 mask (HW) as COCO polygons [x1, y1, x2, y2, ...], in pixel-edge coordinates.

    A hole becomes a detour of the outline: into the hole, around it, and back the same way.
    """
    if not mask.any():
        return []
    height, width = mask.shape
    left, top, wide, high = cv2.boundingRect(mask)
    cropped = mask[top : top + high, left : left + wide] * 255
    padded = cv2.copyMakeBorder(cropped, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    # Upsampling first turns stairs on slanted edges into straight lines.
    size = ((wide + 2) * _ZOOM, (high + 2) * _ZOOM)
    fine = cv2.resize(padded, size, interpolation=cv2.INTER_LINEAR) >= 128
    contours, hierarchy = cv2.findContours(
        fine.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    polygons = []
    for i, contour in enumerate(contours):
        if hierarchy[0][i][3] >= 0:  # a hole: handled with its outline
            continue
        outline = _simplify(contour)
        if len(outline) < 3:
            continue
        hole = hierarchy[0][i][2]
        while hole >= 0:
            ring = _simplify(contours[hole])
            if len(ring) >= 3:
                outline = _cut_hole(outline, ring)
            hole = hierarchy[0][hole][0]
        points = np.clip((outline + 0.5) / _ZOOM + (left - 1, top - 1), 0, (width, height))
        polygons.append([round(float(value), 2) for value in points.ravel()])
    return polygons


def _simplify(contour: NDArray[Any]) -> NDArray[np.float64]:
    return cv2.approxPolyDP(contour, _TOLERANCE * _ZOOM, True).reshape(-1, 2).astype(np.float64)


def _cut_hole(outline: NDArray[np.float64], hole: NDArray[np.float64]) -> NDArray[np.float64]:
    """One closed path: the outline with a detour around the hole where the two are nearest."""
    distances = ((outline[:, None] - hole[None]) ** 2).sum(axis=2)
    start, entry = np.unravel_index(distances.argmin(), distances.shape)
    detour = np.concatenate((np.roll(hole, -entry, axis=0), hole[entry : entry + 1]))
    return np.concatenate((outline[: start + 1], detour, outline[start:]))


def _annotation(mask: Mask, annotation_id: int, image_id: int) -> dict[str, Any]:
    x, y, width, height = cv2.boundingRect(mask)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [x, y, width, height],
        "segmentation": mask_to_polygons(mask),
    }


def _write_jpeg(path: Path, image: Image, quality: int) -> None:
    success, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not success:
        raise OSError(f"cannot encode {path}")
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
