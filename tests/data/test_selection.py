"""Subsets of a dataset, checked against an independent implementation of the rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segtrain.config.schema import DataConfig
from segtrain.data.sample import DatasetIndex, LabelRules, identity_hash, manifest_hash
from segtrain.data.selection import is_negative, select

# person fraction, number of people, has crowd
Row = tuple[float, int, bool]


def index_of(rows: list[Row]) -> DatasetIndex:
    return DatasetIndex(
        sizes=np.full((len(rows), 2), 10, dtype=np.int32),
        person_fraction=np.array([row[0] for row in rows], dtype=np.float32),
        num_people=np.array([row[1] for row in rows], dtype=np.int32),
        has_crowd=np.array([row[2] for row in rows], dtype=bool),
        identities=np.array([identity_hash("x", n) for n in range(len(rows))], dtype=np.uint64),
    )


rows_strategy = st.lists(
    st.one_of(
        st.tuples(st.just(0.0), st.just(0), st.booleans()),
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.integers(1, 5), st.booleans()),
    ),
    max_size=60,
)

PEOPLE: list[Row] = [(0.1, 1, False), (0.25, 1, False), (0.5, 3, True), (0.75, 1, False)]
NEGATIVES: list[Row] = [(0.0, 0, False)] * 40


def selected(rows: list[Row], **options: object) -> list[int]:
    return select(index_of(rows), DataConfig(**options)).tolist()  # type: ignore[arg-type]


def test_without_options_all_images_are_selected_in_order() -> None:
    assert selected(PEOPLE + NEGATIVES) == list(range(44))


def test_person_area_is_an_inclusive_range() -> None:
    assert selected(PEOPLE + NEGATIVES, person_area=(0.2, 0.7)) == [1, 2]
    assert selected(PEOPLE, person_area=(0.25, 0.75)) == [1, 2, 3]
    assert selected(PEOPLE + NEGATIVES[:1], person_area=(0.0, 0.2)) == [0, 4]


def test_max_people_and_crowds() -> None:
    assert selected(PEOPLE, max_people=1) == [0, 1, 3]
    assert selected(PEOPLE, crowd="drop") == [0, 1, 3]
    assert selected(PEOPLE, crowd="ignore") == selected(PEOPLE, crowd="person") == [0, 1, 2, 3]


@pytest.mark.parametrize(("share", "num_negatives"), [(0.0, 0), (0.2, 1), (0.5, 4), (0.9, 36)])
def test_negatives_are_a_share_of_the_selection(share: float, num_negatives: int) -> None:
    actual = selected(PEOPLE + NEGATIVES, negatives=share)

    assert actual[:4] == [0, 1, 2, 3]
    assert len(actual) - 4 == num_negatives


def test_negatives_are_exempt_from_person_area_and_limited_by_their_number() -> None:
    actual = selected(PEOPLE + NEGATIVES, negatives=0.5, person_area=(0.2, 0.7))
    assert actual[:2] == [1, 2]
    assert len(actual) == 4
    assert selected(PEOPLE + NEGATIVES[:2], negatives=0.9) == [0, 1, 2, 3, 4, 5]


def test_a_larger_share_only_adds_negatives() -> None:
    fewer, more = (set(selected(PEOPLE + NEGATIVES, negatives=share)) for share in (0.3, 0.6))
    assert fewer < more


@given(
    rows=rows_strategy,
    area=st.sampled_from([None, (0.0, 0.2), (0.2, 0.7)]),
    max_people=st.sampled_from([None, 1, 3]),
    crowd=st.sampled_from(["ignore", "drop"]),
    negatives=st.sampled_from([None, 0.0, 0.3]),
)
def test_any_selection_follows_the_rules(
    rows: list[Row],
    area: tuple[float, float] | None,
    max_people: int | None,
    crowd: str,
    negatives: float | None,
) -> None:
    actual = selected(
        rows, person_area=area, max_people=max_people, crowd=crowd, negatives=negatives
    )

    def fits(row: Row) -> bool:
        share, people, has_crowd = row
        is_empty = people == 0 and not has_crowd
        in_range = area is None or np.float32(area[0]) <= np.float32(share) <= np.float32(area[1])
        return (
            (in_range or (is_empty and negatives is not None))
            and (max_people is None or people <= max_people)
            and not (crowd == "drop" and has_crowd)
        )

    candidates = [n for n, row in enumerate(rows) if fits(row)]
    negative_rows = {n for n in candidates if rows[n][1] == 0 and not rows[n][2]}
    if negatives is None:
        assert actual == candidates
    else:
        assert set(candidates) - negative_rows <= set(actual) <= set(candidates)
        others = len(candidates) - len(negative_rows)
        assert len(actual) - others == min(
            len(negative_rows), round(others * negatives / (1 - negatives))
        )


def test_a_negative_has_no_people_and_no_crowd() -> None:
    rows: list[Row] = [(0.0, 0, False), (0.0, 0, True), (0.0, 2, False), (0.3, 1, False)]
    assert is_negative(index_of(rows)).tolist() == [True, False, False, False]


def test_the_manifest_hash_depends_on_images_and_rules_but_not_on_the_order() -> None:
    ids = [identity_hash("coco", str(n)) for n in range(5)]
    base = manifest_hash(ids, LabelRules())

    assert manifest_hash(ids[::-1], LabelRules()) == base
    assert len(base) == 16
    others = [
        manifest_hash(ids[:4], LabelRules()),
        manifest_hash(ids, LabelRules(crowd="person")),
        manifest_hash(ids, LabelRules(largest_only=True)),
        manifest_hash(ids, LabelRules(min_person_area=0.1)),
    ]
    assert len({base, *others}) == 5


def test_identities_depend_on_the_boundaries_of_their_parts() -> None:
    assert identity_hash("a", "bc", 1) != identity_hash("ab", "c", 1)
    assert identity_hash("a", 12, 3) != identity_hash("a", 1, 23)
    assert 0 <= identity_hash("a") < 2**64
