"""The result of an evaluation: the metrics, and everything they are computed from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segtrain.evaluation.bootstrap import Comparison, Interval, compute_intervals
from segtrain.evaluation.counts import Records, Totals
from segtrain.evaluation.metrics import CONFUSION_METRICS, constant_prediction
from segtrain.evaluation.options import EvalOptions
from segtrain.evaluation.slices import Members, build_slices
from segtrain.evaluation.thresholds import ThresholdCurves, threshold_curves
from segtrain.types import BACKGROUND, PERSON

MetricIntervals = dict[str, Interval]
"""Keys are those of `segtrain.evaluation.metrics.METRICS`."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What was evaluated.

    kind: a model, or masks written by any tool.
    path: the checkpoint, or the folder of masks.
    model: name of the model; None for masks.
    """

    kind: Literal["checkpoint", "predictions"]
    path: Path
    model: str | None


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """The images of an evaluation.

    roots: of the data sets.
    manifest: hash of the selection.
    num_damaged: images left out because they could not be read.
    num_trained_on: images that the model was trained on.
    """

    roots: tuple[Path, ...]
    split: str
    manifest: str
    num_damaged: int
    num_trained_on: int


@dataclass(frozen=True, kw_only=True)
class SliceMetrics:
    """The metrics of a `segtrain.evaluation.slices.Slice`, with its group, name and members."""

    group: str
    name: str
    members: Members
    metrics: MetricIntervals

    @property
    def num_images(self) -> int:
        """Number of images in the slice."""
        return int(self.members.sum())


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The result of an evaluation.

    totals: the counts; `totals.records` has a row for each image, ordered by index.
    image_ids: the names of these images, in the same order.
    metrics: over all images, each with its interval.
    baselines: `CONFUSION_METRICS` of predictions that ignore the image: "all person", "all
        background" and, if there are training images, "mean mask".
    slices: all slices of every group, also empty ones.
    curves: metrics at other thresholds.
    comparison: with another evaluation, which comes first; None without `--compare`.
    """

    model_info: ModelInfo
    options: EvalOptions
    data: EvalData
    totals: Totals
    image_ids: Sequence[str]
    metrics: MetricIntervals
    baselines: Mapping[str, MetricIntervals]
    slices: Sequence[SliceMetrics]
    curves: ThresholdCurves
    comparison: Comparison | None = None

    @property
    def num_images(self) -> int:
        """Number of evaluated images."""
        return len(self.totals.records)

    @property
    def slice_groups(self) -> dict[str, list[SliceMetrics]]:
        """Group → its slices."""
        groups: dict[str, list[SliceMetrics]] = {}
        for part in self.slices:
            groups.setdefault(part.group, []).append(part)
        return groups


def build_result(
    totals: Totals,
    *,
    model_info: ModelInfo,
    options: EvalOptions,
    data: EvalData,
    image_ids: Sequence[str],
    mean_mask: Records | None = None,
    comparison: Comparison | None = None,
) -> EvalResult:
    """Compute every metric, with its interval over images.

    Args:
        image_ids: in the order of the records.
        mean_mask: the records of the mean-mask baseline.
    """
    records = totals.records
    baselines = {
        "all person": constant_prediction(PERSON, records),
        "all background": constant_prediction(BACKGROUND, records),
    }
    if mean_mask is not None:
        baselines["mean mask"] = mean_mask
    return EvalResult(
        model_info=model_info,
        options=options,
        data=data,
        totals=totals,
        image_ids=image_ids,
        metrics=compute_intervals(records),
        baselines={
            name: compute_intervals(baseline, CONFUSION_METRICS)
            for name, baseline in baselines.items()
        },
        slices=[
            SliceMetrics(
                group=part.group,
                name=part.name,
                members=part.members,
                metrics=compute_intervals(records[part.members]),
            )
            for part in build_slices(records, [root.name for root in data.roots])
        ],
        curves=threshold_curves(totals.histogram),
        comparison=comparison,
    )
