"""Boundary IoU and contour F against slow reference implementations, and ignored pixels."""

import itertools
import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from segtrain.evaluation import boundary as boundary_module
from segtrain.evaluation.boundary import (
    boundary_counts,
    boundary_depth,
    contour_counts,
    squared_tolerance,
)
from segtrain.types import Mask

Bools = npt.NDArray[np.bool_]


def blobs(seed: int, shape: tuple[int, int], ignored: bool = False) -> tuple[Mask, Mask]:
    """A prediction and a ground truth with outlines close to each other, and ignored blobs."""
    rng = np.random.default_rng(seed)
    noise, more, other = (
        cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), min(shape) / 8 + 0.5).reshape(shape)
        for _ in range(3)
    )
    predicted = (noise > np.median(noise)).astype(np.uint8)
    mask = (noise + 0.2 * more > np.median(noise)).astype(np.uint8)
    if ignored:
        mask[other > np.quantile(other, 0.85)] = 255
    return predicted, mask


# --- Reference implementations --------------------------------------------------------------------


def boundary_by_windows(person: Bools, unknown: Bools, depth: int) -> Bools:
    """Pixel by pixel: person, with another class in the square around it."""
    height, width = person.shape
    boundary = np.zeros_like(person)
    for y, x in itertools.product(range(height), range(width)):
        if not person[y, x] or unknown[y, x]:
            continue
        reaches_out = y - depth < 0 or x - depth < 0 or y + depth >= height or x + depth >= width
        rows, columns = (
            slice(max(0, y - depth), y + depth + 1),
            slice(max(0, x - depth), x + depth + 1),
        )
        others = ~person[rows, columns] & ~unknown[rows, columns]
        boundary[y, x] = reaches_out or others.any()
    return boundary


def slow_boundary_counts(predicted: Mask, mask: Mask) -> tuple[int, int]:
    unknown = mask == 255
    depth = max(1, round(0.02 * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
    pred = boundary_by_windows(predicted == 1, unknown, depth)
    true = boundary_by_windows(mask == 1, unknown, depth)
    return int((pred & true).sum()), int((pred | true).sum())


def contour_points(person: Bools, unknown: Bools) -> list[tuple[int, int]]:
    height, width = person.shape
    points = []
    for y, x in itertools.product(range(height), range(width)):
        neighbors = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [(j, i) for j, i in neighbors if 0 <= j < height and 0 <= i < width]
        outside = any(not person[p] and not unknown[p] for p in inside)
        if person[y, x] and not unknown[y, x] and outside:
            points.append((y, x))
    return points


def slow_contour_counts(predicted: Mask, mask: Mask) -> list[int]:
    """Compare every pair of points."""
    unknown = mask == 255
    tolerance = max(1.0, 0.0075 * math.hypot(*mask.shape)) + 1e-9

    def near(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
        return sum(any(math.dist(p, q) <= tolerance for q in others) for p in points)

    hidden = [(int(y), int(x)) for y, x in np.argwhere(unknown)]
    pred, true = (contour_points(m == 1, unknown) for m in (predicted, mask))
    counts = []
    for points, others in ((pred, true), (true, pred)):
        evaluated = [p for p in points if not near([p], hidden)]
        counts += [near(evaluated, others), len(evaluated)]
    return counts


@pytest.mark.parametrize("ignored", [False, True], ids=["all known", "some ignored"])
@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (90, 130), (1, 50), (50, 1), (2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_boundary_counts_agree_with_windows_around_every_pixel(
    seed: int, shape: tuple[int, int], ignored: bool
) -> None:
    predicted, mask = blobs(seed, shape, ignored)
    assert boundary_counts(predicted, mask) == slow_boundary_counts(predicted, mask)


@pytest.mark.parametrize("ignored", [False, True], ids=["all known", "some ignored"])
@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (1, 50), (50, 1), (140, 170), (2, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_contour_counts_agree_with_all_pairs_of_points(
    seed: int, shape: tuple[int, int], ignored: bool
) -> None:
    predicted, mask = blobs(seed, shape, ignored)
    assert contour_counts(predicted, mask).tolist() == slow_contour_counts(predicted, mask)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(48, 64), (480, 640), (333, 500), (7, 300)])
def test_boundary_counts_agree_with_many_small_erosions(seed: int, shape: tuple[int, int]) -> None:
    """The published procedure: a border of zeros, then d erosions by 3x3."""

    def boundary(person: Mask) -> Bools:
        depth = max(1, round(0.02 * math.sqrt(shape[0] ** 2 + shape[1] ** 2)))
        inside = np.pad(person, 1)
        for _ in range(depth):
            inside = np.asarray(cv2.erode(inside, np.ones((3, 3), np.uint8)), dtype=np.uint8)
        return (person > inside[1:-1, 1:-1]).astype(bool)

    predicted, mask = blobs(seed, shape)
    pred, true = boundary(predicted), boundary(mask)
    expected = (int((pred & true).sum()), int((pred | true).sum()))
    assert boundary_counts(predicted, mask) == expected


@pytest.mark.parametrize("squared", [1, 2, 25, 36, 144, 256, 289, 300, 1406])
def test_disk_and_distance_transform_agree(monkeypatch: pytest.MonkeyPatch, squared: int) -> None:
    rng = np.random.default_rng(squared)
    region = rng.random((150, 170)) < 0.001
    monkeypatch.setattr(boundary_module, "_MAX_DISK_RADIUS", 100)
    by_disk = boundary_module._within(region, squared)
    monkeypatch.setattr(boundary_module, "_MAX_DISK_RADIUS", 0)
    by_distance = boundary_module._within(region, squared)
    y, x = np.mgrid[:150, :170]
    expected = np.zeros_like(region)
    for j, i in np.argwhere(region):
        expected |= (y - j) ** 2 + (x - i) ** 2 <= squared
    assert np.array_equal(by_disk, expected)
    assert np.array_equal(by_distance, expected)


# --- By hand --------------------------------------------------------------------------------------


def square(shape: tuple[int, int], top: int, left: int, side: int) -> Mask:
    mask = np.zeros(shape, dtype=np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


@pytest.mark.parametrize(
    ("size", "depth"), [((480, 640), 16), ((1, 1), 1), ((30, 40), 1), ((60, 80), 2), ((100, 75), 2)]
)
def test_depth_is_two_percent_of_the_diagonal(size: tuple[int, int], depth: int) -> None:
    # 2 % at 100x75 is 2.5, which rounds to even, as in the reference implementation.
    assert boundary_depth(*size) == depth


@pytest.mark.parametrize(
    ("size", "squared"), [((480, 640), 36), ((479, 640), 35), ((1, 1), 1), ((3000, 4000), 1406)]
)
def test_squared_tolerance_is_inclusive(size: tuple[int, int], squared: int) -> None:
    assert squared_tolerance(*size) == squared


def test_boundaries_of_two_squares() -> None:
    """At 30x40, the boundary is one pixel deep: that of a 10x10 square has 36 pixels.

    With one square a pixel to the right, the boundaries share 9 pixels each of the top and bottom
    rows; the right column of the first is inside the second.
    """
    left, right = square((30, 40), 10, 10, 10), square((30, 40), 10, 11, 10)
    assert boundary_counts(left, right) == (18, 2 * 36 - 18)
    assert boundary_counts(left, left) == (36, 36)


def test_contours_match_up_to_the_tolerance_and_not_beyond() -> None:
    """A straight edge across 480x640, and another at a distance of 6 or 7 pixels."""
    truth = np.zeros((480, 640), dtype=np.uint8)
    truth[:, :300] = 1
    for distance, matched in ((6, 480), (7, 0)):
        predicted = np.zeros_like(truth)
        predicted[:, : 300 + distance] = 1
        assert contour_counts(predicted, truth).tolist() == [matched, 480, matched, 480]


def test_the_frame_is_a_boundary_but_not_a_contour() -> None:
    everything = np.ones((30, 40), dtype=np.uint8)
    assert boundary_counts(everything, everything) == (2 * 30 + 2 * 40 - 4,) * 2
    assert contour_counts(everything, everything).tolist() == [0, 0, 0, 0]


def test_a_person_cut_by_an_ignored_region_has_no_outline_there() -> None:
    """Left half person, right half ignored: only the frame gives a boundary."""
    mask = np.ones((30, 40), dtype=np.uint8)
    mask[:, 20:] = 255
    assert boundary_counts(np.ones_like(mask), mask) == (20 + 20 + 28,) * 2
    assert contour_counts(np.ones_like(mask), mask).tolist() == [0, 0, 0, 0]


def test_contours_beside_ignored_pixels_are_not_evaluated_but_match_others() -> None:
    """A vertical edge at 30x40, where the tolerance is one pixel; one ignored pixel in row 4."""
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[:, :20] = 1
    mask[4, 20] = 255
    # Only (4, 19) is next to the ignored pixel, and it is not a contour pixel.
    assert contour_counts((mask == 1).astype(np.uint8), mask).tolist() == [29, 29, 29, 29]
    mask[4, 20], mask[4, 19] = 0, 255
    # (3, 19) and (5, 19) are next to it; (4, 18) has no known neighbor outside the mask.
    assert contour_counts((mask == 1).astype(np.uint8), mask).tolist() == [27, 27, 27, 27]


# --- Properties -----------------------------------------------------------------------------------

_SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Mask, Mask]:
    shape = draw(_SHAPES)
    predicted = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1])))
    mask = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 255])))
    return predicted, mask


@given(mask_pairs())
@settings(max_examples=150, deadline=None)
def test_counts_of_any_small_masks_agree_with_the_slow_ones(pair: tuple[Mask, Mask]) -> None:
    assert boundary_counts(*pair) == slow_boundary_counts(*pair)
    assert contour_counts(*pair).tolist() == slow_contour_counts(*pair)


@given(mask_pairs(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_predictions_on_ignored_pixels_have_no_effect(pair: tuple[Mask, Mask], seed: int) -> None:
    predicted, mask = pair
    noise = np.random.default_rng(seed).integers(0, 2, mask.shape, dtype=np.uint8)
    other = np.where(mask == 255, noise, predicted)
    assert boundary_counts(predicted, mask) == boundary_counts(other, mask)
    assert np.array_equal(contour_counts(predicted, mask), contour_counts(other, mask))


@given(mask_pairs())
@settings(max_examples=100, deadline=None)
def test_mirroring_and_swapping_the_masks_have_no_effect(pair: tuple[Mask, Mask]) -> None:
    predicted, mask = pair
    mirrored = [np.ascontiguousarray(m[::-1, ::-1].T) for m in pair]
    assert boundary_counts(*mirrored) == boundary_counts(predicted, mask)
    assert np.array_equal(contour_counts(*mirrored), contour_counts(predicted, mask))
    known = np.where(mask == 255, 0, mask).astype(np.uint8)
    assert boundary_counts(predicted, known) == boundary_counts(known, predicted)
    pred_matched, pred, true_matched, true = contour_counts(predicted, known)
    swapped = contour_counts(known, predicted)
    assert swapped.tolist() == [true_matched, true, pred_matched, pred]
