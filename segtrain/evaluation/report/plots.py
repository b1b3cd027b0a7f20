"""The plots of a report: coordinates of everything, which a template draws as SVG.

Metrics in 0..1 are mapped to pixels of a fixed canvas here. Colors are left to the style sheet. So
equal results give the same bytes, and the plots follow the light and dark themes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from segtrain.evaluation.counts import NUM_RELIABILITY_BINS
from segtrain.evaluation.metrics import (
    Floats,
    image_ious,
    metric_columns,
    reliability,
    sum_columns,
)
from segtrain.evaluation.report.format import low_to_high, percent, percent_sign
from segtrain.evaluation.result import EvalResult

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 428, 12, 246
"""The canvas, and the frame of the axes on it, in pixels."""

NUM_HISTOGRAM_BINS = 20

_TABLE_STEP = 16  # every 16th of the 256 thresholds is in the table of a plot


@dataclass(frozen=True)
class Tick:
    """A label at a position of an axis."""

    position: float
    label: str


@dataclass(frozen=True)
class Curve:
    """An SVG path."""

    path: str
    css_class: str


@dataclass(frozen=True)
class Bar:
    """A rectangle with a tooltip."""

    x: float
    y: float
    width: float
    height: float
    css_class: str
    tooltip: str


@dataclass(frozen=True)
class Marker:
    """A dot with a tooltip."""

    x: float
    y: float
    css_class: str
    tooltip: str


@dataclass(frozen=True)
class LegendEntry:
    """A line of the legend; `css_class` as in the plot, or "none" for text alone."""

    css_class: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot, and its data as a table.

    summary: the main result in a sentence.
    """

    title: str
    summary: str
    x_label: str
    y_label: str
    y_ticks: Sequence[Tick]
    bars: Sequence[Bar] = ()
    curves: Sequence[Curve] = ()
    markers: Sequence[Marker] = ()
    legend: Sequence[LegendEntry] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    x_ticks: Sequence[Tick] = field(default_factory=lambda: _percent_ticks(_x))


def build_plots(result: EvalResult) -> Iterator[Plot]:
    """All plots of a result."""
    if not is_binary(result):
        yield threshold_plot(result)
        yield precision_recall_plot(result)
        yield reliability_plot(result)
    yield histogram_plot(result)


def is_binary(result: EvalResult) -> bool:
    """Whether every probability is 0 or 1, as in masks: the threshold then has no effect."""
    return not result.totals.histogram[:, 1:-1].any()


def threshold_plot(result: EvalResult) -> Plot:
    """Person IoU over the threshold, with the threshold used and the best one."""
    curves, used = result.curves, result.totals.threshold
    used_iou = result.metrics["person_iou"].value
    best, best_iou = curves.best
    return Plot(
        title="Person IoU over the threshold",
        summary=f"{percent_sign(used_iou)} at the threshold used, {used:g}; "
        f"{percent_sign(best_iou)} at the best one, {best:.3f}.",
        x_label="threshold",
        y_label="person IoU, %",
        y_ticks=_percent_ticks(_y),
        x_ticks=[Tick(_x(k / 4), f"{k / 4:g}") for k in range(5)],
        curves=[
            Curve(_path([used, used], [0, used_iou]), "guide"),
            Curve(_path(curves.thresholds, curves.person_iou), "curve"),
        ],
        markers=[
            Marker(_x(best), _y(best_iou), "best", f"best: {best:.3f}"),
            Marker(_x(used), _y(used_iou), "used", f"used: {used:g}"),
        ],
        legend=[
            LegendEntry("used", f"used: {used:g}, IoU {percent_sign(used_iou)}"),
            LegendEntry("best", f"best: {best:.3f}, IoU {percent_sign(best_iou)}"),
        ],
        header=["threshold", "person IoU, %"],
        rows=[
            [f"{curves.thresholds[k]:.4f}", percent(curves.person_iou[k])]
            for k in range(0, len(curves.thresholds), _TABLE_STEP)
        ],
    )


def precision_recall_plot(result: EvalResult) -> Plot:
    """Precision over recall, one point for each threshold."""
    curves, used = result.curves, result.totals.threshold
    precision, recall = (result.metrics[name].value for name in ("precision", "recall"))
    return Plot(
        title="Precision and recall",
        summary=f"Average precision {percent_sign(curves.average_precision)}; precision "
        f"{percent_sign(precision)} at recall {percent_sign(recall)} at the threshold used.",
        x_label="recall, %",
        y_label="precision, %",
        y_ticks=_percent_ticks(_y),
        curves=[Curve(_path(curves.recall, curves.precision), "curve")],
        markers=[Marker(_x(recall), _y(precision), "used", f"used: {used:g}")],
        legend=[
            LegendEntry("used", f"used: {used:g}"),
            LegendEntry("none", f"average precision {percent_sign(curves.average_precision)}"),
        ],
        header=["recall, %", "precision, %", "threshold"],
        rows=[
            [
                percent(curves.recall[k]),
                percent(curves.precision[k]),
                f"{curves.thresholds[k]:.4f}",
            ]
            for k in range(0, len(curves.thresholds), _TABLE_STEP)
        ],
    )


def reliability_plot(result: EvalResult) -> Plot:
    """Fraction of person over the predicted probability, and how often it was predicted."""
    fractions, means, persons = reliability(sum_columns(metric_columns(result.totals.records)))
    nonempty = fractions > 0
    ece = result.metrics["ece"]
    edges = np.arange(NUM_RELIABILITY_BINS + 1) / NUM_RELIABILITY_BINS
    points = list(zip(means[nonempty], persons[nonempty], fractions[nonempty], strict=True))
    tooltips = [f"{percent_sign(fraction)} of pixels" for fraction in fractions]
    return Plot(
        title="Reliability",
        summary=f"ECE {percent_sign(ece.value, 2)}: mean distance over pixels between the "
        "probability and the fraction of person.",
        x_label="probability of person, %",
        y_label="fraction, %",
        y_ticks=_percent_ticks(_y),
        bars=list(_bars(edges, fractions, tooltips)),
        curves=[
            Curve(_path([0, 1], [0, 1]), "guide"),
            Curve(_path(means[nonempty], persons[nonempty]), "curve"),
        ],
        markers=[
            Marker(
                _x(mean),
                _y(person),
                "point",
                f"predicted {percent_sign(mean)}, true {percent_sign(person)}, "
                f"{percent_sign(fraction)} of pixels",
            )
            for mean, person, fraction in points
        ],
        legend=[
            LegendEntry("point", "fraction of person"),
            LegendEntry("bar", "fraction of all pixels"),
            LegendEntry("none", f"ECE {percent_sign(ece.value, 2)} ({low_to_high(ece)})"),
        ],
        header=["mean probability, %", "fraction of person, %", "fraction of pixels, %"],
        rows=[[percent(value) for value in point] for point in points],
    )


def histogram_plot(result: EvalResult) -> Plot:
    """Number of images over their person IoU."""
    ious = image_ious(result.totals.records)
    counts, edges = np.histogram(ious, bins=NUM_HISTOGRAM_BINS, range=(0, 1))
    top = _axis_top(int(counts.max(initial=0)))
    ranges = [
        f"{percent(low, 0)} to {percent(high, 0)} %" for low, high in itertools.pairwise(edges)
    ]
    tooltips = [f"{name}: {number:,}" for name, number in zip(ranges, counts, strict=True)]
    median = f"median {percent_sign(float(np.median(ious)))}" if len(ious) else "no images"
    worst = f", worst {percent_sign(float(ious.min()))}" if len(ious) else ""
    return Plot(
        title="Images by person IoU",
        summary=f"Person IoU of each image: {median}{worst}.",
        x_label="person IoU of an image, %",
        y_label="images",
        y_ticks=[Tick(_y(k / 4), f"{top * k // 4:,}") for k in range(5)],
        bars=list(_bars(edges, counts / top, tooltips, css_class="histogram")),
        legend=[LegendEntry("none", f"{median}{worst}")],
        header=["IoU", "images"],
        rows=[[name, f"{number:,}"] for name, number in zip(ranges, counts, strict=True)],
    )


def _axis_top(highest: int) -> int:
    """The smallest 4 * (1, 2, 5, 10, 20, 50, ...) that is at least `highest`."""
    step = 1
    while 4 * step < highest:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return 4 * step


def _bars(
    edges: Floats, heights: Floats, tooltips: Sequence[str], css_class: str = "bar"
) -> Iterator[Bar]:
    for low, high, height, tooltip in zip(edges[:-1], edges[1:], heights, tooltips, strict=True):
        if height > 0:
            x, y = _x(low) + 1, _y(height)
            yield Bar(x, y, round(_x(high) - x - 1, 2), round(BOTTOM - y, 2), css_class, tooltip)


def _path(xs: Iterable[float], ys: Iterable[float]) -> str:
    """An SVG path of straight lines; "" without points."""
    points = [f"{_x(x):g} {_y(y):g}" for x, y in zip(xs, ys, strict=True)]
    return f"M{' L'.join(points)}" if points else ""


def _percent_ticks(to_pixels: Callable[[float], float]) -> list[Tick]:
    return [Tick(to_pixels(k / 4), f"{25 * k}") for k in range(5)]


def _x(value: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * float(value), 2)


def _y(value: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * float(value), 2)
