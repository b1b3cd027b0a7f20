"""The judgement as JSON: `segtrain eval --json`, and reading it back for `--compare`.

The schema is docs/eval.schema.json; its names are those of metrics.jsonl without `val/`.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from segtrain.errors import DataError
from segtrain.evaluation.bootstrap import Comparison, Interval
from segtrain.evaluation.figures import columns_of, image_ious, reliability, sums_of
from segtrain.evaluation.judgement import Figures, Judgement
from segtrain.evaluation.records import Records, records_as_lists, records_from_lists

LowHigh = tuple[float, float]


class SliceJson(TypedDict):
    """The figures of some of the pictures."""

    group: str
    name: str
    num_images: int
    figures: dict[str, float]
    intervals: dict[str, LowHigh]


class CurvesJson(TypedDict):
    """What other thresholds would have given; lists of 256 numbers."""

    thresholds: list[float]
    person_iou: list[float]
    precision: list[float]
    recall: list[float]
    average_precision: float
    best_threshold: float
    best_person_iou: float


class ReliabilityJson(TypedDict):
    """Of each of 16 bins of probability; lists of 16 numbers."""

    share: list[float]
    mean_probability: list[float]
    person_share: list[float]


class ComparisonJson(TypedDict):
    """This judgement against another one, over the pictures of both."""

    num_common: int
    num_other_truth: int
    other: dict[str, float]
    this: dict[str, float]
    differences: dict[str, float]
    intervals: dict[str, LowHigh]


class JudgementJson(TypedDict):
    """A judgement; figures are in 0..1, intervals hold 95 %."""

    version: Literal[2]
    kind: Literal["checkpoint", "predictions"]
    path: str
    model: str | None
    data: list[str]
    split: str
    manifest: str
    num_images: int
    num_damaged: int
    num_trained_on: int
    threshold: float
    size: int | None
    bn: str | None
    tta: str
    tile: int | None
    limit: int | None
    figures: dict[str, float]
    intervals: dict[str, LowHigh]
    trivial: dict[str, dict[str, float]]
    slices: list[SliceJson]
    curves: CurvesJson
    reliability: ReliabilityJson
    comparison: ComparisonJson | None
    images: dict[str, list[Any]]
    """Columns with an entry for each picture: image_id, person_iou, and all that was counted."""


def as_document(judgement: Judgement) -> JudgementJson:
    """Plain types; the same judgement gives the same."""
    records, manner = judgement.totals.records, judgement.manner
    share, mean, person = reliability(sums_of(columns_of(records)))
    best_threshold, best_iou = judgement.curves.best
    return JudgementJson(
        version=2,
        kind=judgement.subject.kind,
        path=str(judgement.subject.path),
        model=judgement.subject.model,
        data=list(map(str, judgement.exam.data)),
        split=judgement.exam.split,
        manifest=judgement.exam.manifest,
        num_images=judgement.num_images,
        num_damaged=judgement.exam.num_damaged,
        num_trained_on=judgement.exam.num_trained_on,
        threshold=manner.threshold,
        size=manner.size,
        bn=manner.bn,
        tta=manner.tta,
        tile=manner.tile,
        limit=manner.limit,
        figures=_values(judgement.figures),
        intervals=_intervals(judgement.figures),
        trivial={name: _values(figures) for name, figures in judgement.trivial.items()},
        slices=[
            SliceJson(
                group=part.group,
                name=part.name,
                num_images=part.num_images,
                figures=_values(part.figures),
                intervals=_intervals(part.figures),
            )
            for part in judgement.slices
        ],
        curves=CurvesJson(
            thresholds=judgement.curves.thresholds.tolist(),
            person_iou=judgement.curves.person_iou.tolist(),
            precision=judgement.curves.precision.tolist(),
            recall=judgement.curves.recall.tolist(),
            average_precision=judgement.curves.average_precision,
            best_threshold=best_threshold,
            best_person_iou=best_iou,
        ),
        reliability=ReliabilityJson(
            share=share.tolist(), mean_probability=mean.tolist(), person_share=person.tolist()
        ),
        comparison=None if judgement.comparison is None else _comparison(judgement.comparison),
        images={
            "image_id": list(judgement.image_ids),
            "person_iou": image_ious(records).tolist(),
            **records_as_lists(records),
        },
    )


def read_records(path: Path) -> Records:
    """The pictures' records in a file that `segtrain eval --json` has written.

    Raises:
        DataError: it is no such file, or another version's.
    """
    try:
        # Not by pydantic, which takes no name of a file that is no text; Python's own writes it.
        document = _adapter().validate_python(json.loads(path.read_bytes()))
        return records_from_lists(document["images"])
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; eval --json writes one") from None
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        problem = str(error)
    raise DataError(
        f"{path} is not what eval --json of this version writes ({problem}); judge anew"
    )


def schema() -> dict[str, Any]:
    """The JSON schema of `as_document`."""
    return _adapter().json_schema()


@cache
def _adapter() -> TypeAdapter[JudgementJson]:
    return TypeAdapter(JudgementJson)


def _comparison(comparison: Comparison) -> ComparisonJson:
    return ComparisonJson(
        num_common=comparison.num_common,
        num_other_truth=comparison.num_other_truth,
        other=comparison.first,
        this=comparison.second,
        differences=_values(comparison.differences),
        intervals=_intervals(comparison.differences),
    )


def _values(figures: Figures) -> dict[str, float]:
    return {name: interval.value for name, interval in figures.items()}


def _intervals(figures: dict[str, Interval]) -> dict[str, LowHigh]:
    return {name: (interval.low, interval.high) for name, interval in figures.items()}
