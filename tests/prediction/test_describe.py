"""Statistics of a result, read back with pycocotools."""

import json

import numpy as np
import numpy.typing as npt
import pytest
from pycocotools import mask as coco_mask

from segtrain.prediction.describe import describe
from segtrain.prediction.outputs import Result


def make_result(probs: npt.NDArray[np.float32]) -> Result:
    return Result(np.zeros((*probs.shape, 3), dtype=np.uint8), probs)


def test_statistics_of_two_people() -> None:
    probs = np.full((40, 50), 0.2, dtype=np.float32)
    probs[5:15, 10:20] = 0.9
    probs[20:30, 30:40] = 0.7
    probs[30, 40] = 0.5  # touches the second person at a corner

    stats = describe(make_result(probs))

    assert stats["person_fraction"] == pytest.approx(201 / 2000)
    assert stats["confidence"] == pytest.approx((100 * 0.9 + 100 * 0.7 + 0.5) / 201, abs=1e-4)
    assert stats["num_components"] == 2
    assert stats["box"] == [10, 5, 31, 26]


@pytest.mark.parametrize("seed", range(5))
def test_pycocotools_decodes_the_rle(seed: int) -> None:
    probs = np.random.default_rng(seed).random((37, 53), dtype=np.float32) ** (seed + 0.2)
    result = make_result(probs)

    # Through JSON and back, as a user reads it.
    stats = json.loads(json.dumps(describe(result)))

    assert np.array_equal(coco_mask.decode(stats["rle"]), result.mask // 255)
    assert stats["box"] == coco_mask.toBbox(stats["rle"]).tolist()
    assert stats["person_fraction"] * result.mask.size == pytest.approx(
        coco_mask.area(stats["rle"])
    )


def test_an_empty_mask_has_no_box_and_no_confidence() -> None:
    stats = describe(make_result(np.full((7, 9), 0.4, dtype=np.float32)))

    assert (stats["person_fraction"], stats["num_components"]) == (0, 0)
    assert stats["box"] is None
    assert stats["confidence"] is None
    assert coco_mask.decode(stats["rle"]).sum() == 0
    json.dumps(stats)
