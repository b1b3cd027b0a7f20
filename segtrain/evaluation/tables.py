"""Tables of the metrics for the terminal."""

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table

from segtrain.evaluation.bootstrap import Comparison, Interval
from segtrain.evaluation.report.format import EMPTY_RULE, cautions, verdict
from segtrain.evaluation.result import EvalResult

METRIC_NAMES = {
    "person_iou": "person IoU (global)",
    "mean_iou": "mean IoU",
    "image_iou": "image IoU (mean)",
    "dice": "Dice",
    "precision": "precision",
    "recall": "recall",
    "pixel_accuracy": "pixel accuracy",
    "boundary_iou": "boundary IoU",
    "image_boundary_iou": "boundary IoU (mean)",
    "boundary_f1": "boundary F",
    "ece": "calibration error",
}
"""Metric → its name; the other `segtrain.evaluation.metrics.METRICS` are not shown."""

_SLICE_METRIC_NAMES = {
    "person_iou": "person IoU",
    "image_iou": "image IoU",
    "boundary_iou": "boundary IoU",
    "precision": "precision",
    "recall": "recall",
}


def result_tables(result: EvalResult) -> RenderableType:
    """All tables of a result: metrics with baselines, slices, thresholds, and the comparison."""
    return Group(*_result_tables(result))


def _result_tables(result: EvalResult) -> Iterator[RenderableType]:
    yield metrics_table(result)
    yield slices_table(result)
    best, iou = result.curves.best
    yield (
        f"best threshold {best:.3f}: person IoU {iou:.4f}; average precision "
        f"{result.curves.average_precision:.4f}"
    )
    if result.comparison is not None:
        yield comparison_table(result.comparison)
        yield from cautions(result.comparison)
        yield verdict(result.comparison)


def metrics_table(result: EvalResult) -> Table:
    """A row for each metric, with its interval and its values for the baselines."""
    table = _new_table(result)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", no_wrap=True)
    for name in result.baselines:
        table.add_column(name.replace(" ", "\n"), justify="right")
    for metric, name in METRIC_NAMES.items():
        interval = result.metrics[metric]
        baselines = [_value(metrics.get(metric)) for metrics in result.baselines.values()]
        style = "bold" if metric == "person_iou" else None
        table.add_row(name, _value(interval), _range(interval), *baselines, style=style)
    return table


def slices_table(result: EvalResult) -> Table:
    """A row for each slice with images; groups with a single such slice are left out."""
    table = Table(title="slices")
    table.add_column("", no_wrap=True)
    table.add_column("images", justify="right")
    for heading in _SLICE_METRIC_NAMES.values():
        table.add_column(heading.replace(" ", "\n"), justify="right")
    for group, all_slices in result.slice_groups.items():
        slices = [part for part in all_slices if part.num_images]
        if len(slices) > 1:
            table.add_section()
            table.add_row(group, style="bold")
            for part in slices:
                values = (_value(part.metrics[metric]) for metric in _SLICE_METRIC_NAMES)
                table.add_row(f"  {part.name}", str(part.num_images), *values)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """A row for each metric of two evaluations, in percentage points."""
    table = Table(title="comparison", caption="in percentage points")
    table.add_column("metric")
    for heading in ("other", "this", "difference", "95 %"):
        table.add_column(heading, justify="right")
    for metric, name in METRIC_NAMES.items():
        difference = comparison.differences[metric]
        table.add_row(
            name,
            f"{100 * comparison.first[metric]:.2f}",
            f"{100 * comparison.second[metric]:.2f}",
            f"{100 * difference.value:+.2f} ± {100 * difference.half_width:.2f}",
            f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}",
        )
    return table


def batch_norm_table(results: Mapping[str, EvalResult]) -> Table:
    """A column for each kind of batch-norm statistics."""
    table = _new_table(next(iter(results.values())))
    table.add_column("metric")
    for bn in results:
        table.add_column(f"bn {bn}", justify="right")
    for metric, name in METRIC_NAMES.items():
        table.add_row(name, *(_value(result.metrics[metric]) for result in results.values()))
    return table


def _new_table(result: EvalResult) -> Table:
    return Table(
        title=f"{result.data.split}: {result.num_images} images at original resolution",
        caption=f"{EMPTY_RULE} Selection {result.data.manifest}.",
    )


def _value(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.value:.4f}"


def _range(interval: Interval) -> str:
    return f"{interval.low:.3f}-{interval.high:.3f}"
