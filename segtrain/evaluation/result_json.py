"""The result as JSON: `segtrain eval --json`, and reading it back for `--compare`.

The schema is docs/eval.schema.json. Metrics have the names of metrics.jsonl, without `val/`.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from segtrain.errors import DataError
from segtrain.evaluation.bootstrap import Comparison
from segtrain.evaluation.counts import Records, records_from_lists, records_to_lists
from segtrain.evaluation.metrics import image_ious, metric_columns, reliability, sum_columns
from segtrain.evaluation.result import EvalResult, MetricIntervals

LowHigh = tuple[float, float]


class SliceJson(TypedDict):
    """The metrics of some of the images."""

    group: str
    name: str
    num_images: int
    metrics: dict[str, float]
    intervals: dict[str, LowHigh]


class CurvesJson(TypedDict):
    """Metrics at other thresholds; lists of 256 numbers."""

    thresholds: list[float]
    person_iou: list[float]
    precision: list[float]
    recall: list[float]
    average_precision: float
    best_threshold: float
    best_person_iou: float


class ReliabilityJson(TypedDict):
    """Reliability diagram; lists of a number for each of 16 bins of probability."""

    share: list[float]
    mean_probability: list[float]
    person_fraction: list[float]


class ComparisonJson(TypedDict):
    """This result compared with another, over the images of both."""

    num_common: int
    num_other_truth: int
    other: dict[str, float]
    this: dict[str, float]
    differences: dict[str, float]
    intervals: dict[str, LowHigh]


class EvalResultJson(TypedDict):
    """Result of an evaluation; metrics are in 0..1, intervals are 95 % intervals."""

    version: Literal[3]
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
    metrics: dict[str, float]
    intervals: dict[str, LowHigh]
    baselines: dict[str, dict[str, float]]
    slices: list[SliceJson]
    curves: CurvesJson
    reliability: ReliabilityJson
    comparison: ComparisonJson | None
    images: dict[str, list[Any]]
    """Columns with an entry for each image: image_id, person_iou and all counts."""


def result_to_json(result: EvalResult) -> EvalResultJson:
    """Convert a result to plain types; equal results give equal JSON."""
    records, options = result.totals.records, result.options
    inference = options.inference
    fraction, mean, person = reliability(sum_columns(metric_columns(records)))
    best_threshold, best_iou = result.curves.best
    return EvalResultJson(
        version=3,
        kind=result.model_info.kind,
        path=str(result.model_info.path),
        model=result.model_info.model,
        data=list(map(str, result.data.roots)),
        split=result.data.split,
        manifest=result.data.manifest,
        num_images=result.num_images,
        num_damaged=result.data.num_damaged,
        num_trained_on=result.data.num_trained_on,
        threshold=options.threshold,
        size=inference.size,
        bn=inference.bn,
        tta=inference.tta,
        tile=None if inference.tile == "auto" else inference.tile,
        limit=options.limit,
        metrics=_values(result.metrics),
        intervals=_intervals(result.metrics),
        baselines={name: _values(metrics) for name, metrics in result.baselines.items()},
        slices=[
            SliceJson(
                group=part.group,
                name=part.name,
                num_images=part.num_images,
                metrics=_values(part.metrics),
                intervals=_intervals(part.metrics),
            )
            for part in result.slices
        ],
        curves=CurvesJson(
            thresholds=result.curves.thresholds.tolist(),
            person_iou=result.curves.person_iou.tolist(),
            precision=result.curves.precision.tolist(),
            recall=result.curves.recall.tolist(),
            average_precision=result.curves.average_precision,
            best_threshold=best_threshold,
            best_person_iou=best_iou,
        ),
        reliability=ReliabilityJson(
            share=fraction.tolist(), mean_probability=mean.tolist(), person_fraction=person.tolist()
        ),
        comparison=None if result.comparison is None else _comparison(result.comparison),
        images={
            "image_id": list(result.image_ids),
            "person_iou": image_ious(records).tolist(),
            **records_to_lists(records),
        },
    )


def read_records(path: Path) -> Records:
    """Read the records of the images from a file written by `segtrain eval --json`.

    Raises:
        DataError: the file cannot be read, is another file or has another version.
    """
    try:
        # json, not pydantic, whose parser rejects the surrogates of file names that are not UTF-8.
        document = _adapter().validate_python(json.loads(path.read_bytes()))
        return records_from_lists(document["images"])
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}", "eval --json writes such a file"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        problem = str(error)
    raise DataError(
        f"{path} is not an eval --json file of this version ({problem})", "evaluate again"
    )


def schema() -> dict[str, Any]:
    """The JSON schema of `result_to_json`."""
    return _adapter().json_schema()


@cache
def _adapter() -> TypeAdapter[EvalResultJson]:
    return TypeAdapter(EvalResultJson)


def _comparison(comparison: Comparison) -> ComparisonJson:
    return ComparisonJson(
        num_common=comparison.num_common,
        num_other_truth=comparison.num_other_truth,
        other=comparison.first,
        this=comparison.second,
        differences=_values(comparison.differences),
        intervals=_intervals(comparison.differences),
    )


def _values(metrics: MetricIntervals) -> dict[str, float]:
    return {name: interval.value for name, interval in metrics.items()}


def _intervals(metrics: MetricIntervals) -> dict[str, LowHigh]:
    return {name: (interval.low, interval.high) for name, interval in metrics.items()}
