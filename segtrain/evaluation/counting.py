"""Counting what was answered, and beside it the answer that looks at no picture."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np

from segtrain.cores import usable_cores
from segtrain.data import Pictures
from segtrain.evaluation.boundaries import Counts
from segtrain.evaluation.candidates import Answer
from segtrain.evaluation.mean_mask import MeanMask
from segtrain.evaluation.picture import PictureCounts, Probs, confusion_of, count_picture
from segtrain.evaluation.records import Records
from segtrain.evaluation.totals import Tally, Totals
from segtrain.images import Pixels

Onlooker = Callable[[int, Probs, Pixels], object]
"""Is shown every picture, from several threads: its place, the probabilities, the truth."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What was counted of some pictures.

    mean_mask: the picture's index → 2 2 int64, what the mean of the training masks would have got;
        None where there is no such mean.
    """

    totals: Totals
    mean_mask: dict[int, Counts] | None

    @staticmethod
    def merged(parts: "Sequence[Counted]") -> "Counted":
        """The same as if one process had counted all."""
        confusions = [part.mean_mask for part in parts]
        return Counted(
            totals=Totals.merged([part.totals for part in parts]),
            mean_mask=None
            if None in confusions
            else {index: found for part in confusions for index, found in (part or {}).items()},
        )

    def mean_mask_records(self) -> Records | None:
        """The records with the confusion that the mean mask has got.

        Only `segtrain.evaluation.figures.CONFUSION_FIGURES` may be asked of them.
        """
        if self.mean_mask is None:
            return None
        records = self.totals.records.copy()
        found = [self.mean_mask[index] for index in records["index"].tolist()]
        records["confusion"] = np.reshape(found, records["confusion"].shape)
        return records


class Counting:
    """Takes answers a few at a time and works on all cores; a context, which ends its threads."""

    def __init__(
        self,
        pictures: Pictures,
        *,
        threshold: float,
        mean_mask: MeanMask | None,
        onlookers: Sequence[Onlooker],
    ) -> None:
        sources = np.repeat(np.arange(len(pictures.lengths)), pictures.lengths)
        self._tally = Tally(pictures.catalog, sources, threshold)
        self._threshold, self._mean, self._onlookers = threshold, mean_mask, onlookers
        self._mean_confusions: dict[int, Counts] = {}
        self._pool = ThreadPoolExecutor(usable_cores())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, answers: Sequence[Answer]) -> None:
        """Count each of them."""
        for answer, counts in zip(answers, self._pool.map(self._count, answers), strict=True):
            self._tally.add(answer.index, counts)

    def counted(self) -> Counted:
        """All so far."""
        return Counted(
            totals=self._tally.totals(),
            mean_mask=None if self._mean is None else self._mean_confusions,
        )

    def _count(self, answer: Answer) -> PictureCounts:
        for onlooker in self._onlookers:
            onlooker(answer.index, answer.probs, answer.mask)
        if self._mean is not None:
            predicted = self._mean.answer(answer.mask.shape)
            self._mean_confusions[answer.index] = confusion_of(predicted, answer.mask)
        return count_picture(answer.probs, answer.mask, threshold=self._threshold)
