"""What comes out of judging: the figures, and everything that stands behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segtrain.classes import BACKGROUND, PERSON
from segtrain.config import BnEval, Tta
from segtrain.evaluation.bootstrap import Comparison, Interval, intervals
from segtrain.evaluation.curves import Curves, curves_of
from segtrain.evaluation.figures import CONFUSION_FIGURES, as_if_all
from segtrain.evaluation.records import Records
from segtrain.evaluation.slices import Members, slices_of
from segtrain.evaluation.totals import Totals

Figures = dict[str, Interval]
"""By the names of `segtrain.evaluation.figures.FIGURES`."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Who was judged.

    kind: a network, or masks that some other tool wrote.
    path: the checkpoint, or the folder of masks.
    model: name of the network, None for masks.
    """

    kind: Literal["checkpoint", "predictions"]
    path: Path
    model: str | None


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How the subject was asked; what makes no sense for masks is None there.

    threshold: from which probability on a pixel is person.
    size: short side at which the network saw the pictures, pixels.
    bn: what batch norm went by.
    tile: side of the square tiles that the network saw, pixels; None if it saw whole pictures.
    limit: so many pictures, evenly spread, were judged; None for all.
    """

    threshold: float = 0.5
    size: int | None = None
    bn: BnEval | None = None
    tta: Tta = "none"
    tile: int | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What the subject was asked about.

    data: the roots of the data sets.
    manifest: hash of the selection.
    num_damaged: pictures left out, for they could not be read.
    num_trained_on: of the pictures, those that the network has seen in training.
    """

    data: tuple[Path, ...]
    split: str
    manifest: str
    num_damaged: int
    num_trained_on: int


@dataclass(frozen=True, kw_only=True)
class SliceFigures:
    """The figures of some of the pictures; group, name and members as those of a `Slice`."""

    group: str
    name: str
    members: Members
    figures: Figures

    @property
    def num_images(self) -> int:
        """How many these are."""
        return int(self.members.sum())


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The result.

    totals: what was counted; `totals.records` has a row for each picture, in the order of index.
    image_ids: the name of each of these pictures, in the same order.
    figures: over all pictures, each with its interval.
    trivial: what answers that look at no picture would have got: "all person", "all background"
        and, where training pictures are at hand, "mean mask"; of each `CONFUSION_FIGURES`.
    slices: of every group all parts, also the empty ones.
    curves: what other thresholds would have given.
    comparison: with another run, that one first; None if there is none.
    """

    subject: Subject
    manner: Manner
    exam: Exam
    totals: Totals
    image_ids: Sequence[str]
    figures: Figures
    trivial: Mapping[str, Figures]
    slices: Sequence[SliceFigures]
    curves: Curves
    comparison: Comparison | None = None

    @property
    def num_images(self) -> int:
        """Pictures that were judged."""
        return len(self.totals.records)

    @property
    def slice_groups(self) -> dict[str, list[SliceFigures]]:
        """Group → its parts."""
        groups: dict[str, list[SliceFigures]] = {}
        for part in self.slices:
            groups.setdefault(part.group, []).append(part)
        return groups


def judgement_of(
    totals: Totals,
    *,
    subject: Subject,
    manner: Manner,
    exam: Exam,
    image_ids: Sequence[str],
    mean_mask: Records | None = None,
    comparison: Comparison | None = None,
) -> Judgement:
    """Work out every figure, with its interval over pictures.

    Args:
        image_ids: in the order of the records.
        mean_mask: the records that the mean of the training masks has got.
    """
    records = totals.records
    answers = {
        "all person": as_if_all(PERSON, records),
        "all background": as_if_all(BACKGROUND, records),
    }
    if mean_mask is not None:
        answers["mean mask"] = mean_mask
    return Judgement(
        subject=subject,
        manner=manner,
        exam=exam,
        totals=totals,
        image_ids=image_ids,
        figures=intervals(records),
        trivial={name: intervals(got, CONFUSION_FIGURES) for name, got in answers.items()},
        slices=[
            SliceFigures(
                group=part.group,
                name=part.name,
                members=part.members,
                figures=intervals(records[part.members]),
            )
            for part in slices_of(records, [root.name for root in exam.data])
        ],
        curves=curves_of(totals.histogram),
        comparison=comparison,
    )
