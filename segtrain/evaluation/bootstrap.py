"""How far a figure could be off for no other reason than which pictures happened to be judged.

The percentile bootstrap (Efron and Tibshirani 1993, chapter 13): from N pictures N are drawn with
replacement, often; the middle 95 % of what the figure then is are the interval.

What a draw repeats looks a little less calibrated than it is, for errors that cancel between
pictures do so less: the interval of `ece` lies too high, and may begin above its value.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from segtrain.evaluation.figures import FIGURES, Columns, Figure, Floats, Sums, columns_of, sums_of
from segtrain.evaluation.records import Records

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95

# What is drawn at once, pictures times resamples: 32 MiB of weights.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """What stands after the ±."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """Two runs over the pictures that both have judged.

    num_common: how many these are; only they are in the figures.
    num_first_only, num_second_only: judged in one of the runs.
    num_other_truth: of the common ones, those whose truths differ in size, in what is counted or
        in what is person, so that the runs were not held against the same.
    differences: figure → second minus first.
    first, second: figure → value.
    """

    num_common: int
    num_first_only: int
    num_second_only: int
    num_other_truth: int
    first: dict[str, float]
    second: dict[str, float]
    differences: dict[str, Interval]


def intervals(
    records: Records,
    figures: Mapping[str, Figure] = FIGURES,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """The figures of all records, each with its interval.

    The same records, in the same order, give the same intervals to the last bit. Of no records an
    interval is the value of nothing.

    Args:
        records: N, in the order of their index.
        seed: of the draws.
    """
    columns = columns_of(records)
    drawn = _figures_of_draws([columns], figures, num_resamples, seed)[0]
    sums = sums_of(columns)
    return {name: _interval(float(f(sums)), drawn[name]) for name, f in figures.items()}


def compare(
    first: Records,
    second: Records,
    figures: Mapping[str, Figure] = FIGURES,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """How much better the second run is on the same pictures.

    Every draw takes the same pictures for both, so that what makes a picture hard for both does not
    widen the interval. Pictures are matched by identity; one that stands in a run twice counts
    once.
    """
    ours, theirs = _matched(first, second)
    both = [columns_of(records) for records in (ours, theirs)]
    drawn = _figures_of_draws(both, figures, num_resamples, seed)
    values = [{n: float(f(sums_of(columns))) for n, f in figures.items()} for columns in both]
    return Comparison(
        num_common=len(ours),
        num_first_only=len(np.unique(first["identity"])) - len(ours),
        num_second_only=len(np.unique(second["identity"])) - len(ours),
        num_other_truth=int(np.count_nonzero(_truths_differ(ours, theirs))),
        first=values[0],
        second=values[1],
        differences={
            name: _interval(values[1][name] - values[0][name], drawn[1][name] - drawn[0][name])
            for name in figures
        },
    )


def _matched(first: Records, second: Records) -> tuple[Records, Records]:
    _, at_first, at_second = np.intersect1d(
        first["identity"], second["identity"], return_indices=True
    )
    return first[at_first], second[at_second]


def _truths_differ(ours: Records, theirs: Records) -> npt.NDArray[np.bool_]:
    sizes = (ours["size"] != theirs["size"]).any(axis=1)
    truths = [records["confusion"].sum(axis=2) for records in (ours, theirs)]
    return np.asarray(sizes | (truths[0] != truths[1]).any(axis=1))


def _figures_of_draws(
    runs: list[Columns], figures: Mapping[str, Figure], num_resamples: int, seed: int
) -> list[dict[str, Floats]]:
    """For each run figure → `num_resamples` values, from the same draws for all runs."""
    num = len(runs[0]["num"])
    tables = [_Table(columns) for columns in runs]
    parts: list[list[dict[str, Floats]]] = [[] for _ in runs]
    for weights in _draws(num, num_resamples, seed):
        for table, found in zip(tables, parts, strict=True):
            sums = table.sums(weights)
            found.append({name: figure(sums) for name, figure in figures.items()})
    return [
        {name: np.concatenate([part[name] for part in found]) for name in figures}
        for found in parts
    ]


class _Table:
    """Columns side by side as one matrix, so that sums over draws are one product."""

    def __init__(self, columns: Columns) -> None:
        num = len(columns["num"])
        self._shapes = {name: column.shape[1:] for name, column in columns.items()}
        flat = [column.reshape(num, _width(column.shape[1:])) for column in columns.values()]
        # Whole numbers, whose sums float64 holds exactly below 2**53: the order in which a product
        # adds them up, which hangs on the machine's number of cores, then changes nothing.
        self._matrix = np.concatenate(flat, axis=1).astype(np.float64)

    def sums(self, weights: Floats) -> Sums:
        """Of R N weights the sums, with an axis of R in front."""
        summed = weights @ self._matrix
        found, start = {}, 0
        for name, shape in self._shapes.items():
            width = _width(shape)
            found[name] = summed[:, start : start + width].reshape(-1, *shape)
            start += width
        return found


def _width(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _draws(num: int, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of `num` pictures was drawn: rows of float64, `num_resamples` in all."""
    generator = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, _AT_ONCE // max(1, num))
    for start in range(0, num_resamples, at_once):
        count = min(at_once, num_resamples - start)
        weights = np.zeros((count, num))
        for row in weights if num else ():
            row[:] = np.bincount(generator.integers(num, size=num), minlength=num)
        yield weights


def _interval(value: float, drawn: Floats) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
