"""Small pieces go, small holes are filled, and nothing else changes."""

import numpy as np
import numpy.typing as npt
import pytest

from segtrain.prediction.alpha import make_alpha, make_mask
from segtrain.prediction.cleaning import clean
from segtrain.prediction.probability import Values


def person(height: int = 200, width: int = 200) -> Values:
    """A person of 10,000 pixels in the middle, with a soft rim."""
    probability = np.full((height, width), 0.01, dtype=np.float32)
    probability[49:151, 49:151] = 0.4
    probability[50:150, 50:150] = 0.97
    return probability


def test_a_crumb_goes_with_the_soft_rim_around_it() -> None:
    probability = person()
    probability[9:19, 9:19] = 0.4
    probability[10:18, 10:18] = 0.9

    cleaned = clean(probability)

    assert (cleaned[5:25, 5:25] == 0).all()
    assert np.array_equal(cleaned[45:155, 45:155], probability[45:155, 45:155])
    assert (make_alpha(cleaned)[:40, :40] == 0).all()


def test_a_second_person_stays() -> None:
    probability = person()
    probability[10:21, 10:21] = 0.9  # 121 pixels, more than a hundredth of 10,000

    assert np.array_equal(clean(probability), probability)


def test_a_pinhole_is_filled_with_its_soft_rim() -> None:
    probability = person()
    probability[79:89, 79:89] = 0.6
    probability[80:88, 80:88] = 0.1

    cleaned = clean(probability)

    assert (cleaned[75:93, 75:93] == 1).all()
    assert np.array_equal(make_mask(cleaned), make_mask(person()))
    outside = probability < 0.45
    outside[79:89, 79:89] = False
    assert np.array_equal(cleaned[outside], probability[outside])


def test_the_gap_between_arm_and_body_stays() -> None:
    probability = person()
    probability[80:95, 80:95] = 0.1  # 225 pixels, more than a hundredth of what is left

    assert np.array_equal(clean(probability), probability)


def test_background_that_touches_the_frame_is_no_hole() -> None:
    probability = np.full((200, 200), 0.9, dtype=np.float32)
    for corner in ((0, 0), (0, 199), (199, 0), (199, 199), (0, 100), (100, 0)):
        probability[corner] = 0.1

    assert np.array_equal(clean(probability), probability)


def test_specks_alone_are_nobody() -> None:
    probability = np.full((400, 400), 0.1, dtype=np.float32)
    probability[100:103, 100:103] = 0.9  # 9 of 160,000 pixels

    assert (make_mask(clean(probability)) == 0).all()


def test_the_thresholds_can_be_chosen() -> None:
    probability = person()
    probability[10:18, 10:18] = 0.9

    cleaned = clean(probability, share_of_largest=0.001, share_of_frame=0)

    assert np.array_equal(cleaned, probability)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (30, 30)])
@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 1.0])
def test_nothing_to_clean_changes_nothing(size: tuple[int, int], value: float) -> None:
    probability = np.full(size, value, dtype=np.float32)

    cleaned = clean(probability)

    assert np.array_equal(cleaned, probability)
    assert cleaned is not probability
    assert cleaned.dtype == np.float32


def pieces(region: npt.NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
    """Flood fill, step by step."""
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(region), strict=True)}
    found = []
    while left:
        piece, front = set[tuple[int, int]](), {left.pop()}
        while front:
            piece |= front
            front = {
                (row + down, column + across)
                for row, column in front
                for down in (-1, 0, 1)
                for across in (-1, 0, 1)
            } & left
            left -= front
        found.append(piece)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_is_that_of_a_flood_fill(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.random((24, 31), dtype=np.float32) ** (0.5 + seed / 10)
    expected = probability >= 0.5
    people = pieces(expected)
    largest = max(map(len, people))
    floor = 0.004 * expected.size  # just under three pixels
    for piece in people:
        if len(piece) < max(0.1 * largest, floor):
            expected[tuple(zip(*piece, strict=True))] = False
    for hole in pieces(~expected):
        at_frame = any(row in (0, 23) or column in (0, 30) for row, column in hole)
        if len(hole) < max(0.1 * largest, floor) and not at_frame:
            expected[tuple(zip(*hole, strict=True))] = True

    cleaned = clean(probability, share_of_largest=0.1, share_of_frame=0.004)

    assert np.array_equal(cleaned >= 0.5, expected)
