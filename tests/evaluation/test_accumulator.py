"""Merging counts of several processes, slices, and records as plain lists."""

import itertools
import json
import pickle

import numpy as np
import pytest
from helpers.evaluation import new_accumulator, random_catalog, smooth_case, smooth_totals
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.evaluation.counts import (
    RECORD,
    CountAccumulator,
    Totals,
    count_image,
    records_from_lists,
    records_to_lists,
)
from segtrain.evaluation.metrics import compute_metrics, metric_columns, sum_columns
from segtrain.evaluation.slices import build_slices, person_fractions

NUM = 8


def equal(a: Totals, b: Totals) -> bool:
    return (
        a.records.tobytes() == b.records.tobytes()
        and a.threshold == b.threshold
        and np.array_equal(a.histogram, b.histogram)
    )


# --- Merging --------------------------------------------------------------------------------------


@given(st.permutations(range(NUM)), st.lists(st.integers(0, NUM), max_size=3))
@settings(max_examples=30, deadline=None)
def test_merging_shards_in_any_order_gives_the_whole(order: list[int], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), NUM]
    shards = [order[a:b] for a, b in itertools.pairwise(edges)]
    merged = Totals.merge([smooth_totals(NUM, shard) for shard in shards])
    assert equal(merged, smooth_totals(NUM))
    assert equal(Totals.merge([merged, smooth_totals(NUM, [])]), merged)


def test_totals_survive_pickling() -> None:
    totals = smooth_totals(NUM)
    assert equal(pickle.loads(pickle.dumps(totals)), totals)


def test_an_image_counted_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="image 3 was counted twice"):
        Totals.merge([smooth_totals(NUM, [1, 3]), smooth_totals(NUM, [3, 4])])
    with pytest.raises(ValueError, match="twice"):
        smooth_totals(NUM, [3, 3])


def test_merging_different_thresholds_is_an_error() -> None:
    other = CountAccumulator(random_catalog(2), np.zeros(2, dtype=int), threshold=0.4).totals()
    with pytest.raises(ValueError, match="threshold"):
        Totals.merge([smooth_totals(NUM), other])


def test_memory_per_image_is_small_and_independent_of_its_size() -> None:
    assert RECORD.itemsize < 400
    accumulator = new_accumulator(2)
    accumulator.add(0, count_image(*smooth_case(0, (480, 640))))
    assert sum(map(len, accumulator._rows)) == RECORD.itemsize


def test_records_hold_catalog_entries_and_counts() -> None:
    catalog, totals = random_catalog(NUM), smooth_totals(NUM, [7, 2])
    assert totals.records["index"].tolist() == [2, 7]
    assert totals.records["identity"].tolist() == catalog.identities[[2, 7]].tolist()
    assert totals.records["num_people"].tolist() == catalog.num_people[[2, 7]].tolist()
    assert totals.records["has_crowd"].tolist() == catalog.has_crowd[[2, 7]].tolist()
    assert totals.records["source"].tolist() == [0, 1]
    assert totals.records["size"].tolist() == [[48, 64]] * 2
    counts = count_image(*smooth_case(7))
    assert totals.records["confusion"][1].tolist() == counts.confusion.tolist()
    assert totals.records["in_bin"][1].sum(axis=1).tolist() == counts.histogram.sum(axis=1).tolist()
    assert np.array_equal(
        totals.histogram, counts.histogram + count_image(*smooth_case(2)).histogram
    )


def test_sums_do_not_overflow() -> None:
    records = smooth_totals(NUM).records.repeat(3)
    records["confusion"], records["in_bin"] = 2**40, 2**31 - 1
    sums = sum_columns(metric_columns(records))
    assert sums["tp"] == 3 * NUM * 2**40
    assert (sums["bin_pixels"] == 3 * NUM * 2 * (2**31 - 1)).all()
    assert compute_metrics(sums)["person_iou"] == pytest.approx(1 / 3)


# --- Slices ---------------------------------------------------------------------------------------


def test_each_image_is_in_one_slice_of_a_group() -> None:
    records = smooth_totals(NUM).records
    slices = build_slices(records, ["first", "second"])
    assert {s.group for s in slices} == {
        *("share of frame", "people", "touches frame", "crowd", "source")
    }
    for group in {s.group for s in slices}:
        members = np.array([s.members for s in slices if s.group == group])
        assert (members.sum(axis=0) == 1).all(), group


@pytest.mark.parametrize(
    ("num_pixels", "name"),
    [
        (0, "<2 %"),
        (199, "<2 %"),
        (200, "2-10 %"),
        (999, "2-10 %"),
        (1000, "10-20 %"),
        (1999, "10-20 %"),
        (2000, "20-70 %"),
        (7000, "20-70 %"),
        (7001, ">70 %"),
        (10000, ">70 %"),
    ],
)
def test_slices_by_fraction_of_frame(num_pixels: int, name: str) -> None:
    records = np.zeros(1, dtype=RECORD)
    records["size"] = (100, 100)
    records["confusion"] = [[0, 0], [num_pixels - num_pixels // 3, num_pixels // 3]]
    names = [s.name for s in build_slices(records, []) if s.members[0]]
    assert names[0] == name
    assert person_fractions(records) == num_pixels / 10000


def test_other_slices() -> None:
    records = np.zeros(5, dtype=RECORD)
    records["size"] = 1
    records["num_people"] = [0, 1, 2, 3, 40]
    records["has_crowd"] = [True, False, False, False, True]
    records["touches_frame"] = [False, False, True, False, False]
    records["source"] = [1, 0, 0, 1, 0]
    indices = {
        (s.group, s.name): np.flatnonzero(s.members).tolist() for s in build_slices(records, "ab")
    }
    assert indices["people", "0"] == [0]
    assert indices["people", "1"] == [1]
    assert indices["people", "2"] == [2]
    assert indices["people", "3+"] == [3, 4]
    assert indices["crowd", "yes"] == [0, 4]
    assert indices["crowd", "no"] == [1, 2, 3]
    assert indices["touches frame", "yes"] == [2]
    assert indices["source", "a"] == [1, 2, 4]
    assert indices["source", "b"] == [0, 3]


# --- Records as plain lists -----------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, 1, NUM])
def test_records_survive_json(num: int) -> None:
    records = smooth_totals(NUM).records[:num]
    parsed = records_from_lists(json.loads(json.dumps(records_to_lists(records))))
    assert parsed.tobytes() == records.tobytes()


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("index", [1]),
        ("index", "not a list"),
        ("index", [[1, 2]] * NUM),
        ("confusion", [[1, 2]] * NUM),
        ("confusion", [[[1, 2], [3]]] * NUM),
        ("identity", [-1] * NUM),
        ("identity", [2**64] * NUM),
        ("size", ["a"] * NUM),
        ("source", [None] * NUM),
        ("source", [0.5] * NUM),
        ("source", [2**31] * NUM),
        ("has_crowd", [2] * NUM),
    ],
)
def test_invalid_columns_are_refused(name: str, column: object) -> None:
    columns = records_to_lists(smooth_totals(NUM).records)
    with pytest.raises(ValueError, match="column"):
        records_from_lists({**columns, name: column})


@pytest.mark.parametrize("columns", [None, [], {}, {"index": []}])
def test_missing_columns_are_refused(columns: object) -> None:
    with pytest.raises(ValueError, match="columns"):
        records_from_lists(columns)
