"""Counting in several processes, slices, and records as plain lists."""

import itertools
import json
import pickle

import numpy as np
import pytest
from evaluation_cases import catalog_of, smooth_case, tally_of, totals_of
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.evaluation.figures import columns_of, figures_of, sums_of
from segtrain.evaluation.picture import count_picture
from segtrain.evaluation.records import RECORD, records_as_lists, records_from_lists
from segtrain.evaluation.slices import person_shares, slices_of
from segtrain.evaluation.totals import Tally, Totals

NUM = 8


def same(a: Totals, b: Totals) -> bool:
    equal = a.records.tobytes() == b.records.tobytes() and a.threshold == b.threshold
    return equal and np.array_equal(a.histogram, b.histogram)


# --- Merging ------------------------------------------------------------------------------------


@given(st.permutations(range(NUM)), st.lists(st.integers(0, NUM), max_size=3))
@settings(max_examples=30, deadline=None)
def test_parts_in_any_order_are_the_whole(order: list[int], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), NUM]
    shards = [order[a:b] for a, b in itertools.pairwise(edges)]
    merged = Totals.merged([totals_of(NUM, shard) for shard in shards])
    assert same(merged, totals_of(NUM))
    assert same(Totals.merged([merged, totals_of(NUM, [])]), merged)


def test_totals_survive_the_way_between_processes() -> None:
    totals = totals_of(NUM)
    assert same(pickle.loads(pickle.dumps(totals)), totals)


def test_a_picture_that_two_processes_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="picture 3 was counted twice"):
        Totals.merged([totals_of(NUM, [1, 3]), totals_of(NUM, [3, 4])])
    with pytest.raises(ValueError, match="twice"):
        totals_of(NUM, [3, 3])


def test_parts_at_different_thresholds_are_an_error() -> None:
    other = Tally(catalog_of(2), np.zeros(2, dtype=int), threshold=0.4).totals()
    with pytest.raises(ValueError, match="threshold"):
        Totals.merged([totals_of(NUM), other])


def test_a_picture_leaves_few_bytes_whatever_its_size() -> None:
    assert RECORD.itemsize < 400
    tally = tally_of(2)
    tally.add(0, count_picture(*smooth_case(0, (480, 640))))
    assert sum(map(len, tally._rows)) == RECORD.itemsize


def test_records_hold_what_is_known_of_the_picture() -> None:
    catalog, totals = catalog_of(NUM), totals_of(NUM, [7, 2])
    assert totals.records["index"].tolist() == [2, 7]
    assert totals.records["identity"].tolist() == catalog.identities[[2, 7]].tolist()
    assert totals.records["num_people"].tolist() == catalog.num_people[[2, 7]].tolist()
    assert totals.records["has_crowd"].tolist() == catalog.has_crowd[[2, 7]].tolist()
    assert totals.records["source"].tolist() == [0, 1]
    assert totals.records["size"].tolist() == [[48, 64]] * 2
    counts = count_picture(*smooth_case(7))
    assert totals.records["confusion"][1].tolist() == counts.confusion.tolist()
    assert totals.records["in_bin"][1].sum(axis=1).tolist() == counts.histogram.sum(axis=1).tolist()
    assert np.array_equal(
        totals.histogram, counts.histogram + count_picture(*smooth_case(2)).histogram
    )


def test_sums_do_not_overflow() -> None:
    records = totals_of(NUM).records.repeat(3)
    records["confusion"], records["in_bin"] = 2**40, 2**31 - 1
    sums = sums_of(columns_of(records))
    assert sums["tp"] == 3 * NUM * 2**40
    assert (sums["bin_pixels"] == 3 * NUM * 2 * (2**31 - 1)).all()
    assert figures_of(sums)["person_iou"] == pytest.approx(1 / 3)


# --- Slices -------------------------------------------------------------------------------------


def test_slices_of_a_group_part_all_pictures() -> None:
    records = totals_of(NUM).records
    slices = slices_of(records, ["first", "second"])
    assert {s.group for s in slices} == {
        *("share of frame", "people", "touches frame", "crowd", "source")
    }
    for group in {s.group for s in slices}:
        members = np.array([s.members for s in slices if s.group == group])
        assert (members.sum(axis=0) == 1).all(), group


@pytest.mark.parametrize(
    ("person", "part"),
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
def test_parts_by_share_of_frame(person: int, part: str) -> None:
    records = np.zeros(1, dtype=RECORD)
    records["size"] = (100, 100)
    records["confusion"] = [[0, 0], [person - person // 3, person // 3]]
    inside = [s.name for s in slices_of(records, []) if s.members[0]]
    assert inside[0] == part
    assert person_shares(records) == person / 10000


def test_other_parts_by_hand() -> None:
    records = np.zeros(5, dtype=RECORD)
    records["size"] = 1
    records["num_people"] = [0, 1, 2, 3, 40]
    records["has_crowd"] = [True, False, False, False, True]
    records["touches_frame"] = [False, False, True, False, False]
    records["source"] = [1, 0, 0, 1, 0]
    found = {
        (s.group, s.name): np.flatnonzero(s.members).tolist() for s in slices_of(records, "ab")
    }
    assert found["people", "0"] == [0]
    assert found["people", "1"] == [1]
    assert found["people", "2"] == [2]
    assert found["people", "3+"] == [3, 4]
    assert found["crowd", "yes"] == [0, 4]
    assert found["crowd", "no"] == [1, 2, 3]
    assert found["touches frame", "yes"] == [2]
    assert found["source", "a"] == [1, 2, 4]
    assert found["source", "b"] == [0, 3]


# --- Records as plain lists ---------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, 1, NUM])
def test_records_survive_json(num: int) -> None:
    records = totals_of(NUM).records[:num]
    again = records_from_lists(json.loads(json.dumps(records_as_lists(records))))
    assert again.tobytes() == records.tobytes()


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("index", [1]),
        ("index", "no list"),
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
def test_other_lists_are_refused(name: str, column: object) -> None:
    columns = records_as_lists(totals_of(NUM).records)
    with pytest.raises(ValueError, match="column"):
        records_from_lists({**columns, name: column})


@pytest.mark.parametrize("columns", [None, [], {}, {"index": []}])
def test_what_has_no_columns_is_refused(columns: object) -> None:
    with pytest.raises(ValueError, match="columns"):
        records_from_lists(columns)
