"""Numbers for people: a table."""

from rich.table import Table

from segtrain.evaluation.judge import Judgement
from segtrain.evaluation.metrics import EMPTY_RULE


def metrics_table(judgement: Judgement) -> Table:
    """The headline first, and beside it what the trivial answers would have got."""
    metrics = judgement.metrics
    table = Table(
        title=f"{judgement.split}: {judgement.num_images} images at original resolution",
        caption=EMPTY_RULE,
    )
    table.add_column("metric")
    table.add_column("network", justify="right")
    table.add_column("all person", justify="right")
    table.add_column("all background", justify="right")
    table.add_row(
        "[bold]person IoU (global)[/bold]",
        f"[bold]{metrics.person_iou:.4f}[/bold]",
        f"{metrics.all_person_iou:.4f}",
        f"{metrics.all_background_iou:.4f}",
    )
    table.add_row("mean IoU", f"{metrics.mean_iou:.4f}")
    table.add_row("Dice", f"{metrics.dice:.4f}")
    table.add_row("pixel accuracy", f"{metrics.pixel_accuracy:.4f}")
    return table
