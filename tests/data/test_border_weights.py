"""The border map against its formula, computed per pixel and per person."""

import math
import time
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrain.data.border_weights import border_map
from segtrain.types import Mask


def components(mask: Mask) -> list[list[tuple[int, int]]]:
    """Find the pixels of each 8-connected component by flood fill."""
    remaining = {(int(y), int(x)) for y, x in np.argwhere(mask == 1)}
    persons = []
    while remaining:
        person, edge = [], [remaining.pop()]
        while edge:
            y, x = edge.pop()
            person.append((y, x))
            neighbors = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
            neighbors &= remaining
            remaining -= neighbors
            edge += neighbors
        persons.append(person)
    return persons


def expected_map(mask: Mask, sigma: float) -> npt.NDArray[np.float64]:
    """Compute the formula without rounding."""
    result = np.zeros(mask.shape)
    persons = components(mask)
    if len(persons) < 2:
        return result
    for y, x in np.argwhere(mask == 0):
        distances = sorted(min(math.dist((y, x), pixel) for pixel in person) for person in persons)
        result[y, x] = 255 * math.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
    return result


def assert_matches_formula(mask: Mask, sigma: float) -> None:
    actual = border_map(mask, sigma)
    assert actual.dtype == np.uint8
    assert actual.shape == mask.shape
    # Rounded: near a half, float32 may round to the other side.
    np.testing.assert_allclose(actual, expected_map(mask, sigma), rtol=0, atol=0.5 + 1e-4)


def random_specks(seed: int, height: int, width: int, share: float, ignored: float = 0.1) -> Mask:
    rng = np.random.default_rng(seed)
    draws = rng.random((height, width))
    return np.select([draws < share, draws > 1 - ignored], [1, 255], 0).astype(np.uint8)


def random_people(seed: int, height: int, width: int, count: int) -> Mask:
    """Draw ellipses, some cut by the frame or overlapping, and an ignored rectangle."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=np.uint8)
    for _ in range(count):
        center = int(rng.integers(width)), int(rng.integers(height))
        axes = int(rng.integers(1, 5)), int(rng.integers(1, 7))
        cv2.ellipse(mask, center, axes, int(rng.integers(180)), 0, 360, 1, -1)
    y, x = rng.integers(height), rng.integers(width)
    mask[y : y + 4, x : x + 5] = 255
    return mask


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 16),
    width=st.integers(1, 16),
    share=st.sampled_from([0.01, 0.05, 0.2, 0.5]),
    sigma=st.sampled_from([0.4, 1.0, 5.0, 40.0]),
)
def test_specks_match_the_formula(
    seed: int, height: int, width: int, share: float, sigma: float
) -> None:
    assert_matches_formula(random_specks(seed, height, width, share), sigma)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 7),
    sigma=st.sampled_from([2.0, 5.0, 15.0]),
)
def test_people_match_the_formula(seed: int, count: int, sigma: float) -> None:
    assert_matches_formula(random_people(seed, 40, 33, count), sigma)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 16, 17, 33])
def test_the_map_is_exact_for_any_number_of_persons(count: int) -> None:
    """Above a power of two, the numbers have one more binary digit."""
    rng = np.random.default_rng(count)
    mask = np.zeros((30, 30), dtype=np.uint8)
    cells = rng.permutation(100)[:count]
    mask[cells // 10 * 3, cells % 10 * 3] = 1
    assert len(components(mask)) == count
    assert_matches_formula(mask, 6.0)


def test_a_gap_between_two_walls() -> None:
    """With four pixels between two walls, d1 + d2 is 5 in the whole gap."""
    mask = np.zeros((3, 8), dtype=np.uint8)
    mask[:, [0, 1, 6, 7]] = 1
    expected = round(255 * math.exp(-25 / (2 * 3**2)))
    assert border_map(mask, 3.0).tolist() == [[0, 0, *[expected] * 4, 0, 0]] * 3


def test_the_narrowest_gap_has_the_largest_weight() -> None:
    mask = np.ones((1, 3), dtype=np.uint8)
    mask[0, 1] = 0
    assert border_map(mask, 5.0).tolist() == [[0, round(255 * math.exp(-4 / 50)), 0]]
    assert border_map(mask, 1e3).tolist() == [[0, 255, 0]]


@pytest.mark.parametrize("persons", [0, 1])
def test_fewer_than_two_persons_have_no_border(persons: int) -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[5:9, 5:9] = persons
    mask[12:, :] = 255
    assert not border_map(mask, 1e4).any()


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_mask_of_one_value_has_no_border(value: int) -> None:
    assert not border_map(np.full((6, 7), value, dtype=np.uint8), 5.0).any()


def test_only_background_has_weight_and_diagonal_neighbors_are_connected() -> None:
    mask = np.zeros((6, 6), dtype=np.uint8)
    mask[0, 0] = mask[1, 1] = 1
    assert not border_map(mask, 100.0).any()
    mask[5, 5] = 1
    mask[3, 3] = 255
    has_weight = border_map(mask, 100.0) > 0
    assert np.array_equal(has_weight, mask == 0)


def test_an_ignored_crowd_is_not_a_person() -> None:
    mask = np.zeros((5, 12), dtype=np.uint8)
    mask[:, 0] = 1
    mask[:, 4:8] = 255
    assert not border_map(mask, 100.0).any()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), turns=st.integers(0, 3), flip=st.booleans())
def test_a_rotated_mask_has_the_rotated_map(seed: int, turns: int, flip: bool) -> None:
    def transform(image: Mask) -> Mask:
        image = np.rot90(image, turns)
        return np.ascontiguousarray(image[:, ::-1] if flip else image)

    mask = random_people(seed, 50, 70, 5)
    assert np.array_equal(border_map(transform(mask), 8.0), transform(border_map(mask, 8.0)))


def test_the_mask_is_not_modified_and_may_be_a_view() -> None:
    large = random_people(1, 60, 80, 6)
    view = large[::2, 10:50]
    before = large.copy()
    assert np.array_equal(border_map(view, 5.0), border_map(view.copy(), 5.0))
    assert np.array_equal(large, before)


@pytest.mark.parametrize(
    ("count", "transforms"), [(0, 0), (1, 0), (2, 2), (4, 4), (5, 6), (300, 18), (3136, 24)]
)
def test_many_specks_take_few_distance_transforms(
    count: int, transforms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two per binary digit of the number of persons, instead of one per person."""
    calls = []
    original: Callable[..., Mask] = cv2.distanceTransform

    def count_and_call(*args: object) -> Mask:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(cv2, "distanceTransform", count_and_call)
    mask = np.zeros((112, 112), dtype=np.uint8)
    ys, xs = np.divmod(np.arange(count), 56)
    mask[ys * 2, xs * 2] = 1
    border_map(mask, 5.0)
    assert len(calls) == transforms


def test_three_thousand_specks_take_milliseconds() -> None:
    """Measured: 25 ms. One transform per speck takes over a second."""
    mask = np.zeros((224, 224), dtype=np.uint8)
    mask[::4, ::4] = 1
    begin = time.process_time()
    border_map(mask, 5.0)
    assert time.process_time() - begin < 0.5
