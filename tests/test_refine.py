"""The guided filter against least squares in every window, and edges drawn by the photo."""

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from segtrain.images import Pixels
from segtrain.prediction import refine as refining
from segtrain.prediction import regions as tiling
from segtrain.prediction.alpha import make_alpha, make_mask
from segtrain.prediction.guided_filter import Plane, apply_coefficients, guided_coefficients
from segtrain.prediction.probability import Values
from segtrain.prediction.refine import refine


def guided_by_least_squares(
    guide: Plane, plane: Plane, radius: int, smoothness: float
) -> npt.NDArray[np.float64]:
    """The paper's equations window by window: fit with a ridge on a, then the mean of all fits."""
    height, width = plane.shape
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            window = (
                slice(max(0, row - radius), row + radius + 1),
                slice(max(0, column - radius), column + radius + 1),
            )
            colours = guide[window].reshape(-1, 3).astype(np.float64)
            left = np.concatenate([colours, np.ones((len(colours), 1))], axis=1)
            # The penalty as three more equations, sqrt(n epsilon) a = 0.
            ridge = np.sqrt(len(colours) * smoothness) * np.eye(3, 4)
            right = np.concatenate([plane[window].ravel(), np.zeros(3)])
            fit = np.linalg.lstsq(np.concatenate([left, ridge]), right, rcond=None)[0]
            # Every pixel of the window is told by this window's fit too.
            total[window] += guide[window] @ fit[:3] + fit[3]
            count[window] += 1
    return total / count


@pytest.mark.parametrize("radius", [1, 2, 4])
@pytest.mark.parametrize("smoothness", [1e-4, 1e-1])
@pytest.mark.parametrize("gray", [False, True])
def test_the_guided_filter_is_a_least_squares_fit_in_every_window(
    radius: int, smoothness: float, gray: bool
) -> None:
    rng = np.random.default_rng(radius)
    guide = rng.random((11, 14, 3), dtype=np.float32)
    if gray:
        guide[:] = guide[..., :1]
    plane = rng.random((11, 14), dtype=np.float32)

    told = apply_coefficients(guide, guided_coefficients(guide, plane, radius, smoothness))

    expected = guided_by_least_squares(guide, plane, radius, smoothness)
    assert np.abs(told - expected).max() < (2e-3 if gray and smoothness < 1e-2 else 1e-4)


def test_a_flat_guide_leaves_the_mean_of_the_windows_means() -> None:
    plane = np.random.default_rng(0).random((9, 9), dtype=np.float32)
    guide = np.full((9, 9, 3), 0.3, dtype=np.float32)

    told = apply_coefficients(guide, guided_coefficients(guide, plane, 1, 1e-4))

    means = [plane[r - 1 : r + 2, c - 1 : c + 2].mean() for r in (3, 4, 5) for c in (3, 4, 5)]
    assert told[4, 4] == pytest.approx(np.mean(means), abs=1e-6)


def drawn(height: int = 240, width: int = 320) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """A noisy photo of a blue person before an orange wall, and where the person is."""
    canvas = np.zeros((height, width), dtype=np.uint8)
    unit = height / 24
    cv2.ellipse(
        canvas, (width // 2, round(8 * unit)), (round(3 * unit), round(4 * unit)), 0, 0, 360, 1, -1
    )
    cv2.ellipse(canvas, (width // 2, height), (round(8 * unit), round(13 * unit)), 0, 0, 360, 1, -1)
    person = canvas > 0
    photo = np.where(person[..., None], (60, 70, 150), (200, 140, 90)).astype(np.float64)
    photo += np.random.default_rng(0).normal(0, 4, photo.shape)
    return photo.clip(0, 255).astype(np.uint8), person


def as_seen(person: npt.NDArray[np.bool_], *, shift: int) -> Values:
    """What a network with little sight says: 1/4 of the size, blurred, and some pixels off."""
    height, width = person.shape
    moved = np.roll(person, shift, axis=1).astype(np.float32)
    small = cv2.resize(moved, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    seen = cv2.resize(cv2.GaussianBlur(small, (0, 0), 1), (width, height))
    return np.asarray(seen, dtype=np.float32)


def wrong(probability: Values, person: npt.NDArray[np.bool_]) -> int:
    return int(((make_mask(probability) > 0) != person).sum())


@pytest.mark.parametrize("pixels_of_coefficients", [2**20, 20_000])
def test_edges_move_to_those_of_the_photo(
    monkeypatch: pytest.MonkeyPatch, pixels_of_coefficients: int
) -> None:
    # At full size, and by coefficients from a copy of half the sides.
    monkeypatch.setattr(refining, "_COEFFICIENT_PIXELS", pixels_of_coefficients)
    photo, person = drawn()
    seen = as_seen(person, shift=3)

    refined = refine(photo, seen)

    assert wrong(seen, person) > 1000
    assert wrong(refined, person) < 50
    # Without an edge in the photo there is nothing to move to.
    assert wrong(refine(np.full_like(photo, 99), seen), person) > 1000


def test_far_from_the_edge_nothing_changes_by_a_bit() -> None:
    photo, person = drawn()
    seen = as_seen(person, shift=3)
    seen[person] = seen[person].clip(0, 0.93)
    before = photo.copy(), seen.copy()

    refined = refine(photo, seen)

    rim = np.asarray(
        cv2.morphologyEx(person.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((41, 41)))
    )
    assert np.array_equal(refined[rim == 0], seen[rim == 0])
    assert (refined != seen).any()
    assert np.array_equal(photo, before[0])
    assert np.array_equal(seen, before[1])


def test_tiles_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining, "_COEFFICIENT_PIXELS", 50_000)
    photo, person = drawn(600, 800)
    seen = as_seen(person, shift=5)

    by_tiles = refine(photo, seen)
    monkeypatch.setattr(tiling, "_SIDE", 10_000)
    at_once = refine(photo, seen)

    assert np.abs(by_tiles - at_once).max() < 2e-3
    assert np.abs(make_alpha(by_tiles).astype(int) - make_alpha(at_once)).max() <= 2


def test_an_edge_moves_into_a_tile_in_which_the_network_saw_none() -> None:
    # Tiles end at column 256; the network's edge is left of it, the photo's right of it.
    photo = np.full((300, 400, 3), (200, 140, 90), dtype=np.uint8)
    photo[:, :258] = (60, 70, 150)
    slope = ((253 - np.arange(400)) / 4 + 0.5).clip(0, 1).astype(np.float32)
    assert slope[256:].max() < 0.3

    refined = refine(photo, np.tile(slope, (300, 1)))

    assert (make_mask(refined) > 0).sum(axis=1).tolist() == [258] * 300


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (2, 2), (3, 2000)])
@pytest.mark.parametrize("colour", [0, 128, 255])
def test_slivers_and_flat_pictures_stay_finite(size: tuple[int, int], colour: int) -> None:
    photo = np.full((*size, 3), colour, dtype=np.uint8)
    probability = np.linspace(0, 1, size[0] * size[1], dtype=np.float32).reshape(size)

    refined = refine(photo, probability)

    assert refined.shape == size
    assert refined.dtype == np.float32
    assert np.isfinite(refined).all()
    assert refined.min() >= 0
    assert refined.max() <= 1
