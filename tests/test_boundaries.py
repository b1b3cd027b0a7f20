"""Boundary IoU and contour F: against other ways to the same numbers, and ignored pixels."""

import itertools
import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from segtrain.evaluation import boundaries
from segtrain.evaluation.boundaries import (
    boundary_counts,
    boundary_depth,
    contour_counts,
    squared_tolerance,
)
from segtrain.images import Pixels

Bools = npt.NDArray[np.bool_]


def blobs(seed: int, shape: tuple[int, int], ignored: bool = False) -> tuple[Pixels, Pixels]:
    """A prediction and a truth with outlines that lie near each other, and ignored blobs."""
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


# --- Written again ------------------------------------------------------------------------------


def boundary_by_windows(some: Bools, unknown: Bools, depth: int) -> Bools:
    """Pixel by pixel: of the mask, and something else in the square around it."""
    height, width = some.shape
    found = np.zeros_like(some)
    for y, x in itertools.product(range(height), range(width)):
        if not some[y, x] or unknown[y, x]:
            continue
        reaches_out = y - depth < 0 or x - depth < 0 or y + depth >= height or x + depth >= width
        rows, columns = (
            slice(max(0, y - depth), y + depth + 1),
            slice(max(0, x - depth), x + depth + 1),
        )
        others = ~some[rows, columns] & ~unknown[rows, columns]
        found[y, x] = reaches_out or others.any()
    return found


def boundary_counts_again(predicted: Pixels, mask: Pixels) -> tuple[int, int]:
    unknown = mask == 255
    depth = max(1, round(0.02 * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2)))
    ours = boundary_by_windows(predicted == 1, unknown, depth)
    theirs = boundary_by_windows(mask == 1, unknown, depth)
    return int((ours & theirs).sum()), int((ours | theirs).sum())


def contour_points(some: Bools, unknown: Bools) -> list[tuple[int, int]]:
    height, width = some.shape
    points = []
    for y, x in itertools.product(range(height), range(width)):
        neighbours = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [(j, i) for j, i in neighbours if 0 <= j < height and 0 <= i < width]
        outside = any(not some[p] and not unknown[p] for p in inside)
        if some[y, x] and not unknown[y, x] and outside:
            points.append((y, x))
    return points


def contour_counts_again(predicted: Pixels, mask: Pixels) -> list[int]:
    """Every pair of points."""
    unknown = mask == 255
    tolerance = max(1.0, 0.0075 * math.hypot(*mask.shape)) + 1e-9

    def near(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
        return sum(any(math.dist(p, q) <= tolerance for q in others) for p in points)

    hidden = [(int(y), int(x)) for y, x in np.argwhere(unknown)]
    ours, theirs = (contour_points(m == 1, unknown) for m in (predicted, mask))
    counts = []
    for points, others in ((ours, theirs), (theirs, ours)):
        judged = [p for p in points if not near([p], hidden)]
        counts += [near(judged, others), len(judged)]
    return counts


@pytest.mark.parametrize("ignored", [False, True], ids=["all known", "some ignored"])
@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (90, 130), (1, 50), (50, 1), (2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_boundary_counts_are_those_of_windows_around_every_pixel(
    seed: int, shape: tuple[int, int], ignored: bool
) -> None:
    predicted, mask = blobs(seed, shape, ignored)
    assert boundary_counts(predicted, mask) == boundary_counts_again(predicted, mask)


@pytest.mark.parametrize("ignored", [False, True], ids=["all known", "some ignored"])
@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (1, 50), (50, 1), (140, 170), (2, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_contour_counts_are_those_of_all_pairs_of_points(
    seed: int, shape: tuple[int, int], ignored: bool
) -> None:
    predicted, mask = blobs(seed, shape, ignored)
    assert contour_counts(predicted, mask).tolist() == contour_counts_again(predicted, mask)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(48, 64), (480, 640), (333, 500), (7, 300)])
def test_boundary_counts_are_those_of_many_small_erosions(
    seed: int, shape: tuple[int, int]
) -> None:
    """The procedure that the measure is published with: a border of zeros, d steps of 3x3."""

    def boundary(some: Pixels) -> Bools:
        depth = max(1, round(0.02 * math.sqrt(shape[0] ** 2 + shape[1] ** 2)))
        left = np.pad(some, 1)
        for _ in range(depth):
            left = np.asarray(cv2.erode(left, np.ones((3, 3), np.uint8)), dtype=np.uint8)
        return (some > left[1:-1, 1:-1]).astype(bool)

    predicted, mask = blobs(seed, shape)
    ours, theirs = boundary(predicted), boundary(mask)
    expected = (int((ours & theirs).sum()), int((ours | theirs).sum()))
    assert boundary_counts(predicted, mask) == expected


@pytest.mark.parametrize("squared", [1, 2, 25, 36, 144, 256, 289, 300, 1406])
def test_disks_and_distances_find_the_same_neighbours(
    monkeypatch: pytest.MonkeyPatch, squared: int
) -> None:
    rng = np.random.default_rng(squared)
    some = rng.random((150, 170)) < 0.001
    monkeypatch.setattr(boundaries, "_LARGEST_DISK", 100)
    by_disk = boundaries._within(some, squared)
    monkeypatch.setattr(boundaries, "_LARGEST_DISK", 0)
    by_distance = boundaries._within(some, squared)
    y, x = np.mgrid[:150, :170]
    by_hand = np.zeros_like(some)
    for j, i in np.argwhere(some):
        by_hand |= (y - j) ** 2 + (x - i) ** 2 <= squared
    assert np.array_equal(by_disk, by_hand)
    assert np.array_equal(by_distance, by_hand)


# --- By hand ------------------------------------------------------------------------------------


def square(shape: tuple[int, int], top: int, left: int, side: int) -> Pixels:
    mask = np.zeros(shape, dtype=np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


@pytest.mark.parametrize(
    ("size", "depth"), [((480, 640), 16), ((1, 1), 1), ((30, 40), 1), ((60, 80), 2), ((100, 75), 2)]
)
def test_depth_is_two_percent_of_the_diagonal(size: tuple[int, int], depth: int) -> None:
    # At 100x75 the share is 2.5, which rounds to the even number, as the authors' does.
    assert boundary_depth(*size) == depth


@pytest.mark.parametrize(
    ("size", "squared"), [((480, 640), 36), ((479, 640), 35), ((1, 1), 1), ((3000, 4000), 1406)]
)
def test_tolerance_includes_its_end(size: tuple[int, int], squared: int) -> None:
    assert squared_tolerance(*size) == squared


def test_boundaries_of_two_squares_by_hand() -> None:
    """At 30x40 a boundary is one pixel deep: 10x10 squares have 36 pixels of it.

    Moved by one to the right, the boundaries share the upper and the lower row, 9 pixels each; the
    right column of one is inside the other.
    """
    left, right = square((30, 40), 10, 10, 10), square((30, 40), 10, 11, 10)
    assert boundary_counts(left, right) == (18, 2 * 36 - 18)
    assert boundary_counts(left, left) == (36, 36)


def test_a_contour_moved_by_the_tolerance_agrees_and_by_one_more_does_not() -> None:
    """A straight edge across 480x640 and one 6 or 7 pixels beside it."""
    truth = np.zeros((480, 640), dtype=np.uint8)
    truth[:, :300] = 1
    for moved, found in ((6, 480), (7, 0)):
        predicted = np.zeros_like(truth)
        predicted[:, : 300 + moved] = 1
        assert contour_counts(predicted, truth).tolist() == [found, 480, found, 480]


def test_the_frame_is_a_boundary_but_no_contour() -> None:
    everything = np.ones((30, 40), dtype=np.uint8)
    assert boundary_counts(everything, everything) == (2 * 30 + 2 * 40 - 4,) * 2
    assert contour_counts(everything, everything).tolist() == [0, 0, 0, 0]


def test_a_person_cut_by_an_ignored_region_has_no_outline_there() -> None:
    """Left half person, right half ignored: nothing can be said but at the frame."""
    mask = np.ones((30, 40), dtype=np.uint8)
    mask[:, 20:] = 255
    assert boundary_counts(np.ones_like(mask), mask) == (20 + 20 + 28,) * 2
    assert contour_counts(np.ones_like(mask), mask).tolist() == [0, 0, 0, 0]


def test_contours_beside_ignored_pixels_are_not_judged_but_are_partners() -> None:
    """An edge down 30x40, whose tolerance is one pixel, and an ignored pixel on its fifth row."""
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[:, :20] = 1
    mask[4, 20] = 255
    # Ignored is the neighbour of (4, 19), where there is no contour; distance 1 to no other.
    assert contour_counts((mask == 1).astype(np.uint8), mask).tolist() == [29, 29, 29, 29]
    mask[4, 20], mask[4, 19] = 0, 255
    # Now (3, 19) and (5, 19) are beside it; the pixel (4, 18) has no known neighbour outside.
    assert contour_counts((mask == 1).astype(np.uint8), mask).tolist() == [27, 27, 27, 27]


# --- Properties ---------------------------------------------------------------------------------

_SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Pixels, Pixels]:
    shape = draw(_SHAPES)
    predicted = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1])))
    mask = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 255])))
    return predicted, mask


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_any_small_masks_give_the_counts_of_the_slow_ways(pair: tuple[Pixels, Pixels]) -> None:
    assert boundary_counts(*pair) == boundary_counts_again(*pair)
    assert contour_counts(*pair).tolist() == contour_counts_again(*pair)


@given(pairs(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_what_is_predicted_under_ignored_pixels_changes_nothing(
    pair: tuple[Pixels, Pixels], seed: int
) -> None:
    predicted, mask = pair
    noise = np.random.default_rng(seed).integers(0, 2, mask.shape, dtype=np.uint8)
    other = np.where(mask == 255, noise, predicted)
    assert boundary_counts(predicted, mask) == boundary_counts(other, mask)
    assert np.array_equal(contour_counts(predicted, mask), contour_counts(other, mask))


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_mirrored_pictures_and_swapped_roles_give_the_same(pair: tuple[Pixels, Pixels]) -> None:
    predicted, mask = pair
    mirrored = [np.ascontiguousarray(some[::-1, ::-1].T) for some in pair]
    assert boundary_counts(*mirrored) == boundary_counts(predicted, mask)
    assert np.array_equal(contour_counts(*mirrored), contour_counts(predicted, mask))
    known = np.where(mask == 255, 0, mask).astype(np.uint8)
    assert boundary_counts(predicted, known) == boundary_counts(known, predicted)
    found, of, met, there = contour_counts(predicted, known)
    assert contour_counts(known, predicted).tolist() == [met, there, found, of]
