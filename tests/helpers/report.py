"""Drawn images and evaluation results for the tests of the report."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helpers.evaluation import new_accumulator, random_catalog, smooth_case
from segtrain.data.sample import DatasetIndex, Sample
from segtrain.evaluation.bootstrap import Comparison
from segtrain.evaluation.counts import count_image
from segtrain.evaluation.options import EvalOptions
from segtrain.evaluation.result import EvalData, EvalResult, ModelInfo, build_result
from segtrain.imaging.images import resize_short_side
from segtrain.inference.options import InferenceOptions
from segtrain.types import Image

SHAPES = ((48, 64), (64, 48), (50, 50))


def shape_of(index: int) -> tuple[int, int]:
    """Height and width of a noise image."""
    return SHAPES[index % len(SHAPES)]


class NoiseDataset:
    """A `SegmentationDataset` of noise images, by default in the sizes of `shape_of`."""

    def __init__(self, num: int, shape: tuple[int, int] | None = None) -> None:
        self._num, self._shape = num, shape
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []

    def __len__(self) -> int:
        return self._num

    @property
    def index(self) -> DatasetIndex:
        return random_catalog(self._num)

    def image(self, index: int) -> Image:
        shape = self._shape or shape_of(index)
        return np.random.default_rng(index).integers(0, 256, (*shape, 3), dtype=np.uint8)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        image = self.image(index)
        if short_side is not None:
            image = resize_short_side(image, short_side)
        return Sample(image=image, mask=np.zeros(image.shape[:2], np.uint8), image_id=f"{index}")

    def image_path(self, index: int) -> Path:
        return Path(f"{index}.png")

    def name(self, index: int) -> str:
        return f"{index}"


def smooth_result(
    num: int,
    *,
    names: Sequence[str] | None = None,
    model_info: ModelInfo | None = None,
    options: EvalOptions | None = None,
    data: EvalData | None = None,
    comparison: Comparison | None = None,
    binary: bool = False,
) -> EvalResult:
    """The result of `num` smooth cases from two data sets.

    Args:
        binary: whether every probability is 0 or 1, as in masks.
    """
    accumulator = new_accumulator(num)
    for index in range(num):
        probs, mask = smooth_case(index, shape_of(index))
        probs = (probs >= 0.5).astype(np.float32) if binary else probs
        accumulator.add(index, count_image(probs, mask))
    return build_result(
        accumulator.totals(),
        model_info=model_info
        or ModelInfo(kind="checkpoint", path=Path("runs/people/checkpoints/best.pt"), model="unet"),
        options=options
        or EvalOptions(inference=InferenceOptions(size=320, bn="running", tile=None)),
        data=data
        or EvalData(
            roots=(Path("/data/here"), Path("/data/there")),
            split="val",
            manifest="0123456789abcdef",
            num_damaged=0,
            num_trained_on=0,
        ),
        image_ids=names or [f"image {index}" for index in range(num)],
        comparison=comparison,
    )
