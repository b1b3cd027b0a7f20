"""Names of metrics, number formats and sentences of a report."""

from collections.abc import Iterator

from segtrain.evaluation.bootstrap import Comparison, Interval
from segtrain.evaluation.result import EvalResult

METRIC_LABELS: dict[str, tuple[str, str]] = {
    "person_iou": ("Person IoU", "headline metric: IoU of the person pixels of all images"),
    "mean_iou": ("Mean IoU", "mean of the IoU of person and the IoU of background"),
    "image_iou": ("Person IoU, mean of images", "each image has the same weight"),
    "dice": ("Dice", "F1 of the person pixels"),
    "precision": ("Precision", "fraction of predicted person pixels that are person"),
    "recall": ("Recall", "fraction of person pixels that are predicted as person"),
    "pixel_accuracy": ("Pixel accuracy", "fraction of pixels with the right class"),
    "predicted_share": ("Predicted person", "fraction of all pixels; neither good nor bad"),
    "boundary_iou": ("Boundary IoU", "IoU of the bands along the outlines"),
    "image_boundary_iou": ("Boundary IoU, mean of images", "each image has the same weight"),
    "boundary_precision": (
        "Boundary precision",
        "fraction of the predicted outline near the true one",
    ),
    "boundary_recall": ("Boundary recall", "fraction of the true outline near the predicted one"),
    "boundary_f1": ("Boundary F1", "harmonic mean of the two"),
    "image_boundary_f1": ("Boundary F1, mean of images", "each image has the same weight"),
    "ece": ("Calibration error", "ECE: how far probabilities are off; lower is better"),
}
"""Metric → its name and its meaning; the metrics of the baselines have their own columns."""

BASELINE_LABELS = {
    "mean mask": "mean of the training masks",
    "all person": "every pixel is person",
    "all background": "no pixel is person",
}
"""Baseline → its meaning, in display order."""

EMPTY_RULE = (
    "Ignored pixels are left out of every metric. A ratio of 0/0 counts as 1: an image without "
    "people has IoU 1 if no pixel is predicted as person, and 0 if one is."
)

_MINUS, _THIN_SPACE = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}"


def percent(value: float, digits: int = 2) -> str:
    """0.9432 → 94.32, without a percent sign, which tables have in their caption."""
    return f"{100 * value:.{digits}f}".replace("-", _MINUS)


def percent_sign(value: float, digits: int = 1) -> str:
    """0.9432 → 94.3 %."""
    return f"{percent(value, digits)}{_THIN_SPACE}%"


def low_to_high(interval: Interval, digits: int = 2) -> str:
    """The bounds, joined by a dash, or by "to" if a minus sign is next to it."""
    dash = " to " if interval.low < 0 else "\N{EN DASH}"
    return f"{percent(interval.low, digits)}{dash}{percent(interval.high, digits)}"


def count(number: int, noun: str) -> str:
    """1 image, 2 images, 5,000 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def title(result: EvalResult) -> str:
    """What was evaluated on which split."""
    info = result.model_info
    name = info.model or ("masks" if info.kind == "predictions" else "model")
    return f"{name} on {result.data.split}"


def warnings(result: EvalResult) -> Iterator[str]:
    """Reasons to doubt the metrics."""
    data = result.data
    if data.num_trained_on:
        were = "was" if data.num_trained_on == 1 else "were"
        yield (
            f"{data.num_trained_on:,} of {count(result.num_images, 'image')} {were} trained "
            "on: metrics on them say little about other images."
        )
    if data.num_damaged:
        yield f"{count(data.num_damaged, 'image')} left out because of read errors."


def provenance(result: EvalResult) -> Iterator[tuple[str, str]]:
    """Everything needed to repeat the evaluation: term and value."""
    info, data = result.model_info, result.data
    yield "Masks" if info.kind == "predictions" else "Checkpoint", str(info.path)
    for root in data.roots:
        yield "Data", str(root)
    if info.model is not None:
        yield "Model", info.model
    yield "Split", data.split
    yield "Images", f"{result.num_images:,}"
    yield "Damaged", f"{data.num_damaged:,}"
    yield "Trained on", f"{data.num_trained_on:,}"
    yield "Selection", data.manifest
    options, inference = result.options, result.options.inference
    yield "Threshold", f"{options.threshold:g}"
    if inference.size is not None:
        yield "Input size", f"short side {inference.size} pixels"
    if inference.tile is not None:
        yield "Tiles", f"{inference.tile} x {inference.tile} pixels"
    if inference.bn is not None:
        yield "Batch norm", f"{inference.bn} statistics"
    yield "Test-time augmentation", inference.tta
    if options.limit is not None:
        yield "Limit", f"{options.limit:,} images, evenly spaced"


def verdict(comparison: Comparison) -> str:
    """Whether this result is better than the other one, within the interval of the difference."""
    difference = comparison.differences["person_iou"]
    size = f"{percent(abs(difference.value), 1)} ± {percent(difference.half_width, 1)} points"
    if difference.low <= 0 <= difference.high:
        return f"No significant difference from the other run: {size} of person IoU."
    better = "Better" if difference.value > 0 else "Worse"
    return f"{better} than the other run by {size} of person IoU."


def cautions(comparison: Comparison) -> Iterator[str]:
    """The images that the comparison is based on."""
    yield f"Over the {count(comparison.num_common, 'image')} of both runs."
    first, second = comparison.num_first_only, comparison.num_second_only
    if first or second:
        yield f"Left out: {first:,} only in the other run, {second:,} only in this one."
    if comparison.num_other_truth:
        images = count(comparison.num_other_truth, "image")
        yield f"The ground truth of {images} differs between the runs."
