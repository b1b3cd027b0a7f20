"""Bootstrap confidence intervals over images.

Percentile bootstrap (Efron and Tibshirani 1993, chapter 13): draw N of N images with replacement,
many times; the middle 95 % of the metric's values are its interval.

A resample with repeated images looks slightly less calibrated than the images are, because errors
of different images cancel less. The interval of `ece` is therefore too high, and may begin above
its value.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segtrain.evaluation.counts import Records
from segtrain.evaluation.metrics import (
    METRICS,
    Columns,
    Floats,
    Metric,
    Sums,
    metric_columns,
    sum_columns,
)

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

# Images times resamples per step: 32 MiB of weights.
_CHUNK_SIZE = 2**22


@dataclass(frozen=True)
class Interval:
    """The value of a metric and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval, printed after ±."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, compared over the images that both contain.

    num_common: images in both; only these enter the metrics.
    num_first_only, num_second_only: images in one of the two.
    num_other_truth: common images whose ground truths differ in size, in the number of known
        pixels or in the number of person pixels.
    differences: metric → second minus first.
    first, second: metric → value.
    """

    num_common: int
    num_first_only: int
    num_second_only: int
    num_other_truth: int
    first: dict[str, float]
    second: dict[str, float]
    differences: dict[str, Interval]


def compute_intervals(
    records: Records,
    metrics: Mapping[str, Metric] = METRICS,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute the metrics over all records, each with its interval.

    The same records in the same order give bit-identical intervals. Without records, an interval is
    the metric's value of no images.

    Args:
        records: N, ordered by index.
        seed: of the resamples.
    """
    columns = metric_columns(records)
    resampled = _resample_metrics([columns], metrics, num_resamples, seed)[0]
    sums = sum_columns(columns)
    return {
        name: _interval(float(metric(sums)), resampled[name]) for name, metric in metrics.items()
    }


def compare(
    first: Records,
    second: Records,
    metrics: Mapping[str, Metric] = METRICS,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two evaluations by a paired bootstrap over their common images.

    Both share the same resamples, so images that are hard for both do not widen the interval.
    Images are matched by identity; a duplicate counts once.
    """
    first_common, second_common = _match_images(first, second)
    columns = [metric_columns(records) for records in (first_common, second_common)]
    resampled = _resample_metrics(columns, metrics, num_resamples, seed)
    values = [
        {name: float(metric(sum_columns(c))) for name, metric in metrics.items()} for c in columns
    ]
    return Comparison(
        num_common=len(first_common),
        num_first_only=len(np.unique(first["identity"])) - len(first_common),
        num_second_only=len(np.unique(second["identity"])) - len(first_common),
        num_other_truth=int(np.count_nonzero(_truths_differ(first_common, second_common))),
        first=values[0],
        second=values[1],
        differences={
            name: _interval(
                values[1][name] - values[0][name], resampled[1][name] - resampled[0][name]
            )
            for name in metrics
        },
    )


def _match_images(first: Records, second: Records) -> tuple[Records, Records]:
    _, in_first, in_second = np.intersect1d(
        first["identity"], second["identity"], return_indices=True
    )
    return first[in_first], second[in_second]


def _truths_differ(first: Records, second: Records) -> npt.NDArray[np.bool_]:
    sizes_differ = (first["size"] != second["size"]).any(axis=1)
    class_counts = [records["confusion"].sum(axis=2) for records in (first, second)]
    return np.asarray(sizes_differ | (class_counts[0] != class_counts[1]).any(axis=1))


def _resample_metrics(
    runs: list[Columns], metrics: Mapping[str, Metric], num_resamples: int, seed: int
) -> list[dict[str, Floats]]:
    """For each run, metric → `num_resamples` values; all runs share the same resamples."""
    matrices = [_ColumnMatrix(columns) for columns in runs]
    chunks: list[list[dict[str, Floats]]] = [[] for _ in runs]
    for weights in _draw_weights(len(runs[0]["num"]), num_resamples, seed):
        for matrix, run_chunks in zip(matrices, chunks, strict=True):
            sums = matrix.sums(weights)
            run_chunks.append({name: metric(sums) for name, metric in metrics.items()})
    return [
        {name: np.concatenate([chunk[name] for chunk in run_chunks]) for name in metrics}
        for run_chunks in chunks
    ]


class _ColumnMatrix:
    """All columns side by side in one matrix, so the sums of all resamples are one product."""

    def __init__(self, columns: Columns) -> None:
        num = len(columns["num"])
        self._shapes = {name: column.shape[1:] for name, column in columns.items()}
        flat = [column.reshape(num, _width(column.shape[1:])) for column in columns.values()]
        # The entries are integers, whose sums are exact in float64 below 2**53. The order of
        # summation in a product depends on the number of cores and then changes nothing.
        self._matrix = np.concatenate(flat, axis=1).astype(np.float64)

    def sums(self, weights: Floats) -> Sums:
        """Sums for R N weights, with R as their first axis."""
        summed = weights @ self._matrix
        sums, start = {}, 0
        for name, shape in self._shapes.items():
            width = _width(shape)
            sums[name] = summed[:, start : start + width].reshape(-1, *shape)
            start += width
        return sums


def _width(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _draw_weights(num: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each of `num` images was drawn: float64 rows, `num_resamples` in total."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows_per_chunk = max(1, _CHUNK_SIZE // max(1, num))
    for start in range(0, num_resamples, rows_per_chunk):
        weights = np.zeros((min(rows_per_chunk, num_resamples - start), num))
        for row in weights if num else ():
            row[:] = np.bincount(generator.integers(num, size=num), minlength=num)
        yield weights


def _interval(value: float, resampled: Floats) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
