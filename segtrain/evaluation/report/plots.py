"""The plots of a report: where everything goes, for the template that draws it as SVG.

Figures in 0..1 go to pixels of a fixed canvas here, colours are left to the style sheet, so that a
plot is the same bytes for the same judgement and follows light and dark.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from segtrain.evaluation.figures import Floats, columns_of, image_ious, reliability, sums_of
from segtrain.evaluation.judgement import Judgement
from segtrain.evaluation.picture import NUM_RELIABILITY_BINS
from segtrain.evaluation.report.words import percent, span, with_sign

WIDTH, HEIGHT = 440, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 428, 12, 246
"""The canvas, and the frame upon it in which figures lie, pixels."""

NUM_HISTOGRAM_BINS = 20

_EVERY = 16  # of the 256 thresholds, in the table of numbers


@dataclass(frozen=True)
class Tick:
    """A label at a place of an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A path; `look` is the class that the style sheet knows."""

    path: str
    look: str


@dataclass(frozen=True)
class Box:
    """A bar with what a pointer upon it is told."""

    x: float
    y: float
    width: float
    height: float
    look: str
    tip: str


@dataclass(frozen=True)
class Mark:
    """A dot."""

    x: float
    y: float
    look: str
    tip: str


@dataclass(frozen=True)
class Key:
    """A line of the legend; `look` as in the plot."""

    look: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot, and the same in numbers for those who would rather read.

    summary: what there is to see, in a sentence.
    """

    title: str
    summary: str
    x_label: str
    y_label: str
    y_ticks: Sequence[Tick]
    boxes: Sequence[Box] = ()
    curves: Sequence[Curve] = ()
    marks: Sequence[Mark] = ()
    keys: Sequence[Key] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    x_ticks: Sequence[Tick] = field(default_factory=lambda: _percent_ticks(_x))


def plots_of(judgement: Judgement) -> Iterator[Plot]:
    """All that the judgement can be drawn as."""
    if not is_hard(judgement):
        yield threshold_plot(judgement)
        yield precision_recall_plot(judgement)
        yield reliability_plot(judgement)
    yield histogram_plot(judgement)


def is_hard(judgement: Judgement) -> bool:
    """Whether every probability is 0 or 1, as of masks: no threshold then changes anything."""
    return not judgement.totals.histogram[:, 1:-1].any()


def threshold_plot(judgement: Judgement) -> Plot:
    """Person IoU over the threshold, with the one that was used and the best one."""
    curves, used = judgement.curves, judgement.totals.threshold
    reached = judgement.figures["person_iou"].value
    best, highest = curves.best
    return Plot(
        title="Person IoU at other thresholds",
        summary=f"{with_sign(reached)} at {used:g} as used; at best {with_sign(highest)}, "
        f"at {best:.3f}.",
        x_label="threshold",
        y_label="person IoU, %",
        y_ticks=_percent_ticks(_y),
        x_ticks=[Tick(_x(k / 4), f"{k / 4:g}") for k in range(5)],
        curves=[
            Curve(_path([used, used], [0, reached]), "guide"),
            Curve(_path(curves.thresholds, curves.person_iou), "curve"),
        ],
        marks=[
            Mark(_x(best), _y(highest), "best", f"best: {best:.3f}"),
            Mark(_x(used), _y(reached), "used", f"used: {used:g}"),
        ],
        keys=[
            Key("used", f"used: {used:g}, IoU {with_sign(reached)}"),
            Key("best", f"best: {best:.3f}, IoU {with_sign(highest)}"),
        ],
        head=["threshold", "person IoU, %"],
        rows=[
            [f"{curves.thresholds[at]:.4f}", percent(curves.person_iou[at])]
            for at in range(0, len(curves.thresholds), _EVERY)
        ],
    )


def precision_recall_plot(judgement: Judgement) -> Plot:
    """Precision over recall, threshold by threshold."""
    curves, used = judgement.curves, judgement.totals.threshold
    precision, recall = (judgement.figures[name].value for name in ("precision", "recall"))
    return Plot(
        title="Precision and recall",
        summary=f"Average precision {with_sign(curves.average_precision)}; as used, precision "
        f"{with_sign(precision)} at recall {with_sign(recall)}.",
        x_label="recall, %",
        y_label="precision, %",
        y_ticks=_percent_ticks(_y),
        curves=[Curve(_path(curves.recall, curves.precision), "curve")],
        marks=[Mark(_x(recall), _y(precision), "used", f"used: {used:g}")],
        keys=[
            Key("used", f"used: {used:g}"),
            Key("none", f"average precision {with_sign(curves.average_precision)}"),
        ],
        head=["recall, %", "precision, %", "threshold"],
        rows=[
            [
                percent(curves.recall[at]),
                percent(curves.precision[at]),
                f"{curves.thresholds[at]:.4f}",
            ]
            for at in range(0, len(curves.thresholds), _EVERY)
        ],
    )


def reliability_plot(judgement: Judgement) -> Plot:
    """Share of person over the probability that was given, and how often that was."""
    shares, means, persons = reliability(sums_of(columns_of(judgement.totals.records)))
    some = shares > 0
    ece = judgement.figures["ece"]
    edges = np.arange(NUM_RELIABILITY_BINS + 1) / NUM_RELIABILITY_BINS
    points = list(zip(means[some], persons[some], shares[some], strict=True))
    return Plot(
        title="Reliability",
        summary=f"ECE {with_sign(ece.value, 2)}: so far are probabilities from shares of person, "
        "in the mean over pixels.",
        x_label="probability of person, %",
        y_label="share, %",
        y_ticks=_percent_ticks(_y),
        boxes=list(_bars(edges, shares, [f"{with_sign(share)} of pixels" for share in shares])),
        curves=[
            Curve(_path([0, 1], [0, 1]), "guide"),
            Curve(_path(means[some], persons[some]), "curve"),
        ],
        marks=[
            Mark(
                _x(mean),
                _y(person),
                "point",
                f"said {with_sign(mean)}, was {with_sign(person)}, {with_sign(share)} of pixels",
            )
            for mean, person, share in points
        ],
        keys=[
            Key("point", "share that is person"),
            Key("bar", "share of all pixels"),
            Key("none", f"ECE {with_sign(ece.value, 2)} ({span(ece)})"),
        ],
        head=["mean probability, %", "share that is person, %", "share of pixels, %"],
        rows=[[percent(value) for value in point] for point in points],
    )


def histogram_plot(judgement: Judgement) -> Plot:
    """How many pictures have which IoU."""
    ious = image_ious(judgement.totals.records)
    counts, edges = np.histogram(ious, bins=NUM_HISTOGRAM_BINS, range=(0, 1))
    top = _round_top(int(counts.max(initial=0)))
    ranges = [
        f"{percent(low, 0)} to {percent(high, 0)} %" for low, high in itertools.pairwise(edges)
    ]
    middle = f"median {with_sign(float(np.median(ious)))}" if len(ious) else "no pictures"
    worst = f", worst {with_sign(float(ious.min()))}" if len(ious) else ""
    return Plot(
        title="Pictures by their IoU",
        summary=f"Person IoU of each picture by itself: {middle}{worst}.",
        x_label="person IoU of a picture, %",
        y_label="pictures",
        y_ticks=[Tick(_y(k / 4), f"{top * k // 4:,}") for k in range(5)],
        boxes=list(
            _bars(
                edges,
                counts / top,
                [f"{name}: {number:,}" for name, number in zip(ranges, counts, strict=True)],
                look="histogram",
            )
        ),
        keys=[Key("none", f"{middle}{worst}")],
        head=["IoU", "pictures"],
        rows=[[name, f"{number:,}"] for name, number in zip(ranges, counts, strict=True)],
    )


def _round_top(highest: int) -> int:
    """The smallest number with four equal whole parts that is not below `highest`."""
    step = 1
    while 4 * step < highest:
        # 1, 2, 5, 10, 20, 50, ...
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return 4 * step


def _bars(edges: Floats, heights: Floats, tips: Sequence[str], look: str = "bar") -> Iterator[Box]:
    for low, high, height, tip in zip(edges[:-1], edges[1:], heights, tips, strict=True):
        if height > 0:
            x, y = _x(low) + 1, _y(height)
            yield Box(x, y, round(_x(high) - x - 1, 2), round(BOTTOM - y, 2), look, tip)


def _path(xs: Iterable[float], ys: Iterable[float]) -> str:
    """Straight from point to point; "" of none."""
    points = [f"{_x(x):g} {_y(y):g}" for x, y in zip(xs, ys, strict=True)]
    return f"M{' L'.join(points)}" if points else ""


def _percent_ticks(place: Callable[[float], float]) -> list[Tick]:
    return [Tick(place(k / 4), f"{25 * k}") for k in range(5)]


def _x(value: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * float(value), 2)


def _y(value: float) -> float:
    return round(BOTTOM - (BOTTOM - TOP) * float(value), 2)
