"""Numbers for people: a table."""

from rich.table import Table

from segtrain.evaluation.judge import Judgement
from segtrain.evaluation.metrics import EMPTY_RULE

_LABELS = {
    "person_iou": "[bold]person IoU (global)[/bold]",
    "mean_iou": "mean IoU",
    "dice": "Dice",
    "pixel_accuracy": "pixel accuracy",
}


def metrics_table(judgement: Judgement) -> Table:
    """The headline first, and beside it what the trivial answers would have got."""
    table = Table(
        title=f"{judgement.split}: {judgement.num_images} images at original resolution",
        caption=f"{EMPTY_RULE}; selection {judgement.manifest}",
    )
    table.add_column("metric")
    for bn_eval in judgement.metrics:
        heading = "network" if len(judgement.metrics) == 1 else f"bn_eval {bn_eval}"
        table.add_column(heading, justify="right")
    table.add_column("all person", justify="right")
    table.add_column("all background", justify="right")
    trivial = next(iter(judgement.metrics.values()))
    for key, label in _LABELS.items():
        cells = [f"{getattr(metrics, key):.4f}" for metrics in judgement.metrics.values()]
        if key == "person_iou":
            cells += [f"{trivial.all_person_iou:.4f}", f"{trivial.all_background_iou:.4f}"]
        table.add_row(label, *cells)
    return table
