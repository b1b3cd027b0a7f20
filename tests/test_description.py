"""The numbers of a result, read back by COCO's own tools."""

import json

import numpy as np
import numpy.typing as npt
import pytest
from pycocotools import mask as coco_mask

from segtrain.prediction.description import describe
from segtrain.prediction.outputs import Result


def result(probability: npt.NDArray[np.float32]) -> Result:
    return Result(np.zeros((*probability.shape, 3), dtype=np.uint8), probability)


def test_two_people_in_numbers() -> None:
    probability = np.full((40, 50), 0.2, dtype=np.float32)
    probability[5:15, 10:20] = 0.9
    probability[20:30, 30:40] = 0.7
    probability[30, 40] = 0.5  # touches the second by a corner

    found = describe(result(probability))

    assert found["person_share"] == pytest.approx(201 / 2000)
    assert found["confidence"] == pytest.approx((100 * 0.9 + 100 * 0.7 + 0.5) / 201, abs=1e-4)
    assert found["num_pieces"] == 2
    assert found["box"] == [10, 5, 31, 26]


@pytest.mark.parametrize("seed", range(5))
def test_the_encoding_is_read_by_coco(seed: int) -> None:
    probability = np.random.default_rng(seed).random((37, 53), dtype=np.float32) ** (seed + 0.2)
    one = result(probability)

    # Through JSON and back, as a user reads it.
    found = json.loads(json.dumps(describe(one)))

    assert np.array_equal(coco_mask.decode(found["rle"]), one.mask // 255)
    assert found["box"] == coco_mask.toBbox(found["rle"]).tolist()
    assert found["person_share"] * one.mask.size == pytest.approx(coco_mask.area(found["rle"]))


def test_nobody_has_no_box_and_no_confidence() -> None:
    found = describe(result(np.full((7, 9), 0.4, dtype=np.float32)))

    assert (found["person_share"], found["num_pieces"]) == (0, 0)
    assert found["box"] is None
    assert found["confidence"] is None
    assert coco_mask.decode(found["rle"]).sum() == 0
    json.dumps(found)
