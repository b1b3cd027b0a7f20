"""The rows of the tables of a report."""

from collections.abc import Iterator
from dataclasses import dataclass

from segtrain.evaluation.bootstrap import Comparison, Interval
from segtrain.evaluation.report.format import (
    BASELINE_LABELS,
    METRIC_LABELS,
    low_to_high,
    percent,
)
from segtrain.evaluation.result import EvalResult, SliceMetrics

SLICE_METRICS = ("image_iou", "precision", "recall", "boundary_iou")
"""The metrics of a slice besides person IoU."""

# Metrics of the baselines, which have their own columns.
_BASELINE_METRICS = {"all_person_iou", "all_background_iou"}


@dataclass(frozen=True, kw_only=True)
class HeadlineBar:
    """Person IoU of the result or of a baseline, in 0..1."""

    name: str
    meaning: str
    interval: Interval


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric, formatted.

    baselines: its value for each baseline; "" if it has none.
    """

    name: str
    meaning: str
    value: str
    interval: str
    baselines: list[str]


@dataclass(frozen=True, kw_only=True)
class SliceGroup:
    """The slices of one criterion; `number` as in the gallery."""

    number: int
    name: str
    slices: list[SliceMetrics]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One metric of two runs, formatted.

    significant: whether the interval of the difference excludes 0.
    """

    name: str
    first: str
    second: str
    difference: str
    interval: str
    significant: bool


def metric_name(metric: str) -> str:
    """The name in `METRIC_LABELS`, else the key with spaces."""
    return METRIC_LABELS.get(metric, (metric.replace("_", " "), ""))[0]


def baseline_names(result: EvalResult) -> list[str]:
    """The baselines of a result, in the order of `BASELINE_LABELS`."""
    known = [name for name in BASELINE_LABELS if name in result.baselines]
    return known + [name for name in result.baselines if name not in known]


def headline_bars(result: EvalResult) -> Iterator[HeadlineBar]:
    """Person IoU of the result, then of the baselines."""
    own_name = "these masks" if result.model_info.kind == "predictions" else "this model"
    yield HeadlineBar(name=own_name, meaning="", interval=result.metrics["person_iou"])
    for name in baseline_names(result):
        interval = result.baselines[name]["person_iou"]
        yield HeadlineBar(name=name, meaning=BASELINE_LABELS.get(name, ""), interval=interval)


def metric_rows(result: EvalResult) -> Iterator[MetricRow]:
    """A row for each metric of the result, in its order."""
    baselines = [result.baselines[name] for name in baseline_names(result)]
    for metric, interval in result.metrics.items():
        if metric in _BASELINE_METRICS:
            continue
        yield MetricRow(
            name=metric_name(metric),
            meaning=METRIC_LABELS.get(metric, ("", ""))[1],
            value=percent(interval.value),
            interval=low_to_high(interval),
            baselines=[
                percent(baseline[metric].value) if metric in baseline else ""
                for baseline in baselines
            ],
        )


def slice_groups(result: EvalResult) -> list[SliceGroup]:
    """The slices of a result, group by group, in its order."""
    return [
        SliceGroup(number=number, name=name, slices=slices)
        for number, (name, slices) in enumerate(result.slice_groups.items())
    ]


def comparison_rows(comparison: Comparison) -> Iterator[ComparisonRow]:
    """A row for each metric: the other run, this one, and the difference."""
    for metric, difference in comparison.differences.items():
        if metric in _BASELINE_METRICS:
            continue
        plus = "+" if difference.value > 0 else ""
        yield ComparisonRow(
            name=metric_name(metric),
            first=percent(comparison.first[metric]),
            second=percent(comparison.second[metric]),
            difference=f"{plus}{percent(difference.value)} ± {percent(difference.half_width)}",
            interval=low_to_high(difference),
            significant=not difference.low <= 0 <= difference.high,
        )
