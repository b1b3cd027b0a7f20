"""Subsets of a data set, checked against rules written down a second time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segtrain.config import DataConfig
from segtrain.data.sample import Catalog, LabelRules, identity, manifest_hash
from segtrain.data.selection import is_negative, select

# share of the frame, people, crowd
Row = tuple[float, int, bool]


def catalog_of(rows: list[Row]) -> Catalog:
    return Catalog(
        sizes=np.full((len(rows), 2), 10, dtype=np.int32),
        person_share=np.array([row[0] for row in rows], dtype=np.float32),
        num_people=np.array([row[1] for row in rows], dtype=np.int32),
        has_crowd=np.array([row[2] for row in rows], dtype=bool),
        identities=np.array([identity("x", n) for n in range(len(rows))], dtype=np.uint64),
    )


rows_strategy = st.lists(
    st.one_of(
        st.tuples(st.just(0.0), st.just(0), st.booleans()),
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.integers(1, 5), st.booleans()),
    ),
    max_size=60,
)

PEOPLE: list[Row] = [(0.1, 1, False), (0.25, 1, False), (0.5, 3, True), (0.75, 1, False)]
NOBODY: list[Row] = [(0.0, 0, False)] * 40


def chosen(rows: list[Row], **options: object) -> list[int]:
    return select(catalog_of(rows), DataConfig(**options)).tolist()  # type: ignore[arg-type]


def test_without_options_everything_is_taken_in_order() -> None:
    assert chosen(PEOPLE + NOBODY) == list(range(44))


def test_the_share_of_the_frame_is_a_range_with_its_ends() -> None:
    assert chosen(PEOPLE + NOBODY, person_area=(0.2, 0.7)) == [1, 2]
    assert chosen(PEOPLE, person_area=(0.25, 0.75)) == [1, 2, 3]
    assert chosen(PEOPLE + NOBODY[:1], person_area=(0.0, 0.2)) == [0, 4]


def test_most_people_and_crowds() -> None:
    assert chosen(PEOPLE, max_people=1) == [0, 1, 3]
    assert chosen(PEOPLE, crowd="drop") == [0, 1, 3]
    assert chosen(PEOPLE, crowd="ignore") == chosen(PEOPLE, crowd="person") == [0, 1, 2, 3]


@pytest.mark.parametrize(("share", "num_negatives"), [(0.0, 0), (0.2, 1), (0.5, 4), (0.9, 36)])
def test_negatives_are_a_share_of_all(share: float, num_negatives: int) -> None:
    found = chosen(PEOPLE + NOBODY, negatives=share)

    assert found[:4] == [0, 1, 2, 3]
    assert len(found) - 4 == num_negatives


def test_negatives_are_exempt_from_the_range_and_never_more_than_there_are() -> None:
    found = chosen(PEOPLE + NOBODY, negatives=0.5, person_area=(0.2, 0.7))
    assert found[:2] == [1, 2]
    assert len(found) == 4
    assert chosen(PEOPLE + NOBODY[:2], negatives=0.9) == [0, 1, 2, 3, 4, 5]


def test_more_negatives_are_those_before_and_others() -> None:
    fewer, more = (set(chosen(PEOPLE + NOBODY, negatives=share)) for share in (0.3, 0.6))
    assert fewer < more


@given(
    rows=rows_strategy,
    area=st.sampled_from([None, (0.0, 0.2), (0.2, 0.7)]),
    max_people=st.sampled_from([None, 1, 3]),
    crowd=st.sampled_from(["ignore", "drop"]),
    negatives=st.sampled_from([None, 0.0, 0.3]),
)
def test_any_selection_follows_its_rules(
    rows: list[Row],
    area: tuple[float, float] | None,
    max_people: int | None,
    crowd: str,
    negatives: float | None,
) -> None:
    found = chosen(rows, person_area=area, max_people=max_people, crowd=crowd, negatives=negatives)

    def fits(row: Row) -> bool:
        share, people, has_crowd = row
        nobody = people == 0 and not has_crowd
        in_range = area is None or np.float32(area[0]) <= np.float32(share) <= np.float32(area[1])
        return (
            (in_range or (nobody and negatives is not None))
            and (max_people is None or people <= max_people)
            and not (crowd == "drop" and has_crowd)
        )

    candidates = [n for n, row in enumerate(rows) if fits(row)]
    nobody = {n for n in candidates if rows[n][1] == 0 and not rows[n][2]}
    if negatives is None:
        assert found == candidates
    else:
        assert set(candidates) - nobody <= set(found) <= set(candidates)
        others = len(candidates) - len(nobody)
        assert len(found) - others == min(len(nobody), round(others * negatives / (1 - negatives)))


def test_a_negative_shows_nobody_and_no_crowd() -> None:
    rows: list[Row] = [(0.0, 0, False), (0.0, 0, True), (0.0, 2, False), (0.3, 1, False)]
    assert is_negative(catalog_of(rows)).tolist() == [True, False, False, False]


def test_the_manifest_hash_knows_pictures_and_rules_and_no_order() -> None:
    ids = [identity("coco", str(n)) for n in range(5)]
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


def test_identities_tell_parts_apart() -> None:
    assert identity("a", "bc", 1) != identity("ab", "c", 1)
    assert identity("a", 12, 3) != identity("a", 1, 23)
    assert 0 <= identity("a") < 2**64
