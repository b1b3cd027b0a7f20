"""Intervals: how often they hold the truth, and what they may not depend on."""

import time

import numpy as np
import numpy.typing as npt
import pytest

from segtrain.evaluation.bootstrap import Interval, compare, intervals
from segtrain.evaluation.figures import FIGURES, columns_of, figures_of, person_iou, sums_of
from segtrain.evaluation.records import RECORD, Records

ONE = {"person_iou": person_iou}


def simulated(seed: int, num: int, noise: float = 0.15) -> Records:
    """Pictures of a population in which size and quality hang together."""
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


def everything(found: dict[str, Interval]) -> npt.NDArray[np.float64]:
    return np.array([(i.value, i.low, i.high) for i in found.values()])


# --- Coverage -----------------------------------------------------------------------------------


def test_intervals_hold_the_truth_about_95_times_in_100() -> None:
    population = simulated(0, 200_000)
    truth = figures_of(sums_of(columns_of(population)))
    names = ("person_iou", "image_iou", "dice", "boundary_f1")
    chosen = {name: FIGURES[name] for name in names}
    rng = np.random.default_rng(1)
    hits = np.zeros(len(names))
    num_sets = 400
    for _ in range(num_sets):
        drawn = population[rng.integers(len(population), size=150)]
        found = intervals(drawn, chosen, num_resamples=400)
        hits += [found[name].low <= truth[name] <= found[name].high for name in names]
    # 95 %, less one or two for the percentile bootstrap at 150, give or take 3 standard errors.
    assert ((hits / num_sets > 0.90) & (hits / num_sets < 0.98)).all(), hits / num_sets


def test_differences_of_paired_runs_hold_the_truth_about_95_times_in_100() -> None:
    """The second run finds on each picture a noisy share of what the first has missed."""
    rng = np.random.default_rng(2)
    first = simulated(3, 100_000)
    second = first.copy()
    better = rng.binomial(first["confusion"][:, 1, 0], rng.random(len(first)) * 0.2)
    second["confusion"][:, 1, 0] -= better
    second["confusion"][:, 1, 1] += better
    truth = [figures_of(sums_of(columns_of(run)), ONE)["person_iou"] for run in (first, second)]
    hits, num_sets, widths = 0, 300, []
    for _ in range(num_sets):
        chosen = rng.choice(len(first), size=150, replace=False)
        found = compare(first[chosen], second[chosen], ONE, num_resamples=400)
        difference = found.differences["person_iou"]
        hits += difference.low <= truth[1] - truth[0] <= difference.high
        widths.append(difference.half_width)
    assert 0.90 < hits / num_sets < 0.98
    # What makes pictures hard for both must not widen the interval.
    alone = intervals(first[:150], ONE, num_resamples=400)["person_iou"].half_width
    assert np.mean(widths) < alone / 3


def test_intervals_agree_with_a_plain_bootstrap() -> None:
    records = simulated(4, 300)
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(3000):
        confusion = records["confusion"][rng.integers(300, size=300)].sum(axis=0)
        drawn.append(confusion[1, 1] / (confusion.sum() - confusion[0, 0]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = intervals(records, ONE)["person_iou"]
    width = high - low
    assert found.low == pytest.approx(low, abs=width / 15)
    assert found.high == pytest.approx(high, abs=width / 15)


# --- What they may not depend on ----------------------------------------------------------------


def test_the_same_records_give_the_same_bits() -> None:
    records = simulated(6, 500)
    first, second = (intervals(records, num_resamples=200) for _ in range(2))
    assert everything(first).tobytes() == everything(second).tobytes()
    other = intervals(records, num_resamples=200, seed=1)
    assert not np.array_equal(everything(other)[:, 1], everything(first)[:, 1])
    assert np.array_equal(everything(other)[:, 0], everything(first)[:, 0])


def test_how_much_is_drawn_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    records = simulated(7, 100)
    whole = everything(intervals(records, num_resamples=50))
    monkeypatch.setattr("segtrain.evaluation.bootstrap._AT_ONCE", 700)
    assert everything(intervals(records, num_resamples=50)).tobytes() == whole.tobytes()


def test_values_are_those_of_all_records_and_lie_inside() -> None:
    records = simulated(8, 400)
    values = figures_of(sums_of(columns_of(records)))
    found = intervals(records, num_resamples=300)
    assert found.keys() == FIGURES.keys()
    for name, interval in found.items():
        assert interval.value == values[name]
        assert interval.low <= interval.value <= interval.high, name


@pytest.mark.parametrize("num", [0, 1])
def test_of_one_picture_or_none_nothing_is_known_but_the_value(num: int) -> None:
    records = simulated(9, 1)[:num]
    for name, interval in intervals(records, num_resamples=20).items():
        assert interval.low == interval.high == pytest.approx(interval.value), name
    same = compare(records, records, num_resamples=20)
    assert same.num_common == num
    assert all(d == Interval(0, 0, 0) for d in same.differences.values())


def test_five_thousand_pictures_take_seconds() -> None:
    records = simulated(10, 5000)
    start = time.process_time()
    intervals(records)
    assert time.process_time() - start < 5  # measured: 0.2


# --- Comparing ----------------------------------------------------------------------------------


def test_runs_are_compared_over_what_both_judged_whatever_the_order() -> None:
    first = simulated(11, 120)
    second = first.copy()
    second["confusion"][:, 1, 1] += 100
    second["confusion"][:, 1, 0] += 10
    rng = np.random.default_rng(0)
    mine, yours = first[:100], rng.permutation(second[30:])
    found = compare(mine, yours, ONE, num_resamples=100)
    assert (found.num_common, found.num_first_only, found.num_second_only) == (70, 30, 20)
    assert found.num_other_truth == 70
    common = [figures_of(sums_of(columns_of(run[30:100])), ONE) for run in (first, second)]
    assert (found.first, found.second) == (common[0], common[1])
    gain = common[1]["person_iou"] - common[0]["person_iou"]
    assert found.differences["person_iou"].value == gain
    assert found == compare(rng.permutation(mine), second[30:], ONE, num_resamples=100)


def test_a_difference_changes_its_sign_with_the_order() -> None:
    first, second = simulated(12, 100), simulated(13, 100)
    there = compare(first, second, num_resamples=100).differences
    back = compare(second, first, num_resamples=100).differences
    for name in FIGURES:
        assert there[name].value == -back[name].value
        assert there[name].low == pytest.approx(-back[name].high, abs=1e-12)


def test_a_run_against_itself_is_no_better_and_no_worse() -> None:
    records = simulated(14, 100)
    found = compare(records, records, num_resamples=100)
    assert all(d == Interval(0, 0, 0) for d in found.differences.values())
    assert found.num_other_truth == 0


def test_a_picture_that_is_there_twice_counts_once() -> None:
    records = simulated(15, 50)
    twice = np.concatenate([records, records[:10]])
    found = compare(twice, records, ONE, num_resamples=20)
    assert (found.num_common, found.num_first_only, found.num_second_only) == (50, 0, 0)
