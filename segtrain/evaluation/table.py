"""Numbers for people: tables on a terminal."""

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table

from segtrain.evaluation.bootstrap import Comparison, Interval
from segtrain.evaluation.judgement import Judgement
from segtrain.evaluation.report.words import EMPTY_RULE, cautions, verdict

LABELS = {
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
"""What people are shown, of all `segtrain.evaluation.figures.FIGURES`."""

_IN_SLICES = {
    "person_iou": "person IoU",
    "image_iou": "image IoU",
    "boundary_iou": "boundary IoU",
    "precision": "precision",
    "recall": "recall",
}


def judgement_tables(judgement: Judgement) -> RenderableType:
    """The headline first, and beside it what the trivial answers would have got; then slices."""
    return Group(*_tables(judgement))


def _tables(judgement: Judgement) -> Iterator[RenderableType]:
    yield figures_table(judgement)
    yield slices_table(judgement)
    best, iou = judgement.curves.best
    yield (
        f"best threshold {best:.3f}: person IoU {iou:.4f}; average precision "
        f"{judgement.curves.average_precision:.4f}"
    )
    if judgement.comparison is not None:
        yield comparison_table(judgement.comparison)
        yield from cautions(judgement.comparison)
        yield verdict(judgement.comparison)


def figures_table(judgement: Judgement) -> Table:
    """Each figure with its interval, and the trivial answers'."""
    table = _titled(judgement)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", no_wrap=True)
    for name in judgement.trivial:
        table.add_column(name.replace(" ", "\n"), justify="right")
    for key, label in LABELS.items():
        figure = judgement.figures[key]
        trivial = [_value(figures.get(key)) for figures in judgement.trivial.values()]
        style = "bold" if key == "person_iou" else None
        table.add_row(label, _value(figure), _range(figure), *trivial, style=style)
    return table


def slices_table(judgement: Judgement) -> Table:
    """A row for each slice that has pictures; a group with one such slice says nothing new."""
    table = Table(title="by what the pictures show")
    table.add_column("", no_wrap=True)
    table.add_column("images", justify="right")
    for heading in _IN_SLICES.values():
        table.add_column(heading.replace(" ", "\n"), justify="right")
    for group, all_parts in judgement.slice_groups.items():
        parts = [part for part in all_parts if part.num_images]
        if len(parts) > 1:
            table.add_section()
            table.add_row(group, style="bold")
            for part in parts:
                values = (_value(part.figures[key]) for key in _IN_SLICES)
                table.add_row(f"  {part.name}", str(part.num_images), *values)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """In points, hundredths."""
    table = Table(title="compared", caption="in points")
    table.add_column("metric")
    for heading in ("other", "this", "difference", "95 %"):
        table.add_column(heading, justify="right")
    for key, label in LABELS.items():
        difference = comparison.differences[key]
        table.add_row(
            label,
            f"{100 * comparison.first[key]:.2f}",
            f"{100 * comparison.second[key]:.2f}",
            f"{100 * difference.value:+.2f} ± {100 * difference.half_width:.2f}",
            f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}",
        )
    return table


def batch_norm_table(judgements: Mapping[str, Judgement]) -> Table:
    """A column for each way of batch norm."""
    table = _titled(next(iter(judgements.values())))
    table.add_column("metric")
    for way in judgements:
        table.add_column(f"bn {way}", justify="right")
    for key, label in LABELS.items():
        table.add_row(label, *(_value(found.figures[key]) for found in judgements.values()))
    return table


def _titled(judgement: Judgement) -> Table:
    return Table(
        title=f"{judgement.exam.split}: {judgement.num_images} images at original resolution",
        caption=f"{EMPTY_RULE} Selection {judgement.exam.manifest}.",
    )


def _value(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.value:.4f}"


def _range(interval: Interval) -> str:
    return f"{interval.low:.3f}-{interval.high:.3f}"
