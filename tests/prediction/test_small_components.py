"""Small components are removed, small holes are filled, and nothing else changes."""

import numpy as np
import numpy.typing as npt
import pytest

from segtrain.prediction.matting import make_alpha, make_mask
from segtrain.prediction.small_components import remove_small_components
from segtrain.types import Probs


def person(height: int = 200, width: int = 200) -> Probs:
    """A person of 10,000 pixels in the center, with a soft rim."""
    probs = np.full((height, width), 0.01, dtype=np.float32)
    probs[49:151, 49:151] = 0.4
    probs[50:150, 50:150] = 0.97
    return probs


def test_a_small_component_is_removed_with_its_soft_rim() -> None:
    probs = person()
    probs[9:19, 9:19] = 0.4
    probs[10:18, 10:18] = 0.9

    cleaned = remove_small_components(probs)

    assert (cleaned[5:25, 5:25] == 0).all()
    assert np.array_equal(cleaned[45:155, 45:155], probs[45:155, 45:155])
    assert (make_alpha(cleaned)[:40, :40] == 0).all()


def test_a_second_person_is_kept() -> None:
    probs = person()
    probs[10:21, 10:21] = 0.9  # 121 pixels, more than a hundredth of 10,000

    assert np.array_equal(remove_small_components(probs), probs)


def test_a_small_hole_is_filled_with_its_soft_rim() -> None:
    probs = person()
    probs[79:89, 79:89] = 0.6
    probs[80:88, 80:88] = 0.1

    cleaned = remove_small_components(probs)

    assert (cleaned[75:93, 75:93] == 1).all()
    assert np.array_equal(make_mask(cleaned), make_mask(person()))
    outside = probs < 0.45
    outside[79:89, 79:89] = False
    assert np.array_equal(cleaned[outside], probs[outside])


def test_a_gap_between_arm_and_body_is_kept() -> None:
    probs = person()
    probs[80:95, 80:95] = 0.1  # 225 pixels, more than a hundredth of the remaining person

    assert np.array_equal(remove_small_components(probs), probs)


def test_background_at_the_image_border_is_not_a_hole() -> None:
    probs = np.full((200, 200), 0.9, dtype=np.float32)
    for corner in ((0, 0), (0, 199), (199, 0), (199, 199), (0, 100), (100, 0)):
        probs[corner] = 0.1

    assert np.array_equal(remove_small_components(probs), probs)


def test_a_speck_without_a_person_is_removed() -> None:
    probs = np.full((400, 400), 0.1, dtype=np.float32)
    probs[100:103, 100:103] = 0.9  # 9 of 160,000 pixels

    assert (make_mask(remove_small_components(probs)) == 0).all()


def test_thresholds_are_configurable() -> None:
    probs = person()
    probs[10:18, 10:18] = 0.9

    cleaned = remove_small_components(probs, fraction_of_largest=0.001, fraction_of_image=0)

    assert np.array_equal(cleaned, probs)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (30, 30)])
@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 1.0])
def test_a_constant_image_is_unchanged(size: tuple[int, int], value: float) -> None:
    probs = np.full(size, value, dtype=np.float32)

    cleaned = remove_small_components(probs)

    assert np.array_equal(cleaned, probs)
    assert cleaned is not probs
    assert cleaned.dtype == np.float32


def flood_fill_components(mask: npt.NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
    """8-connected components by flood fill, step by step."""
    remaining = {(int(row), int(column)) for row, column in zip(*np.nonzero(mask), strict=True)}
    components = []
    while remaining:
        component, front = set[tuple[int, int]](), {remaining.pop()}
        while front:
            component |= front
            front = {
                (row + down, column + across)
                for row, column in front
                for down in (-1, 0, 1)
                for across in (-1, 0, 1)
            } & remaining
            remaining -= front
        components.append(component)
    return components


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_matches_a_flood_fill(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.random((24, 31), dtype=np.float32) ** (0.5 + seed / 10)
    expected = probs >= 0.5
    people = flood_fill_components(expected)
    # 0.4 % of the image is just under three pixels.
    min_area = max(0.1 * max(map(len, people)), 0.004 * expected.size)
    for component in people:
        if len(component) < min_area:
            expected[tuple(zip(*component, strict=True))] = False
    for hole in flood_fill_components(~expected):
        at_border = any(row in (0, 23) or column in (0, 30) for row, column in hole)
        if len(hole) < min_area and not at_border:
            expected[tuple(zip(*hole, strict=True))] = True

    cleaned = remove_small_components(probs, fraction_of_largest=0.1, fraction_of_image=0.004)

    assert np.array_equal(cleaned >= 0.5, expected)
