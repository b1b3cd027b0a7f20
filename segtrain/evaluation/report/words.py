"""How the report says things: names of figures, numbers, who was judged and how."""

from collections.abc import Iterator

from segtrain.evaluation.bootstrap import Comparison, Interval
from segtrain.evaluation.judgement import Judgement, Manner

FIGURE_WORDS: dict[str, tuple[str, str]] = {
    "person_iou": ("Person IoU", "intersection over union of all person pixels: the headline"),
    "mean_iou": ("Mean IoU", "mean of the IoU of person and of background"),
    "image_iou": ("Person IoU, mean of pictures", "each picture by itself, all alike"),
    "dice": ("Dice", "F1 of the person pixels"),
    "precision": ("Precision", "share of what was called person that is"),
    "recall": ("Recall", "share of person that was found"),
    "pixel_accuracy": ("Pixel accuracy", "share of pixels whose class is right"),
    "predicted_share": ("Called person", "share of pixels; neither good nor bad"),
    "boundary_iou": ("Boundary IoU", "IoU of the band along the outlines"),
    "image_boundary_iou": ("Boundary IoU, mean of pictures", "each picture by itself"),
    "boundary_precision": ("Outline precision", "share of the predicted outline near the true one"),
    "boundary_recall": ("Outline recall", "share of the true outline near the predicted one"),
    "boundary_f1": ("Outline F1", "harmonic mean of the two"),
    "image_boundary_f1": ("Outline F1, mean of pictures", "each picture by itself"),
    "ece": ("Calibration error", "ECE: how far probabilities are off; less is better"),
}
"""Figure → its name, and what it is; those of the trivial answers stand beside them."""

TRIVIAL_WORDS = {
    "mean mask": "where people were in training",
    "all person": "everything is person",
    "all background": "nothing is person",
}
"""Trivial answer → what it says; in the order in which they are shown."""

EMPTY_RULE = (
    "Pixels marked as ignored are left out of every figure. Where nothing is there to be found or "
    "to be wrong about, a quotient counts as 1: a picture without a person in which none is seen "
    "has IoU 1, and one invented pixel makes it 0."
)

_MINUS, _THIN = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}"


def percent(value: float, digits: int = 2) -> str:
    """0.9432 → 94.32, without the sign, which stands once for a whole table."""
    return f"{100 * value:.{digits}f}".replace("-", _MINUS)


def with_sign(value: float, digits: int = 1) -> str:
    """0.9432 → 94.3 %."""
    return f"{percent(value, digits)}{_THIN}%"


def span(interval: Interval, digits: int = 2) -> str:
    """From low to high; "to" where a minus is near, for a dash would be read as another."""
    dash = " to " if interval.low < 0 else "\N{EN DASH}"
    return f"{percent(interval.low, digits)}{dash}{percent(interval.high, digits)}"


def count(number: int, thing: str) -> str:
    """1 picture, 2 pictures, 5,000 pictures."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def title(judgement: Judgement) -> str:
    """Who was judged on what."""
    subject = judgement.subject
    who = subject.model or ("masks" if subject.kind == "predictions" else "network")
    return f"{who} on {judgement.exam.split}"


def warnings(judgement: Judgement) -> Iterator[str]:
    """What one should know before believing any number."""
    exam = judgement.exam
    if exam.num_trained_on:
        were = "was" if exam.num_trained_on == 1 else "were"
        yield (
            f"{exam.num_trained_on:,} of {count(judgement.num_images, 'picture')} {were} trained "
            "on: what is measured on them says little about others."
        )
    if exam.num_damaged:
        them = "it" if exam.num_damaged == 1 else "they"
        yield f"{count(exam.num_damaged, 'picture')} left out, for {them} could not be read."


def provenance(judgement: Judgement) -> Iterator[tuple[str, str]]:
    """What is needed to measure the same again: term, and what it was."""
    subject, exam = judgement.subject, judgement.exam
    yield "Masks" if subject.kind == "predictions" else "Checkpoint", str(subject.path)
    for root in exam.data:
        yield "Data", str(root)
    if subject.model is not None:
        yield "Network", subject.model
    yield "Split", exam.split
    yield "Pictures", f"{judgement.num_images:,}"
    yield "Damaged", f"{exam.num_damaged:,}"
    yield "Seen in training", f"{exam.num_trained_on:,}"
    yield "Selection", exam.manifest
    yield from _manner(judgement.manner)


def _manner(manner: Manner) -> Iterator[tuple[str, str]]:
    yield "Threshold", f"{manner.threshold:g}"
    if manner.size is not None:
        yield "Seen at", f"short side {manner.size} pixels"
    if manner.tile is not None:
        yield "Tiles", f"{manner.tile} pixels a side"
    if manner.bn is not None:
        yield "Batch norm", f"{manner.bn} statistics"
    yield "Test-time augmentation", manner.tta
    if manner.limit is not None:
        yield "Limit", f"{manner.limit:,} pictures, evenly spread"


def verdict(comparison: Comparison) -> str:
    """Whether this run is better than the other, as far as the pictures can tell."""
    difference = comparison.differences["person_iou"]
    size = f"{percent(abs(difference.value), 1)} ± {percent(difference.half_width, 1)} points"
    if difference.low <= 0 <= difference.high:
        return f"No better and no worse than the other run: {size} of person IoU apart."
    better = "Better" if difference.value > 0 else "Worse"
    return f"{better} than the other run by {size} of person IoU."


def cautions(comparison: Comparison) -> Iterator[str]:
    """What the comparison rests on."""
    yield f"Over the {count(comparison.num_common, 'picture')} that both runs have judged."
    only = comparison.num_first_only, comparison.num_second_only
    if any(only):
        yield f"Left out: {only[0]:,} only in the other run, {only[1]:,} only in this one."
    if comparison.num_other_truth:
        yield (
            f"Of {count(comparison.num_other_truth, 'picture')} the truths differ: the runs were "
            "not held against the same."
        )
