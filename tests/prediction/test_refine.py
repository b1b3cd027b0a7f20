"""The guided filter against least squares in every window, and edges aligned with the photo."""

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from segtrain.imaging import blocks as image_blocks
from segtrain.prediction import refine
from segtrain.prediction.matting import FloatArray, make_alpha, make_mask
from segtrain.prediction.refine import apply_coefficients, guided_coefficients, refine_probs
from segtrain.types import BoolMask, Image, Probs


def guided_filter_by_least_squares(
    guide: FloatArray, plane: FloatArray, radius: int, epsilon: float
) -> npt.NDArray[np.float64]:
    """The equations of the paper: a ridge fit in each window, then the mean of all fits."""
    height, width = plane.shape
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            window = (
                slice(max(0, row - radius), row + radius + 1),
                slice(max(0, column - radius), column + radius + 1),
            )
            colors = guide[window].reshape(-1, 3).astype(np.float64)
            left = np.concatenate([colors, np.ones((len(colors), 1))], axis=1)
            # The ridge penalty as three more equations, sqrt(n epsilon) a = 0.
            ridge = np.sqrt(len(colors) * epsilon) * np.eye(3, 4)
            right = np.concatenate([plane[window].ravel(), np.zeros(3)])
            fit = np.linalg.lstsq(np.concatenate([left, ridge]), right, rcond=None)[0]
            # This fit contributes to every pixel of the window.
            total[window] += guide[window] @ fit[:3] + fit[3]
            count[window] += 1
    return total / count


@pytest.mark.parametrize("radius", [1, 2, 4])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-1])
@pytest.mark.parametrize("gray", [False, True])
def test_the_guided_filter_is_a_least_squares_fit_in_every_window(
    radius: int, epsilon: float, gray: bool
) -> None:
    rng = np.random.default_rng(radius)
    guide = rng.random((11, 14, 3), dtype=np.float32)
    if gray:
        guide[:] = guide[..., :1]
    plane = rng.random((11, 14), dtype=np.float32)

    filtered = apply_coefficients(guide, guided_coefficients(guide, plane, radius, epsilon))

    expected = guided_filter_by_least_squares(guide, plane, radius, epsilon)
    assert np.abs(filtered - expected).max() < (2e-3 if gray and epsilon < 1e-2 else 1e-4)


def test_a_constant_guide_gives_the_mean_of_the_window_means() -> None:
    plane = np.random.default_rng(0).random((9, 9), dtype=np.float32)
    guide = np.full((9, 9, 3), 0.3, dtype=np.float32)

    filtered = apply_coefficients(guide, guided_coefficients(guide, plane, 1, 1e-4))

    means = [plane[r - 1 : r + 2, c - 1 : c + 2].mean() for r in (3, 4, 5) for c in (3, 4, 5)]
    assert filtered[4, 4] == pytest.approx(np.mean(means), abs=1e-6)


def draw_person(height: int = 240, width: int = 320) -> tuple[Image, BoolMask]:
    """A noisy photo of a blue person in front of an orange wall, and the person's mask."""
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


def coarse_probs(person: BoolMask, *, shift: int) -> Probs:
    """Probabilities of an inaccurate network: 1/4 of the size, blurred, and some pixels off."""
    height, width = person.shape
    shifted = np.roll(person, shift, axis=1).astype(np.float32)
    small = cv2.resize(shifted, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    probs = cv2.resize(cv2.GaussianBlur(small, (0, 0), 1), (width, height))
    return np.asarray(probs, dtype=np.float32)


def num_wrong(probs: Probs, person: BoolMask) -> int:
    return int(((make_mask(probs) > 0) != person).sum())


@pytest.mark.parametrize("max_pixels", [2**20, 20_000])
def test_edges_move_to_those_of_the_photo(monkeypatch: pytest.MonkeyPatch, max_pixels: int) -> None:
    # With coefficients computed at full size, and at half the height and width.
    monkeypatch.setattr(refine, "_MAX_COEFFICIENT_PIXELS", max_pixels)
    photo, person = draw_person()
    probs = coarse_probs(person, shift=3)

    refined = refine_probs(photo, probs)

    assert num_wrong(probs, person) > 1000
    assert num_wrong(refined, person) < 50
    # In a photo without edges, the edges stay where they are.
    assert num_wrong(refine_probs(np.full_like(photo, 99), probs), person) > 1000


def test_values_far_from_the_edge_are_bit_identical() -> None:
    photo, person = draw_person()
    probs = coarse_probs(person, shift=3)
    probs[person] = probs[person].clip(0, 0.93)
    originals = photo.copy(), probs.copy()

    refined = refine_probs(photo, probs)

    rim = np.asarray(
        cv2.morphologyEx(person.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((41, 41)))
    )
    assert np.array_equal(refined[rim == 0], probs[rim == 0])
    assert (refined != probs).any()
    assert np.array_equal(photo, originals[0])
    assert np.array_equal(probs, originals[1])


def test_refined_probabilities_have_no_seams_between_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refine, "_MAX_COEFFICIENT_PIXELS", 50_000)
    photo, person = draw_person(600, 800)
    probs = coarse_probs(person, shift=5)

    by_blocks = refine_probs(photo, probs)
    monkeypatch.setattr(image_blocks, "_SIDE", 10_000)
    whole = refine_probs(photo, probs)

    assert np.abs(by_blocks - whole).max() < 2e-3
    assert np.abs(make_alpha(by_blocks).astype(int) - make_alpha(whole)).max() <= 2


def test_an_edge_moves_into_a_block_without_predicted_edge() -> None:
    # Blocks end at column 256; the predicted edge is left of it, that of the photo right of it.
    photo = np.full((300, 400, 3), (200, 140, 90), dtype=np.uint8)
    photo[:, :258] = (60, 70, 150)
    slope = ((253 - np.arange(400)) / 4 + 0.5).clip(0, 1).astype(np.float32)
    assert slope[256:].max() < 0.3

    refined = refine_probs(photo, np.tile(slope, (300, 1)))

    assert (make_mask(refined) > 0).sum(axis=1).tolist() == [258] * 300


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (2, 2), (3, 2000)])
@pytest.mark.parametrize("color", [0, 128, 255])
def test_tiny_and_constant_images_stay_finite(size: tuple[int, int], color: int) -> None:
    photo = np.full((*size, 3), color, dtype=np.uint8)
    probs = np.linspace(0, 1, size[0] * size[1], dtype=np.float32).reshape(size)

    refined = refine_probs(photo, probs)

    assert refined.shape == size
    assert refined.dtype == np.float32
    assert np.isfinite(refined).all()
    assert refined.min() >= 0
    assert refined.max() <= 1
