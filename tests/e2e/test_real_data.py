"""Images of real people beside the checkout; skipped without them. No output is kept."""

from pathlib import Path

import numpy as np
import pytest
from helpers.command import Command
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from segtrain.data.datasets import open_dataset


@pytest.mark.parametrize(
    ("split", "num_images", "num_empty"), [("train", 830, 50), ("val", 165, 15)]
)
def test_masks_equal_the_union_of_pycocotools(
    real_data: Path, split: str, num_images: int, num_empty: int
) -> None:
    root = real_data / "coco-person-mini"
    source = open_dataset(root, split)
    coco = COCO(str(root / "annotations" / f"instances_{split}2017.json"))
    [person] = coco.getCatIds(catNms=["person"])

    empty = 0
    for index in range(len(source)):
        sample = source.sample(index)
        annotations = coco.loadAnns(coco.getAnnIds(int(sample.image_id), person))
        expected = np.zeros(sample.mask.shape, dtype=np.uint8)
        for crowd, value in ((1, 255), (0, 1)):
            rles = [coco.annToRLE(a) for a in annotations if a["iscrowd"] == crowd]
            if rles:
                expected[coco_mask.decode(coco_mask.merge(rles)) == 1] = value
        assert np.array_equal(sample.mask, expected), sample.image_id
        empty += not annotations

    assert (len(source), empty) == (num_images, num_empty)


@pytest.mark.slow
def test_a_short_training_on_real_people_and_difficult_photos(
    segtrain: Command, real_data: Path
) -> None:
    data = ["--data", str(real_data / "coco-person-mini")]
    tiny = ["--set", "model.base_channels=8", "--image-size", "96", "--batch-size", "16"]
    trained = segtrain("train", *data, *tiny, "--epochs", "2", "--name", "real")
    assert trained.code == 0, trained.err

    predicted = segtrain("predict", real_data / "photos", "--checkpoint", "runs/real", "--panel")

    # Four of the photos are truncated or broken; the others succeed.
    assert predicted.code == 3
    assert "4 of 28" in predicted.error_lines[0]
    for name in ("jarvis_test_sample.jpeg", "bus.jpg", "desert.jpg", "kid8.jpg"):
        with (
            Image.open(real_data / "photos" / name) as photo,
            Image.open(f"predictions/{Path(name).stem}_mask.png") as mask,
        ):
            assert mask.size == ImageOps.exif_transpose(photo).size
