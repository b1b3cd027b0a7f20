"""Bootstrap intervals: coverage, determinism, and paired comparisons."""

import time

import numpy as np
import numpy.typing as npt
import pytest

from segtrain.evaluation.bootstrap import Interval, compare, compute_intervals
from segtrain.evaluation.counts import RECORD, Records
from segtrain.evaluation.metrics import (
    METRICS,
    compute_metrics,
    metric_columns,
    person_iou,
    sum_columns,
)

ONE = {"person_iou": person_iou}


def simulated(seed: int, num: int, noise: float = 0.15) -> Records:
    """Records of images in which person size and quality are correlated."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(8, 0.7, num)
    quality = np.clip(rng.normal(0.75, noise, num) + 0.02 * (np.log(size) - 8), 0, 1)
    tp = (size * quality).astype(int)
    records = np.zeros(num, dtype=RECORD)
    records["index"] = np.arange(num)
    records["identity"] = rng.permutation(num)
    records["size"] = 1000
    wrong = size.astype(int) - tp
    records["confusion"][:, 1, 1] = tp
    records["confusion"][:, 1, 0] = wrong // 2
    records["confusion"][:, 0, 1] = wrong - wrong // 2
    records["confusion"][:, 0, 0] = 10**6 - size.astype(int)
    records["boundary"] = np.stack([tp // 10, size.astype(int) // 10], axis=1)
    records["contour"] = np.stack([tp // 20, tp // 15 + 5, tp // 19, tp // 14 + 5], axis=1)
    records["in_bin"] = rng.integers(0, 1000, (num, 2, 16))
    records["confidence"] = rng.integers(0, 2**29, (num, 16))
    return records


def as_array(found: dict[str, Interval]) -> npt.NDArray[np.float64]:
    return np.array([(i.value, i.low, i.high) for i in found.values()])


# --- Coverage -------------------------------------------------------------------------------------


def test_intervals_contain_the_true_value_about_95_times_in_100() -> None:
    population = simulated(0, 200_000)
    truth = compute_metrics(sum_columns(metric_columns(population)))
    names = ("person_iou", "image_iou", "dice", "boundary_f1")
    chosen = {name: METRICS[name] for name in names}
    rng = np.random.default_rng(1)
    hits = np.zeros(len(names))
    num_sets = 400
    for _ in range(num_sets):
        drawn = population[rng.integers(len(population), size=150)]
        found = compute_intervals(drawn, chosen, num_resamples=400)
        hits += [found[name].low <= truth[name] <= found[name].high for name in names]
    # 95 %, minus 1 to 2 points for the percentile bootstrap at 150, plus or minus 3 standard
    # errors.
    assert ((hits / num_sets > 0.90) & (hits / num_sets < 0.98)).all(), hits / num_sets


def test_difference_intervals_contain_the_true_value_about_95_times_in_100() -> None:
    """The second run finds a random fraction of the first one's false negatives."""
    rng = np.random.default_rng(2)
    first = simulated(3, 100_000)
    second = first.copy()
    gained = rng.binomial(first["confusion"][:, 1, 0], rng.random(len(first)) * 0.2)
    second["confusion"][:, 1, 0] -= gained
    second["confusion"][:, 1, 1] += gained
    truth = [
        compute_metrics(sum_columns(metric_columns(run)), ONE)["person_iou"]
        for run in (first, second)
    ]
    hits, num_sets, widths = 0, 300, []
    for _ in range(num_sets):
        chosen = rng.choice(len(first), size=150, replace=False)
        found = compare(first[chosen], second[chosen], ONE, num_resamples=400)
        difference = found.differences["person_iou"]
        hits += difference.low <= truth[1] - truth[0] <= difference.high
        widths.append(difference.half_width)
    assert 0.90 < hits / num_sets < 0.98
    # Images that are hard for both must not widen the interval.
    alone = compute_intervals(first[:150], ONE, num_resamples=400)["person_iou"].half_width
    assert np.mean(widths) < alone / 3


def test_intervals_agree_with_a_plain_bootstrap() -> None:
    records = simulated(4, 300)
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(3000):
        confusion = records["confusion"][rng.integers(300, size=300)].sum(axis=0)
        drawn.append(confusion[1, 1] / (confusion.sum() - confusion[0, 0]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = compute_intervals(records, ONE)["person_iou"]
    width = high - low
    assert found.low == pytest.approx(low, abs=width / 15)
    assert found.high == pytest.approx(high, abs=width / 15)


# --- Determinism ----------------------------------------------------------------------------------


def test_the_same_records_give_bit_identical_intervals() -> None:
    records = simulated(6, 500)
    first, second = (compute_intervals(records, num_resamples=200) for _ in range(2))
    assert as_array(first).tobytes() == as_array(second).tobytes()
    other = compute_intervals(records, num_resamples=200, seed=1)
    assert not np.array_equal(as_array(other)[:, 1], as_array(first)[:, 1])
    assert np.array_equal(as_array(other)[:, 0], as_array(first)[:, 0])


def test_the_chunk_size_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    records = simulated(7, 100)
    whole = as_array(compute_intervals(records, num_resamples=50))
    monkeypatch.setattr("segtrain.evaluation.bootstrap._CHUNK_SIZE", 700)
    assert as_array(compute_intervals(records, num_resamples=50)).tobytes() == whole.tobytes()


def test_values_are_those_of_all_records_and_within_the_interval() -> None:
    records = simulated(8, 400)
    values = compute_metrics(sum_columns(metric_columns(records)))
    found = compute_intervals(records, num_resamples=300)
    assert found.keys() == METRICS.keys()
    for name, interval in found.items():
        assert interval.value == values[name]
        assert interval.low <= interval.value <= interval.high, name


@pytest.mark.parametrize("num", [0, 1])
def test_one_image_or_none_has_an_interval_of_width_0(num: int) -> None:
    records = simulated(9, 1)[:num]
    for name, interval in compute_intervals(records, num_resamples=20).items():
        assert interval.low == interval.high == pytest.approx(interval.value), name
    same = compare(records, records, num_resamples=20)
    assert same.num_common == num
    assert all(d == Interval(0, 0, 0) for d in same.differences.values())


def test_five_thousand_images_take_seconds() -> None:
    records = simulated(10, 5000)
    start = time.process_time()
    compute_intervals(records)
    assert time.process_time() - start < 5  # measured: 0.2


# --- Comparing ------------------------------------------------------------------------------------


def test_runs_are_compared_over_common_images_in_any_order() -> None:
    first = simulated(11, 120)
    second = first.copy()
    second["confusion"][:, 1, 1] += 100
    second["confusion"][:, 1, 0] += 10
    rng = np.random.default_rng(0)
    first_part, second_part = first[:100], rng.permutation(second[30:])
    found = compare(first_part, second_part, ONE, num_resamples=100)
    assert (found.num_common, found.num_first_only, found.num_second_only) == (70, 30, 20)
    assert found.num_other_truth == 70
    common = [
        compute_metrics(sum_columns(metric_columns(run[30:100])), ONE) for run in (first, second)
    ]
    assert (found.first, found.second) == (common[0], common[1])
    gain = common[1]["person_iou"] - common[0]["person_iou"]
    assert found.differences["person_iou"].value == gain
    assert found == compare(rng.permutation(first_part), second[30:], ONE, num_resamples=100)


def test_swapping_the_runs_negates_the_difference() -> None:
    first, second = simulated(12, 100), simulated(13, 100)
    forward = compare(first, second, num_resamples=100).differences
    backward = compare(second, first, num_resamples=100).differences
    for name in METRICS:
        assert forward[name].value == -backward[name].value
        assert forward[name].low == pytest.approx(-backward[name].high, abs=1e-12)


def test_a_run_compared_with_itself_has_no_difference() -> None:
    records = simulated(14, 100)
    found = compare(records, records, num_resamples=100)
    assert all(d == Interval(0, 0, 0) for d in found.differences.values())
    assert found.num_other_truth == 0


def test_a_duplicate_image_counts_once() -> None:
    records = simulated(15, 50)
    duplicated = np.concatenate([records, records[:10]])
    found = compare(duplicated, records, ONE, num_resamples=20)
    assert (found.num_common, found.num_first_only, found.num_second_only) == (50, 0, 0)
