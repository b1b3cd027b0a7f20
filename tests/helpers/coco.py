"""Small data sets in COCO layout, written for the tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageDraw

from segtrain.types import Image

Row = dict[str, Any]

PERSON_ID = 1
PERSON_AND_DOG: tuple[Row, ...] = ({"id": 18, "name": "dog"}, {"id": PERSON_ID, "name": "person"})


def annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def image_row(image_id: int, height: int, width: int, file_name: str | None = None) -> Row:
    """A row of "images"."""
    name = file_name or f"{image_id:012d}.png"
    return {"id": image_id, "file_name": name, "height": height, "width": width}


def annotation_row(
    annotation_id: int,
    image_id: int,
    segmentation: Any,
    *,
    category_id: int = PERSON_ID,
    iscrowd: int = 0,
) -> Row:
    """A row of "annotations"."""
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": iscrowd,
        "segmentation": segmentation,
    }


def write_coco(
    root: Path,
    split: str,
    images: Sequence[Row],
    annotations: Sequence[Row],
    *,
    categories: Sequence[Row] = PERSON_AND_DOG,
    pixels: Mapping[int, Image] | None = None,
) -> Path:
    """Write one split of a data set and return its annotation file.

    Args:
        pixels: image id → array; all other images are plain gray.
    """
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    for row in images:
        gray = np.full((row["height"], row["width"], 3), 90, dtype=np.uint8)
        array = (pixels or {}).get(row["id"], gray)
        path = folder / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(path, quality=95)
    content = {
        "images": list(images),
        "annotations": list(annotations),
        "categories": list(categories),
    }
    return write_annotations(root, split, json.dumps(content))


def write_annotations(root: Path, split: str, text: str) -> Path:
    """Write `text`, well-formed or not, as the annotation file of a split."""
    path = annotation_file(root, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make_toy_coco(
    root: Path, *, num_train: int = 8, num_val: int = 4, size: tuple[int, int] = (48, 64)
) -> Path:
    """Write both splits of a data set that a small network can learn: bright people on dark noise.

    Args:
        root: the folder to fill.
        size: height and width of every image.

    Returns:
        `root`. The same arguments give the same bytes. The second image of each split has no
        person.
    """
    for split, count, first_id in (("train", num_train, 1), ("val", num_val, 1_000_001)):
        rows, annotations, images = [], [], {}
        for index in range(count):
            image_id = first_id + index
            rows.append(image_row(image_id, *size))
            # Each image depends only on its id, so that more images do not change the first ones.
            rng = np.random.default_rng(image_id)
            outline = None if index == 1 else _person_outline(rng, *size, oval=index % 2 == 0)
            images[image_id] = _draw_person(rng, *size, outline)
            if outline is not None:
                annotations.append(annotation_row(image_id, image_id, [outline]))
        write_coco(root, split, rows, annotations, pixels=images)
    return root


def _person_outline(
    rng: np.random.Generator, height: int, width: int, *, oval: bool
) -> list[float]:
    """x, y, x, y, ... of an ellipse or a rectangle that covers 15 to 45 % of the image."""
    half_height, half_width = (side * rng.uniform(0.22, 0.34) for side in (height, width))
    center_y = rng.uniform(half_height, height - half_height)
    center_x = rng.uniform(half_width, width - half_width)
    angles = np.linspace(0, 2 * np.pi, 24 if oval else 4, endpoint=False) + np.pi / 4
    reach = 1.0 if oval else 2**0.5
    xs = center_x + half_width * reach * np.cos(angles)
    ys = center_y + half_height * reach * np.sin(angles)
    return np.stack([xs, ys], axis=1).round(2).ravel().tolist()


def _draw_person(
    rng: np.random.Generator, height: int, width: int, outline: list[float] | None
) -> Image:
    pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    if outline is None:
        return pixels
    canvas = PIL.Image.new("L", (width, height))
    ImageDraw.Draw(canvas).polygon(outline, fill=1)
    person = rng.integers(170, 250, (height, width, 3), dtype=np.uint8)
    return np.where(np.asarray(canvas)[..., None] == 1, person, pixels)
