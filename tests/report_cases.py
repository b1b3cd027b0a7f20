"""Drawn pictures and what judging them finds, for the tests of the report."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from evaluation_cases import catalog_of, smooth_case

from segtrain.data.sample import Catalog, Sample
from segtrain.evaluation.bootstrap import Comparison
from segtrain.evaluation.judgement import Exam, Judgement, Manner, Subject, judgement_of
from segtrain.evaluation.picture import count_picture
from segtrain.evaluation.totals import Tally
from segtrain.images import Pixels, resize_short_side

SHAPES = ((48, 64), (64, 48), (50, 50))


def shape_of(index: int) -> tuple[int, int]:
    """Height and width of a drawn picture."""
    return SHAPES[index % len(SHAPES)]


class DrawnSource:
    """As `segtrain.data.sample.Source`: noise, of the size of `shape_of`."""

    def __init__(self, num: int, shape: tuple[int, int] | None = None) -> None:
        self._num, self._shape = num, shape
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []

    def __len__(self) -> int:
        return self._num

    @property
    def catalog(self) -> Catalog:
        return catalog_of(self._num)

    def image(self, index: int) -> Pixels:
        shape = self._shape or shape_of(index)
        return np.random.default_rng(index).integers(0, 256, (*shape, 3), dtype=np.uint8)

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        image = self.image(index)
        if short_side is not None:
            image = resize_short_side(image, short_side)
        return Sample(image=image, mask=np.zeros(image.shape[:2], np.uint8), image_id=f"{index}")

    def picture_path(self, index: int) -> Path:
        return Path(f"{index}.png")

    def stem(self, index: int) -> str:
        return f"{index}"


def drawn_judgement(
    num: int,
    *,
    names: Sequence[str] | None = None,
    subject: Subject | None = None,
    manner: Manner | None = None,
    exam: Exam | None = None,
    comparison: Comparison | None = None,
    hard: bool = False,
) -> Judgement:
    """Of `num` smooth cases, one after the other from two data sets; `hard`: as masks have it."""
    tally = Tally(catalog_of(num), np.arange(num) * 2 // max(num, 1))
    for index in range(num):
        probs, mask = smooth_case(index, shape_of(index))
        probs = (probs >= 0.5).astype(np.float32) if hard else probs
        tally.add(index, count_picture(probs, mask))
    return judgement_of(
        tally.totals(),
        subject=subject
        or Subject(kind="checkpoint", path=Path("runs/people/checkpoints/best.pt"), model="unet"),
        manner=manner or Manner(size=320, bn="running"),
        exam=exam
        or Exam(
            data=(Path("/data/here"), Path("/data/there")),
            split="val",
            manifest="0123456789abcdef",
            num_damaged=0,
            num_trained_on=0,
        ),
        image_ids=names or [f"picture {index}" for index in range(num)],
        comparison=comparison,
    )
