"""Small data sets in COCO layout, written by hand for the tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]

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
    pictures: Mapping[int, Pixels] | None = None,
) -> Path:
    """One split of a data set; its annotation file is returned.

    Each picture of `images` that `pictures` (image id → pixels) does not give is one gray plane.
    """
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    for row in images:
        plane = np.full((row["height"], row["width"], 3), 90, dtype=np.uint8)
        pixels = (pictures or {}).get(row["id"], plane)
        path = folder / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=95)
    content = {
        "images": list(images),
        "annotations": list(annotations),
        "categories": list(categories),
    }
    return write_annotations(root, split, json.dumps(content))


def write_annotations(root: Path, split: str, text: str) -> Path:
    """Put `text`, well-formed or not, where the annotations of a split belong."""
    path = annotation_file(root, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make_toy_coco(
    root: Path, *, num_train: int = 8, num_val: int = 4, size: tuple[int, int] = (48, 64)
) -> Path:
    """Both splits of a data set that a small network learns: bright people on dark noise.

    Args:
        root: the folder to fill.
        size: height and width of every picture.

    Returns:
        `root`. The same arguments give the same bytes; the second picture of each split holds
        nobody.
    """
    for split, count, first_id in (("train", num_train, 1), ("val", num_val, 1_000_001)):
        rows, annotations, pictures = [], [], {}
        for index in range(count):
            image_id = first_id + index
            rows.append(image_row(image_id, *size))
            # The id alone decides the picture: more pictures leave the first ones as they were.
            rng = np.random.default_rng(image_id)
            outline = None if index == 1 else _person_outline(rng, *size, oval=index % 2 == 0)
            pictures[image_id] = _draw_person(rng, *size, outline)
            if outline is not None:
                annotations.append(annotation_row(image_id, image_id, [outline]))
        write_coco(root, split, rows, annotations, pictures=pictures)
    return root


def _person_outline(
    rng: np.random.Generator, height: int, width: int, *, oval: bool
) -> list[float]:
    """x, y, x, y, ... of an ellipse or a rectangle that covers 15 to 45 % of the picture."""
    half_height, half_width = (side * rng.uniform(0.22, 0.34) for side in (height, width))
    middle_y = rng.uniform(half_height, height - half_height)
    middle_x = rng.uniform(half_width, width - half_width)
    angles = np.linspace(0, 2 * np.pi, 24 if oval else 4, endpoint=False) + np.pi / 4
    reach = 1.0 if oval else 2**0.5
    xs = middle_x + half_width * reach * np.cos(angles)
    ys = middle_y + half_height * reach * np.sin(angles)
    return np.stack([xs, ys], axis=1).round(2).ravel().tolist()


def _draw_person(
    rng: np.random.Generator, height: int, width: int, outline: list[float] | None
) -> Pixels:
    pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    if outline is None:
        return pixels
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).polygon(outline, fill=1)
    person = rng.integers(170, 250, (height, width, 3), dtype=np.uint8)
    return np.where(np.asarray(canvas)[..., None] == 1, person, pixels)
